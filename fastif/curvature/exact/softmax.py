"""A linear layer under softmax cross-entropy: what is asked of its inputs and outputs, and its outputs' derivatives."""

from __future__ import annotations

import torch
from torch import Tensor


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


def check_values(op: str, inputs: Tensor, logits: Tensor, weights: Tensor | None) -> Tensor:
    """Returns the weights, by default 1/n each."""
    n = len(inputs)
    weights = inputs.new_full((n,), 1 / n) if weights is None else weights.to(inputs)
    if weights.shape != (n,) or not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError(f"{op}: weights must be [n={n}], finite and >= 0, got shape {list(weights.shape)}")
    finite = inputs.isfinite().all(1) & logits.isfinite().all(1)
    if not bool(finite.all()):
        raise ValueError(f"{op}: inputs and logits must be finite, row {int((~finite).nonzero()[0])} is not")
    return weights


def output_grads(probs: Tensor, labels: Tensor) -> Tensor:
    """Gradients of softmax cross-entropy with respect to the logits, p_i − y_i, [n, c]."""
    residuals = probs.clone()
    residuals[torch.arange(len(labels), device=labels.device), labels] -= 1
    return residuals


def output_roots(probs: Tensor) -> Tensor:
    """Columns r_is with Σ_s r_is r_isᵀ = diag(p_i) − p_i p_iᵀ, [n, c, s]: √p_is (e_s − p_i), docs/math.md (15)."""
    scale = probs.sqrt()
    roots = -probs[:, :, None] * scale[:, None, :]
    others = probs @ (1 - torch.eye(probs.shape[1], dtype=probs.dtype, device=probs.device))  # 1 − p with its digits
    roots.diagonal(dim1=1, dim2=2).copy_(others * scale)
    return roots
