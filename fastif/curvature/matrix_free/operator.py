"""Products of the curvature with vectors, without the curvature: what CG, LiSSA and Lanczos are made of.

Vectors are given by block, [m, g, o, d], or flat: one row per right-hand side, the blocks one after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import EllipsisType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.func import grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fastif.curvature import limits
from fastif.curvature.protocol import FitData
from fastif.data.batches import batch_length, rows_of
from fastif.model.calls import call, dtype_of
from fastif.model.losses import Logits, labels_in, logits_of, per_sample
from fastif.samplers.subset import Subset

Matrix = Literal["ggn", "hessian"]


class Layout:
    """Vectors by block as rows of one matrix, and back."""

    def __init__(self, shapes: Mapping[str, tuple[int, int, int]]):
        self.shapes = dict(shapes)
        self.sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        self.size = sum(self.sizes.values())  # P

    def flat(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """[m, P] of vectors [..., g, o, d]; without leading axes, m = 1."""
        return torch.cat([vectors[name].reshape(-1, size) for name, size in self.sizes.items()], 1)

    def by_block(self, flat: Tensor, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Vectors [m, g, o, d] of [m, P], or of the shapes of others."""
        parts = dict(zip(self.sizes, flat.split(list(self.sizes.values()), 1), strict=True))
        if like is not None:
            return {name: part.reshape(like[name].shape) for name, part in parts.items()}
        return {name: part.reshape(-1, *self.shapes[name]) for name, part in parts.items()}


