"""A training run computed again from its log, forwards to check it, and backwards with what memory there is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastif.data.batches import Walked, moved_to, rows_of
from fastif.model.losses import Loss, Measurement
from fastif.replay.log import Point, Step, TrainingLog
from fastif.replay.network import Network
from fastif.replay.optimizers import State

# How far a run may be from its log: in a gradient's norm, and relative to how far parameters moved since a checkpoint.
_ALLOWED = {torch.float32: 2e-3, torch.float64: 1e-8}
_CAUSES = (
    "likely causes: clipped gradients, augmentation or other randomness in data or model, another loss or reduction "
    "than loss= (or weights that log.step was not given), other data or another order, autocast or TF32, parameters "
    "changed outside of the optimizer"
)


class NotReproduced(ValueError):
    """A log does not give the training's numbers again; the message names the step and by how much."""


class Piece(NamedTuple):
    """Some examples of a step."""

    x: Any
    y: Any
    rows: Tensor  # int64 [b], their places in the training data
    weights: Tensor  # [b], of their losses in the step's objective


class Path:
    """One network's way through its parameters.

    Args:
        log: its record.
        model: any with its architecture.
        data: the training data, whose examples the log's rows are.
        room: bytes for the states that are held at a time.
    """

    def __init__(self, log: TrainingLog, model: nn.Module, loss: Loss, data: Walked, room: int, at_a_time: int):
        self.log, self.data = log, data
        self.device = next(model.parameters()).device
        constants = {name: value.to(self.device) for name, value in log.constants.items()}
        self.network = Network(model, loss, log.layout, constants, at_a_time)
        item = torch.empty(0, dtype=log.dtype).element_size()
        self.state_bytes = (1 + len(log.rule.state)) * log.layout.size * item
        self.room = room // self.state_bytes
        if self.room < 4:
            raise ValueError(
                f"Replay: memory must hold 8 states of the network, {8 * self.state_bytes:,} bytes, got {room * 2:,} "
                "(half of it is for adjoints)"
            )

    def __len__(self) -> int:
        return len(self.log.steps)

    def pieces(self, rows: Tensor, weights: Tensor) -> Iterator[Piece]:
        """The examples `rows`, as many at a time as the data brings."""
        for (x, y), places in self.data.picked(rows):
            x, y = moved_to(x, self.device), moved_to(y, self.device)
            yield Piece(x, y, rows[places], weights[places].to(self.device, self.log.dtype))

    def batch(self, number: int) -> list[Piece]:
        """A step's batch, with the weights of its losses in (1/b) Σ w_i ℓ_i."""
        step = self.log.steps[number]
        return list(self.pieces(step.rows, weights_of(step)))

    def gradient(self, at: Tensor, pieces: list[Piece]) -> Tensor:
        total: Tensor | None = None
        for piece in pieces:
            part = self.network.gradient(at, piece.x, piece.y, piece.weights)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def query_gradients(self, query: Walked, chosen: Tensor, groups: Tensor | None, measurement: Measurement) -> Tensor:
        """∇m at the end of the training, of chosen queries or groups of queries, [chosen, P]."""
        at, first = self.end.at, int(chosen[0])
        out = at.new_zeros((len(chosen), len(at)))
        wanted = chosen if groups is None else torch.arange(len(groups))[torch.isin(groups, chosen)]
        if not len(wanted):  # groups without a query
            return out
        for (x, y), places in query.picked(wanted):
            x, y = moved_to(x, self.device), moved_to(y, self.device)
            for i, place in enumerate(wanted[places].tolist()):
                one = slice(i, i + 1)
                labels = None if y is None else rows_of(y, one)
                gradient = self.network.query_gradient(at, rows_of(x, one), labels, measurement)
                out[(place if groups is None else int(groups[place])) - first] += gradient
        return out

    def advance(self, point: Point, number: int, gradient: Tensor | None = None) -> Point:
        """The point after a step."""
        if gradient is None:
            gradient = self.gradient(point.at, self.batch(number))
        parts = []
        for where, numbers in self._groups(number):
            own = tuple(part[where] for part in point.state)
            at, state = self.log.rule.step(point.at[where], own, gradient[where], numbers)
            parts.append((at, *state))
        at, *state = _joined(parts)
        return Point(at, tuple(state))

    def loose(self, point: Point, number: int, off: float) -> Tensor | None:
        """How far the parameters may go elsewhere in a step that ended at `point`, where gradients are off so far."""
        parts = [
            self.log.rule.loose(tuple(part[where] for part in point.state), numbers, off)
            for where, numbers in self._groups(number)
        ]
        return torch.cat([part for part in parts if part is not None]) if parts and parts[0] is not None else None

    def pull(self, after: State, point: Point, number: int, gradient: Tensor | None) -> tuple[Tensor, State]:
        """A step backwards but for the loss's matrix; see `optimizers.Rule`."""
        parts = []
        for where, numbers in self._groups(number):
            own = tuple(part[where] for part in point.state)
            own_gradient = None if gradient is None else gradient[where]
            adjoints = tuple(part[:, where] for part in after)
            c, before = self.log.rule.pull(adjoints, point.at[where], own, own_gradient, numbers)
            parts.append((c, *before))
        c, *before = _joined(parts)
        return c, tuple(before)

    def _groups(self, number: int) -> Iterator[tuple[slice, tuple[float, ...]]]:
        """Where every parameter group stands, and its numbers in a step."""
        return zip(self.log.layout.slices, self.log.steps[number].numbers, strict=True)

    def checkpoint(self, number: int) -> Point:
        return self._placed(self.log.point(number))

    @property
    def end(self) -> Point:
        return self._placed(self.log.final)

    def _placed(self, point: Point) -> Point:
        return Point(point.at.to(self.device), tuple(part.to(self.device) for part in point.state))

    # --------------------------------------------------------------------------------------------------------- forwards

    @property
    def segments(self) -> list[range]:
        """The steps from one checkpoint to the next."""
        starts = self.log.starts
        return [range(*ends) for ends in zip(starts, [*starts[1:], len(self)], strict=True)]

    def verify(self, visit: Callable[[int, Tensor], None], places: range) -> float:
        """Runs the segments `places`, each from its checkpoint to the next, and holds them against the log.

        `visit` is shown every step's number and the parameters before it. Returns the largest deviation between two
        checkpoints, relative to how far the parameters moved, beyond what rounding makes of Adam's steps: it divides a
        gradient by its size, also one that is zero but for rounding, as that of attention's key biases is. Raises
        `NotReproduced`.
        """
        allowed, eps = _ALLOWED[self.log.dtype], torch.finfo(self.log.dtype).eps
        norms = torch.stack([step.norm.double().cpu() for step in self.log.steps])
        least = 1e-2 * allowed * float(norms.max())
        self._refuse_draws()
        worst = 0.0
        for place in places:
            start, stop = self.segments[place].start, self.segments[place].stop
            begun = point = self.checkpoint(place)
            loose: Tensor | float = 0.0
            for number in range(start, stop):
                visit(number, point.at)
                gradient = self.gradient(point.at, self.batch(number))
                norm, logged = float(gradient.double().norm()), float(norms[number])
                if not abs(norm - logged) <= allowed * logged + least:
                    raise NotReproduced(
                        f"Replay: the log does not reproduce its training: in step {number} the gradient's norm is "
                        f"{norm:.6g}, the log has {logged:.6g}; {_CAUSES}"
                    )
                point = self.advance(point, number, gradient)
                further = self.loose(point, number, 8 * eps * float(gradient.abs().max()))
                loose = loose if further is None else further.add_(loose)
            target = self.checkpoint(place + 1) if stop < len(self) else self.end
            moved = float((target.at - begun.at).abs().max())
            away = float(((target.at - point.at).abs() - loose).max().clamp(min=0))
            rounding = 8 * eps * (stop - start) * float(target.at.abs().max())
            if not away <= allowed * moved + rounding:
                raise NotReproduced(
                    f"Replay: the log does not reproduce its training: after step {stop - 1} the parameters differ by "
                    f"up to {away:.3g} from those recorded, having moved by {moved:.3g} since step {start}; {_CAUSES}"
                )
            worst = max(worst, away / moved if moved else 0.0)
        return worst

    def _refuse_draws(self) -> None:
        """Raises ValueError where two forward passes of the first batch differ."""
        piece, at = self.batch(0)[0], self.checkpoint(0).at
        with torch.no_grad():
            first, second = (self.network.losses(at, piece.x, piece.y).double() for _ in range(2))
        if float((first - second).abs().max()) > 1e-4 * max(1e-3, float(first.abs().max())):
            raise ValueError(
                "Replay: two forward passes of one batch differ: the model draws at random (dropout?) in the mode that "
                "it was trained in, and what was drawn is not in the log"
            )

    # -------------------------------------------------------------------------------------------------------- backwards

    def backwards(self) -> Iterator[tuple[int, Point]]:
        """Every step's number and the point before it, from the last step to the first."""
        for place, steps in reversed([*enumerate(self.segments)]):
            yield from self._reverse(self.checkpoint(place), steps.start, steps.stop, self.room)

    def _reverse(self, point: Point, start: int, stop: int, room: int) -> Iterator[tuple[int, Point]]:
        """The points before steps stop − 1, ..., start, with at most `room` of them held; `point` is the first."""
        steps = stop - start
        if steps <= room:
            held = [point]
            for number in range(start, stop - 1):
                held.append(self.advance(held[-1], number))
            while held:
                yield start + len(held) - 1, held.pop()
        elif room == 1:
            for last in reversed(range(start, stop)):
                yield last, self._run(point, start, last)
        else:
            begins, held = _begins(start, stop, room), [point]
            for begin, end in pairwise(begins):
                held.append(self._run(held[-1], begin, end))
            while held:
                begin = begins.pop()
                yield from self._reverse(held.pop(), begin, stop, room - len(held))
                stop = begin

    def _run(self, point: Point, start: int, stop: int) -> Point:
        for number in range(start, stop):
            point = self.advance(point, number)
        return point


