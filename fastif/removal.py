"""Removal: the head that a classifier would have had without some of its training examples.

A few subsampled Newton steps on the retained objective

    F(θ) = (1/n) Σ_{i retained} ℓ_i(θ) + ½ weight_decay ‖θ‖²        (docs/math.md (13)),

with its gradient over all retained data, its curvature from a sampler's weighted subset at the current parameters, and
a line search on F itself. No held-out example takes part in any choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from fastif import ops
from fastif.curvature import ExactBlock
from fastif.curvature.cholesky import check_damping
from fastif.curvature.exact_block import check_labels, output_grads
from fastif.features import extract, find_head
from fastif.measure import Measure
from fastif.samplers import Subset, check_subset, draw

STEP_SIZES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
SMALLEST_STEP = 2.0**-20  # where none of them lowers F, the step is halved down to this


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


class Removal(NamedTuple):
    """What `remove` returns."""

    state_dict: dict[str, Tensor]  # of the whole model: load_state_dict takes it
    history: list[HeadStep]  # one entry per step taken; empty if the first one would not have lowered F


Sampler = Callable[..., Any]


def remove(
    model: nn.Module,
    train: Any,
    indices: Tensor,
    *,
    subset: Any | Sampler | None = None,
    steps: int = 6,
    damping: float = 0.0,
    weight_decay: float = 5e-4,
    line_search: bool = True,
    head: str | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    generator: Generator | None = None,
    progress: bool = True,
) -> Removal:
    """The model without the training examples `indices`: Newton steps on its head. The model itself is not changed.

    Args:
        model: a classifier trained with softmax cross-entropy whose last operation is an nn.Linear.
        train: the data it was trained on with labels, as `fastif.data.as_loader` takes it.
        indices: int64 [r], the examples to remove, counted in the order of `train`.
        subset: which retained examples carry the curvature: None for all; a sampler with its k bound, such as
            `functools.partial(samplers.logit, k=500)`, drawn afresh from the retained data in each step; or anything
            with `indices` (counted in `train`) and `weights`: its removed examples are left out, the other weights
            unchanged.
        steps: at most so many; fewer where F stops falling.
        damping: absolute λ >= 0, added to the diagonal of the curvature beside weight_decay, not to F.
        weight_decay: of the training; it also makes F's optimum finite where a whole class is removed.
        line_search: take the best of the steps ⅛, ¼, ½, 1, 2, 4 by F; where none lowers F (a small subset can
            underrate the curvature by far), halve ⅛ until one does. False: full steps along
            −(G + (weight_decay + damping) I)⁻¹ (∇F(θ) − ∇F_all(θ̂)), where F_all is the objective with all data and θ̂
            the trained parameters, taken as its optimum. The first step is then docs/math.md (3) exactly, since
            ∇F_all(θ̂) − ∇F(θ̂) = (1/n) Σ_{i removed} ∇ℓ_i.
        head, batch_size, device, progress: as in `fastif.extract`.
        generator: for samplers that draw.

    Raises ValueError for indices out of range, repeated or all there are, for missing labels, and what `extract`, the
    sampler and the Cholesky factor raise.
    """
    name, layer = find_head(model, head)
    features, _, labels = extract(model, train, head=head, batch_size=batch_size, device=device, progress=progress)
    if labels is None:
        raise ValueError("remove: the training data has no labels")
    place = layer.weight.device if device is None else torch.device(device)
    history = list(
        tqdm(
            head_steps(
                features.to(place),
                labels.to(place),
                layer.weight.detach().to(place),
                None if layer.bias is None else layer.bias.detach().to(place),
                torch.as_tensor(indices).to(place),
                subset=subset,
                steps=steps,
                damping=damping,
                weight_decay=weight_decay,
                line_search=line_search,
                generator=generator,
            ),
            "remove",
            total=steps,
            disable=not progress,
        )
    )
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    if history:
        prefix = f"{name}." if name else ""
        state[f"{prefix}weight"].copy_(history[-1].weight)
        if history[-1].bias is not None:
            state[f"{prefix}bias"].copy_(history[-1].bias)
    return Removal(state, history)


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
    if damping == "auto":
        raise ValueError("remove: damping must be a number, got 'auto'; weight_decay already damps the curvature")
    check_damping(damping)
    if steps < 1:
        raise ValueError(f"remove: steps must be at least 1, got {steps}")
    problem = _Retained(features, labels, weight, bias, removed, weight_decay)
    fixed = None if subset is None or callable(subset) else _without(check_subset(subset, len(features)), problem.kept)

    def curvature(theta: Tensor, logits: Tensor) -> tuple[ExactBlock, int]:
        if subset is None:
            return problem.block(damping, logits), len(logits)
        if fixed is not None:
            picks = fixed
        else:
            drawn = draw(subset, features=problem.features, logits=logits, labels=problem.labels, generator=generator)
            picks = Subset(drawn.indices, drawn.weights * problem.share)
        return problem.block(damping, logits, picks), len(picks.indices)

    shift = None if line_search else problem.full_gradient()
    yield from problem.newton(curvature, steps, line_search, shift)


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
    problem = _Retained(
        features.double(), labels, weight.double(), None if bias is None else bias.double(), removed, weight_decay
    )

    def curvature(theta: Tensor, logits: Tensor) -> tuple[ExactBlock, int]:
        # Built in float32: an inexact curvature slows the last steps a little and moves their limit not at all.
        single = ExactBlock(weight_decay).fit(problem.inputs.float(), logits.float())
        single.block.mul_(problem.share)
        return single, len(logits)

    last, seconds = None, 0.0
    for last in problem.newton(curvature, max_steps, True, None, tolerance):
        seconds += last.seconds
    theta = problem.theta if last is None else problem.joined(last.weight, last.bias)
    norm = problem.gradient(theta, problem.logits(theta)).norm().item()
    if norm**2 / (2 * weight_decay) > 1e-9:
        raise ValueError(f"optimal_head: not converged after {max_steps} steps: gradient norm {norm:.2g}")
    weight, bias = problem.split(theta)
    step = 0 if last is None else last.step
    objective = problem.objective(problem.logits(theta), theta)
    return HeadStep(step, weight, bias, objective, norm, 1.0, len(problem.labels), seconds, None)


class _Retained:
    """F, its gradient and its curvature for a linear head; θ is [c, d (+1 for the bias)], float64."""

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        removed: Tensor,
        weight_decay: float,
    ):
        n = len(features)
        _check_head(features, labels, weight, bias)
        _check_removed(removed, n)
        if not 0 <= weight_decay < float("inf"):
            raise ValueError(f"remove: weight_decay must be a finite number >= 0, got {weight_decay}")
        self.kept = torch.ones(n, dtype=torch.bool, device=features.device)
        self.kept[removed] = False
        self.share = int(self.kept.sum()) / n
        self.weight_decay, self.has_bias = weight_decay, bias is not None
        self.features = features[self.kept]
        self.inputs = self._with_ones(self.features)
        self.labels = labels[self.kept]
        self._removed = self._with_ones(features[removed]), labels[removed]
        self.dtype, self.n = weight.dtype, n
        self.theta = self.joined(weight, bias)

    def _with_ones(self, features: Tensor) -> Tensor:
        return torch.cat([features, features.new_ones(len(features), 1)], 1) if self.has_bias else features

    def joined(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        return (weight if bias is None else torch.cat([weight, bias[:, None]], 1)).double()

    def split(self, theta: Tensor) -> tuple[Tensor, Tensor | None]:
        theta = theta.to(self.dtype)
        return (theta[:, :-1], theta[:, -1]) if self.has_bias else (theta, None)

    def logits(self, theta: Tensor) -> Tensor:
        return self.inputs @ theta.to(self.inputs.dtype).T

    def objective(self, logits: Tensor, theta: Tensor) -> float:
        losses = logits.logsumexp(1) - logits.gather(1, self.labels[:, None])[:, 0]
        return (losses.double().sum() / self.n + 0.5 * self.weight_decay * theta.square().sum()).item()

    def gradient(self, theta: Tensor, logits: Tensor) -> Tensor:
        residuals = output_grads(logits.softmax(1), self.labels)
        return ops.per_sample_grad.accumulate(self.inputs, residuals)[0].double() / self.n + self.weight_decay * theta

    def full_gradient(self) -> Tensor:
        """∇F_all at the trained parameters: with the removed examples."""
        inputs, labels = self._removed
        residuals = output_grads((inputs @ self.theta.to(inputs.dtype).T).softmax(1), labels)
        removed = ops.per_sample_grad.accumulate(inputs, residuals)[0].double() / self.n
        return self.gradient(self.theta, self.logits(self.theta)) + removed

    def block(self, damping: float, logits: Tensor, picks: Subset | None = None) -> ExactBlock:
        block = ExactBlock(self.weight_decay + damping, name="head (damping here: weight_decay + damping)")
        if picks is None:
            weights = self.inputs.new_full((len(self.inputs),), 1 / self.n)
            return block.fit(self.inputs, logits, weights=weights)
        rows = picks.indices.to(self.inputs.device)
        return block.fit(self.inputs[rows], logits[rows], weights=picks.weights.to(self.inputs))

    def best_step(
        self, theta: Tensor, direction: Tensor, logits: Tensor, along: Tensor, objective: float | None
    ) -> tuple[float, float]:
        """Step size along `direction`, and F after it; `along` is what one unit of it adds to the logits.

        The best of STEP_SIZES, or, where none is below `objective`, the first of its halvings that is (else the last).
        Without an objective to improve on: 1.
        """

        def after(size: float) -> float:
            return self.objective(logits + size * along, theta + size * direction)

        if objective is None:
            return 1.0, after(1.0)
        value, size = min((after(size), size) for size in STEP_SIZES)
        while not value < objective and size > SMALLEST_STEP:
            size = min(size, STEP_SIZES[0]) / 2
            value = after(size)
        return size, value

    def newton(
        self,
        curvature: Callable[[Tensor, Tensor], tuple[ExactBlock, int]],
        steps: int,
        line_search: bool,
        shift: Tensor | None,
        tolerance: float = 0.0,
    ) -> Iterator[HeadStep]:
        theta = self.theta
        logits = self.logits(theta)
        objective = self.objective(logits, theta)
        for step in range(1, steps + 1):
            with Measure(self.inputs.device) as work:
                gradient = self.gradient(theta, logits)
                norm = gradient.norm().item()
                if norm <= tolerance:
                    return
                block, examples = curvature(theta, logits)
                direction = -block.solve(gradient if shift is None else gradient - shift)
                along = self.logits(direction)  # logits are linear in θ: one product serves every step size
                size, value = self.best_step(theta, direction, logits, along, objective if line_search else None)
                if line_search and not value < objective:
                    return
                stepped = theta + size * direction
                stepped_logits = self.logits(stepped)
            theta, logits, objective = stepped, stepped_logits, value
            yield HeadStep(step, *self.split(theta), objective, norm, size, examples, work.seconds, work.peak_bytes)


def _without(subset: Subset, kept: Tensor) -> Subset:
    """The retained examples of a subset of the training data, as positions among the retained; weights unchanged."""
    kept = kept.cpu()
    stays = kept[subset.indices]
    if not stays.any():
        raise ValueError("remove: every example of the subset is removed; none is left to carry the curvature")
    position = kept.cumsum(0) - 1
    return Subset(position[subset.indices[stays]], subset.weights[stays])


def _check_head(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if features.dim() != 2 or weight.dim() != 2 or features.shape[1] != weight.shape[1]:
        raise ValueError(
            f"remove: features must be [n, d] and weight [c, d], got {list(features.shape)} and {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"remove: bias must be [c={len(weight)}], got {list(bias.shape)}")
    check_labels("remove", labels, len(features), len(weight))


def _check_removed(removed: Tensor, n: int) -> None:
    if removed.numel() == 0:
        raise ValueError("remove: indices must not be empty")
    if removed.dtype == torch.bool:
        raise ValueError("remove: indices must be int64 [r], got a mask; pass mask.nonzero()[:, 0]")
    if removed.dim() != 1 or removed.dtype != torch.int64:
        raise ValueError(f"remove: indices must be int64 [r], got {removed.dtype} {list(removed.shape)}")
    outside = removed[(removed < 0) | (removed >= n)]
    if outside.numel():
        raise ValueError(f"remove: indices must be in [0, n={n}), got {int(outside[0])}")
    if removed.unique().numel() < removed.numel():
        raise ValueError("remove: indices must be distinct, some appear more than once")
    if removed.numel() == n:
        raise ValueError(f"remove: indices name all n={n} examples; none would be retained")
