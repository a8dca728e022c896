"""Sums, norms and dot products of the per-sample gradients of a linear map, which are never stored.

Example i has layer inputs a_it and output gradients u_it at positions t (t = 1 for a plain layer on one vector); its
gradient is g_i = Σ_t u_it a_itᵀ, of shape [o, d]. docs/math.md (8).

Every function takes inputs [n, t, d] and output_grads [n, t, o] (or [n, d] and [n, o] for t = 1), float32 or float64,
and raises ValueError for shapes that do not fit and for NaN or Inf (with the row's index), TypeError for other dtypes.
All are differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastif.ops import _checks as check
from fastif.ops._library import plain


def accumulate(
    inputs: Tensor,
    output_grads: Tensor,
    weights: Tensor | None = None,
    groups: Tensor | None = None,
    num_groups: int = 1,
) -> Tensor:
    """Weighted sums of per-sample gradients by group, in one pass: out[s] = Σ_{i: groups[i]=s} w_i g_i, [g, o, d].

    Args:
        inputs, output_grads: [n, t, d] and [n, t, o].
        weights: [n]; default 1 each.
        groups: [n] int64 in [0, num_groups), for example class labels; default one group. Empty groups give zeros.
        num_groups: g.

    >>> a, u = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0], [-1.0]])
    >>> accumulate(a, u, groups=torch.tensor([1, 1]), num_groups=2).tolist()
    [[[0.0, 0.0]], [[-2.0, -2.0]]]
    """
    n = inputs.shape[0]
    if weights is None:
        weights = inputs.new_ones(n)
    if groups is None:
        groups = torch.zeros(n, dtype=torch.int64, device=inputs.device)
    return torch.ops.fastif.per_sample_grad_accumulate(
        *_with_positions(inputs, output_grads), weights, groups, num_groups
    )


def sq_norms(inputs: Tensor, output_grads: Tensor) -> Tensor:
    """Squared norms of the per-sample gradients, ‖g_i‖² = Σ_{t,t'} (u_it·u_it')(a_it·a_it'), [n].

    >>> sq_norms(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0]])).tolist()
    [100.0]
    """
    return torch.ops.fastif.per_sample_grad_sq_norms(*_with_positions(inputs, output_grads))


def dots(inputs: Tensor, output_grads: Tensor, directions: Tensor) -> Tensor:
    """Dot products of every per-sample gradient with every direction, ⟨V_q, g_i⟩ = Σ_t u_itᵀ V_q a_it, [q, n].

    Args:
        inputs, output_grads: [n, t, d] and [n, t, o].
        directions: [q, o, d], q >= 1.

    >>> dots(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), torch.tensor([[[1.0, 1.0]]])).tolist()
    [[9.0]]
    """
    return torch.ops.fastif.per_sample_grad_dots(*_with_positions(inputs, output_grads), directions)


def _with_positions(inputs: Tensor, output_grads: Tensor) -> tuple[Tensor, Tensor]:
    if inputs.dim() == 2 and output_grads.dim() == 2:
        return inputs[:, None], output_grads[:, None]
    return inputs, output_grads


@torch.library.register_fake("fastif::per_sample_grad_accumulate")
def _(inputs, output_grads, weights, groups, num_groups):
    _check_linear_map("per_sample_grad.accumulate", inputs, output_grads)
    check.same_type("per_sample_grad.accumulate", "weights", weights, "inputs", inputs)
    return inputs.new_empty((num_groups, output_grads.shape[2], inputs.shape[2]))


@torch.library.register_fake("fastif::per_sample_grad_sq_norms")
def _(inputs, output_grads):
    _check_linear_map("per_sample_grad.sq_norms", inputs, output_grads)
    return inputs.new_empty((inputs.shape[0],))


@torch.library.register_fake("fastif::per_sample_grad_dots")
def _(inputs, output_grads, directions):
    _check_linear_map("per_sample_grad.dots", inputs, output_grads)
    check.same_type("per_sample_grad.dots", "directions", directions, "inputs", inputs)
    return inputs.new_empty((directions.shape[0], inputs.shape[0]))


# Derivatives. Each op is linear or quadratic in each of its arguments.


def _pull_back(inputs: Tensor, output_grads: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of Σ_i ⟨V_i, g_i⟩ with respect to inputs and output_grads, V_i = direction[i] [n, o, d]."""
    return output_grads @ direction, inputs @ direction.transpose(1, 2)


def _accumulate_backward(ctx, grad):
    inputs, output_grads, weights, groups = ctx.saved_tensors
    direction = grad.index_select(0, groups)
    to_inputs, to_output_grads = _pull_back(inputs, output_grads, direction * weights[:, None, None])
    to_weights = (torch.einsum("nto,nod->ntd", output_grads, direction) * inputs).sum((1, 2))
    return to_inputs, to_output_grads, to_weights, None, None


