"""Figures and tables of the experiment: radar, metrics and their spread against the sample size, cost at equal F1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.experiments.class_removal.tasks import better_high, metrics
from fastif.files import write_whole
from fastif.report.pages import new_figure

COSTS = ("RTE", "ME")
_AXES = {"class": ("F1", "SL", "EL", *COSTS)}
_OTHER_AXES = ("accuracy", "KL", *COSTS)
_COLOURS = ("#8a8a8a", "#cc79a7", "#d55e00", "#56b4e9", "#0072b2", "#009e73", "#e69f00", "#332288", "#117733")


def summarised(
    rows: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]], measured: Sequence[str]
) -> list[dict[str, Any]]:
    """Per method, sampler and k: means, and the standard deviation (n − 1) over seeds of the mean over cases.

    `beyond_retrained` is the mean difference of the metric that decides from the retrained network's, case by case.
    Runs that failed are counted and left out.
    """
    decides = measured[-1]
    goal = {row["case"]: row[decides] for row in references if row["method"] == "retrained"}
    cells: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["method"], row["sampler"], row["k"]), []).append(row)
    summary: list[dict[str, Any]] = []
    for (method, sampler, k), cell in cells.items():
        good = [row for row in cell if "failed" not in row]
        entry: dict[str, Any] = {"method": method, "sampler": sampler, "k": k, "runs": len(good)}
        entry["failed"] = len(cell) - len(good)
        entry["beyond_retrained"] = fmean(row[decides] - goal[row["case"]] for row in good) if good else None
        searched = [row["held_out"] for row in good if "held_out" in row]
        entry["held_out"] = fmean(searched) if searched else None
        for metric in (*measured, *COSTS):
            known = [row for row in good if row[metric] is not None]
            seeds = sorted({row["seed"] for row in known})
            means = [fmean(row[metric] for row in known if row["seed"] == seed) for seed in seeds]
            entry[metric] = fmean(row[metric] for row in known) if known else None
            entry[f"{metric}_std"] = stdev(means) if len(means) > 1 else None
        summary.append(entry)
    return summary


def write_report(results: Mapping[str, Any], out: Path) -> None:
    """Writes tables.md, radar.png, sizes.png and, of several seeds, spread.png to the folder `out`."""
    write_whole(out / "tables.md", tables(results))
    draw(results, f"{out}/")


def draw(results: Mapping[str, Any], prefix: str | Path) -> None:
    """Writes the pictures, their names after `prefix`; that of spreads where there are several seeds."""
    shown, task = [entry for entry in results["summary"] if entry["runs"]], results["meta"]["task"]
    _radar(shown, _AXES.get(task, _OTHER_AXES), Path(f"{prefix}radar.png"))
    every = (*metrics(task), *COSTS)
    _against_size(shown, [(metric, metric) for metric in every], Path(f"{prefix}sizes.png"))
    if results["meta"]["seeds"] > 1:
        _against_size(shown, [(f"{metric}_std", f"std of {metric}") for metric in every], Path(f"{prefix}spread.png"))


def tables(results: Mapping[str, Any]) -> str:
    """Every method at every size, and each against LiSSA with a random sample."""
    meta, summary = results["meta"], results["summary"]
    *others, decides = metrics(meta["task"])
    heads = [
        "method",
        "sampler",
        "k",
        decides,
        "beyond retrained",
        "step by held-out data",
        *others,
        "seconds",
        "MiB",
        "failed",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in ("nothing removed", "retrained"):
        cell = [row for row in results["references"] if row["method"] == name]
        means = {metric: fmean(row[metric] for row in cell) for metric in (*others, decides)}
        lines.append(f"| *{name}* | | | {means[decides]:.4f} | | | {_means(means, others)} | | | |")
    for entry in summary:
        first = f"| {entry['method']} | {entry['sampler']} | {entry['k']:,} |"
        if not entry["runs"]:
            lines.append(first + " |" * (len(heads) - 4) + f" {entry['failed']} |")
            continue
        spread = "" if entry[f"{decides}_std"] is None else f" ± {entry[f'{decides}_std']:.0e}"
        memory = "" if entry["ME"] is None else f"{entry['ME'] / 2**20:.0f}"
        searched = "" if entry["held_out"] is None else f"{entry['held_out']:.4f}"
        lines.append(
            f"{first} {entry[decides]:.4f}{spread} | {entry['beyond_retrained']:+.4f} | {searched} "
            f"| {_means(entry, others)} | {entry['RTE']:.3g} | {memory} | {entry['failed'] or ''} |"
        )
    lines += ["", *_costs(summary, decides, meta["pass"]), ""]
    lines.append(
        f"{meta['parameters']:,} parameters (width {meta['recipe']['width']:g}, {meta['recipe']['epochs']} epochs), "
        f"{meta['examples']:,} training examples; means over {_cases(meta)} and {_many(meta['seeds'], 'seed')}, ± the "
        f"standard deviation over seeds; LiSSA with the {meta['matrix']}, damping {meta['damping']:g}, at most "
        f"{meta['iterations']:,} iterations; {_pass(meta['pass'])}; {meta['device']}, "
        f"{_many(meta['threads'], 'thread')}, torch {meta['versions']['torch']}, {meta['date'][:10]}. "
        f"Made by `{meta['command']}`."
    )
    return "\n".join(lines) + "\n"


def _pass(cost: Mapping[str, Any]) -> str:
    memory = "" if cost["peak_bytes"] is None else f" and {cost['peak_bytes'] / 2**20:.0f} MiB"
    return f"one pass for features and logits, which serves all removals, takes {cost['seconds']:.3g} s{memory}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _cases(meta: Mapping[str, Any]) -> str:
    if meta["task"] == "mislabelled":
        return "the wrong labels"
    return f"{'classes' if meta['task'] == 'class' else 'draws'} {', '.join(map(str, meta['cases']))}"


def _means(values: Mapping[str, Any], names: Sequence[str]) -> str:
    return " | ".join(f"{values[metric]:.4f}" for metric in names)


def _needs_pass(method: str, sampler: str) -> bool:
    """Whether the steps work on features, or the sampler on features and logits that the method does not come by."""
    return method == "head" or (method == "LiSSA" and sampler != "random")


def _costs(summary: Sequence[Mapping[str, Any]], decides: str, seen: Mapping[str, Any]) -> list[str]:
    """Of each method and sampler, the cheapest size as good as LiSSA, random, at its largest m and at its best.

    Beside its costs those of a removal that comes alone: with the pass over the data, where it needs one.
    """
    sign = 1 if better_high(decides) else -1
    baseline = [e for e in summary if (e["method"], e["sampler"]) == ("LiSSA", "random") and e["runs"]]
    if not baseline:
        return ["No run of LiSSA with a random sample: nothing to compare costs with."]
    largest, best = max(baseline, key=lambda e: e["k"]), max(baseline, key=lambda e: sign * e[decides])
    lines: list[str] = []
    for base, what in [(largest, "its largest m"), (best, "its best")][: 1 if best is largest else 2]:
        lines += [
            *([""] if lines else []),
            f"Against LiSSA with {base['k']:,} random examples ({what}), {decides} {base[decides]:.4f}, "
            f"{base['RTE']:.3g} s, at the smallest time that does as well:",
            "",
            f"| method | sampler | k | {decides} | time | memory | time with the pass | memory with the pass |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for method, sampler in dict.fromkeys((entry["method"], entry["sampler"]) for entry in summary):
            mine = [e for e in summary if (e["method"], e["sampler"]) == (method, sampler) and e["runs"]]
            reach = [e for e in mine if sign * e[decides] >= sign * base[decides]]
            if not reach:
                lines.append(f"| {method} | {sampler} | | never | | | | |")
                continue
            cheap = min(reach, key=lambda entry: entry["RTE"])
            line = f"| {method} | {sampler} | {cheap['k']:,} | {cheap[decides]:.4f} |"
            seconds, peak = cheap["RTE"], cheap["ME"]
            line += f" {_change(seconds, base['RTE'])} | {_change(peak, base['ME'])} |"
            if _needs_pass(method, sampler):
                seconds += seen["seconds"]
                peak = peak and seen["peak_bytes"] and max(seen["peak_bytes"], seen["kept_bytes"] + peak)
            lines.append(f"{line} {_change(seconds, base['RTE'])} | {_change(peak, base['ME'])} |")
    return lines


def _change(cost: float | None, base: float | None) -> str:
    return f"{cost / base - 1:+.1%}" if cost and base else ""


def _names(entry: Mapping[str, Any]) -> str:
    return f"{entry['method']}, {entry['sampler']}"


def _figure(columns: int, rows: int, **subplot: Any) -> tuple[Any, Any]:
    return new_figure(columns, rows, 3.1 * columns, 2.9 * rows + 1, **subplot)


def _radar(summary: Sequence[Mapping[str, Any]], wanted: Sequence[str], path: Path) -> None:
    """Every method and sampler at its largest size, on each axis as a share of the best."""
    largest = {_names(entry): entry for entry in sorted(summary, key=lambda entry: entry["k"])}
    axes_used = [(m, better_high(m)) for m in wanted if all(entry[m] for entry in largest.values())]
    columns = min(4, len(largest))
    figure, axes = _figure(columns, -(-len(largest) // columns), subplot_kw={"projection": "polar"})
    angles = [2 * math.pi * i / len(axes_used) for i in range(len(axes_used))]
    for ax, (name, entry) in zip(axes.flat, largest.items(), strict=False):
        radii = []
        for metric, high in axes_used:
            every = [other[metric] for other in largest.values()]
            radii.append(entry[metric] / max(every) if high else min(every) / entry[metric])
        ax.plot([*angles, *angles[:1]], [*radii, *radii[:1]], color="#0072b2")
        ax.fill(angles, radii, color="#0072b2", alpha=0.2)
        ax.set_ylim(0, 1.05)
        ax.set_yticks([0.5, 1], labels=[])
        ax.set_xticks(angles, labels=[metric for metric, _ in axes_used], fontsize=8)
        ax.set_title(f"{name}, {entry['k']:,}", fontsize=8)
    for ax in list(axes.flat)[len(largest) :]:
        ax.set_visible(False)
    figure.savefig(path)


def _against_size(summary: Sequence[Mapping[str, Any]], panels: Sequence[tuple[str, str]], path: Path) -> None:
    """Metrics against the number of examples that carry the curvature, with their standard deviations."""
    figure, axes = _figure(4, -(-len(panels) // 4))
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for entry in summary:
        lines.setdefault(_names(entry), []).append(entry)
    for ax, (metric, title) in zip(axes.flat, panels, strict=False):
        for number, (name, entries) in enumerate(lines.items()):
            known = sorted((e for e in entries if e[metric] is not None), key=lambda entry: entry["k"])
            spread = [entry.get(f"{metric}_std") or 0.0 for entry in known]
            style = "o-" if name.startswith("LiSSA") else "s--"
            ax.errorbar([e["k"] for e in known], [e[metric] for e in known], spread, fmt=style, markersize=3, capsize=2,
                        color=_COLOURS[number % len(_COLOURS)], linewidth=1, label=name)  # fmt: skip
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter("")  # of sizes within a decade they would stand one on the other
        ax.set_title(title, fontsize=9)
        if metric in ("RTE", "ME"):
            ax.set_yscale("log")
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_visible(False)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7)
    figure.savefig(path)
