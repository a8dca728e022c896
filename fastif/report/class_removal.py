"""The report of a class removal: figures as PNG files and one HTML page that holds everything and needs nothing."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fastif.evaluation.metrics import METRICS, summarise
from fastif.files import write_whole
from fastif.report.pages import document, facts_table, new_figure, picture, png_of, table, text_of

# Okabe and Ito's colours, which stay apart for colour-blind eyes; the two baselines are grey and brown.
_COLOURS = {
    "random": "#8a8a8a",
    "prefix": "#a0703c",
    "stratified": "#56b4e9",
    "intermediate_distance": "#cc79a7",
    "k_center": "#e69f00",
    "logit": "#0072b2",
    "leverage": "#009e73",
    "certified": "#d55e00",
}
_OTHER_COLOURS = ("#332288", "#117733", "#882255", "#aa4499", "#999933")
_MARKERS = "osD^vP*X<>hp"
_FLOOR = 1e-9  # excess below this is rounding of the objective, not distance
_AXES = (("F1", True), ("SL", True), ("EL", False), ("RTE", False), ("ME", False))  # True: better high

BASELINE = "LiSSA, one step"  # the paper's, over a random sample

Results = Mapping[str, Any]


def write_report(results: Results, out: str | Path) -> list[Path]:
    """Writes the figures as PNG files and `report.html` to the folder `out`, and returns the paths.

    `results` is what `fastif.evaluation.class_removal` returns. The page shows the figures from within itself. Raises
    ValueError where `results` has no summary.
    """
    if not results["summary"]:
        raise ValueError("report: the results have no summary")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    figures = {name: draw(results) for name, draw in _FIGURES.items()}
    paths: list[Path] = []
    for name, png in figures.items():
        paths.append(out / f"{name}.png")
        paths[-1].write_bytes(png)
    paths.append(out / "report.html")
    write_whole(paths[-1], page(results, figures))
    return paths


# ------------------------------------------------------------------------------------------------------------- values


def samplers_of(results: Results) -> list[str]:
    return list(dict.fromkeys(entry["sampler"] for entry in results["summary"]))


def budgets_of(results: Results) -> list[int]:
    return sorted({entry["k"] for entry in results["summary"]})


def last_step(results: Results) -> int:
    return max(entry["step"] for entry in results["summary"])


def cell(results: Results, sampler: str, k: int, step: int) -> Mapping[str, Any]:
    """The summary's entry for a sampler, budget and step."""
    return next(e for e in results["summary"] if (e["sampler"], e["k"], e["step"]) == (sampler, k, step))


def references(results: Results) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """What the samplers are compared with: (words, one entry per class)."""
    named = (
        ("original model", "original"),
        ("head retrained to convergence", "retrained_head"),
        ("whole network retrained", "retrained"),
    )
    return [(words, results[name]) for words, name in named if results[name]]


def baselines(results: Results) -> list[dict[str, Any]]:
    """The baseline's entries of the summary, one per budget; empty where it did not take part."""
    return summarise(results.get("baseline", []))


