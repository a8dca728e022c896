"""What estimators with eigenvalues say of one block: the basis in which they are diagonal, and what stands there."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fastif.model.gradients import Gradients


class Eigenbasis(NamedTuple):
    """A block's curvature Q diag(Λ) Qᵀ, and the damped inverse Q diag(f(Λ)) Qᵀ that its estimator solves with."""

    eigenvalues: Tensor  # Λ >= 0, [g, o, d], undamped
    inverse: Tensor  # f(Λ), [g, o, d]: 1/(Λ + λ), or what a `TrainingDamping` puts in its place
    rotate: Callable[[Gradients], Gradients]  # g → Qᵀ g
