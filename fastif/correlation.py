"""Correlations along the last axis."""

from __future__ import annotations

import torch
from torch import Tensor


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
