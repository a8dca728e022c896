"""Sums, norms and dot products of the per-sample gradients of a linear map, which are never stored.

Example i has layer inputs a_it and output gradients u_it at positions t (t = 1 for a plain layer on one vector); its
gradient is g_i = Σ_t u_it a_itᵀ, of shape [o, d]. docs/math.md (8).

Every function takes inputs [n, t, d] and output_grads [n, t, o] (or [n, d] and [n, o] for t = 1), both float16,
bfloat16, float32 or float64. Weights, scale, directions and the result are float32, or float64 for float64 inputs; no
sum is formed in fewer bits. ValueError for shapes that do not fit and for NaN or Inf (with the row's index), TypeError
for other dtypes and for no tensors, MemoryError for a result that cannot be held. All are differentiable, in reverse
mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    op = "per_sample_grad.accumulate"
    a, u = _with_positions(op, inputs, output_grads)
    weights = _weights(op, weights, a)
    if groups is None:
        groups = torch.zeros(a.shape[0], dtype=torch.int64, device=a.device)
    check.tensor(op, "groups", groups)
    num_groups = check.integer(op, "num_groups", num_groups)
    check.derivable(op, inputs=a, output_grads=u, weights=weights, groups=groups)
    return _call(op, "[g, o, d]", (num_groups, u.shape[2], a.shape[2]), a, u, weights, groups, num_groups)


def accumulate_squares(inputs: Tensor, output_grads: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted sum of the squared entries of the per-sample gradients, Σ_i w_i (g_i)²_od, [o, d].

    With inputs and output_grads in the eigenbases of their second moments this is EK-FAC's second moment; as they are,
    the diagonal of the empirical Fisher.

    Args:
        inputs, output_grads: [n, t, d] and [n, t, o].
        weights: [n]; default 1 each.

    >>> accumulate_squares(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0], [-1.0]])).tolist()
    [[10.0, 20.0]]
    """
    op = "per_sample_grad.accumulate_squares"
    a, u = _with_positions(op, inputs, output_grads)
    weights = _weights(op, weights, a)
    check.derivable(op, inputs=a, output_grads=u, weights=weights)
    return _call(op, "[o, d]", (u.shape[2], a.shape[2]), a, u, weights)


def sq_norms(inputs: Tensor, output_grads: Tensor, scale: Tensor | None = None) -> Tensor:
    """Squared norms of the per-sample gradients, ‖g_i‖² = Σ_{t,t'} (u_it·u_it')(a_it·a_it'), [n].

    Args:
        inputs, output_grads: [n, t, d] and [n, t, o].
        scale: R [o, d] >= 0; with it, Σ_{od} R_od (g_i)²_od.

    >>> a, u = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0]])
    >>> sq_norms(a, u).tolist(), sq_norms(a, u, scale=torch.tensor([[1.0, 0.5]])).tolist()
    ([100.0], [68.0])
    """
    op = "per_sample_grad.sq_norms"
    a, u = _with_positions(op, inputs, output_grads)
    if scale is not None:
        check.tensor(op, "scale", scale)
    check.derivable(op, inputs=a, output_grads=u, **({} if scale is None else {"scale": scale}))
    return _call(op, "[n]", a.shape[:1], a, u, scale)


def dots(inputs: Tensor, output_grads: Tensor, directions: Tensor) -> Tensor:
    """Dot products of every per-sample gradient with every direction, ⟨V_q, g_i⟩ = Σ_t u_itᵀ V_q a_it, [q, n].

    Args:
        inputs, output_grads: [n, t, d] and [n, t, o].
        directions: [q, o, d], q >= 1.

    >>> dots(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), torch.tensor([[[1.0, 1.0]]])).tolist()
    [[9.0]]
    """
    op = "per_sample_grad.dots"
    a, u = _with_positions(op, inputs, output_grads)
    check.rank(op, "directions", "[q, o, d]", directions, 3)
    check.derivable(op, inputs=a, output_grads=u, directions=directions)
    return _call(op, "[q, n]", (directions.shape[0], a.shape[0]), a, u, directions)


def _call(op: str, axes: str, shape: Sequence[int], inputs: Tensor, *others: Tensor | int | None) -> Tensor:
    kernel = getattr(torch.ops.fastif, op.replace(".", "_"))
    return check.call(op, axes, shape, _result_type(inputs), kernel, inputs, *others)


