"""k-center: the farthest-first centres of a point set, in memory, class by class, or read chunk by chunk."""

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Generator, Tensor

from fastif import ops
from fastif.ops import _checks as check
from fastif.progress import tqdm
from fastif.ranks import find_ranks
from fastif.samplers.subset import (
    Subset,
    allocate,
    blocks,
    check_finite,
    check_generator,
    check_labels,
    check_matrix,
    check_shape,
)
from fastif.samplers.systematic import check_k

Metric = Literal["euclidean", "cosine"]

_CHUNK_BYTES = 2**28  # of the rows that are looked at together, where the caller gives no chunk_rows,
_ROWS_PER_PICK = 8  # and at least so many for each of the k picks: round 1 passes on at most an eighth of the rows


def k_center(
    points: Tensor | np.ndarray | Iterable[Tensor | np.ndarray],
    k: int | None = None,
    *,
    start: int | Tensor | None = None,
    until_radius: float | None = None,
    weighted: bool = True,
    metric: Metric = "euclidean",
    chunk_rows: int | None = None,
    generator: Generator | None = None,
    progress: bool = True,
) -> Subset:
    """Farthest-first centres, each weighted by the share of the points that are nearest to it.

    The first centre is drawn from `generator`; each next one is the point farthest from the centres before it (ties:
    the lower index), so that every point is within twice the smallest possible covering radius. A point belongs to its
    nearest centre (ties: the earlier one), and weights[j] = (points that belong to j) / n, or all weights are equal
    with `weighted=False`: without weights the outliers, which are picked first, would count as much as the bulk.
    `metric="cosine"` is the same on rows scaled to length 1, where the squared distance is 2 (1 - cos).

    `start` gives centres to extend, an index or int64 [s]: they come first, in this order, and count among the k;
    nothing is drawn then, and the factors here, two and four, are against the best k centres that include the given
    ones. With `until_radius` the picks end as soon as every point is within that distance of a centre;
    k, then an upper bound, can be left out. `progress` shows a bar.

    points [n, d], features or logits of any float dtype, on any device; indices are in the order of the picks. A
    duplicate of a centre is picked only when no distinct point is left, and weighs 0.

    **Points larger than memory.** A np.memmap, an iterable of chunks [m, d] (tensors or arrays; rows are numbered as
    they come) and whatever comes with `chunk_rows` are read by at least chunk_rows rows at a time, in two rounds:
    farthest-first with k picks (or until half of until_radius) in every chunk, then among the picks of all chunks,
    which must fit the memory. Every point is within *four* times the smallest possible radius. The default of
    chunk_rows is 256 MiB or 8 k rows, whichever is more. Without a start, an iterable's first centre is drawn from the
    first chunk. The weights are those defined above and take another walk over the points. An iterator cannot be walked
    again: there all points of a chunk that are nearest to one of its picks count for the centre nearest to that pick.

    Raises ValueError (a row that holds NaN or Inf is named by its index among all) or TypeError. docs/math.md (7),
    docs/kcenter.md.

    >>> points = torch.tensor([[0.0], [1.0], [2.0], [5.0], [9.0]])
    >>> tuple(k_center(points, 3, start=0))
    (tensor([0, 4, 3]), tensor([0.6000, 0.2000, 0.2000], dtype=torch.float64))
    >>> k_center(points, start=0, until_radius=2.0).indices
    tensor([0, 4, 3])
    >>> k_center(iter(points.split(2)), 3, start=0, chunk_rows=2).indices
    tensor([0, 4, 3])
    """
    check_generator("k_center", generator)
    _check_metric("k_center", metric)
    if k is None and until_radius is None:
        raise ValueError("k_center: give k, until_radius or both")
    until_radius = None if until_radius is None else check.real("k_center", "until_radius", until_radius)
    if until_radius is not None and not 0 <= until_radius < float("inf"):
        raise ValueError(f"k_center: until_radius must be finite and >= 0, got {until_radius}")
    chunk_rows = None if chunk_rows is None else check.integer("k_center", "chunk_rows", chunk_rows)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"k_center: chunk_rows must be >= 1, got {chunk_rows}")
    if chunk_rows is not None or isinstance(points, np.memmap) or not isinstance(points, Tensor | np.ndarray):
        walk = partial(_chunks, points, chunk_rows, k, metric)
        n = len(points) if isinstance(points, Tensor | np.ndarray) else None
        once = isinstance(points, Iterator)
        return _in_two_rounds(walk, n, once, k, start, until_radius, weighted, generator, progress)
    points = check_matrix("k_center", "points", _tensor(points), "d")
    k = len(points) if k is None else check_k("k_center", k, len(points))
    given = _first(len(points), generator) if start is None else _check_start(start, k, len(points))
    points = _prepared(points, metric)
    centres = ops.farthest_first(points, k, given, until_radius=until_radius, progress=progress)
    return _subset(centres.indices.cpu(), centres.counts.cpu() if weighted else None)


