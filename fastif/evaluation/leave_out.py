"""Leaving examples out: the true rise of each query's measurement, and how well scores predict it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastif.evaluation.correlation import Interval, check_scores, interval, is_constant, pearson, spearman
from fastif.evaluation.retraining import TrainFn, retrain, without


class LeftOut(NamedTuple):
    """The truth that scores predict."""

    groups: list[list[int]]  # the examples that were left out together
    before: Tensor  # float64 [q]: the measurement of the network trained on all, mean over the seeds
    rises: Tensor  # float64 [q, groups]: without the group minus with all, seed by seed, mean over the seeds
    errors: Tensor | None  # float64 [q, groups]: standard errors of `rises` over the seeds; None with one seed


class Agreement(NamedTuple):
    """How predicted and true rises agree over the groups; each a mean over the queries with its 95 % interval."""

    pearson: Interval
    spearman: Interval
    by_query: list[float]  # Spearman's
    constant: int  # queries whose predictions or true rises are the same for every group; they count as 0


def leave_group_out(
    train_fn: TrainFn, groups: Iterable[Sequence[int] | Tensor], query: Any, n: int, **how: Any
) -> LeftOut:
    """The rise of each query's measurement when a group of the n training examples is left out of the training.

    `train_fn`, `query` and `how` (seeds, processes, out, ...) are as for `retrain`. The network with all examples and
    the one without a group share the seed, so that what the seed does by itself cancels as far as it can; several
    seeds tell how far that is (`errors`). Returns `LeftOut`.

    Raises ValueError for a group that is empty, holds an index twice or all n examples.
    """
    listed = [torch.as_tensor(group if isinstance(group, Tensor) else list(group)).reshape(-1) for group in groups]
    if not listed:
        raise ValueError("leave_group_out: there must be at least one group")
    for number, group in enumerate(listed):
        if not len(group):
            raise ValueError(f"leave_group_out: group {number} is empty")
    retrained = retrain(train_fn, [torch.arange(n), *(without(n, group) for group in listed)], query, **how)
    whole, rest = retrained.values[:1], retrained.values[1:]
    rises = (rest - whole).permute(2, 0, 1)  # [q, groups, seeds]
    seeds = rises.shape[2]
    errors = rises.std(2) / seeds**0.5 if seeds > 1 else None
    return LeftOut([group.tolist() for group in listed], whole[0].mean(0), rises.mean(2), errors)


def leave_one_out(train_fn: TrainFn, indices: Sequence[int] | Tensor, query: Any, n: int, **how: Any) -> LeftOut:
    """`leave_group_out` of single examples: the true counterpart of scores[:, indices]."""
    indices = indices.tolist() if isinstance(indices, Tensor) else list(indices)
    if len(set(indices)) < len(indices):
        raise ValueError(f"leave_one_out: indices must be distinct, {_first_twice(indices)} appears twice")
    return leave_group_out(train_fn, [[index] for index in indices], query, n, **how)


def agreement(scores: Tensor, left_out: LeftOut) -> Agreement:
    """Correlation over the groups of Σ_{t∈group} scores[q, t] with the true rise, query by query.

    scores [q, n] are predicted rises when an example is removed, the same sign as `left_out.rises`. docs/math.md (21).
    """
    scores = check_scores("agreement", scores, q=len(left_out.rises))
    if len(left_out.groups) < 2:
        raise ValueError(f"agreement: at least two groups are needed, got {len(left_out.groups)}")
    most = max(max(group) for group in left_out.groups)
    if most >= scores.shape[1]:
        raise ValueError(f"agreement: scores have n={scores.shape[1]} columns, a group holds example {most}")
    predicted = torch.stack([scores[:, group].sum(1) for group in left_out.groups], 1)
    ranked = spearman(predicted, left_out.rises)
    constant = int((is_constant(predicted) | is_constant(left_out.rises)).sum())
    return Agreement(interval(pearson(predicted, left_out.rises)), interval(ranked), ranked.tolist(), constant)


def _first_twice(indices: Sequence[int]) -> int:
    return next(index for number, index in enumerate(indices) if index in indices[:number])
