"""The singular vectors of a batch's gradients in the metric, without the matrices where their positions are few.

A gradient of t positions is Uᵀ A with U [t, o], A [t, d]. With Cholesky's A Aᵀ = L Lᵀ the squares of its singular
values are the eigenvalues of Lᵀ (U Uᵀ) L, t × t, with eigenvectors P; then Uᵀ L P times Pᵀ L⁻¹ A is the gradient,
and its largest columns are the best approximation of that rank. From t = min(o, d) on the matrix is formed, and its
smaller Gram matrix is decomposed. docs/math.md (26).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastif.index.metric import Metric
from fastif.model.gradients import Dense, Formed, Gradients, OneHot
from fastif.model.sliced_gradients import Sliced

_NEGLIGIBLE = 1e-14  # of the largest σ²: below float32's rounding of the gradient itself
_ZERO = 1e-90  # σ² of what float32 does not hold
_TINY = 1e-300  # on the diagonal of a Gram matrix of zeros, which has no factor
_ROUNDING = 1e-6  # of the trace of a Gram matrix: more than what sums in float32 are away by
_ENTRIES = 1 << 21  # of matrices that are decomposed at a time


class Truncated(NamedTuple):
    """What is kept of some gradients: factors in the order of the examples, of their groups, and of their σ."""

    ranks: Tensor  # int32 [n, g]
    left: Tensor  # [F, o]; of a table int64 [F], the rows
    right: Tensor  # [F, d]; σ is in their product


def is_table(gradients: Gradients) -> bool:
    """Whether the block's gradients are rows of a table, which are kept as rows."""
    return isinstance(gradients.rows(0, 1), OneHot)


def count_numbers(gradients: Gradients, shape: tuple[int, int, int]) -> int:
    """The numbers of an example's gradient that may differ from zero."""
    g, o, d = shape
    return min(o, gradients.positions) * d if is_table(gradients) else g * o * d


def vector_numbers(shape: tuple[int, int, int], table: bool) -> int:
    """The numbers of one factor."""
    return shape[2] + 1 if table else shape[1] + shape[2]


def squares_of(gradients: Gradients, metric: Metric, exact: bool = False) -> Tensor:
    """σ² of every example's factors times the metric's `worth`, [n, k]."""
    found = [_decompose(part, metric, exact, None)[0].flatten(1) for part in _parts(gradients, metric)]
    most = max(part.shape[1] for part in found)
    return metric.worth * torch.cat([torch.nn.functional.pad(part, (0, most - part.shape[1])) for part in found])


def truncate(gradients: Gradients, metric: Metric, threshold: float) -> Truncated:
    """The factors with σ²/(numbers of a factor), times the metric's `worth`, above the threshold.

    With the threshold 0 all of them are kept, and sums are float64.
    """
    least = threshold * vector_numbers(metric.shape, is_table(gradients)) / metric.worth
    ranks, left, right = [], [], []
    for part in _parts(gradients, metric):
        squares, lefts, rights = _decompose(part, metric, threshold == 0, least)
        keep = _kept(squares, least)
        ranks.append(keep.sum(2, dtype=torch.int32))
        keep = keep[:, :, : rights.shape[2]]
        left.append(lefts[keep])
        right.append(rights[keep])
    return Truncated(torch.cat(ranks), torch.cat(left), torch.cat(right))


def _kept(squares: Tensor, least: float) -> Tensor:
    largest = squares.amax(2, keepdim=True) if squares.shape[2] else squares.sum(2, keepdim=True)
    return squares > (largest * _NEGLIGIBLE).clamp(min=max(least, _ZERO))


