"""The tables of removals beside what others do, of images and of a language model's people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.figures.removals import PLAIN
from benchmarks.figures.tables import made_by, results_of

_COLUMNS = {
    "removed_accuracy": ("accuracy on removed", "{:.3f}"),
    "held_out_accuracy": ("held out", "{:.3f}"),
    "tug_of_war": ("tug-of-war", "{:.3f}"),
    "removed_kl": ("KL on removed", "{:.3f}"),
    "held_out_kl": ("held out", "{:.3f}"),
    "membership_auc": ("membership AUC", "{:.3f}"),
}


def unlearning_table(name: str) -> str:
    results = results_of(name)
    meta = results["meta"]
    titles = [title for title, _ in _COLUMNS.values()]
    head = ["removed", "method", *titles, "U-LiRA AUC", "relearning steps", "of retraining's time"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for number, (removed, found) in enumerate(results["sets"].items()):
        for row, entry in enumerate(found["summary"]):
            plain = entry["method"] in PLAIN
            what = f"{removed} ({meta['removed'][removed]})" if row == 0 else ""
            cells = [what, f"*{entry['method']}*" if plain else entry["method"]]
            cells += [_cell(entry, metric, form) for metric, (_, form) in _COLUMNS.items()]
            lira = found["u_lira"].get(entry["method"])
            cells.append("" if lira is None else f"{lira['auc']:.3f} ± {lira['auc_error']:.3f}")
            most = "" if entry["relearned"] else "≥ "
            cells.append(f"{most}{entry['relearning_steps_mean']:.0f}")
            cells.append("" if plain else f"{100 * _share(found, entry):.{1 if 'cpu_seconds' in found else 0}f} %")
            lines.append(f"| {' | '.join(cells)} |")
        if number + 1 < len(results["sets"]):
            lines.append("| " * len(head) + "|")
    chosen = "; ".join(
        f"{removed}: " + ", ".join(f"{method} {setting}" for method, setting in found.items())
        for removed, found in meta["chosen"].items()
    )
    return "\n".join(
        [
            *lines,
            "",
            f"Means over {meta['seeds']} trained networks, ± their standard deviation; U-LiRA with {meta['pairs']} "
            "pairs of half networks, ± its standard error over the pairs; ≥: some had not relearnt within the most "
            "steps, which count as theirs. "
            f"Settings as chosen on training data: {chosen}. {meta['examples']:,} training examples, "
            f"{meta['held_out']:,} held out; {made_by(meta)}",
        ]
    )


def people_table(name: str) -> str:
    results = results_of(name)
    meta = results["meta"]
    lines = [
        "| | forget quality p, against each retrained | utility | P(answer) of removed | of strangers "
        "| extraction strength of removed | of strangers | CPU s | of retraining's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        plain = row["method"].startswith(("retrained", "nothing"))
        cells = [
            f"*{row['method']}*" if plain else row["method"],
            ", ".join("–" if p is None else f"{p:.2g}" for p in row["forget quality"]),
            f"{row['utility']:.3f}",
            *(f"{row[kind + whom]:.3f}" for kind in ("probability", "strength") for whom in ("", " of strangers")),
            "" if row["seconds"] is None else f"{row['seconds']:.1f}",
            "" if plain else f"{100 * row['share']:.0f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    chosen = ", ".join(f"{row['method']} {row['chosen']}" for row in results["rows"] if "chosen" in row)
    share = "" if meta["share"] == 0.05 else f" --share {meta['share']:g}"
    lines += [
        "",
        f"{meta['removed']} of {meta['people']} invented people removed: {meta['removed texts']} of {meta['texts']:,} "
        f"texts, {meta['ratios']} questions that truth ratios are taken of; strangers are people that no network was "
        f"trained on. A GPT of two layers and {meta['parameters']:,} parameters, {meta['words']} words. Settings as "
        f"chosen on other people: {chosen}. " + made_by(meta, f"python -m benchmarks.experiments.people{share}"),
    ]
    return "\n".join(lines)


def certificate_table(name: str) -> str:
    results = results_of(name)
    meta = results["meta"]
    lines = [
        "| noise σ | ε | allowed distance Δ | steps | bound reached | F1 without noise | F1 released |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        start = f"| {row['noise']:g} | {row['epsilon']:g} | {row['distance']:.2g} "
        if "refused" in row:
            lines.append(f"{start}| refused: {row['refused']} | | | |")
            continue
        lines.append(
            f"{start}| {row['steps_mean']:.1f} | {row['bound_largest']:.2g} | {row['F1_before_mean']:.4f} "
            f"| {row['F1_mean']:.4f} ± {row['F1_std']:.4f} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"Class {meta['class']} of the digits, δ = {meta['delta']:g}, weight decay {meta['weight_decay']:g}; means "
            f"over {meta['networks']} trained networks and {meta['draws']} draws of noise each, ± the standard "
            f"deviation over both; {meta['examples']:,} training examples, {meta['held_out']:,} held out; "
            f"{meta['device']}, torch {meta['versions']['torch']}, {meta['date'][:10]}. Made by `{meta['command']}`.",
        ]
    )


def _share(found: Mapping[str, Any], entry: Mapping[str, Any]) -> float:
    """Of retraining's time: in processor seconds, where they were taken, else by the clock."""
    seconds = found.get("cpu_seconds")
    if seconds is None:
        return entry["share_of_retraining_mean"]
    return seconds[entry["method"]]["seconds"] / seconds[entry["method"]]["retraining"]


def _cell(entry: Mapping[str, Any], metric: str, form: str) -> str:
    mean, spread = entry[f"{metric}_mean"], entry[f"{metric}_std"]
    if mean is None:
        return ""
    return form.format(mean) + ("" if spread is None else f" ± {form.format(spread)}")
