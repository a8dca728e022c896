"""Capture: per-sample gradients of a model's layers, batch by batch, from one forward and one backward pass each.

Forward hooks note what each layer sees and the place of its output in the graph; gradients at those places are all that
a backward pass computes, so no weight gradient is ever formed. What no known layer holds is `loose`: a parameter whose
gradients autograd makes example by example. The model is as it was when the capture ends, also where it ends by an
error. `check.settle` holds all of it against autograd on the first batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastif.data.batches import batch_length
from fastif.model.calls import call
from fastif.model.forward import Forward, Seen, Sight
from fastif.model.inner import inner_forward
from fastif.model.layers import (
    Block,
    affine_block,
    attention_forward,
    blocks_of,
    loose_block,
    loose_blocks,
    overrides,
)
from fastif.model.selection import LEFT_OUT, Selection
from fastif.sharded import Sharding, refuse_sharded

NEVER_CALLED = "never called in the forward pass: its gradient is zero"

_TOLD = 5  # parameters that an error names


class Capture:
    """The blocks of a model's layers, and their gradients.

    Args:
        model: any module. Layers of these kinds are covered by what they see: Linear, Conv1d/2d/3d and their transposed
            forms (any stride, dilation, padding, groups), Embedding, LayerNorm, GroupNorm, BatchNorm, InstanceNorm,
            RMSNorm, MultiheadAttention, the Conv1D of transformers, layers that only scale and shift; layers that are
            used several times and weights that several layers share too. All other parameters are `loose`: autograd
            makes their gradients example by example, which takes a backward pass for each.
        layers: which parameters: "trained" (the default: those that require gradients, all where none does), "all", or
            names of modules, blocks or loose parameters ("attn.q_proj"), or patterns of them (as in `fnmatch`:
            "encoder.*"),
            whether they require gradients or not. A pattern that begins with "!" leaves out what it matches:
            ("*", "!head") is all but the head.
        sharding: of a model whose parameters ranks hold in parts (`fastif.sharded`); it is refused without.

    Raises ValueError for a pattern that names no layer and for a model without any parameter to cover.

    >>> capture = Capture(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2, bias=False)))
    >>> {name: block.shape for name, block in capture.blocks.items()}
    {'0': (1, 3, 5), '2': (1, 2, 3)}
    """

    def __init__(self, model: nn.Module, layers: str | Sequence[str] | None = None, sharding: Sharding | None = None):
        self.model, self.sharding = model, sharding
        if sharding is None:
            refuse_sharded(model, "capture")
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self.blocks: dict[str, Block] = {}
        self.skipped: dict[str, str] = {}  # parameters that no block covers, and why
        self.selection = Selection(model, layers)
        self.modules: dict[str, nn.Module] = {}  # that blocks may read from
        self.inner: set[str] = set()  # of them, those that are read by the operation inside them
        self.uncalled: set[str] = set()  # modules left out because the first batch did not call them
        self.kept: set[str] = set()  # modules that were among these once, and were called after all
        self.sight = self.first_sight()
        self.checked = 0  # examples that `check.settle` saw
        self.fixed = False  # whether a curvature was made of these blocks: they may not change any more
        self.called: set[str] = set()  # modules that ran
        self._recording: dict[str, list[Seen]] | None = None
        self._without_graph: set[str] = set()
        self._attached, self._undo = False, ExitStack()
        self.batch: int | None = None  # its number, for messages
        self._n, self._came_late = 0, list[LateLayer]()
        self._discover()

    def first_sight(self) -> Sight:
        """Before anything was seen. What takes all examples at once does not know how torch gathers layers."""
        return Sight(batched=self.sharding is None)

    @property
    def covered(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the covered parameters, by name."""
        used = self.used
        return {name: tuple(parameter.shape) for parameter, name in self.names.items() if parameter in used}

    @property
    def used(self) -> set[Tensor]:
        """The covered parameters."""
        return {parameter for block in self.blocks.values() for parameter in block.parameters}

    @property
    def lost(self) -> dict[str, str]:
        """Trained parameters that take gradients and are not covered, though nobody left them out; and why."""
        by_name = {name: parameter for parameter, name in self.names.items()}
        chosen = (LEFT_OUT, NEVER_CALLED, "no pattern of curvature=")
        return {
            name: reason
            for name, reason in self.skipped.items()
            if by_name[name] in self.selection.trained and not reason.startswith(chosen)
        }

    # ------------------------------------------------------------------------------------------------------- discovery

    def _discover(self) -> None:
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
        for name, module in modules:
            if module in inside_attention:
                continue
            children = [module.out_proj] if isinstance(module, nn.MultiheadAttention) else []
            own = {self.names[p]: p for m in (module, *children) for p in _own_parameters(m)}
            blocks = self._blocks_of(name, module, own, apart)
            reasons: dict[str, str] = {}
            for block_name, block in blocks.items():
                parameters = [own[block_name]] if isinstance(block, str) else block.parameters
                reason = self.selection.takes(
                    [name, block_name, *(self.names[p] for p in parameters if isinstance(block, str) or block.loose)],
                    parameters,
                )
                if reason is None and isinstance(block, str):
                    reason = f"its layer {name!r} {block}"
                    if self.selection.names(name) or self.selection.names(block_name):
                        raise ValueError(f"capture: cannot cover {block_name!r}: it {block}")
                if reason is not None:
                    reasons.update({self.names[p]: reason for p in parameters})
                elif isinstance(block, Block):
                    found.append(block)
                    self.modules[name] = module
            self.skipped.update(reasons)
        self.selection.check([name for name, module in modules if module not in inside_attention])
        self._join(found, apart)
        self._account()
        self.check_any()

    def _blocks_of(
        self, name: str, module: nn.Module, own: Mapping[str, Tensor], apart: set[Tensor]
    ) -> dict[str, Block | str]:
        """The blocks of a module by name, loose ones where it is of no known kind."""
        parts = self.selection.splits(list(own.values()))
        blocks = blocks_of(name, module, apart | set(own.values()) if parts else apart)
        if not isinstance(blocks, str) and overrides(module):
            if isinstance(module, nn.MultiheadAttention) or not isinstance(getattr(module, "weight", None), Tensor):
                blocks = "has a forward of its own"
            else:
                self.inner.add(name)
        if isinstance(blocks, str) and not parts and not any(p in apart for p in own.values()):
            blocks = affine_block(name, module)
        if isinstance(blocks, str):
            return dict(loose_blocks(own, module))
        return {block.name: block for block in blocks}

    def _join(self, found: list[Block], apart: set[Tensor]) -> None:
        """Blocks by name; those of one shared weight become one block with several uses."""
        by_weight: dict[Tensor, str] = {}
        loose = {parameter for block in found if block.loose for parameter in block.parameters}
        for block in found:
            first = block.parameters[0]
            if any(parameter in loose for parameter in block.parameters):
                loose.update(block.parameters)
            elif first in apart and first in by_weight:
                other = self.blocks[by_weight[first]]
                if other.shape == block.shape:
                    self.blocks[other.name] = other._replace(uses=(*other.uses, *block.uses))
                else:  # as matrices of different shapes
                    loose.add(first)
            else:
                by_weight[first] = block.name
                self.blocks[block.name or "model"] = block._replace(name=block.name or "model")
        for name, block in list(self.blocks.items()):
            if any(parameter in loose for parameter in block.parameters):
                del self.blocks[name]
                loose.update(block.parameters)
        for parameter in apart:  # a shared weight of which only some uses are covered is not covered
            name = by_weight.get(parameter)
            sharing = sum(p is parameter for module in self.model.modules() for p in _own_parameters(module))
            if name in self.blocks and len(self.blocks[name].uses) < sharing:
                del self.blocks[name]
                self.skipped[self.names[parameter]] = f"{LEFT_OUT} out layers that share it"
        self.loosen(parameter for parameter in self.names if parameter in loose)

    def _account(self) -> None:
        used = self.used
        for parameter, name in self.names.items():
            if parameter in used:
                self.skipped.pop(name, None)
            else:
                self.skipped.setdefault(name, f"{LEFT_OUT} it out")

    def check_any(self) -> None:
        """Raises ValueError where nothing is covered."""
        if not self.blocks:
            told = [f"{name}: {reason}" for name, reason in self.skipped.items()]
            more = [f"and {len(told) - _TOLD} more"] if len(told) > _TOLD else []
            reasons = "; ".join([*told[:_TOLD], *more]) or "it has no parameters"
            raise ValueError(f"capture: the model has no layer that can be covered ({reasons})")

    def leave_out(self, block: Block, reason: str) -> None:
        """Covers a block no longer."""
        del self.blocks[block.name]
        used = self.used
        self.skipped.update({self.names[p]: reason for p in block.parameters if p not in used})

    def loosen(self, parameters: Iterable[Tensor], why: str = "its layers share it in a way that is not known") -> None:
        """Covers parameters by themselves, where they are small enough; `why` they are not covered with a layer."""
        for parameter in parameters:
            name = self.names[parameter]
            made = loose_block(name, parameter)
            if isinstance(made, str):
                self.skipped[name] = f"{why}, and it {made}"
                if self.selection.names(name) or self.selection.names(name.rpartition(".")[0]):
                    raise ValueError(f"capture: cannot cover {name!r}: {self.skipped[name]}")
            else:
                self.blocks[name] = made
                self.skipped.pop(name, None)

    def take_up(self, name: str) -> None:
        """Covers what a module holds that was left out because the first examples did not call it; the check begins
        anew."""
        module = self.modules[name]
        children = [module.out_proj] if isinstance(module, nn.MultiheadAttention) else []
        own = [p for m in (module, *children) for p in _own_parameters(m)]
        self.loosen([p for p in own if self.skipped.get(self.names[p]) == NEVER_CALLED], NEVER_CALLED)
        self.kept.add(name)
        self.checked = 0

    def restore(self, names: Sequence[str]) -> None:
        """Covers the blocks of these names, as a check of other examples left them, until the next check."""
        by_name = {name: parameter for parameter, name in self.names.items()}
        kept = {name: block for name, block in self.blocks.items() if name in names}
        for block in [block for name, block in self.blocks.items() if name not in kept]:
            self.leave_out(block, f"{LEFT_OUT} it out")
        self.loosen([by_name[name] for name in names if name not in kept and name in by_name])
        self.blocks = {name: self.blocks[name] for name in names if name in self.blocks}

    # -------------------------------------------------------------------------------------------------------- recording

    @contextmanager
    def attached(self) -> Iterator[Capture]:
        """Hooks in place, the covered parameters and no others requiring gradients; all undone at the end."""
        if self._attached:
            yield self
            return
        self._attached = True
        try:
            with _uncompiled(self.model):
                self.renew()
                yield self
        finally:
            self._undo.close()
            self._attached, self.batch = False, None

    def renew(self) -> None:
        """Hooks in place for the blocks as they are now."""
        self._undo.close()
        if not self._attached:
            return
        undo = self._undo
        self._hook(undo)
        used = self.used
        if self.sharding is not None:
            self.sharding.reshard()
            self.sharding.hook(undo)
        for parameter in self.model.parameters():  # no graph is built below the first covered layer
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(parameter in used)

    def _hook(self, undo: ExitStack) -> None:
        """Hooks on the modules that blocks read from."""
        wanted = {use.source for block in self.blocks.values() for use in block.uses}
        for name, module in self.modules.items():
            if not any(source == name or source.startswith(f"{name}.") for source in wanted):
                continue
            if isinstance(module, nn.MultiheadAttention):
                forward = attention_forward(name, module, self._record)
            elif name in self.inner:
                forward = inner_forward(name, module, self._record, self.called)
            else:
                undo.callback(module.register_forward_hook(self._noting(name), with_kwargs=True).remove)
                continue
            undo.callback(_restore_forward, module, vars(module).get("forward"))
            module.forward = forward
        for name in self.uncalled:
            undo.callback(self.modules[name].register_forward_hook(self._late(name)).remove)

    def forward(self, x: Any) -> Forward:
        """Runs the model on a batch: its one argument, or a mapping of keyword arguments."""
        if not self._attached:
            raise RuntimeError("capture: forward needs the hooks; call it within `with capture.attached():`")
        if self.sharding is not None:
            self.sharding.begin("forward")
        self._n, self._recording = batch_length(x), {}
        self._came_late.clear()
        passing = nullcontext() if self.sharding is None else self.sharding.passing("forward")
        try:
            with torch.enable_grad(), passing:
                outputs = call(self.model, x)
            if self._came_late:
                raise self._came_late[0]
            mask = self.mask_in(x)
            return Forward(outputs, self._n, self.blocks, self._recording, self.sight, mask, self.batch, self.sharding)
        finally:
            self._recording = None  # what checkpointed layers run again in the backward pass is not a new use

    @property
    def hooked(self) -> set[str]:
        """Modules whose output a hook can change."""
        attention = {name for name, module in self.modules.items() if isinstance(module, nn.MultiheadAttention)}
        return self.modules.keys() - self.inner - attention

    def module_of(self, source: str) -> str:
        """The module whose source it is: attention has several."""
        return source if source in self.modules else source.rpartition(".")[0]

    @staticmethod
    def is_one_row(s: Seen, n: int) -> bool:
        """Whether a call had one row, or one vector of positions, for all n examples."""
        if s.x.dim() == 1:
            return len(s.shape) == 2 and len(s.x) == s.shape[0] != n
        return s.x.dim() > 1 and len(s.x) == s.shape[0] == 1

    @property
    def without_graph(self) -> set[str]:
        """Sources that once ran without a graph."""
        return self._without_graph

    def mask_in(self, x: Any) -> Tensor | None:
        """The batch's attention mask [n, t], where it is that of all layers."""
        mask = x.get("attention_mask") if isinstance(x, Mapping) else None
        two = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        return mask if isinstance(mask, Tensor) and mask.dim() == 2 and not two else None

    def _record(self, source: str, x: Any, y: Any) -> None:
        if self._recording is None:
            return
        self.called.add(self.module_of(source))
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            return
        if y.requires_grad:
            self._recording.setdefault(source, []).append(Seen(x, y))
        else:
            self._without_graph.add(source)

    def _noting(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
            if self._recording is None:
                return None
            x = args[0] if args else next(iter(kwargs.values()), None)
            if name in self.sight.shared and (wide := self._for_each(x, y)) is not None:
                x, y = wide
                self._record(name, x, y)
                return y
            self._record(name, x, y)
            return None

        return hook

    def _for_each(self, x: Any, y: Any) -> tuple[Tensor, Tensor] | None:
        """One row that stands for all examples, such as positions [1, t] or [t], once for each of them."""
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            return None
        n = self._n
        if x.dim() == 1 and y.dim() == 2 and len(x) == len(y):  # looked up, without an axis of examples
            x, y = x[None], y[None]
        return (x.expand(n, *x.shape[1:]), y.expand(n, *y.shape[1:])) if len(x) == len(y) == 1 else None

    def _late(self, name: str) -> Any:
        def hook(*_: Any) -> None:
            if self._recording is not None:
                where = "this batch" if self.batch is None else f"batch {self.batch}"
                late = LateLayer(
                    name,
                    f"capture: layer {name!r} is called in {where} and was not in the first examples",
                )
                if self.sharding is None:
                    raise late
                self._came_late.append(late)  # other ranks wait for the layers behind it

        return hook


class LateLayer(ValueError):
    """A layer is called that the first examples did not call."""

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name

    def __reduce__(self) -> Any:  # what goes from one process to another is made anew from its arguments
        return type(self), (self.name, str(self))


def _own_parameters(module: nn.Module) -> Iterator[Tensor]:
    return (parameter for parameter in module._parameters.values() if parameter is not None)


def _uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Runs a compiled model as it was written: what was compiled calls no hooks."""
    compiled = any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _restore_forward(module: nn.Module, own: Any) -> None:
    del module.forward  # the instance's: the class's shows again
    if own is not None:
        module.forward = own
