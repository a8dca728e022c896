"""Capture: per-sample gradients of a model's layers, batch by batch, from one forward and one backward pass each.

Forward hooks note what each layer sees and the place of its output in the graph; gradients at those places are all that
a backward pass computes, so no weight gradient is ever formed. The model is as it was when the capture ends, also
where it ends by an error.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fastif.data.batches import batch_length
from fastif.model.calls import call
from fastif.model.gradients import Dense, Gradients, OneHot, joined
from fastif.model.layers import Block, attention_forward, blocks_of
from fastif.model.sliced_gradients import Sliced

SLICE = 1 << 21  # of a layer's factors that stand at a time: 8 MiB in float32
_AGREE = 1e-2  # of captured gradients with autograd's, relative: an unseen use of a parameter is no rounding error


class Capture:
    """The blocks of a model's layers, and their gradients.

    Args:
        model: any module. Layers of these kinds are covered: Linear, Conv1d/2d/3d and their transposed forms (any
            stride, dilation, padding, groups), Embedding, LayerNorm, GroupNorm, BatchNorm, InstanceNorm, RMSNorm,
            MultiheadAttention, the Conv1D of transformers; layers that are used several times and weights that several
            layers share too.
        layers: names of modules or blocks ("attn.q_proj") or patterns of them (as in `fnmatch`: "encoder.*"); default
            all, whether their parameters require gradients or not: leave frozen ones out with layers=.

    Raises ValueError for a pattern that names no layer and for a model without any that is known.

    >>> capture = Capture(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2, bias=False)))
    >>> {name: block.shape for name, block in capture.blocks.items()}
    {'0': (1, 3, 5), '2': (1, 2, 3)}
    """

    def __init__(self, model: nn.Module, layers: str | Sequence[str] | None = None):
        self.model = model
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self.blocks: dict[str, Block] = {}
        self.skipped: dict[str, str] = {}  # parameters that no block covers, and why
        self._discover([layers] if isinstance(layers, str) else layers)
        self._recording: dict[str, list[_Seen]] | None = None
        self._attached = False
        self.batch: int | None = None  # its number, for messages
        self._n = 0
        self._shared: set[str] = set()  # layers that see one row for the whole batch
        self.ambiguous = False  # whether a vector of positions was as long as the batch, in the last forward pass
        self.checked = False  # by `Forward.check`, on the first batch

    @property
    def covered(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the covered parameters, by name."""
        used = {parameter for block in self.blocks.values() for parameter in block.parameters}
        return {name: tuple(parameter.shape) for parameter, name in self.names.items() if parameter in used}

    # ------------------------------------------------------------------------------------------------------- discovery

    def _discover(self, patterns: Sequence[str] | None) -> None:
        owners: dict[Tensor, int] = {}
        inside_attention: set[nn.Module] = set()
        modules = [(name, module) for name, module in self.model.named_modules() if list(_own_parameters(module))]
        for _, module in self.model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                inside_attention.add(module.out_proj)
            for parameter in _own_parameters(module):
                owners[parameter] = owners.get(parameter, 0) + 1
        apart = {parameter for parameter, count in owners.items() if count > 1}
        found: list[Block] = []
        self._sources: dict[str, nn.Module] = {}  # modules that blocks read from
        unused = set(patterns or ())
        for name, module in modules:
            if module in inside_attention:
                continue
            blocks = blocks_of(name, module, apart)
            names = [name] if isinstance(blocks, str) else [name, *(block.name for block in blocks)]
            matching = [p for p in patterns or () if any(fnmatchcase(one, p) for one in names)]
            unused.difference_update(matching)
            if patterns is not None and not isinstance(blocks, str) and not any(fnmatchcase(name, p) for p in patterns):
                blocks = [block for block in blocks if any(fnmatchcase(block.name, p) for p in patterns)]
            if isinstance(blocks, str):
                reason = f"its layer {name!r} {blocks}"
                if name in (patterns or ()):
                    raise ValueError(f"capture: cannot cover {name!r}: {blocks}")
            elif patterns is not None and not matching:
                reason = f"layers= leaves {name!r} out"
            else:
                found += blocks
                self._sources[name] = module
                continue
            children = [module.out_proj] if isinstance(module, nn.MultiheadAttention) else []
            for parameter in (p for m in (module, *children) for p in _own_parameters(m)):
                self.skipped[self.names[parameter]] = reason
        if unused:
            known = ", ".join(name for name, module in modules if name and module not in inside_attention) or "none"
            raise ValueError(f"capture: layers={min(unused)!r} names no layer with parameters; there are: {known}")
        self._join(found, apart)
        for block in self.blocks.values():
            for parameter in block.parameters:
                self.skipped.pop(self.names[parameter], None)
        for name in self.names.values():  # parameters of a module of which some blocks are covered
            if name not in self.covered:
                self.skipped.setdefault(name, "layers= leaves it out")
        if not self.blocks:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.skipped.items()) or "it has no parameters"
            raise ValueError(f"capture: the model has no layer that can be covered ({reasons})")

    def _join(self, found: list[Block], apart: set[Tensor]) -> None:
        """Blocks by name; those of one shared weight become one block with several uses."""
        by_weight: dict[Tensor, str] = {}
        for block in found:
            first = block.parameters[0]
            if first in apart and first in by_weight:
                other = self.blocks[by_weight[first]]
                if other.shape != block.shape:
                    raise ValueError(
                        f"capture: {other.name!r} and {block.name!r} share a weight as matrices of different shapes, "
                        f"{list(other.shape)} and {list(block.shape)}; leave one out with layers="
                    )
                self.blocks[other.name] = other._replace(uses=(*other.uses, *block.uses))
            else:
                by_weight[first] = block.name
                self.blocks[block.name or "model"] = block._replace(name=block.name or "model")
        for parameter in apart:  # a shared weight of which only some uses are covered is not covered
            name = by_weight.get(parameter)
            sharing = sum(p is parameter for module in self.model.modules() for p in _own_parameters(module))
            if name is not None and len(self.blocks[name].uses) < sharing:
                del self.blocks[name]
                self.skipped[self.names[parameter]] = "layers that share it are not covered"

    def leave_out(self, block: Block, reason: str) -> None:
        """Covers a block no longer."""
        del self.blocks[block.name]
        used = {parameter for other in self.blocks.values() for parameter in other.parameters}
        self.skipped.update({self.names[p]: reason for p in block.parameters if p not in used})
        wanted = {use.source for other in self.blocks.values() for use in other.uses}
        for name in list(self._sources):
            if not any(source == name or source.startswith(f"{name}.") for source in wanted):
                del self._sources[name]

    # -------------------------------------------------------------------------------------------------------- recording

    @contextmanager
    def attached(self) -> Iterator[Capture]:
        """Hooks in place, the covered parameters and no others requiring gradients; all undone at the end."""
        if self._attached:
            yield self
            return
        with ExitStack() as undo:
            for name, module in self._sources.items():
                if isinstance(module, nn.MultiheadAttention):
                    undo.callback(_restore_forward, module, vars(module).get("forward"))
                    module.forward = attention_forward(name, module, self._record)
                else:
                    undo.callback(module.register_forward_pre_hook(self._expanding(name), with_kwargs=True).remove)
                    undo.callback(module.register_forward_hook(self._noting(name), with_kwargs=True).remove)
            used = {parameter for block in self.blocks.values() for parameter in block.parameters}
            for parameter in self.model.parameters():  # no graph is built below the first covered layer
                undo.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(parameter in used)
            self._attached = True
            undo.callback(setattr, self, "_attached", False)
            undo.callback(setattr, self, "batch", None)
            yield self

    def forward(self, x: Any) -> Forward:
        """Runs the model on a batch: its one argument, or a mapping of keyword arguments."""
        if not self._attached:
            raise RuntimeError("capture: forward needs the hooks; call it within `with capture.attached():`")
        self._n, self._recording, self.ambiguous = batch_length(x), {}, False
        try:
            with torch.enable_grad():
                outputs = call(self.model, x)
            return Forward(self, outputs, self._recording, self._n)
        finally:
            self._recording = None  # what checkpointed layers run again in the backward pass is not a new use

    def _record(self, source: str, x: Tensor, y: Tensor) -> None:
        if self._recording is None:
            return
        if len(x) != self._n:
            raise ValueError(
                f"capture: layer {source!r} saw an input of shape {list(x.shape)}, whose first axis is not the batch "
                f"of {self._n}; let the model keep the batch first (batch_first=True), or leave the layer out with "
                "layers="
            )
        if not y.requires_grad:
            raise ValueError(
                f"capture: layer {source!r} ran without a graph: under torch.no_grad(), or in a checkpoint with "
                "use_reentrant=True (use_reentrant=False works)"
            )
        edge = torch.autograd.graph.get_gradient_edge(y)
        self._recording.setdefault(source, []).append(_Seen(x, edge, y))

    def _expanding(self, name: str) -> Any:
        """One row that stands for the whole batch, such as positions [1, t] or [t], is repeated for every example."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._recording is None or not args or not isinstance(args[0], Tensor):
                return None
            x, n = args[0], self._n
            if isinstance(module, nn.Embedding) and x.dim() == 1:
                if len(x) != n or name in self._shared:
                    self._shared.add(name)
                    return (x.expand(n, len(x)), *args[1:]), kwargs
                self.ambiguous = True
            if x.dim() > 1 and len(x) == 1 and n > 1:
                return (x.expand(n, *x.shape[1:]), *args[1:]), kwargs
            return None

        return hook

    def _noting(self, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            self._record(name, x, y)

        return hook


class Forward:
    """One batch that went through the model: its outputs, and the gradients that a backward pass brings."""

    def __init__(self, capture: Capture, outputs: Any, seen: dict[str, list[_Seen]], n: int):
        self.outputs, self.n = outputs, n
        self._capture, self._seen = capture, seen
        sources = {use.source for block in capture.blocks.values() for use in block.uses}
        missing = sorted(source for source in sources if source not in seen)
        if missing:
            raise ValueError(
                f"capture: layer {missing[0]!r} was not called in the forward pass; leave it out with layers="
            )

    @property
    def nbytes(self) -> int:
        """Of the inputs and outputs of covered layers."""
        return sum(s.x.nbytes + s.shape.numel() * s.dtype.itemsize for uses in self._seen.values() for s in uses)

    def head(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Inputs [n, d] (with the 1 of a bias) and logits [n, c] of a block whose output is the model's, else None."""
        use, *others = self._capture.blocks[name].uses
        s, *again = self._seen[use.source]
        if others or again or not isinstance(self.outputs, Tensor) or self.outputs.dim() != 2:
            return None
        if s.y() is not self.outputs or self.outputs._version != s.y_version:
            return None
        logits = _computable(self.outputs.detach())
        gradients = use.gradients(_computable(s.x.detach()), logits)
        if not isinstance(gradients, Dense) or gradients.positions > 1 or len(gradients.inputs) > 1:
            return None
        if not torch.equal(gradients.output_grads[0, :, 0], logits):  # a normalisation layer's u is not the output's
            return None
        return gradients.inputs[0, :, 0], logits

    def gradients(self, target: Tensor, column: Tensor | None = None, keep: bool = False) -> dict[str, Gradients]:
        """Per-sample gradients of every block: of target [n] (summed), or of ⟨column, target⟩.

        keep: whether the graph will be walked again.
        """
        if not target.requires_grad:
            raise ValueError("capture: the loss does not depend on the model's outputs (detached?)")
        flat = [(source, s) for source, uses in self._seen.items() for s in uses]
        for source, s in flat:
            if s.x._version != s.version:
                raise ValueError(f"capture: the input of layer {source!r} was overwritten in place after it was used")
        found = torch.autograd.grad(
            target.sum() if column is None else target,
            [s.edge for _, s in flat],
            grad_outputs=None if column is None else column.to(target.dtype),
            retain_graph=keep,
            allow_unused=True,
        )
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for (source, s), u in zip(flat, found, strict=True):
            u = torch.zeros(s.shape, dtype=s.dtype, device=s.device) if u is None else u
            pairs.setdefault(source, []).append((_computable(s.x.detach()), _computable(u.detach())))
        blocks = self._capture.blocks.items()
        for what, side in (("input", 0), ("output gradient", 1)):  # a NaN of the forward pass is in many gradients
            for name, block in blocks:
                for factor in (pair[side] for use in block.uses for pair in pairs[use.source]):
                    _check_finite(what, name, factor, self._capture.batch)
        return {name: self._of_block(block, pairs) for name, block in blocks}

    def _of_block(self, block: Block, pairs: dict[str, list[tuple[Tensor, Tensor]]]) -> Gradients:
        uses = [(use, x, u) for use in block.uses for x, u in pairs[use.source]]
        whole = {id(x): use.gradients(x, u) for use, x, u in uses if not use.sliceable}

        def make(begin: int, end: int) -> Dense | OneHot:
            return joined(
                [
                    use.gradients(x[begin:end], u[begin:end]) if use.sliceable else whole[id(x)].rows(begin, end)
                    for use, x, u in uses
                ]
            )

        one = make(0, 1)
        formed = isinstance(one, Dense) and one.formed_to_rotate
        each = max(1, SLICE // max(one.entries, block.size if formed else 0))
        moments = uses[0][0].moments(uses[0][1], uses[0][2]) if len(uses) == 1 else {}
        return make(0, self.n) if self.n <= each and not moments else Sliced(make, 0, self.n, each, moments)

    def check(self, losses: Tensor, mixing: bool = True) -> None:
        """Refuses a model whose examples mix, or that uses a covered parameter where no hook sees it.

        The gradients captured must be those of autograd, and (with `mixing`) example 0's loss must not reach the rows
        of the others.
        """
        total = self.gradients(losses, keep=True)
        if mixing and self.n > 1:
            alone = self.gradients(losses[:1], keep=True)
            for name, gradients in alone.items():
                norms = gradients.sq_norms()
                if bool((norms[1:] > 1e-8 * norms[:1] + torch.finfo(norms.dtype).tiny).any()):
                    raise ValueError(
                        f"capture: in layer {name!r} the loss of one example depends on the rows of others: either the "
                        "model mixes examples (BatchNorm in train mode?), or the batch is not its first axis, or a "
                        "vector of positions happens to be as long as the batch"
                    )
        self._compare_with_autograd(losses, total)
        self._capture.checked = True

    def _compare_with_autograd(self, losses: Tensor, total: dict[str, Gradients]) -> None:
        capture = self._capture
        parameters = list({p: None for block in capture.blocks.values() for p in block.parameters})
        true = torch.autograd.grad(losses.sum(), parameters, retain_graph=True, allow_unused=True)
        wanted = {p: torch.zeros_like(p) if g is None else g for p, g in zip(parameters, true, strict=True)}
        for name, block in capture.blocks.items():
            gradients = total[name]
            weights = torch.ones(self.n, device=losses.device)
            scale = math.sqrt(self.n * float(gradients.sq_norms().double().sum()))  # >= the norm of their sum
            for piece in block.split(gradients.sum(weights)):
                off = float((wanted[piece.parameter][piece.rows].double() - piece.value.double()).norm())
                if off > _AGREE * scale + 1e-12:
                    raise ValueError(
                        f"capture: the gradient captured for {capture.names[piece.parameter]!r} in layer {name!r} is "
                        f"not autograd's (off by {off / max(scale, 1e-300):.2g}): the parameter is used outside its "
                        "layer's forward; leave the layer out with layers="
                    )


class _Seen:
    """One call of a layer: its input, and where its output stands in the graph.

    The output itself is not held: mostly nothing else needs it once the next layer has run.
    """

    def __init__(self, x: Tensor, edge: Any, y: Tensor):
        self.x, self.version, self.edge = x, x._version, edge
        self.y, self.y_version = weakref.ref(y), y._version
        self.shape, self.dtype, self.device = y.shape, y.dtype, y.device


def _own_parameters(module: nn.Module) -> Iterator[Tensor]:
    return (parameter for parameter in module._parameters.values() if parameter is not None)


def _restore_forward(module: nn.Module, own: Any) -> None:
    del module.forward  # the instance's: the class's shows again
    if own is not None:
        module.forward = own


def _computable(x: Tensor) -> Tensor:
    """16-bit floats (autocast) as float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check_finite(what: str, name: str, factor: Tensor, batch: int | None) -> None:
    if not factor.is_floating_point() or bool(factor.sum().isfinite()) or bool(factor.isfinite().all()):
        return
    row = int((~factor.isfinite()).nonzero()[0, 0])
    where = "the batch" if batch is None else f"batch {batch}"
    raise ValueError(f"capture: the {what} of layer {name!r} holds NaN or Inf, example {row} of {where}")
