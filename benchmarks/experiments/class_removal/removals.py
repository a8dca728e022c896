"""The removals that are compared, each a function from (network, removed examples, seed) to what it made and cost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastif import remove, samplers
from fastif.data import Data
from fastif.evaluation.lissa_step import Removed
from fastif.model.features import Extracted

SAMPLERS: dict[str, Callable[..., Any]] = {
    "random": samplers.random,
    "intermediate distance": partial(samplers.intermediate_distance, weighted=False),
    "intermediate distance, weighted": samplers.intermediate_distance,
    "logit": partial(samplers.logit, weighted=False),
    "logit, weighted": samplers.logit,
}


class Setting(NamedTuple):
    """What all removals share."""

    model: nn.Module
    images: Data
    device: torch.device
    weight_decay: float
    batch_size: int

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        return self.images.x_train, self.images.y_train


def newton(
    setting: Setting,
    removed: Tensor,
    layers: Any,
    steps: int,
    sampler: Any,
    k: int,
    seed: int,
    extracted: Extracted | None = None,
) -> Removed:
    """fastif's way: subsampled Newton steps on the retained objective, `fastif.remove`."""
    removal = remove(
        setting.model,
        setting.data,
        removed,
        layers=layers,
        subset=partial(sampler, k=k),
        steps=steps,
        weight_decay=setting.weight_decay,
        extracted=extracted,
        batch_size=setting.batch_size,
        device=setting.device,
        generator=torch.Generator().manual_seed(seed),
        progress=False,
    )
    peaks = [step.peak_bytes for step in removal.history if step.peak_bytes is not None]
    seconds = sum(step.seconds for step in removal.history)
    return Removed(removal.state_dict, seconds, max(peaks, default=None))


def last_block(model: nn.Module) -> list[str]:
    """The last convolution, the normalisation after it and the head."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)]
    return [*names[-2:], "head"]
