"""One influence step of some layers, as long as it foretells, and the head refitted behind it. docs/math.md (33).

The step is (3). To first order it says how far the loss of the removed examples will rise. The network, which is not
linear, gets there sooner or later than with the whole step, and the refitted head takes some of it back: so the step is
lengthened from nothing until the loss is there, or until it takes half as much from what is retained, or more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastif.curvature import EKFAC, ExactBlock, NotPositiveDefinite
from fastif.measure import Measure
from fastif.model.calls import call
from fastif.model.features import find_head
from fastif.model.losses import labels_in, labels_of
from fastif.progress import tqdm
from fastif.removal.head import RetainedHead
from fastif.removal.network import Matrices, RetainedNetwork, combine
from fastif.removal.newton import newton
from fastif.removal.steps import Step
from fastif.renamed import warn_outside

LENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # of the influence step; with 0 the head alone moves
TRIAL_STEPS = 2  # of the head behind all but the first: they begin where the length before has led, nearly there
# A lengthening has to take so many times as much from the removed, in mean loss, as from the retained. It was 1 until a
# step on the digits took 5.6 nats from the ones, 4.1 from the others, and wrecked the network.
WORTH = 2.0

# Is shown a batch of a pass: inputs, labels, which examples these are, and outputs.
Look = Callable[[Any, Any, Tensor, Any], None]


class Refit(NamedTuple):
    """A length of the step, and the head that was refitted behind it."""

    length: float
    parameters: dict[str, Tensor]  # that move, before the head's steps
    objective: float  # F with these
    decay: float  # the part of F that is not the head's: ½ γ ‖θ‖² of the layers below
    problem: RetainedHead  # which stands where the head's steps have led
    head: list[Step]
    removed: float  # mean loss of the removed examples there
    retained: float

    def steps_with(self, further: Iterable[Step] = ()) -> list[Step]:
        """The head's steps, and further ones, with all that has moved, and F of all of it."""
        return [
            step._replace(parameters={**self.parameters, **step.parameters}, objective=step.objective + self.decay)
            for step in [*self.head, *further]
        ]


class RefittedNetwork(RetainedNetwork):
    """The step of some layers (arguments as for `RetainedNetwork`), and the head's steps behind it.

    `steps`, `damping`: the most of the head's behind each length, and its damping.
    """

    def __init__(self, model: nn.Module, train: Any, removed: Tensor, *, head: str | None = None, **settings: Any):
        name, _ = find_head(model, head, op="remove")
        if settings.get("curvature") is None:
            settings["curvature"] = {name or "model": ExactBlock(0.0), "*": EKFAC(0.0, fisher="monte_carlo")}
        super().__init__(model, train, removed, head=head, line_search=False, **settings)
        prefix = f"{name}." if name else ""
        self._keys = f"{prefix}weight", f"{prefix}bias"
        names = ("subset", "damping", "weight_decay", "generator")
        self._of_head = {key: settings[key] for key in names if key in settings}
        self._of_head |= {"name": name or "model", "keys": self._keys, "ranks": self._ranks}
        self._everyone = torch.arange(self.n)
        self._labels, self._gone = torch.empty(0), self.removed.to(self.device)
        self.trained = self.parameters

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Copies of the parameters that move, the head's among them."""
        own = {
            key: p.detach().clone()
            for key, p in zip(self._keys, (self._head.weight, self._head.bias), strict=True)
            if p is not None
        }
        return {**super().parameters, **own}

    def remove(self, steps: int, progress: bool) -> list[Step]:
        """The step of the layers, then the head's, at most so many."""
        with Measure(self.device) as work:
            norm = self.gradient()
            examples = self.curvature()
            found = self.choose(steps, progress)
        sizes = dict.fromkeys(self._capture.blocks, found.length)
        seconds = work.seconds - sum(s.seconds for s in found.head)
        first = Step(1, found.parameters, found.objective, norm, sizes, examples, seconds, work.peak_bytes)
        return numbered([first, *found.steps_with(further(found.problem, steps - len(found.head)))])

    def choose(self, steps: int, progress: bool) -> Refit:
        """The step at its length, and the first of the head's steps behind it."""
        step, foretold = self.influence_step()
        return longest(tqdm(self.refits(step, steps), "remove", total=None, disable=not progress), foretold)

    def influence_step(self) -> tuple[Matrices, float]:
        """Formula (3) at the trained parameters, and the mean loss of the removed examples that it foretells."""
        step = self._newton_steps()
        removed = self._matrices({p: self.n * (shift - self._gradient[p]) for p, shift in self._shift.items()})
        rise = sum(float((removed[name].double() * matrix).sum()) for name, matrix in step.items())
        (foretold, *_) = self._ranks.meet("the loss foretold", (self._removed_loss + rise) / len(self.removed))
        if not math.isfinite(foretold):
            raise ValueError(
                f"remove: the influence step foretells a mean loss of {foretold} of the removed examples, which is "
                f"{self._removed_loss / len(self.removed):.3g} before it"
            )
        return step, foretold

    def refits(self, step: Matrices, steps: int, lengths: Sequence[float] = LENGTHS) -> Iterator[Refit]:
        """By length, up to the longest that leaves a network for which a head can be found.

        Raises NotPositiveDefinite where the head's block is not behind the first.
        """
        before: dict[str, Tensor] = {}
        for length in lengths:
            self._place(step, length)
            try:
                found = self._refit(length, self._head_inputs(), before, steps)
            except NotPositiveDefinite:
                if length == lengths[0]:
                    raise
                return
            if found is None:
                return
            yield found
            before = found.problem.parameters

    def _refit(self, length: float, features: Tensor, before: dict[str, Tensor], steps: int) -> Refit | None:
        """The head behind the layers as they stand and what it sees of all, from where it stood before, if it did.

        None where, behind a step of some length, features or losses are not finite. Raises NotPositiveDefinite where
        the head's block is not.
        """
        if length > 0 and not bool(features.isfinite().all()):
            return None
        decay = self._decay([p for p, name in self._names.items() if name not in self._keys])
        weight, bias = self._head.weight.detach(), self._head.bias
        bias = None if bias is None else bias.detach()
        problem = RetainedHead(features, self._labels, weight, bias, self._gone, **self._of_head)
        objective = problem.objective + decay
        if before:
            problem.go_on_from(before)
        head = list(newton(problem, min(steps, TRIAL_STEPS) if before else steps))
        ((removed, retained), *_) = self._ranks.meet("the losses behind the head", problem.mean_losses())
        if length > 0 and not removed + retained < torch.inf:
            return None
        return Refit(length, self.parameters, objective, decay, problem, head, removed, retained)

    def _place(self, step: Matrices, length: float) -> None:
        with torch.no_grad():
            for parameter, name in self._names.items():
                parameter.copy_(self.trained[name])
        self._move(combine([step], [length]))

    def _head_inputs(self, look: Look | None = None) -> Tensor:
        """What the head sees of all examples, [n, d]; the first time, notes their labels, too.

        `look` is shown every batch of this rank.
        """
        labels: list[Tensor] = []
        own = self._everyone[self._own(self._everyone)]
        with self._noting_head() as notes, torch.no_grad():
            for x, y, places in self._batches(own):
                outputs = call(self.model, x)
                labels.append(labels_of(labels_in(x, y)))
                if look is not None:
                    look(x, y, own[places], outputs)
        if not len(self._labels):
            self._labels = self._joined("labels", torch.cat(labels) if labels else None).to(self.device)
        return self._noted(notes)[0].to(self.device)


