"""The retained objective F (docs/math.md (13)) of a linear head, as a problem for `fastif.newton`.

The losses are functions of the head's features, so that every step is a few matrix products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastif import ops
from fastif.curvature import ExactBlock
from fastif.curvature.exact.softmax import check_labels, output_grads
from fastif.samplers.subset import Subset

STEP_SIZES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
SMALLEST_STEP = 2.0**-20  # where none of them lowers F, the step is halved down to this


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


def without_removed(subset: Subset, kept: Tensor) -> Subset:
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


def check_removed(removed: Tensor, n: int) -> None:
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


def check_weight_decay(weight_decay: float) -> None:
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"remove: weight_decay must be a finite number >= 0, got {weight_decay}")
