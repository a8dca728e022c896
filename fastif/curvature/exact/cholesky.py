"""Cholesky factors that say why they failed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor

from fastif.curvature.damping import NotPositiveDefinite, check_damping
from fastif.curvature.exact import triangles

_ROWS = 512  # Rows that are looked through for NaN and Inf at a time: a mask of all takes a byte an entry.
F = TypeVar("F")


def factorize(matrix: Tensor, damping: float | Literal["auto"], name: str) -> tuple[Tensor, float]:
    """Lower Cholesky factor of matrix + damping·I in float64, and the damping used: see `diagnose`.

    Beside the matrix nothing but the factor is held.
    """
    return diagnose(matrix, damping, name, partial(_try, matrix), partial(_smallest_pivot, matrix))


def diagnose(
    matrix: Tensor,
    damping: float | Literal["auto"],
    name: str,
    attempt: Callable[[float, float], F | None],
    smallest_pivot: Callable[[float, float], float],
) -> tuple[F, float]:
    """What `attempt` makes of matrix + damping·I, and the damping used; or the diagnosis.

    A factor whose smallest pivot is within rounding of zero (P·eps times the largest diagonal entry, eps that of
    the matrix's own dtype) counts as a failure: its solves would be noise.

    Args:
        matrix: [P, P], symmetric; once an attempt was made, its lower triangle is read alone.
        damping: absolute λ >= 0 added to the diagonal, or "auto": the smallest power of ten that gives a factor.
        name: of the block, for the messages.
        attempt: of a damping and of what the smallest pivot must exceed: a factor, or None.
        smallest_pivot: of the same where no factor was made; raises where that was not for a pivot.

    Raises:
        NotPositiveDefinite: with the smallest pivot, the number of NaN, the smallest eigenvalue of an indefinite matrix
            as Lanczos' method estimates it, and the power of ten that would do.
        ValueError: negative damping.
    """
    check_damping(damping)
    size = matrix.shape[0]
    check_finite(matrix, name)
    floor = size * torch.finfo(matrix.dtype).eps * max(0.0, matrix.diagonal().max().item())
    if damping == "auto":
        damping = _sufficient_damping(attempt, floor)
    factor = attempt(damping, floor)
    if factor is None:
        pivot = smallest_pivot(damping, floor)
        indefinite = ""
        if pivot < -floor:
            lowest = eigenvalue_range(matrix)[0] + damping
            indefinite = f", its smallest eigenvalue about {lowest:.3g}, and Cholesky needs definiteness"
        raise NotPositiveDefinite(
            f"{name} [{size}, {size}] with damping {damping:g} is not positive definite: its smallest pivot is "
            f"{pivot:.3g} (0 NaN, needs more than {floor:.3g}){indefinite}; damping "
            f"{_sufficient_damping(attempt, floor):g} would do"
        )
    return factor, damping


def check_finite(matrix: Tensor, name: str) -> None:
    """Raises NotPositiveDefinite, with the number of NaN and Inf that a matrix holds."""
    if bool(matrix.sum().isfinite()):  # a finite sum needs no masks
        return
    nan, inf = (sum(int(f(rows).sum()) for rows in matrix.split(_ROWS)) for f in (torch.isnan, torch.isinf))
    if nan or inf:
        raise NotPositiveDefinite(
            f"{name} [{len(matrix)}, {len(matrix)}] holds {nan} NaN and {inf} Inf entries: no damping helps; look for "
            "NaN or overflow in features and logits"
        )


def extreme_eigenvalues(
    times: Callable[[Tensor], Tensor], size: int, device: torch.device, steps: int = 60
) -> tuple[float, float]:
    """Smallest and largest eigenvalue of a symmetric operator on vectors [size] float64, by `steps` of Lanczos' method.

    Ritz values: the smallest is never too small, the largest never too large; exact where steps >= size.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(size, generator=generator, dtype=torch.float64).to(device)
    v /= v.norm()
    basis, diagonal, beside = v[:, None], [], []
    while True:
        w = times(v)
        diagonal.append(float(v @ w))
        for _ in range(2):  # twice is enough to keep the basis orthogonal
            w = w - basis @ (basis.T @ w)
        norm = float(w.norm())
        if len(diagonal) == min(steps, size) or norm <= 1e-12 * max(map(abs, diagonal)):
            break
        beside.append(norm)
        v = w / norm
        basis = torch.cat([basis, v[:, None]], 1)
    off = torch.tensor(beside, dtype=torch.float64)
    ritz = torch.linalg.eigvalsh(torch.tensor(diagonal, dtype=torch.float64).diag() + off.diag(1) + off.diag(-1))
    return float(ritz[0]), float(ritz[-1])


def eigenvalue_range(matrix: Tensor) -> tuple[float, float]:
    """The same of a symmetric matrix [P, P], of which the lower triangle is read."""
    return extreme_eigenvalues(lambda v: triangles.times(matrix, v[:, None])[:, 0], len(matrix), matrix.device)


def _add_damping(matrix: Tensor, damping: float) -> Tensor:
    damped = matrix.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    damped.diagonal().add_(damping)
    return damped


def _try(matrix: Tensor, damping: float, floor: float) -> Tensor | None:
    factor = _add_damping(matrix, damping).mT  # columns first, as LAPACK has it: factored where it stands
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    good = info.item() == 0 and factor.diagonal().min().item() ** 2 > floor
    return factor if good else None


def _sufficient_damping(attempt: Callable[[float, float], object | None], floor: float) -> float:
    lowest = math.floor(math.log10(max(floor, 1e-12)))
    for exponent in range(lowest, 300):
        if attempt(10.0**exponent, floor) is not None:
            return 10.0**exponent
    raise NotPositiveDefinite("no damping up to 1e300 makes the block positive definite")  # entries near overflow


def _smallest_pivot(matrix: Tensor, damping: float, floor: float) -> float:
    del floor
    return triangles.smallest_pivot(_add_damping(matrix, damping))