def k_center_of_ranks(
    points: Tensor | np.ndarray,
    k: int,
    *,
    start: int | Tensor | None = None,
    weighted: bool = True,
    metric: Metric = "euclidean",
    generator: Generator | None = None,
    group: Any = None,
) -> Subset:
    """`k_center` of points that stand in parts on several ranks, in two rounds; on one process `k_center` itself.

    points [n_r, d]: this rank's; rows are numbered through the ranks in their order, and those of a rank may be none.
    Every rank picks k among its own, and all of them k among the picks, W·k·d numbers on each: every point is within
    *four* times the smallest possible radius of a centre, as in `k_center` of chunks, of which it has the picks. The
    weights are its, too. All ranks return the same; `generator` has to be in one state on all of them.

    Raises ValueError or TypeError, on all ranks, as `k_center`. docs/math.md (7), docs/scale.md.
    """
    ranks, op = find_ranks(group), "k_center_of_ranks"
    if ranks.world == 1:
        how: dict[str, Any] = dict(start=start, weighted=weighted, metric=metric, generator=generator)
        return k_center(points, k, **how, progress=False)
    with ranks.together(op):
        _check_metric(op, metric)
        mine = _tensor(points)
        if not (isinstance(mine, Tensor) and mine.dim() == 2 and len(mine) == 0):  # a rank may have none
            mine = check_shape(op, "points", mine, "[n, d]")
            check_finite(op, "points", mine)
        lengths = ranks.meet("the points of each rank", len(mine))
        n, first = sum(lengths), sum(lengths[: ranks.rank])
        k = check_k(op, k, n)
        given = _first(n, generator) if start is None else _check_start(start, k, n)
        kind = {"d": mine.shape[1], "type of points": str(mine.dtype), "metric": metric, "weighted": weighted}
        ranks.compare(op, {**kind, "k": k, "start": given.tolist()})
        mine = _prepared(mine, metric, op, first) if len(mine) else mine
        picked = mine[:0], torch.zeros(0, dtype=torch.int64, device=mine.device)
        if len(mine):
            own = given[(given >= first) & (given < first + len(mine))] - first
            found = ops.farthest_first(mine, min(k, len(mine)), own if len(own) else 0)
            picked = mine[found.indices], found.indices.to(mine.device) + first
        parts = ranks.gather("picks", {"rows": picked[0], "origin": picked[1]}, mine.device)
        union, origin = torch.cat([part["rows"] for part in parts]), torch.cat([part["origin"] for part in parts]).cpu()
        position = {row: i for i, row in enumerate(origin.tolist())}
        begun = torch.tensor([position[row] for row in given.tolist()])
        centres = ops.farthest_first(union, min(k, len(union)), begun)
        if not weighted:
            return _subset(origin[centres.indices.cpu()], None)
        chosen, cells = union[centres.indices], torch.zeros(len(centres.indices), dtype=torch.int64)
        if len(mine):
            cells = _cells(lambda: iter([(0, mine)]), chosen, len(mine), False)
        return _subset(origin[centres.indices.cpu()], ranks.sum("cells", cells.to(mine.device)).cpu())