def _with_positions(op: str, inputs: Tensor, output_grads: Tensor) -> tuple[Tensor, Tensor]:
    check.tensor(op, "inputs", inputs)
    check.tensor(op, "output_grads", output_grads)
    if inputs.dim() == 2 and output_grads.dim() == 2:
        return inputs[:, None], output_grads[:, None]
    check.rank(op, "inputs", "[n, t, d]", inputs, 3)
    check.rank(op, "output_grads", "[n, t, o]", output_grads, 3)
    return inputs, output_grads


def _result_type(inputs: Tensor) -> torch.dtype:
    return torch.float32 if inputs.dtype in (torch.float16, torch.bfloat16) else inputs.dtype


def _weights(op: str, weights: Tensor | None, inputs: Tensor) -> Tensor:
    if weights is None:
        return inputs.new_ones(inputs.shape[0], dtype=_result_type(inputs))
    check.tensor(op, "weights", weights)
    return weights


@torch.library.register_fake("fastif::per_sample_grad_accumulate")
def _(inputs, output_grads, weights, groups, num_groups):
    _check_accumulate("per_sample_grad.accumulate", inputs, output_grads, weights, groups, num_groups)
    return inputs.new_empty((num_groups, output_grads.shape[2], inputs.shape[2]), dtype=_result_type(inputs))


@torch.library.register_fake("fastif::per_sample_grad_accumulate_squares")
def _(inputs, output_grads, weights):
    _check_linear_map("per_sample_grad.accumulate_squares", inputs, output_grads)
    _check_weights("per_sample_grad.accumulate_squares", weights, inputs)
    return inputs.new_empty((output_grads.shape[2], inputs.shape[2]), dtype=_result_type(inputs))


@torch.library.register_fake("fastif::per_sample_grad_sq_norms")
def _(inputs, output_grads, scale=None):
    _check_sq_norms("per_sample_grad.sq_norms", inputs, output_grads, scale)
    return inputs.new_empty((inputs.shape[0],), dtype=_result_type(inputs))


@torch.library.register_fake("fastif::per_sample_grad_dots")
def _(inputs, output_grads, directions):
    _check_dots("per_sample_grad.dots", inputs, output_grads, directions)
    return inputs.new_empty((directions.shape[0], inputs.shape[0]), dtype=_result_type(inputs))


# Derivatives. Each op is linear or quadratic in each of its arguments.


def _saved(ctx) -> tuple[Tensor, Tensor, Tensor]:
    """inputs and output_grads in the type of the result, and the gradients g_i that follow from them, [n, o, d]."""
    inputs, output_grads = (x.to(_result_type(x)) for x in ctx.saved_tensors[:2])
    return inputs, output_grads, output_grads.transpose(1, 2) @ inputs


