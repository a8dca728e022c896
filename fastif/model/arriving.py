"""One batch that went through a model under training, and the gradients that come back of it, layer after layer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastif.model.forward import Forward, Pair, Sight, computable
from fastif.model.gradients import Gradients
from fastif.model.layers import Block


class Arriving(Forward):
    """What every layer saw in a forward pass, and what a backward pass asked of its outputs so far.

    Args:
        blocks, sight: of a capture.
        n: examples.
        at_once: whether squared norms and products with `directions` are computed as soon as all of a block's gradients
            are there, and these let go; otherwise all is kept and computed when it is asked for.
        directions: [q, g, o, d] by block.
        wanted: whether gradients that come when this is gone are an error.
    """

    def __init__(
        self,
        blocks: Mapping[str, Block],
        sight: Sight,
        n: int,
        at_once: bool = False,
        directions: Mapping[str, Tensor] | None = None,
        wanted: Callable[[], bool] = lambda: False,
    ):
        super().__init__(None, n, dict(blocks), {}, sight, None, None)
        self.arrived = False
        self._calls: dict[str, list[_Call]] = {}
        self._at_once, self._directions, self._wanted = at_once, directions, wanted
        self._squares: dict[str, Tensor] = {}
        self._products: dict[str, Tensor] = {}
        self._readers: dict[str, set[str]] = {}  # blocks that still have to read from a source
        for name, block in self._blocks.items():
            for use in block.uses:
                self._readers.setdefault(use.source, set()).add(name)

    def see(self, source: str, x: Tensor, y: Tensor) -> None:
        """Notes a call of a layer, and waits for the gradient of its output."""
        call = _Call(x, y)
        self._calls.setdefault(source, []).append(call)
        own, called, wanted = (
            weakref.ref(self),
            weakref.ref(call),
            self._wanted,
        )  # the graph must not hold what was seen

        def arrive(u: Tensor) -> None:
            passed, call = own(), called()
            if passed is not None and call is not None:
                passed._take(source, call, u.detach())
            elif passed is not None:
                passed.refuse_second()
            elif wanted():
                raise ValueError(
                    "capture: backward() reached an earlier call of the model than the last: call backward() after "
                    "each call, or give the model both batches as one"
                )

        y.register_hook(arrive)

    def refuse_second(self) -> None:
        """Raises ValueError."""
        raise ValueError(
            "capture: a second backward pass for one call of the model, of which keep='numbers' sees the first alone; "
            "add the losses, or let it keep='factors'"
        )

    def _take(self, source: str, call: _Call, u: Tensor) -> None:
        if self._at_once and call.u is not None:
            self.refuse_second()
        self.arrived = True
        call.u = u if call.u is None else call.u + u
        if not self._at_once:
            return
        for name in list(self._readers.get(source, ())):
            calls = [one for use in self._blocks[name].uses for one in self._calls.get(use.source, ())]
            if all(one.u is not None for one in calls):
                self._compute(name)

    def _compute(self, name: str) -> None:
        gradients = self.of(name)
        self._squares[name] = gradients.sq_norms()
        if self._directions is not None and name in self._directions:
            self._products[name] = gradients.dots(self._directions[name])
        if not self._at_once:
            return
        for source in {use.source for use in self._blocks[name].uses}:
            self._readers[source].discard(name)
            if not self._readers[source]:
                self._calls.pop(source, None)

    def of(self, name: str) -> Gradients:
        """The gradients of a block by what has come; what was never asked of an output is zero."""
        block = self._blocks[name]
        pairs: dict[str, list[Pair]] = {}
        for source in {use.source: None for use in block.uses}:
            for call in self._calls.get(source, ()):
                if call.x._version != call.version:
                    raise ValueError(
                        f"capture: the input of layer {source!r} was overwritten in place after it was used"
                    )
                u = torch.zeros(call.shape, dtype=call.x.dtype, device=call.x.device) if call.u is None else call.u
                reading = self.sight.readings.get(source, "examples")
                pair = Pair.of(source, computable(call.x), computable(u), self.n, reading)
                pairs.setdefault(source, []).append(pair)
        self.check_finite(pairs, {})
        return self.of_block(block, pairs, moments=False)

    def sq_norms(self) -> dict[str, Tensor]:
        """Squared norms [n] of every block's gradients."""
        for name in self._blocks:
            if name not in self._squares or not self._at_once:
                self._compute(name)
        return self._squares

    def dots(self, directions: Mapping[str, Tensor]) -> Tensor:
        """Products with directions [q, g, o, d] by block, [q, n]: those that were given, or with all kept any."""
        if self._at_once:
            self.sq_norms()
            return torch.stack(list(self._products.values())).sum(0)
        return torch.stack([self.of(name).dots(values) for name, values in directions.items()]).sum(0)


class _Call:
    """One call of a layer."""

    def __init__(self, x: Tensor, y: Tensor):
        self.x, self.version, self.shape = x.detach(), x._version, y.shape
        self.u: Tensor | None = None
