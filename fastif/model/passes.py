"""Passes of batches through a model, forwards and backwards; the model is as it was when they end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastif.data.batches import as_loader, batch_length, moved_to, rows_of
from fastif.model.calls import dtype_of, placed
from fastif.model.capture import Capture, Forward
from fastif.model.gradients import Gradients
from fastif.model.losses import Loss, Measurement, labels_in, measured

_TOGETHER = 1 << 24  # bytes of inputs and outputs of covered layers that one forward pass brings on a CPU, at most
_LEAST = 1 << 20  # so little memory, and passes of fewer examples would only be slower
_RANDOM_LAYERS = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


class Passes:
    """How batches go through a model; the arguments are those of `Influence`."""

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
    ):
        places = {parameter.device for parameter in model.parameters()}
        if device is None and len(places) > 1:
            raise ValueError(f"Influence: the model is spread over {', '.join(sorted(map(str, places)))}")
        self.model = model
        self.loss: Loss = loss
        self.capture = Capture(model, layers)
        self.device = places.pop() if device is None else torch.empty(0, device=device).device
        self.batch_size, self.autocast = batch_size, autocast
        self.allow_train_mode, self.progress = allow_train_mode, progress
        self.slice_bytes = min(_TOGETHER, max(_LEAST, memory // 4))  # of these inputs and outputs, at a time
        self._example_bytes = 0  # of inputs and outputs of covered layers

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
        with ExitStack() as undo:
            undo.enter_context(torch.inference_mode(False))  # whatever surrounds the call
            undo.enter_context(torch.enable_grad())
            if checkpoint is not None or self.allow_train_mode:  # BatchNorm in train mode writes its buffers
                before = {key: value.detach().clone() for key, value in self.model.state_dict().items()}
                undo.callback(self.model.load_state_dict, before)
            if checkpoint is not None:
                self.model.load_state_dict(checkpoint)
            undo.enter_context(placed(self.model, self.device, "Influence"))
            undo.enter_context(self.capture.attached())
            undo.enter_context(torch.autocast(self.device.type, enabled=False))
            yield

    def forward(self, x: Any) -> Forward:
        """The one place where `autocast` acts: all else is computed in full."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return self.capture.forward(x)

    def check(self, x: Any, y: Any, value: Measurement = "loss") -> None:
        """Refuses what `Forward.check` refuses, and random forward passes, on a few examples; once."""
        most = min(5, batch_length(x))
        for size in (most, max(1, most - 1)):  # the second where a layer sees as many positions as examples: which?
            rows = torch.arange(size)
            few = rows_of(x, rows)
            labels = labels_in(few, None if y is None else rows_of(y, rows))
            forward = self.forward(few)
            if not self.capture.ambiguous:
                break
        self._example_bytes = forward.nbytes // forward.n
        values = measured(value, self.loss, forward.outputs, labels, forward.n)
        if not self.allow_train_mode and any(module.training for module in self.model.modules()):
            again = measured(value, self.loss, self.forward(few).outputs, labels, forward.n)
            if not torch.allclose(again, values, rtol=1e-3, atol=1e-6):
                raise ValueError(
                    "Influence: the model is in train mode and two forward passes of one batch differ (dropout?); "
                    "call model.eval(), or pass allow_train_mode=True"
                )
        if not isinstance(x, Tensor) and len(values) > 1:
            self._check_shared(few, None if y is None else rows_of(y, rows), values, value)
        forward.check(values, mixing=not self.allow_train_mode)

    def _check_shared(self, x: Any, y: Any, values: Tensor, value: Measurement) -> None:
        """Refuses to cut what all examples share: then one example less in the batch would change the others."""
        rows = torch.arange(len(values) - 1)
        x, y = rows_of(x, rows), None if y is None else rows_of(y, rows)
        fewer = measured(value, self.loss, self.forward(x).outputs, labels_in(x, y), len(rows))
        coarsest = max(torch.finfo(t).eps for t in (values.dtype, self.autocast, dtype_of(self.model)) if t is not None)
        values = values.detach()
        off = float((fewer.detach() - values[:-1]).abs().max())
        if off > coarsest**0.5 * float(values.abs().max()):
            raise ValueError(
                f"Influence: with {len(rows)} examples of the first batch the model gives other values than with "
                f"{len(values)}, by {off:.2g}: either it mixes examples, or a part of the batch that all examples "
                "share has as many rows as the batch; make it fastif.data.Shared(...) where the batch is made"
            )

    def at_a_time(self, n: int) -> int:
        """How many of a batch of n examples go through the model at once, as `check` found that their layers take room.

        On a CPU a few fill it, and what they leave is still in a cache when it is needed; a GPU takes the batch whole,
        and so does BatchNorm in train mode, to which a batch is one thing. Results are the same up to rounding.
        """
        if self.device.type != "cpu" or self.allow_train_mode:
            return n
        parts = max(1, math.ceil(n * self._example_bytes / self.slice_bytes))
        return math.ceil(n / parts)

    def slices(self, x: Any, y: Any) -> Iterator[tuple[slice, Any, Any]]:
        """The parts of a checked batch that go through the model one after another, and where they stand in it."""
        n = batch_length(x)
        each = self.at_a_time(n)
        if each == n:
            yield slice(0, n), x, y
            return
        for rows in torch.arange(n).split(each):
            yield slice(int(rows[0]), int(rows[-1]) + 1), rows_of(x, rows), None if y is None else rows_of(y, rows)

    def gradients(self, data: Any, name: str, value: Any = "loss") -> Iterator[tuple[int, int, dict[str, Gradients]]]:
        """First index, number of examples, and the gradients of every slice: of the loss or of a measurement."""
        start = 0
        with tqdm(as_loader(data, self.batch_size), name, disable=not self.progress) as batches:
            for number, (x, y) in enumerate(batches):
                self.capture.batch = number
                x, y = moved_to(x, self.device), moved_to(y, self.device)
                if not self.capture.checked:
                    self.check(x, y, value)
                for rows, part, labels in self.slices(x, y):
                    with counted_from(rows.start):
                        forward = self.forward(part)
                        n = forward.n
                        values = measured(value, self.loss, forward.outputs, labels_in(part, labels), n)
                        gradients = forward.gradients(values)
                    del forward, values  # and the graph with them
                    yield start, n, gradients
                    del gradients
                    start += n
        if start == 0:
            raise ValueError("data holds no examples")


@contextmanager
def counted_from(first: int) -> Iterator[None]:
    """Errors that name an example of a slice say which one of the batch the slice begins with."""
    try:
        yield
    except ValueError as error:
        if first == 0 or type(error) is not ValueError or "example " not in str(error):
            raise
        raise ValueError(f"{error} (counted from example {first} of the batch on)") from error
