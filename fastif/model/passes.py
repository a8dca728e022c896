"""Passes of batches through a model, forwards and backwards; the model is as it was when they end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastif.data.batch import parts_of
from fastif.data.batches import as_loader, batch_length, moved_to, rows_of
from fastif.model.calls import dtype_of, fleeting_buffers, placed
from fastif.model.capture import Capture
from fastif.model.check import settle
from fastif.model.forward import Forward
from fastif.model.gradients import Gradients
from fastif.model.losses import IGNORED, Loss, Measurement, labels_in, measured
from fastif.progress import tqdm
from fastif.ranks import ALONE, Ranks
from fastif.sharded import Step, divided_like, find_sharding, is_part

_TOGETHER = 1 << 24  # bytes of inputs and outputs of covered layers that one forward pass brings on a CPU, at most
_LEAST = 1 << 20  # so little memory, and passes of fewer examples would only be slower
_LOOKED_AT = 5  # examples of a batch, which decide how the model is read
_LOOKED_AT_BYTES = 1 << 26  # that their layers and logits may take; two examples are looked at in any case
_LOGITS = 4  # times that the outputs of a model are there at once, on their way to the losses and back
_LOOSE = 16  # examples at a time where each takes a backward pass through the others' graph too
_RANDOM_LAYERS = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


class Passes:
    """How batches go through a model; the arguments are those of `Influence`.

    The ranks that hold a sharded model make every pass together (`Sharding`): `gradients` has this rank go along with
    the others once its own batches are at an end, and so does who calls `forward` batch by batch, by `go_along`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        layers: str | Sequence[str] | None,
        *,
        batch_size: int,
        memory: int,
        device: torch.device | str | None,
        autocast: torch.dtype | None,
        allow_train_mode: bool,
        progress: bool,
        ranks: Ranks = ALONE,
    ):
        self.sharding = find_sharding(model, ranks, "Influence")
        places = {parameter.device for parameter in model.parameters()}
        if device is None and len(places) > 1:
            raise ValueError(f"Influence: the model is spread over {', '.join(sorted(map(str, places)))}")
        self.model = model
        self.loss: Loss = loss
        self.capture = Capture(model, layers, self.sharding)
        self.device = places.pop() if device is None else torch.empty(0, device=device).device
        self.batch_size, self.autocast = batch_size, autocast
        self.allow_train_mode, self.progress = allow_train_mode, progress
        self.slice_bytes = min(_TOGETHER, max(_LEAST, memory // 4))  # of these inputs and outputs, at a time
        self._example_bytes = 0  # of inputs and outputs of covered layers
        self._example: tuple[Any, Any] | None = None  # a batch that goes along with other ranks' batches
        self.written: set[str] = set()  # buffers outside the model's state_dict that forward passes have written to

    @contextmanager
    def running(self, checkpoint: Mapping[str, Tensor] | None) -> Iterator[None]:
        """The model on the device, with a checkpoint's parameters and the capture's hooks; afterwards as it was."""
        if not self.allow_train_mode:
            for name, module in self.model.named_modules():
                acts = module.training and isinstance(module, _RANDOM_LAYERS) and getattr(module, "p", 1) > 0
                if acts:
                    raise ValueError(
                        f"Influence: {name!r} ({type(module).__name__}) is in train mode, so one example's loss is "
                        "random or depends on others; call model.eval(), or pass allow_train_mode=True"
                    )
        if self.sharding is None and any(map(is_part, self.model.parameters())):
            raise ValueError(
                "Influence: the model was sharded after this Influence was made: make one of it as it is now"
            )
        with ExitStack() as undo:
            undo.enter_context(torch.inference_mode(False))  # whatever surrounds the call
            undo.enter_context(torch.enable_grad())
            if checkpoint is not None or self.allow_train_mode:  # BatchNorm in train mode writes its buffers
                before = {key: value.detach().clone() for key, value in self.model.state_dict().items()}
                undo.callback(self.model.load_state_dict, before)
            if self.sharding is not None:
                undo.callback(self.sharding.reshard)
            if checkpoint is not None:
                self.model.load_state_dict(divided_like(self.model, checkpoint))
            undo.enter_context(placed(self.model, self.device, "Influence"))
            undo.enter_context(self.capture.attached())
            undo.callback(self._note_written, _versions(self.model))
            undo.enter_context(torch.autocast(self.device.type, enabled=False))
            yield

    def _note_written(self, before: Mapping[str, tuple[Tensor, int]]) -> None:
        for name, (value, version) in _versions(self.model).items():
            if name not in before or before[name][0] is not value or before[name][1] != version:
                self.written.add(name)

    def forward(self, x: Any) -> Forward:
        """The one place where `autocast` acts: all else is computed in full."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return self.capture.forward(x)

    def check(self, x: Any, y: Any, value: Measurement = "loss") -> None:
        """Refuses forward passes that draw at random, and has `settle` decide what is covered, on a few examples."""
        chosen = self._as_many_as_fit(x, choose_rows(x, y))
        few, labels_of_few = rows_of(x, chosen), None if y is None else rows_of(y, chosen)
        rows = torch.arange(len(chosen))

        def values(outputs: Any, rows: Tensor) -> Tensor:
            labels = labels_in(rows_of(few, rows), None if y is None else rows_of(labels_of_few, rows))
            return measured(value, self.loss, outputs, labels, len(rows))

        short = self.autocast is not None
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.autocast(self.device.type, self.autocast, enabled=short):
            if not (self.allow_train_mode and any(module.training for module in self.model.modules())):
                try:
                    self._refuse_draws(few, values, rows)
                except (RuntimeError, ValueError, IndexError, TypeError) as error:
                    self._refuse_cut(x, few, error)
                    raise
                if not isinstance(few, Tensor) and len(rows) > 1:
                    self._check_shared(few, values, rows)
            short = short or self._gathered_short
            forward = settle(self.capture, few, values, alone=not self.allow_train_mode, short=short)
        if self.sharding is not None:
            least = rows[: 2 if self.allow_train_mode else 1]  # BatchNorm in train mode takes no batch of one
            self._example = rows_of(few, least), None if y is None else rows_of(labels_of_few, least)
        if not (self.capture.fixed and self._example_bytes):  # which the fit found, where its state was loaded
            self._example_bytes = forward.nbytes // forward.n

    @property
    def _gathered_short(self) -> bool:
        """Whether the last forward pass of a sharded model computed in 16 bits, whatever its parameters have."""
        return self.sharding is not None and self.sharding.computes_in_16_bits

    def _as_many_as_fit(self, x: Any, chosen: Tensor) -> Tensor:
        """Fewer of the chosen examples where the layers of a large model take much room for each."""
        if len(chosen) <= 2:
            return chosen
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                forward = self.forward(rows_of(x, chosen[:2]))
        except Exception:  # what is wrong with the model or the batch is said by who looks at all of them
            return chosen
        outputs = sum(part.nbytes for _, part in parts_of(forward.outputs) if isinstance(part, Tensor))
        most = max(2, _LOOKED_AT_BYTES * forward.n // max(1, forward.nbytes + _LOGITS * outputs))
        if most >= len(chosen):
            return chosen
        return chosen[torch.linspace(0, len(chosen) - 1, most, dtype=torch.float64).round().long()]

    @torch.no_grad()
    def _refuse_draws(self, x: Any, values: Any, rows: Tensor) -> None:
        """Raises ValueError where two forward passes of one batch differ."""
        first, second = (values(self.capture.forward(x).outputs, rows).double() for _ in range(2))
        short = self.autocast is not None or self._gathered_short
        short = short or any(p.dtype.itemsize < 4 for p in self.model.parameters())
        exact = all(p.dtype == torch.float64 for p in self.model.parameters())
        allowed = (3e-2 if short else 1e-10 if exact else 1e-4) * max(1e-3, float(first.abs().max()))
        away = float((first - second).abs().max())
        if away > allowed:
            mode = "train" if any(module.training for module in self.model.modules()) else "eval"
            raise ValueError(
                f"Influence: the model is in {mode} mode and two forward passes of one batch differ (dropout?), by up "
                f"to {away:.2g} in the loss of an example: what is drawn at random has no gradient of its own; call "
                "model.eval(), pass training=self.training to what draws, or let the forward pass seed its generator"
            )

    @torch.no_grad()
    def _refuse_cut(self, x: Any, few: Any, error: Exception) -> None:
        """Raises ValueError where the model takes the batch as a whole and not its first examples."""
        if isinstance(x, Tensor) or batch_length(few) == batch_length(x):
            return
        for part, takes in ((few, False), (x, True)):
            try:
                self.capture.forward(part)
                if not takes:
                    return  # what failed is not the model
            except Exception:
                if takes:
                    return
        raise ValueError(
            f"Influence: the model takes the {batch_length(x)} examples of the first batch and not {batch_length(few)} "
            f"of them ({error}): if a part of the batch that all examples share has as many rows as the batch, make it "
            "fastif.data.Shared(...) where the batch is made"
        ) from error

    @property
    def seen(self) -> tuple[int, frozenset[str]]:
        """What passes found out about the model that no state keeps, and that a pickle does."""
        return self._example_bytes, frozenset(self.written)

    @seen.setter
    def seen(self, seen: tuple[int, frozenset[str]]) -> None:
        self._example_bytes, self.written = seen[0], set(seen[1])

    def needs_check(self, x: Any) -> bool:
        """Whether a batch shows what none before it could: one example alone does not show whether examples mix."""
        return self.capture.checked < min(2, batch_length(x))

    @torch.no_grad()
    def _check_shared(self, x: Any, values: Any, rows: Tensor) -> None:
        """Refuses to cut what all examples share: then one example less in the batch would change the others."""
        every = values(self.capture.forward(x).outputs, rows)
        fewer = values(self.capture.forward(rows_of(x, rows[:-1])).outputs, rows[:-1])
        types = every.dtype, self.autocast, dtype_of(self.model), torch.bfloat16 if self._gathered_short else None
        coarsest = max(torch.finfo(dtype).eps for dtype in types if dtype is not None)
        off = float((fewer - every[:-1]).abs().max())
        if off > coarsest**0.5 * float(every.abs().max()):
            raise ValueError(
                f"Influence: with {len(rows) - 1} examples of the first batch the model gives other values than with "
                f"{len(rows)}, by {off:.2g}: either it mixes examples, or a part of the batch that all examples "
                "share has as many rows as the batch; make it fastif.data.Shared(...) where the batch is made"
            )

    def at_a_time(self, n: int) -> int:
        """How many of a batch of n examples go through the model at once, as `check` found that their layers take room.

        On a CPU a few fill it, and what they leave is still in a cache when it is needed; a GPU takes the batch whole,
        and so does BatchNorm in train mode, to which a batch is one thing. Results are the same up to rounding.
        """
        loose = any(block.loose for block in self.capture.blocks.values())
        if self.allow_train_mode or (self.device.type != "cpu" and not loose):
            return n
        parts = max(1, math.ceil(n * self._example_bytes / self.slice_bytes), math.ceil(n / _LOOSE) if loose else 1)
        return math.ceil(n / parts)

    def check_later(self, x: Any, y: Any, value: Measurement = "loss") -> None:
        """`check` of a batch that is not the first, where it shows what none before it could."""
        if not self.needs_check(x):
            return
        if self.sharding is not None and self.sharding.ranks.world > 1:
            raise ValueError(
                f"Influence: of the first examples {self.capture.checked} had a gradient, and two at least decide how "
                "a model is read: ranks that hold it in parts look at the first batch alone, all at the same; let it "
                "begin with such examples"
            )
        self.check(x, y, value)

    def go_along(self) -> None:
        """Takes part in the passes through a sharded model that other ranks have batches for; results are dropped."""
        if self.sharding is None:
            return
        held: list[tuple[Forward, Tensor]] = []

        def take(step: Step, times: int) -> None:
            assert self._example is not None
            x, y = self._example
            if step == "forward":
                held.clear()
                forward = self.forward(x)
                held.append((forward, measured("loss", self.loss, forward.outputs, labels_in(x, y), forward.n)))
            else:
                forward, losses = held[0]
                forward.repeat(step, losses, times)

        self.sharding.follow(take)

    def slices(self, x: Any, y: Any) -> Iterator[tuple[slice, Any, Any]]:
        """The parts of a checked batch that go through the model one after another, and where they stand in it."""
        n = batch_length(x)
        each = self.at_a_time(n)
        if each == n:
            yield slice(0, n), x, y
            return
        for rows in torch.arange(n).split(each):
            yield slice(int(rows[0]), int(rows[-1]) + 1), rows_of(x, rows), None if y is None else rows_of(y, rows)

    def gradients(
        self, data: Any, name: str | None, value: Any = "loss"
    ) -> Iterator[tuple[int, int, dict[str, Gradients]]]:
        """First index, number of examples, and the gradients of every slice: of the loss or of a measurement.

        data: None for a rank that has none, and goes along with the others. `name` is that of the pass on its bar; a
        look at a batch has none.
        """
        if data is None:
            self.go_along()
            return
        start = 0
        with tqdm(as_loader(data, self.batch_size), name, disable=name is None or not self.progress) as batches:
            for number, (x, y) in enumerate(batches):
                self.capture.batch = number
                x, y = moved_to(x, self.device), moved_to(y, self.device)
                self.check_later(x, y, value)
                for rows, part, labels in self.slices(x, y):
                    with counted_from(rows.start):
                        forward = self.forward(part)
                        n = forward.n
                        values = measured(value, self.loss, forward.outputs, labels_in(part, labels), n)
                        gradients = forward.gradients(values, moments=False)
                    del forward, values  # and the graph with them
                    yield start, n, gradients
                    del gradients
                    start += n
        if start == 0:
            raise ValueError("data holds no examples")
        self.go_along()


@contextmanager
def counted_from(first: int) -> Iterator[None]:
    """Errors that name an example of a slice say which one of the batch the slice begins with."""
    try:
        yield
    except ValueError as error:
        if first == 0 or type(error) is not ValueError or "example " not in str(error):
            raise
        raise ValueError(f"{error} (counted from example {first} of the batch on)") from error


def _versions(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """The buffers outside a model's state_dict, and how often each was written to in place."""
    return {name: (b, 0 if b.is_inference() else b._version) for name, b in fleeting_buffers(model).items()}


def choose_rows(x: Any, y: Any) -> Tensor:
    """Examples of a batch to look at, int64: spread over it, and of those with a label that counts where there are any.

    The first ones may have something in common, and an example without a label has a gradient of zero, with which
    every reading of a layer agrees.
    """
    n = batch_length(x)
    labels = x.get("labels") if y is None and isinstance(x, Mapping) else y
    candidates = torch.arange(n)
    if isinstance(labels, Tensor) and labels.dim() and len(labels) == n and not labels.is_floating_point():
        counted = (labels != IGNORED).reshape(n, -1).any(1).nonzero()[:, 0].cpu()
        candidates = counted if len(counted) else candidates
    places = torch.linspace(0, len(candidates) - 1, min(_LOOKED_AT, len(candidates)), dtype=torch.float64)
    return candidates[places.round().long()]
