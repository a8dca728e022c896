"""What enters the first layer that moves: below it nothing changes, and of each example it is computed once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MOST_BYTES = 2**30  # kept of all examples together; what would be more is computed anew in every pass


class Below:
    """The modules before the first that moves in an `nn.Sequential`, replaced by what came out of them before.

    Of other models nothing is kept: what runs between modules cannot be left out without knowing what it is. Modules
    are taken for functions of their input; those with hooks are not, and run every time.
    """

    def __init__(self, model: nn.Module, moving: Collection[Tensor], n: int, run: Callable[[], Any]):
        self._rows: Tensor | None = None  # the examples of the batch, where their numbers are known
        self._n, self._outputs = n, torch.empty(0)
        self._shape: tuple[int, ...] | None = None  # of an example, where it enters
        self._known = torch.zeros(n, dtype=torch.bool)
        found = _split(model, moving, run)
        if found is not None:
            sequential, place = found
            self._before, self._after = list(sequential)[:place], list(sequential)[place:]
            sequential.forward = self._forward

    @contextmanager
    def of(self, rows: Tensor) -> Iterator[None]:
        """What goes through the model is the batch of these examples, int64 on the CPU."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    def _forward(self, input: Any) -> Any:
        rows, x = self._rows, input
        shape = tuple(input.shape[1:]) if isinstance(input, Tensor) else None
        if rows is not None and shape == self._shape and bool(self._known[rows].all()):
            x = self._outputs[rows.to(self._outputs.device)]
        else:
            for module in self._before:
                x = module(x)
            if rows is not None and shape is not None and isinstance(x, Tensor):
                self._keep(rows, shape, x.detach())
        for module in self._after:
            x = module(x)
        return x

    def _keep(self, rows: Tensor, shape: tuple[int, ...], outputs: Tensor) -> None:
        """Nothing where a row is not an example's, all would be too much, or examples come in several shapes."""
        if len(outputs) != len(rows) or self._n * outputs[0].numel() * outputs.element_size() > MOST_BYTES:
            return
        if self._shape is None:
            self._shape, self._outputs = shape, outputs.new_empty(self._n, *outputs.shape[1:])
        if shape == self._shape and outputs.shape[1:] == self._outputs.shape[1:]:
            self._outputs[rows.to(outputs.device)] = outputs
            self._known[rows] = True


def _split(model: nn.Module, moving: Collection[Tensor], run: Callable[[], Any]) -> tuple[nn.Sequential, int] | None:
    """The innermost `nn.Sequential` with modules before the one in which the first module with `moving` stands.

    `run` passes an example through the model. What runs more than once in it is left alone.
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
        if type(module) is nn.Sequential and calls.count(module) == 1:
            place = next((j for j, child in enumerate(module) if first in set(child.modules())), 0)
            before = list(module)[:place]
            inside = {m for child in before for m in child.modules()}
            once = all(calls.count(child) == 1 for child in before)
            hooked = any(m._forward_hooks or m._forward_pre_hooks for m in inside)
            if place and once and not hooked and not inside & moves:
                found = module, place
    return found
