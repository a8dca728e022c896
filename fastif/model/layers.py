"""Layers: how the parameters of each kind of layer are seen as matrices, and their per-sample gradients as factors.

A `Block` is one matrix [o, d] of parameters (or g of them). Weight and bias of a linear map are one block, the bias as
the last column, whose input is 1. What a layer saw (x) and what the loss asks of its output (u) become `Gradients`
here and nowhere else. docs/math.md (15).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from types import EllipsisType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fastif.model.gradients import Column, Dense, Moment, OneHot, Side, second_moment
from fastif.model.patches import PatchMoment, Window


class Piece(NamedTuple):
    """What a block's matrix says of one parameter: `value` stands in parameter[rows]."""

    parameter: Tensor
    rows: slice | EllipsisType  # the latter of a scalar, which has no rows
    value: Tensor


class Use(NamedTuple):
    """One way in which a block enters the forward pass."""

    source: str  # the recorded pair (x, u) that it reads
    gradients: Callable[[Tensor, Tensor], Dense | OneHot]
    sliceable: bool = True  # whether an example's gradient follows from its own rows of x and u
    moments: Callable[[Tensor, Tensor], dict[Side, Moment]] = lambda _x, _u: {}  # shorter ways to them
    words: bool = False  # whether all axes of u but the first and the last are positions: some may be padding
    table: bool = False  # whether rows are looked up


class Block(NamedTuple):
    """Parameters that form one matrix [o, d], or g of them."""

    name: str
    shape: tuple[int, int, int]  # g, o, d
    parameters: tuple[Tensor, ...]
    uses: tuple[Use, ...]
    split: Callable[[Tensor], list[Piece]]  # of a matrix [g, o, d]
    loose: bool = False  # one parameter by itself, whose gradients are autograd's example by example: it has no uses

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def matrix(self, values: Mapping[Tensor, Tensor]) -> Tensor:
        """The matrix [g, o, d] in which `values` stand for the parameters: what `split` takes apart."""
        like = values[self.parameters[0]]
        out = like.new_zeros(self.size)
        for parameter, rows, places in self.split(torch.arange(self.size, device=like.device).view(self.shape)):
            out[places.flatten()] = values[parameter][rows].flatten()
        return out.view(self.shape)


def blocks_of(name: str, module: nn.Module, apart: set[Tensor]) -> list[Block] | str:
    """The blocks of a module's own parameters, or why it has none.

    Weights in `apart` (those that several modules share) get a block without their bias, so that it can be joined with
    the blocks of the other modules.
    """
    computed = isinstance(getattr(module, "weight", None), Tensor) and "weight" not in module._parameters
    if hasattr(module, "parametrizations") or computed:
        return "is parametrized: its weight is computed from other parameters (weight norm or the like)"
    if isinstance(module, nn.MultiheadAttention):
        return _attention(name, module) if not _shares(module, apart) else "shares parameters with another layer"
    if isinstance(module, nn.Linear):
        return _linear_map(name, module.weight, module.bias, name, apart)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # the transposed linear layer of transformers
        return _linear_map(name, module.weight, module.bias, name, apart, transposed=True)  # pyright: ignore
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return _transposed_convolution(name, module)
    if isinstance(module, nn.modules.conv._ConvNd):
        return _convolution(name, module, apart)
    if isinstance(module, nn.Embedding):
        return _embedding(name, module)
    normalized = _normalization(module)
    if normalized is not None:
        return _elementwise(name, module, *normalized) if not _shares(module, apart) else "shares parameters"
    return f"{type(module).__name__} is not a kind of layer that is known"


def _shares(module: nn.Module, apart: set[Tensor]) -> bool:
    return any(parameter in apart for parameter in module.parameters())


_LARGEST = 1 << 22  # entries of a parameter of which one gradient for each example may stand
_WIDE = 1 << 10  # entries of a vector of which no matrix over all pairs is made


def overrides(module: nn.Module) -> bool:
    """Whether a module of a kind that is known computes something of its own: a subclass, or a forward put on it."""
    kinds = (
        nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
        nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.MultiheadAttention,
    )  # fmt: skip
    own = type(module).forward
    put_on = vars(module).get("forward")
    ours = getattr(put_on, "__module__", None) in (__name__, "fastif.model.inner")  # of a capture that is attached
    strange = put_on is not None and not ours and getattr(put_on, "__func__", None) is not own
    return isinstance(module, kinds) and (strange or not own.__module__.startswith("torch.nn."))


