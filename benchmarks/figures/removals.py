"""What removals are worth, at a glance: quality against time, and two hundred of them one after another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.figures.tables import made_by, results_of
from fastif.report.pages import new_figure

MOST = 0.05  # of retraining's time
PLAIN = ("nothing removed", "retrained")  # rows that are no method
_COLOURS = {"head": "#d55e00", "last block": "#0072b2", "all": "#009e73"}
_MARKERS = {
    "remove": "o", "step and refit": "*", "match and refit": "^", "one step": "D",
    "fine-tuning": "x", "NegGrad+": "P", "random labels": "v", "SSD": "s", "LiSSA": "1",
}  # fmt: skip


def share_of(found: Mapping[str, Any], method: str) -> float:
    """CPU seconds of a method over those of a retraining."""
    return found["cpu_seconds"][method]["seconds"] / found["cpu_seconds"][method]["retraining"]


def best_within(found: Mapping[str, Any], most: float = MOST) -> str | None:
    """Of the methods that take at most so much of retraining's time the one with the highest tug-of-war, if any do."""
    rows = [row for row in found["summary"] if row["method"] not in PLAIN and share_of(found, row["method"]) <= most]
    return max(rows, key=lambda row: row["tug_of_war_mean"])["method"] if rows else None


def glance_table(name: str) -> str:
    """Tug-of-war of every method on every forget set; bold the best of those within `MOST` of retraining's time."""
    results = results_of(name.replace("removal-glance", "unlearning"))
    meta, sets = results["meta"], results["sets"]
    methods = [row["method"] for row in next(iter(sets.values()))["summary"]]
    lines = [f"| | {' | '.join(sets)} | of retraining's time |", "|---" * (len(sets) + 2) + "|"]
    for method in methods:
        plain = method in PLAIN
        cells = [f"*{method}*" if plain else method]
        for found in sets.values():
            value = next(row["tug_of_war_mean"] for row in found["summary"] if row["method"] == method)
            best = not plain and method == best_within(found)
            cells.append("" if value is None else f"**{value:.3f}**" if best else f"{value:.3f}")
        shares = [] if plain else [share_of(found, method) for found in sets.values()]
        cells.append(f"{100 * fmean(shares):.1f} %" if shares else "100 %" if method == "retrained" else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            f"Tug-of-war: 1 is as retraining does, judged against {meta['seeds']} retrained networks; *retrained*: by "
            f"another seed. Bold: the best of what takes at most {100 * MOST:.0f} % of retraining's processor seconds "
            f"on that set. {meta['examples']:,} training examples, {meta['epochs']} epochs, {meta['held_out']:,} held "
            f"out; {made_by(meta)}",
        ]
    )


def spread_table(name: str) -> str:
    """Tug-of-war and membership of every method over several draws of the same share, ± their standard deviation."""
    results = results_of(name.replace("removal-spread", "unlearning"))
    meta, sets = results["meta"], [*results["sets"].values()]
    lines = [
        "| | tug-of-war | least | most | membership AUC | away from the retrained ones' | best within "
        f"{100 * MOST:.0f} % | of retraining's time |",
        "|---" * 8 + "|",
    ]
    best = [best_within(found) for found in sets]
    for method in (row["method"] for row in sets[0]["summary"]):
        rows = [{row["method"]: row for row in found["summary"]} for found in sets]
        worth, auc = ([row[method][f"{key}_mean"] for row in rows] for key in ("tug_of_war", "membership_auc"))
        plain = method in PLAIN
        cells = [f"*{method}*" if plain else method]
        if None in worth:  # a retrained network alone has no other to be held against
            cells += ["", "", ""]
        else:
            cells += [f"{fmean(worth):.3f} ± {stdev(worth):.3f}", f"{min(worth):.3f}", f"{max(worth):.3f}"]
        away = [mine - row["retrained"]["membership_auc_mean"] for mine, row in zip(auc, rows, strict=True)]
        cells.append(f"{fmean(auc):.3f} ± {stdev(auc):.3f}")
        cells.append("" if method == "retrained" else f"{fmean(away):+.3f} ± {stdev(away):.3f}")
        cells.append("" if plain else f"{best.count(method)} of {len(sets)}")
        cells.append("" if plain else f"{100 * fmean(share_of(found, method) for found in sets):.1f} %")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            f"{len(sets)} draws of {min(meta['removed'].values())} of {meta['examples']:,} training examples, "
            f"{meta['seeds']} trained networks of each; ± the standard deviation over draws. {made_by(meta)}",
        ]
    )


