"""The check of a capture: on a first few examples, what it captures is held against autograd, example by example.

Autograd's gradient of each example, alone in a batch of its own, is the arbiter. A block whose captured gradients agree
with it for every example is covered as it is read. Others are read in other ways, at last as loose parameters; what
agrees in none is left out and listed. Where an example's gradient in the batch is not the one it has alone, examples
mix, and no gradient of one example has a meaning: that is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from fastif.data.batches import batch_length, rows_of
from fastif.model.calls import call
from fastif.model.capture import NEVER_CALLED, Capture
from fastif.model.forward import READINGS, Forward, Pair, grad
from fastif.model.gradients import Gradients
from fastif.model.layers import Block, affine_block

Values = Callable[[Any, Tensor], Tensor]  # (outputs of some examples, which these are) → their losses
_AGREE = 1e-2  # of captured gradients with autograd's, relative: another reading is no rounding error


def settle(capture: Capture, x: Any, values: Values, *, alone: bool = True, short: bool = False) -> Forward:
    """Decides what is covered and how it is read, on a batch of a few examples; the capture is attached.

    alone: whether an example must have the gradient that it has in a batch of its own. Without (BatchNorm in train
    mode is allowed to mix), its gradient is that of its own loss in the batch at hand. short: whether forward passes
    compute in 16 bits.

    Raises ValueError for examples that mix, and where a layer that the caller named, or every layer, is left out.
    """
    return _Check(capture, x, values, alone, short).settled()


class _Check:
    def __init__(self, capture: Capture, x: Any, values: Values, alone: bool, short: bool):
        self.capture, self.x, self.values, self.alone = capture, x, values, alone
        self.n = batch_length(x)
        self.short = short or any(p.dtype in (torch.float16, torch.bfloat16) for p in capture.used)
        self.agree = 5 * _AGREE if self.short else _AGREE
        self.told: set[int] = set()  # examples whose loss has a gradient: the others agree with any reading
        self.noise = 0.0  # gradients as small as this say nothing: so much rounding leaves in one that is zero

    def settled(self) -> Forward:
        capture, before = self.capture, dict(self.capture.blocks)
        capture.sight, capture.uncalled = capture.first_sight(), set()
        self._look()
        self._drop_uncalled()
        self._share()
        self._read_by_shape()
        self._try_vmap()
        failing = self._failing(self._captured(last=self.alone))
        if failing:
            if self.alone:
                self._look()  # once more: the graph went before those of the examples alone came
            self._refuse_mixing(failing)
            failing = self._read_otherwise(failing)
        if failing:
            failing = self._see_otherwise(failing)
        if failing:
            self._loosen(failing, "what its layer saw does not give autograd's gradients")
            self._refuse_loose(self._failing({n: g for n, g in self._captured().items() if capture.blocks[n].loose}))
        if capture.fixed and {n: b.shape for n, b in before.items()} != {n: b.shape for n, b in capture.blocks.items()}:
            changed = min(set(before) ^ set(capture.blocks) or set(before))
            raise ValueError(
                f"capture: layer {changed!r} is not seen as it was when the curvature was fitted; fit again, with a "
                "first batch like this one"
            )
        capture.check_any()
        capture.checked = max(capture.checked, len(self.told))
        capture.renew()
        return self.forward

    # ------------------------------------------------------------------------------------------------------ the passes

    def _look(self) -> None:
        """A forward pass with the hooks as they are now."""
        self.capture.renew()
        self.forward = self.capture.forward(self.x)
        self.losses = self.values(self.forward.outputs, torch.arange(self.n))

    def _captured(self, last: bool = False) -> dict[str, tuple[Block, Gradients]]:
        """What the blocks have of the batch; the `last` time, its graph and outputs are dropped."""
        gradients = self.forward.gradients(self.losses, keep=not last)
        if last:
            self.forward.outputs, self.losses = None, self.losses.detach()
        return {name: (block, gradients[name]) for name, block in self.capture.blocks.items()}

    def _walk_back(self, i: int, parameters: Sequence[Tensor], visit: Callable[[Tensor, Tensor], None]) -> None:
        """Autograd's gradients of example i's loss, dense, one after another as they are complete; none is kept."""
        loss = self._loss_alone(i) if self.alone else self.losses[i]
        if not loss.requires_grad:
            return

        def visiting(parameter: Tensor) -> Callable[[Tensor], Tensor]:
            def complete(gradient: Tensor) -> Tensor:
                visit(parameter, gradient.to_dense() if gradient.is_sparse else gradient)
                return gradient if gradient.is_sparse else gradient.new_zeros(()).expand(gradient.shape)

            return complete

        with ExitStack() as undo:
            whole = self._whole(parameters)
            for parameter, of_passes in zip(parameters, whole, strict=True):
                undo.callback(of_passes.register_hook(visiting(parameter)).remove)
            grad(loss, whole, None, keep=not self.alone)

    def _whole(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """Parameters as the last forward pass had them: of a sharded model this rank holds parts."""
        sharding = self.capture.sharding
        return parameters if sharding is None else sharding.whole(parameters)

    def _truths(self, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Example by example: autograd's gradients of its loss."""
        for i in range(self.n):
            loss = self._loss_alone(i) if self.alone else self.losses[i]
            yield gradients_of(loss, self._whole(parameters))

    def _loss_alone(self, i: int) -> Tensor:
        """Of example i by itself; twice over where the model takes no batch of one."""
        error: Exception | None = None
        for rows in (torch.tensor([i]), torch.tensor([i, i])):
            try:
                with torch.enable_grad():
                    return self.values(call(self.capture.model, rows_of(self.x, rows)), rows)[0]
            except (RuntimeError, ValueError, IndexError, TypeError) as raised:
                error = error or raised
        name = next(iter(self.capture.blocks))
        raise ValueError(
            f"capture: example {i} cannot go through the model by itself ({error}): in layer {name!r} the loss of one "
            "example depends on the rows of others, or the batch is not its first axis"
        ) from error

    # ---------------------------------------------------------------------------------------------------- the judgement

    def _failing(self, candidates: Mapping[Any, tuple[Block, Gradients]]) -> list[Any]:
        """Those whose gradients are not autograd's for every example.

        Autograd's gradients come layer by layer, as its backward pass reaches them, and are dropped once compared: all
        of them at a time would be as large as the model.
        """
        off = {key: torch.zeros(self.n) for key in candidates}
        size = {key: torch.zeros(self.n) for key in candidates}
        one = torch.ones(1, device=self.losses.device)
        holders: dict[Tensor, list[Any]] = {}
        for key, (block, _) in candidates.items():
            for parameter in dict.fromkeys(block.parameters):
                holders.setdefault(parameter, []).append(key)

        def compare(i: int, key: Any, truth: Mapping[Tensor, Tensor]) -> None:
            block, gradients = candidates[key]
            try:
                pieces = block.split(gradients.rows(i, i + 1).sum(one))
            except (RuntimeError, ValueError, IndexError):  # a reading that does not fit the layer's shapes
                off[key][i] = math.inf
                return
            own = [(truth[p][rows] if p in truth else None, value) for p, rows, value in pieces]
            away = (value.norm() if found is None else (found.to(value) - value).norm() for found, value in own)
            off[key][i] = math.hypot(*map(float, away))
            size[key][i] = math.hypot(*(float(found.norm()) for found, _ in own if found is not None))

        for i in range(self.n):
            missing = {key: set(block.parameters) for key, (block, _) in candidates.items()}
            truth: dict[Tensor, Tensor] = {}
            norms: list[float] = []

            def arrived(parameter: Tensor, gradient: Tensor, i: int = i, missing: Any = missing, truth: Any = truth,
                        norms: list[float] = norms) -> None:  # fmt: skip
                truth[parameter] = gradient
                norms.append(float(gradient.norm()))
                for key in holders[parameter]:
                    missing[key].discard(parameter)
                    if not missing[key]:
                        compare(i, key, truth)
                for held in [p for p in truth if not any(missing[key] for key in holders[p])]:
                    del truth[held]

            self._walk_back(i, list(holders), arrived)
            total = math.hypot(*norms)
            for key in [key for key, left in missing.items() if left]:  # their loss does not depend on these
                compare(i, key, truth)
            if total > 0:
                self.told.add(i)
            self.noise = max(self.noise, self._rounding() * total)
        return [key for key in candidates if not bool((off[key] <= self.agree * size[key] + self.noise).all())]

    def _rounding(self) -> float:
        return 1e-2 if self.short else 1e-9 if self.losses.dtype == torch.float64 else 3e-6

    def _refuse_mixing(self, failing: Sequence[str]) -> None:
        """Raises ValueError where an example's gradient in the batch is not what it is alone."""
        if not self.alone or self.n == 1:
            return
        for name in failing:
            parameters = self.capture.blocks[name].parameters
            for i, alone in enumerate(self._truths(parameters)):
                beside = gradients_of(self.losses[i], self._whole(parameters))
                off = math.hypot(*(float((a - b).norm()) for a, b in zip(alone, beside, strict=True)))
                size = math.hypot(*(float(g.norm()) for g in alone))
                if off > (0.3 if self.short else _AGREE) * size + self.noise:
                    raise ValueError(
                        f"capture: in layer {name!r} the loss of one example depends on the rows of others: the "
                        f"gradient of example {i} is off by {off:.2g} from that of the example alone, whose norm is "
                        f"{size:.2g}; either the model mixes examples (BatchNorm in train mode?), or the batch is not "
                        "its first axis"
                    )

    def _refuse_loose(self, failing: Sequence[str]) -> None:
        if failing and self.forward.sight.batched:  # what takes all examples at once may not know every operation
            self.forward.sight.batched = False
            failing = self._failing({name: self._captured()[name] for name in failing})
        if failing:
            raise ValueError(f"capture: the gradient of {failing[0]!r} is not the same in two passes over one example")

    # ----------------------------------------------------------------------------------------------------- the readings

    def _drop_uncalled(self) -> None:
        capture, seen = self.capture, self.forward.seen
        for name, block in list(capture.blocks.items()):
            uses = tuple(use for use in block.uses if use.source in seen)
            unseen = {use.source for use in block.uses} - seen.keys()
            if block.loose or not unseen:
                continue
            if unseen & capture.without_graph:
                capture.leave_out(
                    block,
                    "its layer ran without a graph: under torch.no_grad(), or in a checkpoint with use_reentrant=True "
                    "(use_reentrant=False works)",
                )
                continue
            modules = {source: capture.module_of(source) for source in unseen}
            found = grad(self.losses.sum(), self._whole(block.parameters), None, keep=True)
            if not uses and any(g is not None for g in found):  # read by another module
                self._loosen([name], "another layer uses it")
                continue
            if any(module in capture.called for module in modules.values()):
                self._loosen([name], "its layer does not use it in a way that is known")
                continue
            if not uses and capture.selection.names(name):
                raise ValueError(
                    f"capture: layer {name!r} was not called in the forward pass; leave it out with layers="
                )
            capture.uncalled.update(set(modules.values()) - capture.kept)
            if uses:
                capture.blocks[name] = block._replace(uses=uses)
            else:
                capture.leave_out(block, NEVER_CALLED)
        capture.check_any()

    def _share(self) -> None:
        """Layers that see one row for the whole batch give one output for each example, where the model can go on."""
        capture = self.capture
        shared = {
            source
            for source, calls in self.forward.seen.items()
            if self.n > 1 and source in capture.hooked and all(capture.is_one_row(s, self.n) for s in calls)
        }
        if not shared:
            return
        losses, capture.sight.shared = self.losses.detach(), shared
        try:
            self._look()
            same = torch.allclose(self.losses.detach(), losses, rtol=self.agree, atol=1e-6)
        except (RuntimeError, ValueError, IndexError, TypeError):
            same = False
        if not same:
            capture.sight.shared = set()
            self._look()

    def _read_by_shape(self) -> None:
        """The first reading that the shapes allow; blocks that have none, or whose inputs are gone, become loose."""
        unreadable: set[str] = set()
        for source, calls in self.forward.seen.items():
            fitting = [r for r in READINGS if all(Pair.fits(s.x, s.shape, self.n, r) for s in calls)]
            if not fitting or any(s.x._version != s.version for s in calls):
                unreadable.add(source)
            elif fitting[0] != READINGS[0]:
                self.capture.sight.readings[source] = fitting[0]
        blocks = self.capture.blocks.items()
        names = [name for name, block in blocks if any(use.source in unreadable for use in block.uses)]
        if names:
            self._loosen(names, "its layer sees rows that are not the batch's, or inputs that are overwritten in place")

    def _try_vmap(self) -> None:
        parameters = [p for block in self.capture.blocks.values() if block.loose for p in block.parameters]
        if parameters and self.capture.sight.batched:
            try:
                self.forward.each_example(self.losses, parameters, keep=True)
            except (RuntimeError, ValueError, NotImplementedError):
                # What vmap has no rule or no room for. One backward pass per example gives the same gradients in less
                # memory, and raises whatever is wrong with the model itself.
                self.capture.sight.batched = False

    def _read_otherwise(self, failing: Sequence[str]) -> list[str]:
        """Takes another reading of the rows where one agrees with autograd; returns what still fails."""
        capture, raw = self.capture, self.forward.raw_pairs(self.losses, keep=True)
        candidates: dict[tuple[str, str], tuple[Block, Gradients]] = {}
        for name in failing:
            block = capture.blocks[name]
            sources = {use.source for use in block.uses}
            for reading in READINGS:
                if not all(Pair.fits(x, u.shape, self.n, reading) for s in sources for x, u in raw[s]):
                    continue
                try:
                    pairs = {s: [Pair.of(s, x, u, self.n, reading) for x, u in raw[s]] for s in sources}
                    candidates[name, reading] = block, self.forward.of_block(block, pairs)
                except (RuntimeError, ValueError, IndexError):  # a reading that does not fit the layer's shapes
                    continue
        wrong = set(self._failing(candidates))
        for name, reading in candidates:
            if (name, reading) not in wrong:
                capture.sight.readings.update({use.source: reading for use in capture.blocks[name].uses})
        return [name for name in failing if all(key in wrong for key in candidates if key[0] == name)]

    def _see_otherwise(self, failing: Sequence[str]) -> list[str]:
        """Vectors of positions as long as the batch, and layers that scale or shift in a way of their own."""
        capture = self.capture
        before = dict(capture.blocks)
        looked_up = {
            use.source
            for name in failing
            for use in before[name].uses
            if use.source in capture.hooked and all(s.x.dim() == 1 for s in self.forward.seen[use.source])
        }
        changed = {name for name in failing if any(use.source in looked_up for use in before[name].uses)}
        capture.sight.shared |= looked_up
        for name in failing:
            sources = {use.source for use in before[name].uses}
            module = capture.modules.get(next(iter(sources)))
            if len(sources) == 1 and module is not None and next(iter(sources)) in capture.inner:
                blocks = affine_block(next(iter(sources)), module)
                if not isinstance(blocks, str) and set(blocks[0].parameters) == set(before[name].parameters):
                    capture.blocks[name] = blocks[0]._replace(name=name)
                    capture.inner.discard(next(iter(sources)))
                    changed.add(name)
        if not changed:
            return list(failing)
        try:
            self._look()
            captured = self._captured()
            wrong = set(self._failing({name: captured[name] for name in changed}))
        except (RuntimeError, ValueError, IndexError, TypeError):
            wrong = changed
        capture.sight.shared -= {use.source for name in wrong for use in before[name].uses}
        for name in wrong:
            capture.blocks[name] = before[name]
        return [name for name in failing if name not in changed or name in wrong]

    def _loosen(self, names: Sequence[str], reason: str) -> None:
        """Covers the parameters of blocks one by one, as autograd has them."""
        capture = self.capture
        for name in names:
            capture.leave_out(capture.blocks[name], reason)
        used = capture.used
        parameters = {p: None for p, name in capture.names.items() if p not in used and capture.skipped[name] == reason}
        capture.loosen(parameters, reason)
        self._look()
        self._try_vmap()


def gradients_of(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Autograd's gradients of one loss, dense, zero where it does not depend on a parameter."""
    found = grad(loss, parameters, None, keep=True)
    dense = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return [g.to_dense() if g.is_sparse else g for g in dense]
