"""The building of an exact block: what adds batches to it, and takes some out again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastif import ops
from fastif.curvature import limits
from fastif.curvature.exact.room import Form, check_room
from fastif.curvature.exact.softmax import check_labels, check_layer, check_values, output_grads, output_roots
from fastif.curvature.protocol import Shape
from fastif.model.gradients import Dense, Gradients
from fastif.model.layers import Block

Matrix = Literal["ggn", "hessian", "empirical_fisher"]


class HeadBatch(NamedTuple):
    """A batch of a linear layer under softmax that has passed every check, and the block that it will go into."""

    block: Tensor  # [c, d, c, d]
    inputs: Tensor  # [n, d]
    probs: Tensor  # [n, c]
    labels: Tensor | None  # int64 [n], where the empirical Fisher is made of them
    weights: Tensor  # [n]

    @property
    def roots(self) -> Tensor:
        """Columns r_is with Σ_s r_is r_isᵀ = weights[i] H_i, [n, c, s]."""
        labels, probs = self.labels, self.probs
        roots = output_roots(probs) if labels is None else output_grads(probs, labels)[:, :, None]
        return roots * self.weights.sqrt()[:, None, None]


class BlockSum:
    """A block as a sum over the batches that it is shown: [c, d, c, d], or [g·o, d, g·o, d] for g matrices [o, d].

    Whoever changes it first lets go of what factor stands in its square.
    """

    def __init__(self, matrix: Matrix, name: str, shape: Shape, form: Form):
        self.block: Tensor | None = None  # its lower triangle alone where a factor stands in it
        self.lent = False  # whether others may hold the block: then no factor may stand in it
        self._matrix: Matrix = matrix
        self._form: Form = form
        self._name, self._shape = name, shape
        self._rows = Rows()
        self._pending: tuple[Tensor, Tensor] | None = None  # inputs [n, d] and outputs' Hessians [n, o, o] of a batch

    @property
    def device(self) -> torch.device:
        held = self.block if self._pending is None else self._pending[0]
        return torch.device("cpu") if held is None else held.device

    @property
    def begun(self) -> bool:
        """Whether anything was added."""
        return self.block is not None or self._pending is not None

    def finish(self) -> Tensor:
        """The block with all that was shown; where a factor stands in its square, the lower triangle is."""
        self._flush()
        self._rows.end(self.block)
        if self.block is None:
            raise ValueError("ExactBlock: not fitted; call fit first")
        return self.block

    def finish_flat(self) -> Tensor:
        """The same as a matrix [P, P]."""
        block = self.finish()
        return block.view(math.isqrt(block.numel()), -1)

    def own(self) -> None:
        """Sees to it that nobody else holds the block."""
        if self.lent:
            self.block, self.lent = self.finish().clone(memory_format=torch.contiguous_format), False

    def check_batch(
        self, op: str, inputs: Tensor, logits: Tensor, labels: Tensor | None, weights: Tensor | None
    ) -> HeadBatch:
        """Raises what is wrong with a batch, or with the room for a block, before anything is changed."""
        check_layer(op, inputs, logits)
        d, c = inputs.shape[1], logits.shape[1]
        empirical = self._matrix == "empirical_fisher"
        if labels is not None:
            check_labels(op, labels, len(inputs), c)
        elif empirical:
            raise ValueError(f"{op}: matrix='empirical_fisher' needs labels")
        if self.block is not None and self.block.shape != (c, d, c, d):
            held = list(self.block.shape[:2])
            raise ValueError(f"{op}: a batch must agree with the block's [c, d] = {held}, got [{c}, {d}]")
        weights = check_values(op, inputs, logits, weights)
        probs = logits.to(inputs.dtype).softmax(1)
        return HeadBatch(self._block_for(inputs, (c, d)), inputs, probs, labels if empirical else None, weights)

    def add_batch(self, batch: HeadBatch) -> None:
        """Adds Σ_i w_i H_i ⊗ a_i a_iᵀ."""
        if batch.labels is None:
            self.block = ops.ggn_block(batch.inputs, batch.probs, batch.weights, out=batch.block)
        else:
            self.add_roots(batch, batch.roots, sign=1)

    def add_roots(self, batch: HeadBatch, roots: Tensor, sign: int) -> None:
        """Adds Σ_i H_i ⊗ a_i a_iᵀ, or takes it out, from roots of H_i."""
        c = roots.shape[1]
        each = max(1, limits.EXACT_ENTRIES // (c * c))
        for part, x in zip(roots.split(each), batch.inputs.split(each), strict=True):
            ops.kronecker_block(x, sign * part @ part.mT, out=batch.block)
        self.block = batch.block

    def add_gradients(self, gradients: Gradients, weights: Tensor, column: int) -> None:
        """Adds Σ_i weights[i] vec(g_i) vec(g_i)ᵀ: a column of the curvature of a layer that is not the head."""
        g, o, d = self._shape
        if column == 0:
            self._flush()
        if isinstance(gradients, Dense) and g == gradients.positions == 1 and gradients.activations == "inputs":
            a, u = gradients.inputs[0, :, 0], gradients.output_grads[0, :, 0]
            if len(a) * o * o <= max(limits.EXACT_ENTRIES, (o * d) ** 2 // 10):
                # All columns have the inputs in common: their outer products are added up before the inputs' come in.
                if self._pending is None:
                    self._pending = a, u.new_zeros((len(u), o, o))
                self._pending[1].baddbmm_((u * weights.to(u)[:, None])[:, :, None], u[:, None, :])
                return
        for begin in range(0, len(gradients), limits.EXACT_GRADIENTS):
            end = begin + limits.EXACT_GRADIENTS
            rows = gradients.rows(begin, end).formed().flatten(1)
            self.block = self._block_for(rows, (g * o, d))
            self._rows.add(rows, weights[begin:end], self.block)

    def add_hessian(self, total: Tensor, blocks: Sequence[Block]) -> None:
        """Adds the Hessian of `total` over the parameters of `blocks`, the derivatives of its gradient, row by row."""
        parameters = list({parameter: None for block in blocks for parameter in block.parameters})
        size = sum(block.size for block in blocks)
        g, o, d = self._shape
        self.block = self._block_for(parameters[0], (g * o, d))
        flat = self.block.view(size, size)

        def join(of_parameters: Sequence[Tensor | None]) -> Tensor:
            pairs = zip(parameters, of_parameters, strict=True)
            values = {p: torch.zeros_like(p) if value is None else value for p, value in pairs}
            return torch.cat([block.matrix(values).flatten() for block in blocks])

        gradient = join(torch.autograd.grad(total, parameters, create_graph=True, allow_unused=True))
        if not gradient.requires_grad:
            return  # The loss is linear in the parameters: its Hessian is zero.
        for k in range(size):
            row = torch.autograd.grad(gradient[k], parameters, retain_graph=True, allow_unused=True)
            flat[k] += join(row).to(flat)

    def _flush(self) -> None:
        """Adds what is pending to the block."""
        if self._pending is not None:
            inputs, outer = self._pending
            self.block = self._block_for(inputs, (outer.shape[1], inputs.shape[1]))
            ops.kronecker_block(inputs, outer, out=self.block)
            self._pending = None

    def _block_for(self, like: Tensor, shape: tuple[int, int]) -> Tensor:
        """The block, or zeros of shape [c, d, c, d] where there is none yet and memory suffices."""
        if self.block is not None:
            return self.block
        given = self._shape if math.prod(self._shape) == math.prod(shape) else (1, *shape)
        check_room(self._name, given, self._form, like.element_size(), like.device)
        return torch.zeros((*shape, *shape), dtype=like.dtype, device=like.device)


class Rows:
    """Σ_i weights[i] v_i v_iᵀ into a block [P, P], for rows v_i that come a few at a time."""

    def __init__(self) -> None:
        self._rows: Tensor | None = None  # [GATHERED_ROWS, P], those that wait, times the roots of their weights
        self._waiting = 0

    def add(self, rows: Tensor, weights: Tensor, block: Tensor) -> None:
        """Rows [n, P] and weights [n] >= 0; whenever there are enough, they go into the block."""
        if self._rows is None:
            self._rows = rows.new_empty((limits.GATHERED_ROWS, rows.shape[1]))
        rows = rows * weights.to(rows).sqrt()[:, None]
        while len(rows):
            some = rows[: limits.GATHERED_ROWS - self._waiting]
            self._rows[self._waiting : self._waiting + len(some)] = some
            self._waiting += len(some)
            rows = rows[len(some) :]
            if self._waiting == limits.GATHERED_ROWS:
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
