"""What a removal returns: its steps and where they led."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastif.removal.certificate import Certified
from fastif.renamed import find_renamed, warn_renamed


class Step(NamedTuple):
    """The layers that move, after a step, and how it came about."""

    step: int  # 1, 2, ...
    parameters: dict[str, Tensor]  # that move, keyed like the model's; a head on its own has "weight" and "bias"
    objective: float  # F after the step
    gradient_norm: float  # ‖∇F‖ before the step
    step_size: dict[str, float]  # by layer: multiple of its Newton step; and of the head's of F, and the "last step"
    subset_size: int  # examples that carried the curvature
    seconds: float  # of this step: gradient, draw, curvature, solve and search
    peak_bytes: int | None  # tensors allocated in it at the same time

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}: {size:.3g}" for name, size in self.step_size.items())
        return (
            f"Step({self.step}, objective={self.objective:.6g}, gradient_norm={self.gradient_norm:.3g}, "
            f"step_size={{{sizes}}}, subset_size={self.subset_size}, seconds={self.seconds:.3g})"
        )

    @property
    def weight(self) -> Tensor:
        """The head's, by the name that it had in `HeadStep`."""
        return self._of_head("weight")

    @property
    def bias(self) -> Tensor | None:
        """The head's, or None, by the name that it had in `HeadStep`."""
        return self._of_head("bias") if len(self.parameters) > 1 else None

    def _of_head(self, kind: str) -> Tensor:
        if len(self.step_size) > 1:
            raise AttributeError(f"Step.{kind}: several layers moved; see parameters")
        name = next(name for name in self.parameters if name.rpartition(".")[2] == kind)
        warn_renamed(f"Step.{kind}", f"Step.parameters[{name!r}]")
        return self.parameters[name]


class Removal(NamedTuple):
    """What `remove` returns."""

    state_dict: dict[str, Tensor]  # of the whole model: load_state_dict takes it
    history: list[Step]  # one entry per step taken; empty if none would have lowered F
    # The part of state_dict that moved: as trained, after each step (with none, `start`), after noise.
    moved: list[dict[str, Tensor]]
    certified: Certified | None = None  # with a certificate: what of the state dict is certified, in words by str()
    removed: Tensor | None = None  # int64 [r], on the CPU: the examples that it is without

    def __repr__(self) -> str:
        size = sum(value.numel() for value in self.moved[0].values())
        took = f"{len(self.history)} steps" if self.history else "no step, as none would have lowered the objective"
        end = f", objective={self.history[-1].objective:.6g}" if self.history else ""
        told = "" if self.certified is None else f", certified: {self.certified.certificate!r}"
        return f"Removal({took} of {size:,} parameters ({', '.join(self.moved[0])}){end}{told})"

    def after(self, step: int) -> dict[str, Tensor]:
        """The state dict after so many steps: after(0) is the model as it was trained.

        Raises ValueError for a number of steps that were not taken.
        """
        if not 0 <= step < len(self.moved):
            raise ValueError(f"Removal.after: step must be in [0, {len(self.moved) - 1}], got {step}")
        return {**self.state_dict, **{key: value.clone() for key, value in self.moved[step].items()}}


def check_start(start: Removal, model: nn.Module, indices: Tensor) -> None:
    """Raises unless `start` is a removal from this model, of no other examples than `indices`."""
    if not isinstance(start, Removal):
        raise TypeError(f"remove: start must be what remove returned, got {type(start).__name__}")
    trained = start.after(0)
    state = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    for key in sorted(state.keys() | {key for key, value in trained.items() if isinstance(value, Tensor)}):
        own, given = state.get(key), trained.get(key)
        if own is None or given is None or own.shape != given.shape or not torch.equal(own, given.to(own)):
            raise ValueError(
                f"remove: start is a removal from another model than this one, or this one has changed since: {key!r} "
                "differs; hand over the model as it was trained"
            )
    if start.removed is None:
        raise ValueError("remove: start does not say what it has removed; pass what remove returned")
    left_out = start.removed[~torch.isin(start.removed, indices.cpu())]
    if len(left_out):
        raise ValueError(
            f"remove: indices must name all examples that are removed, those of start= too: {len(left_out)} of them, "
            f"such as {int(left_out[0])}, are missing"
        )


def check_moves(start: Removal, names: AbstractSet[str]) -> None:
    """Raises ValueError where `start` has moved parameters that do not move now: they would fall back."""
    others = sorted(start.moved[0].keys() - names)
    if others:
        raise ValueError(
            f"remove: start has moved {', '.join(others)}, which do not move here; pass the layers= that it was made "
            "with, or more"
        )


def __getattr__(name: str) -> Any:
    return find_renamed(__name__, name, {"HeadStep": Step, "NetworkStep": Step})
