"""Plans: what `Influence` will cover, store and compute, known before any work."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from fastif.capture import dtype_of
from fastif.data import count

if TYPE_CHECKING:
    from fastif.influence import Influence


class LayerPlan(NamedTuple):
    """One block of parameters."""

    shape: tuple[int, int, int]  # g matrices [o, d]
    curvature: str
    bytes: int  # of its curvature and what its making takes


class Plan(NamedTuple):
    """What `fit` and `scores` will do."""

    covered: dict[str, tuple[int, ...]]  # parameters that influence is computed for
    skipped: dict[str, str]  # parameters that it is not computed for, taken as fixed, and why
    layers: dict[str, LayerPlan]
    n: int  # training examples
    curvature_bytes: int  # of all layers
    query_bytes: int  # of one preconditioned query gradient

    def __str__(self) -> str:
        covered = "\n".join(f"  {name} {list(shape)}" for name, shape in self.covered.items()) or "  none"
        skipped = "\n".join(f"  {name}: {reason}" for name, reason in self.skipped.items()) or "  none"
        size = sum(math.prod(shape) for shape in self.covered.values())
        return (
            f"covered: {size:,} parameters\n{covered}\nskipped (taken as fixed):\n{skipped}\n"
            f"{self.n:,} training examples; curvature {self.curvature_bytes / 2**20:.1f} MiB, "
            f"each query {self.query_bytes / 2**20:.2f} MiB"
        )


def plan(influence: Influence, train: Any) -> Plan:
    capture = influence.capture
    item = dtype_of(influence.model).itemsize
    layers = {
        name: LayerPlan(block.shape, type(estimator).__name__, estimator.bytes_needed(block.shape, False, item))
        for name, (block, estimator) in (
            (name, (capture.blocks[name], influence._estimators[name])) for name in capture.blocks
        )
    }
    return Plan(
        capture.covered,
        dict(capture.skipped),
        layers,
        count(train, influence.batch_size),
        sum(layer.bytes for layer in layers.values()),
        sum(block.size for block in capture.blocks.values()) * item,
    )
