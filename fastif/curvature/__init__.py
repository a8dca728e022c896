"""Curvature estimators, one per file, with one protocol.

`Influence` drives them: `begin` a layer's block, `observe` its gradients batch by batch in `passes` passes, `end` each
pass; then `solve`, `sq_norms` and `directions` apply the damped inverse. A `JointCurvature` does so for several blocks
at once.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fastif.curvature.arnoldi import Arnoldi
from fastif.curvature.cg import CG
from fastif.curvature.cholesky import IllConditioned, NotPositiveDefinite
from fastif.curvature.data_inf import DataInf
from fastif.curvature.diagonal import Diagonal, Identity
from fastif.curvature.directions import Directions, Explicit, LowRank
from fastif.curvature.ekfac import EKFAC
from fastif.curvature.exact_block import ExactBlock
from fastif.curvature.kfac import KFAC
from fastif.curvature.lissa import Diverged, LiSSA
from fastif.curvature.network import FitData, JointCurvature
from fastif.curvature.products import NotConverged
from fastif.curvature.projection import RandomProjection
from fastif.model.gradients import Gradients
from fastif.model.losses import Fisher


class Curvature(Protocol):
    """What an estimator of one block, g matrices [o, d] of parameters, must be able to do."""

    @property
    def passes(self) -> int:
        """How often it must see the data."""
        ...

    @property
    def fisher(self) -> Fisher:
        """Of which gradients it is made."""
        ...

    def begin(self, name: str, shape: tuple[int, int, int]) -> None:
        """Forgets what was learned; name and shape [g, o, d] of the block."""
        ...

    def observe(self, gradients: Gradients, weights: Tensor, column: int, turn: int) -> None:
        """Takes in Σ_i weights[i] vec(g_i) vec(g_i)ᵀ of a batch, column `column` of its curvature, in pass `turn`."""
        ...

    def end(self, turn: int) -> None:
        """Ends a pass; raises NotPositiveDefinite with a diagnosis."""
        ...

    def solve(self, rhs: Tensor) -> Tensor:
        """(G + λI)⁻¹ rhs for rhs [..., g, o, d]."""
        ...

    def sq_norms(self, gradients: Gradients) -> Tensor:
        """g_iᵀ (G + λI)⁻¹ g_i, [n]."""
        ...

    def directions(self, gradients: Gradients) -> Directions:
        """(G + λI)⁻¹ g_q for every q."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...

    def stand_in(self) -> None:
        """For `Influence.plan`: has the sizes of what is fitted, once pass 0 was observed, and not its values."""
        ...

    def footprint(self, shape: tuple[int, int, int], table: bool, item: int) -> tuple[int, int]:
        """For `Influence.plan`: bytes held once fitted, and what making it takes beside them, for `item` bytes each."""
        ...


__all__ = [
    "CG",
    "EKFAC",
    "KFAC",
    "Arnoldi",
    "Curvature",
    "DataInf",
    "Diagonal",
    "Directions",
    "Diverged",
    "ExactBlock",
    "Explicit",
    "FitData",
    "Identity",
    "IllConditioned",
    "JointCurvature",
    "LiSSA",
    "LowRank",
    "NotConverged",
    "NotPositiveDefinite",
    "RandomProjection",
]
