"""What removals from a head and from a network have in common: the retained part of a subset, checks, step sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastif.samplers.subset import Subset

Sampler = Callable[..., Any]
STEP_SIZES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
SMALLEST_STEP = 2.0**-20  # where none of them lowers F, the step is halved down to this


def without_removed(subset: Subset, kept: Tensor) -> Subset:
    """The retained examples of a subset of the training data, as positions among the retained; weights unchanged."""
    kept = kept.cpu()
    stays = kept[subset.indices]
    if not stays.any():
        raise ValueError("remove: every example of the subset is removed; none is left to carry the curvature")
    position = kept.cumsum(0) - 1
    return Subset(position[subset.indices[stays]], subset.weights[stays])


def check_removed(removed: Tensor, n: int) -> None:
    if removed.numel() == 0:
        raise ValueError("remove: indices must not be empty")
    if removed.dtype == torch.bool:
        raise ValueError("remove: indices must be int64 [r], got a mask; pass mask.nonzero()[:, 0]")
    if removed.dim() != 1 or removed.dtype != torch.int64:
        raise ValueError(f"remove: indices must be int64 [r], got {removed.dtype} {list(removed.shape)}")
    outside = removed[(removed < 0) | (removed >= n)]
    if outside.numel():
        raise ValueError(f"remove: indices must be in [0, n={n}), got {int(outside[0])}")
    if removed.unique().numel() < removed.numel():
        raise ValueError("remove: indices must be distinct, some appear more than once")
    if removed.numel() == n:
        raise ValueError(f"remove: indices name all n={n} examples; none would be retained")


def check_weight_decay(weight_decay: float) -> None:
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"remove: weight_decay must be a finite number >= 0, got {weight_decay}")
