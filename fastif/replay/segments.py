"""A training in segments: their steps, their checkpoints and, of Adam, what gradients are divided by in each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from fastif.replay.log import TrainingLog

# Where no gradient was more than this share of the model's largest, it is zero but for rounding, as that of attention's
# key biases is, and the parameter is taken to stand still: Adam divides by so little, and moves it along noise.
_NOTHING = {torch.float32: 1e-6, torch.float64: 1e-14}


class Stretch(NamedTuple):
    """The steps of a segment, their checkpoints, and the one of these that speaks for them."""

    start: int
    stop: int
    checkpoints: list[int]
    middle: int


def divide(log: TrainingLog, segments: int) -> list[Stretch]:
    """The segments' steps, and of each the checkpoint nearest to the middle of its time; those without time (learning
    rate 0) are left out, as nothing moves in them."""
    rates, starts, found = log.rates(), log.starts, []
    check_decays(log)
    if segments > len(rates):
        raise ValueError(f"Source: segments must be at most the log's {len(rates)} steps, got {segments}")
    for segment in range(segments):
        start, stop = (len(rates) * bound // segments for bound in (segment, segment + 1))
        if not any(rates[start:stop]):
            continue
        inside = [number for number, step in enumerate(starts) if start <= step < stop]
        if not inside:
            raise ValueError(
                f"Source: segment {segment} (steps {start} to {stop - 1}) has no checkpoint, the log has one every "
                f"{log.every} steps: choose fewer segments than {segments}, or record more with TrainingLog(every=...)"
            )
        half = math.fsum(rates[start:stop]) / 2
        nearest = min(inside, key=lambda number: abs(math.fsum(rates[start : starts[number]]) - half))
        found.append(Stretch(start, stop, inside, nearest))
    if not found:
        raise ValueError(f"Source: a step of the log must have a learning rate > 0, got {len(rates)} steps without")
    return found


def check_decays(log: TrainingLog) -> None:
    """Raises ValueError where weight decay is not one: of SGD for all steps and groups, of Adam for all steps of each
    group, as it then stands on a diagonal of its own."""
    if "decoupled" not in log.rule.fields:
        _ = log.weight_decay
        return
    place = log.rule.fields.index("weight_decay")
    for group, (first, *rest) in enumerate(zip(*(step.numbers for step in log.steps), strict=True)):
        found = {first[place], *(row[place] for row in rest)}
        if len(found) > 1:
            raise ValueError(f"Source: steps of parameter group {group} differ in weight_decay: {sorted(found)}")


def shifts_of(log: TrainingLog, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What weight decay adds to P^½ G P^½ of Adam, of every parameter: P γ as part of the gradient, γ decoupled."""
    decay, decoupled = (log.rule.fields.index(field) for field in ("weight_decay", "decoupled"))
    names, found = iter(log.layout.names), dict[str, Tensor]()
    for numbers, count in zip(log.steps[0].numbers, log.layout.groups, strict=True):
        for name in islice(names, count):
            per_unit = torch.ones_like(scales[name]) if numbers[decoupled] else scales[name].square()
            found[name] = per_unit * numbers[decay]
    return found


def scales_of(log: TrainingLog, checkpoints: Sequence[int]) -> dict[str, Tensor] | None:
    """P^½ = (√v̂ + ε)^−½ of every parameter, with v̂ the mean of those that these checkpoints have; None for SGD.

    One checkpoint would not do: where a gradient comes once an epoch, as that of a rare word, v̂ falls in between by
    powers of β₂. Before an optimizer's first step there is no v̂: that of the next checkpoint, or of the end, stands in
    for it. P^½ is 0 where no gradient came that was more than rounding.
    """
    first = log.steps[0].numbers
    if log.rule.size(log.final.state, first[0], 1) is None:
        return None
    begun = min(numbers[-1] for numbers in first) - 1  # steps that the optimizer had taken when the log began
    later = (step for step in [*log.starts, len(log.steps)] if begun + step > 0)
    places = [log.starts[number] for number in checkpoints if begun + log.starts[number] > 0] or [next(later)]
    total = _sizes(log, places[0]).square_()
    for place in places[1:]:
        total += _sizes(log, place).square_()
    size, eps = (total / len(places)).sqrt_(), log.rule.fields.index("eps")
    moved = size > _NOTHING.get(log.dtype, 1e-6) * size.max()
    for where, numbers in zip(log.layout.slices, first, strict=True):
        size[where] += numbers[eps]
    return log.layout.split(torch.where(moved, size.rsqrt(), 0.0))


def _sizes(log: TrainingLog, place: int) -> Tensor:
    """√v̂ of all parameters before the step `place`, before which there is a checkpoint, or after the last step."""
    at_end = place == len(log.steps)
    point = log.final if at_end else log.point(log.starts.index(place))
    found = list[Tensor]()
    for where, now in zip(log.layout.slices, log.steps[place - at_end].numbers, strict=True):
        size = log.rule.size(tuple(part[where] for part in point.state), now, now[-1] if at_end else now[-1] - 1)
        assert size is not None
        found.append(size)
    return torch.cat(found)
