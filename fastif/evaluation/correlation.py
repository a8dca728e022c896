"""Correlations along the last axis, and intervals of their means."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean over queries and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1 along the last axis, equal values sharing their mean rank.

    >>> ranks(torch.tensor([[3.0, 1.0, 3.0, 7.0]]))
    tensor([[2.5000, 1.0000, 2.5000, 4.0000]], dtype=torch.float64)
    """
    rows = values.reshape(-1, values.shape[-1])
    ranked = torch.empty(rows.shape, dtype=torch.float64)
    for row, out in zip(rows, ranked, strict=True):
        _, place, counts = row.unique(return_inverse=True, return_counts=True)
        out.copy_((counts.cumsum(0) - (counts - 1) / 2).double()[place])
    return ranked.view(values.shape)


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of a and b [..., m] along the last axis, [...] in float64; 0 where either is constant.

    A constant says nothing of what varies; correlation itself is undefined there, so callers count these cases.
    """
    constant = is_constant(a) | is_constant(b)
    a, b = (x.double() - x.double().mean(-1, keepdim=True) for x in (a, b))
    # Scaled first, so that tiny scores do not square to nothing.
    a, b = (x / x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny) for x in (a, b))
    product = (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return product.masked_fill(constant, 0.0).clamp(-1, 1)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation along the last axis: `pearson` of the `ranks`."""
    return pearson(ranks(a), ranks(b))


def is_constant(x: Tensor) -> Tensor:
    return (x == x[..., :1]).all(-1)


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
