"""Newton steps, one after another, on whatever problem brings an objective, its gradient, its curvature and a step.

The problems are `fastif.removal.head`'s, the head of a classifier, and `fastif.removal.network`'s, any layers of a
network. docs/math.md (13).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

from fastif.measure import Measure


class Problem(Protocol):
    """An objective F and the parameters where it stands."""

    objective: float  # F at the parameters

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    def gradient(self) -> float:
        """Takes ∇F at the parameters; returns its norm."""
        ...

    def curvature(self) -> int:
        """Takes the curvature at the parameters; returns the number of examples that carried it."""
        ...

    def step(self) -> bool:
        """Moves the parameters and `objective` by a step; False, and nothing moves, where no step lowers F."""
        ...


class Figures(NamedTuple):
    """How a step came about."""

    step: int  # 1, 2, ...
    objective: float  # F after the step
    gradient_norm: float  # ‖∇F‖ before the step
    subset_size: int  # examples that carried the curvature
    seconds: float  # of this step: gradient, draw, curvature, solve and search
    peak_bytes: int | None  # tensors allocated in it at the same time


def newton(problem: Problem, steps: int, tolerance: float = 0.0) -> Iterator[Figures]:
    """Takes at most `steps` steps; ends where ‖∇F‖ <= tolerance and where F no longer falls.

    After each one `problem` stands where the step led.
    """
    for number in range(1, steps + 1):
        with Measure(problem.device) as work:
            norm = problem.gradient()
            if norm <= tolerance:
                return
            examples = problem.curvature()
            if not problem.step():
                return
        yield Figures(number, problem.objective, norm, examples, work.seconds, work.peak_bytes)
