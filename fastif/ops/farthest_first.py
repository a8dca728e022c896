"""Greedy k-center (farthest-first traversal)."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from fastif.ops import _checks as check
from fastif.ops._library import plain, poll, progress_bar


class FarthestFirst(NamedTuple):
    """The picks of a cloud of n points; of b clouds, each with an axis [b] before these."""

    indices: Tensor  # int64 [k]: the picks, in order, all distinct; -1 after the last pick
    sq_radii: Tensor  # float64 [k]: squared covering radius after each pick; after the last pick, the last radius
    sq_dists: Tensor  # float64 [n]: squared distance of each point to its nearest pick; 0 where masked out
    nearest: Tensor  # int64 [n]: position in 0..k-1 of that pick, the earliest on ties; -1 where masked out

    @property
    def counts(self) -> Tensor:
        """int64 [k]: how many points each pick is the nearest to, itself included: weights at no further pass.

        A duplicate of an earlier pick has 0.
        """
        cells = torch.zeros_like(self.indices)
        return cells.scatter_add_(-1, self.nearest.clamp(min=0), (self.nearest >= 0).long())


def farthest_first(
    points: Tensor,
    k: int,
    start: int | Tensor = 0,
    *,
    picks: Tensor | None = None,
    mask: Tensor | None = None,
    until_radius: float | None = None,
    progress: bool = False,
) -> FarthestFirst:
    """Picks k points, each the one farthest (Euclidean) from all picks before it, lowest index on ties.

    Distances are formed in float64 by direct differences, in one fixed order of summation: the result has the same bits
    on every device and with any number of threads. From one start, the picks cover the points within twice the smallest
    radius that any k centres could reach (Gonzalez 1985). docs/math.md (7).

    Large problems run lazily, on the CPU and on CUDA: points that cannot be next are not compared with a pick, and a
    certified filter settles nearly all comparisons that remain. It holds a code of each row: in int8, a quarter of
    float32 points, on CUDA and where the processor has AVX512-VNNI or AVX-VNNI, else in float32, as much as they. The
    environment variable FASTIF_KCENTER, plain or lazy, forces one kernel (on the CPU also lazy:FILTER, which CUDA takes
    as lazy); the result is the same. Ctrl-C ends a long run.

    Not differentiable.

    Args:
        points: [n, d], or [b, n, d] for b clouds, each on its own; float32, float64, or float16 and bfloat16, whose
            values are taken exactly (by way of a float32 copy). Finite; float64 entries at most 1e150 in size.
        k: number of picks (of each cloud), 1 to n, the given ones among them. Where distinct points run out, the
            remaining picks have distance 0 and the lowest free indices.
        start: index of the first pick (of every cloud), or the first picks, in order: int64 [s], [b, s] for b clouds,
            1 <= s <= k, distinct.
        picks: int64 [b], s to k: picks of each cloud, where not all get k.
        mask: bool [n] or [b, n], on the device of points: which rows are points, for clouds of different sizes. The
            other rows are not looked at and may hold anything; if they are not all at a cloud's end, the CPU kernels
            copy the cloud.
        until_radius: no picks after the starts once the covering radius is at most this; of one cloud, indices and
            sq_radii then have the length of the picks made, of many they are filled up to k.
        progress: shows a bar.

    Raises:
        ValueError: a shape, an index, a number or a radius that breaks these rules; NaN or Inf (with the row's index).
        TypeError: points, start, picks or mask of another dtype, or no tensors; k or until_radius that is no number.
        MemoryError: a result that cannot be held.

    >>> points = torch.tensor([[0.0], [1.0], [5.0], [9.0]])
    >>> farthest_first(points, k=3).indices.tolist()
    [0, 3, 2]
    >>> farthest_first(points, k=4, start=torch.tensor([1, 2]), until_radius=1.0).indices.tolist()
    [1, 2, 3]
    >>> farthest_first(points, k=2).counts.tolist()
    [2, 2]
    """
    op = "farthest_first"
    _check_points(op, points)
    lead, n = points.shape[:-2], points.shape[-2]
    k = check.integer(op, "k", k)
    if isinstance(start, Tensor):
        check.tensor(op, "start", start)
    else:
        start = check.integer(op, "start", start)
        if not -(2**63) <= start < 2**63:
            raise ValueError(f"{op}: start must be in [0, n={n}), got start={start}")
        start = torch.full((*lead, 1), start, device="cpu")
    if picks is not None:
        check.tensor(op, "picks", picks)
    if mask is not None:
        check.tensor(op, "mask", mask)
    until_radius = None if until_radius is None else check.real(op, "until_radius", until_radius)
    given = points.detach(), k, start, picks, mask, until_radius
    if not torch.compiler.is_compiling():  # there the fake kernel checks, which sees symbols and may ask what they are
        _check_rules(*given)
    check.require(
        until_radius is None or bool(lead) or not points.is_meta,
        f"{op}: points must hold values with until_radius, which tells how many picks are made, got meta",
    )
    total = (k * math.prod(lead) if picks is None else int(picks.sum())) if progress and not points.is_meta else 0
    with progress_bar("farthest_first", total, "pick") if progress else nullcontext():
        found = check.call(
            op, "sq_dists [b, n]", points.shape[:-1], torch.float64, torch.ops.fastif.farthest_first, *given
        )
    indices, sq_radii, sq_dists, nearest = found
    if until_radius is not None and not lead:
        made = int((indices >= 0).sum())
        indices, sq_radii = indices[:made], sq_radii[:made]
    return FarthestFirst(indices, sq_radii, sq_dists, nearest)


@torch.library.register_fake("fastif::farthest_first")
def _fake(points, k, start, picks=None, mask=None, until_radius=None):
    _check_rules(points, k, start, picks, mask, until_radius)
    *lead, n, _ = points.shape
    return (
        points.new_empty((*lead, k), dtype=torch.int64),
        points.new_empty((*lead, k), dtype=torch.float64),
        points.new_empty((*lead, n), dtype=torch.float64),
        points.new_empty((*lead, n), dtype=torch.int64),
    )


@plain("farthest_first")
def _plain(points, k, start, picks=None, mask=None, until_radius=None):
    _check_rules(points, k, start, picks, mask, until_radius)
    _check_values(points, k, start, picks, mask)
    until_sq_radius = -1.0 if until_radius is None else until_radius * until_radius
    lead, n = points.shape[:-2], points.shape[-2]
    clouds, start = points.reshape(-1, *points.shape[-2:]), start.to(points.device).reshape(math.prod(lead), -1)
    limits = [k] * len(clouds) if picks is None else picks.tolist()
    results = (
        points.new_full((len(clouds), k), -1, dtype=torch.int64),
        points.new_empty((len(clouds), k), dtype=torch.float64),
        points.new_zeros((len(clouds), n), dtype=torch.float64),
        points.new_full((len(clouds), n), -1, dtype=torch.int64),
    )
    done = 0
    for j, limit in enumerate(limits):
        rows = torch.arange(n, device=points.device) if mask is None else mask.reshape(-1, n)[j].nonzero().flatten()
        given = torch.searchsorted(rows, start[j]).tolist()
        indices, sq_radii, sq_dists, nearest = _traverse(
            clouds[j][rows], limit, given, until_sq_radius, done, sum(limits)
        )
        results[0][j, : len(indices)] = rows[indices]
        results[1][j] = sq_radii[-1]
        results[1][j, : len(indices)] = sq_radii
        results[2][j, rows] = sq_dists
        results[3][j, rows] = nearest
        done += limit
    return tuple(result.reshape(*lead, -1) for result in results)


def _traverse(points, limit, start, until_sq_radius, done, total):
    """One cloud, every row of which is a point."""
    pad = -points.shape[1] % 32
    x = torch.nn.functional.pad(points.double(), (0, pad)).unflatten(1, (-1, 32))  # [n, chunks, lanes]
    sq_dists = points.new_full((len(points),), float("inf"), dtype=torch.float64)
    nearest = points.new_zeros((len(points),), dtype=torch.int64)
    picked = points.new_zeros((len(points),), dtype=torch.bool)
    indices, sq_radii = [], []
    farthest = -1
    while len(indices) < limit and not (len(indices) >= len(start) and sq_radii[-1] <= until_sq_radius):
        t = len(indices)
        current = start[t] if t < len(start) else farthest
        indices.append(current)
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
        farthest = int((free == free.max()).nonzero()[0])
        sq_radii.append(max(0.0, free.max().item()))
        poll(done + t + 1, total)
    at = {"device": points.device}
    return torch.tensor(indices, **at), torch.tensor(sq_radii, dtype=torch.float64, **at), sq_dists, nearest


def _check_points(op, points):
    check.tensor(op, "points", points)
    if points.dim() not in (2, 3):
        raise ValueError(f"{op}: points must be [n, d] or [b, n, d], got shape {list(points.shape)}")
    check.dtype(op, "points", points, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_rules(points, k, start, picks, mask, until_radius):
    """What csrc/farthest_first/farthest_first.h asks of all but the values of tensors."""
    op, batched, shape = "farthest_first", points.dim() == 3, list(points.shape)
    _check_points(op, points)
    axes = "one cloud, one row" if batched else "one row"
    check.require(points.numel() > 0, f"{op}: points must have at least {axes} and one column, got shape {shape}")
    n = points.shape[-2]
    check.require_of_sizes(1 <= k <= n, f"{op}: k must be in [1, n={n}], got k={k}")

    check.tensor(op, "start", start)
    check.dtype(op, "start", start, torch.int64)
    check.require(
        start.dim() == points.dim() - 1 and start.numel() > 0 and start.shape[:-1] == points.shape[:-2],
        f"{op}: start must be {'[b, s]' if batched else '[s]'}, s >= 1, with points {shape}, "
        f"got shape {list(start.shape)}",
    )
    check.device(op, "start", start, "points", points, or_cpu=True)
    s = start.shape[-1]
    check.require_of_sizes(s <= k, f"{op}: k must be at least the number of starts, {s}, got k={k}")
    if mask is not None:
        check.tensor(op, "mask", mask)
        check.dtype(op, "mask", mask, torch.bool)
        check.require(
            mask.shape == points.shape[:-1],
            f"{op}: mask must be {'[b, n]' if batched else '[n]'} with points {shape}, got shape {list(mask.shape)}",
        )
        check.device(op, "mask", mask, "points", points)
    if picks is not None:
        check.tensor(op, "picks", picks)
        check.dtype(op, "picks", picks, torch.int64)
        check.require(
            batched and picks.shape == points.shape[:1],
            f"{op}: picks must be [b], with points [b, n, d], got shape {list(picks.shape)} with points {shape}",
        )
        check.device(op, "picks", picks, "points", points, or_cpu=True)
    if until_radius is not None:
        check.require(until_radius >= 0, f"{op}: until_radius must be at least 0, got {until_radius:g}")


def _check_values(points, k, start, picks, mask):
    """What it asks of the values, once the rules are kept."""
    op, batched = "farthest_first", points.dim() == 3
    n, s = points.shape[-2], start.shape[-1]
    for name, x in (("points", points), ("start", start), ("mask", mask), ("picks", picks)):
        if x is not None:
            check.memory(op, name, x)
    clouds = points.reshape(-1, *points.shape[-2:])
    is_point = torch.ones(clouds.shape[:2], dtype=torch.bool) if mask is None else mask.reshape(-1, n).cpu()
    starts = start.reshape(-1, s).tolist()
    for j, given in enumerate(starts):
        where = f" in cloud {j}" if batched else ""
        limit, count = k if picks is None else int(picks[j]), int(is_point[j].sum())
        check.require(s <= limit <= k, f"{op}: picks must be in [s={s}, k={k}], got {limit}{where}")
        check.require(
            limit <= count,
            f"{op}: {'k' if picks is None else 'picks'} must be at most the number of points that mask lets in, "
            f"{count}{where}, got {limit}",
        )
        for i in given:
            check.require(0 <= i < n, f"{op}: start must be in [0, n={n}), got start={i}{where}")
        twice = min((i for i in given if given.count(i) > 1), default=None)
        check.require(twice is None, f"{op}: start must not repeat a point, got start={twice} twice{where}")
    for j, given in enumerate(starts):
        where = f" in cloud {j}" if batched else ""
        for i in given:
            check.require(
                bool(is_point[j, i]), f"{op}: start must be a point, got start={i}, which mask leaves out{where}"
            )
    for j, cloud in enumerate(clouds):
        largest = cloud.double().abs().amax(1).cpu()  # NaN stays NaN
        for i in (is_point[j] & ~(largest <= 1e150)).nonzero().flatten().tolist():
            where = f"row {i} of cloud {j}" if batched else f"row {i}"
            size = largest[i].item()
            check.require(math.isfinite(size), f"{op}: points must be finite, {where} holds NaN or Inf")
            raise ValueError(f"{op}: |points| must be at most 1e150 (squares overflow), got {size:g} in {where}")