def k_center_by_class(
    points: Tensor,
    labels: Tensor,
    k: int,
    *,
    weighted: bool = True,
    metric: Metric = "euclidean",
    generator: Generator | None = None,
) -> Subset:
    """`k_center` within each class, classes in proportion to their sizes.

    Each class gets k_c picks as in `stratified`. Its first centre is drawn from `generator`, and its points are within
    twice the smallest covering radius of k_c centres. A pick's weight is the number of points *of its class* that are
    nearest to it, over n (over those of the classes that have picks), or 1/k with `weighted=False`. Classes of
    similar size are one call of the op, on copies of their points.

    points [n, d], labels [n] integers >= 0; indices are class after class, in the order of the picks. Raises ValueError
    or TypeError. docs/math.md (4), (7).

    >>> points, labels = torch.tensor([[0.0], [1.0], [7.0], [8.0]]), torch.tensor([3, 0, 0, 3])
    >>> k_center_by_class(points, labels, 4, generator=torch.Generator().manual_seed(0)).weights
    tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """
    name = "k_center_by_class"
    _check_values(name, "points", points)
    _check_values(name, "labels", labels)
    points = check_matrix(name, "points", points, "d")
    labels = check_labels(name, labels, n=len(points))
    k = check_k(name, k, len(points))
    check_generator(name, generator)
    _check_metric(name, metric)
    points = _prepared(points, metric, name)
    labels, counts, picks = allocate(labels, k)
    starts = torch.zeros_like(counts)
    for c in picks.nonzero()[:, 0].tolist():
        starts[c] = _first(int(counts[c]), generator)
    members = labels.argsort(stable=True).split(counts.tolist())  # of each class
    indices, cells = ([members[0][:0]] * len(members) for _ in range(2))
    for batch in _of_similar_size(counts, picks > 0):  # each one call of the op, classes filled up to the largest
        rows = torch.nn.utils.rnn.pad_sequence([members[c] for c in batch.tolist()], batch_first=True)
        mask = torch.arange(rows.shape[1]) < counts[batch, None]
        centres = ops.farthest_first(
            points[rows.to(points.device)],
            int(picks[batch].max()),
            starts[batch, None],
            picks=picks[batch],
            mask=mask.to(points.device),
        )
        for c, picked, count in zip(batch.tolist(), centres.indices.cpu(), centres.counts.cpu(), strict=True):
            indices[c] = members[c][picked[: picks[c]]]
            cells[c] = count[: picks[c]]
    return _subset(torch.cat(indices), torch.cat(cells) if weighted else None)


def _of_similar_size(counts: Tensor, taken: Tensor) -> Iterator[Tensor]:
    """The classes that are taken, in batches whose members are less than twice as large as each other."""
    bits = torch.tensor([count.bit_length() for count in counts.tolist()])
    for size in bits[taken].unique():
        yield (taken & (bits == size)).nonzero()[:, 0]


