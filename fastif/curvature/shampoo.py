"""Shampoo: the eigenbases of a layer's gradients as matrices, with the curvature's own diagonal in them."""

from __future__ import annotations

from torch import Tensor

from fastif.curvature import limits
from fastif.curvature.ekfac import EKFAC
from fastif.curvature.protocol import BlockWork, Cost, FitWork
from fastif.model.gradients import Dense, Formed, Gradients, of_table


class Shampoo(EKFAC):
    """G ≈ (Q_R ⊗ Q_L) diag(λ) (Q_R ⊗ Q_L)ᵀ, Q_L, Q_R eigenvectors of Σ_i w_i Σ_s g_is g_isᵀ, Σ_i w_i Σ_s g_isᵀ g_is.

    Shampoo takes the square roots of these two for the curvature's factors (Gupta et al. 2018, arXiv 1802.09568), which
    have the same eigenvectors. In them it keeps the curvature's own diagonal λ, found in a second pass as `EKFAC` finds
    it (Vyas et al. 2024, arXiv 2409.11321, of the optimiser). Where K-FAC takes the positions of a layer for
    independent, a gradient is summed over them first; rows that are looked up in a table are treated as by `KFAC`.
    Arguments as for `KFAC`. docs/math.md (16).
    """

    def observe(self, gradients: Gradients, weights: Tensor, column: int, pass_index: int) -> None:
        if pass_index > 0 or of_table(gradients):
            super().observe(gradients, weights, column, pass_index)
            return
        g, o, d = self.shape
        each = max(1, limits.SHAMPOO_ENTRIES // (g * o * d))
        for begin in range(0, len(gradients), each):
            self._add(gradients.rows(begin, begin + each), weights[begin : begin + each])
        self._positions = 1.0  # the scale of the factors does not matter: their eigenvectors serve

    def _add(self, gradients: Gradients, weights: Tensor) -> None:
        if isinstance(gradients, Dense) and gradients.positions == len(gradients.inputs) == 1:
            # g = u aᵀ: g gᵀ = |a|² u uᵀ and gᵀ g = |u|² a aᵀ, and no gradient has to be formed.
            sizes = {"inputs": gradients.output_grads, "outputs": gradients.inputs}
            for side, other in sizes.items():
                own = weights.to(other) * other[0, :, 0].square().sum(1)
                self._moments[side] = gradients.moment(side, own, self._moments.get(side))  # pyright: ignore
            return
        formed = Formed(gradients.formed())
        for side in ("inputs", "outputs"):
            self._moments[side] = formed.moment(side, weights, self._moments.get(side))  # pyright: ignore

    def cost(self, block: BlockWork, fit: FitWork) -> Cost:
        _, o, d = block.shape
        if block.table or block.positions == 1:
            return super().cost(block, fit)
        summed = super().cost(block._replace(positions=1), fit)
        formed = 2 * fit.n * fit.columns * block.size * (2 * block.positions + o + d)
        return summed._replace(operations=summed.operations + formed)
