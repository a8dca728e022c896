"""Crossed residuals: what networks with an example and those without it say of it, in the middle of each epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fastif.ranks import Ranks


class Sums:
    """Residuals by epoch and example, added up over the networks that trained on an example and those that did not.

    Sums are taken in the order of the networks. Of several ranks each brings the epochs whose middles it passes, and
    holds these until the networks are added up.
    """

    def __init__(self, n: int, epochs: list[int], memory: int, ranks: Ranks):
        if len(set(epochs)) > 1:
            raise ValueError(
                f"Replay: crossed=True compares networks epoch by epoch, and the logs have {sorted(set(epochs))} "
                "epochs; pass crossed=False, or train them for one number of epochs"
            )
        self.n, self.epochs, self.memory, self.ranks = n, epochs[0], memory, ranks
        self._totals: Tensor | None = None  # [2, epochs, n, ...]
        self._counts: Tensor = torch.zeros(2, n, dtype=torch.int64)
        self._held: dict[tuple[int, int], Tensor] = {}  # by network and epoch: of this rank, [n, ...]

    def add(self, network: int, epoch: int, rows: Tensor, residuals: Tensor, present: Tensor) -> None:
        """What a network says of some examples; networks come in their order where there is one rank."""
        if len(residuals) != len(rows):  # the logits of one example, of which a model's squeeze() took the axis
            residuals = residuals[None]
        if self.ranks.world == 1:
            self._add(epoch, rows, residuals, present)
            return
        self._reserve(residuals)
        held = self._held.setdefault((network, epoch), residuals.new_empty((self.n, *residuals.shape[1:])))
        held[rows.to(residuals.device)] = residuals

    def exchange(self, networks: Iterable[tuple[int, Tensor]], device: torch.device) -> None:
        """Adds up what ranks hold of these networks, each given with the examples that it was trained on."""
        if self.ranks.world == 1:
            return
        every = torch.arange(self.n)
        for network, present in networks:
            for epoch in range(self.epochs):
                held = self._held.pop((network, epoch), None)
                own = {} if held is None else {"": held.to(self.ranks.device)}
                told = self.ranks.gather("residuals of an epoch", own, self.ranks.device)
                (residuals,) = (theirs[""] for theirs in told if theirs)
                self._add(epoch, every, residuals.to(device), present)

    def crossed(self) -> tuple[Tensor, Tensor]:
        """½ (mean over the networks that trained on it + mean over the others), [epochs, n, ...], and bool [n]: which
        examples have both."""
        assert self._totals is not None
        known = (self._counts > 0).all(0)
        counts = self._counts.clamp(min=1).to(self._totals).view(2, 1, self.n, *(1,) * (self._totals.dim() - 3))
        return (self._totals / counts).mean(0), known

    def _add(self, epoch: int, rows: Tensor, residuals: Tensor, present: Tensor) -> None:
        totals, side = self._reserve(residuals), present[rows].long()
        totals[side.to(residuals.device), epoch, rows.to(residuals.device)] += residuals
        if epoch == 0:
            self._counts[side, rows] += 1

    def _reserve(self, residuals: Tensor) -> Tensor:
        if self._totals is None:
            shape = (2, self.epochs, self.n, *residuals.shape[1:])
            size = math.prod(shape) * residuals.element_size()
            also = ""
            if self.ranks.world > 1:  # those of a network, until they are exchanged
                size, also = size + size // 2, " and, on several ranks, half as many again"
            if size > self.memory:
                raise ValueError(
                    f"Replay: crossed=True keeps residuals {list(shape)} of all epochs and examples{also}, {size:,} "
                    f"bytes, more than memory={self.memory:,}; pass crossed=False or more memory"
                )
            self._totals = residuals.new_zeros(shape)
        return self._totals
