"""Queries as products of few columns: most of what they are lies along few directions.

A query's gradient, weighed by the curvature, is o × d numbers, of which an index of n examples has n o d products to
form for each factor. Its singular values fall fast, so that it is U B with U [o, r], B [r, d] but for a rest of little
norm, and a factor then takes r (o + d) products. U grows by random directions of what is left (Halko, Martinsson,
Tropp, SIAM Review 53 (2011), algorithm 4.2), until the rest, which is formed, is small enough. docs/math.md (26).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

REST = 1e-3  # of a query's norm, that is left out at most: a tenth of what a factor loses in int8
_STEP = 16  # directions at a time: what the op takes at once
_EACH = 32  # examples for a direction, from which on finding it takes less than it saves
_LEAST = 1024  # examples: most queries of networks need two steps
_GAIN = 1.5  # by which products must be fewer


class Thin(NamedTuple):
    """Queries left right, [q, o, d], but for a rest of norm `REST` times theirs."""

    left: Tensor  # [q, o, r]
    right: Tensor  # [q, r, d]


Runs = list[Thin | Tensor]  # queries one after another, those of like width together


def thinned(queries: Tensor, n: int) -> Runs:
    """Queries [q, o, d] for n examples: thin where that saves enough, else as they are. What a query becomes depends on
    itself alone.

    Random directions are drawn on the CPU from a seed of their own: equal queries become equal ones.
    """
    q, o, d = queries.shape
    if q == 0:
        return []
    most = min(int(o * d / (_GAIN * (o + d))), n // _EACH) // _STEP * _STEP
    if n < _LEAST or most < _STEP:
        return [queries]
    pairs = [_pair(query, most) for query in queries]
    found: Runs = []
    begin = 0
    while begin < q:
        end = begin + 1
        while end < q and _width(pairs[end]) == _width(pairs[begin]):
            end += 1
        some = [pair for pair in pairs[begin:end] if pair is not None]
        if some:
            left, right = zip(*some, strict=True)
            found.append(Thin(torch.stack(left), torch.stack(right)))
        else:
            found.append(queries[begin:end])
        begin = end
    return found


def singly(part: Thin | Tensor) -> list[Thin | Tensor]:
    """The same queries, each a part of its own."""
    if isinstance(part, Thin):
        return [Thin(*pair) for pair in zip(part.left.split(1), part.right.split(1), strict=True)]
    return [*part.split(1)]


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def share_of(runs: Runs) -> float:
    """Products with such queries, of those with whole ones."""
    products = whole = 0
    for part in runs:
        left, right = part if isinstance(part, Thin) else (part, part)
        q, o, d = len(left), left.shape[1], right.shape[2]
        products += q * (left.shape[2] * (o + d) if isinstance(part, Thin) else o * d)
        whole += q * o * d
    return products / whole if whole else 1.0


def _width(pair: tuple[Tensor, Tensor] | None) -> int:
    return 0 if pair is None else pair[0].shape[1]


def _pair(query: Tensor, most: int) -> tuple[Tensor, Tensor] | None:
    """U and B of a query [o, d], None where more than `most` directions are needed."""
    rest = query.clone()
    norm = _norm(rest)
    draw = Generator().manual_seed(0)
    left, right = query.new_zeros((query.shape[0], 0)), query.new_zeros((0, query.shape[1]))
    while left.shape[1] < most:
        along = rest @ torch.randn(query.shape[1], _STEP, generator=draw).to(rest)
        along -= left @ (left.T @ along)  # what is left is orthogonal to U but for rounding
        basis = torch.linalg.qr(along).Q
        part = basis.T @ rest
        rest.addmm_(basis, part, alpha=-1)
        left, right = torch.cat([left, basis], 1), torch.cat([right, part])
        share = _norm(rest) / norm if norm > 0 else 0.0
        if share <= REST:
            return left, right
        if not math.isfinite(share):  # sums on the way overflowed: the query as it is may still do
            return None
        # Singular values fall by a power at first, and no faster later.
        if math.log(share) * most > math.log(REST) * left.shape[1]:
            return None
    return None