def _in_two_rounds(
    walk: Callable[[], Iterator[tuple[int, Tensor]]],
    n: int | None,
    once: bool,
    k: int | None,
    start: int | Tensor | None,
    until_radius: float | None,
    weighted: bool,
    generator: Generator | None,
    progress: bool,
) -> Subset:
    """The picks of every chunk, and the centres among them. n: None where only a walk tells; once: one walk only."""
    k = k if k is None else _check_k(k, n)
    given = None if start is None else _check_start(start, k, n)
    rows, origin, counts = [], [], []  # of all chunks: the picks, their indices, the points of their chunk near them
    reach = 0.0  # the largest covering radius of a chunk
    seen = 0
    for first, chunk in tqdm(walk(), "k-center, round 1", unit="chunk", disable=not progress, leave=False):
        given = _first(n or len(chunk), generator) if given is None else given
        mine = given[(given >= first) & (given < first + len(chunk))] - first
        centres = ops.farthest_first(
            chunk,
            min(k or len(chunk), len(chunk)),
            mine if len(mine) else 0,
            until_radius=None if until_radius is None else until_radius / 2,
        )
        rows.append(chunk[centres.indices])
        origin.append(centres.indices.cpu() + first)
        counts.append(centres.counts.cpu())
        reach = max(reach, float(centres.sq_radii[-1]) ** 0.5)
        seen = first + len(chunk)
    if given is None:
        raise ValueError("k_center: points must have at least one chunk, got none")
    k = k if k is None else _check_k(k, seen)
    given = _check_start(given, k, seen)

    union, origin = torch.cat(rows), torch.cat(origin)
    position = {row: i for i, row in enumerate(origin.tolist())}
    centres = ops.farthest_first(
        union,
        min(k or len(union), len(union)),
        torch.tensor([position[row] for row in given.tolist()]),
        until_radius=None if until_radius is None or until_radius < reach else until_radius - reach,
        progress=progress,
    )
    indices = origin[centres.indices.cpu()]
    if not weighted:
        return _subset(indices, None)
    if once:
        return _subset(indices, torch.zeros_like(indices).index_add_(0, centres.nearest.cpu(), torch.cat(counts)))
    del rows
    return _subset(indices, _cells(walk, union[centres.indices], seen, progress))


def _cells(walk: Callable[[], Iterator[tuple[int, Tensor]]], centres: Tensor, n: int, progress: bool) -> Tensor:
    """The number of points [k] that belong to each centre [k, d], by another walk over all n points."""
    k = len(centres)
    cells = torch.zeros(k, dtype=torch.int64)
    for _, chunk in tqdm(walk(), "k-center, cells", unit="chunk", disable=not progress, leave=False):
        nearest = ops.farthest_first(torch.cat([centres, chunk]), k, torch.arange(k)).nearest  # all k picks are given
        cells += torch.bincount(nearest[k:].cpu(), minlength=k)
    if (again := int(cells.sum())) != n:
        raise ValueError(f"k_center: points must have as many rows on every walk, got n={n}, then {again}")
    return cells


def _chunks(points: Any, chunk_rows: int | None, k: int | None, metric: Metric) -> Iterator[tuple[int, Tensor]]:
    """Pairs of the index of a chunk's first row and the chunk, checked, prepared and of at least chunk_rows rows."""
    array = isinstance(points, Tensor | np.ndarray)
    if not (array or isinstance(points, Iterable)):
        kinds = "a tensor, an array or an iterable of chunks"
        raise TypeError(f"k_center: points must be {kinds}, got {type(points).__name__}")
    if array and points.ndim != 2:
        raise ValueError(f"k_center: points must be [n, d], got shape {list(points.shape)}")
    first, held, held_rows, width = 0, [], 0, 0
    for number, piece in enumerate(_slices(points, chunk_rows, k) if array else points):
        piece = check_shape("k_center", f"chunk {number}", _tensor(piece), "[m, d]")
        if width not in (0, piece.shape[1]):
            raise ValueError(f"k_center: chunk {number} must have d={width} columns, got {piece.shape[1]}")
        width = piece.shape[1]
        check_finite("k_center", "points", piece, first_row=first + held_rows)
        held.append(_prepared(piece, metric, first_row=first + held_rows))
        held_rows += len(piece)
        if held_rows >= (chunk_rows or _default_rows(piece, k)):
            yield first, torch.cat(held) if len(held) > 1 else held[0]
            first, held, held_rows = first + held_rows, [], 0
        elif not array:
            held[-1] = held[-1].clone()  # what yields the pieces may fill one buffer again and again
    if held:
        yield first, torch.cat(held) if len(held) > 1 else held[0]


def _slices(points: Any, chunk_rows: int | None, k: int | None) -> Iterator[Any]:
    rows = chunk_rows or _default_rows(_tensor(points[:1]), k)
    for first in range(0, len(points), rows):
        yield points[first : first + rows]