class Operator:
    """v [m, P] → G v [m, P] at the model's parameters, for several right-hand sides at once.

    G = Σ_i w_i J_iᵀ H_i J_i ("ggn") or Σ_i w_i ∇²ℓ_i ("hessian") over the weighted subset of a fit. A product takes a
    forward and a backward pass per batch and right-hand side, by forward-over-reverse differentiation where torch can
    (the right-hand sides share what is not differentiated along them), by two backward passes where it cannot: layers
    that are checkpointed, custom functions without a forward derivative, parts that run under torch.no_grad, through
    which forward derivatives would flow, tied embeddings with padding; `mode` tells which, `reason` why. With
    `keep_graph` the passes of all batches are made once and kept for all products, as the reference paper does: a third
    less work, but `graph_bytes` grow with the number of examples. The graph goes with
    the operator; until then the parameters must not change. docs/math.md (18).

    Raises ValueError, naming them, for functions that cannot be differentiated twice and layers whose product holds NaN
    or Inf.
    """

    def __init__(self, data: FitData, matrix: Matrix = "ggn", *, keep_graph: bool = False):
        check_matrix("products", matrix)
        self.data, self.matrix = data, matrix
        self.layout = Layout({name: block.shape for name, block in data.blocks.items()})
        self.parameters = list(dict.fromkeys(p for block in data.blocks.values() for p in block.parameters))
        self.dtype, self.device = dtype_of(data.model), self.parameters[0].device
        types = {p.dtype for p in self.parameters} | ({data.autocast} if data.autocast else set())
        self.coarsest = max(types, key=lambda dtype: torch.finfo(dtype).eps)  # that products are computed in
        self._modules = list(data.model.modules())
        self.graph_bytes = 0
        self.mode: Literal["forward over reverse", "double backward"] = "forward over reverse"
        self.reason = ""
        self.logits_alone = False  # whether the model returns more than a tensor, of which the loss sees the logits
        self._activations: int | None = None  # bytes that a forward pass keeps of an example
        self._padding = self._rows_of_padding()
        self._graphs: list[_Graph] | None = None
        if keep_graph:
            self._double_backward("the graph is kept")
            with _all_derivatives(), _count_kept() as counted:
                self._graphs = [_Graph(self, *batch) for batch in data.batches(data.subset)]
            self.graph_bytes = sum(counted.values())

    def __call__(self, vectors: Tensor, subset: Subset | None = None) -> Tensor:
        """G v, or the product with the curvature of another subset."""
        return torch.cat([self._some(rows, subset) for rows in vectors.split(limits.PRODUCT_VECTORS)])

    def _some(self, vectors: Tensor, subset: Subset | None) -> Tensor:
        tangents = self._to_parameters(vectors)
        total = [torch.zeros_like(tangent) for tangent in tangents]
        with _all_derivatives():
            if self._graphs is not None and subset is None:
                found = (graph(tangents) for graph in self._graphs)
            else:
                batches = self.data.batches(self.data.subset if subset is None else subset)
                found = (
                    self._product(*part, tangents) for batch in batches for part in self._parts(*batch, len(vectors))
                )
            for products in found:
                for sum_, product in zip(total, products, strict=True):
                    sum_ += product
        out = self.data.ranks.sum(f"a product of the {self.matrix}", self._to_blocks(total))
        if not bool(out.isfinite().all()):
            name = next(n for n, value in self.layout.by_block(out).items() if not bool(value.isfinite().all()))
            raise ValueError(f"products: the {self.matrix} times a vector holds NaN or Inf in layer {name!r}")
        return out.to(vectors)

    def _parts(self, x: Any, y: Any, weights: Tensor, m: int) -> Iterator[tuple[Any, Any, Tensor]]:
        """A batch in slices whose activations, and tangents along m vectors, stay near."""
        if self._activations is None:
            self._activations = self._measure_activations(x)
        each = max(limits.SLICE_EXAMPLES, limits.SLICE_BYTES // max(1, (m + 1) * self._activations))
        if each >= len(weights):
            yield x, y, weights
            return
        for rows in torch.arange(len(weights)).split(each):
            yield rows_of(x, rows), None if y is None else rows_of(y, rows), weights[rows]

    def _measure_activations(self, x: Any) -> int:
        """What a forward pass keeps of an example on the CPU; 0 elsewhere and where examples may depend on others.

        In this pass it shows, too, whether forward derivatives are those of the model.
        """
        mixing = any(m.training and isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self._modules)
        own = {p.untyped_storage().data_ptr() for p in self.data.model.parameters()}
        with torch.enable_grad(), _count_kept() as kept, _WithoutGradients() as cut:
            self.outputs(
                x if mixing else rows_of(x, torch.arange(1)), [p.detach().requires_grad_() for p in self.parameters]
            )
        if cut.found:
            self._double_backward(
                "a part of the model runs under torch.no_grad: forward derivatives would flow through"
            )
        if mixing or self.device.type != "cpu":
            return 0
        return sum(size for place, size in kept.items() if place not in own)

    def _product(self, x: Any, y: Any, weights: Tensor, tangents: list[Tensor]) -> list[Tensor]:
        if self.mode == "forward over reverse":
            try:
                with torch.no_grad():  # parameters that are not looked at here may require gradients
                    return self._forward_over_reverse(x, y, weights, tangents)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # what forward mode cannot do; an error of the model itself comes again below
                self._double_backward(str(error).partition("\n")[0])
        return _Graph(self, x, y, weights)(tangents)

    def _double_backward(self, reason: str) -> None:
        self.mode, self.reason = "double backward", reason

    def _rows_of_padding(self) -> list[tuple[Tensor, int]]:
        """Rows of embeddings that are read but take no gradient: torch's forward mode does not know of them."""
        mine, rows = set(self.parameters), []
        for table in self._modules:
            if isinstance(table, nn.Embedding) and table.padding_idx is not None and table.weight in mine:
                rows.append((table.weight, table.padding_idx))
                if sum(p is table.weight for m in self._modules for p in m._parameters.values()) > 1:
                    self._double_backward("a tied embedding has padding, whose row moves in one of its uses alone")
        return rows

    # ---------------------------------------------------------------------------------------------- blocks ↔ parameters

    def _pieces(self, vectors: Tensor) -> Iterator[tuple[Tensor, slice | EllipsisType, Tensor]]:
        """Views [m, ...] of flat vectors, and the rows of parameters that they stand for."""
        m, start = len(vectors), vectors.storage_offset()
        for block in self.data.blocks.values():
            matrix = vectors.as_strided(block.shape, torch.empty(block.shape, device="meta").stride(), start)
            for parameter, rows, one in block.split(matrix):
                assert one.untyped_storage().data_ptr() == vectors.untyped_storage().data_ptr()  # to be written through
                shape, strides = (m, *one.shape), (vectors.stride(0), *one.stride())
                yield parameter, rows, vectors.as_strided(shape, strides, one.storage_offset())
            start += block.size

    def _to_parameters(self, vectors: Tensor) -> list[Tensor]:
        """Vectors [m, P] as tangents [m, ...] of the parameters; 0 in the parts of them that no block has."""
        found = {p: p.new_zeros((len(vectors), *p.shape), requires_grad=False) for p in self.parameters}
        for parameter, rows, piece in self._pieces(vectors.detach().contiguous()):
            found[parameter][:, rows] = piece.to(parameter.dtype)
        if self.mode == "forward over reverse":
            for table, row in self._padding:
                found[table][:, row] = 0
        return list(found.values())

    def _to_blocks(self, tangents: list[Tensor]) -> Tensor:
        """The adjoint of `_to_parameters`."""
        found = dict(zip(self.parameters, tangents, strict=True))
        out = torch.zeros(len(tangents[0]), self.layout.size, dtype=self.dtype, device=self.device)
        for parameter, rows, piece in self._pieces(out):
            piece.copy_(found[parameter][:, rows])
        return out

    # ------------------------------------------------------------------------------------------------- differentiation

    def scores(self, outputs: Any) -> Tensor:
        """The outputs between which and the loss the GGN takes the second derivative."""
        self.logits_alone = not isinstance(outputs, Tensor)
        if self.logits_alone and callable(self.data.loss) and not isinstance(getattr(outputs, "logits", None), Tensor):
            raise TypeError(
                "products: matrix='ggn' with a function as loss needs a model that returns a tensor, or something with "
                f"`.logits`, got {type(outputs).__name__}; choose matrix='hessian'"
            )
        return logits_of(outputs) if self.logits_alone or not callable(self.data.loss) else outputs

    def objective(self, outputs: Any, batch: Any, weights: Tensor, n: int) -> Tensor:
        """Σ_i w_i ℓ_i of a batch."""
        losses = per_sample(self.data.loss, outputs, batch, n)
        return (losses * weights.to(losses)).sum()

    def outputs(self, x: Any, parameters: list[Tensor] | None = None) -> Any:
        """What the model returns, with the parameters given in the place of its own."""
        autocast = self.data.autocast
        cast = torch.autocast(self.device.type, autocast, enabled=autocast is not None, cache_enabled=False)
        with self._swap(self.parameters if parameters is None else parameters), cast:
            return call(self.data.model, x)

    @contextmanager
    def _swap(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Other tensors in the place of the parameters, wherever a module holds them.

        Not torch.func.functional_call: it leaves the other tensors in a module that stands at two places of the model.
        """
        new = dict(zip(self.parameters, parameters, strict=True))
        held = [(m._parameters, key, p) for m in self._modules for key, p in m._parameters.items() if p in new]
        try:
            for store, key, p in held:
                store[key] = new[p]  # pyright: ignore[reportArgumentType]
            yield
        finally:
            for store, key, p in held:
                store[key] = p

    def _forward_over_reverse(self, x: Any, y: Any, weights: Tensor, tangents: list[Tensor]) -> list[Tensor]:
        n, batch, parameters = batch_length(x), labels_in(x, y), [p.detach() for p in self.parameters]
        if self.matrix == "hessian":
            gradient = grad(lambda ps: self.objective(self.outputs(x, ps), batch, weights, n))
            return _along(lambda t: jvp(gradient, (parameters,), (t,))[1], tangents)
        scores_of: Callable[[list[Tensor]], Tensor] = lambda ps: self.scores(self.outputs(x, ps))  # noqa: E731
        if len(tangents[0]) == 1:  # one forward pass for J and Jᵀ; with more it would weigh little, and its graph much
            with torch.enable_grad():
                leaves = [p.requires_grad_() for p in parameters]
                scores, moved = jvp(scores_of, (leaves,), ([t[0] for t in tangents],))[:2]
            moved = moved.detach()  # and the graph that it has of its own is gone
            (slope,) = _OutputHessian(self, scores, batch, weights)(moved[None])
            return [v[None] for v in torch.autograd.grad(scores, leaves, slope, materialize_grads=True)]
        scores, back = vjp(scores_of, parameters)[:2]
        moved = vmap(lambda t: jvp(scores_of, (parameters,), (t,))[1])(tangents)
        return vmap(lambda u: back(u)[0])(_OutputHessian(self, scores, batch, weights)(moved))


def _along(product: Callable[[list[Tensor]], list[Tensor]], tangents: list[Tensor]) -> list[Tensor]:
    """The product with each row of the tangents [m, ...]; of one alone without vmap, which costs a tenth."""
    if len(tangents[0]) == 1:
        return [v[None] for v in product([t[0] for t in tangents])]
    return vmap(product)(tangents)


class _WithoutGradients(TorchFunctionMode):
    """Whether something is computed under torch.no_grad, within it, of what requires gradients."""

    def __init__(self):
        super().__init__()
        self.found, self._off = False, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch._C._set_grad_enabled:
            self._off = not args[0]
        elif self._off and isinstance(made, Tensor) and made.is_floating_point():
            given = (*args, *(kwargs or {}).values())
            read = (t for part in given for t in (part if isinstance(part, list | tuple) else [part]))
            self.found = self.found or any(isinstance(t, Tensor) and t.requires_grad for t in read)
        return made


class _OutputHessian:
    """Changes [m, n, ...] of the outputs → what they change of the weighted loss's gradient there."""

    def __init__(self, operator: Operator, scores: Tensor, batch: Any, weights: Tensor):
        with torch.enable_grad():
            self._leaf = scores.detach().requires_grad_()
            outputs = Logits(self._leaf) if operator.logits_alone else self._leaf
            self._slope = _differentiate(operator.objective(outputs, batch, weights, len(weights)), [self._leaf])

    def __call__(self, moved: Tensor) -> Tensor:
        return _pull_back(self._slope, [self._leaf], [moved])[0]


class _Graph:
    """The passes of one batch, kept: tangents of the parameters → their products with the batch's curvature."""

    def __init__(self, operator: Operator, x: Any, y: Any, weights: Tensor):
        self._parameters, batch = operator.parameters, labels_in(x, y)
        self._gradient: list[Tensor | None] | None = None
        with torch.enable_grad():
            outputs = operator.outputs(x)
            if operator.matrix == "hessian":
                objective = operator.objective(outputs, batch, weights, len(weights))
                self._gradient = _differentiate(objective, self._parameters)
                return
            self._scores = operator.scores(outputs)
            # Jᵀu is linear in u, and its derivative with respect to u is J: two backward passes in the place of a
            # forward one.
            self._cotangent = torch.zeros_like(self._scores, requires_grad=True)
            self._pulled = _differentiate(self._scores, self._parameters, self._cotangent)
            self._hessian = _OutputHessian(operator, self._scores, batch, weights)

    def __call__(self, tangents: list[Tensor]) -> list[Tensor]:
        if self._gradient is not None:
            return _pull_back(self._gradient, self._parameters, tangents)
        (moved,) = _pull_back(self._pulled, [self._cotangent], tangents)
        return _pull_back([self._scores], self._parameters, [self._hessian(moved)])


def _differentiate(y: Tensor, inputs: list[Tensor], of: Tensor | None = None) -> list[Tensor | None]:
    """Gradients that have gradients themselves; None where y does not depend on an input."""
    if not y.requires_grad:
        raise ValueError("products: the loss does not depend on the model's outputs (detached?)")
    found = torch.autograd.grad(y, inputs, of, create_graph=True, allow_unused=True)
    # What torch marks as not differentiable stands at the end of a path that a second pass would not even walk.
    if any(node.name() == "torch::autograd::Error" for node in _nodes(found)):
        raise ValueError(_why("a function marked with @once_differentiable", found))
    return list(found)


def _pull_back(ys: Sequence[Tensor | None], inputs: list[Tensor], of: list[Tensor]) -> list[Tensor]:
    """Σ_y of[y]ᵀ ∂y/∂inputs for rows of `of` [m, ...]: [m, ...] each."""
    pairs = [(y, v) for y, v in zip(ys, of, strict=True) if y is not None and y.requires_grad]
    m = len(of[0])
    if not pairs:  # constant gradients: no curvature
        return [p.new_zeros((m, *p.shape), requires_grad=False) for p in inputs]
    through = [y for y, _ in pairs]
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    try:
        found = torch.autograd.grad(through, inputs, [v for _, v in pairs], is_grads_batched=True, **options)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # a function that cannot be batched
        try:
            rows = [torch.autograd.grad(through, inputs, [v[row] for _, v in pairs], **options) for row in range(m)]
        except RuntimeError as error:
            raise ValueError(_why(str(error).partition("\n")[0], through)) from error
        found = [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]
    return [
        p.new_zeros((m, *p.shape), requires_grad=False) if value is None else value.detach()
        for p, value in zip(inputs, found, strict=True)
    ]


def _why(what: str, ys: Sequence[Tensor | None]) -> str:
    custom = {
        type(node).__name__.removesuffix("Backward") for node in _nodes(ys) if isinstance(node, BackwardCFunction)
    }
    within = f" (custom autograd functions: {', '.join(sorted(custom))})" if custom else ""
    return (
        f"products: the model cannot be differentiated twice: {what}{within}; leave the layers before it out with "
        "layers=, or choose a curvature that is made of gradients (EKFAC)"
    )


def check_matrix(op: str, matrix: Any) -> None:
    if matrix not in ("ggn", "hessian"):
        raise ValueError(f"{op}: matrix must be 'ggn' or 'hessian', got {matrix!r}")


def operator_of(op: str, data: FitData | None, matrix: Matrix, keep_graph: bool) -> Operator:
    if data is None:
        raise ValueError(f"{op}: multiplies with the data's curvature, which is not part of a state: call fit(train)")
    return Operator(data, matrix, keep_graph=keep_graph)


def _all_derivatives() -> Any:
    """The one kernel of attention that has more than one derivative."""
    return sdpa_kernel(SDPBackend.MATH)


def _nodes(ys: Sequence[Tensor | None]) -> Iterator[Node]:
    """The graph of ys."""
    seen: set[Node] = set()
    stack = [y.grad_fn for y in ys if y is not None]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack += [following for following, _ in node.next_functions]


@contextmanager
def _count_kept() -> Iterator[dict[int, int]]:
    """Bytes that graphs made within it keep, by place; what is kept twice counts once."""
    seen: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        yield seen
