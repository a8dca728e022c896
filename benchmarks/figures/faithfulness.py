"""The tables and the picture of docs/evaluation.md: which scores predict retraining, and what they cost."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from fastif.report.pages import new_figure

from . import tables

_PEERS = ("kronfluence", "dattri")


_HEAD, _EK, _RULE = "fastif, exact block of the head", "fastif, EK-FAC", ", damping from the training"
_PARTS = {  # rows of the table "lds" that stand by themselves elsewhere
    "lds-index": [f"{_EK}{_RULE}", *(f"{_EK}, an index of {k} %{_RULE}" for k in (1, 4))],
    "lds-default": [
        _HEAD,
        f"{_HEAD}{_RULE}",
        *(f'fastif, "auto"{rule}' for rule in (_RULE, ", a tenth of the mean eigenvalue")),
    ],
}


def lds_table(name: str) -> str:
    results = tables.results_of("lds" if name in _PARTS else name)
    models = results["meta"]["models"]
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in results["lds"]:
        if name in _PARTS and row["contender"] not in _PARTS[name]:
            continue
        cells.setdefault(row["contender"], {}).setdefault(row["model"], []).append(row)
    heads = " | ".join(f"{model}: halves | 80 % kept | CPU s" for model in models)
    lines = [f"| | {heads} |", "|---|" + "---|---|---|" * len(models)]
    for contender, found in cells.items():
        figures = []
        for model in models:
            rows = found.get(model, [])
            finite = [row for row in rows if row["lds"] is not None]
            if not finite:
                figures.append("not finite | | " if rows else "– | – | –")
                continue
            best = max(finite, key=lambda row: row["lds"]["mean"])
            fresh = max(finite, key=lambda row: row["fresh"]["mean"])["fresh"]
            half = (best["lds"]["high"] - best["lds"]["low"]) / 2
            figures.append(f"{best['lds']['mean']:.3f} ± {half:.3f} | {fresh['mean']:.3f} | {best['cpu_seconds']:.2f}")
        lines.append(f"| {contender} | {' | '.join(figures)} |")
    ceilings = [
        "1 | 1" if c[0] is None else f"{c[0]:.3f} | {c[1]:.3f}" for c in (f["ceilings"] for f in models.values())
    ]
    lines.append("| *ceiling, from how far the seeds of a set agree* | " + " | | ".join(ceilings) + " | |")
    sizes = "; ".join(
        f"{model}: {facts['parameters']:,} parameters, {facts['seeds']} seed{'s' if facts['seeds'] > 1 else ''} a set, "
        f"{facts['accuracy']:.0%} of the queries right, {facts['seconds_of_a_retraining']:.2f} s to train on a half"
        for model, facts in models.items()
    )
    facts = next(iter(models.values()))
    meta = results["meta"]
    lines += [
        "",
        f"{facts['n']:,} training examples, {facts['queries']} queries, {facts['subsets']} halves of the data and "
        f"{facts['fresh']} sets that keep 80 %. {sizes}. LDS ± half of its 95 % interval over the queries. Rows with "
        "damping from the training chose nothing; in the others each figure is that of the best of the dampings 0.001, "
        "0.01 and 0.1, contender by contender. CPU seconds: fit and scores, of the best LDS on halves; the training of "
        "the networks that are explained comes on top. –: not run. "
        f"{meta['device']}, {tables.threads_of(meta['threads'])}, torch {meta['versions']['torch']}. "
        "Made by `python -m benchmarks.experiments.lds`.",
    ]
    return "\n".join(lines)


def lds_text_table(name: str) -> str:
    results = tables.results_of(name)
    meta = results["meta"]
    lines = [
        "| | LDS, halves | LDS, without a random 5 % | QLD: rise without its first 5 % | CPU s |",
        "|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        spread = [f"{row[k]['mean']:.3f} ± {(row[k]['high'] - row[k]['low']) / 2:.3f}" for k in _TEXT]
        lines.append(f"| {row['contender']} | {' | '.join(spread)} | {row['cpu_seconds']:.1f} |")
    chance = results["rows"][0]["qld at random"]["mean"]
    ceilings = " | ".join("–" if c is None else f"{c:.3f}" for c in meta["ceilings"].values())
    lines += [
        f"| *ceiling, from how far the seeds of a set agree* | {ceilings} | | |",
        "",
        f"A GPT of two layers and {meta['parameters']:,} parameters, {meta['n']:,} training texts of BANKING77, "
        f"{meta['queries']} queries, {meta['subsets']} sets of each kind with {meta['seeds']} seeds; a text's loss is "
        f"the sum over its words. QLD of {meta['qld']} queries, {meta['qld']} networks trained anew for each row; "
        f"without a random 5 % the loss rises by {chance:.2f}. ± half of the 95 % interval over the queries. CPU "
        f"seconds: fit and scores; training on a half takes {meta['seconds_of_a_retraining']:.1f} s more for each "
        f"network on halves. {meta['device']}, {tables.threads_of(meta['threads'])}, "
        f"torch {meta['versions']['torch']}. "
        "Made by `python -m benchmarks.experiments.lds_text`.",
    ]
    return "\n".join(lines)


def calibration_table(name: str) -> str:
    """How many true rises lie within two standard errors of their scores."""
    results = tables.results_of(name)
    meta = results["meta"]
    lines = [
        "| half networks | within ± 2 standard errors | with the noise of retraining | true rise for a score of 1 "
        "| median rise | median standard error | median noise |",
        "|---" * 7 + "|",
    ]
    for row in results["rows"]:
        lines.append(
            f"| {row['model']}: {row['networks']} | {row['inside']:.0%} | {row['inside with noise']:.0%} "
            f"| {row['slope']:.2f} | {row['rise']:.1e} | {row['error']:.1e} | {row['noise']:.1e} |"
        )
    lines += [
        "",
        f"Rises of the losses of {meta['queries']} queries after retraining without each of {meta['groups']} groups of "
        f"{meta['n'] // meta['groups']} of {meta['n']:,} examples, means over {meta['seeds']} seeds; "
        '`curvature="auto"`, damping from the training. '
        f"{meta['device']}, {tables.threads_of(meta['threads'])}, torch {meta['versions']['torch']}. "
        "Made by `python -m benchmarks.experiments.calibration`.",
    ]
    return "\n".join(lines)


_TEXT = ("halves", "without 5 %", "qld")


def faithfulness_picture(name: str, path: Path) -> None:
    """LDS against CPU seconds, the training of the networks that are explained among them; a panel for each model."""
    results = tables.results_of(name)
    models = {model: facts for model, facts in results["meta"]["models"].items() if facts["ceilings"][0] is not None}
    figure, axes = new_figure(len(models), 1, 11, 4.6)
    for axis, (model, facts) in zip(axes[0], models.items(), strict=True):
        best: dict[str, dict[str, Any]] = {}
        for row in results["lds"]:
            if row["model"] == model and row["lds"]:
                held = best.get(row["contender"], row)
                best[row["contender"]] = max(row, held, key=lambda one: one["lds"]["mean"])
        for kind, colour, marker in _KINDS:
            own = [row for contender, row in best.items() if _kind_of(contender) == kind]
            cost = [row["cpu_seconds"] + _training(row["contender"], facts) for row in own]
            axis.scatter(cost, [row["lds"]["mean"] for row in own], color=colour, marker=marker, label=kind, s=36)
        axis.axhline(facts["ceilings"][0], color="0.5", linestyle="--", linewidth=1)
        axis.text(0.02, facts["ceilings"][0] - 0.035, "ceiling", transform=axis.get_yaxis_transform(), color="0.4")
        axis.set(title=model, xlabel="CPU seconds, networks on halves included", xscale="log", ylim=(0, 1))
    axes[0][0].set_ylabel("LDS against retraining on halves")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None, "Description": results["meta"]["versions"]["torch"]})


_KINDS = (
    ("one network", "#0072b2", "o"),
    ("several networks", "#d55e00", "s"),
    ("replay and SOURCE", "#009e73", "D"),
    ("peers, their best damping", "0.45", "^"),
)


def _kind_of(contender: str) -> str:
    if contender.startswith(_PEERS):
        return _KINDS[3][0]
    if "replay" in contender or "SOURCE" in contender:
        return _KINDS[2][0]
    return _KINDS[1 if "networks" in contender else 0][0]


def _training(contender: str, facts: dict[str, Any]) -> float:
    """Seconds to train the networks beyond the one to be explained."""
    words = contender.replace(",", " ").split()
    numbers = [int(word) for word, after in pairwise(words) if word.isdigit() and after in _MANY]
    return facts["seconds_of_a_retraining"] * (numbers[0] if numbers else 0)


_MANY = ("half", "networks")
