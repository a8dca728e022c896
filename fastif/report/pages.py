"""What the report pages have in common: figures, tables and an HTML page that holds everything and needs nothing."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1c2430; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
       "Helvetica Neue", Arial, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.015em; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
p { max-width: 46rem; margin: .5rem 0; }
.lead { color: #4a5563; font-size: 1.05rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.tile { border: 1px solid #e3e7ec; border-radius: .6rem; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile span { color: #4a5563; font-size: .85rem; line-height: 1.35; display: block; }
.table { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: separate; border-spacing: 0; min-width: 100%;
        font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e9ecf0; }
th { font-weight: 600; border-bottom: 2px solid #c9d0d8; vertical-align: bottom; }
th small { display: block; font-weight: 400; color: #5b6675; }
th:first-child, td:first-child, .classes td:nth-child(2) { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; }
@media (max-width: 40rem) { th, td { padding: .38rem .5rem; }
  td:first-child { white-space: normal; max-width: 8.5rem; } }
tr.reference td { background: #f5f7f9; }
td i { color: #5b6675; font-style: normal; font-size: .92em; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.facts td:first-child { white-space: nowrap; color: #4a5563; position: static; }
figure { margin: 1.2rem 0 2rem; }
img { max-width: 100%; height: auto; display: block; }
figcaption { color: #4a5563; font-size: .9rem; max-width: 46rem; margin-top: .4rem; }
details { margin: .8rem 0; } summary { cursor: pointer; font-weight: 600; }
"""


def new_figure(columns: int, rows: int, width: float, height: float, **subplot: Any) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **subplot)
    for ax in axes.flat:
        if ax.name != "polar":
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(True, color="#e6e6e6", linewidth=0.8)
            ax.set_axisbelow(True)
    return figure, axes


def png_of(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", facecolor="white")
    return stream.getvalue()


def document(title: str, body: str) -> str:
    """A page with the report's style; `body` is HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text_of(title)}</title><style>{_STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def picture(name: str, png: bytes, caption: str) -> str:
    """A figure that the page holds within itself."""
    return (
        f'<figure><img alt="{text_of(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{text_of(caption)}</figcaption></figure>"
    )


def table(head: Sequence[tuple[str, str]], rows: Iterable[tuple[str, Sequence[str]]], style: str = "") -> str:
    """A table from (title, unit) pairs and rows (css class, cells); cells are HTML."""
    titles = "".join(f"<th>{text_of(name)}<small>{text_of(unit)}</small></th>" for name, unit in head)
    lines = "".join(
        f'<tr class="{kind}">' + "".join(f"<td>{value}</td>" for value in cells) + "</tr>" for kind, cells in rows
    )
    return (
        f'<div class=table><table class="{style}"><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def facts_table(facts: Mapping[str, Any]) -> str:
    rows = [("", [text_of(name), text_of(_plain(value))]) for name, value in facts.items()]
    lines = "".join("<tr>" + "".join(f"<td>{value}</td>" for value in cells) + "</tr>" for _, cells in rows)
    return f"<div class=table><table class=facts><tbody>{lines}</tbody></table></div>"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(entry) for entry in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def text_of(value: str) -> str:
    return html.escape(str(value))