def seconds_of(entries: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean seconds that it took to retrain without a class; None for what was not retrained."""
    return fmean(entry["seconds"] for entry in entries) if all("seconds" in entry for entry in entries) else None


def share(k: int, results: Results) -> str:
    """A budget in words: "72 (5 %)"."""
    return f"{k:,} ({100 * k / results['meta']['n_train']:.2g}\u00a0%)"


# ------------------------------------------------------------------------------------------------------------ figures


def _style(sampler: str, results: Results) -> tuple[str, str]:
    """Colour and marker of a sampler."""
    names = samplers_of(results)
    number = names.index(sampler)
    others = [name for name in names if name not in _COLOURS]
    colour = _COLOURS.get(sampler) or _OTHER_COLOURS[others.index(sampler) % len(_OTHER_COLOURS)]
    return colour, _MARKERS[number % len(_MARKERS)]


def _words(sampler: str) -> str:
    return {"k_center": "k-center"}.get(sampler, sampler.replace("_", " "))


def _legend(figure: Any, ax: Any) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def story(results: Results) -> bytes:
    """F1 at the smallest budget after the first, second and last step, with the time and the memory it took."""
    names, k, last = samplers_of(results), budgets_of(results)[0], last_step(results)
    names = sorted(names, key=lambda name: -cell(results, name, k, last)["F1_mean"])
    shown = sorted({1, min(2, last), last})
    others = [entry for entry in baselines(results) if entry["k"] == k]
    retrained = [(words, entries) for words, entries in references(results) if seconds_of(entries) is not None]
    labels = [_words(name) for name in names] + [BASELINE] * len(others)
    labels += [words.removesuffix(" to convergence") for words, _ in retrained]
    colours = [_style(name, results)[0] for name in names] + ["#222222"] * (len(labels) - len(names))
    ends = [cell(results, name, k, last) for name in names] + others
    seconds = [entry["RTE_mean"] for entry in ends] + [seconds_of(entries) for _, entries in retrained]
    memory = [None if entry["ME_mean"] is None else entry["ME_mean"] / 2**20 for entry in ends]
    figure, axes = new_figure(
        3, 1, 10.4, 1.5 + 0.31 * len(labels), sharey=True, gridspec_kw={"width_ratios": [2.2, 1, 1]}
    )
    left, middle, right = axes[0]
    for row, (name, colour) in enumerate(zip(names, colours, strict=False)):
        values = [cell(results, name, k, step)["F1_mean"] for step in shown]
        left.plot(values, [row] * len(shown), color=colour, linewidth=1.2, alpha=0.5, zorder=2)
        for value, size, alpha in zip(values, (16, 32, 64)[-len(shown) :], (0.4, 0.65, 1)[-len(shown) :], strict=True):
            left.scatter(value, row, s=size, color=colour, alpha=alpha, linewidths=0, zorder=3)
    after = [entry["F1_mean"] for entry in others]
    after += [fmean(entry["F1"] for entry in entries) for _, entries in retrained]
    for row, value in enumerate(after, len(names)):
        left.scatter(value, row, s=64, color="#222222", marker="D", linewidths=0, zorder=3)
    best = fmean(entry["F1"] for entry in results["retrained_head"])
    left.axvline(best, color="#222222", linewidth=1, label="head retrained to convergence")
    before = fmean(entry["F1"] for entry in results["original"])
    left.axvline(before, color="#222222", linewidth=1, linestyle=":", label="nothing removed")
    for step, size, alpha in zip(shown, (16, 32, 64)[-len(shown) :], (0.4, 0.65, 1)[-len(shown) :], strict=True):
        left.scatter([], [], s=size, color="#0072b2", alpha=alpha, linewidths=0, label=f"after step {step}")
    left.set_xlim(-0.03, 1.05)
    left.set_title(f"F1, curvature from {share(k, results)} of the examples", fontsize=11)
    left.set_yticks(range(len(labels)), labels=labels, fontsize=10)
    left.invert_yaxis()
    for ax, values, title, form in (
        (middle, seconds, "seconds, log scale", "{:.2g}"),
        (right, memory, "peak MiB", "{:.2g}"),
    ):
        known = [(row, value) for row, value in enumerate(values) if value is not None]
        for row, value in known:
            ax.barh(row, value, 0.62, color=colours[row], alpha=0.85)
            ax.annotate(form.format(value), (value, row), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
        if ax is middle and known:
            ax.set_xscale("log")
            ax.set_xlim(0.4 * min(value for _, value in known), 4 * max(value for _, value in known))
        elif known:
            ax.set_xlim(0, 1.25 * max(value for _, value in known))
        ax.set_title(title, fontsize=11)
        ax.grid(False, axis="y")
    if not any(value is not None for value in memory):
        right.set_visible(False)
    _legend(figure, left)
    return png_of(figure)


def radar(results: Results) -> bytes:
    """One small radar per sampler, at the smallest budget and the last step; `random` in grey behind each."""
    names, k, step = samplers_of(results), budgets_of(results)[0], last_step(results)
    cells = {name: cell(results, name, k, step) for name in names}
    axes_used = [(m, high) for m, high in _AXES if all(_positive(cells[name][f"{m}_mean"]) for name in names)]
    angles = [2 * math.pi * position / len(axes_used) for position in range(len(axes_used))]
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, axes = new_figure(columns, rows, 2.5 * columns + 0.4, 2.75 * rows + 0.3, subplot_kw={"projection": "polar"})

    def radii(name: str) -> list[float]:
        values = []
        for metric, high in axes_used:
            every = [cells[other][f"{metric}_mean"] for other in names]
            own = cells[name][f"{metric}_mean"]
            values.append(own / max(every) if high else min(every) / own)
        return values

    def draw(ax: Any, name: str, **line: Any) -> None:
        closed = radii(name)
        ax.plot([*angles, *angles[:1]], [*closed, *closed[:1]], **line)

    for ax, name in zip(axes.flat, names, strict=False):
        colour, _ = _style(name, results)
        if "random" in names:
            draw(ax, "random", color="#b5b5b5", linewidth=1.2, linestyle="--")
        draw(ax, name, color=colour, linewidth=2)
        ax.fill(angles, radii(name), color=colour, alpha=0.2)
        ax.set_theta_offset(math.pi / 2)
        ax.set_ylim(0, 1.05)
        ax.set_yticks([0.5, 1], labels=[])
        ax.set_xticks(angles, labels=[metric for metric, _ in axes_used], fontsize=9)
        ax.spines["polar"].set_visible(False)
        ax.grid(True, color="#dcdcdc", linewidth=0.8)
        ax.set_title(_words(name), fontsize=10.5, color=colour, fontweight="bold")
    for ax in list(axes.flat)[len(names) :]:
        ax.set_visible(False)
    return png_of(figure)


def _positive(value: float | None) -> bool:
    return value is not None and value > 0


def bars(results: Results) -> bytes:
    """F1, SL and EL at the last step: a bar per sampler and budget, lines for what they are compared with."""
    names, budgets, step = samplers_of(results), budgets_of(results), last_step(results)
    thickness = 0.8 / len(budgets)
    height = 1.2 + len(names) * (0.2 + 0.2 * len(budgets))
    figure, axes = new_figure(3, 1, 10.4, height, sharey=True)
    lines = {"original model": ":", "head retrained to convergence": "-", "whole network retrained": "--"}
    for ax, (metric, direction) in zip(axes[0], (("F1", "high"), ("SL", "high"), ("EL", "low")), strict=True):
        for row, name in enumerate(names):
            colour, _ = _style(name, results)
            for part, k in enumerate(budgets):
                entry = cell(results, name, k, step)
                mean, std = entry[f"{metric}_mean"], entry[f"{metric}_std"]
                at = row + (part - (len(budgets) - 1) / 2) * thickness
                alpha = 0.5 + 0.5 * (part + 1) / len(budgets)
                ax.barh(at, mean, 0.86 * thickness, xerr=std, color=colour, alpha=alpha, ecolor="#222222", capsize=2)
                text = f"{mean:.4g}" + (f" ± {std:.1g}" if std else "")
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
                inside = ax.get_yaxis_transform()  # x as a share of the panel
                ax.text(0.015, at, text, va="center", fontsize=7.5, color="#222222", bbox=box, transform=inside)
        for words, entries in references(results):
            value = fmean(entry[metric] for entry in entries)
            ax.axvline(value, color="#222222", linestyle=lines[words], linewidth=1.2, label=words)
        ax.set_title(f"{metric} (better {direction})", fontsize=11)
        ax.set_yticks(range(len(names)), labels=[_words(name) for name in names], fontsize=10)
        ax.grid(False, axis="y")
    axes[0][0].invert_yaxis()
    _legend(figure, axes[0][0])
    return png_of(figure)


def budget(results: Results) -> bytes:
    """F1 against the budget, after the second and after the last step."""
    names, budgets, last = samplers_of(results), budgets_of(results), last_step(results)
    shown = sorted({min(2, last), last})
    figure, axes = new_figure(len(shown), 1, 10.4 if len(shown) > 1 else 6, 4.6, sharey=True)
    target = fmean(entry["F1"] for entry in results["retrained_head"])
    for ax, step in zip(axes[0], shown, strict=True):
        ax.axhline(target, color="#222222", linewidth=1.2, label="head retrained")
        for name in names:
            colour, marker = _style(name, results)
            entries = [cell(results, name, k, step) for k in budgets]
            means, stds = [e["F1_mean"] for e in entries], [e["F1_std"] or 0.0 for e in entries]
            ax.errorbar(budgets, means, stds, color=colour, marker=marker, markersize=5, capsize=2, label=_words(name))
        ax.set_xscale("log")
        ax.set_xticks(budgets, labels=[share(k, results) for k in budgets], fontsize=9)
        ax.minorticks_off()
        ax.set_xlabel("k, examples that carry the curvature")
        ax.set_title(f"F1 after step {step}", fontsize=11)
    low, high = axes[0][0].get_ylim()
    axes[0][0].set_ylim(min(low, high - 0.04), high)  # noise over a smaller range would look like a trend
    _legend(figure, axes[0][0])
    return png_of(figure)


def steps(results: Results) -> bytes:
    """F1 and the excess of the retained objective (log scale) against the step, a row of panels per budget."""
    names, budgets, last = samplers_of(results), budgets_of(results), last_step(results)
    figure, axes = new_figure(2, len(budgets), 10.4, 3.3 * len(budgets) + 0.8, sharex=True)
    target = fmean(entry["F1"] for entry in results["retrained_head"])
    start = fmean(entry["F1"] for entry in results["original"])
    begin = fmean(
        first["objective"] - best["objective"]
        for first, best in zip(results["original"], results["retrained_head"], strict=True)
    )
    for (left, right), k in zip(axes, budgets, strict=True):
        left.axhline(target, color="#222222", linewidth=1.2, label="head retrained")
        for name in names:
            colour, marker = _style(name, results)
            entries = [cell(results, name, k, step) for step in range(1, last + 1)]
            line = {"color": colour, "marker": marker, "markersize": 5, "capsize": 2, "label": _words(name)}
            f1 = [start, *(entry["F1_mean"] for entry in entries)]
            spread = [0.0, *(entry["F1_std"] or 0.0 for entry in entries)]
            left.errorbar(range(last + 1), f1, spread, **line)
            excess = [max(_FLOOR, value) for value in (begin, *(entry["excess_mean"] for entry in entries))]
            right.plot(range(last + 1), excess, **{key: line[key] for key in line if key != "capsize"})
        left.set_ylim(bottom=0)
        left.set_title(f"F1, k = {share(k, results)}", fontsize=11)
        right.set_yscale("log")
        right.set_title(f"excess of the retained objective, k = {share(k, results)}", fontsize=11)
    for ax in axes[-1]:
        ax.set_xticks(range(last + 1))
        ax.set_xlabel("step (0: before removal)")
    _legend(figure, axes[0][0])
    return png_of(figure)


_FIGURES: dict[str, Callable[[Results], bytes]] = {
    "story": story,
    "radar": radar,
    "bars": bars,
    "budget": budget,
    "steps": steps,
}

# --------------------------------------------------------------------------------------------------------------- page

_READING = (
    "Every run takes one class out of the trained model by moving its last layer, in a few Newton steps on the loss of "
    "the examples that stay. The gradient uses all of them; the curvature only the k that a sampler picks, afresh in "
    "each step. A good sampler ends where retraining the last layer to convergence ends: the same F1, the same losses, "
    "excess zero. The model has then forgotten the class (SA near 0, SL high: it no longer says this class) and still "
    "knows the others (EA high, EL low). Where several steps bring every sampler to the same F1, look at the early "
    "steps and at the excess: there the samplers differ."
)
_BELOW_TABLE = (
    "Means over classes and seeds, on held-out examples; ± is the standard deviation over seeds of the mean over "
    "classes, which samplers that draw nothing have none of. RTE and ME: time and peak memory of the influence "
    "computation up to this step, and as multiples of random's; of what was retrained, the seconds that it took. LiSSA "
    "is the paper's baseline: one influence step of all parameters, with the curvature of a random sample, drawn once, "
    "and a step size chosen on training data."
)
_CAPTIONS = {
    "story": "What samplers and Newton steps buy, {k}: F1 (right is better) after the first, an early and the last "
    "step, with the time and the memory of all steps. Diamonds are single points: one step of LiSSA, retraining. "
    "Seconds of retraining are those of the training, whose memory was not measured.",
    "radar": "The last step at the smallest budget ({k}). Each axis is scaled to the best sampler on it, the outer "
    "ring: F1 and SL as share of the highest, EL, RTE and ME as lowest over own. Outer is better on every axis. "
    "Dashed: random.",
    "bars": "After the last step, mean over classes and seeds; whiskers are the standard deviation over seeds. Deeper "
    "colour: larger budget. Lines: {lines}.",
    "budget": "F1 against the number of examples that carry the curvature, after an early and after the last step; "
    "whiskers are the standard deviation over seeds.",
    "steps": "Left: F1 step by step. Right: how far the retained training objective is above its optimum (1e-9 and "
    "below, the rounding of the objective, is drawn at 1e-9).",
}
_UNITS = {
    "EA": "higher is better",
    "EL": "nats, lower",
    "SA": "lower",
    "SL": "nats, higher",
    "F1": "higher",
    "excess": "lower",
    "RTE": "ms, lower",
    "ME": "MiB, lower",
}


def page(results: Results, figures: Mapping[str, bytes]) -> str:
    """The report as one HTML page; `figures` are PNGs by name, put into the page."""
    meta = results["meta"]
    title = f"Class removal: {meta.get('data', 'results')}"
    lines = {
        "original model": "dotted, the original model",
        "head retrained to convergence": "solid, the head retrained",
        "whole network retrained": "dashed, the whole network retrained",
    }
    words = {
        "k": f"k = {share(budgets_of(results)[0], results)}",
        "lines": "; ".join(lines[name] for name, _ in references(results)),
    }
    first, *rest = figures.items()
    shown = "".join(picture(name, png, _CAPTIONS[name].format(**words)) for name, png in rest)
    last = last_step(results)
    seeds = len(meta["seeds"])
    setting = (
        f"{len(meta['classes'])} classes removed one at a time, {len(samplers_of(results))} samplers, "
        f"{seeds} seed{'s' if seeds > 1 else ''}, up to {last} step{'s' if last > 1 else ''}; "
        f"{meta['n_train']:,} training and {meta['n_test']:,} held-out examples."
    )
    body = (
        f"<h1>{text_of(title)}</h1><p class=lead>{text_of(lead(results))}</p>{_tiles(results)}"
        f"{picture(first[0], first[1], _CAPTIONS[first[0]].format(**words))}<p>{text_of(setting)}</p>"
        f"<h2>How to read this</h2><p>{text_of(_READING)}</p>"
        f"<h2>After step {last}</h2>{_summary_table(results, [last])}"
        f"<p>{text_of(_BELOW_TABLE)}</p>"
        f"<h2>Figures</h2>{shown}"
        f"<h2>Class by class</h2>{_class_table(results)}"
        f"<details><summary>Every step</summary>{_summary_table(results, range(1, last + 1))}</details>"
        f"<h2>What the words mean</h2>{facts_table(meta['definitions'])}"
        f"<h2>How it was made</h2>{facts_table({key: meta[key] for key in meta if key != 'definitions'})}"
    )
    return document(title, body)


def lead(results: Results) -> str:
    """What samplers and Newton steps buy in F1, time and memory, in some sentences."""
    names, last, k = samplers_of(results), last_step(results), budgets_of(results)[0]
    best = _best(results)
    end = cell(results, best, k, last)
    steps_taken = f"{last} Newton steps" if last > 1 else "one Newton step"
    memory = "" if end["ME_mean"] is None else f" and {end['ME_mean'] / 2**20:.2g} MiB"
    before = fmean(entry["F1"] for entry in results["original"])
    text = (
        f"With the curvature of {share(k, results)} of {results['meta']['n_train']:,} training examples, chosen by "
        f"{_words(best)}, {steps_taken} on the last layer take F1 from {before:.3f} to {end['F1_mean']:.4f}, in "
        f"{end['RTE_mean']:.2g} s{memory}"
    )
    for words, entries in references(results):
        seconds = seconds_of(entries)
        if seconds is not None and words.startswith("whole"):
            text += f"; retraining the whole network gives {fmean(e['F1'] for e in entries):.4f} in {seconds:.2g} s"
    text += "."
    worst = min(names, key=lambda name: cell(results, name, k, last)["F1_mean"])
    if worst != best:
        f1 = cell(results, worst, k, last)["F1_mean"]
        text += f" The same steps from as many examples chosen by {_words(worst)} end at {f1:.4f}"
        others = [entry for entry in baselines(results) if entry["k"] == k]
        for entry in others:
            text += (
                f", and the paper's baseline, one LiSSA step of the whole network from a random sample, at "
                f"{entry['F1_mean']:.3f} in {entry['RTE_mean']:.2g} s"
            )
        text += "."
    return text


def _best(results: Results) -> str:
    """The sampler that comes closest to the optimum at the smallest budget."""
    last, k = last_step(results), budgets_of(results)[0]
    return min(samplers_of(results), key=lambda name: cell(results, name, k, last)["excess_mean"])


def _tiles(results: Results) -> str:
    last, k, best = last_step(results), budgets_of(results)[0], _best(results)
    tiles = [(fmean(entry["F1"] for entry in entries), f"F1, {words}") for words, entries in references(results)]
    tiles.append((cell(results, best, k, last)["F1_mean"], f"F1, {_words(best)}, k = {share(k, results)}"))
    return (
        "<div class=tiles>"
        + "".join(f"<div class=tile><b>{value:.4f}</b><span>{text_of(words)}</span></div>" for value, words in tiles)
        + "</div>"
    )


def _summary_table(results: Results, steps: Iterable[int]) -> str:
    steps = list(steps)
    head = ["sampler", "k", *(["step"] if len(steps) > 1 else []), *_UNITS]
    rows = []
    if len(steps) == 1:
        for words, entries in references(results):
            means = [f"{fmean(entry[metric] for entry in entries):.4f}" for metric in METRICS]
            seconds = seconds_of(entries)
            rte = "" if seconds is None else f"{1e3 * seconds:.1f}"
            rows.append(("reference", [text_of(words), "", *means, "", rte, ""]))
        for entry in baselines(results):
            means = [_mean(entry, metric, 4, spread=False) for metric in METRICS]
            cost = [_ratio(entry, "RTE", 1e3, 1), _ratio(entry, "ME", 2**-20, 1)]
            rows.append(("reference", [BASELINE, share(entry["k"], results), *means, "", *cost]))
    for k in budgets_of(results):
        for name in samplers_of(results):
            for step in steps:
                entry = cell(results, name, k, step)
                at = [str(step)] if len(steps) > 1 else []
                spread = METRICS if at else ("F1",)
                values = [_mean(entry, metric, 4, spread=metric in spread) for metric in METRICS]
                excess = f"{entry['excess_mean']:.1e}"
                cost = [_ratio(entry, "RTE", 1e3, 1), _ratio(entry, "ME", 2**-20, 1)]
                rows.append(("", [text_of(_words(name)), share(k, results), *at, *values, excess, *cost]))
    return table([(name, _UNITS.get(name, "")) for name in head], rows)


def _mean(entry: Mapping[str, Any], metric: str, digits: int, *, spread: bool) -> str:
    mean, std = entry[f"{metric}_mean"], entry[f"{metric}_std"]
    return f"{mean:.{digits}f}" + (f" <i>± {std:.{digits}f}</i>" if spread and std is not None else "")


def _ratio(entry: Mapping[str, Any], metric: str, unit: float, digits: int) -> str:
    mean, ratio = entry[f"{metric}_mean"], entry[f"{metric}_ratio"]
    if mean is None:
        return "not measured"
    return f"{mean * unit:.{digits}f}" + ("" if ratio is None else f" <i>{ratio:.2f}&times;</i>")


def _class_table(results: Results) -> str:
    names = results["meta"].get("class_names")
    rows = []
    for number, original in enumerate(results["original"]):
        label = original["class"]
        shown = f"{label}: {names[label]}" if names and names[label] != str(label) else str(label)
        for words, entries in references(results):
            entry = entries[number]
            first = text_of(shown) if entries is results["original"] else ""
            style = "reference" if entries is results["original"] else ""
            rows.append((style, [first, text_of(words), *(f"{entry[metric]:.4f}" for metric in METRICS)]))
    return table([("removed class", ""), ("", ""), *((m, _UNITS[m]) for m in METRICS)], rows, style="classes")
