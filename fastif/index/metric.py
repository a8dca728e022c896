"""The metric in which gradients are truncated: how much a score feels of each entry.

In the eigenbasis of a block a score is Σ_od f(Λ_od) q_od g_od. A query of the training distribution has entries of
variance Λ there, so that an error δ of g moves its score by |M ∘ δ| on average, M = √(Λ + ε) f(Λ). A gradient is stored
as M ∘ g, of which the largest singular vectors are kept, and a query meets it as f(Λ)/M ∘ q. docs/math.md (26).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastif.curvature.eigenbasis import Eigenbasis

_STEPS = 12  # of the fit of M by a product, which has settled after a few


@dataclass(frozen=True)
class Metric:
    """M of one block as a product x yᵀ, so that a gradient of t positions is of rank t in it as it is without.

    M itself would make every gradient a matrix of full rank, with o·d numbers to be decomposed, and none of them exact
    with few. x² y² has the sums of M² along rows and columns, each entry weighted by Λ + ε.
    """

    basis: Eigenbasis
    rows: Tensor  # x, [g, o]
    columns: Tensor  # y, [g, d]

    @classmethod
    def of(cls, basis: Eigenbasis, device: torch.device, dtype: torch.dtype) -> Metric:
        values, inverse = (x.to(device, torch.float64) for x in (basis.eigenvalues, basis.inverse))
        weights = values.clamp(min=0)
        floor = weights.mean((1, 2), keepdim=True) / 1000  # ε
        weights = weights + torch.where(floor > 0, floor, 1.0)
        squares = weights * inverse.square()
        x, y = squares.new_ones(squares.shape[:2]), squares.new_ones(squares.shape[0], squares.shape[2])
        carried = weights * squares
        for _ in range(_STEPS):
            x = carried.sum(2) / torch.einsum("sod,sd->so", weights, y)
            y = carried.sum(1) / torch.einsum("sod,so->sd", weights, x)
        return cls(basis, x.sqrt().to(dtype), y.sqrt().to(dtype))

    @property
    def shape(self) -> tuple[int, int, int]:
        g, o = self.rows.shape
        return g, o, self.columns.shape[1]

    @property
    def own(self) -> Tensor:
        """f(Λ)/M², [g, o, d]: what squares of stored entries count for in a score on itself."""
        return self.basis.inverse.to(self.rows) / (self.rows[:, :, None] * self.columns[:, None]).square()

    def weigh_query(self, matrices: Tensor, out: Tensor, count: int = 1) -> Tensor:
        """f(Λ)/M ∘ q over `count`, for matrices q [..., g, o, d] in the eigenbasis, in out."""
        torch.mul(matrices, self.basis.inverse.to(out), out=out)
        return out.div_(count * self.rows[:, :, None]).div_(self.columns[:, None, :])
