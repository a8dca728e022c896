"""The retained objective F (docs/math.md (13)) of a linear head, as a problem for `fastif.removal.newton`; its steps.

The losses are functions of the head's features, so that every step is a few matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor

from fastif import ops
from fastif.curvature import ExactBlock
from fastif.curvature.damping import check_damping
from fastif.curvature.exact.softmax import check_labels, output_grads
from fastif.removal.newton import Figures, newton
from fastif.removal.retained import (
    SMALLEST_STEP,
    STEP_SIZES,
    Sampler,
    check_removed,
    check_weight_decay,
    without_removed,
)
from fastif.removal.steps import HeadStep
from fastif.samplers.draw import draw
from fastif.samplers.subset import Subset, check_subset


class RetainedHead:
    """F, its gradient and its curvature for a linear head; θ is [c, d (+1 for the bias)], float64.

    `curvature_of` makes the block at the current parameters, with the number of examples that carry it.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        removed: Tensor,
        weight_decay: float,
        curvature_of: Callable[[RetainedHead], tuple[ExactBlock, int]],
        line_search: bool = True,
    ):
        n = len(features)
        _check_head(features, labels, weight, bias)
        check_removed(removed, n)
        check_weight_decay(weight_decay)
        self.kept = torch.ones(n, dtype=torch.bool, device=features.device)
        self.kept[removed] = False
        self.share = int(self.kept.sum()) / n
        self.weight_decay, self.has_bias = weight_decay, bias is not None
        self.features = features[self.kept]
        self.inputs = self._with_ones(self.features)
        self.labels = labels[self.kept]
        self._removed = self._with_ones(features[removed]), labels[removed]
        self.dtype, self.n = weight.dtype, n
        self.theta = (weight if bias is None else torch.cat([weight, bias[:, None]], 1)).double()
        self.logits = self._logits(self.theta)
        self.objective = self._objective(self.logits, self.theta)
        self.step_size = 0.0  # of the last step, as a multiple of the Newton step
        self._curvature_of, self._line_search = curvature_of, line_search
        self._shift = None if line_search else self._full_gradient()

    @property
    def device(self) -> torch.device:
        return self.inputs.device

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [c, d] and bias [c] of the current parameters."""
        theta = self.theta.to(self.dtype)
        return (theta[:, :-1], theta[:, -1]) if self.has_bias else (theta, None)

    def gradient(self) -> float:
        self._gradient = self._gradient_at(self.theta, self.logits)
        return self._gradient.norm().item()

    def curvature(self) -> int:
        self._block, examples = self._curvature_of(self)
        return examples

    def step(self) -> bool:
        direction = -self._block.solve(self._gradient if self._shift is None else self._gradient - self._shift)
        along = self._logits(direction)  # logits are linear in θ: one product serves every step size
        size, value = self._best_step(direction, along)
        if self._line_search and not value < self.objective:
            return False
        self.theta = self.theta + size * direction
        self.logits = self._logits(self.theta)
        self.objective, self.step_size = value, size
        return True

    def block(self, damping: float, picks: Subset | None = None) -> ExactBlock:
        """The curvature of all retained examples, or of some with weights, damped by weight_decay + damping."""
        block = ExactBlock(self.weight_decay + damping, name="head (damping here: weight_decay + damping)")
        if picks is None:
            weights = self.inputs.new_full((len(self.inputs),), 1 / self.n)
            return block.fit(self.inputs, self.logits, weights=weights)
        rows = picks.indices.to(self.inputs.device)
        return block.fit(self.inputs[rows], self.logits[rows], weights=picks.weights.to(self.inputs))

    def _with_ones(self, features: Tensor) -> Tensor:
        return torch.cat([features, features.new_ones(len(features), 1)], 1) if self.has_bias else features

    def _logits(self, theta: Tensor) -> Tensor:
        return self.inputs @ theta.to(self.inputs.dtype).T

    def _objective(self, logits: Tensor, theta: Tensor) -> float:
        losses = logits.logsumexp(1) - logits.gather(1, self.labels[:, None])[:, 0]
        return (losses.double().sum() / self.n + 0.5 * self.weight_decay * theta.square().sum()).item()

    def _gradient_at(self, theta: Tensor, logits: Tensor) -> Tensor:
        residuals = output_grads(logits.softmax(1), self.labels)
        return ops.per_sample_grad.accumulate(self.inputs, residuals)[0].double() / self.n + self.weight_decay * theta

    def _full_gradient(self) -> Tensor:
        """∇F_all at the trained parameters: with the removed examples."""
        inputs, labels = self._removed
        residuals = output_grads((inputs @ self.theta.to(inputs.dtype).T).softmax(1), labels)
        removed = ops.per_sample_grad.accumulate(inputs, residuals)[0].double() / self.n
        return self._gradient_at(self.theta, self.logits) + removed

    def _best_step(self, direction: Tensor, along: Tensor) -> tuple[float, float]:
        """Step size along `direction`, and F after it; `along` is what one unit of it adds to the logits.

        The best of STEP_SIZES, or, where none lowers F, the first of its halvings that does (else the last). Without
        line search: 1.
        """

        def after(size: float) -> float:
            return self._objective(self.logits + size * along, self.theta + size * direction)

        if not self._line_search:
            return 1.0, after(1.0)
        value, size = min((after(size), size) for size in STEP_SIZES)
        while not value < self.objective and size > SMALLEST_STEP:
            size = min(size, STEP_SIZES[0]) / 2
            value = after(size)
        return size, value


def head_steps(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    removed: Tensor,
    *,
    subset: Any | Sampler | None = None,
    steps: int = 6,
    damping: float = 0.0,
    weight_decay: float = 5e-4,
    line_search: bool = True,
    generator: Generator | None = None,
) -> Iterator[HeadStep]:
    """The steps of `remove` one by one, on features [n, d] and labels [n] that were extracted before.

    weight [c, d] and bias [c] (or None) are the trained head, removed [r] the examples to remove; the rest is as in
    `remove`. Ends early where no step size lowers F.
    """
    check_settings(steps, damping)
    fixed = None

    def curvature(problem: RetainedHead) -> tuple[ExactBlock, int]:
        if subset is None:
            return problem.block(damping), len(problem.logits)
        if fixed is not None:
            picks = fixed
        else:
            seen = {"features": problem.features, "logits": problem.logits, "labels": problem.labels}
            drawn = draw(subset, **seen, generator=generator)
            picks = Subset(drawn.indices, drawn.weights * problem.share)
        return problem.block(damping, picks), len(picks.indices)

    problem = RetainedHead(features, labels, weight, bias, removed, weight_decay, curvature, line_search)
    if subset is not None and not callable(subset):
        fixed = without_removed(check_subset(subset, len(features)), problem.kept)
    for figures in newton(problem, steps):
        yield _head_step(figures, problem)


def optimal_head(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    removed: Tensor,
    *,
    weight_decay: float,
    tolerance: float = 1e-9,
    max_steps: int = 100,
) -> HeadStep:
    """The head retrained to convergence on the retained data: the minimum of F, in float64, with its certificate.

    F is strongly convex, so that F − min F <= gradient_norm² / (2 weight_decay) (docs/math.md (13)). The result's
    `gradient_norm` is that at the returned head: at most `tolerance`, unless rounding of F ends the descent before.
    Raises ValueError if the certificate exceeds 1e-9.
    """
    if not weight_decay > 0:
        raise ValueError(f"optimal_head: weight_decay must be > 0 for a finite optimum, got {weight_decay}")

    def curvature(problem: RetainedHead) -> tuple[ExactBlock, int]:
        # Built in float32: an inexact curvature slows the last steps a little and moves their limit not at all.
        single = ExactBlock(weight_decay).fit(problem.inputs.float(), problem.logits.float())
        single.block.mul_(problem.share)
        return single, len(problem.logits)

    bias = None if bias is None else bias.double()
    problem = RetainedHead(features.double(), labels, weight.double(), bias, removed, weight_decay, curvature)
    steps, seconds = 0, 0.0
    for figures in newton(problem, max_steps, tolerance):
        steps, seconds = figures.step, seconds + figures.seconds
    norm = problem.gradient()
    if norm**2 / (2 * weight_decay) > 1e-9:
        raise ValueError(f"optimal_head: not converged after {max_steps} steps: gradient norm {norm:.2g}")
    return HeadStep(steps, *problem.head, problem.objective, norm, 1.0, len(problem.labels), seconds, None)


def _head_step(figures: Figures, problem: RetainedHead) -> HeadStep:
    step, objective, norm, examples, seconds, peak_bytes = figures
    return HeadStep(step, *problem.head, objective, norm, problem.step_size, examples, seconds, peak_bytes)


def _check_head(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if features.dim() != 2 or weight.dim() != 2 or features.shape[1] != weight.shape[1]:
        raise ValueError(
            f"remove: features must be [n, d] and weight [c, d], got {list(features.shape)} and {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"remove: bias must be [c={len(weight)}], got {list(bias.shape)}")
    check_labels("remove", labels, len(features), len(weight))


def check_settings(steps: int, damping: float) -> None:
    if damping == "auto":
        raise ValueError("remove: damping must be a number, got 'auto'; weight_decay already damps the curvature")
    check_damping(damping)
    if steps < 1:
        raise ValueError(f"remove: steps must be at least 1, got {steps}")
