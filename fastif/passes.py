"""Passes of batches through a model, forwards and backwards; the model is as it was when they end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastif.capture import Capture, Forward
from fastif.data import as_loader, batch_length, rows_of
from fastif.features import moved_to, placed
from fastif.gradients import Gradients
from fastif.losses import Loss, Measurement, labels_in, measured

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
        values = measured(value, self.loss, forward.outputs, labels, forward.n)
        if not self.allow_train_mode and any(module.training for module in self.model.modules()):
            again = measured(value, self.loss, self.forward(few).outputs, labels, forward.n)
            if not torch.allclose(again, values, rtol=1e-3, atol=1e-6):
                raise ValueError(
                    "Influence: the model is in train mode and two forward passes of one batch differ (dropout?); "
                    "call model.eval(), or pass allow_train_mode=True"
                )
        forward.check(values, mixing=not self.allow_train_mode)

    def gradients(self, data: Any, name: str, value: Any = "loss") -> Iterator[tuple[int, int, dict[str, Gradients]]]:
        """First index, number of examples, and the gradients of every batch: of the loss or of a measurement."""
        start = 0
        with tqdm(as_loader(data, self.batch_size), name, disable=not self.progress) as batches:
            for number, (x, y) in enumerate(batches):
                self.capture.batch = number
                x, y = moved_to(x, self.device), moved_to(y, self.device)
                if not self.capture.checked:
                    self.check(x, y, value)
                forward = self.forward(x)
                n, values = forward.n, measured(value, self.loss, forward.outputs, labels_in(x, y), forward.n)
                gradients = forward.gradients(values)
                del forward, values  # and the graph with them
                yield start, n, gradients
                del gradients
                start += n
        if start == 0:
            raise ValueError("data holds no examples")
