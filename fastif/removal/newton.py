"""Newton steps, one after another, on whatever problem brings an objective, its gradient, its curvature and a step.

The problems are `fastif.removal.head`'s, the head of a classifier, and `fastif.removal.network`'s, any layers of a
network. docs/math.md (13).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from fastif.measure import Measure
from fastif.removal.steps import Step


class Problem(Protocol):
    """An objective F and the parameters where it stands."""

    objective: float  # F at the parameters
    step_size: dict[str, float]  # of the last step, by layer

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Copies of those that move, keyed like the model's."""
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


def newton(problem: Problem, steps: int, tolerance: float = 0.0) -> Iterator[Step]:
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
        yield Step(
            number,
            problem.parameters,
            problem.objective,
            norm,
            problem.step_size,
            examples,
            work.seconds,
            work.peak_bytes,
        )
