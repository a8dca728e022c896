"""A training in segments: their steps, their checkpoints and, of Adam, what gradients are divided by in each."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastif.replay.log import TrainingLog

# Where no gradient was more than this share of the model's largest, it is zero but for rounding, as that of attention's
# key biases is, and the parameter is taken to stand still: Adam divides by so little, and moves it along noise.
_NOTHING = {torch.float32: 1e-6, torch.float64: 1e-14}


class Stretch(NamedTuple):
    """The steps of a segment, and the checkpoint that speaks for them."""

    start: int
    stop: int
    checkpoint: int


def divide(log: TrainingLog, segments: int) -> list[Stretch]:
    """The segments' steps, and of each the checkpoint nearest to the middle of its time."""
    rates, starts, found = log.rates(), log.starts, []
    decays_of(log)
    if segments > len(rates):
        raise ValueError(f"Source: segments must be at most the log's {len(rates)} steps, got {segments}")
    for segment in range(segments):
        start, stop = (len(rates) * bound // segments for bound in (segment, segment + 1))
        inside = [number for number, step in enumerate(starts) if start <= step < stop]
        if not inside:
            raise ValueError(
                f"Source: segment {segment} (steps {start} to {stop - 1}) has no checkpoint: choose fewer segments "
                f"than the {len(starts)} checkpoints, or record more with TrainingLog(every=...)"
            )
        half = math.fsum(rates[start:stop]) / 2
        nearest = min(inside, key=lambda number: abs(math.fsum(rates[start : starts[number]]) - half))
        found.append(Stretch(start, stop, nearest))
    return found


def decays_of(log: TrainingLog) -> tuple[float, float]:
    """Weight decay as part of the gradient, and decoupled from it (AdamW): one of them is 0."""
    decay = log.weight_decay
    if "decoupled" not in log.rule.fields:
        return decay, 0.0
    place = log.rule.fields.index("decoupled")
    found = {bool(row[place]) for step in log.steps for row in step.numbers}
    if len(found) > 1:
        raise ValueError("Source: parameter groups differ in whether weight decay is decoupled from the gradient")
    return (0.0, decay) if found.pop() else (decay, 0.0)


def scales_of(log: TrainingLog, checkpoint: int) -> dict[str, Tensor] | None:
    """P^½ = (√v̂ + ε)^−½ of every parameter, with the v̂ that a checkpoint has; None for SGD.

    Before an optimizer's first step there is no v̂: that of the next checkpoint, or of the end, stands in for it. P^½ is
    0 where no gradient came that was more than rounding.
    """
    first, last = log.steps[0].numbers, len(log.steps)
    if log.rule.size(log.final.state, first[0], 1) is None:
        return None
    places = [*log.starts[checkpoint:], last]
    begun = min(numbers[-1] for numbers in first) - 1  # steps that the optimizer had taken when the log began
    place = next(step for step in places if begun + step > 0)
    point = log.final if place == last else log.point(log.starts.index(place))
    sizes, epsilons, eps = list[Tensor](), list[Tensor](), log.rule.fields.index("eps")
    for where, now in zip(log.layout.slices, log.steps[min(place, last - 1)].numbers, strict=True):
        taken = now[-1] if place == last else now[-1] - 1
        size = log.rule.size(tuple(part[where] for part in point.state), now, taken)
        assert size is not None
        sizes.append(size)
        epsilons.append(torch.full_like(size, now[eps]))
    size = torch.cat(sizes)
    moved = size > _NOTHING.get(log.dtype, 1e-6) * size.max()
    return log.layout.split(torch.where(moved, (size + torch.cat(epsilons)).rsqrt(), 0.0))