def frontier_picture(name: str, path: Path) -> None:
    """Tug-of-war against the share of retraining's time, a panel for each forget set."""
    results = results_of(name)
    sets = results["sets"]
    columns = min(4, len(sets))
    lines = -(-len(sets) // columns)
    figure, axes = new_figure(columns, lines, 13, 0.9 + 3 * lines, sharex=True)
    panels = [axis for row in axes for axis in row]
    for axis in panels[len(sets) :]:
        axis.set_visible(False)
    for axis, (removed, found) in zip(panels, sets.items(), strict=False):
        for row in found["summary"]:
            method, value = row["method"], row["tug_of_war_mean"]
            share = math.nan if method in PLAIN else 100 * share_of(found, method)
            if method in PLAIN:
                if value is not None:
                    style = "-" if method == "retrained" else ":"
                    axis.axhline(value, color="#888888", linestyle=style, linewidth=1, label=method)
                continue
            kind, _, layers = method.partition(": ")
            marker, colour = _MARKERS[kind], _COLOURS.get(layers, "#777777")
            size = 13 if marker == "*" else 6
            axis.plot(share, value, marker=marker, color=colour, linestyle="", markersize=size, label=method)
        axis.axvline(100 * MOST, color="#cccccc", linewidth=1, label=f"{100 * MOST:.0f} % of retraining's time")
        axis.set(title=removed, xscale="log", xticks=(1, 2, 5, 10, 20), xticklabels=("1", "2", "5", "10", "20"))
        axis.minorticks_off()
    for row in axes:
        row[0].set_ylabel("tug-of-war")
    for axis in panels[max(0, len(sets) - columns) : len(sets)]:
        axis.set_xlabel("% of retraining's processor seconds")
        axis.tick_params(labelbottom=True)
    handles = {label: handle for handle, label in zip(*panels[0].get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None, "Description": results["meta"]["date"]})


def sequence_table(name: str) -> str:
    results = results_of(name)
    meta, rows = results["meta"], results["rows"]
    titles = ["accuracy on removed", "held out", "loss on retained", "KL on held out", "tug-of-war"]
    keys = ("removed_accuracy", "held_out_accuracy", "retained_loss", "held_out_kl", "tug_of_war")
    lines = [f"| | {' | '.join(titles)} | CPU s |", "|---" * (len(titles) + 2) + "|"]
    seconds = {
        "head, one by one": ("head", "CPU s"),
        "head, at once": ("head", "CPU s of one removal"),
        "head, influence steps one by one": ("head", "CPU s of influence steps"),
        "last block, one by one": ("last block", "CPU s"),
        "last block, at once": ("last block", "CPU s of one removal"),
    }
    for network in rows[0]["networks"]:
        found = [row["networks"][network] for row in rows]
        plain = network in PLAIN
        cells = [f"*{network}*" if plain else network]
        cells += ["" if network == "retrained" and key in keys[3:] else f"{_mean(found, key):.4f}" for key in keys]
        part = seconds.get(network)
        cells.append("" if part is None else f"{fmean(row[part[0]][part[1]] for row in rows):.2g}")
        lines.append(f"| {' | '.join(cells)} |")
    heads, blocks = ([row[part] for row in rows] for part in ("head", "last block"))
    above = [head["above the minimum"] for head in heads]
    settled = max(max(values[10:]) for values in above)
    steps = ", ".join(str(head["steps of one removal"]) for head in heads)
    return "\n".join(
        [
            *lines,
            "",
            f"{meta['removals']} of {meta['examples']:,} examples, drawn at random; means over {meta['seeds']} "
            f"networks and orders. The head's objective lies {_mean(heads, 'before'):.2g} above its minimum before, at "
            f"most {settled:.1g} after any removal from the eleventh on, and {max(v[-1] for v in above):.1g} after the "
            f"last; one removal of all ends {max(head['of one removal'] for head in heads):.1g} above, after {steps} "
            f"steps. The last block's objective ends at {_mean(blocks, 'objective'):.4f} one by one, at "
            f"{_mean(blocks, 'of one removal'):.4f} at once. {made_by(meta)}",
        ]
    )


def sequence_picture(name: str, path: Path) -> None:
    """The head's objective above its minimum after each of the removals."""
    results = results_of(name)
    figure, axes = new_figure(1, 1, 7, 3.6)
    axis = axes[0][0]
    for row, colour in zip(results["rows"], cycle(_COLOURS.values()), strict=False):
        # Rounding leaves some a little below the minimum, which a logarithm does not show.
        away = [max(value, 1e-10) for value in row["head"]["above the minimum"]]
        axis.semilogy(range(1, len(away) + 1), away, color=colour, linewidth=1)
        axis.plot(len(away), max(row["head"]["of one removal"], 1e-10), marker="o", color=colour, linestyle="")
    before = _mean([row["head"] for row in results["rows"]], "before")
    axis.axhline(before, color="#888888", linewidth=1, linestyle=":", label="as trained, before any removal")
    axis.legend(loc="upper right", frameon=False)
    axis.set(
        xlabel="examples removed, one after another",
        ylabel="objective above its minimum",
        title="The head: lines one by one, dots all at once; a colour for each network",
    )
    figure.savefig(path, dpi=110, metadata={"Software": None, "Description": results["meta"]["date"]})


def _mean(found: Sequence[Mapping[str, Any]], key: str) -> float:
    return fmean(row[key] for row in found)