def _default_rows(piece: Tensor, k: int | None) -> int:
    return max(_CHUNK_BYTES // max(1, piece[0].nbytes), _ROWS_PER_PICK * (k or 0), 1)


def _tensor(x: Any) -> Any:
    """An array as a tensor: what is on disk, read-only or in another byte order is copied, the rest is shared."""
    _check_values("k_center", "points", x)
    if not isinstance(x, np.ndarray):
        return x
    if x.dtype.kind != "f" or x.dtype.itemsize > 8:
        raise TypeError(f"k_center: points must be of a floating-point type, got an array of {x.dtype}")
    if isinstance(x, np.memmap) or not x.flags.writeable or not x.dtype.isnative or min(x.strides, default=0) < 0:
        x = np.array(x, dtype=x.dtype.newbyteorder("="), order="C", subok=False)
    return torch.from_numpy(x)


def _prepared(points: Tensor, metric: Metric, name: str = "k_center", first_row: int = 0) -> Tensor:
    """The points, or for "cosine" their rows scaled to length 1, in float64 or rounded to float32."""
    if metric == "euclidean":
        return points
    dtype = torch.float64 if points.dtype == torch.float64 else torch.float32
    units = []
    for block in blocks(points):
        largest = block.abs().amax(1, keepdim=True)
        zero = (largest == 0).nonzero()
        if len(zero):
            row = first_row + sum(len(unit) for unit in units) + int(zero[0, 0])
            raise ValueError(f"{name}: metric 'cosine' needs rows that are not zero, row {row} is")
        block = block / largest  # so that squares neither overflow nor vanish
        units.append((block / block.square().sum(1, keepdim=True).sqrt()).to(dtype))
    return torch.cat(units).to(points.device)


def _first(n: int, generator: Generator | None) -> Tensor:
    return torch.randint(n, (1,), generator=generator)


def _check_k(k: int, n: int | None) -> int:
    """n is None where it is not known yet."""
    if n is None and isinstance(k, int) and k < 1:
        raise ValueError(f"k_center: k must be >= 1, got k={k}")
    return check_k("k_center", k, sys.maxsize if n is None else n)


def _check_start(start: int | Tensor, k: int | None, n: int | None) -> Tensor:
    """The given centres, int64 [s] on the CPU, s >= 1; n is None where it is not known yet."""
    _check_values("k_center", "start", start)
    given = torch.as_tensor(start).detach().cpu()
    if given.dtype != torch.int64:
        raise TypeError(f"k_center: start must be int64, got {given.dtype}")
    given = given.reshape(1) if given.dim() == 0 else given
    if given.dim() != 1 or len(given) == 0:
        raise ValueError(f"k_center: start must be an index or [s], s >= 1, got shape {list(given.shape)}")
    outside = given[(given < 0) | (given >= n if n is not None else given < 0)]
    if len(outside):
        rule = ">= 0" if n is None else f"in [0, n={n})"
        raise ValueError(f"k_center: start must be {rule}, got {int(outside[0])}")
    values, counts = given.unique(return_counts=True)
    if len(values) < len(given):
        raise ValueError(f"k_center: start must be distinct, {int(values[counts > 1][0])} appears more than once")
    if k is not None and len(given) > k:
        raise ValueError(f"k_center: start must have at most k={k} entries, got {len(given)}")
    return given


def _check_values(name: str, what: str, x: Any) -> None:
    """Refuses a tensor that holds no values, or none at strides."""
    if not isinstance(x, Tensor):
        return
    check.tensor(name, what, x)
    if x.is_meta:
        raise ValueError(f"{name}: {what} must hold values, got a tensor on meta")


def _check_metric(name: str, metric: str) -> None:
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f"{name}: metric must be 'euclidean' or 'cosine', got {metric!r}")


def _subset(indices: Tensor, cells: Tensor | None) -> Subset:
    """Weights in proportion to the cells, or equal ones."""
    cells = torch.ones_like(indices) if cells is None else cells
    return Subset(indices, cells.double() / int(cells.sum()))