def loose_blocks(parameters: Mapping[str, Tensor], module: nn.Module) -> dict[str, Block | str]:
    """Each parameter as a block by itself, or why it cannot be one."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and (
        module.max_norm is not None or module.scale_grad_by_freq
    ):
        return dict.fromkeys(parameters, f"is an {type(module).__name__} with max_norm or scale_grad_by_freq")
    return {name: loose_block(name, parameter) for name, parameter in parameters.items()}


def loose_block(name: str, parameter: Tensor) -> Block | str:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return "has no shape yet"
    if parameter.numel() > _LARGEST or not parameter.numel():
        return f"has {parameter.numel():,} entries, and no known form: gradients of at most {_LARGEST:,} are formed"
    shape = parameter.shape
    return Block(
        name,
        (1, parameter.numel(), 1),
        (parameter,),
        (),
        lambda m: [Piece(parameter, _every_row(parameter), m.view(shape))],
        True,
    )


def _every_row(parameter: Tensor) -> slice | EllipsisType:
    return slice(None) if parameter.dim() else ...


def loose_gradients(each: Tensor) -> Dense:
    """Gradients [n, ...] of a parameter, as those of a column [o, 1]."""
    column = _column(each.reshape(len(each), -1))  # a scalar's have no axis to flatten
    return column if column.output_grads.shape[3] <= _WIDE else Column(column.inputs, column.output_grads)


def affine_block(name: str, module: nn.Module) -> list[Block] | str:
    """Vectors that scale or shift what a module without children computes: y = p ∘ z(x) + ..., along the last axis of y
    or along axis 1. What multiplies a parameter is found by running the module with that one set to 1 and to 0."""
    own = {key: p for key, p in module._parameters.items() if p is not None}
    sizes = {p.numel() for p in own.values()}
    needed = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    alone = sum(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in needed) <= 1  # it can be run on its input
    if list(module.children()) or len(sizes) != 1 or any(p.dim() > 1 for p in own.values()) or not alone:
        return f"{type(module).__name__} is not a kind of layer that is known"
    (d,) = sizes

    def gradients(x: Tensor, u: Tensor) -> Dense:
        axis = -1 if u.shape[-1] == d or d == 1 else 1
        if d > 1 and u.shape[axis] != d:
            raise ValueError(f"capture: layer {name!r} has outputs {list(u.shape)} without an axis of {d}")
        columns = []
        with torch.no_grad():
            none = {key: torch.zeros_like(p) for key, p in own.items()}
            at_none = functional_call(module, none, (x,))
            for key, p in own.items():
                factor = functional_call(module, {**none, key: torch.ones_like(p)}, (x,)) - at_none
                product = (u * factor.to(u)).movedim(axis, -1).reshape(len(u), -1, u.shape[axis]).sum(1)
                columns.append(product if d > 1 else product.sum(1, keepdim=True))
        return _column(torch.cat(columns, 1))

    def split(m: Tensor) -> list[Piece]:
        parts = m[0, :, 0].split(d)
        return [Piece(p, _every_row(p), v.view(p.shape)) for p, v in zip(own.values(), parts, strict=True)]

    return [Block(name, (1, d * len(own), 1), tuple(own.values()), (Use(name, gradients),), split)]


# ---------------------------------------------------------------------------------------------------------- linear maps


def _linear_map(
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    source: str,
    apart: set[Tensor],
    rows: slice = slice(None),
    bias_rows: slice = slice(None),
    transposed: bool = False,
) -> list[Block]:
    """Rows of a weight [o, d] (stored [d, o] if transposed), and of its bias, that act on the last axis."""
    height, width = reversed(weight.shape) if transposed else weight.shape
    o, d = len(range(height)[rows]), width  # by its shape alone: rows of what ranks hold in parts would be sent for
    separate = bias is not None and (weight in apart or bias in apart)

    def gradients(with_bias: bool, x: Tensor, u: Tensor) -> Dense:
        n = len(x)
        return Dense(_with_ones(x.reshape(1, n, -1, d), with_bias), u.reshape(1, n, -1, o))

    def split(m: Tensor) -> list[Piece]:
        value = m[0, :, :d]
        pieces = [Piece(weight, rows, value.T if transposed else value)]
        if bias is not None and not separate:
            pieces.append(Piece(bias, bias_rows, m[0, :, d]))
        return pieces

    joint = bias is not None and not separate
    use = Use(source, partial(gradients, joint), words=True)
    parameters = (weight, bias) if joint and bias is not None else (weight,)
    blocks = [Block(name, (1, o, d + joint), parameters, (use,), split)]
    if separate and bias is not None:
        blocks.append(_bias(f"{name}.bias", bias, source, channel_axis=-1))
    return blocks


def _bias(name: str, bias: Tensor, source: str, channel_axis: int) -> Block:
    """A bias by itself: a column [o, 1] whose input is 1."""

    def gradients(_x: Tensor, u: Tensor) -> Dense:
        u = u.movedim(channel_axis, -1).reshape(len(u), -1, len(bias)).sum(1)
        return _column(u)

    return Block(
        name,
        (1, len(bias), 1),
        (bias,),
        (Use(source, gradients),),
        lambda m: [Piece(bias, slice(None), m[0, :, 0])],
    )


def _column(u: Tensor) -> Dense:
    """Gradients [n, o] of a vector, as those of a matrix [o, 1]."""
    return Dense(u.new_ones((1, len(u), 1, 1)), u[None, :, None, :])


def _with_ones(x: Tensor, append: bool) -> Tensor:
    return torch.cat([x, x.new_ones((*x.shape[:-1], 1))], -1) if append else x


# --------------------------------------------------------------------------------------------------------- convolutions


def _convolution(name: str, module: nn.modules.conv._ConvNd, apart: set[Tensor]) -> list[Block]:
    weight, bias, g = module.weight, module.bias, module.groups
    o, d = weight.shape[0] // g, weight.shape[1:].numel()
    separate = bias is not None and (weight in apart or bias in apart)
    joint = bias is not None and not separate
    zeros = module.padding_mode == "zeros"
    padding: list[int] = module._reversed_padding_repeated_twice  # last axis first, before and after
    before, after = tuple(padding[-2::-2]), tuple(padding[::-2])

    def seen(x: Tensor, positions: tuple[int, ...]) -> tuple[Tensor, Window]:
        nothing = (0,) * len(positions)
        if not zeros:
            x = F.pad(x, padding, mode=module.padding_mode)
        beside = (before, after) if zeros else (nothing, nothing)
        return x, Window(module.kernel_size, module.stride, module.dilation, *beside, positions)

    def outputs(u: Tensor) -> Tensor:
        return u.reshape(len(u), g, o, -1).transpose(0, 1).mT

    def gradients(x: Tensor, u: Tensor) -> Dense:
        image, window = seen(x, tuple(u.shape[2:]))
        return Dense(window.patches(image, g, joint), outputs(u))

    def moments(x: Tensor, u: Tensor) -> dict[Side, Moment]:
        image, window = seen(x[:1], tuple(u.shape[2:]))

        def of_inputs(begin: int, end: int, weights: Tensor, total: PatchMoment | None) -> PatchMoment:
            total = PatchMoment(window, joint) if total is None else total
            return total.add(seen(x[begin:end], window.positions)[0], weights)

        def of_outputs(begin: int, end: int, weights: Tensor, total: Tensor | None) -> Tensor:
            return second_moment(outputs(u[begin:end]), weights, total)

        shorter = g == 1 and window.moment_is_shorter(image.shape[1], image.shape[2:])
        return {"inputs": of_inputs, "outputs": of_outputs} if shorter else {"outputs": of_outputs}

    def split(m: Tensor) -> list[Piece]:
        pieces = [Piece(weight, slice(None), m[:, :, :d].reshape(weight.shape))]
        return [*pieces, Piece(bias, slice(None), m[:, :, d].reshape(-1))] if joint and bias is not None else pieces

    parameters = (weight, bias) if joint and bias is not None else (weight,)
    blocks = [Block(name, (g, o, d + joint), parameters, (Use(name, gradients, True, moments),), split)]
    if separate and bias is not None:
        blocks.append(_bias(f"{name}.bias", bias, name, channel_axis=1))
    return blocks


def _transposed_convolution(name: str, module: nn.modules.conv._ConvTransposeNd) -> list[Block]:
    """y[·, oc, s p + δ k − padding] += x[·, ic, p] W[ic, oc, k]: the input's channels are the rows of the block."""
    weight, g = module.weight, module.groups
    o, d = weight.shape[0] // g, weight.shape[1:].numel()
    padding: tuple[int, ...] = module.padding  # pyright: ignore[reportAssignmentType]

    def gradients(x: Tensor, u: Tensor) -> Dense:
        size = tuple(x.shape[2:])
        after: list[int] = []
        for axis, length in enumerate(size):
            span = (length - 1) * module.stride[axis] + (module.kernel_size[axis] - 1) * module.dilation[axis] + 1
            after.append(span - padding[axis] - u.shape[2 + axis])
        window = Window(module.kernel_size, module.stride, module.dilation, padding, tuple(after), size)
        rows = x.reshape(len(x), g, o, -1).transpose(0, 1).mT
        return Dense(window.patches(u, g, False), rows, activations="outputs")

    def split(m: Tensor) -> list[Piece]:
        return [Piece(weight, slice(None), m.reshape(weight.shape))]

    blocks = [Block(name, (g, o, d), (weight,), (Use(name, gradients),), split)]
    if module.bias is not None:
        blocks.append(_bias(f"{name}.bias", module.bias, name, channel_axis=1))
    return blocks


