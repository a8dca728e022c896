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
from fastif.data.batches import Walked, walked
from fastif.influence.averaging import average_rows
from fastif.influence.influence import Influence
from fastif.influence.tiles import check_groups
from fastif.model.losses import Loss, Measurement
from fastif.model.passes import Passes
from fastif.replay.agreement import check_logs
from fastif.replay.log import TrainingLog
from fastif.samplers.subset import Subset

Curvature = Callable[[TrainingDamping], Estimator | Mapping[str, Estimator]]
_EIGENVALUES = (
    "Source: several segments need a curvature that knows its eigenvalues (KFAC, EKFAC, Shampoo, Diagonal, ExactBlock, "
    "Arnoldi) and takes the damping that curvature= is called with"
)


class _Decay(TrainingDamping):
    """e^{−τ(x + γ)} in the place of f(x): what becomes of a difference in the parameters over the time τ."""

    def filter(self, eigenvalues: Tensor) -> Tensor:
        return (eigenvalues + self.weight_decay).clamp_(min=0).mul_(-self.time).exp_()

    @property
    def of_flat_directions(self) -> float:
        return 1 / max(self.at(0.0), 1e-300)

    @property
    def constant(self) -> float:
        raise ValueError(_EIGENVALUES)


class _Segment(NamedTuple):
    """Some steps of a training, at the checkpoint in their middle."""

    passes: Passes
    state: dict[str, Tensor]
    response: NetworkCurvature  # solves with f(G)
    decay: NetworkCurvature | None  # solves with e^{−τ(G + γ)}; the first segment needs none


