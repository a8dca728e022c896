"""Damping: what stands on the diagonal beside the curvature, and what is said where it does not suffice.

A number is the absolute λ of (G + λI)⁻¹. `RelativeDamping` is a share of the layer's own curvature; `TrainingDamping`
follows from how long the model was trained, and puts a function of the eigenvalues in the place of that inverse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_TIMES = 1e-30, 1e30  # Between these neither a time nor its inverse leaves the range of float32.


class NotPositiveDefinite(ValueError):
    """A damped curvature block has no Cholesky factor; the message names block, pivot and the damping that would do."""


class IllConditioned(ValueError):
    """Solves with a factor in single precision leave too large a residual; the message says what would do."""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class RelativeDamping:
    """λ = share × the mean eigenvalue of the layer's curvature, tr(G)/P of its P parameters: each layer has its own.

    For `KFAC`, `EKFAC`, `Shampoo` and `DataInf`, damping="auto" is RelativeDamping(0.1). `Diagonal` and `ExactBlock`
    take one, too. Estimators that multiply with the curvature of all layers together, and never see its trace, do not.

    Args:
        share: finite and > 0.
    """

    share: float

    def __post_init__(self) -> None:
        if not (_is_number(self.share) and 0 < self.share < math.inf):
            raise ValueError(f"RelativeDamping: share must be a finite number > 0, got {self.share!r}")


AUTO = RelativeDamping(0.1)  # What "auto" means but for an exact block, as in Grosse et al. (2023), Kwon et al. (2024).


@dataclass(frozen=True)
class TrainingDamping:
    """Damping that follows from the training: (G + λI)⁻¹ becomes f(G), f(x) = (1 − e^{−τ(x + γ)})/(x + γ).

    Gradient descent on the mean loss of curvature G, with weight decay γ, answers a constant change g of its gradient
    with −f(G) g after the time τ = Σ_t lr_t/(1 − momentum) (see `training_time`): steep directions have come to rest at
    1/(x + γ), flat ones have gone as far as τ lets them. So nothing is chosen by looking at an answer. f is the inverse
    damped by γ + (x + γ)/(e^{τ(x + γ)} − 1), which falls from at most γ + 1/τ to γ as x grows; as τ → ∞ it is
    (G + γI)⁻¹.

    `KFAC`, `EKFAC`, `Shampoo`, `Diagonal`, `ExactBlock` and `Arnoldi` know eigenvalues and apply f; `damping_used` is
    then 1/f(0), the number that treats flat directions in the same way. `CG`, `LiSSA`, `DataInf` and `RandomProjection`
    are damped by the number γ + 1/τ. docs/math.md (22).

    Args:
        time: τ, in [1e-30, 1e30].
        weight_decay: γ of the training, finite and >= 0; as in torch.optim.SGD, its part of the gradient is γθ.
    """

    time: float
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not (_is_number(self.time) and _TIMES[0] <= self.time <= _TIMES[1]):
            raise ValueError(
                f"TrainingDamping: time must be a number in [{_TIMES[0]:g}, {_TIMES[1]:g}], got {self.time!r}"
            )
        if not (_is_number(self.weight_decay) and 0 <= self.weight_decay < math.inf):
            raise ValueError(f"TrainingDamping: weight_decay must be a finite number >= 0, got {self.weight_decay!r}")

    def filter(self, eigenvalues: Tensor) -> Tensor:
        """f(x) of eigenvalues x, in their dtype; x < −γ is taken for −γ, where f is τ.

        Up to τ(x + γ) = ε, f is τ to rounding: x + γ is not let below that, and no quotient is 0/0.
        """
        shifted = eigenvalues + self.weight_decay
        shifted.clamp_(min=torch.finfo(eigenvalues.dtype).eps / self.time)
        return (shifted * -self.time).expm1_().neg_().div_(shifted)

    def at(self, eigenvalue: float) -> float:
        """f(x) of one eigenvalue."""
        return float(self.filter(torch.tensor(eigenvalue, dtype=torch.float64)))

    @property
    def of_flat_directions(self) -> float:
        """1/f(0): the number that damps directions of no curvature as f does."""
        return 1 / self.at(0.0)

    @property
    def constant(self) -> float:
        """γ + 1/τ: the number for estimators that know no eigenvalues, and what the filter's damping is at most."""
        return self.weight_decay + 1 / self.time


Damping = float | Literal["auto"] | RelativeDamping | TrainingDamping


def training_time(learning_rates: Iterable[float], momentum: float | Iterable[float] = 0.0) -> float:
    """τ = Σ_t lr_t/(1 − momentum_t) over the steps t of a training by SGD: how far it goes along a constant gradient.

    >>> round(training_time([0.1] * 50 + [0.01] * 50, momentum=0.9), 9)
    55.0

    Args:
        learning_rates: of every step (not of every epoch), finite and >= 0.
        momentum: in [0, 1); one for all steps, or that of each (`OneCycleLR` moves it, too).

    Raises ValueError for other values, and where no step has a learning rate > 0.
    """
    rates = [float(rate) for rate in learning_rates]
    if isinstance(momentum, Iterable):
        momenta = [float(one) for one in momentum]
        if len(momenta) != len(rates):
            raise ValueError(f"training_time: {len(rates)} learning rates and {len(momenta)} momenta; give one each")
    elif _is_number(momentum):
        momenta = [float(momentum)] * len(rates)
    else:
        raise ValueError(f"training_time: momentum must be a number in [0, 1), got {momentum!r}")
    for step, (rate, own) in enumerate(zip(rates, momenta, strict=True)):
        if not 0 <= own < 1:
            raise ValueError(f"training_time: momentum must be a number in [0, 1), got {own:g} in step {step}")
        if not 0 <= rate < math.inf:
            raise ValueError(f"training_time: learning_rates must be finite and >= 0, got {rate:g} in step {step}")
    if sum(rates) == 0:
        raise ValueError(f"training_time: learning_rates must have one > 0, got {len(rates)} steps without")
    return math.fsum(rate / (1 - own) for rate, own in zip(rates, momenta, strict=True))


def check_damping(damping: object, *rules: type) -> None:
    """Raises ValueError for what is neither a finite number >= 0, nor "auto", nor one of the rules."""
    if isinstance(damping, rules) or damping == "auto":
        return
    if not (isinstance(damping, (int, float)) and 0 <= damping < math.inf):
        others = "".join(f", a {rule.__name__}" for rule in rules)
        raise ValueError(f"damping must be a finite number >= 0{others} or 'auto', got {damping!r}")


def check_positive(op: str, damping: object, rules: tuple[type, ...], why: str = "") -> None:
    """The same where neither "auto" nor 0 will do."""
    check_damping(damping, *rules)
    if damping == "auto" or damping == 0:
        others = "".join(f" or a {rule.__name__}" for rule in rules)
        raise ValueError(f"{op}: damping must be a number > 0{others}, got {damping!r}{why}")


def constant_damping(damping: float | TrainingDamping) -> float:
    """The λ of an estimator that knows no eigenvalues."""
    return damping.constant if isinstance(damping, TrainingDamping) else damping


def invert(eigenvalues: Tensor, damping: object, used: float) -> Tensor:
    """What stands in the place of 1/(x + λ): f(x) of a TrainingDamping, otherwise that itself with λ = used."""
    return damping.filter(eigenvalues) if isinstance(damping, TrainingDamping) else 1 / (eigenvalues + used)


def sufficient(lowest: float) -> float:
    """A damping that outweighs the lowest eigenvalue found, with a margin, as a power of ten."""
    return 10.0 ** math.ceil(math.log10(max(-1.2 * lowest, 1e-12)))
