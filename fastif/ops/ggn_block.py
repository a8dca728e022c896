"""Curvature blocks of a linear layer: the Gauss-Newton matrix under softmax cross-entropy, and any other."""

from __future__ import annotations

import math
from collections.abc import Callable

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
            sum to 1 within 1e-3, a result that could overflow, an out that shares memory with an input, is a negative
            view or, outside inference mode, an inference tensor. out is then as it was.
        TypeError: no tensors, or dtypes that differ or are not floating.
        MemoryError: a result that cannot be held.

    >>> block = ggn_block(torch.tensor([[2.0]]), torch.tensor([[0.25, 0.75]]))
    >>> block.view(2, 2)
    tensor([[ 0.7500, -0.7500],
            [-0.7500,  0.7500]])
    """
    op = "ggn_block"
    check.rank(op, "features", "[n, d]", features, 2)
    check.rank(op, "probs", "[n, c]", probs, 2)
    if weights is None:
        check.floating(op, "features", features)
        weights = features.new_full((features.shape[0],), 1 / max(1, features.shape[0]))
    check.tensor(op, "weights", weights)
    inputs = features.detach(), probs.detach(), weights.detach()
    return _add_to(op, out, probs.shape[1], inputs, torch.ops.fastif.ggn_block_)


def _add_to(op: str, out: Tensor | None, c: int, inputs: tuple[Tensor, ...], kernel: Callable) -> Tensor:
    features = inputs[0]
    block = "[c, d, c, d]", (c, features.shape[1]) * 2, features.dtype
    result: Tensor = check.call(op, *block, features.new_zeros, block[1]) if out is None else out
    check.tensor(op, "out", result)
    # Here too: without grad mode the kernels cannot tell.
    check.require(not result.requires_grad, f"{op}: out must not require grad (the op is not differentiable)")
    check.call(op, *block, kernel, result, *inputs)
    return result


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
        ValueError: wrong shapes, NaN or Inf (with the row's index), a result that could overflow, an out that shares
            memory with an input, is a negative view or, outside inference mode, an inference tensor. out is then as it
            was.
        TypeError: no tensors, or dtypes that differ or are not floating.
        MemoryError: a result that cannot be held.

    >>> kronecker_block(torch.tensor([[2.0]]), torch.tensor([[[1.0, 3.0], [3.0, -1.0]]])).view(2, 2)
    tensor([[ 4., 12.],
            [12., -4.]])
    """
    op = "kronecker_block"
    check.rank(op, "features", "[n, d]", features, 2)
    check.rank(op, "outer", "[n, c, c]", outer, 3)
    inputs = features.detach(), outer.detach()
    return _add_to(op, out, outer.shape[1], inputs, torch.ops.fastif.kronecker_block_)


@torch.library.register_fake("fastif::ggn_block_")
def _fake(out, features, probs, weights):
    _check_shapes(out, features, probs, weights, fake=True)


def _check_shapes(out, features, probs, weights, fake=False):
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
    _check_out(op, out, c, d, fake, features=features, probs=probs, weights=weights)


def _check_out(op, out, c, d, fake, **inputs):
    check.tensor(op, "out", out)
    check.require(
        out.shape == (c, d, c, d) and out.is_contiguous(),
        f"{op}: out must be a contiguous [c, d, c, d] = [{c}, {d}, {c}, {d}], got {list(out.shape)} "
        f"with strides {list(out.stride())}",
    )
    if not fake:
        for name, x in inputs.items():
            check.memory(op, name, x)
    check.out(op, out, fake=fake, **inputs)


def _check_no_overflow(op, out, largest, added, also):
    """check_no_overflow of csrc/ggn_block/ggn_block.h."""
    held, limit = _largest_entry(out), _overflow_limit(out)
    if not math.isfinite(held):
        check.finite_rows(op, "out", out)
    check.require(
        largest * largest <= limit and added <= limit and held + added <= (3e38 if limit == 1e38 else 1.5e308),
        f"{op}: the result overflows: the largest |feature| is {largest:g}{also}, the largest |out| is {held:g}",
    )


def _largest_entry(x):
    low, high = x.aminmax()
    return max(high.item(), -low.item())  # NaN stays NaN


def _overflow_limit(out):
    return 1e38 if out.dtype == torch.float32 else 1e300


@torch.library.register_fake("fastif::kronecker_block_")
def _kronecker_fake(out, features, outer):
    _check_kronecker_shapes(out, features, outer, fake=True)


def _check_kronecker_shapes(out, features, outer, fake=False):
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
    _check_out(op, out, c, d, fake, features=features, outer=outer)


@plain("ggn_block_")
def _plain(out, features, probs, weights):
    op = "ggn_block"
    _check_shapes(out, features, probs, weights)
    c = probs.shape[1]
    for name, x in (("features", features), ("probs", probs), ("weights", weights)):
        check.finite_rows(op, name, x)
    check.require(weights.min().item() >= 0, f"{op}: weights must be >= 0, got {weights.min().item():g}")
    largest, total = _largest_entry(features), weights.sum().item()
    _check_no_overflow(op, out, largest, largest * largest * total, f", the weights sum to {total:g}")
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
    op = "kronecker_block"
    for name, x in (("features", features), ("outer", outer)):
        check.finite_rows(op, name, x)
    largest, highest = _largest_entry(features), _largest_entry(outer)
    added = len(features) * highest * largest * largest
    if not added <= _overflow_limit(out):  # row by row, as the largest of both may stand in different ones
        features_of_row, outer_of_row = (x.flatten(1).abs().amax(1).double() for x in (features, outer))
        added = (features_of_row.square() * outer_of_row).sum().item()
    _check_no_overflow(op, out, largest, added, f", the largest |outer| is {highest:g}")
    for a in range(outer.shape[1]):
        for b in range(a + 1):
            gram = (features * outer[:, a, b, None]).T @ features
            gram = gram.tril() + gram.tril(-1).T  # symmetric to the bit
            out[a, :, b] += gram
            if b < a:
                out[b, :, a] += gram
