"""Removal from a head under a certificate: steps until the bound is small enough, then noise. docs/math.md (28)."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from fastif.progress import tqdm
from fastif.removal.certificate import Certificate, Certified
from fastif.removal.head import RetainedHead
from fastif.removal.newton import newton
from fastif.removal.steps import Step

MAX_STEPS = 100


def distance_bound(problem: RetainedHead) -> float:
    """‖θ − θ*‖ <= (‖∇F(θ)‖ + the rounding error of it) / weight_decay, θ* the minimum of F. docs/math.md (28).

    The problem must be in float64, with weight_decay > 0.
    """
    return (problem.gradient() + problem.gradient_error()) / problem.weight_decay


def certify(
    problem: RetainedHead,
    certificate: Certificate,
    steps: int | None,
    generator: Generator | None,
    progress: bool,
) -> tuple[list[Step], dict[str, Tensor], Certified]:
    """Steps until the bound is within the certificate's distance, the head with noise, and what is certified of it.

    Raises ValueError where `steps` (default 100) are not enough, and where F stops falling before, with the bound.
    """
    allowed = certificate.distance
    most = MAX_STEPS if steps is None else steps
    tolerance = 0.99 * allowed * problem.weight_decay
    history = list(tqdm(newton(problem, most, tolerance), "remove", total=None, disable=not progress))
    bound = distance_bound(problem)
    if not bound <= allowed:
        why = f"after {most} steps" if len(history) == most else f"F no longer falls after {len(history)} steps"
        raise ValueError(
            f"remove: not certified: {why} the head is at most {bound:.3g} from the retrained one, and the certificate "
            f"allows {allowed:.3g}; more steps, noise, epsilon or weight_decay would do"
        )
    drawn = {"": _noise(problem.theta, certificate.noise, generator)}
    noise = problem.ranks.of_first("the noise", drawn, problem.device)[""]
    return history, problem.with_noise(noise), Certified(certificate, allowed, bound)


def _noise(like: Tensor, sigma: float, generator: Generator | None) -> Tensor:
    """Drawn on the CPU; without a generator from one that is seeded by the operating system."""
    if generator is None:
        generator = Generator()
        generator.seed()
    return sigma * torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)
