"""Eigenpairs from the space that products of a symmetric matrix span, and the arithmetic of rows of vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]  # [m, P] → [m, P], symmetric
_ROUNDING = 8.0  # A direction of which less is left than so many units of rounding counts as spanned already.


class Krylov(NamedTuple):
    """Ritz pairs, largest magnitude first."""

    values: Tensor  # float64 [k]
    vectors: Tensor  # [min(k, wanted), P]: of the first ones
    residuals: Tensor  # float64 [k], |A v − θ v|
    lowest: float  # of all values
    invariant: bool  # products do not leave the space: the values are eigenvalues, beside them it knows none


def krylov(product: Product, start: Tensor, steps: int, wanted: int, tolerance: float) -> Krylov:
    """Rayleigh–Ritz on span(S, A S, A² S, …) for S = start [b, P], by block Lanczos, kept orthogonal throughout.

    Ends after `steps` products, when the `wanted` largest pairs have residuals within tolerance of the largest value,
    or when the space is invariant.
    """
    basis = _orthonormal(start, start[:0])
    rows = basis  # those that were added last
    inner = torch.zeros(0, 0, dtype=torch.float64)  # Qᵀ A Q
    values = shares = residuals = torch.zeros(0, dtype=torch.float64)
    for _ in range(steps):
        image = product(rows)
        norm = float(image.double().norm(dim=1).max()) if len(image) else 0.0
        coupling = _dots(basis, image).cpu()  # [k, b]
        k = len(basis)
        grown = torch.zeros(k, k, dtype=torch.float64)
        grown[: len(inner), : len(inner)] = inner
        grown[:, k - len(rows) :] = coupling
        grown[k - len(rows) :, :] = coupling.T
        inner = grown
        values, shares = torch.linalg.eigh(inner)
        order = values.abs().argsort(descending=True)
        values, shares = values[order], shares[:, order]
        rest = image - (coupling.T.to(image) @ basis)
        last = len(rows)
        rows = _orthonormal(rest, basis, norm)
        # A Q = Q inner + rest: a pair's residual is what `rest` adds to it.
        outside = rest - (rest @ basis.T) @ basis
        residuals = (shares[k - last :].T.to(outside) @ outside).double().norm(dim=1).cpu()
        bound = tolerance * float(values.abs().max())
        if len(rows) == 0 or (k > wanted and bool((residuals[:wanted] <= bound).all())):
            break
        basis = torch.cat([basis, rows])
    vectors = shares[:, :wanted].T.to(basis) @ basis[: len(shares)]
    return Krylov(values, vectors, residuals, float(values.min()), len(rows) == 0)


def _dots(basis: Tensor, image: Tensor) -> Tensor:
    """Dot products [k, b] in float64, without a copy of the whole basis."""
    columns = image.double().T
    return torch.cat([rows.double() @ columns for rows in basis.split(max(1, len(image)))])


def _orthonormal(rows: Tensor, basis: Tensor, scale: float = 1.0) -> Tensor:
    """An orthonormal basis of what `rows` add to the span of an orthonormal `basis`, those within rounding left out."""
    floor = _ROUNDING * math.sqrt(rows.shape[1]) * torch.finfo(rows.dtype).eps * scale
    kept = rows[:0]
    for row in rows:
        for _ in range(2):  # once is not enough for float arithmetic, twice is
            for others in (basis, kept):
                row = row - (others @ row) @ others
        norm = float(row.double().norm())
        if norm > floor:
            row = row / norm
            for others in (basis, kept):
                row = row - (others @ row) @ others
            kept = torch.cat([kept, (row / row.double().norm().to(row))[None]])
    return kept


def dots(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of rows, summed in float64, [m]."""
    return (a.double() * b.double()).sum(1)


def norms_of(rows: Tensor) -> Tensor:
    """float64 [m]; neither overflows nor underflows."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)


def normalise(rows: Tensor, norms: Tensor) -> Tensor:
    """Divides rows by their norms; rows that are 0 stay. Raises ValueError for NaN and Inf."""
    if not bool(norms.isfinite().all()):
        raise ValueError(f"solve: right-hand side {int((~norms.isfinite()).nonzero()[0])} holds NaN or Inf")
    return (rows / torch.where(norms > 0, norms, 1.0)[:, None]).to(rows)
