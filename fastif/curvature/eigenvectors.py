"""Eigenvectors of second moments, which are often of low rank, with whole rows of zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from fastif.curvature.damping import NotPositiveDefinite


def find_eigenvectors(moments: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues, float64 [g, d], and eigenvectors, columns [g, d, d], of moments [g, d, d] given by lower triangles.

    Rows and columns of zeros (pixels that are always black, units that are always off) are eigenvectors by themselves
    and left out of the problem: LAPACK takes the more time over them the more there are, and may not converge.
    """
    nonzero = [moment.diagonal().nonzero()[:, 0] for moment in moments]  # a moment's row is zero where its diagonal is
    if all(len(rows) == moments.shape[-1] for rows in nonzero):
        return _solve(moments, name)
    solved = [
        (i, rows, *_solve(moments[i, rows[:, None], rows][None], name)) for i, rows in enumerate(nonzero) if len(rows)
    ]
    values = torch.zeros(moments.shape[:-1], dtype=torch.float64, device=moments.device)
    vectors = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device).repeat(len(moments), 1, 1)
    for i, rows, some, basis in solved:
        values[i, rows] = some[0]
        vectors[i, rows[:, None], rows] = basis[0]
    return values, vectors


def _solve(moments: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """All eigenvectors in float64, found in the place of a copy: what LAPACK takes beside it is twice its size.

    The moments themselves are kept meanwhile, for another try where LAPACK gives up. LAPACK leaves eigenvectors column
    by column. They are returned row by row, as files hold them: the last bits of products depend on the layout, and a
    job that takes the curvature from its folder has to go on with the same.
    """
    try:
        matrix = torch.empty(moments.shape, dtype=torch.float64, device=moments.device).mT.copy_(moments)
        values = matrix.new_empty(moments.shape[:-1])
        torch.linalg.eigh(matrix, out=(values, matrix))
        if bool(values.isfinite().all()):
            return values, matrix.to(moments.dtype).contiguous()
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        pass
    return _solve_by_svd(moments, name)


def _solve_by_svd(moments: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The same by another algorithm: the left singular vectors of a matrix that is positive semi-definite."""
    try:
        lower = moments.double().tril()
        vectors, values, _ = torch.linalg.svd(lower + lower.tril(-1).mT)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise NotPositiveDefinite(
            f"the second moment of {name} has no eigenvectors that LAPACK finds: {error}"
        ) from error
    return values, vectors.to(moments.dtype).contiguous()
