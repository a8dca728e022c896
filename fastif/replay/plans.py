"""Plans: what `Replay` will hold, compute again and pass through the model, known before the work."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fastif.measure import Measure, in_mib
from fastif.replay.dealing import cut, deal
from fastif.replay.path import Reversal

_FEW = 4  # queries that a step is rehearsed with, at most


class RankReplay(NamedTuple):
    """What one rank does. Bytes are of tensors; what ranks tell one another beside them is a few KiB."""

    networks: tuple[int, ...]  # that it carries queries back through
    carried: int  # queries, added up over these networks
    passes: float  # as in `ReplayPlan`, its own
    peak_bytes: int | None
    sent_bytes: int
    received_bytes: int

    def __str__(self) -> str:
        names = ", ".join(map(str, self.networks)) or "none"
        return (
            f"networks {names}, {self.carried:,} queries carried back, {self.passes:,.0f} passes of an example, "
            f"peak {in_mib(self.peak_bytes, 2)}, sends {in_mib(self.sent_bytes, 2)} and receives "
            f"{in_mib(self.received_bytes, 2)}"
        )


class ReplayPlan(NamedTuple):
    """What the first `scores` of a `Replay` will do; memory is that of tensors beside model, data and logs."""

    networks: int
    steps: int  # of all trainings
    n: int  # training examples
    q: int  # queries, or groups of them
    state_bytes: int  # of one state: the parameters and what the optimizer keeps of them
    held_states: int  # of the path, at most at a time
    recomputed: int  # steps that are run again on the way back, of all networks, in each round
    rounds: int  # of queries: ways back through each network
    queries_at_once: int  # that are carried back in a round
    adjoint_bytes: int  # of these, two copies
    residual_bytes: int  # crossed, of all epochs and examples; 0 where each network keeps its own
    passes: float  # of one example forward through the model; a backward pass counts as two
    peak_bytes: int | None  # None where nothing counts allocations (plain torch on the CPU)
    ranks: tuple[RankReplay, ...] = ()  # where plans for several were asked for

    def __str__(self) -> str:
        networks = f"{self.networks} network{'s' if self.networks > 1 else ''}"
        rounds = f"{self.rounds} round{'s' if self.rounds > 1 else ''}"
        crossed = f"; crossed residuals {in_mib(self.residual_bytes, 2)}" if self.residual_bytes else ""
        return (
            f"{self.steps:,} steps of {networks}, {self.n:,} training examples, {self.q:,} queries in {rounds} of "
            f"{self.queries_at_once:,}\npath: at most {self.held_states:,} states of {in_mib(self.state_bytes, 2)}, "
            f"{self.recomputed:,} steps run again in each round\nadjoints {in_mib(self.adjoint_bytes, 2)}{crossed}; "
            f"{self.passes:,.0f} passes of an example through the model, peak {in_mib(self.peak_bytes, 2)}"
            + "".join(f"\nrank {rank}: {one}" for rank, one in enumerate(self.ranks))
        )


class _Network(NamedTuple):
    """What its way there and back takes, whatever the queries."""

    drawn: int  # examples of all batches
    joining: int  # examples that join steps
    epochs: int
    run: int  # steps that are run again on a way back
    examples: int  # of these steps
    held: int  # states at a time
    segments: list[int]  # examples of each
    middles: list[int]  # the segments in which epochs have their middles


def make_plan(replay: Any, q: int, ranks: int | None) -> ReplayPlan:
    """See `Replay.plan`."""
    networks = [_look_at(run) for run in replay.runs]
    path = replay.runs[0].path
    residual = _residual_bytes(replay)
    rehearsed = _Rehearsal(replay)
    each, at_once = replay.queries_together(1)
    alone = _of_rank(replay, networks, rehearsed, residual, q, 0, 1)
    made = ReplayPlan(
        len(networks),
        sum(len(run.path) for run in replay.runs),
        replay.n,
        q,
        path.state_bytes,
        max(network.held for network in networks),
        sum(network.run for network in networks),
        math.ceil(q / at_once),
        min(q, each),
        2 * min(q, each) * path.state_bytes,
        residual,
        alone.passes,
        alone.peak_bytes,
    )
    if ranks is None:
        return made
    return made._replace(
        ranks=tuple(_of_rank(replay, networks, rehearsed, residual, q, rank, ranks) for rank in range(ranks))
    )


def _look_at(run: Any) -> _Network:
    path, schedule = run
    lengths = [len(step.rows) for step in path.log.steps]
    held, again = 0, Counter[int]()
    for segment in path.segments:
        found = Reversal.of(segment.start, segment.stop, path.room)
        held = max(held, found.held)
        again.update(found.run)
    middles = [step for step, epochs in schedule.middles.items() for _ in epochs]
    return _Network(
        sum(lengths),
        sum(map(len, schedule.joining)),
        schedule.epochs,
        again.total(),
        sum(lengths[number] * times for number, times in again.items()),
        held,
        [sum(lengths[number] for number in segment) for segment in path.segments],
        [next(place for place, segment in enumerate(path.segments) if step in segment) for step in middles],
    )


def _residual_bytes(replay: Any) -> int:
    """Of crossed residuals: one example tells how large those of all are."""
    if not replay.crossed or len(replay.runs) == 1:
        return 0
    path, schedule = replay.runs[0]
    with path.network.running(path.log.modes):
        (piece,) = path.pieces(torch.arange(1), torch.ones(1))
        one = path.network.residuals(path.end.at, piece.x, piece.y)
    return schedule.epochs * replay.n * one.nbytes


class _Rehearsal:
    """Peaks of a step of the longest batch, there and back, with a few queries."""

    def __init__(self, replay: Any):
        self.replay = replay
        sizes = [
            (len(step.rows) + len(run.schedule.joining[number]), network, number)
            for network, run in enumerate(replay.runs)
            for number, step in enumerate(run.path.log.steps)
        ]
        _, self.network, self.number = max(sizes)
        self.path = replay.runs[self.network].path
        self._found: dict[tuple[int, int], int | None] = {}
        self.forwards = self._measure(lambda point: self.path.advance(point, self.number))

    def backwards(self, queries: int) -> int | None:
        """The peak of a step backwards of so many queries: up to four as they are, more by what the last one added."""
        at_a_time = self.path.network.at_a_time
        if queries <= _FEW:
            return self._step(queries, min(queries, at_a_time))
        if queries <= at_a_time:  # in one piece
            three, four = self._step(_FEW - 1, _FEW), self._step(_FEW, _FEW)
            return None if three is None or four is None else four + (queries - _FEW) * (four - three)
        three, four, pair = self._step(_FEW - 1, 1), self._step(_FEW, 1), self._step(_FEW, 2)
        if three is None or four is None or pair is None:
            return None
        return four + (queries - _FEW) * (four - three) + (at_a_time - 1) * max(0, pair - four)

    def _step(self, queries: int, at_a_time: int) -> int | None:
        if (queries, at_a_time) not in self._found:
            network = self.path.network
            norms = torch.zeros(len(self.path) + 1, dtype=torch.float64)
            way, before = self.replay.backwards(self.network, norms), network.at_a_time
            scores = torch.zeros(queries, self.replay.n, dtype=self.path.log.dtype, device=self.path.device)

            def back(point: Any) -> Any:
                begun = point.at.new_zeros((queries, len(point.at)))
                adjoints = (begun, *(torch.zeros_like(begun) for _ in self.path.log.rule.state))
                return way.step(adjoints, self.number, point, scores)

            network.at_a_time = at_a_time
            try:
                self._found[queries, at_a_time] = self._measure(back)
            finally:
                network.at_a_time = before
        return self._found[queries, at_a_time]

    def _measure(self, work: Any) -> int | None:
        point = self.path.checkpoint(0)
        with self.path.network.running(self.path.log.modes), Measure(self.path.device, exact=True) as measured:
            made = work(point)
            del made
        return measured.peak_bytes


def _of_rank(
    replay: Any, networks: Sequence[_Network], rehearsed: _Rehearsal, residual: int, q: int, rank: int, world: int
) -> RankReplay:
    """What a rank does of everything; of one process alone, everything."""
    path, n, count = replay.runs[0].path, replay.n, len(networks)
    item = torch.empty(0, dtype=path.log.dtype).element_size()
    each, at_once = replay.queries_together(world)
    base, per_query = (6 if path.log.rule.needs_gradient else 3), (6 if replay.matrix == "hessian" else 4)
    seen, carried, passes, widest = set[int](), 0, 0.0, 0
    own_rows = kept = 0
    for first in range(0, q, at_once):
        here = 0
        for network, parts in deal(count, min(at_once, q - first), rank, world):
            one, m = networks[network], len(parts)
            seen.add(network)
            carried, widest, here = carried + m, max(widest, m), here + m
            passes += one.drawn * (base + per_query * m) + 3 * one.examples + one.joining * (1 + 2 * m)
        own_rows, kept = own_rows + here, max(kept, here)
    epochs_mine = 0
    for begin in range(0, count, world):  # as many networks as ranks are computed again at a time
        some = networks[begin : begin + world]
        for number, places in cut([len(one.segments) for one in some], rank, world):
            passes += 3 * sum(some[number].segments[place] for place in places)
            if residual:
                epochs_mine += sum(place in places for place in some[number].middles)
    passes += epochs_mine * n
    sent = received = 0
    if world > 1:
        epochs = count * networks[0].epochs if residual else 0
        epoch_bytes = residual // networks[0].epochs if residual else 0
        norms = sum(8 * (len(run.path) + 1) for run in replay.runs)
        sent = (world - 1) * (own_rows * n * item + epochs_mine * epoch_bytes + norms)
        received = (count * q - own_rows) * n * item + (epochs - epochs_mine) * epoch_bytes + (world - 1) * norms
    return RankReplay(
        tuple(sorted(seen)),
        carried,
        passes,
        _peak(replay, networks, rehearsed, residual, (q, widest, kept, min(each, q)), world),
        sent,
        received,
    )


def _peak(
    replay: Any,
    networks: Sequence[_Network],
    rehearsed: _Rehearsal,
    residual: int,
    rows: tuple[int, int, int, int],
    world: int,
) -> int | None:
    """The largest of its stages: training again, the way back, and rows of the networks that are averaged.

    rows: queries of all, at most of one network at a time, of all networks in a round, and that are averaged at a time.
    """
    path, n, count = replay.runs[0].path, replay.n, len(networks)
    q, widest, kept, together = rows
    back = rehearsed.backwards(widest) if widest else 0
    if back is None or rehearsed.forwards is None:
        return None
    item = torch.empty(0, dtype=path.log.dtype).element_size()
    out = q * n * item
    copied = path.device.type != "cpu" or path.log.in_folder  # the checkpoint itself, beside what it leads to
    states = (max(one.held for one in networks) - (0 if copied else 1)) * path.state_bytes
    again = max(2 * residual + (residual // 2 if world > 1 else 0) + rehearsed.forwards, 5 * residual)
    # Of a row two copies in float64 beside itself at one scale, its unit's and the mean.
    averaging = (3 * item + 16) * together * n if count > 1 else 0
    return int(
        max(
            again,
            residual + states + back + (kept + q - min(q, together)) * n * item,
            residual + count * together * n * item + averaging + out,
            residual + 2 * out,
        )
    )
