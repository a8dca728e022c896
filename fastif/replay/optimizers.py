"""The optimizers that can be replayed: a step of each, and the same step backwards. docs/math.md (24).

Both work on one group's part of the vectors. A step takes the gradient g of the mean loss, without weight decay. The
step backwards takes adjoints: derivatives of the queries' measurements by what the step left behind, the parameters
first and then the optimizer's state, [q, P] each. It returns c, the derivatives by g, and the adjoints by what the step
began with, of the parameters' without the part that comes through the loss: that is the product of c with its matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

State = tuple[Tensor, ...]  # what the optimizer keeps, [P] each


class Rule(Protocol):
    """How an optimizer steps."""

    name: str
    fields: tuple[str, ...]  # of a group's numbers, in their order
    state: tuple[str, ...]  # what the optimizer keeps of a parameter, in torch's names
    needs_gradient: bool  # whether the step backwards asks for the gradient and the state, and not for adjoints alone
    of_rate: str  # what `rate` is, in the words of the optimizer

    def read(self, group: Mapping[str, Any], steps_before: float) -> list[float]:
        """The numbers of one parameter group in one step. Raises ValueError, by name, for what is not replayed."""
        ...

    def step(self, at: Tensor, state: State, gradient: Tensor, numbers: Sequence[float]) -> tuple[Tensor, State]:
        """Parameters and state after a step."""
        ...

    def loose(self, state: State, numbers: Sequence[float], off: float) -> Tensor | None:
        """How far each parameter may go elsewhere, [P], in a step that ended with `state`, where its gradient is off by
        so much; None where it is no further than the gradient is off, times the learning rate."""
        ...

    def rate(self, numbers: Sequence[float]) -> float:
        """How far a step goes along a constant gradient: of Adam, along that gradient divided by its size."""
        ...

    def size(self, state: State, numbers: Sequence[float], steps: float) -> Tensor | None:
        """How large gradients were, by the `state` after so many steps, [P]; None where no step divides by it."""
        ...

    def pull(
        self, after: State, at: Tensor, state: State, gradient: Tensor | None, numbers: Sequence[float]
    ) -> tuple[Tensor, State]:
        """c [q, P], and the adjoints before the step but for the product of c with the loss's matrix."""
        ...


class _Descent(NamedTuple):
    lr: float
    momentum: float
    weight_decay: float
    nesterov: float


class Descent:
    """torch.optim.SGD with dampening 0: g += γθ; v ← μv + g; θ ← θ − η(g + μv) (Nesterov) or θ − ηv."""

    name: str = "SGD"
    fields: tuple[str, ...] = _Descent._fields
    needs_gradient: bool = False
    of_rate: str = "lr/(1 - momentum)"

    def __init__(self, momentum: bool):
        self.state: tuple[str, ...] = ("momentum_buffer",) if momentum else ()

    def read(self, group: Mapping[str, Any], steps_before: float) -> list[float]:
        del steps_before
        _refuse(self.name, group, "dampening", "maximize")
        values = [_number(self.name, group, name) for name in self.fields]
        if (values[1] != 0) != bool(self.state):
            raise ValueError(
                f"TrainingLog: SGD's momentum must be > 0 in all steps and groups or in none, got {values[1]:g} after "
                f"{'others' if self.state else '0'}"
            )
        return values

    def step(self, at: Tensor, state: State, gradient: Tensor, numbers: Sequence[float]) -> tuple[Tensor, State]:
        lr, momentum, weight_decay, nesterov = numbers
        if weight_decay:
            gradient = gradient.add(at, alpha=weight_decay)
        if not state:
            return at.add(gradient, alpha=-lr), ()
        velocity = state[0].mul(momentum).add_(gradient)
        along = gradient.add(velocity, alpha=momentum) if nesterov else velocity
        return at.add(along, alpha=-lr), (velocity,)

    def loose(self, state: State, numbers: Sequence[float], off: float) -> Tensor | None:
        del state, numbers, off
        return None

    def rate(self, numbers: Sequence[float]) -> float:
        n = _Descent(*numbers)
        return n.lr / (1 - n.momentum)

    def size(self, state: State, numbers: Sequence[float], steps: float) -> Tensor | None:
        del state, numbers, steps
        return None

    def pull(
        self, after: State, at: Tensor, state: State, gradient: Tensor | None, numbers: Sequence[float]
    ) -> tuple[Tensor, State]:
        lr, momentum, weight_decay, nesterov = numbers
        a, *rest = after
        if not rest:
            c = a * -lr
            return c, (a.add(c, alpha=weight_decay),)
        of_velocity = rest[0].add(a, alpha=-lr * (momentum if nesterov else 1.0))
        c = of_velocity.add(a, alpha=-lr) if nesterov else of_velocity
        return c, (a.add(c, alpha=weight_decay), of_velocity * momentum)


class _Moments(NamedTuple):
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: float
    steps: float  # so far, this one with them


