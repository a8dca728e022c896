"""The metric in which gradients are truncated: how much a score feels of each entry.

In the eigenbasis of a block a score is Σ_od f(Λ_od) q_od g_od. A query of the training distribution has entries of
variance Λ there, and f(Λ) q of variance M², M = √(Λ + ε) f(Λ): by so much an error of g moves its score.

Gradients are stored in the parameters' own coordinates, so that none of them has to be turned into the basis: as
x yᵀ ∘ g, where x² y² are the variances of f(Λ) q outside of the basis, as near as a product comes to them. Queries are
weighed in the basis and turned out of it. An estimator without an eigenbasis solves for them itself. docs/math.md (26).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from fastif.curvature.eigenbasis import Eigenbasis
from fastif.index.thin import Thin
from fastif.model.gradients import Dense

_STEPS = 12  # of the fit of M by a product, which has settled after a few


@dataclass(frozen=True)
class Metric:
    """M of one block as a product, so that a gradient of t positions is of rank t in it as it is without.

    M itself would make every gradient a matrix of full rank, with o·d numbers to be decomposed, and none of them exact
    with few. In the basis, the product's squares have the sums of M² along rows and columns, each entry weighted by
    Λ + ε.
    """

    basis: Eigenbasis | None  # None: of an estimator that has none
    rows: Tensor  # x, [g, o], of gradients as they are stored
    columns: Tensor  # y, [g, d]
    inside: tuple[Tensor, Tensor]  # the same in the basis
    worth: float = 1.0  # what a square counts for beside those of other blocks

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
        # Of uncorrelated entries with variances v, those of Q times them have the variances (Q ∘ Q) v.
        sides = zip((basis.output_basis, basis.input_basis), (x, y), strict=True)
        outside = [v if q is None else (q.to(v).square() @ v[..., None])[..., 0] for q, v in sides]
        rows, columns, *inside = (side.sqrt().to(dtype) for side in (*outside, x, y))
        return cls(basis, rows, columns, (inside[0], inside[1]))

    @classmethod
    def without_basis(
        cls, shape: tuple[int, int, int], worth: float, device: torch.device, dtype: torch.dtype
    ) -> Metric:
        """Of a block whose queries come solved, and move a score by √worth times an error, on average."""
        g, o, d = shape
        rows, columns = torch.ones((g, o + d), device=device, dtype=dtype).split([o, d], 1)
        return cls(None, rows, columns, (rows, columns), worth)

    @property
    def shape(self) -> tuple[int, int, int]:
        g, o = self.rows.shape
        return g, o, self.columns.shape[1]

    def weigh_query(self, matrices: Tensor, out: Tensor, count: int = 1) -> Tensor:
        """f(Λ)/M ∘ q over `count`, for matrices q [..., g, o, d] in the eigenbasis, in out; of an estimator without one
        q/M, for q that it has solved for."""
        if self.basis is None:
            out.copy_(matrices)
        else:
            torch.mul(matrices, self.basis.inverse.to(out), out=out)
        rows, columns = self.inside
        return out.div_(count * rows[:, :, None]).div_(columns[:, None, :])

    @overload
    def to_meet(self, queries: Tensor) -> Tensor: ...
    @overload
    def to_meet(self, queries: Thin) -> Thin: ...
    def to_meet(self, queries: Tensor | Thin) -> Tensor | Thin:
        """Weighed queries [q, g, o, d], or of one group [q, o, d] or thin, as they meet what is stored."""
        if self.basis is None or self.basis.input_basis is None:
            return queries
        basis, (rows, columns) = self.basis, self.inside
        if isinstance(queries, Thin):
            left = basis.left_back(rows[:, :, None] * queries.left[:, None]) / self.rows[:, :, None]
            right = basis.right_back(queries.right[:, None] * columns[:, None]) / self.columns[:, None]
            return Thin(left[:, 0], right[:, 0])
        if basis.output_basis is None:
            return self._table_to_meet(queries, basis)
        out = torch.empty_like(queries)
        for query, into in zip(queries.split(1), out.split(1), strict=True):  # what is made on the way is large, too
            turned = basis.right_back(basis.left_back(rows[:, :, None] * query * columns[:, None]))
            torch.div(turned, self.rows[:, :, None], out=into).div_(self.columns[:, None])
        return out

    def _table_to_meet(self, queries: Tensor, basis: Eigenbasis) -> Tensor:
        """Of a table [q, 1, o, d], the few rows in which a query has a gradient; x is the same inside and outside."""
        out = torch.zeros_like(queries)
        there = queries.abs().amax(3) != 0  # [q, 1, o]
        out[there] = basis.right_back((queries[there] * self.inside[1])[None])[0] / self.columns
        return out

    def turns_factors(self, q: int, factors: float, gain: float = 1.0) -> bool:
        """Whether it is less work to turn so many factors into the eigenbasis than q whole queries out of it.

        Turned, they are floats: products with them as they are may be faster by `gain`.
        """
        turned = self.basis is not None and self.basis.output_basis is not None
        g, o, d = self.shape
        slower = q * factors * o * d * (1 - 1 / gain)
        return turned and g == 1 and factors * (o * o + d * d) + slower < q * o * d * (o + d)

    def turn(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Stored vectors [F, o] and [F, d] of one group, as weighed queries meet them in the eigenbasis."""
        assert self.basis is not None
        each = Dense((right / self.columns[0])[None, :, None], (left / self.rows[0])[None, :, None])
        turned = self.basis.rotate(each)
        assert isinstance(turned, Dense)
        rows, columns = self.inside
        return turned.output_grads[0, :, 0] * rows[0], turned.inputs[0, :, 0] * columns[0]
