"""Rows of which a block is the sum of outer products, gathered before they are multiplied."""

from __future__ import annotations

import torch
from torch import Tensor

from fastif import ops

_ROWS = 1024  # that are multiplied at a time: with fewer, reading the block takes as long as multiplying


class Rows:
    """Σ_i weights[i] v_i v_iᵀ into a block [P, P], for rows v_i that come a few at a time."""

    def __init__(self) -> None:
        self._rows: Tensor | None = None  # [_ROWS, P], those that wait, times the roots of their weights
        self._waiting = 0

    def add(self, rows: Tensor, weights: Tensor, block: Tensor) -> None:
        """Rows [n, P] and weights [n] >= 0; whenever there are enough, they go into the block."""
        if self._rows is None:
            self._rows = rows.new_empty((_ROWS, rows.shape[1]))
        rows = rows * weights.to(rows).sqrt()[:, None]
        while len(rows):
            some = rows[: _ROWS - self._waiting]
            self._rows[self._waiting : self._waiting + len(some)] = some
            self._waiting += len(some)
            rows = rows[len(some) :]
            if self._waiting == _ROWS:
                self._multiply(block)

    def end(self, block: Tensor | None) -> None:
        """Puts those that still wait into the block."""
        if self._waiting:
            assert block is not None
            self._multiply(block)
        self._rows = None

    def _multiply(self, block: Tensor) -> None:
        """Half of a matrix product where a kernel makes one triangle."""
        assert self._rows is not None
        rows, self._waiting = self._rows[: self._waiting], 0
        size = rows.shape[1]
        if rows.device.type == "cpu" and rows.dtype == torch.float32:
            ops.kronecker_block(rows, rows.new_ones(len(rows), 1, 1), out=block.view(1, size, 1, size))
        else:
            block.view(size, size).addmm_(rows.T, rows)
