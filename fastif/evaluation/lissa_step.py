"""The baseline of the paper that fastif's samplers are named after: one influence step, its inverse from LiSSA."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastif.curvature import LiSSA
from fastif.curvature.matrix_free.operator import Matrix
from fastif.influence import Influence
from fastif.measure import Measure
from fastif.model.features import Extracted
from fastif.samplers.draw import draw
from fastif.samplers.subset import Subset

STEP_SIZES = tuple(2.0**power for power in range(-6, 7))
SEARCHED = 5_000  # retained training examples at most that choose the step size


class Removed(NamedTuple):
    """A network without some examples, and the cost of the influence computation."""

    state: dict[str, Tensor]
    seconds: float
    peak_bytes: int | None
    step_size: float | None = None  # of LiSSA's one step
    converged: bool | None = None  # whether its series did
    sized: Callable[[float], dict[str, Tensor]] | None = None  # the network after the same step of another size


class LiSSAStep:
    """One influence step of all parameters, its curvature from m retained examples.

    θ̂ + η (C + λI)⁻¹ (1/n) Σ_removed ∇ℓ with C the curvature of the sample, by `fastif.LiSSA` with the sample's graph
    kept, so that memory grows with m as in the published code. The step η is the one of `STEP_SIZES` with the lowest
    objective over at most `SEARCHED` of the RETAINED training examples (the published one looks at the test set), as
    `lowest` finds it; that search is not counted in `seconds` and `peak_bytes`.

    Args:
        model: the trained classifier.
        data: x [n, ...] and y int64 [n], all that it was trained on.
        seen: what `fastif.extract(model, data)` returned, for the samplers.
        weight_decay: of the training, added to the damping.
        matrix, damping, iterations: of `fastif.LiSSA`.
        device, batch_size: of `fastif.Influence`.
    """

    def __init__(
        self,
        model: nn.Module,
        data: tuple[Tensor, Tensor],
        seen: Extracted,
        weight_decay: float,
        *,
        matrix: Matrix = "ggn",
        damping: float = 1e-2,
        iterations: int = 50,
        device: torch.device | str = "cpu",
        batch_size: int = 256,
    ):
        if seen.labels is None:
            raise ValueError("LiSSAStep: the training data has no labels")
        self.model, self.data, self.weight_decay = model, data, weight_decay
        self.seen = {"features": seen.features, "logits": seen.logits, "labels": seen.labels}
        self.matrix: Matrix = matrix
        self.damping, self.iterations, self.device, self.batch_size = damping, iterations, device, batch_size

    def __call__(self, removed: Tensor, sampler: Callable[..., Any], m: int, seed: int) -> Removed:
        """The network without the examples `removed` (int64 [r]); `m` retained ones are drawn by `sampler`."""
        x, y = self.data
        n = len(y)
        kept = torch.ones(n, dtype=torch.bool)
        kept[removed] = False
        kept = kept.nonzero()[:, 0]
        retained = {name: values[kept] for name, values in self.seen.items()}
        series = LiSSA(self.damping + self.weight_decay, self.matrix, max_steps=self.iterations, keep_graph=True)
        with warnings.catch_warnings(record=True) as said, Measure(self.device) as work:
            warnings.simplefilter("always")  # of a series that did not converge
            generator = torch.Generator().manual_seed(seed)
            drawn = draw(partial(sampler, k=m), **retained, generator=generator)  # pyright: ignore[reportArgumentType]
            subset = Subset(kept[drawn.indices], drawn.weights * (len(kept) / n))
            influence = Influence(
                self.model, curvature=series, device=self.device, batch_size=self.batch_size, progress=False
            )
            influence.fit(self.data, subset=subset)
            change = influence.on_parameters((x[removed], y[removed]))
        size = self._step_size(change, kept)

        def sized(size: float) -> dict[str, Tensor]:
            return self._moved(change, size / n)

        return Removed(sized(size), work.seconds, work.peak_bytes, size, not said, sized)

    def _step_size(self, change: dict[str, Tensor], kept: Tensor) -> float:
        n = len(self.data[1])
        moved = copy.deepcopy(self.model)
        looked = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))[:SEARCHED]]

        def objective(size: float) -> float:
            moved.load_state_dict(self._moved(change, size / n))
            return self._objective(moved, looked, len(kept))

        return lowest(objective)

    def _moved(self, change: dict[str, Tensor], size: float) -> dict[str, Tensor]:
        state = self.model.state_dict()
        return {**state, **{name: state[name] - size * value for name, value in change.items()}}

    def _objective(self, model: nn.Module, looked: Tensor, kept: int) -> float:
        x, y = self.data
        total = 0.0
        with torch.no_grad():
            for rows in looked.split(1024):
                outputs = model(x[rows].to(self.device)).double()
                total += float(nn.functional.cross_entropy(outputs, y[rows].to(outputs.device), reduction="sum"))
            decay = sum(float(p.double().square().sum()) for p in model.parameters())
        return total * (kept / len(looked)) / len(y) + 0.5 * self.weight_decay * decay


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