class Moments:
    """torch.optim.Adam and AdamW: m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g², θ ← θ − η/(1 − β₁ᵗ) m/D.

    D = √(v/(1 − β₂ᵗ)) + ε. The decay is part of the gradient, g += γθ, or decoupled, θ ← (1 − ηγ)θ first.
    """

    name: str = "Adam"
    fields: tuple[str, ...] = _Moments._fields
    state: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    needs_gradient: bool = True
    of_rate: str = "lr"

    def read(self, group: Mapping[str, Any], steps_before: float) -> list[float]:
        _refuse(self.name, group, "amsgrad", "maximize")
        beta1, beta2 = (float(beta) for beta in group["betas"])
        lr, eps, weight_decay = (_number(self.name, group, name) for name in ("lr", "eps", "weight_decay"))
        decoupled = float(group.get("decoupled_weight_decay", False))
        return [lr, beta1, beta2, eps, weight_decay, decoupled, steps_before + 1]

    def step(self, at: Tensor, state: State, gradient: Tensor, numbers: Sequence[float]) -> tuple[Tensor, State]:
        n = _Moments(*numbers)
        gradient = self._decayed(at, gradient, n)
        if n.weight_decay and n.decoupled:
            at = at * (1 - n.lr * n.weight_decay)
        mean = state[0].lerp(gradient, 1 - n.beta1)
        square = state[1].mul(n.beta2).addcmul_(gradient, gradient, value=1 - n.beta2)
        denominator = (square.sqrt() / math.sqrt(1 - n.beta2**n.steps)).add_(n.eps)
        return at.addcdiv(mean, denominator, value=-n.lr / (1 - n.beta1**n.steps)), (mean, square)

    def loose(self, state: State, numbers: Sequence[float], off: float) -> Tensor | None:
        """Gradients that are zero but for rounding move their parameter by up to η: Adam divides by their size."""
        n = _Moments(*numbers)
        denominator = self.size(state, numbers, n.steps).add_(n.eps)
        return denominator.reciprocal_().mul_(off).clamp_(max=1).mul_(2 * n.lr)

    def rate(self, numbers: Sequence[float]) -> float:
        return _Moments(*numbers).lr

    def size(self, state: State, numbers: Sequence[float], steps: float) -> Tensor:
        return state[1].sqrt() / math.sqrt(1 - _Moments(*numbers).beta2 ** steps)

    def pull(
        self, after: State, at: Tensor, state: State, gradient: Tensor | None, numbers: Sequence[float]
    ) -> tuple[Tensor, State]:
        assert gradient is not None
        n = _Moments(*numbers)
        a, b, d = after
        gradient = self._decayed(at, gradient, n)
        mean = state[0].lerp(gradient, 1 - n.beta1)
        square = state[1].mul(n.beta2).addcmul_(gradient, gradient, value=1 - n.beta2)
        rate, correction = n.lr / (1 - n.beta1**n.steps), math.sqrt(1 - n.beta2**n.steps)
        root = square.sqrt()
        denominator = (root / correction).add_(n.eps)
        # Where no gradient ever came, v and m are zero: the limit of m/√v is finite and g = 0 takes it away again.
        by_square = torch.where(root > 0, rate * mean / (denominator.square() * (2 * correction) * root), 0.0)
        of_mean = b - a * (rate / denominator)
        of_square = d + a * by_square
        c = of_mean * (1 - n.beta1) + of_square * (gradient * (2 * (1 - n.beta2)))
        before = a * (1 - n.lr * n.weight_decay) if n.decoupled else a.add(c, alpha=n.weight_decay)
        return c, (before, of_mean * n.beta1, of_square * n.beta2)

    @staticmethod
    def _decayed(at: Tensor, gradient: Tensor, n: _Moments) -> Tensor:
        return gradient.add(at, alpha=n.weight_decay) if n.weight_decay and not n.decoupled else gradient


def rule_of(optimizer: Any) -> Rule:
    """How an optimizer steps. Raises ValueError, with its name, for one that cannot be replayed."""
    kind = type(optimizer)
    if kind is torch.optim.SGD:
        return Descent(momentum=optimizer.param_groups[0]["momentum"] != 0)
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        return Moments()
    raise ValueError(
        f"TrainingLog: the optimizer must be a torch.optim.SGD, Adam or AdamW itself, got {kind.__module__}."
        f"{kind.__qualname__}: of others replay does not know the derivative of a step"
    )


def rule_named(name: str, state: Sequence[str]) -> Rule:
    """The rule of a log on disk."""
    for rule in (Descent(bool(state)), Moments()):
        if rule.name == name and rule.state == tuple(state):
            return rule
    raise ValueError(f"its optimizer must be SGD or Adam, got {name!r} with {', '.join(state) or 'no state'}")


def _number(name: str, group: Mapping[str, Any], field: str) -> float:
    value = float(group[field])
    if not math.isfinite(value):
        raise ValueError(f"TrainingLog: {field} of {name} must be finite, got {value}")
    return value


def _refuse(name: str, group: Mapping[str, Any], *fields: str) -> None:
    for field in fields:
        if group.get(field):
            raise ValueError(f"TrainingLog: {name} with {field}={group[field]!r} cannot be replayed")
