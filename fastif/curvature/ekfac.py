"""EK-FAC: the eigenbasis of K-FAC with the curvature's own diagonal in it."""

from __future__ import annotations

from torch import Tensor

from fastif.curvature.kfac import KFAC
from fastif.model.gradients import Gradients


class EKFAC(KFAC):
    """G ≈ (Q_A ⊗ Q_B) diag(λ) (Q_A ⊗ Q_B)ᵀ with the eigenvectors of `KFAC` and λ = Σ_i w_i Σ_s (Q_Bᵀ g_is Q_A)².

    Of all matrices with these eigenvectors it is the nearest to the curvature of the layer (George et al. 2018,
    arXiv 1806.03884). It takes a second pass over the data. Arguments as for `KFAC`. docs/math.md (16).
    """

    passes = 2

    def observe(self, gradients: Gradients, weights: Tensor, column: int, pass_index: int) -> None:
        if pass_index == 0:
            super().observe(gradients, weights, column, pass_index)
        else:
            squares = self.rotate(gradients).squares(weights)
            self._eigenvalues = squares if self._eigenvalues is None else self._eigenvalues.add_(squares)

    def sums(self, pass_index: int) -> dict[str, Tensor]:
        if pass_index == 0:
            return super().sums(pass_index)
        return {} if self._eigenvalues is None else {"eigenvalues": self._eigenvalues}

    def take_sums(self, pass_index: int, sums: dict[str, Tensor]) -> None:
        if pass_index == 0:
            super().take_sums(pass_index, sums)
        else:
            self._eigenvalues = sums["eigenvalues"]

    def let_go(self, pass_index: int) -> None:
        if pass_index == 0:
            super().let_go(pass_index)
        else:
            self._eigenvalues = None

    def made(self, pass_index: int) -> dict[str, Tensor]:
        return super().made(pass_index) if pass_index == 0 else {"eigenvalues": self.eigenvalues}

    def take_made(self, pass_index: int, made: dict[str, Tensor]) -> None:
        if pass_index == 0:
            super().take_made(pass_index, made)
        else:
            self._eigenvalues = made["eigenvalues"]

    def end(self, pass_index: int) -> None:
        if pass_index == 0:
            self._decompose()
            self._eigenvalues = None  # those of the product have served
        else:
            _ = self.damping_used