class Reversal(NamedTuple):
    """What it takes to go through some steps backwards from a checkpoint."""

    held: int  # points at a time, the checkpoint with them
    run: Counter[int]  # how often each step is run on the way

    @classmethod
    def of(cls, start: int, stop: int, room: int) -> Reversal:
        """That of `Path._reverse`, of which it takes the same turns."""
        steps = stop - start
        if steps <= room:
            return cls(steps, Counter(range(start, stop - 1)))
        if room == 1:
            return cls(2, Counter({number: stop - 1 - number for number in range(start, stop - 1)}))
        begins, held = _begins(start, stop, room), 0
        run = Counter(range(start, begins[-1]))
        for before, (begin, end) in enumerate(pairwise([*begins, stop])):
            part = cls.of(begin, end, room - before)
            run.update(part.run)
            held = max(held, before + part.held)
        return cls(held, run)


def _begins(start: int, stop: int, room: int) -> list[int]:
    """Where the parts begin that steps are divided into, for which there is not room."""
    steps = stop - start
    parts = max(2, min(room // 2, math.ceil(math.sqrt(steps))))
    return [start + steps * part // parts for part in range(parts)]


def _joined(groups: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Vectors of all parameters, from those of every group; of one group they are not copied."""
    return list(groups[0]) if len(groups) == 1 else [torch.cat(parts, -1) for parts in zip(*groups, strict=True)]


def weights_of(step: Step) -> Tensor:
    """Of the losses of a step's batch in its objective, float64 [b]."""
    ones = torch.ones(len(step.rows), dtype=torch.float64) if step.weights is None else step.weights
    return ones / len(step.rows)
