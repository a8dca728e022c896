"""The retained objective F (docs/math.md (13)) of a linear head, as a problem for `fastif.removal.newton`; its steps.

The losses (`fastif.removal.losses`) are functions of the head's features, so that every step is a few matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from fastif import ops
from fastif.curvature import ExactBlock, NotPositiveDefinite
from fastif.curvature.damping import check_damping
from fastif.ranks import ALONE, Ranks, stretch
from fastif.removal.losses import HeadLoss, Solver, output_loss
from fastif.removal.newton import newton
from fastif.removal.retained import SMALLEST_STEP, STEP_SIZES, Picks, check_removed, check_weight_decay
from fastif.removal.steps import Step
from fastif.samplers.draw import Sampler


class RetainedHead:
    """F, its gradient and its curvature for a linear head; θ is [c, d (+1 for the bias)], float64.

    Arguments as for `head_steps`. `name` is the head's among the model's layers, `keys` those of its weight and bias
    among the model's parameters. `curvature_of`, where it is given, makes the block at the current parameters in the
    place of that of the subset. Of several `ranks` each has a run of the retained examples: inputs, labels and logits
    are its own, F, its gradient and its curvature those of all; the first one solves.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        removed: Tensor,
        *,
        weight_decay: float,
        subset: Any | Sampler | None = None,
        damping: float = 0.0,
        line_search: bool = True,
        generator: Generator | None = None,
        name: str = "head",
        keys: tuple[str, str] = ("weight", "bias"),
        curvature_of: Callable[[RetainedHead], Solver] | None = None,
        loss: HeadLoss = "cross_entropy",
        ranks: Ranks = ALONE,
    ):
        n = len(features)
        self.loss = output_loss(loss)
        _check_head(features, weight, bias)
        self.loss.check(labels, n, len(weight))
        check_removed(removed, n)
        check_weight_decay(weight_decay)
        kept = torch.ones(n, dtype=torch.bool, device=features.device)
        kept[removed] = False
        self.retained = int(kept.sum())
        self.share = self.retained / n
        self.weight_decay, self.damping, self.has_bias = weight_decay, damping, bias is not None
        self.ranks, mine = ranks, stretch(self.retained, ranks.rank, ranks.world)
        self._first, rows = mine.start, kept.nonzero()[:, 0][mine.start : mine.stop]
        self.inputs, self.labels = self._with_ones(features[rows]), labels[rows]
        self._seen: dict[str, Tensor] = {}  # of all retained, for a sampler
        if callable(subset):
            self._seen = {"features": features[kept], "labels": labels[kept]}
        self._removed = self._with_ones(features[removed]), labels[removed]
        self.dtype, self.n = weight.dtype, n
        self.theta = (weight if bias is None else torch.cat([weight, bias[:, None]], 1)).double()
        self.logits = _logits(self.inputs, self.theta)
        (self.objective,) = self._objectives([(self.logits, self.theta)])
        self.step_size: dict[str, float] = {}  # of the last step, as a multiple of the Newton step
        self._picks = Picks(subset, kept, generator, ranks)
        self._curvature_of, self._line_search, self._name, self._keys = curvature_of, line_search, name, keys
        self._shift = None if line_search else self._full_gradient()

    @property
    def device(self) -> torch.device:
        return self.inputs.device

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Weight [c, d] and, where there is one, bias [c], by their keys."""
        return self._named(self.theta.to(self.dtype, copy=True))

    def _named(self, theta: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._keys, (theta[:, :-1], theta[:, -1]) if self.has_bias else (theta,), strict=False))

    def go_on_from(self, parameters: Mapping[str, Tensor]) -> None:
        """Steps begin at these; what full steps answer is still the gradient at the trained parameters."""
        rows = [parameters[key].to(self.theta) for key in self._keys if key in parameters]
        self.theta = torch.cat([rows[0], rows[1][:, None]], 1) if self.has_bias else rows[0]
        self.logits = _logits(self.inputs, self.theta)
        (self.objective,) = self._objectives([(self.logits, self.theta)])

    def with_noise(self, noise: Tensor) -> dict[str, Tensor]:
        """`parameters`, with noise [c, d (+1)] added before they are rounded to the head's type."""
        return self._named((self.theta + noise).to(self.dtype))

    @property
    def logits_of_removed(self) -> Tensor:
        """At the parameters, [r, c]."""
        return _logits(self._removed[0], self.theta)

    def logits_at(self, features: Tensor) -> Tensor:
        """What the head says at the parameters of features [m, d], [m, c]."""
        return _logits(self._with_ones(features), self.theta)

    def mean_losses(self) -> tuple[float, float]:
        """Of the removed and of the retained examples, at the parameters."""
        removed = self.loss.values(self.logits_of_removed, self._removed[1]).double().mean()
        decay = 0.5 * self.weight_decay * float(self.theta.square().sum())
        return float(removed), (self.objective - decay) / self.share

    def gradient(self) -> float:
        self._gradient = self._gradient_at(self.theta, self.logits)
        return self._gradient.norm().item()

    def gradient_error(self) -> float:
        """A bound on the rounding error of ‖∇F‖ at the parameters, computed in float64, to first order in its unit u.

        Logits of d products, the loss's gradient in them (whose Jacobian's norm is at most its smoothness s), and a sum
        over the m retained: each example adds at most u ‖a‖ (2s ((d + 8) ‖θ‖ ‖a‖ + c + 8) + (m + 4) ‖r‖), where r is
        its residual. docs/math.md (28).
        """
        assert self.loss.smoothness is not None
        lengths = self.inputs.norm(dim=1)
        residuals = self.loss.residuals(self.logits, self.labels).norm(dim=1)
        m, d, c, size = self.retained, self.inputs.shape[1], len(self.theta), self.theta.norm()
        each = lengths * (2 * self.loss.smoothness * ((d + 8) * size * lengths + c + 8) + (m + 4) * residuals)
        total = (
            self.ranks.sum("the rounding of the gradient", each.sum()) / self.n
            + 8 * self.weight_decay * size
            + self.theta.numel() * self._gradient.norm()
        )
        return torch.finfo(torch.float64).eps * total.item()

    def curvature(self) -> int:
        if self._curvature_of is not None:
            self._block = self._curvature_of(self)
            return len(self.logits)
        seen = self._seen
        if seen:
            own = self.logits if len(self.logits) else None
            seen = {**seen, "logits": self.ranks.join("logits", own, self.device)}
        picks = self._picks.take(seen)
        places = (picks.indices >= self._first) & (picks.indices < self._first + len(self.labels))
        numbers = places.nonzero()[:, 0]
        rows = slice(None) if self._picks.all else (picks.indices[numbers] - self._first).to(self.device)
        self._block = self.loss.curvature(
            self.inputs[rows],
            self.logits[rows],
            self.labels[rows],
            picks.weights[numbers].to(self.inputs),
            self.weight_decay + self.damping,
            "head (damping here: weight_decay + damping)",
            numbers,
            self.ranks,
        )
        return len(picks.weights)

    def step(self) -> bool:
        own, said = dict[str, Tensor](), ""
        if self.ranks.rank == 0:
            try:
                own[""] = -self._block.solve(self._gradient if self._shift is None else self._gradient - self._shift)
            except NotPositiveDefinite as error:
                said = str(error)
        found = self.ranks.of_first("the head's step", own, self.device)
        if not found:  # raised on all ranks, so that what catches it does so on all
            (said, *_) = self.ranks.meet("why there is none", said)
            raise NotPositiveDefinite(said)
        direction = found[""]
        along = _logits(self.inputs, direction)  # logits are linear in θ: one product serves every step size
        size, value = self._best_step(direction, along)
        if self._line_search and not value < self.objective:
            return False
        self.theta = self.theta + size * direction
        self.logits = _logits(self.inputs, self.theta)
        self.objective, self.step_size = value, {self._name: size}
        return True

    def _with_ones(self, features: Tensor) -> Tensor:
        return torch.cat([features, features.new_ones(len(features), 1)], 1) if self.has_bias else features

    def _objectives(self, points: list[tuple[Tensor, Tensor]]) -> list[float]:
        """F at some (logits, θ); its decay is the first rank's term of the sum."""
        terms = [self.loss.values(logits, self.labels, self._first).double().sum() / self.n for logits, _ in points]
        if self.ranks.rank == 0:
            decays = [0.5 * self.weight_decay * theta.square().sum() for _, theta in points]
            terms = [term + decay for term, decay in zip(terms, decays, strict=True)]
        return self.ranks.sum("the objective", torch.stack(terms)).tolist()

    def _gradient_at(self, theta: Tensor, logits: Tensor) -> Tensor:
        own = self._sum_gradients(self.inputs, logits, self.labels)
        return self.ranks.sum("the gradient", own) + self.weight_decay * theta

    def _full_gradient(self) -> Tensor:
        """∇F_all at the trained parameters: with the removed examples."""
        inputs, labels = self._removed
        removed = self._sum_gradients(inputs, self.logits_of_removed, labels)
        return self._gradient_at(self.theta, self.logits) + removed

    def _sum_gradients(self, inputs: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """(1/n) Σ ∇ℓ over some examples, float64 [c, d (+1)]."""
        if not len(inputs):
            return torch.zeros_like(self.theta)
        residuals = self.loss.residuals(logits, labels)
        return ops.per_sample_grad.accumulate(inputs, residuals)[0].double() / self.n

    def _best_step(self, direction: Tensor, along: Tensor) -> tuple[float, float]:
        """Step size along `direction`, and F after it; `along` is what one unit of it adds to the logits.

        The best of STEP_SIZES, or, where none lowers F, the first of its halvings that does (else the last). Without
        line search: 1.
        """

        def after(*sizes: float) -> list[float]:
            return self._objectives([(self.logits + size * along, self.theta + size * direction) for size in sizes])

        if not self._line_search:
            return 1.0, after(1.0)[0]
        value, size = min(zip(after(*STEP_SIZES), STEP_SIZES, strict=True))
        while not value < self.objective and size > SMALLEST_STEP:
            size = min(size, STEP_SIZES[0]) / 2
            (value,) = after(size)
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
    loss: HeadLoss = "cross_entropy",
) -> Iterator[Step]:
    """The steps of `remove` one by one, on features [n, d] and labels [n] that were extracted before.

    weight [c, d] and bias [c] (or None) are the trained head, removed [r] the examples to remove; the rest is as in
    `remove`. Ends early where no step size lowers F.
    """
    check_settings(steps, damping)
    problem = RetainedHead(
        features,
        labels,
        weight,
        bias,
        removed,
        weight_decay=weight_decay,
        subset=subset,
        damping=damping,
        line_search=line_search,
        generator=generator,
        loss=loss,
    )
    yield from newton(problem, steps)


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
    loss: HeadLoss = "cross_entropy",
) -> Step:
    """The head retrained to convergence on the retained data: the minimum of F, in float64, with its certificate.

    F is strongly convex, so that F − min F <= gradient_norm² / (2 weight_decay) (docs/math.md (13)). The result's
    `gradient_norm` is that at the returned head: at most `tolerance`, unless rounding of F ends the descent before.
    Raises ValueError if the certificate exceeds 1e-9.
    """
    if not weight_decay > 0:
        raise ValueError(f"optimal_head: weight_decay must be > 0 for a finite optimum, got {weight_decay}")

    def single(problem: RetainedHead) -> Solver:
        # Built in float32: an inexact curvature slows the last steps a little and moves their limit not at all.
        block = ExactBlock(weight_decay).fit(problem.inputs.float(), problem.logits.float())
        block.block.mul_(problem.share)
        return block

    bias = None if bias is None else bias.double()
    problem = RetainedHead(
        features.double(),
        labels,
        weight.double(),
        bias,
        removed,
        weight_decay=weight_decay,
        curvature_of=single if loss == "cross_entropy" else None,
        loss=loss,
    )
    steps, seconds = 0, 0.0
    for step in newton(problem, max_steps, tolerance):
        steps, seconds = step.step, seconds + step.seconds
    norm = problem.gradient()
    if norm**2 / (2 * weight_decay) > 1e-9:
        raise ValueError(f"optimal_head: not converged after {max_steps} steps: gradient norm {norm:.2g}")
    return Step(steps, problem.parameters, problem.objective, norm, {"head": 1.0}, len(problem.labels), seconds, None)


def _logits(inputs: Tensor, theta: Tensor) -> Tensor:
    return inputs @ theta.to(inputs.dtype).T


def _check_head(features: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if features.dim() != 2 or weight.dim() != 2 or features.shape[1] != weight.shape[1]:
        raise ValueError(
            f"remove: features must be [n, d] and weight [c, d], got {list(features.shape)} and {list(weight.shape)}; "
            "of a model with an output for every position say loss='causal_lm' or 'token_cross_entropy'"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"remove: bias must be [c={len(weight)}], got {list(bias.shape)}")


def check_settings(steps: int, damping: float) -> None:
    if damping == "auto":
        raise ValueError("remove: damping must be a number, got 'auto'; weight_decay already damps the curvature")
    check_damping(damping)
    if steps < 1:
        raise ValueError(f"remove: steps must be at least 1, got {steps}")
