"""Greedy k-center (farthest-first traversal)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastif.ops import _checks as check
from fastif.ops._library import plain


class FarthestFirst(NamedTuple):
    indices: Tensor  # int64 [k]: the picks, in order, all distinct
    sq_radii: Tensor  # float64 [k]: squared covering radius after each pick
    sq_dists: Tensor  # float64 [n]: squared distance of each point to its nearest pick
    nearest: Tensor  # int64 [n]: position in 0..k-1 of that pick, the earliest on ties


def farthest_first(points: Tensor, k: int, start: int = 0) -> FarthestFirst:
    """Picks k points, each the one farthest (Euclidean) from all picks before it, lowest index on ties.

    Distances are formed in float64 by direct differences, in one fixed order of summation: the result has the same bits
    on every device and with any number of threads. The picks cover the points within twice the smallest radius that any
    k centres could reach (Gonzalez 1985). docs/math.md (7).

    On the CPU, all but small problems run lazily: points that cannot be next are not compared with a pick, and a
    certified filter settles nearly all comparisons that remain. It holds a code of each row: a quarter of float32
    points, or as much as they where the processor has no AVX512-VNNI. The environment variable FASTIF_KCENTER, plain
    or lazy, forces one kernel; the result is the same.

    Not differentiable.

    Args:
        points: [n, d] float32 or float64, finite; float64 entries at most 1e150 in size.
        k: number of picks, 1 to n. Where distinct points run out, the remaining picks have distance 0 and the lowest
            free indices.
        start: index of the first pick.

    Raises:
        ValueError: wrong shape, k or start out of range, NaN or Inf (with the row's index).
        TypeError: points of another dtype.

    >>> points = torch.tensor([[0.0], [1.0], [5.0], [9.0]])
    >>> farthest_first(points, k=3).indices.tolist()
    [0, 3, 2]
    """
    return FarthestFirst(*torch.ops.fastif.farthest_first(points.detach(), k, torch.full((1,), start)))


@torch.library.register_fake("fastif::farthest_first")
def _fake(points, k, start, picks=None, mask=None, until_radius=None):
    n = points.shape[0]
    torch._check_value(1 <= k <= n, lambda: f"farthest_first: k must be in [1, n={n}], got k={k}")
    return (
        points.new_empty((k,), dtype=torch.int64),
        points.new_empty((k,), dtype=torch.float64),
        points.new_empty((n,), dtype=torch.float64),
        points.new_empty((n,), dtype=torch.int64),
    )


@plain("farthest_first")
def _plain(points, k, start=0):
    op = "farthest_first"
    check.rank(op, "points", "[n, d]", points, 2)
    check.floating(op, "points", points)
    n = points.shape[0]
    check.require(
        points.numel() > 0, f"{op}: points must have at least one row and one column, got shape {list(points.shape)}"
    )
    check.require(1 <= k <= n, f"{op}: k must be in [1, n={n}], got k={k}")
    check.require(0 <= start < n, f"{op}: start must be in [0, n={n}), got start={start}")
    check.finite_rows(op, "points", points)
    if points.dtype == torch.float64:
        largest = points.abs().max().item()
        check.require(largest <= 1e150, f"{op}: |points| must be at most 1e150 (squares overflow), got {largest:g}")

    pad = -points.shape[1] % 32
    x = torch.nn.functional.pad(points.double(), (0, pad)).unflatten(1, (-1, 32))  # [n, chunks, lanes]
    sq_dists = points.new_full((n,), float("inf"), dtype=torch.float64)
    nearest = points.new_zeros((n,), dtype=torch.int64)
    picked = points.new_zeros((n,), dtype=torch.bool)
    indices = points.new_empty((k,), dtype=torch.int64)
    sq_radii = points.new_zeros((k,), dtype=torch.float64)
    current = start
    for t in range(k):
        indices[t] = current
        picked[current] = True
        lanes = torch.zeros_like(x[:, 0])
        for chunk in range(x.shape[1]):  # the order of summation of csrc/farthest_first/farthest_first.h
            lanes += (x[:, chunk] - x[current, chunk]).square()
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        closer = lanes[:, 0] < sq_dists
        nearest[closer] = t
        sq_dists = torch.where(closer, lanes[:, 0], sq_dists)
        free = sq_dists.masked_fill(picked, -1.0)
        current = int((free == free.max()).nonzero()[0])
        sq_radii[t] = free.max().clamp(min=0)
    return indices, sq_radii, sq_dists, nearest