def _pull_back(inputs: Tensor, output_grads: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of Σ_i ⟨V_i, g_i⟩ with respect to inputs and output_grads, V_i = direction[i] [n, o, d]."""
    return output_grads @ direction, inputs @ direction.transpose(1, 2)


def _accumulate_backward(ctx, grad):
    inputs, output_grads, gradients = _saved(ctx)
    weights, groups = ctx.saved_tensors[2:]
    direction = grad.index_select(0, groups)
    to_weights = (gradients * direction).sum((1, 2))
    return *_pull_back(inputs, output_grads, direction * weights[:, None, None]), to_weights, None, None


def _accumulate_squares_backward(ctx, grad):
    inputs, output_grads, gradients = _saved(ctx)
    weights = ctx.saved_tensors[2]
    to_weights = (gradients.square() * grad).sum((1, 2))
    return *_pull_back(inputs, output_grads, 2 * weights[:, None, None] * grad * gradients), to_weights


def _sq_norms_backward(ctx, grad):
    inputs, output_grads, gradients = _saved(ctx)
    coefficients = grad[:, None, None]
    if len(ctx.saved_tensors) == 2:
        return *_pull_back(inputs, output_grads, 2 * coefficients * gradients), None
    scale = ctx.saved_tensors[2]
    to_scale = (coefficients * gradients.square()).sum(0)
    return *_pull_back(inputs, output_grads, 2 * coefficients * scale * gradients), to_scale


def _dots_backward(ctx, grad):
    inputs, output_grads, gradients = _saved(ctx)
    to_both = _pull_back(inputs, output_grads, torch.einsum("qn,qod->nod", grad, ctx.saved_tensors[2]))
    return *to_both, torch.einsum("qn,nod->qod", grad, gradients)


def _save_tensors(ctx, inputs, output):
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))


for _op, _backward in (
    ("accumulate", _accumulate_backward),
    ("accumulate_squares", _accumulate_squares_backward),
    ("sq_norms", _sq_norms_backward),
    ("dots", _dots_backward),
):
    torch.library.register_autograd(f"fastif::per_sample_grad_{_op}", _backward, setup_context=_save_tensors)


def _check_linear_map(op: str, inputs: Tensor, output_grads: Tensor) -> None:
    check.rank(op, "inputs", "[n, t, d]", inputs, 3)
    check.rank(op, "output_grads", "[n, t, o]", output_grads, 3)
    if inputs.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"{op}: inputs must be floating with 16 to 64 bits, got {check.dtype_name(inputs.dtype)}")
    check.same_type(op, "output_grads", output_grads, "inputs", inputs)
    shapes = f"{list(inputs.shape)} and {list(output_grads.shape)}"
    check.require(
        inputs.numel() > 0 and output_grads.numel() > 0,
        f"{op}: inputs [n, t, d] and output_grads [n, t, o] must not be empty, got {shapes}",
    )
    check.require(
        inputs.shape[:2] == output_grads.shape[:2], f"{op}: inputs and output_grads must agree in [n, t], got {shapes}"
    )


def _check_result_type(op: str, name: str, x: Tensor, inputs: Tensor) -> None:
    wanted, have, got = (check.dtype_name(dtype) for dtype in (_result_type(inputs), inputs.dtype, x.dtype))
    if wanted != got:
        raise TypeError(f"{op}: {name} must be {wanted} where inputs are {have}, got {got}")
    check.require(
        x.device == inputs.device, f"{op}: {name} must be on the device of inputs ({inputs.device}), got {x.device}"
    )


def _check_weights(op: str, weights: Tensor, inputs: Tensor) -> None:
    check.rank(op, "weights", "[n]", weights, 1)
    _check_result_type(op, "weights", weights, inputs)
    n = inputs.shape[0]
    check.require(weights.shape[0] == n, f"{op}: weights must have n={n} entries, got {weights.shape[0]}")


def _check_accumulate(op, inputs, output_grads, weights, groups, num_groups):
    _check_linear_map(op, inputs, output_grads)
    _check_weights(op, weights, inputs)
    check.rank(op, "groups", "[n]", groups, 1)
    check.dtype(op, "groups", groups, torch.int64)
    check.device(op, "groups", groups, "inputs", inputs)
    n = inputs.shape[0]
    check.require(groups.shape[0] == n, f"{op}: groups must have n={n} entries, got {groups.shape[0]}")
    check.require(num_groups >= 1, f"{op}: num_groups must be >= 1, got {num_groups}")


def _check_sq_norms(op, inputs, output_grads, scale):
    _check_linear_map(op, inputs, output_grads)
    if scale is None:
        return
    d, o = inputs.shape[2], output_grads.shape[2]
    check.rank(op, "scale", "[o, d]", scale, 2)
    _check_result_type(op, "scale", scale, inputs)
    check.require(scale.shape == (o, d), f"{op}: scale must be [o={o}, d={d}], got {list(scale.shape)}")


def _check_dots(op, inputs, output_grads, directions):
    _check_linear_map(op, inputs, output_grads)
    check.rank(op, "directions", "[q, o, d]", directions, 3)
    _check_result_type(op, "directions", directions, inputs)
    o, d = output_grads.shape[2], inputs.shape[2]
    check.require(
        directions.shape[0] >= 1 and directions.shape[1:] == (o, d),
        f"{op}: directions must be [q, o={o}, d={d}] with q >= 1, got {list(directions.shape)}",
    )


def _check_memory(op: str, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None:
            check.memory(op, name, x)


def _finite(op: str, result: Tensor, inputs: Tensor, output_grads: Tensor) -> Tensor:
    if not result.isfinite().all():
        check.finite_rows(op, "inputs", inputs)
        check.finite_rows(op, "output_grads", output_grads)
        raise ValueError(
            f"{op}: the result overflows {check.dtype_name(result.dtype)}; pass float64 or scale the inputs"
        )
    return result


@plain("per_sample_grad_accumulate")
def _accumulate_plain(inputs, output_grads, weights, groups, num_groups):
    op = "per_sample_grad.accumulate"
    _check_accumulate(op, inputs, output_grads, weights, groups, num_groups)
    _check_memory(op, inputs=inputs, output_grads=output_grads, weights=weights, groups=groups)
    check.finite_rows(op, "weights", weights)
    lowest, highest = groups.min().item(), groups.max().item()
    check.require(
        0 <= lowest and highest < num_groups,
        f"{op}: groups must be in [0, num_groups={num_groups}), got {lowest if lowest < 0 else highest}",
    )
    out = weights.new_zeros((num_groups, output_grads.shape[2], inputs.shape[2]))
    for group in groups.unique().tolist():
        members = groups == group
        a, u = inputs[members].to(out.dtype), output_grads[members].to(out.dtype)
        out[group] = (u * weights[members, None, None]).flatten(0, 1).T @ a.flatten(0, 1)
    return _finite(op, out, inputs, output_grads)


_PLAIN_BYTES = 64 << 20  # what the gradients of a block of examples may take


def _gradients_by_block(inputs: Tensor, output_grads: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(examples, their gradients [b, o, d] in the type of the result), block after block."""
    dtype = _result_type(inputs)
    block = max(1, _PLAIN_BYTES // (output_grads.shape[2] * inputs.shape[2] * dtype.itemsize))
    for begin in range(0, inputs.shape[0], block):
        examples = slice(begin, begin + block)
        yield examples, output_grads[examples].to(dtype).transpose(1, 2) @ inputs[examples].to(dtype)


@plain("per_sample_grad_accumulate_squares")
def _accumulate_squares_plain(inputs, output_grads, weights):
    op = "per_sample_grad.accumulate_squares"
    _check_linear_map(op, inputs, output_grads)
    _check_weights(op, weights, inputs)
    _check_memory(op, inputs=inputs, output_grads=output_grads, weights=weights)
    check.finite_rows(op, "weights", weights)
    out = weights.new_zeros((output_grads.shape[2], inputs.shape[2]))
    for examples, gradients in _gradients_by_block(inputs, output_grads):
        out += torch.einsum("n,nod->od", weights[examples], gradients.square())
    return _finite(op, out, inputs, output_grads)


@plain("per_sample_grad_sq_norms")
def _sq_norms_plain(inputs, output_grads, scale=None):
    op = "per_sample_grad.sq_norms"
    _check_sq_norms(op, inputs, output_grads, scale)
    _check_memory(op, inputs=inputs, output_grads=output_grads, scale=scale)
    t, d, o = *inputs.shape[1:], output_grads.shape[2]
    if scale is not None:
        check.finite_rows(op, "scale", scale)
        lowest = scale.min().item()
        check.require(lowest >= 0, f"{op}: scale must be >= 0, got {lowest:g}")
    parts = []
    if scale is None and t * (o + d) <= o * d:
        a, u = (x.to(_result_type(x)) for x in (inputs, output_grads))
        return _finite(op, ((a @ a.mT) * (u @ u.mT)).sum((1, 2)), inputs, output_grads)
    for _, gradients in _gradients_by_block(inputs, output_grads):
        squares = gradients.square()
        parts.append((squares if scale is None else squares * scale).sum((1, 2)))
    return _finite(op, torch.cat(parts), inputs, output_grads)


@plain("per_sample_grad_dots")
def _dots_plain(inputs, output_grads, directions):
    op = "per_sample_grad.dots"
    _check_dots(op, inputs, output_grads, directions)
    _check_memory(op, inputs=inputs, output_grads=output_grads, directions=directions)
    check.finite_rows(op, "directions", directions)
    out = directions.new_empty((len(directions), len(inputs)))  # before any work: it may be too large to be held
    if inputs.shape[1] == 1 or len(directions) == 1:
        a, u = (x.to(_result_type(x)) for x in (inputs, output_grads))
        for row, v in zip(out, directions, strict=True):
            row.copy_(((u @ v) * a).sum((1, 2)))
        return _finite(op, out, inputs, output_grads)
    for examples, gradients in _gradients_by_block(inputs, output_grads):
        out[:, examples] = directions.flatten(1) @ gradients.flatten(1).T
    return _finite(op, out, inputs, output_grads)
