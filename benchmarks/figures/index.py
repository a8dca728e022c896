"""The tables and the picture of docs/index-of-gradients.md, from what `make bench-index` kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastif.report.pages import new_figure

from . import tables


def index_table(name: str) -> str:
    results = tables.results_of(name)
    lines = [
        "| | bytes, of float32 gradients | build | 1 query | 10 | 100 | r | ρ | of the ten best |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    apart = []
    models = [benchmark for benchmark in results["benchmarks"] if "rows" in benchmark["extra_info"]]
    for benchmark in models:
        extra: dict[str, Any] = benchmark["extra_info"]
        label = benchmark["name"].split("[")[1].rstrip("]")
        walks = extra["walks"]
        lines.append(
            f"| **{label}**, {extra['parameters']:,} parameters, {extra['n']:,} × {extra['q']:,}: a walk | | | "
            + " | ".join(f"{walks[q]:.2f} s" if q in walks else "" for q in _QUERIES)
            + " | 1 | 1 | 1 |"
        )
        for row in sorted(extra["rows"], key=_order):
            own = ""
            if "asked" in row:
                own = f" ({row['bytes_each']:,.0f} each)"
            times: dict[str, float] = row.get("asked", {})
            asked = [f"{times[q]:.3f} s ({_ratio(walks[q] / times[q])}×)" if q in times else "" for q in _QUERIES]
            build = f"{row['build']:.2f} s ({row['build'] / walks['1']:.1f}×)" if "build" in row else ""
            figures = " | ".join([build, *asked])
            name_of = f"**{row['contender']}**" if row["contender"].startswith("fastif") else row["contender"]
            lines.append(
                f"| {name_of} | {100 * row['bytes']:.2g} %{own} | {figures} | {row['r']:.3f} | {row['rho']:.3f} | "
                f"{row['top']:.2f} |"
            )
        if one := extra["one_pass"]:
            ratio = one["apart"] / one["together"]
            apart.append(f"{label} {one['apart']:.1f} s and {one['together']:.1f} s ({ratio:.2f}×)")
    if not models:
        grown = next(benchmark["extra_info"]["growth"] for benchmark in results["benchmarks"])
        made = f"{tables._machine(results)}. Made by `FASTIF_BENCH=growth make bench-index`."
        return "\n".join([*_growth(grown), made])
    kinds = {
        "index-large-cpu": "FASTIF_BENCH=large ",
        "index-whole-cpu": "FASTIF_BENCH=whole FASTIF_BENCH_SCALE=1 ",
        "index-texts-cpu": "FASTIF_BENCH=texts FASTIF_BENCH_SCALE=1 ",
    }
    from_one = "Scores, self-influence and an index one after another, and from one walk: "
    once = f"{from_one}{'; '.join(apart)}. " if apart else ""
    command = f"{kinds.get(name, '')}make bench-index"
    lines += [
        "",
        "EK-FAC with the empirical Fisher, damping 1e-3; processor seconds. In brackets: bytes of an example, the "
        "build as a multiple of a walk with one query (its sample and its measured error are in it), and by how much "
        "asking the index is faster than a walk with as many queries. With share=1 in float32 the scores are those of "
        f"`Influence.scores` to 1e-5, which is asserted. {once}{tables._machine(results)}. Made by `{command}`.",
    ]
    return "\n".join(lines)


def _growth(rows: list[dict[str, Any]]) -> list[str]:
    """One query of indexes that grow."""
    lines = [
        "| examples | MiB | one query | of an example | read | of a copy's rate |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate = row["bytes"] / row["seconds"]
        lines.append(
            f"| {row['n']:,} | {row['bytes'] / 2**20:,.0f} | {row['seconds']:.3f} s | "
            f"{1e6 * row['seconds'] / row['n']:.2f} µs | {rate / 1e9:.2f} GB/s | {rate / row['copied']:.0%} |"
        )
    return [
        *lines,
        "",
        "Two random int8 factors of each example in layers of 64 × 65 and 10 × 65 numbers; processor seconds of one "
        "thread.",
    ]


def _ratio(times: float) -> str:
    """Of what is slower than a walk, a figure other than 0."""
    return f"{times:.0f}" if times >= 1 else f"{times:.1g}"


def _order(row: dict[str, Any]) -> tuple[int, str, float]:
    first = 0 if row["contender"].startswith("fastif") else 1 if "asked" in row else 2
    return first, row["contender"], row["bytes"]


def fidelity_picture(name: str, path: Path) -> None:
    """Spearman's ρ of scores from what is kept against its bytes, a panel for each model."""
    results = tables.results_of(name)
    panels = [(b["name"].split("[")[1].rstrip("]"), b["extra_info"]["rows"]) for b in results["benchmarks"]]
    contenders = dict.fromkeys(row["contender"] for _, rows in panels for row in rows)
    colours, lines = dict(zip(contenders, _COLOURS, strict=False)), {}
    figure, axes = new_figure(len(panels), 1, 11, 3.6, sharey="row")
    for axis, (label, rows) in zip(axes[0], panels, strict=True):
        for contender in dict.fromkeys(row["contender"] for row in rows):
            own = [row for row in rows if row["contender"] == contender]
            width = 2.4 if contender.startswith("fastif") else 1.2
            (lines[contender],) = axis.semilogx(
                [100 * row["bytes"] for row in own],
                [row["rho"] for row in own],
                label=contender, color=colours[contender], linewidth=width, marker="o", markersize=width + 2,
            )  # fmt: skip
        axis.set(title=label, xlabel="% of the bytes of float32 gradients", ylim=(0, 1.02))
        axis.set_xticks([0.25, 1, 4, 16], ["0.25", "1", "4", "16"])
        axis.minorticks_off()
    axes[0][0].set_ylabel("Spearman's ρ with exact scores")
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None, "Description": results["datetime"]})


_QUERIES = ("1", "10", "100")
_COLOURS = ("#d55e00", "#0072b2", "#56b4e9", "#009e73", "#cc79a7", "#000000")
