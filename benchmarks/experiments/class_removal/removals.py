"""The removals that are compared, each a function from (network, removed examples, seed) to what it made and cost."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastif
from benchmarks.experiments.class_removal.networks import channels_last
from fastif import Influence, remove, samplers
from fastif.curvature.matrix_free.operator import Matrix
from fastif.data import Data
from fastif.measure import Measure
from fastif.model.features import Extracted
from fastif.samplers import Subset, draw

STEP_SIZES = tuple(2.0**power for power in range(-6, 7))
SEARCHED = 5_000

SAMPLERS: dict[str, Callable[..., Any]] = {
    "random": samplers.random,
    "intermediate distance": partial(samplers.intermediate_distance, weighted=False),
    "intermediate distance, weighted": samplers.intermediate_distance,
    "logit": partial(samplers.logit, weighted=False),
    "logit, weighted": samplers.logit,
}


class Removed(NamedTuple):
    """A network without some examples, and the cost of the influence computation."""

    state: dict[str, Tensor]
    seconds: float
    peak_bytes: int | None
    step_size: float | None = None  # of LiSSA's one step
    converged: bool | None = None  # whether its series did
    sized: Callable[[float], dict[str, Tensor]] | None = None  # the network after the same step of another size


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


def lowest(value_at: Callable[[float], float]) -> float:
    """The step size where a walk from 1 through `STEP_SIZES` ends that goes on while the value falls: up, else down."""
    start = place = STEP_SIZES.index(1.0)
    best = value_at(1.0)
    for way in (1, -1):
        while 0 <= place + way < len(STEP_SIZES) and (value := value_at(STEP_SIZES[place + way])) < best:
            place, best = place + way, value
        if place != start:
            break
    return STEP_SIZES[place]


class LiSSA:
    """One influence step of all parameters, its curvature from m retained examples: the baseline.

    θ̂ + η (C + λI)⁻¹ (1/n) Σ_removed ∇ℓ with C the curvature of the sample, by fastif's LiSSA with the sample's graph
    kept, so that memory grows with m as in the published code. The step η is the one of `STEP_SIZES` with the lowest
    objective over at most `SEARCHED` of the RETAINED training examples (the published one looks at the test set),
    as `lowest` finds it; that search is not counted.
    """

    def __init__(self, setting: Setting, seen: Extracted, matrix: Matrix, damping: float, iterations: int):
        self.setting, self.damping, self.iterations = setting, damping, iterations
        self.matrix: Matrix = matrix
        assert seen.labels is not None
        self.seen = {"features": seen.features, "logits": seen.logits, "labels": seen.labels}

    def __call__(self, removed: Tensor, sampler: Callable[..., Any], m: int, seed: int) -> Removed:
        model, images, device, weight_decay, batch_size = self.setting
        n = len(images.y_train)
        kept = torch.ones(n, dtype=torch.bool)
        kept[removed] = False
        kept = kept.nonzero()[:, 0]
        retained = {name: values[kept] for name, values in self.seen.items()}
        series = fastif.LiSSA(self.damping + weight_decay, self.matrix, max_steps=self.iterations, keep_graph=True)
        with warnings.catch_warnings(record=True) as said, Measure(device) as work:
            warnings.simplefilter("always")  # of a series that did not converge
            drawn = draw(partial(sampler, k=m), **retained, generator=torch.Generator().manual_seed(seed))
            subset = Subset(kept[drawn.indices], drawn.weights * (len(kept) / n))
            influence = Influence(model, curvature=series, device=device, batch_size=batch_size, progress=False)
            influence.fit(self.setting.data, subset=subset)
            change = influence.on_parameters((images.x_train[removed], images.y_train[removed]))
        size = self._step_size(change, kept)

        def sized(size: float) -> dict[str, Tensor]:
            return self._moved(change, size / n)

        return Removed(sized(size), work.seconds, work.peak_bytes, size, not said, sized)

    def _step_size(self, change: dict[str, Tensor], kept: Tensor) -> float:
        n = len(self.setting.images.y_train)
        moved = channels_last(copy.deepcopy(self.setting.model))
        looked = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))[:SEARCHED]]

        def objective(size: float) -> float:
            moved.load_state_dict(self._moved(change, size / n))
            return self._objective(moved, looked, len(kept))

        return lowest(objective)

    def _moved(self, change: dict[str, Tensor], size: float) -> dict[str, Tensor]:
        state = self.setting.model.state_dict()
        return {**state, **{name: state[name] - size * value for name, value in change.items()}}

    def _objective(self, model: nn.Module, looked: Tensor, kept: int) -> float:
        x, y = self.setting.data
        total = 0.0
        with torch.no_grad():
            for rows in looked.split(1024):
                outputs = model(x[rows].to(self.setting.device)).double()
                total += float(nn.functional.cross_entropy(outputs, y[rows].to(outputs.device), reduction="sum"))
            decay = sum(float(p.double().square().sum()) for p in model.parameters())
        return total * (kept / len(looked)) / len(y) + 0.5 * self.setting.weight_decay * decay


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
