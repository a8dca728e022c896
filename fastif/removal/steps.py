"""What a removal returns: its steps and where they led."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class HeadStep(NamedTuple):
    """The head after a step, and how it came about."""

    step: int  # 1, 2, ...
    weight: Tensor  # [c, d]
    bias: Tensor | None  # [c]
    objective: float  # F after the step
    gradient_norm: float  # ‖∇F‖ before the step
    step_size: float  # multiple of the Newton step that was taken
    subset_size: int  # examples that carried the curvature
    seconds: float  # of this step: draw, gradient, curvature, solve and line search
    peak_bytes: int | None  # tensors allocated in it at the same time


class NetworkStep(NamedTuple):
    """A network's layers after a step, and how it came about."""

    step: int  # 1, 2, ...
    parameters: dict[str, Tensor]  # those that move, keyed like the model's
    objective: float  # F after the step
    gradient_norm: float  # ‖∇F‖ before the step
    step_size: dict[str, float]  # by layer: multiple of its Newton step that was taken; and of the "last step"
    subset_size: int  # examples that carried the curvature
    seconds: float  # of this step: gradient, draw, curvature, solve and search
    peak_bytes: int | None  # tensors allocated in it at the same time


class Removal(NamedTuple):
    """What `remove` returns."""

    state_dict: dict[str, Tensor]  # of the whole model: load_state_dict takes it
    history: list[HeadStep] | list[NetworkStep]  # one entry per step taken; empty if none would have lowered F
    moved: list[dict[str, Tensor]]  # the part of state_dict that moved: before the first step and after each

    def after(self, step: int) -> dict[str, Tensor]:
        """The state dict after so many steps: after(0) undoes the removal.

        Raises ValueError for a number of steps that were not taken.
        """
        if not 0 <= step < len(self.moved):
            raise ValueError(f"Removal.after: step must be in [0, {len(self.moved) - 1}], got {step}")
        return {**self.state_dict, **{key: value.clone() for key, value in self.moved[step].items()}}
