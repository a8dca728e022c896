"""The query side of pairwise scores: what has to be kept of queries to be multiplied with training gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastif.gradients import Dense, Gradients, Sliced

_ENTRIES = 1 << 24  # of the largest intermediate of LowRank
_MARGIN = 0.5  # of the tolerance that the sample's error may take
_SAMPLE = 64  # queries and training examples on which an approximation measures its error


class Directions(Protocol):
    """(G + λI)⁻¹ g_q for a number of queries q, in some form."""

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def dots(self, train: Gradients) -> Tensor:
        """g_qᵀ (G + λI)⁻¹ g_t, [q, n]."""
        ...


@dataclass(frozen=True)
class Explicit:
    """The matrices themselves, or what they are in another basis, into which training gradients have to be turned."""

    matrices: Tensor  # [q, g, o, d]
    rotate: Callable[[Gradients], Gradients] | None = None

    def __len__(self) -> int:
        return len(self.matrices)

    @property
    def nbytes(self) -> int:
        return self.matrices.nbytes

    def dots(self, train: Gradients) -> Tensor:
        return (train if self.rotate is None else self.rotate(train)).dots(self.matrices)


@dataclass(frozen=True)
class LowRank:
    """The matrices' best approximations of rank r: r (o + d) numbers in the place of o·d."""

    left: Tensor  # [q, g, o, r]
    right: Tensor  # [q, g, r, d]
    error: float  # largest over the queries of |V − left right| / |V|, Frobenius

    @staticmethod
    def of(matrices: Tensor, rank: int) -> LowRank:
        u, s, v = torch.linalg.svd(matrices, full_matrices=False)
        kept, whole = s[..., :rank].square().sum((1, 2)), s.square().sum((1, 2))
        lost = (1 - kept / whole.clamp(min=torch.finfo(s.dtype).tiny)).clamp(min=0).sqrt()
        return LowRank(u[..., :rank] * s[..., None, :rank], v[..., :rank, :], float(lost.max()))

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
        each = max(1, _ENTRIES // (train.inputs[0, :, :, 0].numel() * len(train.inputs) * r))
        for begin in range(0, q, each):  # [g, n, t, queries, r] at a time
            left, right = self.left[begin : begin + each], self.right[begin : begin + each]
            u = torch.einsum("gnto,qgor->gntqr", train.output_grads, left)
            a = torch.einsum("gntd,qgrd->gntqr", train.inputs, right)
            out.append((u * a).sum((0, 2, 4)).T)
        return torch.cat(out)


@dataclass(frozen=True)
class Separable:
    """For rank-one gradients u aᵀ in the eigenbasis: the inverse eigenvalues as a sum of r products x yᵀ.

    Then a score is Σ_r (Σ_o u_q u_t x_r)(Σ_d a_q a_t y_r): r (o + d) operations per pair in the place of o·d, and
    nothing of size o·d is kept of a query. docs/math.md (16).
    """

    inputs: Tensor  # [q, d], of the queries, rotated
    output_grads: Tensor  # [q, o]
    x: Tensor  # [r, o]
    y: Tensor  # [r, d]
    rotate: Callable[[Gradients], Gradients]

    @property
    def rank(self) -> int:
        return len(self.x)

    @staticmethod
    def suits(gradients: Gradients) -> bool:
        return isinstance(gradients, Dense) and gradients.positions == 1 and len(gradients.inputs) == 1

    @staticmethod
    def of(
        query: Gradients,
        inverse: Tensor,
        eigenvalues: Tensor,
        tolerance: float,
        rotate: Callable[[Gradients], Gradients],
    ) -> Separable | None:
        """The cheapest form within the tolerance, or None where the exact one is as cheap.

        The singular vectors are those of `inverse` [1, o, d] weighted by the root mean curvature of its rows and
        columns, which is how much gradient they carry. The error is that of the scores between different queries,
        relative in the Frobenius norm, and must keep a margin from the tolerance, since training examples are others.
        """
        assert isinstance(query, Dense)
        a, u = query.inputs[0, :, 0], query.output_grads[0, :, 0]
        o, d = inverse.shape[1:]
        weights = eigenvalues[0].double()
        rows, columns = weights.sum(1).sqrt(), weights.sum(0).sqrt()
        rows = rows.clamp(min=1e-6 * float(rows.max()) + 1e-300)
        columns = columns.clamp(min=1e-6 * float(columns.max()) + 1e-300)
        left, s, right = torch.linalg.svd(rows[:, None] * inverse[0].double() * columns, full_matrices=False)
        x = (left * s.sqrt()).T / rows  # [min(o, d), o]
        y = s.sqrt()[:, None] * right / columns
        x, y = x.to(inverse), y.to(inverse)
        sample = slice(0, _SAMPLE)
        exact = (u[sample, None] * u[None, sample]) @ inverse[0] * (a[sample, None] * a[None, sample])
        exact = exact.sum(-1).fill_diagonal_(0)
        whole = float(exact.norm())

        def suffices(rank: int) -> bool:
            made = Separable(a, u, x[:rank], y[:rank], rotate)
            got = made._pairs(a[sample], u[sample], a[sample], u[sample]).fill_diagonal_(0)
            return float((got - exact).norm()) <= _MARGIN * tolerance * whole

        enough, most = 2, o * d // (o + d)  # from this rank on it costs as much as the exact form
        while enough < most and not suffices(enough):
            enough *= 2
        if enough >= most:
            return None
        low = enough // 2
        while enough - low > 1:  # errors fall with the rank
            middle = (low + enough) // 2
            low, enough = (low, middle) if suffices(middle) else (middle, enough)
        return Separable(a, u, x[:enough].contiguous(), y[:enough].contiguous(), rotate)

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def nbytes(self) -> int:
        return self.inputs.nbytes + self.output_grads.nbytes

    def dots(self, train: Gradients) -> Tensor:
        rotated = self.rotate(train)
        assert isinstance(rotated, Dense)
        return self._pairs(self.inputs, self.output_grads, rotated.inputs[0, :, 0], rotated.output_grads[0, :, 0])

    def _pairs(self, a_query: Tensor, u_query: Tensor, a: Tensor, u: Tensor) -> Tensor:
        total = a.new_zeros((len(a_query), len(a)))
        for x, y in zip(self.x, self.y, strict=True):
            total.addcmul_((u_query * x) @ u.T, (a_query * y) @ a.T)
        return total
