"""What enters the first layer that moves: below it nothing changes, and of each example it is computed once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MOST_BYTES = 2**30  # kept of all examples together; what would be more is computed anew in every pass


class Below:
    """The modules before the first that moves in an `nn.Sequential`, replaced by what came out of them before.

    Of other models nothing is kept: what runs between modules cannot be left out without knowing what it is. Modules
    are taken for functions of their input, which is compared to the last bit; those with hooks are not, and run every
    time. `runs` pass an example each through the model and return its logits: where these are other ones after what
    was kept, because a module draws at random or leaves something for a later one, nothing is kept either; nor where a
    gradient passes what would be left out, because something that moves is used there without a module.
    """

    def __init__(self, model: nn.Module, moving: Collection[Tensor], n: int, runs: Sequence[Callable[[], Tensor]]):
        self._rows: Tensor | None = None  # the examples of the batch, where their numbers are known
        self._n, self._inputs, self._outputs = n, torch.empty(0), torch.empty(0)
        self._known = torch.zeros(n, dtype=torch.bool)
        found = _split(model, moving, runs[0])
        if found is not None:
            sequential, place = found
            self._before, self._after = list(sequential)[:place], list(sequential)[place:]
            sequential.forward = self._forward
            if not self._same_after_keeping(runs):
                del sequential.forward  # the class's own again
            self._known.zero_()
            self._inputs = self._outputs = torch.empty(0)  # passes over the data may have other shapes and types

    @contextmanager
    def of(self, rows: Tensor) -> Iterator[None]:
        """What goes through the model is the batch of these examples, int64 on the CPU."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    def _same_after_keeping(self, runs: Sequence[Callable[[], Tensor]]) -> bool:
        first, *others = runs
        fresh = first()
        with self.of(torch.tensor([0])):
            first()
        for other in others:  # what a module noted of the first example is gone after it
            other()
        with self.of(torch.tensor([0])):
            return bool(self._known[0]) and torch.equal(first(), fresh)

    def _forward(self, input: Any) -> Any:
        rows, x = self._rows, input
        if rows is not None and isinstance(input, Tensor) and self._is_known(rows, input):
            x = self._outputs[rows.to(self._outputs.device)]
        else:
            for module in self._before:
                x = module(x)
            if rows is not None and isinstance(input, Tensor) and isinstance(x, Tensor):
                self._keep(rows, input, x)
        for module in self._after:
            x = module(x)
        return x

    def _is_known(self, rows: Tensor, inputs: Tensor) -> bool:
        """A model may hand over its rows in another order, or make them with what has moved since."""
        if not self._known[rows].all() or inputs.dtype != self._inputs.dtype:
            return False
        return torch.equal(self._inputs[rows.to(inputs.device)], inputs)

    def _keep(self, rows: Tensor, inputs: Tensor, outputs: Tensor) -> None:
        """Nothing where a row is not an example's, all would be too much, or examples come in several shapes."""
        if outputs.requires_grad or not all(x.dim() and len(x) == len(rows) for x in (inputs, outputs)):
            return
        if self._n * sum(x[0].numel() * x.element_size() for x in (inputs, outputs)) > MOST_BYTES:
            return
        if not len(self._inputs):
            self._inputs, self._outputs = (x.new_empty(self._n, *x.shape[1:]) for x in (inputs, outputs))
        kept = (self._inputs, inputs), (self._outputs, outputs)
        if all(old.shape[1:] == new.shape[1:] and old.dtype == new.dtype for old, new in kept):
            for old, new in kept:
                old[rows.to(old.device)] = new
            self._known[rows] = True


def _split(model: nn.Module, moving: Collection[Tensor], run: Callable[[], Any]) -> tuple[nn.Sequential, int] | None:
    """The innermost `nn.Sequential` with modules before the one in which the first module with `moving` stands.

    `run` passes an example through the model. What runs more than once in it is left alone, and so is what has a
    `forward` of its own, as some libraries give to single modules.
    """
    calls: list[nn.Module] = []
    hooks = [m.register_forward_pre_hook(lambda module, _args: calls.append(module)) for m in model.modules()]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    moves = {m for m in model.modules() if any(p in moving for p in m.parameters(recurse=False))}
    first = next((module for module in calls if module in moves), None)
    found: tuple[nn.Sequential, int] | None = None
    for module in calls:
        if type(module) is nn.Sequential and "forward" not in vars(module) and calls.count(module) == 1:
            place = next((j for j, child in enumerate(module) if first in set(child.modules())), 0)
            before = list(module)[:place]
            inside = {m for child in before for m in child.modules()}
            once = all(calls.count(child) == 1 for child in before)
            hooked = any(m._forward_hooks or m._forward_pre_hooks for m in inside)
            if place and once and not hooked and not inside & moves:
                found = module, place
    return found
