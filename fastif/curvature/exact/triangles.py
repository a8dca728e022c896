"""One square that holds two matrices: a symmetric one, and above its diagonal the factor of what damping makes of it.

A square [P, P] holds a symmetric G in its lower triangle, the diagonal included, which nothing here ever writes. With
positive pivots D, kept aside, what stands above the diagonal is the unit triangular U of G + λI = Uᵀ D U: a Cholesky
factor without its square roots, so that both matrices have their diagonal. docs/math.md (17).
"""

from __future__ import annotations

import torch
from torch import Tensor

_AIM = 1e-12  # A solve whose relative residual is this small is refined no further: float64 resolves little more.


def panel_of(size: int) -> int:
    """Rows that are factored at a time: few enough that what stands beside a large square is a fortieth of it."""
    return max(64, min(size // 48, 512))


def scratch_bytes(size: int, item: int) -> int:
    """The most bytes that factoring a square of `item` bytes an entry takes beside it; a right-hand side takes less."""
    panel = min(panel_of(size), size)
    return panel * size * item + 4 * 8 * panel**2 + 2 * 8 * size


def factorize(square: Tensor, damping: float, panel: int | None = None) -> Tensor:
    """Writes U above the diagonal; returns the pivots D, float64 [P], or only those up to one that is not positive.

    A panel of rows of U follows from the rows above it by one matrix product, and from its own tile on the diagonal,
    which is factored in float64. What stood above the diagonal is not read.
    """
    size = len(square)
    panel = panel_of(size) if panel is None else panel
    pivots = square.new_empty(size, dtype=torch.float64)
    for k in range(0, size, panel):
        failed = _factorize_rows(square, damping, pivots, slice(k, min(k + panel, size)))
        if failed is not None:
            return torch.cat([pivots[:k], pivots.new_tensor([min(failed, 0.0)])])  # rounding may have left some
    return pivots


def _factorize_rows(square: Tensor, damping: float, pivots: Tensor, rows: slice) -> float | None:
    """Writes U and D of the rows that come next; returns a pivot that is not positive where that ends it."""
    k, m = rows.start, rows.stop
    tile, columns = square[k:m, k:m].to(torch.float64, copy=True), square[m:, k:m].clone()  # of G, which is symmetric
    tile.diagonal().add_(damping)
    if k:
        above = square[:k, k:m] * pivots[:k, None].to(square)
        tile -= square[:k, k:m].mT @ above
        columns.addmm_(square[:k, m:].mT, above, alpha=-1)
        del above
    lower, info = torch.linalg.cholesky_ex(tile)
    if info.item():
        return smallest_pivot(tile)
    roots = lower.diagonal().clone()
    pivots[k:m] = roots.square()
    unit = lower.div_(roots).to(square)
    torch.linalg.solve_triangular(unit.mT, columns, upper=True, left=False, unitriangular=True, out=columns)
    square[k:m, m:] = columns.div_(pivots[k:m].to(square)).mT
    _put_above(square[k:m, k:m], unit)
    return None


def solve(square: Tensor, pivots: Tensor, damping: float, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """(G + λI)⁻¹ rhs for rhs float64 [P, m], and the relative residual of each column.

    Iterative refinement: solves in the square's dtype for what residuals in float64 leave, each time for columns of
    length one, until all are below 1e-12 or none is halved any more. A step that makes a column worse is not taken.
    """
    found, residual = torch.zeros_like(rhs), rhs.clone()
    norms = rhs.norm(dim=0)
    left, divisors = norms, pivots[:, None].to(square)
    while True:
        scale = torch.where(left > 0, left, 1)
        step = (residual / scale).to(square)
        step = torch.linalg.solve_triangular(square.mT, step, upper=False, unitriangular=True).div_(divisors)
        step = torch.linalg.solve_triangular(square, step, upper=True, unitriangular=True)
        tried = step.double().mul_(scale).add_(found)
        after = times(square, tried).add_(tried, alpha=damping).neg_().add_(rhs)
        now = after.norm(dim=0)
        better = now < left
        found, residual = torch.where(better, tried, found), torch.where(better, after, residual)
        going = (now < left / 2) & (now > _AIM * norms)
        left = torch.where(better, now, left)
        if not bool(going.any()):
            return found, left / torch.where(norms > 0, norms, 1)


def times(square: Tensor, x: Tensor) -> Tensor:
    """G x for x [P, m] in the dtype of x, from the lower triangle, a few rows at a time; quickest by columns of x."""
    product, panel = torch.zeros_like(x), max(panel_of(len(square)) // 2, x.shape[1])
    for k in range(0, len(square), panel):
        m = min(k + panel, len(square))
        rows = square[k:m, :m].to(x.dtype, copy=True).tril_(k)
        product[k:m].addmm_(rows, x[:m])
        rows.diagonal(k).zero_()
        product[:m].addmm_(rows.mT, x[k:m])
        del rows  # before the next ones come
    return product


def restore(square: Tensor) -> None:
    """Puts G in the place of the factor: the lower triangle is mirrored, to the bit."""
    size, panel = len(square), panel_of(len(square))
    for k in range(0, size, panel):
        m = min(k + panel, size)
        square[k:m, m:] = square[m:, k:m].mT
        _put_above(square[k:m, k:m], square[k:m, k:m].clone())


def smallest_pivot(damped: Tensor) -> float:
    """The smallest pivot of a matrix's Cholesky factor; where it has none, the pivot at which it ends, not positive."""
    factor, info = torch.linalg.cholesky_ex(damped)
    if info.item() == 0:
        return factor.diagonal().min().item() ** 2
    j = len(damped)
    while info.item() and j:  # the columns before the one that failed; summed in another order, they may fail too
        j = int(info.item()) - 1
        factor, info = torch.linalg.cholesky_ex(damped[:j, :j])
    if j == 0:
        return damped[0, 0].item()
    # The pivot of column j is what the columns before it leave of the diagonal.
    column = torch.linalg.solve_triangular(factor, damped[:j, j : j + 1], upper=False)
    return (damped[j, j] - column.square().sum()).item()


def _put_above(tile: Tensor, lower: Tensor) -> None:
    """Mirrors what stands below the diagonal of `lower` to above that of `tile`."""
    above = torch.ones_like(tile, dtype=torch.bool).triu_(1)
    tile.copy_(torch.where(above, lower.mT, tile))
