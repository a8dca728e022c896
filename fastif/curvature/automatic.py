"""An estimator for each block by its size: exact where the exact one fits, EK-FAC elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from fastif.curvature.damping import AUTO, Damping, RelativeDamping, TrainingDamping, check_damping
from fastif.curvature.ekfac import EKFAC
from fastif.curvature.exact.block import ExactBlock
from fastif.curvature.protocol import Estimator, JointCurvature, Shape, check_fisher
from fastif.model.losses import Fisher

_BYTES = 8  # of a number in the factor of an exact block, which is float64


class Automatic(Estimator):
    """`ExactBlock` for the blocks of few parameters, `EKFAC` for the rest: what curvature="auto" stands for.

    A Kronecker product is a poor stand-in for the curvature of a small layer, a convolution of few channels above all,
    and there the exact block costs little. Blocks are taken from the smallest on, as long as the float64 squares of
    their parameters' numbers, Σ 8 P² bytes, fit `share` of the `memory` of `Influence`; with its default, a lone block
    of up to 2,896 parameters does. `Influence.plan` shows what each layer was given.

    Args:
        damping: of both: a number > 0, "auto", `RelativeDamping` or `TrainingDamping`, which is the better choice
            wherever it is known how long the model was trained.
        share: of `memory`, in (0, 1].
        fisher: as for `EKFAC`. The default, "auto", is "exact" where an example has one label, and "monte_carlo" where
            it has several, as texts have: a backward pass for each class of each of them would be too many. The plan
            says to what it comes, and `Influence(seed=)` sets the labels that are drawn.
    """

    def __init__(self, damping: Damping = "auto", share: float = 0.5, fisher: Fisher = "auto"):
        check_damping(damping, RelativeDamping, TrainingDamping)
        if not 0 < share <= 1:
            raise ValueError(f"Automatic: share must be a number in (0, 1], got {share!r}")
        check_fisher("Automatic", fisher)
        self.damping: Damping = damping
        self.share = share
        self.fisher: Fisher = fisher

    def assign(self, shapes: Mapping[str, Shape], memory: int) -> dict[tuple[str, ...], JointCurvature]:
        exact = ExactBlock(AUTO if self.damping == "auto" else self.damping, fisher=self.fisher)
        below = EKFAC(self.damping, self.fisher)
        room = self.share * memory
        small: set[str] = set()
        for name, size in sorted(((name, math.prod(shape)) for name, shape in shapes.items()), key=lambda one: one[1]):
            room -= _BYTES * size**2
            if room < 0:
                break
            small.add(name)
        parts: dict[tuple[str, ...], JointCurvature] = {}
        for name, shape in shapes.items():
            parts.update((exact if name in small else below).assign({name: shape}, memory))
        return parts

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing: what is fitted are the estimators that it assigns."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            raise ValueError(f"Automatic: holds nothing of its own, got {', '.join(state)}")