class Source:
    """Scores by segments of the training (SOURCE, Bae et al. 2024), from the checkpoints of its log. docs/math.md (25).

    scores[q, t] = (1/n) Σ_l ∇m_qᵀ (Π_{l' > l} e^{−τ_l'(G_l' + γ)}) f_l(G_l) ∇ℓ_t(θ_l), f_l the filter of
    `TrainingDamping` for the training time τ_l of segment l, G_l and ∇ℓ_t(θ_l) taken at the checkpoint nearest to the
    segment's middle: the predicted rise of query q's measurement had t not been trained on. It costs a fit and a pass
    over the data for each segment, where `Replay` costs passes for each step.

    Args:
        logs: a `TrainingLog` of SGD, or several, whose networks' rows are scaled and averaged as in `Replay`.
        model: a network of the architecture; it is left as it is.
        train: the training data that the logs' rows are places in.
        loss, layers, measurement, batch_size, memory, seed, progress: as for `Influence`; default layers "trained".
        curvature: makes the estimators, given a damping: `EKFAC`, or `lambda damping: {"head": ExactBlock(damping),
            "*": EKFAC(damping)}`. With several segments they must know their eigenvalues (not `CG`, `LiSSA`, `DataInf`,
            `RandomProjection`).
        segments: into which the steps are divided, as equally as possible; each needs a checkpoint of its own.

    Raises ValueError for logs of Adam, or whose groups or steps differ in weight decay: there is no one time; and for
    more segments than checkpoints.
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
    ):
        self.logs = check_logs("Source", logs, model)
        if type(segments) is not int or segments < 1:
            raise ValueError(f"Source: segments must be an integer >= 1, got {segments!r}")
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
            replicate=True,  # segments are walked through on every rank
        )
        self._measurement: Measurement = measurement
        self._bounds = [_divide(log, segments) for log in self.logs]
        self._fitted: list[tuple[int, list[_Segment]]] = []  # by log: examples that it was trained on, segments

    def fit(self) -> Source:
        """Builds every segment's curvature, from the examples that the network was trained on; scores do it first."""
        if not self._fitted:
            self._fitted = [self._fit(log, bounds) for log, bounds in zip(self.logs, self._bounds, strict=True)]
        return self

    def scores(self, query: Any, train: Any = None, *, query_groups: Tensor | None = None) -> Tensor:
        """Predicted rise of every query's measurement if a training example were removed, [q, n], on the CPU.

        Args:
            query: data with labels.
            train: the training data, as given before, or other data with labels; columns are then its examples.
            query_groups: int64 [q]; rows are then groups of queries, whose measurements are summed, [groups, n].
        """
        self.fit()
        query = walked(query, self.train.batch_size)
        if query_groups is not None:
            check_groups("query_groups", query_groups, query.n)
        data = self.train if train is None or self.train.holds(train) else walked(train, self.train.batch_size)
        found = []
        for log, (n, segments) in zip(self.logs, self._fitted, strict=True):
            end = _state_of(self.model, log.parameters())
            parts = [
                self._rows(segments, vectors, data) for vectors in self._gradients(segments[-1].passes, end, query)
            ]
            found.append(torch.cat(parts) / n)
        scores = found[0] if len(found) == 1 else average_rows(found)
        if query_groups is None:
            return scores
        return scores.new_zeros((int(query_groups.max()) + 1, scores.shape[1])).index_add_(0, query_groups, scores)

    # --------------------------------------------------------------------------------------------------------- the work

    def _fit(self, log: TrainingLog, bounds: list[tuple[int, int, int]]) -> tuple[int, list[_Segment]]:
        rows = log.kept
        if int(rows[-1]) >= self.train.n:
            raise ValueError(
                f"Source: the log's rows must be in [0, n={self.train.n}), got {int(rows[-1])}: other data?"
            )
        subset = Subset(rows, torch.full((len(rows),), 1 / len(rows), dtype=torch.float64))
        rates, weight_decay, made = log.rates(), log.weight_decay, list[_Segment]()
        for start, stop, checkpoint in bounds:
            time, state = math.fsum(rates[start:stop]), _state_of(self.model, log.parameters(checkpoint))
            damping = TrainingDamping(time, weight_decay)
            response = self._influence(self.curvature(damping), checkpoints=[state]).fit(self.train, subset)
            (curvature,), decay = response.fitted.curvatures, None
            if made:
                decay = self._decay(_Decay(time, weight_decay), response)
            made.append(_Segment(response.passes, state, curvature, decay))
        return len(rows), made

    def _decay(self, rule: _Decay, response: Influence) -> NetworkCurvature:
        """What the response learned, with e^{−τ(G + γ)} in the place of the inverse."""
        if response.fitted.curvatures[0].needs_data:
            raise ValueError(_EIGENVALUES)
        decay = self._influence(self.curvature(rule), checkpoints=response.setup.checkpoints)
        (curvature,) = decay.load_state_dict(response.state_dict()).fitted.curvatures
        for estimator in curvature.by_block.values():  # a state may hold a number that took the rule's place
            if getattr(estimator, "damping_used", None) != rule.of_flat_directions:
                raise ValueError(_EIGENVALUES)
        return curvature

    def _gradients(self, passes: Passes, end: dict[str, Tensor], query: Walked) -> Iterator[dict[str, Tensor]]:
        """The queries' gradients at the end of the training, as many at a time as a third of the memory holds."""
        size = sum(block.size for block in passes.capture.blocks.values()) * 4
        for chosen in torch.arange(query.n).split(max(1, self.memory // 3 // size)):
            held: dict[str, list[Tensor]] = {}
            batches = [batch for batch, _ in query.picked(chosen)]
            with passes.running(end):
                for _, _, gradients in passes.gradients(batches, "queries", self._measurement):
                    for name, g in gradients.items():
                        held.setdefault(name, []).append(g.formed())
            yield {name: torch.cat(parts) for name, parts in held.items()}

    def _rows(self, segments: list[_Segment], vectors: dict[str, Tensor], data: Any) -> Tensor:
        """n times the scores of some queries."""
        total: Tensor | None = None
        for segment in reversed(segments):
            with segment.passes.running(segment.state):
                directions = segment.response.solve(vectors)
                parts = []
                for _, _, gradients in segment.passes.gradients(data, "scores"):
                    dots = [g.dots(directions[name]) for name, g in gradients.items()]
                    parts.append(torch.stack(dots).sum(0).cpu())
                rows = torch.cat(parts, 1)
                total = rows if total is None else total + rows
                if segment.decay is not None:
                    vectors = segment.decay.solve(vectors)
        assert total is not None
        return total


def _divide(log: TrainingLog, segments: int) -> list[tuple[int, int, int]]:
    """First step, last step + 1, and the checkpoint nearest to the middle of its time, of every segment."""
    rates, starts, found = log.rates(), log.starts, []
    _ = log.weight_decay
    if segments > len(rates):
        raise ValueError(f"Source: segments must be at most the log's {len(rates)} steps, got {segments}")
    for segment in range(segments):
        start, stop = (len(rates) * bound // segments for bound in (segment, segment + 1))
        inside = [number for number, step in enumerate(starts) if start <= step < stop]
        if not inside:
            raise ValueError(
                f"Source: segment {segment} (steps {start} to {stop - 1}) has no checkpoint: choose fewer segments "
                f"than the {len(starts)} checkpoints, or record more with TrainingLog(every=...)"
            )
        half = math.fsum(rates[start:stop]) / 2
        nearest = min(inside, key=lambda number: abs(math.fsum(rates[start : starts[number]]) - half))
        found.append((start, stop, nearest))
    return found


def _state_of(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the model with these values; names that share a parameter have one value."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = model.state_dict(keep_vars=True)
    return {key: parameters.get(names.get(value, key), value).detach() for key, value in state.items()}