def _parts(gradients: Gradients, metric: Metric) -> Iterator[Dense | OneHot | Formed]:
    """A few examples at a time: what is decomposed at once stays small."""
    parts = (part for part, _ in gradients.parts()) if isinstance(gradients, Sliced) else (gradients,)
    g, o, d = metric.shape
    for part in parts:
        t = part.positions
        each = max(1, _ENTRIES // (g * (o * d if t >= min(o, d) else t * (o + d))))
        for begin in range(0, len(part), each):
            some = part.rows(begin, begin + each)
            assert isinstance(some, Dense | OneHot | Formed)
            yield some


def _decompose(
    part: Dense | OneHot | Formed, metric: Metric, exact: bool, least: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """σ² [n, g, k], largest first, and factors left [n, g, r, o], right [n, g, r, d] of at least all with σ² > least;
    with least=None, none."""
    x, y = metric.rows, metric.columns
    if isinstance(part, OneHot):
        return _decompose_table(part, x[0], y[0])
    if isinstance(part, Dense) and part.positions < min(metric.shape[1:]):
        u = (part.output_grads * x[:, None, None]).transpose(0, 1)  # [n, g, t, o]
        a = (part.inputs * y[:, None, None]).transpose(0, 1)
        if part.positions == 1:  # it is its own factor
            one, other = (torch.linalg.vector_norm(side, dim=3, dtype=torch.float64) for side in (u, a))
            return (one * other).square(), u, a
        if exact:
            u, a = u.double(), a.double()
        moment = (a @ a.mT).double()
        diagonal = moment.diagonal(dim1=-2, dim2=-1)  # more of it, where positions repeat one another
        rounding = _NEGLIGIBLE if a.dtype == torch.float64 else _ROUNDING
        diagonal += rounding * diagonal.sum(-1, keepdim=True) + _TINY
        lower = torch.linalg.cholesky(moment)
        squares, vectors = _eigh(lower.mT @ (u @ u.mT).double() @ lower, least is not None)
        few = _few(squares, vectors, least)
        left = (lower @ few).mT.to(u) @ u
        right = torch.linalg.solve_triangular(lower.mT, few, upper=True).mT.to(a) @ a
        return squares, left.to(x), right.to(x)
    matrices = part.formed() * x[:, :, None] * y[:, None]
    wide = matrices.shape[2] <= matrices.shape[3]
    sided = matrices if wide else matrices.mT
    summed = sided.double() if exact else sided
    squares, vectors = _eigh(summed @ summed.mT, least is not None)
    few = _few(squares, vectors, least).to(x)
    one, other = few.mT, few.mT @ sided  # vectors of length one, and what the matrix makes of them
    return (squares, one, other) if wide else (squares, other, one)


def _decompose_table(part: OneHot, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that are looked up are orthogonal as they are: a factor is one row's number and its gradient."""
    places, order = part.places.sort(dim=1, stable=True)
    inputs = part.inputs.gather(1, order[:, :, None].expand_as(part.inputs))
    begins = torch.ones_like(places, dtype=torch.bool)
    begins[:, 1:] = places[:, 1:] != places[:, :-1]
    number = begins.cumsum(1) - 1  # of the distinct rows of each example
    rights = inputs.new_zeros(part.inputs.shape).scatter_add_(1, number[:, :, None].expand_as(inputs), inputs)
    rows = torch.zeros_like(places).scatter_(1, number, places)
    rights = rights * x[rows][:, :, None] * y
    squares = rights.double().square().sum(2)
    squares, largest = squares.sort(dim=1, descending=True, stable=True)
    rights = rights.gather(1, largest[:, :, None].expand_as(rights))
    return squares[:, None], rows.gather(1, largest)[:, None], rights[:, None]


def _eigh(matrices: Tensor, vectors: bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues, float64, largest first, and their vectors as columns, or none of them."""
    if not vectors:
        return torch.linalg.eigvalsh(matrices).flip(-1).double(), matrices[..., :0]
    values, columns = torch.linalg.eigh(matrices)
    return values.flip(-1).double(), columns.flip(-1)


def _few(squares: Tensor, vectors: Tensor, least: float | None) -> Tensor:
    """As many of the vectors as the example with the most keeps."""
    most = 0 if least is None else int(_kept(squares, least).sum(2).max())
    return vectors[..., :most]