# -------------------------------------------------------------------------------------------- embeddings, normalisation


def _embedding(name: str, module: nn.Embedding) -> list[Block] | str:
    if module.max_norm is not None or module.scale_grad_by_freq:
        return "is an Embedding with max_norm or scale_grad_by_freq"
    weight, padding = module.weight, module.padding_idx
    o, d = weight.shape

    def gradients(x: Tensor, u: Tensor) -> OneHot:
        n = len(x)
        rows, u = x.reshape(n, -1).long(), u.reshape(n, -1, d)
        if padding is not None:  # its row never takes a gradient
            u = u * (rows != padding)[:, :, None]
        return OneHot(rows, u, o)

    use = Use(name, gradients, words=True, table=True)
    return [Block(name, (1, o, d), (weight,), (use,), lambda m: [Piece(weight, slice(None), m[0])])]


def _normalization(module: nn.Module) -> tuple[Callable[[Tensor], Tensor], int] | None:
    """The normalised input of a normalisation layer before scale and shift, and its first parameter axis."""
    if isinstance(module, nn.LayerNorm):
        shape, eps = module.normalized_shape, module.eps
        return (lambda x: F.layer_norm(x, shape, eps=eps)), -len(shape)
    if isinstance(module, nn.GroupNorm):
        return (lambda x: F.group_norm(x, module.num_groups, eps=module.eps)), 1
    if isinstance(module, nn.modules.batchnorm._BatchNorm):

        def batch_norm(x: Tensor) -> Tensor:
            mean, var = module.running_mean, module.running_var
            own = module.training or mean is None
            return F.batch_norm(x, None if own else mean, None if own else var, training=own, eps=module.eps)

        return batch_norm, 1
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and not module.track_running_stats:
        return (lambda x: F.instance_norm(x, eps=module.eps)), 1
    if isinstance(module, nn.RMSNorm):
        shape, eps = module.normalized_shape, module.eps
        return (lambda x: F.rms_norm(x, list(shape), eps=eps)), -len(shape)
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if type(module).__name__.endswith("RMSNorm") and isinstance(weight, Tensor) and isinstance(eps, float):
        return (lambda x: F.rms_norm(x, [x.shape[-1]], eps=eps)), -1  # those of transformers
    return None