def numbered(steps: Iterable[Step]) -> list[Step]:
    return [step._replace(step=number) for number, step in enumerate(steps, 1)]


def further(problem: RetainedHead, steps: int) -> Iterator[Step]:
    """The head's steps; they end, too, where its block is no longer positive definite: it is nearly where they lead."""
    try:
        yield from newton(problem, steps)
    except NotPositiveDefinite:
        return


def longest(refits: Iterable[Refit], foretold: float) -> Refit:
    """The last before the removed examples' mean loss is above what is foretold, or the step does more harm than good.

    It does where it raises the mean loss of the retained by half as much as that of the removed, or more. The first is
    always taken; where it leaves the layers as they were, and the head alone did not do it, a warning says so.
    """
    best: Refit | None = None
    for found in refits:
        if best is not None:
            harm = found.removed - best.removed <= WORTH * (found.retained - best.retained)
            if harm or found.removed > foretold:
                if best.length == 0:
                    _warn_of_none(best, found, foretold)
                break
        best = found
        if found.removed >= foretold:
            break
    else:
        if best is not None and best.length == 0:
            _warn_of_none(best, None, foretold)
    assert best is not None
    return best


def _warn_of_none(head: Refit, shortest: Refit | None, foretold: float) -> None:
    """The head alone has not led to the loss that is foretold, and no length of the step was taken."""
    if shortest is None:
        why = (
            f"behind a step of length {LENGTHS[1]:g} no head is found. The head alone takes the mean loss of the "
            f"removed examples to {head.removed:.2g}, where {foretold:.2g} is foretold"
        )
    else:
        why = (
            f"a step of length {shortest.length:g} would take the mean loss of the removed examples from "
            f"{head.removed:.2g} to {shortest.removed:.2g}, where {foretold:.2g} is foretold, and that of the retained "
            f"from {head.retained:.2g} to {shortest.retained:.2g}"
        )
    warn_outside(
        f"remove: refit_head=True leaves the layers below the head as they were: {why}. A network that knows its "
        "examples by heart may foretell too little, a small subset know too little of what is to stay: more examples "
        "in subset= may help",
        UserWarning,
    )
