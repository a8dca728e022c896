"""Steps that leave the removed examples looking like examples that the network has not seen. docs/math.md (34).

Where every example is known by heart, the gradients of the losses are nearly zero and their curvature is, too: an
influence step foretells nothing and wrecks the network. What the network *says* still has a slope there, and how sure
it would be without the examples, the ones tell that it has not seen. So each step takes the log-odds of the removed
examples' labels towards those of unseen ones that are as unusual among their neighbours, and moves what is said of the
retained as little as it can, in the square of their outputs; the head is refitted behind it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from fastif.curvature import EKFAC, NotPositiveDefinite
from fastif.data.batches import batch_length, walked
from fastif.data.dealing import deal_picked
from fastif.measure import Measure
from fastif.model.calls import call
from fastif.model.losses import labels_in, labels_of, log_odds, logits_of, measured
from fastif.progress import tqdm
from fastif.removal.neighbours import Views, quantiles, votes
from fastif.removal.network import combine
from fastif.removal.refit import TRIAL_STEPS, WORTH, Refit, RefittedNetwork, numbered
from fastif.removal.steps import Step
from fastif.renamed import warn_outside

MOST_VOTING = 10_000  # training examples of which the retained are neighbours; of more a draw
MOST_AMONG = 50  # training examples of each label among which a removed one has its rank
SHORTEST = 1 / 32  # of a step; where none so short brings the removed examples nearer, the steps end


class Matched(NamedTuple):
    """A network on the way: the head refitted behind the layers, and how far the removed examples are off."""

    refit: Refit
    odds: Tensor  # of the removed examples' labels, float64 [r]
    targets: Tensor  # of the unseen examples that are to be like them, [r]

    @property
    def off(self) -> float:
        """The mean squared distance, in nats²."""
        return float((self.odds - self.targets).square().mean())

    @property
    def above(self) -> float:
        """How much surer the network is of the removed examples on average, in nats."""
        return float((self.odds - self.targets).mean())

    @property
    def told_apart(self) -> bool:
        """Whether it is surer of them by more than a mean of so many examples is uncertain by."""
        r = len(self.odds)
        return self.above > (float(self.odds.std()) / r**0.5 if r > 1 else 0.0)


def squared_outputs(outputs: Any, batch: Any) -> Tensor:
    """½ ‖z‖² of every example, [n], whose curvature in the outputs is the identity."""
    squares = logits_of(outputs).square()
    return 0.5 * squares.reshape(len(labels_of(batch)), -1).sum(1)  # some models squeeze a batch of one


class MatchedNetwork(RefittedNetwork):
    """The steps by which the removed examples come to look like `unseen` ones, and the head's behind each; arguments
    else as for `RefittedNetwork`."""

    def __init__(
        self, model: nn.Module, train: Any, removed: Tensor, *, unseen: Any, batch_size: int = 256, **settings: Any
    ):
        if settings.get("curvature") is None:
            settings["curvature"] = EKFAC(0.0, fisher="monte_carlo")
        self._unseen = walked(unseen, batch_size)
        n = self._unseen.n
        super().__init__(model, train, removed, curved_by=squared_outputs, batch_size=batch_size, beside=n, **settings)
        everyone = torch.arange(n)
        self._own_unseen = everyone[deal_picked(self._unseen, everyone, self._ranks)]
        self._unseen_labels = self._said_of_unseen()

    def remove(self, steps: int, progress: bool) -> list[Step]:
        """The head's steps, then at most so many of the layers, each with the head's behind it."""
        quantile = self._quantiles()
        self._check_model()
        features = self._head_inputs()
        if self._picks.sampler is not None:
            seen = features[self.kept.to(self.device)]
            self._seen = {
                "features": seen.cpu(),
                "logits": self._head(seen).detach().cpu(),
                "labels": self._labels[self.kept.to(self.device)].cpu(),
            }
        examples = self.curvature()
        refit = self._refit(0.0, features, {}, steps)
        assert refit is not None
        first = found = self._matched(refit, quantile)
        history, length, better = refit.steps_with(), 1.0, found
        with tqdm(total=steps, desc="remove", disable=not progress) as bar:
            for _ in range(steps):
                if not found.told_apart:
                    break
                with Measure(self.device) as work:
                    norm, better = self._step(found, quantile, length)
                if better is None:
                    break
                found, refit = better, better.refit
                seconds = work.seconds - sum(step.seconds for step in refit.head)
                sizes = dict.fromkeys(self._capture.blocks, refit.length)
                step = Step(0, refit.parameters, refit.objective, norm, sizes, examples, seconds, work.peak_bytes)
                history += [step, *refit.steps_with()]
                length = min(1.0, 2 * refit.length)
                bar.update()
        self._warn_of(first, found, ended=better is None)
        return numbered(history)

    def _step(self, found: Matched, quantile: Tensor, length: float) -> tuple[float, Matched | None]:
        """−s H⁻¹g from there, g the gradient of half the mean squared distance, shortened until that falls; ‖g‖.

        s is so long that to first order the distances, each weighted by itself, are none behind it. None where no
        length brings the removed examples nearer.
        """
        self._stand(found.refit)
        weights = (found.odds - found.targets) / len(self.removed)
        _, sums = self._sum_over(self.removed, self._log_odds, weights)
        norm = sum(float(g.square().sum()) for g in sums.values()) ** 0.5
        with self._as_trained(found.refit):  # where the curvature is of
            step = self._newton_steps(sums)
        slope = -sum(float((self._matrices(sums)[name] * matrix.double()).sum()) for name, matrix in step.items())
        (slope, *_) = self._ranks.meet("the slope of the distance", slope)
        if not 0 < slope < math.inf:
            if found.refit.length > 0:  # what the steps before have reached stays
                return norm, None
            raise ValueError(
                f"remove: no step of these layers changes the removed examples' log-odds: slope {slope + 0.0:.3g}"
            )
        before = found.refit.problem.parameters
        while length >= SHORTEST:
            self._stand(found.refit)
            self._move(combine([step], [length * found.off / slope]))
            try:
                refit = self._refit(length, self._head_inputs(), before, TRIAL_STEPS)
            except NotPositiveDefinite:
                refit = None
            better = None if refit is None else self._matched(refit, quantile)
            if better is not None and better.off < found.off:
                return norm, better
            length /= 2
        return norm, None

    def _matched(self, refit: Refit, quantile: Tensor) -> Matched:
        """The removed examples behind this head, and the unseen ones that they are to be like."""
        odds = log_odds(refit.problem.logits_of_removed.double(), self._labels[self._gone])
        with self._noting_head() as notes, torch.no_grad():
            for x, _, _ in self._batches(self._own_unseen, self._unseen):
                call(self.model, x)
        features = self._noted(notes)[0].to(self.device)
        unseen = log_odds(refit.problem.logits_at(features).double(), self._unseen_labels)
        bad = (~unseen.isfinite()).nonzero()
        if refit.length == 0 and len(bad):  # behind a step it is a reason for a shorter one
            raise ValueError(
                f"remove: what the network says of the examples in unseen= is not finite: of {len(bad)} of them, such "
                f"as {int(bad[0, 0])}"
            )
        targets = torch.empty_like(odds)
        for label in self._labels[self._gone].unique():
            mine = self._labels[self._gone] == label
            targets[mine] = unseen[self._unseen_labels == label].quantile(quantile[mine])
        both = self._ranks.of_first("the log-odds", {"odds": odds, "targets": targets}, self.device)
        return Matched(refit, both["odds"], both["targets"])

    def _quantiles(self) -> Tensor:
        """Of each removed example, the share of the training examples of its label whose label is more unusual among
        their neighbours, float64 [r]; of two that are as usual the network is less sure of one. The removed do not
        vote."""
        draw = Generator().manual_seed(0)
        drawn = torch.randperm(self.n, generator=draw)[:MOST_VOTING]
        pool = torch.cat([drawn, self.removed]).unique()
        seen, odds, labels = self._looked_at(pool)
        place = torch.full((self.n,), -1)
        place[pool] = torch.arange(len(pool))
        gone, voting = place[self.removed], place[drawn[~torch.isin(drawn, self.removed)].sort().values]
        alike = place[drawn]
        said = labels[alike.to(self.device)].cpu()
        among = [alike[said == label][:MOST_AMONG] for label in labels[gone.to(self.device)].unique().cpu()]
        asked = torch.cat([gone, *among]).unique()
        gone, voting, asked = (rows.to(self.device) for rows in (gone, voting, asked))
        usual = torch.full((len(pool),), torch.nan, dtype=torch.float64, device=self.device)
        usual[asked] = votes(seen, labels, asked, voting).double()
        usual += 0.5 + 0.5 * odds / (1 + odds.abs())
        found = quantiles(usual, labels, gone, torch.cat(among).to(self.device))
        return self._ranks.of_first("the quantiles", {"": found}, self.device)[""]

    def _looked_at(self, pool: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of these training examples what the layers see, the log-odds of their labels, and the labels, on all ranks.

        In the first pass over the data: of what is kept below the layers that move (`Below`), hooks see nothing later.
        """
        parts: list[tuple[Tensor, ...]] = []
        views = Views(self.model, self._capture.sight.readings)
        with views.attached(), torch.no_grad():
            for x, y, _ in self._batches(pool[self._own(pool)]):
                odds = self._log_odds(x, y)
                seen = views.take(len(odds), self._capture.mask_in(x))
                parts.append((seen, odds.double(), labels_of(labels_in(x, y))))
        own = [torch.cat(part).cpu() for part in zip(*parts, strict=True)] or [None] * 3
        seen, odds, labels = (
            self._joined(name, part).to(self.device)
            for name, part in zip(("views", "log-odds", "labels"), own, strict=True)
        )
        if not bool(seen.isfinite().all() & odds.isfinite().all()):
            bad = pool[(~odds.isfinite() | ~seen.flatten(1).isfinite().all(1)).cpu()]
            raise ValueError(
                "remove: unseen= needs outputs of two classes or more and finite log-odds of the training examples' "
                f"labels; of {len(bad)} of them, such as {int(bad[0])}, they are not finite"
            )
        return seen, odds, labels

    def _said_of_unseen(self) -> Tensor:
        """The labels of the unseen examples, on all ranks. Raises ValueError where a removed one has none of its own
        among them, where there are none, and where they are no classes of the head."""
        said = [labels_of(labels_in(x, y)) for x, y, _ in self._batches(self._own_unseen, self._unseen)]
        found = self._joined("labels of unseen", torch.cat(said).cpu() if said else None)
        _check_labels(found, self._head.out_features)
        gone = self._labels_of(self.removed)
        for label in gone.unique().tolist():
            if label not in found:
                raise ValueError(
                    f"remove: unseen= has no example of label {label}, which {int((gone == label).sum())} of the "
                    "removed ones have: nothing says what the network would make of them"
                )
        return found.to(self.device)

    def _log_odds(self, x: Any, y: Any) -> Tensor:
        return measured("log_odds", self._loss, call(self.model, x), labels_in(x, y), batch_length(x))

    def _stand(self, refit: Refit) -> None:
        """The network with the layers and the head of this."""
        self._put({**refit.parameters, **refit.problem.parameters})

    @contextmanager
    def _as_trained(self, refit: Refit) -> Iterator[None]:
        self._put(self.trained)
        try:
            yield
        finally:
            self._stand(refit)

    def _put(self, values: Mapping[str, Tensor]) -> None:
        named = {name: p for p, name in self._names.items()}
        named |= dict(zip(self._keys, (self._head.weight, self._head.bias), strict=True))
        with torch.no_grad():
            for name, value in values.items():
                named[name].copy_(value)

    def _warn_of(self, first: Matched, last: Matched, ended: bool) -> None:
        """Where the steps end far from the unseen examples, or have taken as much from the retained ones; `ended`:
        because the last one came no nearer at any length."""
        before, after = first.refit, last.refit
        if last.told_apart and last.above > max(1.0, 0.5 * first.above):
            advice = "a further step of these layers comes no nearer: others in layers=" if ended else "more steps="
            warn_outside(
                f"remove: after the steps the network is surer of the removed examples than of unseen ones like them "
                f"by {last.above:.2g} nats on average, before them by {first.above:.2g}; {advice} or more examples in "
                "subset= may help",
                UserWarning,
            )
        wrecked = after.retained >= math.log(self._head.out_features)
        if wrecked or 0 < after.removed - before.removed <= WORTH * (after.retained - before.retained):
            warn_outside(
                f"remove: the steps of these layers take the mean loss of the removed examples from "
                f"{before.removed:.2g} to {after.removed:.2g} and that of the retained from {before.retained:.2g} to "
                f"{after.retained:.2g}: more examples in subset= may do less harm",
                UserWarning,
            )


def _check_labels(labels: Tensor, classes: int) -> None:
    rule = f"remove: unseen= must have one integer label per example, in [0, c={classes})"
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"{rule}, got {labels.dtype}")
    if labels.dim() != 1:
        raise ValueError(f"{rule}, got labels {list(labels.shape)}")
    outside = ((labels < 0) | (labels >= classes)).nonzero()
    if len(outside):
        first = int(outside[0, 0])
        raise ValueError(f"{rule}; of {len(outside)} they are not, such as example {first}, which has {labels[first]}")
