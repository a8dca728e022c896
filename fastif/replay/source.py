"""SOURCE: a training in a few segments, each of one curvature and one learning rate, unrolled in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastif.curvature.damping import TrainingDamping
from fastif.curvature.ekfac import EKFAC
from fastif.curvature.limits import MEMORY
from fastif.curvature.network import NetworkCurvature
from fastif.curvature.protocol import Estimator
from fastif.data.batches import Sharded, Walked, walked
from fastif.data.dealing import Part, deal, tell_data
from fastif.data.loaders import needs_all
from fastif.data.parts import Parts
from fastif.fingerprints import fingerprint
from fastif.influence.averaging import average_rows
from fastif.influence.influence import Influence
from fastif.influence.tiles import check_groups
from fastif.model.losses import Loss, Measurement
from fastif.model.passes import Passes
from fastif.ranks import find_ranks, together
from fastif.replay.agreement import check_logs, tell_log
from fastif.replay.log import TrainingLog
from fastif.replay.segments import divide, scales_of, shifts_of
from fastif.replay.unrolling import KNOWS_NO_EIGENVALUES, Decay, Filtered, Scaled, Undamped, Unrolling
from fastif.samplers.subset import Subset

Curvature = Callable[[TrainingDamping], Estimator | Mapping[str, Estimator]]


class _Segment(NamedTuple):
    """Some steps of a training, at the checkpoint that speaks for them."""

    passes: Passes
    state: dict[str, Tensor]
    unroll: Unrolling


class Source:
    """Scores by segments of the training (SOURCE, Bae et al. 2024), from the checkpoints of its log. docs/math.md (25).

    scores[q, t] = (1/n) Σ_l ∇m_qᵀ (Π_{l' > l} e^{−τ_l'(G_l' + γ)}) f_l(G_l) ∇ℓ_t(θ_l), f_l the filter of
    `TrainingDamping` for the training time τ_l of segment l, G_l and ∇ℓ_t(θ_l) taken at the checkpoint nearest to the
    segment's middle: the predicted rise of query q's measurement had t not been trained on. It costs a fit and a pass
    over the data for each segment, where `Replay` costs passes for each step.

    Of Adam and AdamW the same in parameters divided by P^½, P = 1/(√v̂ + ε) held over the segment, v̂ the mean of those
    that its checkpoints have, and τ_l = Σ η: functions of P^½ (G + γ) P^½, or with AdamW's decay of P^½ G P^½ + γ, by
    products with the estimator's G; γ may differ by parameter group. What a gradient does to v̂ is left out: scores
    come out too large, most of all those through parameters that few examples move, as rare words' vectors are.

    Args:
        logs: a `TrainingLog`, or several, whose networks' rows are scaled and averaged as in `Replay`.
        model: a network of the architecture; it is left as it is.
        train: the training data that the logs' rows are places in.
        loss, layers, measurement, batch_size, memory, seed, progress: as for `Influence`; default layers "trained".
        curvature: makes the estimators, given a damping: `EKFAC`, or `lambda damping: {"head": ExactBlock(damping),
            "*": EKFAC(damping)}`. With several segments, or Adam, they must know their eigenvalues (not `CG`, `LiSSA`,
            `DataInf`, `RandomProjection`).
        segments: into which the steps are divided, as equally as possible; each needs a checkpoint of its own, unless
            all its learning rates are 0.
        group: on several ranks (`torchrun`), the process group among whose ranks the passes over the training data are
            divided; default all. Each keeps every segment's curvature; every rank gets the same result.

    Raises ValueError for logs whose groups differ in the learning rate, as there is no one time; whose steps, or groups
    of SGD, differ in weight decay; for more segments than checkpoints; and where a thousand products do not suffice for
    Adam.
    """

    def __init__(
        self,
        logs: TrainingLog | Sequence[TrainingLog],
        model: nn.Module,
        train: Any,
        loss: Loss = "cross_entropy",
        curvature: Curvature = EKFAC,
        *,
        segments: int = 3,
        layers: str | Sequence[str] = "trained",
        measurement: Measurement = "loss",
        batch_size: int = 256,
        memory: int = MEMORY,
        seed: int = 0,
        progress: bool = True,
        group: Any = None,
    ):
        self.ranks = find_ranks(group)
        self.logs = check_logs("Source", logs, model)
        if type(segments) is not int or segments < 1:
            raise ValueError(f"Source: segments must be an integer >= 1, got {segments!r}")
        if isinstance(train, Sharded):
            raise ValueError(needs_all("Source"))
        self.train, self.model, self.curvature = walked(train, batch_size), model, curvature
        self.segments, self.memory = segments, memory
        self._influence = partial(
            Influence,
            model,
            loss,
            layers=layers,
            measurement=measurement,
            batch_size=batch_size,
            memory=memory,
            seed=seed,
            progress=progress,
            group=group,
            replicate=True,  # segments are walked through on every rank
        )
        self._measurement: Measurement = measurement
        self._stretches = [divide(log, segments) for log in self.logs]
        self._fitted: list[tuple[int, list[_Segment]]] = []  # by log: examples that it was trained on, segments

    @together
    def fit(self) -> Source:
        """Builds every segment's curvature, from the examples that the network was trained on; scores do it first."""
        if not self._fitted:
            self._compare("fit")
            self._fitted = [self._fit(number) for number in range(len(self.logs))]
        return self

    @together
    def scores(self, query: Any, train: Any = None, *, query_groups: Tensor | None = None) -> Tensor:
        """Predicted rise of every query's measurement if a training example were removed, [q, n], on the CPU.

        Args:
            query: data with labels.
            train: the training data, as given before, or other data with labels; columns are then its examples.
            query_groups: int64 [q]; rows are then groups of queries, whose measurements are summed, [groups, n].
        """
        query = walked(query, self.train.batch_size)
        if query_groups is not None:
            check_groups("query_groups", query_groups, query.n)
        data = self.train if train is None or self.train.holds(train) else walked(train, self.train.batch_size)
        self._compare("scores", query_groups, query=query, train=data)
        self.fit()
        found = []
        for log, (n, segments) in zip(self.logs, self._fitted, strict=True):
            end = _state_of(self.model, log.parameters())
            parts = [
                self._rows(segments, vectors, data) for vectors in self._gradients(segments[-1].passes, end, query)
            ]
            found.append(torch.cat(parts) / n)
        scores = found[0] if len(found) == 1 else average_rows(found)[0]
        if query_groups is None:
            return scores
        return scores.new_zeros((int(query_groups.max()) + 1, scores.shape[1])).index_add_(0, query_groups, scores)

    # --------------------------------------------------------------------------------------------------------- the work

    def _compare(self, op: str, query_groups: Tensor | None = None, **data: Walked) -> None:
        """Raises ValueError, on all ranks, where one of them has other logs or data than the first; of what is fitted
        fits compare the rest."""
        if self.ranks.world == 1:
            return
        told: dict[str, Any] = {
            "segments": self.segments,
            "number of logs": len(self.logs),
            **{f"log {number}": tell_log(log) for number, log in enumerate(self.logs)},
            "query_groups=": None if query_groups is None else fingerprint([query_groups]),
        }
        for name, value in data.items():
            if isinstance(value, Parts):
                raise ValueError(needs_all(f"{op}: {name}="))
            told.update({f"{part} of {name}=": what for part, what in tell_data(value, self.ranks).items()})
        self.ranks.compare(op, told)

    def _fit(self, number: int) -> tuple[int, list[_Segment]]:
        log = self.logs[number]
        rows = log.kept
        if int(rows[-1]) >= self.train.n:
            raise ValueError(
                f"Source: the log's rows must be in [0, n={self.train.n}), got {int(rows[-1])}: other data?"
            )
        subset = Subset(rows, torch.full((len(rows),), 1 / len(rows), dtype=torch.float64))
        rates, made = log.rates(), list[_Segment]()
        for start, stop, checkpoints, middle in self._stretches[number]:
            time, state = math.fsum(rates[start:stop]), _state_of(self.model, log.parameters(middle))
            scales = scales_of(log, checkpoints)
            damping = TrainingDamping(time, log.weight_decay) if scales is None else Undamped(time)
            fitted = self._influence(self.curvature(damping), checkpoints=[state]).fit(self.train, subset)
            if scales is not None:
                unroll: Unrolling = self._scaled(fitted, damping, scales, log, first=not made)
            else:
                decay = self._decay(Decay(time, log.weight_decay), fitted) if made else None
                unroll = Filtered(fitted.fitted.curvatures[0], decay)
            made.append(_Segment(fitted.passes, state, unroll))
        return len(rows), made

    def _decay(self, rule: Decay, response: Influence) -> NetworkCurvature:
        """What the response learned, with e^{−τ(G + γ)} in the place of the inverse."""
        if response.fitted.curvatures[0].needs_data:
            raise ValueError(KNOWS_NO_EIGENVALUES)
        decay = self._influence(self.curvature(rule), checkpoints=response.setup.checkpoints)
        (curvature,) = decay.load_state_dict(response.state_dict()).fitted.curvatures
        _check_follows(curvature, rule)
        return curvature

    def _scaled(
        self, fitted: Influence, rule: TrainingDamping, scales: Mapping[str, Tensor], log: TrainingLog, first: bool
    ) -> Scaled:
        (curvature,) = fitted.fitted.curvatures
        if curvature.needs_data:
            raise ValueError(KNOWS_NO_EIGENVALUES)
        _check_follows(curvature, rule)
        parameters = {name: parameter for parameter, name in fitted.capture.names.items()}

        def by_block(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
            values = {p: given.get(name, torch.zeros_like(p)).to(fitted.device) for name, p in parameters.items()}
            return {name: block.matrix(values) for name, block in fitted.capture.blocks.items()}

        shifts = shifts_of(log, scales)
        return Scaled(curvature, by_block(scales), by_block(shifts), rule.time, first, self.memory // 3)

    def _gradients(self, passes: Passes, end: dict[str, Tensor], query: Walked) -> Iterator[dict[str, Tensor]]:
        """The queries' gradients at the end of the training, as many at a time as a third of the memory holds."""
        size = sum(block.size for block in passes.capture.blocks.values())
        size *= max(value.element_size() for value in end.values())
        for chosen in torch.arange(query.n).split(max(1, self.memory // 3 // size)):
            held: dict[str, list[Tensor]] = {}
            batches = [batch for batch, _ in query.picked(chosen)]
            with passes.running(end):
                for _, _, gradients in passes.gradients(batches, "queries", self._measurement):
                    for name, g in gradients.items():
                        held.setdefault(name, []).append(g.formed())
            yield {name: torch.cat(parts) for name, parts in held.items()}

    def _rows(self, segments: list[_Segment], vectors: dict[str, Tensor], data: Walked) -> Tensor:
        """n times the scores of some queries; each rank brings the columns of its training examples."""
        mine = deal(data, self.ranks)
        part = data if self.ranks.world == 1 else Part(data, self.train.batch_size, [mine])
        queries, total = len(next(iter(vectors.values()))), None
        for segment in reversed(segments):
            with segment.passes.running(segment.state):
                directions, decayed = segment.unroll(vectors)
                parts = []
                for _, _, gradients in segment.passes.gradients(part, "scores") if len(mine) else ():
                    dots = [g.dots(directions[name]) for name, g in gradients.items()]
                    parts.append(torch.stack(dots).sum(0).cpu())
                rows = torch.cat(parts, 1) if parts else torch.zeros(queries, 0)
                total = rows if total is None else total + rows
                vectors = vectors if decayed is None else decayed
        own = total.to(self.ranks.device) if total is not None and len(mine) else None
        return self.ranks.join("scores", own, self.ranks.device, dim=1).cpu()


def _check_follows(curvature: NetworkCurvature, rule: TrainingDamping) -> None:
    """Raises ValueError for estimators that do not put the rule's function in the place of their inverse."""
    for estimator in curvature.by_block.values():  # a state may hold a number that took the rule's place
        if getattr(estimator, "damping_used", None) != rule.of_flat_directions:
            raise ValueError(KNOWS_NO_EIGENVALUES)


def _state_of(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the model with these values; names that share a parameter have one value."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = model.state_dict(keep_vars=True)
    return {key: parameters.get(names.get(value, key), value).detach() for key, value in state.items()}
