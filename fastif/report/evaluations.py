"""One page and one JSON file for any number of evaluations, in the style of the class-removal report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastif.evaluation import LDS, Agreement, Brittleness, Counterfactual, Detection, Interval, LeftOut
from fastif.files import write_whole
from fastif.report.pages import document, facts_table, new_figure, picture, png_of, table, text_of

Result = LDS | Agreement | Brittleness | Counterfactual | Detection | LeftOut


def as_json(value: Any) -> Any:
    """A result as JSON: named tuples as objects, tensors as lists.

    >>> as_json(Interval(0.5, 0.25, 0.75))
    {'mean': 0.5, 'low': 0.25, 'high': 0.75}
    """
    if isinstance(value, Tensor):
        return value.tolist()
    if hasattr(value, "_asdict"):
        return {name: as_json(part) for name, part in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(name): as_json(part) for name, part in value.items()}
    return [as_json(part) for part in value] if isinstance(value, list | tuple) else value


def write_evaluations(
    results: Mapping[str, Result],
    out: str | Path,
    *,
    title: str = "Evaluations",
    about: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Writes `evaluations.json` and `evaluations.html` to the folder `out`; returns their paths.

    `results` are results of `fastif.evaluation` by name, of any kinds; a name usually says which scores were judged.
    `about` stands in the file and at the foot of the page. Raises ValueError for none at all, TypeError for others.
    """
    if not results:
        raise ValueError("write_evaluations: there are no results")
    for name, result in results.items():
        if not isinstance(result, Result):
            raise TypeError(f"write_evaluations: {name!r} is no result of an evaluation but {type(result).__name__}")
    kinds: dict[type, dict[str, Any]] = {}
    for name, result in results.items():
        kinds.setdefault(type(result), {})[name] = result
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    stored = {
        "about": as_json(dict(about or {})),
        "results": {name: {"kind": type(result).__name__, **as_json(result)} for name, result in results.items()},
    }
    paths = [out / "evaluations.json", out / "evaluations.html"]
    write_whole(paths[0], json.dumps(stored, indent=1, allow_nan=False))
    sections = "".join(_SECTIONS[kind](named) for kind, named in kinds.items())
    foot = f"<h2>How it was made</h2>{facts_table(stored['about'])}" if about else ""
    write_whole(paths[1], document(title, f"<h1>{text_of(title)}</h1>{sections}{foot}"))
    return paths


# ----------------------------------------------------------------------------------------------------------- sections


def _section(title: str, words: str, head: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> str:
    cells = [("", [text_of(cell) for cell in row]) for row in rows]
    return f"<h2>{text_of(title)}</h2><p>{text_of(words)}</p>{table(head, cells)}"


def _shown(found: Interval) -> str:
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _lds(named: Mapping[str, LDS]) -> str:
    words = (
        "Rank correlation, query by query, of the scores summed over what was removed with what retraining on the rest "
        "gave; mean over the queries and its 95 % bootstrap interval. 1 is perfect, 0 is chance."
    )
    rows = [[name, _shown(r.score), str(len(r.by_query)), str(r.constant)] for name, r in named.items()]
    head = [("", ""), ("LDS", "higher is better"), ("queries", ""), ("undefined", "count as 0")]
    return _section("Linear datamodeling score", words, head, rows)


def _agreement(named: Mapping[str, Agreement]) -> str:
    words = "Correlation of predicted and true rises over what was left out; mean over the queries, 95 % interval."
    rows = [[name, _shown(r.spearman), _shown(r.pearson), str(r.constant)] for name, r in named.items()]
    head = [("", ""), ("Spearman", "higher is better"), ("Pearson", "higher is better"), ("undefined", "count as 0")]
    return _section("Agreement with leaving out", words, head, rows)


def _left_out(named: Mapping[str, LeftOut]) -> str:
    words = "The true rise of the queries' measurement when a group is left out; standard errors are over the seeds."
    rows = []
    for name, r in named.items():
        error = "one seed" if r.errors is None else f"{float(r.errors.mean()):.2e}"
        size = f"{float(r.rises.abs().mean()):.2e}"
        rows.append([name, str(len(r.groups)), f"{float(r.rises.mean()):.2e}", size, error])
    head = [("", ""), ("groups", ""), ("mean rise", ""), ("mean size", "of a rise"), ("standard error", "mean")]
    return _section("Left out", words, head, rows)


def _detection(named: Mapping[str, Detection]) -> str:
    words = "How well a suspicion tells wrong labels from right ones. By chance: AUC 0.5, precision the share of wrong."
    rows = [
        [name, f"{r.auc:.4f}", f"{r.precision:.4f}", f"{r.checked:,}", f"{r.wrong:.4f}"] for name, r in named.items()
    ]
    head = [
        ("", ""),
        ("AUC", "higher is better"),
        ("precision", "of the highest"),
        ("highest", ""),
        ("wrong", "of all"),
    ]
    return _section("Mislabel detection", words, head, rows)


def _brittleness(named: Mapping[str, Brittleness]) -> str:
    words = "Share of the right predictions that are wrong once so many of their most helpful examples are removed."
    sizes = sorted({size for r in named.values() for size in r.sizes})
    rows = []
    for name, r in named.items():
        share = dict(zip(r.sizes, r.flipped, strict=True))
        cells = [f"{share[size]:.2f}" if size in share else "" for size in sizes]
        rows.append([name, f"{sum(r.right)} of {len(r.right)}", *cells])
    return _section(
        "Brittleness", words, [("", ""), ("right", ""), *((f"{size:,}", "removed") for size in sizes)], rows
    )


def _counterfactual(named: Mapping[str, Counterfactual]) -> str:
    words = "True rise of a query's measurement without so many of its most helpful examples, mean over the queries."
    rows = []
    figure, axes = new_figure(1, 1, 7.2, 4.2)
    for number, (name, r) in enumerate(named.items()):
        for size, own, chance in zip(r.sizes, r.mean, r.random_mean, strict=True):
            rows.append([name, f"{size:,}", f"{_shown(own)}", f"{_shown(chance)}"])
        for line, found, label in (("-", r.mean, name), (":", r.random_mean, f"{name}: random")):
            low = [max(0.0, f.mean - f.low) for f in found]
            high = [max(0.0, f.high - f.mean) for f in found]
            style = dict(linestyle=line, marker="o", markersize=4, capsize=2, color=f"C{number}", label=label)
            axes[0][0].errorbar(r.sizes, [f.mean for f in found], [low, high], **style)
    axes[0][0].set_xlabel("training examples removed")
    axes[0][0].set_ylabel("rise of the measurement")
    axes[0][0].legend(frameon=False, fontsize=9)
    head = [("", ""), ("removed", ""), ("rise", "most helpful"), ("rise", "random")]
    caption = "Solid: the highest scores removed; dotted: random examples. Whiskers: 95 % intervals over the queries."
    return _section("Counterfactuals", words, head, rows) + picture("counterfactuals", png_of(figure), caption)


_SECTIONS: dict[type, Callable[[Any], str]] = {
    LDS: _lds,
    Agreement: _agreement,
    LeftOut: _left_out,
    Detection: _detection,
    Brittleness: _brittleness,
    Counterfactual: _counterfactual,
}
