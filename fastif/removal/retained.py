"""What removals from a head and from a network have in common: the retained part of a subset, checks, step sizes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from fastif.ranks import ALONE, Ranks
from fastif.samplers.draw import Sampler, draw
from fastif.samplers.subset import Subset, check_subset

STEP_SIZES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
SMALLEST_STEP = 2.0**-20  # Where none of them lowers F, the step is halved down to this and no further.


class Picks:
    """Which retained examples carry the curvature in a step: all, those of a subset, or those that a sampler draws.

    `kept` is bool [n]: what of the training data is retained. Indices count among the retained, and weights are on the
    1/n scale: what is removed is left out, and the rest counts as it did. Of several ranks all draw, so that their
    generators go on alike, and what the first one drew counts.
    """

    def __init__(self, subset: Any | Sampler | None, kept: Tensor, generator: Generator | None, ranks: Ranks = ALONE):
        self._ranks = ranks
        n, retained = len(kept), int(kept.sum())
        self.all, self.sampler = subset is None, subset if callable(subset) else None
        self._share, self._generator = retained / n, generator
        self._fixed: Subset | None = None
        if subset is None:
            self._fixed = Subset(torch.arange(retained), torch.full((retained,), 1 / n, dtype=torch.float64))
        elif self.sampler is None:
            self._fixed = without_removed(check_subset(subset, n), kept)

    def take(self, seen: Mapping[str, Any]) -> Subset:
        """Those of the next step; `seen` are features, logits and labels of the retained, for a sampler."""
        if self._fixed is not None:
            return self._fixed
        assert self.sampler is not None
        found = draw(self.sampler, **seen, generator=self._generator, op="remove")
        drawn = {"indices": found.indices, "weights": found.weights * self._share}
        if self._ranks.world > 1:
            device = self._ranks.device
            drawn = self._ranks.of_first("the subset", {key: x.to(device) for key, x in drawn.items()}, device)
        return Subset(drawn["indices"].cpu(), drawn["weights"].cpu())


def without_removed(subset: Subset, kept: Tensor) -> Subset:
    """The retained examples of a subset of the training data, as positions among the retained; weights unchanged."""
    kept = kept.cpu()
    stays = kept[subset.indices]
    if not stays.any():
        raise ValueError("remove: every example of the subset is removed; none is left to carry the curvature")
    position = kept.cumsum(0) - 1
    return Subset(position[subset.indices[stays]], subset.weights[stays])


def check_indices(removed: Tensor) -> None:
    """What can be said of `indices` without the data."""
    if removed.numel() == 0:
        raise ValueError("remove: indices must not be empty")
    if removed.dtype == torch.bool:
        raise ValueError("remove: indices must be int64 [r], got a mask; pass mask.nonzero()[:, 0]")
    if removed.dim() != 1 or removed.dtype != torch.int64:
        raise ValueError(f"remove: indices must be int64 [r], got {removed.dtype} {list(removed.shape)}")
    if removed.unique().numel() < removed.numel():
        raise ValueError("remove: indices must be distinct, some appear more than once")


def check_removed(removed: Tensor, n: int) -> None:
    check_indices(removed)
    outside = removed[(removed < 0) | (removed >= n)]
    if outside.numel():
        raise ValueError(f"remove: indices must be in [0, n={n}), got {int(outside[0])}")
    if removed.numel() == n:
        raise ValueError(f"remove: indices name all n={n} examples; none would be retained")


def check_weight_decay(weight_decay: float) -> None:
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"remove: weight_decay must be a finite number >= 0, got {weight_decay}")


def add_damping(curvature: Any | Mapping[str, Any], weight_decay: float, damping: float) -> Any:
    """Copies of the estimators, damped by so much more. "auto" and rules find their own: damping beside is refused."""
    if isinstance(curvature, Mapping):
        return {pattern: add_damping(estimator, weight_decay, damping) for pattern, estimator in curvature.items()}
    estimator = copy.deepcopy(curvature)
    own = getattr(estimator, "damping", None)
    if own is not None and not isinstance(own, float | int) and damping > 0:
        raise ValueError(
            f"remove: damping is added to numbers, got damping={damping} beside {type(estimator).__name__}"
            f"(damping={own!r}); give curvature= a number"
        )
    if isinstance(own, float | int):
        estimator.damping += weight_decay + damping
    return estimator
