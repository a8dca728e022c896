"""What an index keeps of gradients, and how queries are made ready for it: the part that needs the model."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastif.data.batches import Walked, walked
from fastif.data.loaders import Sharded, needs_all
from fastif.index.factors import Factors
from fastif.index.metric import Metric
from fastif.index.truncation import count_numbers, is_table, squares_of, truncate, vector_numbers
from fastif.influence.fitted import Fitted
from fastif.influence.influence import Influence
from fastif.influence.queries import MADE
from fastif.model.calls import dtype_of
from fastif.model.gradients import Gradients
from fastif.sharded import refuse_sharded


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
    def of(cls, fitted: Fitted, dtype: torch.dtype) -> Encoder:
        """Raises ValueError for several checkpoints, and for estimators that are diagonal in no basis of a block."""
        curvature, *others = fitted.curvatures
        if others:
            raise ValueError(f"index: one model alone, got {len(others) + 1} checkpoints; make an index of each")
        metrics: dict[str, Metric] = {}
        for name, estimator in curvature.by_block.items():
            basis = estimator.eigenbasis()
            if basis is None:
                raise ValueError(
                    f"index: {type(estimator).__name__} of {name!r} has no eigenvalues of single blocks with a basis "
                    "that its state keeps, in which gradients are cut off and later queries are put; EKFAC, KFAC, "
                    "Shampoo, Diagonal and Identity would do"
                )
            metrics[name] = Metric.of(basis, fitted.setup.device, dtype_of(fitted.setup.model))
        return cls(fitted, metrics, dtype)

    def with_threshold(self, threshold: float) -> Encoder:
        return replace(self, threshold=threshold)

    def encode(self, gradients: Mapping[str, Gradients], own: bool = False) -> Encoded:
        """As they are stored; with own, each one's score on itself too, of all of the gradient."""
        factors, norms = dict[str, Factors](), list[Tensor]()
        for name, metric in self.metrics.items():
            truncated = truncate(gradients[name], metric, self.threshold, own)
            factors[name] = Factors.store(truncated, self.dtype)
            if truncated.own is not None:
                norms.append(truncated.own)
        return Encoded(factors, (torch.stack(norms).sum(0) / self.fitted.n).cpu() if own else None)

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
                    for name, metric in self.metrics.items():
                        for i in range(begin, end, step):
                            formed = metric.basis.rotate(gradients[name].rows(i, min(i + step, end))).formed()
                            formed = formed.to(metric.rows)
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


class Sizes(NamedTuple):
    """What could be kept of some examples' gradients in one block."""

    squares: Tensor  # σ² of their factors, float32 [n, k]
    each: int  # numbers of a factor
    numbers: int  # of an example's gradient that may differ from zero
    table: bool


def ready(influence: Influence) -> Fitted:
    """What was fitted, at the weights that the model still has, with all factors of the curvature on every rank: an
    index turns the gradients of any example into the eigenbases of all layers."""
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
