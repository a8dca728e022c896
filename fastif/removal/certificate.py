"""A certificate for a removed head: with Gaussian noise it cannot be told from a retrained head with the same noise.

The retained objective of a head is strongly convex, so that ‖θ − θ*‖ <= ‖∇F(θ)‖ / weight_decay, and two Gaussians that
are near enough are (ε, δ)-indistinguishable (the analytic Gaussian mechanism). docs/math.md (28).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Certificate:
    """What `remove` is asked to certify of the head: (ε, δ) against retraining, with Gaussian noise of a fixed σ.

    For every set S of heads, P[removed + noise ∈ S] <= e^ε P[retrained + noise ∈ S] + δ, and the same with the two
    exchanged. `noise` is fixed beforehand, so that it tells nothing of the data; it gives the `distance` Δ that the two
    heads may be apart without it. docs/math.md (28); Balle & Wang 2018.

    Args:
        epsilon: ε > 0, finite.
        delta: δ in (0, 1).
        noise: σ > 0, the standard deviation added to every entry of weight and bias.

    >>> round(Certificate(epsilon=1.0, delta=1e-5, noise=0.01).distance, 6)
    0.002681

    Raises ValueError for numbers outside these ranges.
    """

    epsilon: float
    delta: float
    noise: float

    def __post_init__(self):
        for name, rule, holds in (
            ("epsilon", "a finite number > 0", 0 < self.epsilon < math.inf),
            ("delta", "in (0, 1)", 0 < self.delta < 1),
            ("noise", "a finite number > 0", 0 < self.noise < math.inf),
        ):
            if not holds:
                raise ValueError(f"Certificate: {name} must be {rule}, got {getattr(self, name)}")

    @property
    def distance(self) -> float:
        """Δ: how far apart (2-norm over weight and bias) the two heads may be without the noise."""
        return self.noise * largest_shift(self.epsilon, self.delta)

    def delta_after(self, removals: int) -> float:
        """The δ that ε has for so many released heads together, each with this certificate and noise of its own.

        Each is within Δ of its own retraining, whatever was released before: together they are Gaussians √k Δ apart.

        >>> certificate = Certificate(epsilon=1.0, delta=1e-5, noise=0.01)
        >>> certificate.delta_after(1) <= 1e-5 < certificate.delta_after(2)
        True
        """
        if type(removals) is not int or removals < 1:
            raise ValueError(f"Certificate.delta_after: removals must be an integer >= 1, got {removals!r}")
        return gaussian_delta(self.epsilon, math.sqrt(removals) * self.distance / self.noise)


class Certified(NamedTuple):
    """What of a removal is certified, and how. Not for release: `bound` depends on the data without noise."""

    certificate: Certificate
    distance: float  # Δ: what the certificate allows
    bound: float  # ‖θ − θ*‖ <= bound <= distance before the noise, rounding errors included

    def __str__(self) -> str:
        epsilon, delta, noise = self.certificate.epsilon, self.certificate.delta, self.certificate.noise
        return (
            f"Certified: the head, with Gaussian noise of standard deviation {noise:g}, is ({epsilon:g}, {delta:g})-"
            "indistinguishable from the head retrained to convergence on the features of the retained examples with "
            f"noise of its own: without noise the two are at most {self.distance:.3g} apart. Not certified: the "
            "features. The layers below the head stay as they were trained, and what they took from the removed "
            "examples remains; nothing is certified of features that come from these alone. The steps' heads without "
            "noise (Removal.moved, Removal.history), certified.bound and the generator's seed must not be released "
            "beside it. The noise is that of a pseudo-random generator in floating point. Several released heads: see "
            "Certificate.delta_after."
        )


def gaussian_delta(epsilon: float, shift: float) -> float:
    """The least δ for which N(0, I) and N(v, I) with ‖v‖ = shift are (ε, δ)-indistinguishable.

    Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ) with μ = shift (docs/math.md (28)); where both terms are small it is computed from
    the ratios of tails and density, which do not cancel.

    >>> round(gaussian_delta(0.0, 1.0), 6)  # the total variation distance, 2 Φ(1/2) − 1
    0.382925
    """
    high, low = epsilon / shift - shift / 2, epsilon / shift + shift / 2
    density = math.exp(-high * high / 2) / 2
    if high < 0:
        return _normal_tail(high) - density * _scaled_tail(low)
    return density * (_scaled_tail(high) - _scaled_tail(low))


def _normal_tail(x: float) -> float:
    """Φ(−x)."""
    return math.erfc(x / math.sqrt(2)) / 2


def _scaled_tail(x: float) -> float:
    """2 e^(x²/2) Φ(−x)."""
    return float(torch.special.erfcx(torch.tensor(x / math.sqrt(2), dtype=torch.float64)))


def largest_shift(epsilon: float, delta: float) -> float:
    """The largest μ with gaussian_delta(ε, μ) <= δ, rounding errors of that function on the safe side."""

    def holds(shift: float) -> bool:
        return gaussian_delta(epsilon, shift) + 1e-14 * _normal_tail(epsilon / shift - shift / 2) <= delta

    low = high = 1.0
    while not holds(low):
        low /= 2
    while holds(high):
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
