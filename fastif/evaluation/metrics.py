"""What an experiment reports of each run, and the mean and spread of it over seeds and classes."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import torch.nn.functional as F
from torch import Tensor

METRICS = ("EA", "EL", "SA", "SL", "F1")
SUMMARISED = (*METRICS, "objective", "excess", "RTE", "ME")
DEFINITIONS = {
    "EA": "accuracy on the held-out examples of the other classes; better high",
    "EL": "mean cross-entropy on them, in nats; better low",
    "SA": "accuracy on the held-out examples of the removed class; better low",
    "SL": "mean cross-entropy on them, in nats; better high",
    "F1": "2 (1 - SA) EA / ((1 - SA) + EA); better high",
    "objective": "(1/n) sum of the retained training examples' losses + weight_decay / 2 * squared norm of the head; "
    "n counts all training examples, the removed ones too",
    "excess": "objective minus that of the head retrained to convergence; may be below 0 by the rounding of float32",
    "seconds": "influence computation of this step: draw, gradient, curvature, solve, line search",
    "peak_bytes": "peak memory that this computation needs on top of what was there before; null where not measured",
    "RTE": "seconds summed over the steps up to this one",
    "ME": "largest peak_bytes of the steps up to this one",
    "stopped": "the objective no longer falls: the last values, carried forward with seconds 0",
    "_mean": "over all classes and seeds",
    "_std": "standard deviation (n - 1) over seeds of the mean over classes; null with one seed, and for a sampler "
    "that draws nothing and is therefore run with the first seed only",
    "_std_classes": "standard deviation (n - 1) over classes of the mean over seeds; null with one class",
    "_ratio": "the mean over that of `random`, k, step, classes and seeds being the same",
}


def measure(logits: Tensor, labels: Tensor, removed: int) -> dict[str, float]:
    """EA, EL, SA, SL and F1 of logits [m, c] with labels [m], as defined in `DEFINITIONS`; F1 is 0 where it is 0/0.

    >>> import torch
    >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 2.0]])
    >>> found = measure(logits, torch.tensor([0, 1, 1, 2]), removed=1)
    >>> found["EA"], found["SA"], round(found["F1"], 4)
    (1.0, 0.5, 0.6667)
    """
    losses = F.cross_entropy(logits.double(), labels, reduction="none")
    right = (logits.argmax(1) == labels).double()
    gone = labels == removed
    ea, sa = float(right[~gone].mean()), float(right[gone].mean())
    f1 = 2 * (1 - sa) * ea / ((1 - sa) + ea) if (1 - sa) + ea else 0.0
    return {"EA": ea, "EL": float(losses[~gone].mean()), "SA": sa, "SL": float(losses[gone].mean()), "F1": f1}


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread of each metric per sampler, k and step, as defined in `DEFINITIONS`."""
    runs: dict[tuple[str, int, int, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        runs.setdefault((row["sampler"], row["k"], row["class"], row["seed"]), []).append(row)
    cells: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for (sampler, k, _, _), run in runs.items():
        rte, peaks = 0.0, []
        for row in sorted(run, key=lambda row: row["step"]):
            rte += row["seconds"]
            peaks.append(row["peak_bytes"])
            me = None if None in peaks else max(peaks)
            cells.setdefault((sampler, k, row["step"]), []).append({**row, "RTE": rte, "ME": me})
    summary: list[dict[str, Any]] = []
    for (sampler, k, step), cell in cells.items():
        entry: dict[str, Any] = {"sampler": sampler, "k": k, "step": step, "runs": len(cell)}
        for metric in SUMMARISED:
            values = [row[metric] for row in cell]
            known = None not in values
            entry[f"{metric}_mean"] = fmean(values) if known else None
            entry[f"{metric}_std"] = _spread(cell, metric, "seed") if known else None
            entry[f"{metric}_std_classes"] = _spread(cell, metric, "class") if known else None
        summary.append(entry)
    for entry in summary:
        own = cells[entry["sampler"], entry["k"], entry["step"]]
        base = {(row["class"], row["seed"]): row for row in cells.get(("random", entry["k"], entry["step"]), [])}
        pairs = [(row, base[row["class"], row["seed"]]) for row in own if (row["class"], row["seed"]) in base]
        for metric in ("RTE", "ME"):
            entry[f"{metric}_ratio"] = _ratio([(row[metric], other[metric]) for row, other in pairs])
    return summary


def _ratio(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    known = [(own, other) for own, other in pairs if own is not None and other is not None]
    total = sum(other for _, other in known)
    return sum(own for own, _ in known) / total if total else None


def _spread(cell: Sequence[Mapping[str, Any]], metric: str, over: str) -> float | None:
    """Standard deviation over the seeds (or classes) of the mean over everything else."""
    groups: dict[int, list[float]] = {}
    for row in cell:
        groups.setdefault(row[over], []).append(row[metric])
    means = [fmean(values) for values in groups.values()]
    return stdev(means) if len(means) > 1 else None