def _elementwise(name: str, module: nn.Module, normalized: Callable[[Tensor], Tensor], axis: int) -> list[Block] | str:
    """Scale and shift of a normalisation layer: one column [o, 1] of both, whose input is 1."""
    weight: Any = module.weight
    bias: Any = getattr(module, "bias", None)
    if weight is None:
        return f"{type(module).__name__} has no parameters"
    both = [p for p in (weight, bias) if p is not None]
    d = weight.numel()

    def over_positions(x: Tensor) -> Tensor:
        if axis > 0:
            x = x.movedim(axis, -1)
        return x.reshape(len(x), -1, d).sum(1)

    def gradients(x: Tensor, u: Tensor) -> Dense:
        parts = [over_positions(u * normalized(x))]
        return _column(torch.cat(parts if bias is None else [*parts, over_positions(u)], 1))

    def split(m: Tensor) -> list[Piece]:
        return [Piece(p, slice(None), v.view(p.shape)) for p, v in zip(both, m[0, :, 0].split(d), strict=True)]

    return [Block(name, (1, d * len(both), 1), tuple(both), (Use(name, gradients, sliceable=False),), split)]


# ------------------------------------------------------------------------------------------------------------ attention

Record = Callable[[str, Tensor, Tensor], None]
_ROLES = ("q_proj", "k_proj", "v_proj")


