"""Models of which every rank holds a part of each parameter (torch's `fully_shard`), and how ranks go through one.

torch gathers such a model a layer at a time, forwards and again backwards, and every rank has to be there when it does:
all make the same passes in the same order, each on a batch of its own. Before a pass the ranks say which one they are
about to make; a rank that has no batch left goes along with an example whose results are dropped, until all are done.
Hooks see whole layers. Parameters themselves are whole between the passes only where they are `gathered`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastif.ranks import Ranks

Step = Literal["forward", "layers", "parameters"]  # the last two: backward passes, by what they differentiate

WAY_TO_WHOLE = (
    "build the model again and load into it what torch.distributed.checkpoint.state_dict.get_model_state_dict gives "
    "with StateDictOptions(full_state_dict=True)"
)


def is_part(tensor: Any) -> bool:
    """Whether a tensor is one of torch's DTensors, whose module is not imported for its name alone."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on every rank; all ranks that hold a part of it call this in the same order."""
    return tensor.detach().full_tensor() if is_part(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def divided_like(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict as the model can load it: of whole tensors, the parts that this rank holds."""
    parts = {name: value for name, value in model.state_dict().items() if is_part(value)}
    if not parts:
        return dict(state)
    from torch.distributed.tensor import distribute_tensor

    def divided(name: str, value: Any) -> Any:
        if name not in parts or is_part(value) or value.shape != parts[name].shape:
            return value
        own = parts[name]
        value = value.to(own.device, own.dtype)
        return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)  # nothing is sent

    return {name: divided(name, value) for name, value in state.items()}


def units_of(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [module for module in model.modules() if fsdp is not None and isinstance(module, fsdp.FSDPModule)]


def written_as(module: nn.Module) -> tuple[type, dict[str, Any], list[Any]]:
    """A module's class, attributes and forward hooks, without what `fully_shard` has made of them."""
    kind, held = type(module), vars(module)
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return kind, held, hooks
    hooks = [hook for hook in hooks if not type(getattr(hook, "__self__", None)).__module__.startswith(fsdp.__name__)]
    ours = ("__composable_api", "_is_fsdp_managed", "_fsdp_")
    held = {key: value for key, value in held.items() if not key.startswith(ours)}
    return kind.__mro__[2] if isinstance(module, fsdp.FSDPModule) else kind, held, hooks


def refuse_sharded(model: nn.Module, op: str) -> None:
    """Raises ValueError for parameters of which this process has only a part."""
    for unit in units_of(model):
        unit.reshard()
    for name, parameter in model.named_parameters():
        if is_part(parameter):
            raise ValueError(
                f"{op}: parameter {name!r} is a DTensor, of which each rank has a part (fully_shard, tensor "
                f"parallel), and whole parameters are needed: {WAY_TO_WHOLE}"
            )


def find_sharding(model: nn.Module, ranks: Ranks, op: str) -> Sharding | None:
    """How the model is sharded, None where every rank holds all of it.

    Raises ValueError for models that are divided in other ways than by `fully_shard`, and where ranks hold parts of it
    that `ranks` are without.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError(
            f"{op}: the model is wrapped by FullyShardedDataParallel, whose parameters are flat pieces of several "
            f"layers: shard it with torch.distributed.fsdp.fully_shard, or {WAY_TO_WHOLE}"
        )
    units = units_of(model)
    for unit in units:
        unit.reshard()  # what a forward pass of the caller's has left whole
    parts: dict[str, Any] = {name: parameter for name, parameter in model.named_parameters() if is_part(parameter)}
    if not parts:
        return None
    from torch.distributed.tensor import Replicate, Shard

    inside = {parameter for unit in units for parameter in unit.parameters()}
    for name, parameter in parts.items():
        *copies, last = map(type, parameter.placements)
        if parameter not in inside or last is not Shard or copies not in ([], [Replicate]):
            placed = ", ".join(map(repr, parameter.placements))
            raise ValueError(
                f"{op}: parameter {name!r} is a DTensor placed as ({placed}), which fully_shard alone does not make "
                "(tensor parallel?): its layers see parts of what they compute. Models sharded by "
                f"torch.distributed.fsdp.fully_shard are taken, and whole ones: {WAY_TO_WHOLE}"
            )
        members = {int(rank) for rank in parameter.device_mesh.mesh.flatten()}
        if not members <= set(ranks.members):
            raise ValueError(
                f"{op}: parameter {name!r} is held in parts by ranks {_listed(members)}, and the work is divided among "
                f"{_listed(ranks.members)}: all ranks that hold a part have to take part in every pass; give group= "
                "a process group that they are all in"
            )
    return Sharding(model, ranks, units)


class Sharding:
    """A model sharded by `fully_shard`, as its ranks pass batches through it."""

    def __init__(self, model: nn.Module, ranks: Ranks, units: Sequence[Any]):
        self.model, self.ranks, self._units = model, ranks, units
        self._whole: dict[Tensor, Tensor] = {}  # by part: what the last forward pass had of a parameter
        self._following = False
        self._called: list[Any] | None = None  # units, in the order in which the forward pass at hand gathers them
        self._order: list[Any] = []  # and the last one did
        self._gathered: list[Any] | None = None  # groups of parameters, in the order in which a backward pass does
        self._usual: dict[tuple[Step, bool], list[Any]] = {}  # of those that ended, by whether first
        self._behind = self._to_come = 0  # backward passes since the last forward pass; of a kind, still ahead
        owners = {
            module: [(key, part) for key, part in module._parameters.items() if part is not None and is_part(part)]
            for module in model.modules()
        }
        self._seen_by = {
            module: [(owner, *place) for owner in module.modules() for place in owners[owner]]
            if module in units
            else [(module, *place) for place in owners[module]]
            for module in model.modules()
            if owners[module] or module in units
        }

    @property
    def computes_in_16_bits(self) -> bool:
        """Whether layers are gathered in a shorter type than their parts have (a `MixedPrecisionPolicy`)."""
        return any(whole.dtype.itemsize < min(4, part.dtype.itemsize) for part, whole in self._whole.items())

    def reshard(self) -> None:
        """Leaves this rank its own part of every parameter, as it was before the passes."""
        for unit in self._units:
            unit.reshard()

    # ------------------------------------------------------------------------------------------------------- parameters

    def hook(self, undo: ExitStack) -> None:
        """Has forward passes note the whole parameters that they compute with."""
        for module in self._seen_by:
            undo.callback(module.register_forward_pre_hook(self._note).remove)
        for group in self._groups():
            group.unshard = partial(self._unshard, group)
            undo.callback(vars(group).pop, "unshard", None)
        undo.callback(self._whole.clear)

    def _note(self, module: nn.Module, _args: Any) -> None:
        if self._called is not None and module in self._units:
            self._called.append(module)
        for owner, key, part in self._seen_by[module]:
            whole: Any = owner._parameters[key]
            if not is_part(whole):
                self._whole[part] = whole

    def whole(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """What the last forward pass computed with in the place of parts; what it did not use has no gradient."""

        def of(parameter: Tensor) -> Tensor:
            if not is_part(parameter):
                return parameter
            if parameter in self._whole:
                return self._whole[parameter]
            unused = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
            return unused.requires_grad_()

        return [of(parameter) for parameter in parameters]

    def _groups(self) -> list[Any]:
        """torch's groups of the parameters that it gathers at once, one where units were sharded together."""
        states = [unit._get_fsdp_state() for unit in self._units]
        return [*{group: None for state in states if (group := state._fsdp_param_group) is not None}]

    def _unshard(self, group: Any, async_op: bool = False) -> None:
        """torch's `unshard` of a group, which does nothing where it stands whole or is on its way."""
        before = group._all_gather_result
        type(group).unshard(group, async_op)
        if self._gathered is not None and group._all_gather_result is not before:
            self._gathered.append(group)

    def received(self, backward: Iterable[int]) -> int:
        """Bytes that torch brings this rank in forward passes, each with so many backward passes behind it.

        Each takes the parts of all units that other ranks hold, once. What is not let go of after a forward pass, as
        the model's own layers outside of its sharded blocks, stands for the first pass behind it.
        """
        every = left = 0
        for group in self._groups():
            size = 0
            for parameter in group.fsdp_params:
                part = parameter.sharded_param
                others, along = part.device_mesh.size(-1) - 1, part.placements[-1].dim
                rows = -(-part.shape[along] // (others + 1))  # of a part; torch fills up the last ones
                item = (group.mp_policy.param_dtype or part.dtype).itemsize
                size += others * rows * (part.numel() // max(1, part.shape[along])) * item
            every += size
            left += 0 if group._reshard_after_forward else size
        total = standing = 0
        for times in backward:
            total += every - standing + (every * times - left if times else 0)
            standing = 0 if times else left
        return total

    # ----------------------------------------------------------------------------------------------------------- passes

    def begin(self, step: Step, times: int = 1) -> int:
        """Before a pass, or `times` of one kind: how often all ranks make it. Raises where they begin others."""
        self._to_come = times if self._following else self._agree(step, times)[1]
        return self._to_come

    @contextmanager
    def passing(self, step: Step) -> Iterator[None]:
        """A pass. What goes wrong in it on this rank is told at the next meeting, to which the others come once this
        rank, too, has gathered what they still gather; and an error of torch's own exchanges says which rank failed."""
        what = "a pass through the sharded model"
        self._called, self._gathered = ([], None) if step == "forward" else (None, [])
        self._to_come -= 1
        try:
            yield
            if self._called is not None:
                self._order, self._behind = self._called, 0
            if self._gathered is not None:
                self._usual[step, self._behind == 0] = self._gathered
                self._behind += 1
        except Exception as error:
            told = self.ranks.explain(what, error) if isinstance(error, RuntimeError) else error
            if told is not error:
                raise told from error
            if self._called:
                self._gather(self._order[len(self._called) - 1 :])
            if self._gathered is not None:
                self._gather_backwards(step, len(self._gathered))
            raise
        finally:
            self._called = self._gathered = None

    @staticmethod
    def _gather(units: Sequence[Any]) -> None:
        """What the other ranks' forward pass gathers behind the first of these."""
        for before, unit in pairwise(units):
            together = unit is not before and unit._get_fsdp_state() is before._get_fsdp_state()
            if not together:  # of units that were sharded as one, the first is gathered for all
                unit.unshard()
                unit.reshard()

    def _gather_backwards(self, step: Step, done: int) -> None:
        """What the other ranks' backward passes of this kind still gather: as those before did, of which the first one
        behind a forward pass finds more standing. Where none was made the others wait until torch's time is over."""
        first, again = self._usual.get((step, self._behind == 0)), self._usual.get((step, False), [])
        if first is None or (self._to_come and not again):
            return
        self._gathered = None
        states = [unit._get_fsdp_state() for unit in self._units]
        for root in (state for state in states if state._is_root):  # several where the model itself is not sharded
            if hasattr(root, "_reset_iter_state"):
                root._reset_iter_state()
            else:  # of an older torch: what ends a backward pass
                root._root_post_backward_final_callback()
        units = {unit._get_fsdp_state()._fsdp_param_group: unit for unit in self._units}
        for group in (*first[done:], *self._to_come * again):
            units[group].unshard()
            units[group].reshard()

    def follow(self, take: Callable[[Step, int], None]) -> None:
        """Makes the passes that other ranks still have batches for, by `take(step, times)`, until none has."""
        self._following = True
        try:
            while True:
                step, times = self._agree(None, 0)
                if step is None:
                    return
                take(step, times)
        finally:
            self._following = False

    def _agree(self, step: Step | None, times: int) -> tuple[Step | None, int]:
        said = self.ranks.meet("a pass through the sharded model", (step, times))
        found = {other for other, _ in said if other is not None}
        if len(found) > 1:
            at = "; ".join(f"rank {rank}: {other}" for rank, (other, _) in zip(self.ranks.members, said, strict=True))
            raise ValueError(
                f"sharded model: the ranks' batches do not take the same passes ({at}), and torch gathers its layers "
                "for all ranks at once: give all batches examples of one kind and length"
            )
        return found.pop() if found else None, max(number for _, number in said)


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))
