"""What an index keeps of gradients, and how queries are made ready for it: the part that needs the model."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastif.curvature.network import NetworkCurvature
from fastif.data.batches import Walked, walked
from fastif.data.dealing import Part
from fastif.data.loaders import Sharded, needs_all
from fastif.index.factors import Factors, runs_of
from fastif.index.metric import Metric
from fastif.index.truncation import count_numbers, is_table, squares_of, truncate, vector_numbers
from fastif.influence.fitted import Fitted
from fastif.influence.influence import Influence
from fastif.influence.queries import MADE
from fastif.model.calls import dtype_of
from fastif.model.gradients import Gradients
from fastif.sharded import refuse_sharded

FEW = 8  # training examples that say what solving makes of gradients


class Encoded(NamedTuple):
    """Some examples as they are stored."""

    factors: dict[str, Factors]  # by block
    own: Tensor | None  # [n], each example's score on itself


@dataclass(frozen=True)
class Encoder:
    """The metrics of a fitted curvature's blocks, what is dropped in them, and in what type the rest is stored."""

    fitted: Fitted
    metrics: Mapping[str, Metric]
    dtype: torch.dtype
    threshold: float = 0.0  # σ² per number of a factor, below which it is dropped

    @classmethod
    def of(cls, fitted: Fitted, dtype: torch.dtype, worth: Mapping[str, float]) -> Encoder:
        """`worth` as `worth_of` gives it, and a folder keeps it."""
        metrics: dict[str, Metric] = {}
        like: dict[str, Any] = {"device": fitted.setup.device, "dtype": dtype_of(fitted.setup.model)}
        for name, estimator in _only(fitted).by_block.items():
            basis = estimator.eigenbasis()
            if basis is None:
                metrics[name] = Metric.without_basis(fitted.setup.capture.blocks[name].shape, worth[name], **like)
            else:
                metrics[name] = Metric.of(basis, **like)
        return cls(fitted, metrics, dtype)

    def with_threshold(self, threshold: float) -> Encoder:
        return replace(self, threshold=threshold)

    def encode(self, gradients: Mapping[str, Gradients], own: bool = False) -> Encoded:
        """As they are stored; with own, each one's score on itself too, of all of the gradient."""
        factors = {
            name: Factors.store(truncate(gradients[name], metric, self.threshold), self.dtype)
            for name, metric in self.metrics.items()
        }
        return Encoded(factors, self._own(gradients) if own else None)

    def self_influence(self, factors: Mapping[str, Factors]) -> Tensor:
        """Of examples that are stored each one's score on itself, [n], of what is kept of its gradient."""
        parts: list[Tensor] = []
        for run in runs_of([*factors.values()]):
            some = {name: factors[name].rows(*run).gradients(m.rows, m.columns) for name, m in self.metrics.items()}
            parts.append(self._own(some))
        return torch.cat(parts)

    def _own(self, gradients: Mapping[str, Gradients]) -> Tensor:
        return (_only(self.fitted).sq_norms(gradients) / self.fitted.n).cpu()

    def look_at(self, gradients: Mapping[str, Gradients]) -> dict[str, Sizes]:
        """σ² of some examples by block, and what factors of the block take."""
        found: dict[str, Sizes] = {}
        for name, metric in self.metrics.items():
            table = is_table(gradients[name])
            squares = squares_of(gradients[name], metric).float().cpu()
            numbers = count_numbers(gradients[name], metric.shape)
            found[name] = Sizes(squares, vector_numbers(metric.shape, table), numbers, table)
        return found

    def queries(
        self, query: Any, total: int, groups: Tensor | None, memory: int
    ) -> Generator[tuple[int, dict[str, Tensor]]]:
        """Gradients of as many queries as `memory` holds, or of all groups of them, ready for `Factors.dots`, with the
        first one's number; 1/n is in them."""
        passes = self.fitted.passes
        size = sum(torch.Size(metric.shape).numel() for metric in self.metrics.values())
        each = max(1, memory // (size * dtype_of(passes.model).itemsize))
        step = max(1, min(each, MADE // (size * dtype_of(passes.model).itemsize)))
        room = total if groups is not None else min(each, total)
        first = filled = 0
        held: dict[str, Tensor] = {}
        with passes.running(self.fitted.setup.states[0]):
            for start, n, gradients in passes.gradients(query, "queries", self.fitted.setup.measurement):
                begin = 0
                while begin < n:
                    if not held:
                        held = {
                            name: metric.rows.new_zeros((min(room, total - first), *metric.shape))
                            for name, metric in self.metrics.items()
                        }
                    end = n if groups is not None else min(n, begin + len(next(iter(held.values()))) - filled)
                    for i in range(begin, end, step):
                        some = {name: gradients[name].rows(i, min(i + step, end)) for name in self.metrics}
                        for name, formed in self._to_weigh(some):
                            metric = self.metrics[name]
                            if groups is not None:
                                weighed = metric.weigh_query(formed, torch.empty_like(formed), self.fitted.n)
                                rows = groups[start + i : start + i + len(weighed)].to(weighed.device)
                                held[name].index_add_(0, rows, weighed)
                            else:
                                place = held[name][filled + i - begin : filled + i - begin + len(formed)]
                                metric.weigh_query(formed, place, self.fitted.n)
                    if groups is None:
                        filled += end - begin
                    begin = end
                    if groups is None and filled == len(next(iter(held.values()))):
                        yield first, held
                        first, filled, held = first + filled, 0, {}
                del gradients
        if held:
            yield first, held

    def _to_weigh(self, gradients: Mapping[str, Gradients]) -> Iterator[tuple[str, Tensor]]:
        """By block, matrices [n, g, o, d] in the eigenbasis, or solved for where there is none."""
        for names, part in _only(self.fitted).parts.items():
            if any(self.metrics[name].basis is None for name in names):
                solved = part.precondition({name: gradients[name] for name in names})
                yield from ((name, matrices.to(self.metrics[name].rows)) for name, matrices in solved.items())
                continue
            for name in names:
                basis = self.metrics[name].basis
                assert basis is not None
                yield name, basis.rotate(gradients[name]).formed().to(self.metrics[name].rows)


class Sizes(NamedTuple):
    """What could be kept of some examples' gradients in one block."""

    squares: Tensor  # σ² of their factors, float32 [n, k]
    each: int  # numbers of a factor
    numbers: int  # of an example's gradient that may differ from zero
    table: bool


def refuse_products(fitted: Fitted) -> None:
    """Raises ValueError for several checkpoints, and for an estimator that needs the fit's data for each query."""
    for names, part in _only(fitted).parts.items():
        if part.products(1).solve:
            raise ValueError(
                f"index: {type(part.given).__name__} of {names[0]!r} solves by products with the curvature of the "
                "fit's data, of which no state is kept for later queries; EKFAC, KFAC, Shampoo, Diagonal, Identity, "
                "ExactBlock, DataInf, Arnoldi and RandomProjection would do"
            )


def worth_of(fitted: Fitted, train: Walked, order: Tensor) -> dict[str, float]:
    """`Metric.worth` of blocks whose estimators have no eigenbasis: the mean square of what these solve for, for the
    gradients of the first `FEW` training examples in `order`, int64 [n], and of as many more as it takes to see one
    that has a gradient there. Of several ranks the first looks."""
    unknown = [
        names
        for names in _only(fitted).parts
        if any(_only(fitted).by_block[name].eigenbasis() is None for name in names)
    ]
    if not unknown:
        return {}
    ranks = fitted.setup.ranks
    found = _worth_of(fitted, train, order, unknown) if ranks.rank == 0 else {}
    (first, *_) = ranks.meet("what solving makes of a few examples", found)
    return first


def _worth_of(fitted: Fitted, train: Walked, order: Tensor, unknown: list[tuple[str, ...]]) -> dict[str, float]:
    parts, alone = _only(fitted).parts, by_loss(fitted)
    squares: dict[str, list[float]] = {name: [] for names in unknown for name in names}
    begin, end = 0, FEW
    with alone.passes.running(alone.setup.states[0]):
        while unknown and begin < len(order):
            sample = part_of(train, order[begin:end])
            for _, n, gradients in alone.passes.gradients(sample, "index, a few examples"):
                for names in unknown:
                    for i in range(n):
                        solved = parts[names].precondition({name: gradients[name].rows(i, i + 1) for name in names})
                        for name, matrix in solved.items():
                            squares[name].append(float(matrix.double().square().mean()))
                del gradients
            unknown = [names for names in unknown if not all(any(squares[name]) for name in names)]
            begin, end = end, 2 * end
    # Some are never seen with a gradient, as an expert that no example chooses: nothing of them is stored.
    return {name: fmean(values) or 1.0 for name, values in squares.items()}


def by_loss(fitted: Fitted) -> Fitted:
    """For training examples as queries, without the other ranks."""
    return fitted.alone._replace(setup=fitted.alone.setup._replace(measurement="loss"))


def part_of(train: Walked, examples: Tensor) -> Part:
    """Some examples, in the order of the data."""
    return Part(train, train.batch_size, [range(i, i + 1) for i in examples.sort().values.tolist()])


def _only(fitted: Fitted) -> NetworkCurvature:
    """Raises ValueError for several checkpoints."""
    curvature, *others = fitted.curvatures
    if others:
        raise ValueError(f"index: one model alone, got {len(others) + 1} checkpoints; make an index of each")
    return curvature


def ready(influence: Influence) -> Fitted:
    """What was fitted, at the weights that the model still has, with all factors of the curvature on every rank: an
    index needs the eigenbases of all layers for any example, and what solves where there is none."""
    refuse_sharded(influence.model, "index")
    fitted = influence.gather().fitted if influence.fitted.divided else influence.fitted
    fitted.check_weights()
    return fitted


def walkable(influence: Influence, data: Any) -> Walked:
    """Data whose passes are held against each other, and against the fit's where it is what was fitted."""
    if isinstance(data, Iterator):
        raise ValueError("index: the data is walked through more than once, got an iterator; pass a list")
    if isinstance(data, Sharded):
        raise ValueError(needs_all("index"))
    (found,) = influence.fitted.walk(data)
    return walked(found, influence.passes.batch_size)
