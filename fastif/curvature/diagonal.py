"""The diagonal of the curvature, and no curvature at all."""

from __future__ import annotations

import torch
from torch import Tensor

from fastif.curvature.damping import NotPositiveDefinite, RelativeDamping, TrainingDamping, check_damping, invert
from fastif.curvature.eigenbasis import Eigenbasis
from fastif.curvature.protocol import BlockWork, Cost, Curvature, Exchanged, FitWork, check_fisher
from fastif.model.gradients import Gradients
from fastif.model.losses import Fisher


class Diagonal(Curvature):
    """diag(G) = Σ_i w_i Σ_s g_is², elementwise: entries that influence one another are not seen to.

    Args:
        damping: absolute λ >= 0; or a `RelativeDamping`, or a `TrainingDamping`, which filters the entries instead.
        fisher: which gradients, as for `KFAC`.
    """

    passes = 1

    def __init__(self, damping: float | RelativeDamping | TrainingDamping = 1e-3, fisher: Fisher = "exact"):
        if damping == "auto":
            raise ValueError("Diagonal: damping must be a number, got 'auto'")
        check_damping(damping, RelativeDamping, TrainingDamping)
        check_fisher("Diagonal", fisher)
        self.damping, self.fisher, self.name = damping, fisher, "layer"
        self._diagonal: Tensor | None = None

    def begin(self, name: str, shape: tuple[int, int, int]) -> None:
        self.name, self.shape, self._diagonal = name, shape, None

    def observe(self, gradients: Gradients, weights: Tensor, column: int, pass_index: int) -> None:
        del column, pass_index
        squares = gradients.squares(weights)
        self._diagonal = squares if self._diagonal is None else self._diagonal.add_(squares)

    def sums(self, pass_index: int) -> dict[str, Tensor]:
        del pass_index
        return {} if self._diagonal is None else {"diagonal": self._diagonal}

    def take_sums(self, pass_index: int, sums: dict[str, Tensor]) -> None:
        del pass_index
        self._diagonal = sums["diagonal"]

    def end(self, pass_index: int) -> None:
        del pass_index
        if not bool(self.diagonal.isfinite().all()):
            raise NotPositiveDefinite(f"Diagonal: layer {self.name!r} holds NaN or Inf")
        _ = self.inverse_diagonal

    @property
    def diagonal(self) -> Tensor:
        """Without damping, [g, o, d]."""
        if self._diagonal is None:
            raise ValueError("Diagonal: not fitted; call Influence.fit first")
        return self._diagonal

    @property
    def damping_used(self) -> float:
        """λ: the number given, or the share of the mean entry; of a `TrainingDamping` that of flat directions."""
        if isinstance(self.damping, TrainingDamping):
            return self.damping.of_flat_directions
        if isinstance(self.damping, RelativeDamping):
            return self.damping.share * float(self.diagonal.double().mean())
        return self.damping

    @property
    def inverse_diagonal(self) -> Tensor:
        lowest, used = float(self.diagonal.min()), self.damping_used
        if not lowest + used > torch.finfo(self.diagonal.dtype).tiny:
            raise NotPositiveDefinite(
                f"Diagonal: layer {self.name!r} with damping {used:g} is singular: its smallest entry is "
                f"{lowest:.3g}; a damping > 0 would do"
            )
        return invert(self.diagonal, self.damping, used)

    def eigenbasis(self) -> Eigenbasis:
        return Eigenbasis(self.diagonal, self.inverse_diagonal)

    def solve(self, rhs: Tensor) -> Tensor:
        """(diag(G) + λI)⁻¹ rhs for rhs [..., g, o, d]."""
        return rhs * self.inverse_diagonal

    def sq_norms(self, gradients: Gradients) -> Tensor:
        return gradients.sq_norms(self.inverse_diagonal)

    def state_dict(self) -> dict[str, Tensor]:
        return {"diagonal": self.diagonal}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._diagonal = state["diagonal"]

    def stand_in(self) -> None:
        self._diagonal = torch.ones_like(self.diagonal)

    def cost(self, block: BlockWork, fit: FitWork) -> Cost:
        size = block.size * fit.item
        operations = 2 * fit.n * fit.columns * block.positions * block.size
        return Cost(2 * size, operations=operations, learned=size, observing=size, beside=2 * size)

    def exchanged(self, block: BlockWork, fit: FitWork) -> Exchanged:
        return Exchanged(summed=block.size * fit.item)


class Identity(Curvature):
    """No curvature: scores are dot products of gradients, divided by n (TracIn's; Pruthi et al. 2020)."""

    passes, fisher = 0, "empirical"

    def begin(self, name: str, shape: tuple[int, int, int]) -> None:
        del name
        self.shape = shape

    def observe(self, gradients: Gradients, weights: Tensor, column: int, pass_index: int) -> None: ...

    def end(self, pass_index: int) -> None: ...

    def eigenbasis(self) -> Eigenbasis:
        ones = torch.ones(self.shape)
        return Eigenbasis(ones, ones)

    def solve(self, rhs: Tensor) -> Tensor:
        return rhs

    def sq_norms(self, gradients: Gradients) -> Tensor:
        return gradients.sq_norms()

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...

    def stand_in(self) -> None: ...

    def cost(self, block: BlockWork, fit: FitWork) -> Cost:
        del block, fit
        return Cost()