def _sq_norms_backward(ctx, grad):
    inputs, output_grads = ctx.saved_tensors
    gradients = output_grads.transpose(1, 2) @ inputs
    return _pull_back(inputs, output_grads, 2 * grad[:, None, None] * gradients)


def _dots_backward(ctx, grad):
    inputs, output_grads, directions = ctx.saved_tensors
    to_inputs, to_output_grads = _pull_back(inputs, output_grads, torch.einsum("qn,qod->nod", grad, directions))
    return to_inputs, to_output_grads, torch.einsum("qn,nto,ntd->qod", grad, output_grads, inputs)


def _save_tensors(ctx, inputs, output):
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))


for _op, _backward in (
    ("accumulate", _accumulate_backward),
    ("sq_norms", _sq_norms_backward),
    ("dots", _dots_backward),
):
    torch.library.register_autograd(f"fastif::per_sample_grad_{_op}", _backward, setup_context=_save_tensors)


def _check_linear_map(op: str, inputs: Tensor, output_grads: Tensor) -> None:
    check.rank(op, "inputs", "[n, t, d]", inputs, 3)
    check.rank(op, "output_grads", "[n, t, o]", output_grads, 3)
    check.floating(op, "inputs", inputs)
    check.same_type(op, "output_grads", output_grads, "inputs", inputs)
    shapes = f"{list(inputs.shape)} and {list(output_grads.shape)}"
    check.require(
        inputs.numel() > 0 and output_grads.numel() > 0,
        f"{op}: inputs [n, t, d] and output_grads [n, t, o] must not be empty, got {shapes}",
    )
    check.require(
        inputs.shape[:2] == output_grads.shape[:2], f"{op}: inputs and output_grads must agree in [n, t], got {shapes}"
    )


def _finite(op: str, result: Tensor, inputs: Tensor, output_grads: Tensor) -> Tensor:
    if not result.isfinite().all():
        check.finite_rows(op, "inputs", inputs)
        check.finite_rows(op, "output_grads", output_grads)
        raise ValueError(f"{op}: the result overflows {result.dtype}; pass float64 or scale the inputs")
    return result


@plain("per_sample_grad_accumulate")
def _accumulate_plain(inputs, output_grads, weights, groups, num_groups):
    op = "per_sample_grad.accumulate"
    _check_linear_map(op, inputs, output_grads)
    check.rank(op, "weights", "[n]", weights, 1)
    check.rank(op, "groups", "[n]", groups, 1)
    check.same_type(op, "weights", weights, "inputs", inputs)
    if groups.dtype != torch.int64:
        raise TypeError(f"{op}: groups must be int64, got {groups.dtype}")
    n = inputs.shape[0]
    for name, x in (("weights", weights), ("groups", groups)):
        check.require(x.shape[0] == n, f"{op}: {name} must have n={n} entries, got {x.shape[0]}")
    check.require(num_groups >= 1, f"{op}: num_groups must be >= 1, got {num_groups}")
    lowest, highest = groups.min().item(), groups.max().item()
    check.require(
        0 <= lowest and highest < num_groups,
        f"{op}: groups must be in [0, num_groups={num_groups}), got {lowest if lowest < 0 else highest}",
    )
    check.finite_rows(op, "weights", weights)
    out = inputs.new_zeros((num_groups, output_grads.shape[2], inputs.shape[2]))
    for group in groups.unique().tolist():
        members = groups == group
        scaled = output_grads[members] * weights[members, None, None]
        out[group] = scaled.flatten(0, 1).T @ inputs[members].flatten(0, 1)
    return _finite(op, out, inputs, output_grads)


@plain("per_sample_grad_sq_norms")
def _sq_norms_plain(inputs, output_grads):
    op = "per_sample_grad.sq_norms"
    _check_linear_map(op, inputs, output_grads)
    grams = (inputs @ inputs.transpose(1, 2)) * (output_grads @ output_grads.transpose(1, 2))
    return _finite(op, grams.sum((1, 2)), inputs, output_grads)


@plain("per_sample_grad_dots")
def _dots_plain(inputs, output_grads, directions):
    op = "per_sample_grad.dots"
    _check_linear_map(op, inputs, output_grads)
    check.rank(op, "directions", "[q, o, d]", directions, 3)
    check.same_type(op, "directions", directions, "inputs", inputs)
    o, d = output_grads.shape[2], inputs.shape[2]
    check.require(
        directions.shape[0] >= 1 and directions.shape[1:] == (o, d),
        f"{op}: directions must be [q, o={o}, d={d}] with q >= 1, got {list(directions.shape)}",
    )
    check.finite_rows(op, "directions", directions)
    rows = [((output_grads @ direction) * inputs).sum((1, 2)) for direction in directions]
    return _finite(op, torch.stack(rows), inputs, output_grads)