def _attention(name: str, module: nn.MultiheadAttention) -> list[Block] | str:
    """Projections of query, key and value, which may be thirds of one parameter, and of the output."""
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        return "is a MultiheadAttention with add_bias_kv or add_zero_attn"
    blocks: list[Block] = []
    for role, weight, rows, bias_rows in _projections(module):
        source = f"{name}.{role}"
        blocks += _linear_map(source, weight, module.in_proj_bias, source, set(), rows, bias_rows)
    source = f"{name}.out_proj"
    return blocks + _linear_map(source, module.out_proj.weight, module.out_proj.bias, source, set())


def _projections(module: nn.MultiheadAttention) -> list[tuple[str, Tensor, slice, slice]]:
    """Role, weight, and the rows of the weight and of in_proj_bias that belong to it."""
    e = module.embed_dim
    thirds = [slice(i * e, (i + 1) * e) for i in range(3)]
    if module.in_proj_weight is not None:
        return [(role, module.in_proj_weight, rows, rows) for role, rows in zip(_ROLES, thirds, strict=True)]
    weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    every = slice(None)
    return [(role, w, every, rows) for role, w, rows in zip(_ROLES, weights, thirds, strict=True)]  # pyright: ignore


def attention_forward(name: str, module: nn.MultiheadAttention, record: Record) -> Callable[..., Any]:
    """A forward of nn.MultiheadAttention that computes what its own does and records what its projections see."""

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.dim() != 3:
            raise ValueError(f"capture: {name!r} must see batches [n, t, e], got a query of shape {list(query.shape)}")
        if is_causal and attn_mask is None:
            raise ValueError(f"capture: {name!r} was called with is_causal=True but without attn_mask")
        seen = [query, key, value] if module.batch_first else [x.transpose(0, 1) for x in (query, key, value)]
        heads: list[Tensor] = []
        for (role, weight, rows, bias_rows), x in zip(_projections(module), seen, strict=True):
            bias = None if module.in_proj_bias is None else module.in_proj_bias[bias_rows]
            y = F.linear(x, weight[rows], bias)
            record(f"{name}.{role}", x, y)
            heads.append(y.unflatten(2, (module.num_heads, -1)).transpose(1, 2))  # [n, h, t, e / h]
        q, k, v = heads
        attention = q @ k.mT / math.sqrt(q.shape[-1])
        for mask in (
            None
            if attn_mask is None
            else attn_mask.view(-1, module.num_heads, *attn_mask.shape[1:])
            if attn_mask.dim() == 3
            else attn_mask,
            None if key_padding_mask is None else key_padding_mask[:, None, None, :],
        ):
            if mask is not None and mask.dtype == torch.bool:
                attention = attention.masked_fill(mask, -torch.inf)
            elif mask is not None:
                attention = attention + mask
        attention = F.dropout(attention.softmax(-1), module.dropout, module.training)
        x = (attention @ v).transpose(1, 2).flatten(2)
        y = F.linear(x, module.out_proj.weight, module.out_proj.bias)
        record(f"{name}.out_proj", x, y)
        weights = None
        if need_weights:
            weights = attention.mean(1) if average_attn_weights else attention
        return y if module.batch_first else y.transpose(0, 1), weights

    return forward
