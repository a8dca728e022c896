"""The exact curvature block of a linear layer under softmax cross-entropy."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastif import ops
from fastif.curvature.cholesky import check_damping, factorize

Matrix = Literal["ggn", "hessian", "empirical_fisher"]
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
    """

    def __init__(self, damping: float | Literal["auto"] = 1e-3, matrix: Matrix = "ggn", name: str = "head"):
        check_damping(damping)
        if matrix not in ("ggn", "hessian", "empirical_fisher"):
            raise ValueError(f"ExactBlock: matrix must be 'ggn', 'hessian' or 'empirical_fisher', got {matrix!r}")
        self.damping: float | Literal["auto"] = damping
        self.matrix, self.name = matrix, name
        self._block: Tensor | None = None  # [c, d, c, d]
        self._factor: Tensor | None = None  # [c·d, c·d] float64

    def fit(
        self, inputs: Tensor, logits: Tensor, labels: Tensor | None = None, weights: Tensor | None = None
    ) -> ExactBlock:
        """Builds the curvature anew; arguments as in `update`."""
        self._block = None
        return self.update(inputs, logits, labels, weights)

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
        return self._add(inputs, logits, labels, weights, sign=1)

    def downdate(
        self, inputs: Tensor, logits: Tensor, labels: Tensor | None = None, weights: Tensor | None = None
    ) -> ExactBlock:
        """Takes examples out again; arguments as in `update`, weights as they were added. docs/math.md (14)."""
        if self._block is None:
            raise ValueError("ExactBlock: downdate needs a fitted block; call fit or update first")
        return self._add(inputs, logits, labels, weights, sign=-1)

    def solve(self, rhs: Tensor) -> Tensor:
        """(G + λI)⁻¹ rhs for rhs [..., c, d], in the dtype of rhs. Raises NotPositiveDefinite with a diagnosis."""
        columns = self._columns("solve", rhs)
        return torch.cholesky_solve(columns, self.factor).T.reshape(rhs.shape).to(rhs.dtype)

    def sq_norms(self, rhs: Tensor) -> Tensor:
        """rhs_iᵀ (G + λI)⁻¹ rhs_i for each i of rhs [m, c, d] → [m]: half the work of `solve`."""
        half = torch.linalg.solve_triangular(self.factor, self._columns("sq_norms", rhs), upper=False)
        return half.square().sum(0).to(rhs.dtype)

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
        if rhs.shape[-2:] != (c, d):
            raise ValueError(f"ExactBlock.{op}: rhs must be [..., c={c}, d={d}], got {list(rhs.shape)}")
        return rhs.reshape(-1, c * d).T.to(self.factor)

    def _add(self, inputs: Tensor, logits: Tensor, labels: Tensor | None, weights: Tensor | None, sign: int):
        if logits.dim() != 2 or inputs.dim() != 2 or logits.shape[0] != inputs.shape[0]:
            raise ValueError(
                "ExactBlock: inputs must be [n, d] and logits [n, c], "
                f"got {list(inputs.shape)} and {list(logits.shape)}"
            )
        if inputs.shape[0] == 0:
            raise ValueError("ExactBlock: inputs must hold at least one example, got 0")
        (n, d), c = inputs.shape, logits.shape[1]
        if weights is None:
            weights = inputs.new_full((n,), 1 / n)
        weights = weights.to(inputs)
        if self._block is None:
            self._block = inputs.new_zeros((c, d, c, d))
        elif self._block.shape != (c, d, c, d):
            raise ValueError(
                f"ExactBlock: batches must agree with the block [c, d] = {list(self._block.shape[:2])}, got [{c}, {d}]"
            )
        self._factor = None
        probs = logits.to(inputs.dtype).softmax(1)
        if self.matrix == "empirical_fisher":
            self._add_empirical_fisher(inputs, probs, labels, sign * weights)
        elif sign > 0:
            ops.ggn_block(inputs, probs, weights, out=self._block)
        else:
            self._block -= ops.ggn_block(inputs, probs, weights)
        return self

    def _add_empirical_fisher(self, inputs: Tensor, probs: Tensor, labels: Tensor | None, weights: Tensor) -> None:
        if labels is None:
            raise ValueError("ExactBlock: matrix='empirical_fisher' needs labels")
        residuals = output_grads(probs, labels)
        rows = self.block.view(probs.shape[1] * inputs.shape[1], -1)
        for a, u, w in zip(inputs.split(_ROWS), residuals.split(_ROWS), weights.split(_ROWS), strict=True):
            gradients = (u[:, :, None] * a[:, None, :]).flatten(1)  # [rows, c·d]
            rows.addmm_((gradients * w[:, None]).T, gradients)


def output_grads(probs: Tensor, labels: Tensor) -> Tensor:
    """Gradients of softmax cross-entropy with respect to the logits, p_i − y_i, [n, c]."""
    residuals = probs.clone()
    residuals[torch.arange(len(labels), device=labels.device), labels] -= 1
    return residuals
