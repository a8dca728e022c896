"""The metric in which gradients are truncated: how much a score feels of each entry.

In the eigenbasis of a block a score is Σ_od f(Λ_od) q_od g_od. A query of the training distribution has entries of
variance Λ there, so that an error δ of g moves its score by |M ∘ δ| on average, M = √(Λ + ε) f(Λ). A gradient is stored
as M ∘ g, of which the largest singular vectors are kept, and a query meets it as f(Λ)/M ∘ q. docs/math.md (26).

Two kinds of blocks are stored unrotated, in the coordinates of the parameters. Gradients of one position are exact as
one factor in any basis, so that to rotate each of them would be for nothing: queries are rotated back instead. And
where the estimator has no eigenbasis, it solves for the queries itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from fastif.curvature.eigenbasis import Eigenbasis
from fastif.index.thin import Thin
from fastif.model.gradients import Dense, Gradients

Unrotated = Mapping[str, float | None]  # blocks that are stored so; of estimators without a basis with their `worth`
_STEPS = 12  # of the fit of M by a product, which has settled after a few


@dataclass(frozen=True)
class Metric:
    """M of one block as a product x yᵀ, so that a gradient of t positions is of rank t in it as it is without.

    M itself would make every gradient a matrix of full rank, with o·d numbers to be decomposed, and none of them exact
    with few. x² y² has the sums of M² along rows and columns, each entry weighted by Λ + ε.
    """

    basis: Eigenbasis | None  # None: of an estimator that has none
    rows: Tensor  # x, [g, o], of gradients as they are stored
    columns: Tensor  # y, [g, d]
    rotated: tuple[Tensor, Tensor] | None = None  # x and y in the eigenbasis, where they are stored unrotated
    worth: float = 1.0  # what a square counts for beside those of other blocks

    @classmethod
    def of(cls, basis: Eigenbasis, device: torch.device, dtype: torch.dtype, unrotated: bool = False) -> Metric:
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
        rows, columns = (side.sqrt().to(dtype) for side in (x, y))
        if not unrotated or basis.input_basis is None:
            return cls(basis, rows, columns)
        # Of uncorrelated entries with variances v, those of Q times them have the variances (Q ∘ Q) v.
        sides = zip((basis.output_basis, basis.input_basis), (x, y), strict=True)
        own = [side if of is None else (of.to(side).square() @ side[..., None])[..., 0] for of, side in sides]
        return cls(basis, own[0].sqrt().to(dtype), own[1].sqrt().to(dtype), (rows, columns))

    @classmethod
    def without_basis(
        cls, shape: tuple[int, int, int], worth: float, device: torch.device, dtype: torch.dtype
    ) -> Metric:
        """Of a block whose queries come solved, and move a score by √worth times an error, on average."""
        g, o, d = shape
        ones = torch.ones((g, o + d), device=device, dtype=dtype)
        return cls(None, ones[:, :o], ones[:, o:], None, worth)

    @property
    def shape(self) -> tuple[int, int, int]:
        g, o = self.rows.shape
        return g, o, self.columns.shape[1]

    @property
    def stores_rotated(self) -> bool:
        return self.basis is not None and self.rotated is None

    def to_store(self, gradients: Gradients) -> Gradients:
        """In the coordinates in which they are stored."""
        return self.basis.rotate(gradients) if self.basis is not None and self.rotated is None else gradients

    @property
    def own(self) -> Tensor:
        """f(Λ)/M², [g, o, d], where gradients are stored rotated: what squares of their entries count for in a score on
        itself."""
        assert self.basis is not None
        return self.basis.inverse.to(self.rows) / (self.rows[:, :, None] * self.columns[:, None]).square()

    def weigh_query(self, matrices: Tensor, out: Tensor, count: int = 1) -> Tensor:
        """f(Λ)/M ∘ q over `count`, for matrices q [..., g, o, d] in the eigenbasis, in out; of an estimator without one
        q/M, for q that it has solved for."""
        if self.basis is None:
            out.copy_(matrices)
        else:
            torch.mul(matrices, self.basis.inverse.to(out), out=out)
        rows, columns = self.rotated or (self.rows, self.columns)
        return out.div_(count * rows[:, :, None]).div_(columns[:, None, :])

    def turns_factors(self, q: int, n: int) -> bool:
        """Whether it is less work to turn factors, one of each of n examples, into the eigenbasis than q whole queries
        out of it."""
        _, o, d = self.shape
        return self.rotated is not None and n * (o * o + d * d) < q * o * d * (o + d)

    @overload
    def to_meet(self, queries: Tensor) -> Tensor: ...
    @overload
    def to_meet(self, queries: Thin) -> Thin: ...
    def to_meet(self, queries: Tensor | Thin) -> Tensor | Thin:
        """Weighed queries [q, g, o, d], or of one group [q, o, d] or thin, in the coordinates of what is stored."""
        if self.basis is None or self.rotated is None:
            return queries
        basis, (rows, columns) = self.basis, self.rotated
        if isinstance(queries, Thin):
            left = basis.left_back(rows[:, :, None] * queries.left[:, None]) / self.rows[:, :, None]
            right = basis.right_back(queries.right[:, None] * columns[:, None]) / self.columns[:, None]
            return Thin(left[:, 0], right[:, 0])
        matrices = basis.right_back(basis.left_back(rows[:, :, None] * queries * columns[:, None]))
        return matrices.div_(self.rows[:, :, None]).div_(self.columns[:, None])

    def turn(self, gradients: Dense) -> Dense:
        """Gradients as M ∘ Qᵀ g, where they are stored unrotated."""
        assert self.basis is not None
        assert self.rotated is not None
        turned = self.basis.rotate(gradients)
        assert isinstance(turned, Dense)
        rows, columns = self.rotated
        return Dense(turned.inputs * columns[:, None, None], turned.output_grads * rows[:, None, None])
