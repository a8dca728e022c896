"""One network's training run backwards: what its examples' weights do to the measurements of some queries."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastif.curvature.matrix_free.lissa import Diverged
from fastif.replay.log import Point
from fastif.replay.network import Matrix
from fastif.replay.optimizers import State
from fastif.replay.path import Path, Piece
from fastif.replay.schedule import Schedule


class Backwards:
    """The way back through one network.

    Args:
        path, schedule: of its training.
        n: training examples.
        matrix: of the losses.
        residuals: crossed, by epoch and example, and which examples have them; None where each keeps its own.
        max_growth: of an adjoint.
        norms: float64 [steps + 1], to which the largest norm of an adjoint before each step goes.
        name: of the network, in messages.
    """

    def __init__(
        self,
        path: Path,
        schedule: Schedule,
        n: int,
        matrix: Matrix,
        residuals: tuple[Tensor, Tensor] | None,
        max_growth: float,
        norms: Tensor,
        name: str = "",
    ):
        self.path, self.schedule, self.n = path, schedule, n
        self.matrix: Matrix = matrix
        self.residuals, self.max_growth, self.norms, self.name = residuals, max_growth, norms, name

    def scores(self, begun: Tensor, bar: Any) -> Tensor:
        """The scores of as many queries as gradients were begun with, [q, n], on the CPU."""
        path = self.path
        adjoints: State = (begun, *(torch.zeros_like(begun) for _ in path.log.rule.state))
        scores = begun.new_zeros((len(begun), self.n))
        start = self._note_norms(len(path), begun, None)
        for number, point in path.backwards():
            adjoints = self.step(adjoints, number, point, scores)
            self._note_norms(number, adjoints[0], start)
            bar.update()
        return scores.cpu()

    def step(self, adjoints: State, number: int, point: Point, scores: Tensor) -> State:
        """The adjoints before a step, of those after it; what its examples give goes to the scores."""
        path, schedule = self.path, self.schedule
        pieces = path.batch(number)
        gradient = path.gradient(point.at, pieces) if path.log.rule.needs_gradient else None
        c, before = path.pull(adjoints, point, number, gradient)
        for piece in pieces:
            self._take(point, piece, c, number, scores, before[0])
        joining = schedule.joining[number]
        if len(joining):
            share = schedule.rate / len(path.log.steps[number].rows)
            for piece in path.pieces(joining, torch.full((len(joining),), share, dtype=torch.float64)):
                self._take(point, piece, c, number, scores, None)
        return before

    def _take(self, point: Point, piece: Piece, c: Tensor, number: int, scores: Tensor, adjoint: Tensor | None) -> None:
        """Adds what some examples of a step give: to their scores and, where they were trained on, to the adjoint."""
        network, weights, residuals = self.path.network, None if adjoint is None else piece.weights, None
        if self.residuals is not None:
            values, known = self.residuals
            residuals = values[self.schedule.epoch_of[number], piece.rows]
            if not bool(known[piece.rows].all()):
                own = network.residuals(point.at, piece.x, piece.y)
                mask = known[piece.rows].to(own.device).view(-1, *(1,) * (own.dim() - 1))
                residuals = torch.where(mask, residuals.view_as(own), own)
        found = network.products(point.at, piece.x, piece.y, weights, self.matrix, c, residuals)
        scores.index_add_(1, piece.rows.to(scores.device), found.changes * -piece.weights)
        if adjoint is not None and found.curved is not None:
            adjoint += found.curved

    def _note_norms(self, place: int, adjoint: Tensor, start: Tensor | None) -> Tensor:
        """The norms [q] of the queries' adjoints, noted; raises `Diverged` where one outgrew what it was at the end."""
        norms = adjoint.norm(dim=1)
        if start is not None and not bool((norms <= self.max_growth * start).all()):
            worst = int((norms / start.clamp(min=1e-30)).nan_to_num(nan=math.inf).argmax())
            raise Diverged(
                f"Replay: before step {place}{self.name} an adjoint's norm is {float(norms[worst]):.3g}, more than "
                f"max_growth={self.max_growth:g} times what it was at the end ({float(start[worst]):.3g}): the "
                "derivative of this training explodes and predicts nothing; matrix='ggn', a smaller learning rate or a "
                "smooth activation keep it bounded"
            )
        self.norms[place] = max(float(self.norms[place]), float(norms.max()))
        return norms
