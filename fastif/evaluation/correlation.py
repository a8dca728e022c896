"""Correlations along the last axis, as all rooms know them, and intervals of their means."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastif.correlation import is_constant, pearson, ranks, spearman

__all__ = ["Interval", "check_scores", "interval", "is_constant", "pearson", "ranks", "spearman"]
_RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean over queries and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def interval(values: Tensor, seed: int = 0) -> Interval:
    """Mean of values [q] and its percentile bootstrap interval over the queries, the same draws at every call."""
    draw = torch.randint(len(values), (_RESAMPLES, len(values)), generator=torch.Generator().manual_seed(seed))
    low, high = values.double()[draw].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(values.double().mean()), low, high)


def check_scores(op: str, scores: Tensor, q: int | None = None, n: int | None = None) -> Tensor:
    """Scores [q, n] in float64 on the CPU. Raises for another shape, and for NaN with its place."""
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"{op}: scores must be a floating-point tensor [q, n], got {got}")
    shape = list(scores.shape)
    if len(shape) != 2 or q not in (None, shape[0]) or n not in (None, shape[1]):
        wanted = f"[q{'' if q is None else f'={q}'}, n{'' if n is None else f'={n}'}]"
        raise ValueError(f"{op}: scores must be {wanted}, got shape {shape}")
    broken = (~scores.isfinite()).nonzero()
    if len(broken):
        row, column = broken[0].tolist()
        raise ValueError(f"{op}: scores must be finite, scores[{row}, {column}] is {float(scores[row, column])}")
    return scores.detach().double().cpu()
