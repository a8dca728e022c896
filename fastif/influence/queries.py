"""The query side of scores: preconditioned gradients of as many queries as memory holds.

`query_blocks` makes them where the whole curvature is at hand, `shared_query_blocks` on ranks that keep parts of it for
one another: each brings the gradients of its share of the queries, which the owners of the layers solve for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from fastif.curvature.directions import Directions, Explicit, LowRank, QueryFactors
from fastif.curvature.network import NetworkCurvature
from fastif.data.batches import as_loader, walked
from fastif.data.dealing import Part, deal_picked
from fastif.influence.fitted import Fitted, Setup
from fastif.influence.owners import Rows, owner_of_block, precondition
from fastif.model.calls import dtype_of
from fastif.model.gradients import Formed, Gradients
from fastif.model.sliced_gradients import smallest
from fastif.ranks import BUCKET, stretch

MADE = 1 << 23  # bytes of preconditioned query gradients that are made at a time


def query_bytes(setup: Setup, query: Any, low_rank: int | None, matrices: bool) -> int:
    """Bytes that are held of a query at least, as the first batch has it; matrices: as matrices in any case."""
    by_block = setup.estimators.by_block
    factored = {name for name, estimator in by_block.items() if estimator.keeps_query_factors and not matrices}
    return query_bytes_of(setup, query, factored, low_rank)


def query_bytes_of(setup: Setup, query: Any, factored: set[str], low_rank: int | None) -> int:
    """The same, where blocks `factored` keep queries in factors if these are fewer numbers."""
    passes, blocks = setup.passes, setup.capture.blocks
    item = dtype_of(passes.model).itemsize
    if low_rank is not None:
        return item * sum(b.shape[0] * min(low_rank, *b.shape[1:]) * sum(b.shape[1:]) for b in blocks.values())
    numbers = {name: block.size for name, block in blocks.items()}
    if factored:
        batch = next(iter(as_loader(query, passes.batch_size)))
        with passes.running(setup.states[0]):
            _, _, gradients = next(passes.gradients([batch], None, setup.measurement))
        numbers.update({name: QueryFactors.size(gradients[name]) or numbers[name] for name in factored})
    return item * sum(numbers.values())


def query_blocks(
    fitted: Fitted,
    query: Any,
    total: int,
    curvature: NetworkCurvature,
    groups: Tensor | None,
    low_rank: int | None,
    explicit: bool,
) -> Iterator[tuple[int, dict[str, list[Directions]]]]:
    """The query side for as many queries at a time as `memory` holds, with the first query's index."""
    if groups is not None:
        yield 0, _grouped_queries(fitted, query, curvature, groups, low_rank)
        return
    each, first, held, memory = _made_at_a_time(fitted), 0, _Held(0), fitted.memory
    for start, n, gradients in fitted.passes.gradients(query, "queries", fitted.setup.measurement):
        for begin in range(0, n, each):
            part = {name: g.rows(begin, begin + each) for name, g in gradients.items()}
            made = _directions(fitted, curvature, part, low_rank, explicit)
            del part
            if held.parts and held.nbytes_with(made) > memory:
                yield first, held.settle(memory - held.nbytes)
                held = _Held(0)
            if not held.parts:  # as many as will be held in this form
                first, few, size = start + begin, min(each, n - begin), held.nbytes_with(made)
                held = _Held(min(total - first, max(few, few * memory // size)))
            held.add(made)
            del made
        del gradients  # before those of the next batch come, and the training examples
    yield first, held.settle(memory - held.nbytes)


def _made_at_a_time(fitted: Fitted) -> int:
    """Queries; making their matrices takes some copies."""
    return max(1, min(fitted.memory // 4, MADE) // _matrix_bytes(fitted))


def _matrix_bytes(fitted: Fitted) -> int:
    return sum(block.size for block in fitted.capture.blocks.values()) * dtype_of(fitted.passes.model).itemsize


def shared_query_blocks(
    fitted: Fitted,
    query: Any,
    curvature: NetworkCurvature,
    groups: Tensor | None,
    low_rank: int | None,
    whole: bool,
) -> Iterator[tuple[list[range], dict[str, list[Directions]]]]:
    """The query side on ranks that keep parts of the curvature for one another, as matrices: some queries at a time, in
    runs of their numbers.

    A rank brings the gradients of its share of the queries, or each those of all where they cannot be divided. All
    ranks walk through it together.

    Args:
        whole: deal out whole batches, so that the bits are those of one process that holds matrices.
    """
    setup = fitted.setup
    ranks, divided = setup.ranks, _are_divided(setup)
    if groups is not None:
        yield [range(int(groups.max()) + 1)], _shared_groups(fitted, query, curvature, groups, low_rank, whole)
        return
    mine, before = deal_queries(query, setup, whole) if divided else (query, 0)
    each = _made_at_a_time(fitted)
    room = max(1, min(BUCKET, fitted.memory // (2 * ranks.world)) // (each * _matrix_bytes(fitted)))  # pieces
    turns = _turns(fitted, mine, before, each, room)
    held: list[Rows] = []
    while True:
        first, pieces = next(turns, (0, []))
        told = ranks.meet(
            "the next queries", [*accumulate((_number_of(one) for one in pieces[:-1]), initial=first)][: len(pieces)]
        )
        firsts = told if divided else told[:1]
        if not any(firsts):
            break
        made = precondition(curvature, pieces, firsts, low_rank, setup, divided)
        if held and sum(rows.nbytes for rows in (*held, *made)) > fitted.memory:
            yield _runs(held)
            held = []
        held += made
        del made
    del pieces, turns
    yield _runs(held)


def _are_divided(setup: Setup) -> bool:
    """Whether each rank makes the gradients of its share of the queries. Where solving takes products with the data all
    ranks have to be there for each; and through a sharded model they pass together, which they could not do while some
    of them already exchange gradients."""
    return not setup.estimators.needs_data and setup.passes.sharding is None


def deal_queries(query: Any, setup: Setup, whole: bool) -> tuple[Part | None, int]:
    """The queries whose gradients this rank makes, None where it gets none, and how many come before them.

    In whole batches too where a model in train mode may make an example's gradient depend on its batch.
    """
    batch_size, ranks = setup.passes.batch_size, setup.ranks
    whole = whole or setup.passes.allow_train_mode
    part = isinstance(query, Part)
    data = walked(query.data if part else query, batch_size)
    indices = query.indices if part else torch.arange(data.n)
    places = (
        deal_picked(data, indices, ranks) if whole else torch.tensor([*stretch(len(indices), ranks.rank, ranks.world)])
    )
    if not len(places):
        return None, 0
    first, last = int(indices[places[0]]), int(indices[places[-1]])
    return Part(data, batch_size, [range(first, last + 1)]), int(places[0])


def _turns(
    fitted: Fitted, query: Any, before: int, each: int, room: int
) -> Iterator[tuple[int, list[dict[str, Gradients]]]]:
    """Gradients of some queries in at most `room` pieces, with the number of the first."""
    for start, n, gradients in (
        () if query is None else fitted.passes.gradients(query, "queries", fitted.setup.measurement)
    ):
        for begin in range(0, n, each * room):
            ends = range(begin, min(n, begin + each * room), each)
            pieces = [{name: g.rows(i, min(n, i + each)) for name, g in gradients.items()} for i in ends]
            yield before + start + begin, pieces
            del pieces
        del gradients


def _number_of(gradients: Mapping[str, Gradients]) -> int:
    """Examples."""
    return len(next(iter(gradients.values())))


def _runs(held: list[Rows]) -> tuple[list[range], dict[str, list[Directions]]]:
    """What came in any order, in that of the queries; matrices one below the other, as `_Held` has them."""
    held.sort(key=lambda rows: rows.first)
    runs: list[range] = []
    for rows in held:
        begins = runs.pop().start if runs and runs[-1].stop == rows.first else rows.first
        runs.append(range(begins, rows.first + len(rows)))
    found: dict[str, list[Directions]] = {}
    for name in [*held[0].directions]:
        parts = [rows.directions.pop(name) for rows in held]
        explicit = [part.matrices for part in parts if isinstance(part, Explicit)]
        found[name] = [Explicit(torch.cat(explicit))] if explicit else parts
    return runs, found


def _shared_groups(
    fitted: Fitted, query: Any, curvature: NetworkCurvature, groups: Tensor, low_rank: int | None, whole: bool
) -> dict[str, list[Directions]]:
    """Sums over groups of queries; with `whole` every rank adds all of them up, to the bits of one process."""
    setup, divided = fitted.setup, _are_divided(fitted.setup) and not whole
    mine, before = deal_queries(query, setup, False) if divided else (query, 0)
    totals = _add_groups(fitted, mine, before, groups)
    if divided:
        totals = setup.ranks.sum_each("groups of queries", totals, owner_of_block(curvature).get, setup.device)
    piece = {name: Formed(total) for name, total in totals.items()}
    (rows,) = precondition(curvature, [piece], [[0]], low_rank, setup, False)
    return {name: [made] for name, made in rows.directions.items()}


class _Held:
    """Directions of the queries as they come: matrices one below the other, so that training gradients, once formed,
    meet all of them."""

    def __init__(self, room: int):
        self.parts: dict[str, list[Directions]] = {}
        self.nbytes = 0
        self._room, self._rows = room, dict[str, Tensor]()
        self._factors: dict[str, tuple[int, int]] = {}  # queries in factors, and bytes of the longest

    def nbytes_with(self, made: Mapping[str, Directions]) -> int:
        """`nbytes` once these are added: factors all take as many positions as the longest."""
        total = self.nbytes
        for name, directions in made.items():
            if not isinstance(directions, QueryFactors):
                total += directions.nbytes
                continue
            before, after = self._factors.get(name, (0, 0)), self._factors_with(name, directions)
            total += math.prod(after) - math.prod(before)
        return total

    def _factors_with(self, name: str, directions: QueryFactors) -> tuple[int, int]:
        number, longest = self._factors.get(name, (0, 0))
        return number + len(directions), max(longest, directions.nbytes // len(directions))

    def add(self, made: Mapping[str, Directions]) -> None:
        self.nbytes = self.nbytes_with(made)
        for name, directions in made.items():
            if isinstance(directions, QueryFactors):
                self._factors[name] = self._factors_with(name, directions)
            parts = self.parts.setdefault(name, [])
            if not isinstance(directions, Explicit) or not self._joins(name, parts, directions):
                parts.append(directions)
                continue
            matrices, before = directions.matrices, len(parts[0]) if parts else 0
            if not parts:
                self._rows[name] = matrices.new_empty((self._room, *matrices.shape[1:]))
            self._rows[name][before : before + len(matrices)] = matrices
            parts[:] = [Explicit(self._rows[name][: before + len(matrices)])]

    def settle(self, room: int) -> dict[str, list[Directions]]:
        """All of them, those in factors in the form that takes the least work; `room`: bytes that are left for it."""
        for parts in self.parts.values():
            runs = [list(run) for _, run in groupby(parts, type)]
            parts.clear()
            for run in runs:
                if isinstance(run[0], QueryFactors):
                    joined = QueryFactors.join([part for part in run if isinstance(part, QueryFactors)])
                    run[:] = [joined.settle(room + joined.nbytes)]
                    room += joined.nbytes - run[0].nbytes
                parts += run
        return self.parts

    def _joins(self, name: str, parts: list[Directions], directions: Explicit) -> bool:
        if not parts:
            return len(directions) <= self._room
        first, *others = parts
        room = name in self._rows and len(first) + len(directions) <= self._room
        return isinstance(first, Explicit) and not others and room


def _directions(
    fitted: Fitted,
    curvature: NetworkCurvature,
    gradients: Mapping[str, Gradients],
    low_rank: int | None,
    explicit: bool,
) -> dict[str, Directions]:
    if low_rank is None and not explicit:
        return curvature.directions(gradients)
    blocks = fitted.capture.blocks  # as they travel between ranks, to the same bits
    return _solve(curvature, {name: smallest(g, blocks[name].size) for name, g in gradients.items()}, low_rank)


def _solve(
    curvature: NetworkCurvature, gradients: Mapping[str, Gradients], low_rank: int | None
) -> dict[str, Directions]:
    solved = curvature.precondition(gradients)
    if low_rank is None:
        return {name: Explicit(matrices) for name, matrices in solved.items()}
    return {name: LowRank.approximate(matrices, low_rank) for name, matrices in solved.items()}


def _grouped_queries(
    fitted: Fitted, query: Any, curvature: NetworkCurvature, groups: Tensor, low_rank: int | None
) -> dict[str, list[Directions]]:
    totals = _add_groups(fitted, query, 0, groups)
    formed = {name: Formed(total) for name, total in totals.items()}
    return {name: [made] for name, made in _solve(curvature, formed, low_rank).items()}


def _add_groups(fitted: Fitted, query: Any, before: int, groups: Tensor) -> dict[str, Tensor]:
    """Σ of the gradients of every group; `query` are those from a number on, None where there are none."""
    number = int(groups.max()) + 1
    totals = {
        name: torch.zeros((number, *block.shape), device=fitted.passes.device, dtype=dtype_of(fitted.passes.model))
        for name, block in fitted.capture.blocks.items()
    }
    for start, n, gradients in (
        () if query is None else fitted.passes.gradients(query, "queries", fitted.setup.measurement)
    ):
        here = groups[before + start : before + start + n].to(fitted.passes.device)
        for group in here.unique().tolist():
            for name, g in gradients.items():
                totals[name][group] += g.sum((here == group).to(fitted.passes.device))
    return totals
