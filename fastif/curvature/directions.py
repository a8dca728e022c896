"""The query side of pairwise scores: what has to be kept of queries to be multiplied with training gradients."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastif.curvature import limits
from fastif.model.gradients import Dense, Formed, Gradients
from fastif.model.sliced_gradients import Sliced, whole
from fastif.renamed import warn_renamed


class Directions(Protocol):
    """(G + λI)⁻¹ g_q for a number of queries q, in some form."""

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def error(self) -> float:
        """Relative, of the largest of them; 0 where they are kept as they are."""
        ...

    def dots(self, train: Gradients) -> Tensor:
        """g_qᵀ (G + λI)⁻¹ g_t, [q, n]."""
        ...


@dataclass(frozen=True)
class Explicit:
    """The matrices themselves."""

    matrices: Tensor  # [q, g, o, d]

    def __len__(self) -> int:
        return len(self.matrices)

    @property
    def nbytes(self) -> int:
        return self.matrices.nbytes

    @property
    def error(self) -> float:
        return 0.0

    def dots(self, train: Gradients) -> Tensor:
        return train.dots(self.matrices)


@dataclass(frozen=True)
class LowRank:
    """The matrices' best approximations of rank r: r (o + d) numbers in the place of o·d."""

    left: Tensor  # [q, g, o, r]
    right: Tensor  # [q, g, r, d]
    error: float  # largest over the queries of |V − left right| / |V|, Frobenius

    @staticmethod
    def approximate(matrices: Tensor, rank: int) -> LowRank:
        """Keeps the `rank` largest singular vectors of matrices [q, g, o, d]."""
        u, s, v = torch.linalg.svd(matrices, full_matrices=False)
        left_out, total = s[..., rank:].square().sum((1, 2)), s.square().sum((1, 2))
        lost = (left_out / total.clamp(min=torch.finfo(s.dtype).tiny)).sqrt()  # 0 for a gradient that is zero
        # Views would hold on to all singular vectors, and ranks, which send contiguous ones, would round otherwise.
        left = (u[..., :rank] * s[..., None, :rank]).contiguous()
        right = v[..., :rank, :].clone(memory_format=torch.contiguous_format)
        return LowRank(left, right, float(lost.max()))

    @staticmethod
    def of(matrices: Tensor, rank: int) -> LowRank:
        """The old name of `approximate`."""
        warn_renamed("LowRank.of", "LowRank.approximate")
        return LowRank.approximate(matrices, rank)

    def __len__(self) -> int:
        return len(self.left)

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes

    def dots(self, train: Gradients) -> Tensor:
        if isinstance(train, Sliced):
            return torch.cat([self.dots(part) for part, _ in train.parts()], 1)
        if not isinstance(train, Dense):
            return train.dots(self.left @ self.right)
        q, _, _, r = self.left.shape
        out = []
        each = max(1, limits.LOW_RANK_ENTRIES // (train.inputs[0, :, :, 0].numel() * len(train.inputs) * r))
        for begin in range(0, q, each):  # [g, n, t, queries, r] at a time
            left, right = self.left[begin : begin + each], self.right[begin : begin + each]
            u = torch.einsum("gnto,qgor->gntqr", train.output_grads, left)
            a = torch.einsum("gntd,qgrd->gntqr", train.inputs, right)
            out.append((u * a).sum((0, 2, 4)).T)
        return torch.cat(out)


class Basis(Protocol):
    """An estimator that is diagonal in a basis: what the forms below need of it."""

    separable_rank: int | None

    @property
    def inverse_eigenvalues(self) -> Tensor:
        """[1, o, d]."""
        ...

    def rotate(self, gradients: Gradients) -> Gradients: ...

    def unrotate(self, matrices: Tensor) -> Tensor: ...


class QueryFactors:
    """Gradients Σ_t u_t a_tᵀ in the eigenbasis, t (o + d) numbers of each: matrices are made of them when needed.

    Training gradients are turned into the eigenbasis, too; or, where that is more work than it saves, the queries'
    matrices are turned back once and kept: see `settle`.
    """

    def __init__(self, query: Gradients, basis: Basis):
        self._query, self._basis = whole(query), basis

    @staticmethod
    def size(gradients: Gradients) -> int | None:
        """The numbers that each of the gradients takes; None where it had better be a matrix.

        Factors suit a block of one matrix [o, d] with one position, or with so few that they are half of it at most.
        """
        one = gradients.rows(0, 1)
        if not isinstance(one, Dense) or len(one.inputs) > 1:
            return None
        (t, d), o = one.inputs.shape[2:], one.output_grads.shape[3]
        return t * (o + d) if t == 1 or 2 * t * (o + d) <= o * d else None

    def __len__(self) -> int:
        return len(self._query)

    @property
    def nbytes(self) -> int:
        return self._query.inputs.nbytes + self._query.output_grads.nbytes

    @property
    def error(self) -> float:
        return 0.0

    @staticmethod
    def join(parts: Sequence[QueryFactors]) -> QueryFactors:
        """The queries of several, of one block, one after another."""
        made = copy.copy(parts[0])
        made._query = Dense.cat([part._query for part in parts])
        return made

    def settle(self, room: int) -> Directions:
        """The form in which training gradients meet them; matrices may take `room` bytes.

        With several positions matrices are faster by far, where there is room for them. With one, turning a training
        gradient in its factors takes d² + o² operations, and q·o·d its products with q queries: only if these are
        fewer, the queries are turned back, and take less room than the bases.
        """
        o, d = self._basis.inverse_eigenvalues.shape[1:]
        size = len(self) * o * d
        fits = d * d + o * o > size if self._query.positions == 1 else size * self._query.inputs.itemsize <= room
        if not fits:
            return self
        matrices, inverse = self._query.inputs.new_empty((len(self), 1, o, d)), self._basis.inverse_eigenvalues
        each = max(1, limits.QUERY_MATRIX_ENTRIES // (o * d))
        for i in range(0, len(self), each):
            matrices[i : i + each] = self._basis.unrotate(_make_matrices(self._query, i, i + each, inverse))
        return Explicit(matrices)

    def dots(self, train: Gradients) -> Tensor:
        return self._exact(self._basis.rotate(train))

    def _exact(self, train: Gradients) -> Tensor:
        """Products with training gradients that are in the eigenbasis."""
        if self._query.positions == 1:
            return self._with(train)
        each = max(1, limits.TRAIN_MATRIX_ENTRIES // self._basis.inverse_eigenvalues.numel())
        parts = (Formed(train.rows(i, i + each).formed()) for i in range(0, len(train), each))
        return torch.cat([self._with(part) for part in parts], 1)

    def _with(self, train: Gradients) -> Tensor:
        inverse = self._basis.inverse_eigenvalues
        each = max(1, limits.QUERY_MATRIX_ENTRIES // inverse.numel())
        matrices = (_make_matrices(self._query, i, i + each, inverse) for i in range(0, len(self), each))
        return torch.cat([train.dots(some) for some in matrices])


class Separable(QueryFactors):
    """The inverse eigenvalues as a sum of r products x yᵀ.

    Then a score is Σ_r (Σ_o u_q u_t x_r)(Σ_d a_q a_t y_r): r (o + d) operations per pair in the place of o·d. The rank
    is the smallest that keeps the tolerance on a sample of the pairs that are asked for first; where the exact form is
    as cheap, it is used. docs/math.md (16).
    """

    def __init__(self, query: Gradients, basis: Basis, products: tuple[Tensor, Tensor], tolerance: float):
        super().__init__(query, basis)
        self._products, self._tolerance = products, tolerance
        self._rank: int | None = None  # 0: exact

    def settle(self, room: int) -> Directions:
        del room
        return self

    def dots(self, train: Gradients) -> Tensor:
        rotated = self._basis.rotate(train)
        if train.positions > 1:
            return self._exact(rotated)
        if self._rank is None:
            self._rank = self._sufficient(whole(rotated.rows(0, limits.ERROR_SAMPLE)))
            self._basis.separable_rank = self._rank or None
        if self._rank == 0:
            return self._exact(rotated)
        parts = (part for part, _ in rotated.parts()) if isinstance(rotated, Sliced) else (rotated,)
        return torch.cat([self._pairs(self._query, part, self._rank) for part in parts], 1)

    def _sufficient(self, train: Dense) -> int:
        """The smallest rank within the tolerance, or 0 where the exact form is as cheap."""
        query, inverse = self._query.rows(0, limits.ERROR_SAMPLE), self._basis.inverse_eigenvalues
        exact = train.dots(_make_matrices(query, 0, len(query), inverse))
        allowed = self._tolerance * float(exact.norm())

        def suffices(rank: int) -> bool:
            return float((self._pairs(query, train, rank) - exact).norm()) <= allowed

        o, d = inverse.shape[1:]
        enough, most = 2, o * d // (o + d)  # From rank `most` on, the products cost as much as the exact form.
        while enough < most and not suffices(enough):
            enough *= 2
        if enough >= most:
            return 0
        low = enough // 2
        while enough - low > 1:  # errors fall with the rank
            middle = (low + enough) // 2
            low, enough = (low, middle) if suffices(middle) else (middle, enough)
        return enough

    def _pairs(self, query: Gradients, train: Gradients, rank: int) -> Tensor:
        (a_query, u_query), (a, u) = _factors_of(query), _factors_of(train)
        total = a.new_zeros((len(a_query), len(a)))
        for x, y in zip(self._products[0][:rank], self._products[1][:rank], strict=True):
            total.addcmul_((u_query * x) @ u.T, (a_query * y) @ a.T)
        return total


def products_of(inverse: Tensor, eigenvalues: Tensor) -> tuple[Tensor, Tensor]:
    """x [r, o] and y [r, d] with inverse ≈ Σ_r x_r y_rᵀ, best first, for inverse and eigenvalues [o, d].

    They are singular vectors after weighting rows and columns by the root of the curvature that runs along them: so
    much gradient they carry.
    """
    weights = eigenvalues.double()
    rows, columns = weights.sum(1).sqrt(), weights.sum(0).sqrt()
    rows = rows.clamp(min=1e-6 * float(rows.max()) + 1e-300)
    columns = columns.clamp(min=1e-6 * float(columns.max()) + 1e-300)
    left, s, right = torch.linalg.svd(rows[:, None] * inverse.double() * columns, full_matrices=False)
    x, y = (left * s.sqrt()).T / rows, s.sqrt()[:, None] * right / columns
    return x.to(inverse), y.to(inverse)


def _make_matrices(query: Dense, begin: int, end: int, inverse: Tensor) -> Tensor:
    """The matrices [q, 1, o, d] of some queries, times the inverse eigenvalues [1, o, d]."""
    if query.positions > 1:
        return query.rows(begin, end).formed().mul_(inverse)
    a, u = (factor[begin:end] for factor in _factors_of(query))
    return (u[:, None, :, None] * inverse).mul_(a[:, None, None, :])


def _factors_of(gradients: Gradients) -> tuple[Tensor, Tensor]:
    """Inputs [n, d] and output gradients [n, o] of gradients with one position."""
    assert isinstance(gradients, Dense)
    return gradients.inputs[0, :, 0], gradients.output_grads[0, :, 0]
