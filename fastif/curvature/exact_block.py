"""The exact curvature block of a linear layer under softmax cross-entropy."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fastif import ops
from fastif.curvature.cholesky import check_damping, factorize
from fastif.curvature.directions import Directions, Explicit
from fastif.gradients import Gradients
from fastif.losses import Fisher

Matrix = Literal["ggn", "hessian", "empirical_fisher"]
_ENTRIES = 1 << 22  # of gradients that are formed at a time where they have to be
_ROWS = 1024  # examples per product where rows of c·d entries have to be formed


class ExactBlock:
    """Curvature of a linear layer whose outputs are the logits, exact over all pairs of classes; Cholesky solves.

    G = Σ_i w_i H_i ⊗ a_i a_iᵀ of shape [c·d, c·d], with layer inputs a_i (and a trailing 1 where there is a bias) and
    H_i = diag(p_i) − p_i p_iᵀ for `matrix="ggn"`. Logits are linear in the layer's parameters, so `"hessian"` is the
    same matrix here. `"empirical_fisher"` is another one: H_i = (p_i − y_i)(p_i − y_i)ᵀ, y_i the one-hot label.
    docs/math.md (6), (14).

    Batches stream in through `update`, examples are taken out through `downdate`; the factor is made on demand.

    Args:
        damping: absolute λ >= 0 added to the diagonal of the mean-loss curvature, or "auto": the smallest power of
            ten with which the block is positive definite (see `damping_used`). Softmax leaves d directions flat, so
            0 never suffices for "ggn".
        matrix: which curvature.
        name: of the layer, for messages.
        joint: in `Influence`, one block over all the layers that it is chosen for, with what they have in common.
    """

    def __init__(
        self,
        damping: float | Literal["auto"] = 1e-3,
        matrix: Matrix = "ggn",
        name: str = "head",
        joint: bool = False,
    ):
        check_damping(damping)
        if matrix not in ("ggn", "hessian", "empirical_fisher"):
            raise ValueError(f"ExactBlock: matrix must be 'ggn', 'hessian' or 'empirical_fisher', got {matrix!r}")
        self.damping: float | Literal["auto"] = damping
        self.matrix, self.name, self.joint = matrix, name, joint
        self._shape: tuple[int, ...] = ()  # [g, o, d] of a layer that is given by its gradients
        self._block: Tensor | None = None  # [c, d, c, d]
        self._factor: Tensor | None = None  # [c·d, c·d] float64

    passes = 1

    @property
    def fisher(self) -> Fisher:
        """The gradients of which a block that is not a head is built."""
        return "empirical" if self.matrix == "empirical_fisher" else "exact"

    def begin(self, name: str, shape: tuple[int, int, int]) -> None:
        """Forgets what was learned; the block has g matrices [o, d], which are taken as one [g·o, d]."""
        self.name, self._shape, self._block, self._factor = name, shape, None, None

    def observe(self, gradients: Gradients, weights: Tensor, column: int, turn: int) -> None:
        """Adds Σ_i weights[i] vec(g_i) vec(g_i)ᵀ: a column of the curvature of a layer that is not the head."""
        del column, turn
        if self.matrix == "hessian":
            raise ValueError(
                f"ExactBlock: matrix='hessian' is available for the head, where it equals the GGN; {self.name!r} is "
                "none: choose 'ggn'"
            )
        g, o, d = self._shape
        for begin in range(0, len(gradients), _ROWS):
            rows = gradients.rows(begin, begin + _ROWS).formed().flatten(1)
            if self._block is None:
                self._block = rows.new_zeros((g * o, d, g * o, d))
            flat = self._block.view(rows.shape[1], rows.shape[1])
            flat.addmm_((rows * weights[begin : begin + _ROWS].to(rows)[:, None]).T, rows)
        self._factor = None

    def end(self, turn: int) -> None:
        """Makes the factor; raises NotPositiveDefinite with a diagnosis."""
        del turn
        _ = self.factor

    def directions(self, gradients: Gradients) -> Directions:
        """The query side of pairwise scores."""
        return Explicit(self.solve(gradients.formed()))

    def state_dict(self) -> dict[str, Tensor]:
        return {"block": self.block}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._block, self._factor = state["block"], None

    @staticmethod
    def footprint(shape: tuple[int, int, int], table: bool, item: int) -> tuple[int, int]:
        """Bytes held: the block and its float64 factor; and taken beside them: two copies on the way."""
        del table
        return math.prod(shape) ** 2 * (item + 8), math.prod(shape) ** 2 * 16

    def fit(
        self, inputs: Tensor, logits: Tensor, labels: Tensor | None = None, weights: Tensor | None = None
    ) -> ExactBlock:
        """Builds the curvature anew; arguments as in `update`."""
        before, self._block = self._block, None
        try:
            return self.update(inputs, logits, labels, weights)
        except Exception:
            self._block = before
            raise

    def update(
        self, inputs: Tensor, logits: Tensor, labels: Tensor | None = None, weights: Tensor | None = None
    ) -> ExactBlock:
        """Adds a batch.

        Args:
            inputs: [n, d] float32 or float64, the layer's inputs.
            logits: [n, c], its outputs.
            labels: [n] int64, needed for "empirical_fisher".
            weights: [n] >= 0; default 1/n each. Over all batches they should sum to 1 for the curvature of a mean loss.
        """
        return self._add("update", inputs, logits, labels, weights, sign=1)

    def downdate(
        self, inputs: Tensor, logits: Tensor, labels: Tensor | None = None, weights: Tensor | None = None
    ) -> ExactBlock:
        """Takes examples out again; arguments as in `update`, weights as they were added. docs/math.md (14)."""
        if self._block is None:
            raise ValueError("ExactBlock: downdate needs a fitted block; call fit or update first")
        return self._add("downdate", inputs, logits, labels, weights, sign=-1)

    def solve(self, rhs: Tensor) -> Tensor:
        """(G + λI)⁻¹ rhs for rhs [..., c, d] or [..., g, o, d], in the dtype of rhs.

        Raises NotPositiveDefinite with a diagnosis.
        """
        columns = self._columns("solve", rhs)
        return torch.cholesky_solve(columns, self.factor).T.reshape(rhs.shape).to(rhs.dtype)

    def sq_norms(self, gradients: Gradients) -> Tensor:
        """g_iᵀ (G + λI)⁻¹ g_i, [n]: half the work of `solve`."""
        parts = []
        each = max(1, _ENTRIES // len(self.factor))
        for begin in range(0, len(gradients), each):
            columns = self._columns("sq_norms", gradients.rows(begin, begin + each).formed())
            half = torch.linalg.solve_triangular(self.factor, columns, upper=False)
            parts.append(half.square().sum(0).to(self.block.dtype))
        return torch.cat(parts)

    def inverse(self) -> Tensor:
        """(G + λI)⁻¹ as a matrix [c·d, c·d], float64."""
        return torch.cholesky_inverse(self.factor)

    @property
    def block(self) -> Tensor:
        """G without damping, [c, d, c, d]."""
        if self._block is None:
            raise ValueError("ExactBlock: not fitted; call fit first")
        return self._block

    @property
    def factor(self) -> Tensor:
        """Lower Cholesky factor of G + λI, [c·d, c·d] float64."""
        if self._factor is None:
            c, d = self.block.shape[:2]
            self._factor, self._damping_used = factorize(self.block.view(c * d, c * d), self.damping, self.name)
        return self._factor

    @property
    def damping_used(self) -> float:
        """λ of the factor: the number given, or what "auto" found."""
        _ = self.factor
        return self._damping_used

    def _columns(self, op: str, rhs: Tensor) -> Tensor:
        c, d = self.block.shape[:2]
        if rhs.dim() >= 3 and rhs.shape[-3:] == self._shape:
            rhs = rhs.flatten(-3, -2)
        if rhs.shape[-2:] != (c, d):
            raise ValueError(f"ExactBlock.{op}: rhs must be [..., c={c}, d={d}], got {list(rhs.shape)}")
        return rhs.reshape(-1, c * d).T.to(self.factor)

    def _add(
        self, name: str, inputs: Tensor, logits: Tensor, labels: Tensor | None, weights: Tensor | None, sign: int
    ) -> ExactBlock:
        op = f"ExactBlock.{name}"
        check_layer(op, inputs, logits)
        (n, d), c = inputs.shape, logits.shape[1]
        if labels is not None:
            check_labels(op, labels, n, c)
        elif self.matrix == "empirical_fisher":
            raise ValueError(f"{op}: matrix='empirical_fisher' needs labels")
        if self._block is not None and self._block.shape != (c, d, c, d):
            held = list(self._block.shape[:2])
            raise ValueError(f"{op}: a batch must agree with the block's [c, d] = {held}, got [{c}, {d}]")
        weights = inputs.new_full((n,), 1 / n) if weights is None else weights.to(inputs)
        if weights.shape != (n,) or not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ValueError(f"{op}: weights must be [n={n}], finite and >= 0, got shape {list(weights.shape)}")
        probs = logits.to(inputs.dtype).softmax(1)
        # Nothing is changed before a batch has passed every check: a refused one leaves the block as it was.
        if self.matrix != "empirical_fisher" and self._block is not None and sign > 0:
            ops.ggn_block(inputs, probs, weights, out=self._block)
        else:
            if self.matrix == "empirical_fisher":
                assert labels is not None
                batch = empirical_fisher(inputs, output_grads(probs, labels), weights)
            else:
                batch = ops.ggn_block(inputs, probs, weights)
            self._block = batch if self._block is None else self._block.add_(batch, alpha=sign)
        self._factor = None
        return self


def empirical_fisher(inputs: Tensor, residuals: Tensor, weights: Tensor) -> Tensor:
    """Σ_i w_i g_i g_iᵀ as [c, d, c, d] for the gradients g_i = residuals_i inputs_iᵀ, docs/math.md (6)."""
    (_, d), c = inputs.shape, residuals.shape[1]
    block = inputs.new_zeros((c * d, c * d))
    for a, u, w in zip(inputs.split(_ROWS), residuals.split(_ROWS), weights.split(_ROWS), strict=True):
        gradients = (u[:, :, None] * a[:, None, :]).flatten(1)  # [rows, c·d]
        block.addmm_((gradients * w[:, None]).T, gradients)
    if not bool(block.isfinite().all()):
        raise ValueError("ExactBlock: the empirical Fisher is not finite; look for NaN, Inf or overflow in the inputs")
    return block.view(c, d, c, d)


def check_layer(op: str, inputs: Tensor, logits: Tensor) -> None:
    if logits.dim() != 2 or inputs.dim() != 2 or logits.shape[0] != inputs.shape[0]:
        raise ValueError(
            f"{op}: inputs must be [n, d] and logits [n, c], got {list(inputs.shape)} and {list(logits.shape)}"
        )
    if inputs.shape[0] == 0:
        raise ValueError(f"{op}: inputs must hold at least one example, got 0")
    if inputs.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: inputs must be float32 or float64, got {inputs.dtype}")


def check_labels(op: str, labels: Tensor, n: int, c: int) -> None:
    if labels.dtype != torch.int64 or labels.shape != (n,):
        raise ValueError(f"{op}: labels must be int64 [n={n}], got {labels.dtype} {list(labels.shape)}")
    if n and not 0 <= int(labels.min()) <= int(labels.max()) < c:
        raise ValueError(f"{op}: labels must be in [0, c={c}), got {int(labels.min())} to {int(labels.max())}")


def output_grads(probs: Tensor, labels: Tensor) -> Tensor:
    """Gradients of softmax cross-entropy with respect to the logits, p_i − y_i, [n, c]."""
    residuals = probs.clone()
    residuals[torch.arange(len(labels), device=labels.device), labels] -= 1
    return residuals
