"""Counterfactuals: take away the examples that scores call the most helpful, train anew, and look at the query."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastif.evaluation.correlation import Interval, check_scores, interval
from fastif.evaluation.retraining import TrainFn, retrain, without


class Counterfactual(NamedTuple):
    """True rises of the queries' measurements after removals of growing size."""

    sizes: list[int]
    rises: Tensor  # float64 [sizes, q]: without a query's own `size` most helpful examples, minus with all
    random: Tensor  # float64 [sizes, q]: without `size` random examples, mean over the draws
    mean: list[Interval]  # of `rises` over the queries, by size
    random_mean: list[Interval]


class Brittleness(NamedTuple):
    """How few examples a prediction hangs on."""

    sizes: list[int]
    flipped_at: list[int | None]  # by query: the smallest size that flipped it; None where none did, or it was wrong
    right: list[bool]  # by query: whether the network trained on all examples got it right
    flipped: list[float]  # by size: share of the queries that were right and have been flipped by then


def subset_counterfactual(
    train_fn: TrainFn,
    scores: Tensor,
    query: Any,
    sizes: Sequence[int],
    *,
    draws: int = 3,
    draw_seed: int = 0,
    **how: Any,
) -> Counterfactual:
    """Removes each query's `size` highest-scored examples, trains anew, and reports the true rise of its measurement.

    scores [q, n] are predicted rises when an example is removed: the highest are those whose removal should raise the
    measurement most (for a loss: the most helpful). Ties go to the lower index. The baseline removes as many random
    examples, `draws` times. That is (q + draws) · len(sizes) + 1 retrainings per seed: choose few queries.
    `train_fn`, `query` and `how` are as for `retrain`.
    """
    q, n = check_scores("subset_counterfactual", scores).shape
    sizes = _check_sizes("subset_counterfactual", sizes, n)
    if type(draws) is not int or draws < 1:
        raise ValueError(f"subset_counterfactual: draws must be an integer >= 1, got {draws!r}")
    order = scores.sort(dim=1, descending=True, stable=True).indices.cpu()
    draw = torch.Generator().manual_seed(draw_seed)
    chance = [torch.randperm(n, generator=draw) for _ in range(draws)]
    sets = [without(n, ranked[:size]) for size in sizes for ranked in (*order, *chance)]
    values = retrain(train_fn, [torch.arange(n), *sets], query, **how).values.mean(1)
    _check_queries("subset_counterfactual", values.shape[1], q)
    rises = (values[1:] - values[0]).view(len(sizes), q + draws, q)
    own, random = rises[:, :q].diagonal(dim1=1, dim2=2), rises[:, q:].mean(1)
    return Counterfactual(sizes, own, random, [interval(row) for row in own], [interval(row) for row in random])


def brittleness(
    train_fn: TrainFn,
    scores: Tensor,
    query: Any,
    sizes: Sequence[int],
    *,
    out: str | Path | None = None,
    **how: Any,
) -> Brittleness:
    """The smallest number of a query's most helpful examples whose removal makes the retrained network get it wrong.

    scores [q, n] are predicted rises of the query's LOSS when an example is removed (the highest are removed first;
    for scores of a margin or of log-odds, which fall when help goes, pass their negative). A prediction is flipped
    when the label's logit is below the largest other, on average over the seeds. Sizes are tried in ascending order,
    each only on the queries that are still right, at most q · len(sizes) + 1 retrainings per seed. `train_fn`, `query`
    and `how` are as for `retrain`; `out` holds a folder for each size.
    """
    q, n = check_scores("brittleness", scores).shape
    sizes = _check_sizes("brittleness", sizes, n)
    if "measurement" in how:
        raise TypeError("brittleness: it measures the margin, measurement= cannot be chosen")
    order = scores.sort(dim=1, descending=True, stable=True).indices.cpu()

    def margins(name: str, sets: list[Tensor]) -> Tensor:
        where = None if out is None else Path(out) / name
        return retrain(train_fn, sets, query, measurement="margin", out=where, **how).values.mean(1)

    (before,) = margins("all", [torch.arange(n)])
    _check_queries("brittleness", len(before), q)
    right = before >= 0
    flipped_at: list[int | None] = [None] * q
    for size in sizes:
        left = [number for number in range(q) if right[number] and flipped_at[number] is None]
        if not left:
            break
        found = margins(f"{size}", [without(n, order[number, :size]) for number in left])
        for row, number in zip(found, left, strict=True):
            if row[number] < 0:
                flipped_at[number] = size
    counted = max(1, int(right.sum()))
    flipped = [sum(at is not None and at <= size for at in flipped_at) / counted for size in sizes]
    return Brittleness(sizes, flipped_at, right.tolist(), flipped)


def _check_sizes(op: str, sizes: Sequence[int], n: int) -> list[int]:
    sizes = list(sizes)
    rule = f"{op}: sizes must be ascending integers in [1, n={n})"
    if not sizes or any(type(size) is not int for size in sizes):
        raise ValueError(f"{rule}, got {sizes!r}")
    if sizes != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] >= n:
        raise ValueError(f"{rule}, got {sizes!r}")
    return sizes


def _check_queries(op: str, queries: int, rows: int) -> None:
    if queries != rows:
        raise ValueError(f"{op}: scores must have a row for each of q={queries} queries, got {rows}")
