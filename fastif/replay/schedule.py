"""When the examples that a training left out join its steps, so that they get a derivative too.

A run is divided into epochs by the number of examples drawn: E = round(drawn/s) of them, s the number of different
examples that it was trained on. In every epoch the examples that it was not trained on are put into an order of their
own, drawn from the seed, and spread evenly over the epoch's draws: each joins the step that makes the draw it falls on,
with weight zero, once an epoch. What it gains there counts drawn/(s·E) times, as often as the others were drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastif.replay.log import Step


class Schedule:
    """Epochs of a run, and who joins which step.

    Args:
        steps: of the log.
        n: training examples.
        seed, network: what the orders are drawn from.
    """

    def __init__(self, steps: Sequence[Step], n: int, seed: int, network: int):
        lengths = torch.tensor([len(step.rows) for step in steps])
        self._ends = lengths.cumsum(0)  # draws made after each step
        drawn = int(self._ends[-1])
        self.present = torch.zeros(n, dtype=torch.bool)  # the examples that it was trained on
        self.present[torch.cat([step.rows for step in steps])] = True
        seen = int(self.present.sum())
        self.epochs = max(1, round(drawn / seen))
        self.rate = drawn / (seen * self.epochs)
        self._length = drawn / self.epochs
        absent = (~self.present).nonzero()[:, 0]
        draw = torch.Generator().manual_seed(seed + 7919 * network)
        joining: list[list[int]] = [[] for _ in steps]
        for epoch in range(self.epochs):
            order = absent[torch.randperm(len(absent), generator=draw)]
            shares = (torch.arange(len(absent), dtype=torch.float64) + 0.5) / max(1, len(absent))
            for row, step in zip(order.tolist(), self._step_at((epoch + shares) * self._length).tolist(), strict=True):
                joining[step].append(row)
        self.joining = [torch.tensor(rows, dtype=torch.int64) for rows in joining]
        self.epoch_of = ((self._ends - lengths).double() / self._length).long().clamp(max=self.epochs - 1).tolist()

    @property
    def middles(self) -> dict[int, list[int]]:
        """The steps that make the draw in the middle of an epoch, with these epochs."""
        halves = (torch.arange(self.epochs, dtype=torch.float64) + 0.5) * self._length
        found: dict[int, list[int]] = {}
        for epoch, step in enumerate(self._step_at(halves).tolist()):
            found.setdefault(step, []).append(epoch)
        return found

    def _step_at(self, draws: Tensor) -> Tensor:
        return torch.searchsorted(self._ends.double(), draws, right=True).clamp(max=len(self._ends) - 1)
