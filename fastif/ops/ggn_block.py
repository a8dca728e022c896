"""Curvature blocks of a linear layer: the Gauss-Newton matrix under softmax cross-entropy, and any other."""

from __future__ import annotations

import torch
from torch import Tensor

from fastif.ops import _checks as check
from fastif.ops._library import plain


def ggn_block(features: Tensor, probs: Tensor, weights: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Adds Σ_i w_i (diag(p_i) − p_i p_iᵀ) ⊗ a_i a_iᵀ to `out` and returns it: the GGN of a linear layer with softmax.

    The entry for weight [a, j] and weight [b, k] is out[a, j, b, k]. The diagonal of the first factor is formed as
    p_a Σ_{b≠a} p_b, which is p_a (1 − p_a) without its cancellation. Not differentiable. docs/math.md (6).

    Args:
        features: [n, d] float32 or float64, the inputs a_i of the layer.
        probs: [n, c], softmax probabilities p_i.
        weights: [n], >= 0; default 1/n each: the curvature of the mean loss.
        out: [c, d, c, d] contiguous, accumulated into (pass it again for the next batch); default zeros.

    Raises:
        ValueError: wrong shapes, NaN or Inf (with the row's index), negative weights, a row of probs that does not
            sum to 1 within 1e-3.
        TypeError: dtypes that differ or are not floating.

    >>> block = ggn_block(torch.tensor([[2.0]]), torch.tensor([[0.25, 0.75]]))
    >>> block.view(2, 2)
    tensor([[ 0.7500, -0.7500],
            [-0.7500,  0.7500]])
    """
    if weights is None:
        weights = features.new_full((features.shape[0],), 1 / max(1, features.shape[0]))
    if out is None:
        check.rank("ggn_block", "features", "[n, d]", features, 2)
        check.rank("ggn_block", "probs", "[n, c]", probs, 2)
        c, d = probs.shape[1], features.shape[1]
        out = features.new_zeros((c, d, c, d))
    check.require(not out.requires_grad, "ggn_block: out must not require grad (the op is not differentiable)")
    torch.ops.fastif.ggn_block_(out, features.detach(), probs.detach(), weights.detach())
    return out


def kronecker_block(features: Tensor, outer: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Adds Σ_i H_i ⊗ a_i a_iᵀ to `out` and returns it: curvature of a linear layer with any Hessian of its outputs.

    The entry for weight [a, j] and weight [b, k] is out[a, j, b, k]. Both symmetries are used, so that it takes
    n c (c + 1) / 2 d (d + 1) / 2 multiplications; with c = 1 it is the symmetric product of weighted rows. Not
    differentiable. docs/math.md (17).

    Args:
        features: [n, d] float32 or float64, the inputs a_i of the layer.
        outer: [n, c, c], the symmetric H_i, weights included. Their lower triangle is read.
        out: [c, d, c, d] contiguous, accumulated into (pass it again for the next batch); default zeros.

    Raises:
        ValueError: wrong shapes, NaN or Inf (with the row's index).
        TypeError: dtypes that differ or are not floating.

    >>> kronecker_block(torch.tensor([[2.0]]), torch.tensor([[[1.0, 3.0], [3.0, -1.0]]])).view(2, 2)
    tensor([[ 4., 12.],
            [12., -4.]])
    """
    if out is None:
        check.rank("kronecker_block", "features", "[n, d]", features, 2)
        check.rank("kronecker_block", "outer", "[n, c, c]", outer, 3)
        c, d = outer.shape[1], features.shape[1]
        out = features.new_zeros((c, d, c, d))
    check.require(not out.requires_grad, "kronecker_block: out must not require grad (the op is not differentiable)")
    torch.ops.fastif.kronecker_block_(out, features.detach(), outer.detach())
    return out


@torch.library.register_fake("fastif::ggn_block_")
def _fake(out, features, probs, weights):
    _check_shapes(out, features, probs, weights)


def _check_shapes(out, features, probs, weights):
    op = "ggn_block"
    check.rank(op, "features", "[n, d]", features, 2)
    check.rank(op, "probs", "[n, c]", probs, 2)
    check.rank(op, "weights", "[n]", weights, 1)
    check.floating(op, "features", features)
    for name, x in (("probs", probs), ("weights", weights), ("out", out)):
        check.same_type(op, name, x, "features", features)
    (n, d), c = features.shape, probs.shape[1]
    check.require(
        min(n, d, c) >= 1,
        f"{op}: features [n, d] and probs [n, c] must not be empty, got {list(features.shape)} and {list(probs.shape)}",
    )
    check.require(probs.shape[0] == n, f"{op}: probs must have n={n} rows, got {probs.shape[0]}")
    check.require(weights.shape[0] == n, f"{op}: weights must have n={n} entries, got {weights.shape[0]}")
    _check_out(op, out, c, d)


def _check_out(op, out, c, d):
    check.require(
        out.shape == (c, d, c, d) and out.is_contiguous(),
        f"{op}: out must be a contiguous [c, d, c, d] = [{c}, {d}, {c}, {d}], got {list(out.shape)} "
        f"with strides {list(out.stride())}",
    )


@torch.library.register_fake("fastif::kronecker_block_")
def _kronecker_fake(out, features, outer):
    _check_kronecker_shapes(out, features, outer)


def _check_kronecker_shapes(out, features, outer):
    op = "kronecker_block"
    check.rank(op, "features", "[n, d]", features, 2)
    check.rank(op, "outer", "[n, c, c]", outer, 3)
    check.floating(op, "features", features)
    for name, x in (("outer", outer), ("out", out)):
        check.same_type(op, name, x, "features", features)
    (n, d), c = features.shape, outer.shape[1]
    check.require(
        min(n, d, c) >= 1,
        f"{op}: features [n, d] and outer [n, c, c] must not be empty, got {list(features.shape)} and "
        f"{list(outer.shape)}",
    )
    check.require(outer.shape == (n, c, c), f"{op}: outer must be [n, c, c] with n={n}, got {list(outer.shape)}")
    _check_out(op, out, c, d)


@plain("ggn_block_")
def _plain(out, features, probs, weights):
    op = "ggn_block"
    _check_shapes(out, features, probs, weights)
    c = probs.shape[1]
    for name, x in (("features", features), ("probs", probs), ("weights", weights)):
        check.finite_rows(op, name, x)
    largest, total = features.abs().max().item(), weights.sum().item()
    check.require(
        largest * largest * total <= (1e38 if features.dtype == torch.float32 else 1e300),
        f"{op}: the result overflows: the largest |feature| is {largest:g}, the weights sum to {total:g}",
    )
    check.require(weights.min().item() >= 0, f"{op}: weights must be >= 0, got {weights.min().item():g}")
    check.require(probs.min().item() >= 0, f"{op}: probs must be >= 0, got {probs.min().item():g}")
    off = (probs.sum(1) - 1).abs()
    check.require(
        off.max().item() <= 1e-3,
        f"{op}: each row of probs must sum to 1 (within 1e-3), "
        f"row {off.argmax().item()} is off by {off.max().item():g}",
    )
    for a in range(c):
        for b in range(a):
            gram = (features * (weights * probs[:, a] * probs[:, b])[:, None]).T @ features
            gram = gram.tril() + gram.tril(-1).T  # symmetric to the bit
            out[a, :, b] -= gram
            out[b, :, a] -= gram
            out[a, :, a] += gram
            out[b, :, b] += gram


@plain("kronecker_block_")
def _kronecker_plain(out, features, outer):
    _check_kronecker_shapes(out, features, outer)
    for name, x in (("features", features), ("outer", outer)):
        check.finite_rows("kronecker_block", name, x)
    for a in range(outer.shape[1]):
        for b in range(a + 1):
            gram = (features * outer[:, a, b, None]).T @ features
            gram = gram.tril() + gram.tril(-1).T  # symmetric to the bit
            out[a, :, b] += gram
            if b < a:
                out[b, :, a] += gram
