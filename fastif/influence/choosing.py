"""A chooser: which estimator, of which layers, on how much of the data, within a budget of time and memory.

Plain arithmetic: what `Influence.plan` says of each candidate, divided by the rate of a matrix product that is measured
here, and an order of the candidates by what docs/evaluation.md found. Nothing is fitted and no score is looked at.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastif.curvature.automatic import Automatic
from fastif.curvature.damping import RelativeDamping, TrainingDamping
from fastif.curvature.diagonal import Diagonal
from fastif.curvature.ekfac import EKFAC
from fastif.curvature.exact.block import ExactBlock
from fastif.curvature.matrix_free.cg import CG
from fastif.data.batches import as_loader, walked
from fastif.influence.influence import Influence
from fastif.influence.networks import Networks
from fastif.influence.planning import Plan
from fastif.model.calls import dtype_of
from fastif.model.losses import Loss
from fastif.samplers.draw import Sampler
from fastif.samplers.importance import logit
from fastif.samplers.uniform import random

_SHARE = 0.1  # of the data: in docs/evaluation.md networks lose up to 0.04 of their score with it, drawn by `logit`
_MANY = 8  # half networks that are ahead of one network on all data where a language model is explained
_SIDE = 1024  # of the matrix product that is timed


class Candidate(NamedTuple):
    """One way to scores, and what it takes by arithmetic."""

    name: str
    curvature: Any
    layers: str | Sequence[str] | None  # as for `Influence`
    share: float | None  # of the data that carry the curvature, drawn by `Choice.sampler`; None: all
    networks: Networks | None
    seconds: float = math.nan
    bytes: int | None = None  # the highest peak; None where nothing counts allocations


class Choice(NamedTuple):
    """What `choose` found."""

    chosen: Candidate
    reason: str
    considered: list[Candidate]  # all, the most faithful first
    sampler: Sampler = logit  # `samplers.random` where examples have more than one label, or none

    def influence(self, model: nn.Module, loss: Loss = "cross_entropy", **options: Any) -> Influence:
        """An Influence of the choice; `subset` of its fit is `choice.subset(n)`."""
        chosen = self.chosen
        options = {"layers": chosen.layers, "networks": chosen.networks, **options}
        return Influence(model, loss, chosen.curvature, **options)

    def subset(self, n: int) -> Any:
        """The sampler for `Influence.fit`, or None for all n examples."""
        return None if self.chosen.share is None else partial(self.sampler, k=max(1, round(self.chosen.share * n)))


def choose(
    model: nn.Module,
    train: Any,
    query: Any,
    *,
    loss: Loss = "cross_entropy",
    seconds: float = math.inf,
    bytes: int | None = None,
    networks: Networks | None = None,
    damping: RelativeDamping | TrainingDamping | None = None,
    operations: float | None = None,
    **options: Any,
) -> Choice:
    """The most faithful way to `scores(query, train)` that fits a budget, and why.

    Candidates are ordered by the linear datamodeling score that they have in docs/evaluation.md; the first that fits is
    chosen. For a language model (loss "causal_lm", or a function of a model that predicts the words of its own table)
    it is the table of the language model, by the mean of its two kinds of sets: there eight half networks are ahead of
    one on all data and fewer are behind it, and CG has no row. Else it is the table of the MLP and the CNN, by the
    halves. With `networks` of which the budget does not allow all, fewer are tried. Curvatures are
    made with fisher="auto": of drawn labels where an example has several, as texts have. The head alone is a candidate
    where no other layer shares its weight.

    Args:
        model, train, query, loss: as for `Influence`.
        seconds: for fit and scores, by arithmetic: operations over the rate of a large matrix product. Small layers and
            short batches reach a third of that rate and less: leave room.
        bytes: for the highest peak beside model and data; default none.
        networks: trained on halves, where there are any.
        damping: `TrainingDamping` where the training is known; default a tenth of each layer's mean eigenvalue.
        operations: per second, where they are known; default measured, which takes a moment.
        options: further arguments for `Influence`, such as batch_size and memory.

    Raises ValueError where not even the smallest candidate fits, with what it takes.
    """
    if not seconds > 0 or (bytes is not None and bytes < 1):
        raise ValueError(f"choose: seconds and bytes must be > 0, got seconds={seconds}, bytes={bytes}")
    rate = measure_rate(model) if operations is None else operations
    train, query = (walked(data, options.get("batch_size", 256)) for data in (train, query))
    considered: list[Candidate] = []
    order = _of_language if is_language_model(model, loss) else _of_images
    for candidate in order(networks, RelativeDamping(0.1) if damping is None else damping, _has_head_of_its_own(model)):
        estimated = _estimate(candidate, model, train, query, loss, rate, options)
        considered.append(estimated)
    fitting = [one for one in considered if one.seconds <= seconds and (bytes is None or (one.bytes or 0) <= bytes)]
    if not fitting:
        least = min(considered, key=lambda one: one.seconds)
        raise ValueError(f"choose: no candidate fits the budget; the fastest, {_words(least)}")
    chosen = fitting[0]
    over = [_words(one) for one in considered[: considered.index(chosen)]]
    reason = f"{_words(chosen)}: the most faithful within the budget" + (
        f"; above it: {'; '.join(over)}" if over else ""
    )
    return Choice(chosen, reason, considered, _sampler_of(loss, train, options.get("batch_size", 256)))


def _sampler_of(loss: Loss, train: Any, batch_size: int) -> Sampler:
    """What draws a share of the data: the uncertainty of a prediction is told of examples with one label each."""
    x, y = next(iter(as_loader(train, batch_size)))
    labels = x.get("labels") if y is None and isinstance(x, Mapping) else y
    one = isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point()
    return logit if one and loss not in ("bce", "mse") else random


def _has_head_of_its_own(model: nn.Module) -> bool:
    """Whether the last linear layer can be covered alone: that of many language models is their table of words."""
    head = _last_linear(model)
    if head is None:
        return False
    elsewhere = [p for module in model.modules() if module is not head for p in module.parameters(recurse=False)]
    return not any(p is other for p in head.parameters() for other in elsewhere)


def is_language_model(model: nn.Module, loss: Loss) -> bool:
    """Whether examples are texts of which each next word is predicted."""
    if loss == "causal_lm":
        return True
    tables = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)}
    head = _last_linear(model)
    return callable(loss) and head is not None and head.out_features in tables


def _last_linear(model: nn.Module) -> nn.Linear | None:
    """The head, as `find_head` has it; a network may end in a convolution and have none."""
    return next((module for module in reversed([*model.modules()]) if isinstance(module, nn.Linear)), None)


Rule = RelativeDamping | TrainingDamping


def _of_images(networks: Networks | None, rule: Rule, head_too: bool) -> Iterator[Candidate]:
    """From the most faithful to the MLP and the CNN on."""
    yield from _over(networks, rule)
    yield Candidate("CG over the whole network", CG(rule, tolerance=1e-2), "*", None, None)
    yield Candidate("exact blocks and EK-FAC", Automatic(rule), "*", None, None)
    yield Candidate("exact blocks and EK-FAC from a tenth of the data", Automatic(rule), "*", _SHARE, None)
    yield from _cheap(rule, head_too)


def _of_language(networks: Networks | None, rule: Rule, head_too: bool) -> Iterator[Candidate]:
    """From the most faithful to the language model on; the head alone, which was not judged there, comes last."""
    over = [*_over(networks, rule)]
    many = [one for one in over if one.networks is not None and len(one.networks.states) >= _MANY]
    yield from many
    yield Candidate("exact blocks and EK-FAC", Automatic(rule), "*", None, None)
    kronecker, *rest = _cheap(rule, head_too)
    yield kronecker
    yield rest[0]
    yield from over[len(many) :]
    yield from rest[1:]


def _over(networks: Networks | None, rule: Rule) -> Iterator[Candidate]:
    """All networks on halves, and half as many of them, down to two."""
    number = 0 if networks is None else len(networks.states)
    while number >= 2 and networks is not None:
        yield Candidate(
            f"exact blocks and EK-FAC over {number} half networks", Automatic(rule), "*", None, networks.first(number)
        )
        number //= 2


def _cheap(rule: Rule, head_too: bool) -> Iterator[Candidate]:
    kronecker, head = EKFAC(rule, "auto"), ExactBlock(rule, fisher="auto")
    yield Candidate("EK-FAC", kronecker, "*", None, None)
    yield Candidate("EK-FAC from a tenth of the data", kronecker, "*", _SHARE, None)
    if head_too:
        yield Candidate("the exact block of the head", head, None, None, None)
        yield Candidate("the exact block of the head, from a tenth of the data", head, None, _SHARE, None)


def _estimate(
    candidate: Candidate, model: nn.Module, train: Any, query: Any, loss: Loss, rate: float, options: dict[str, Any]
) -> Candidate:
    plan = _plan(candidate, model, train, query, loss, options)
    walk = candidate._replace(curvature=Diagonal(fisher="empirical"), layers=[*plan.layers])
    one_pass = _plan(walk, model, train, query, loss, options)
    parameters = sum(math.prod(shape) for shape in plan.covered.values())
    networks = 1 if candidate.networks is None else len(candidate.networks.states)
    passes = max(plan.score_passes or networks, networks)
    walks = one_pass.fit_flops / networks  # of a pass through the training data; queries are few beside them
    scoring = passes * walks + 2 * parameters * plan.q * plan.n * networks + plan.q * plan.solve_flops
    fitting = plan.fit_flops * (candidate.share or 1)
    peaks = [plan.fit_bytes, plan.score_bytes, plan.solve_bytes]
    known = [peak for peak in peaks if peak is not None]
    return candidate._replace(seconds=(fitting + scoring) / rate, bytes=max(known) if known else None)


def _plan(candidate: Candidate, model: nn.Module, train: Any, query: Any, loss: Loss, options: dict[str, Any]) -> Plan:
    how = {"layers": candidate.layers, "networks": candidate.networks, "progress": False, **options}
    return Influence(model, loss, candidate.curvature, **how).plan(train, query)


def measure_rate(model: nn.Module) -> float:
    """Operations per second of a product of matrices in the model's dtype on its device, the best of three."""
    parameter = next(model.parameters())
    a = torch.randn(_SIDE, _SIDE, device=parameter.device).to(dtype_of(model))
    best = math.inf
    for _ in range(4):  # the first one warms up
        began = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - began)
    return 2 * _SIDE**3 / best


def _words(candidate: Candidate) -> str:
    peak = "" if candidate.bytes is None else f" and {candidate.bytes / 2**20:,.0f} MiB"
    return f"{candidate.name}, takes about {candidate.seconds:.2g} s{peak}"
