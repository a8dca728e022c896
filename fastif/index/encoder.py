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
from fastif.index.factors import Factors
from fastif.index.metric import Metric, Unrotated
from fastif.index.truncation import count_numbers, is_table, squares_of, truncate, vector_numbers
from fastif.influence.fitted import Fitted
from fastif.influence.influence import Influence
from fastif.influence.queries import MADE
from fastif.model.calls import dtype_of
from fastif.model.gradients import Dense, Gradients
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
    def of(cls, fitted: Fitted, dtype: torch.dtype, unrotated: Unrotated) -> Encoder:
        """`unrotated` as `choose_unrotated` gives it, and a folder keeps it."""
        metrics: dict[str, Metric] = {}
        like: dict[str, Any] = {"device": fitted.setup.device, "dtype": dtype_of(fitted.setup.model)}
        for name, estimator in _only(fitted).by_block.items():
            basis, worth = estimator.eigenbasis(), unrotated.get(name)
            if basis is not None:
                metrics[name] = Metric.of(basis, **like, unrotated=name in unrotated)
            else:
                assert worth is not None
                metrics[name] = Metric.without_basis(fitted.setup.capture.blocks[name].shape, worth, **like)
        return cls(fitted, metrics, dtype)

    def with_threshold(self, threshold: float) -> Encoder:
        return replace(self, threshold=threshold)

    def encode(self, gradients: Mapping[str, Gradients], own: bool = False) -> Encoded:
        """As they are stored; with own, each one's score on itself too, of all of the gradient."""
        factors, norms = dict[str, Factors](), list[Tensor]()
        for name, metric in self.metrics.items():
            truncated = truncate(gradients[name], metric, self.threshold, own and metric.stores_rotated)
            factors[name] = Factors.store(truncated, self.dtype)
            if truncated.own is not None:
                norms.append(truncated.own)
        if own:
            norms += self._sq_norms_of_parts(gradients)
        return Encoded(factors, (torch.stack(norms).sum(0) / self.fitted.n).cpu() if own else None)

    def sq_norms(self, factors: Mapping[str, Factors]) -> Tensor:
        """Of examples that are stored each one's score on itself, [n], times n: of what is kept of its gradient."""
        norms = [factors[name].sq_norms(metric.own) for name, metric in self.metrics.items() if metric.stores_rotated]
        own = {name: metric for name, metric in self.metrics.items() if not metric.stores_rotated}
        as_gradients = {name: factors[name].gradients(metric.rows, metric.columns) for name, metric in own.items()}
        return torch.stack(norms + self._sq_norms_of_parts(as_gradients)).sum(0)

    def _sq_norms_of_parts(self, gradients: Mapping[str, Gradients]) -> list[Tensor]:
        """Those of blocks that are stored unrotated, as their estimators have them."""
        parts = _only(self.fitted).parts.items()
        return [
            part.sq_norms({name: gradients[name] for name in names})
            for names, part in parts
            if not any(self.metrics[name].stores_rotated for name in names)
        ]

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


def choose_unrotated(fitted: Fitted, train: Walked, sample: Tensor) -> Unrotated:
    """Which blocks' gradients are stored unrotated: those that have one position in a few training examples, int64 [m],
    and those of estimators without an eigenbasis, with their `Metric.worth`: the mean square of what these solve for.

    Of several ranks the first looks.
    """
    ranks = fitted.setup.ranks
    (found, *_) = ranks.meet("which blocks to rotate", _unrotated(fitted, train, sample) if ranks.rank == 0 else None)
    return found


def _unrotated(fitted: Fitted, train: Walked, sample: Tensor) -> Unrotated:
    curvature, fitted = _only(fitted), by_loss(fitted)
    positions = dict.fromkeys(curvature.by_block, 1)
    squares: dict[str, list[float]] = {}
    with fitted.passes.running(fitted.setup.states[0]):
        for _, n, gradients in fitted.passes.gradients(part_of(train, sample), "index, a few examples"):
            for names, part in curvature.parts.items():
                if all(
                    estimator.eigenbasis() is not None for estimator in (curvature.by_block[name] for name in names)
                ):
                    for name in names:
                        one = gradients[name].rows(0, 1)
                        single = isinstance(one, Dense) and one.inputs.shape[0] == one.positions == 1
                        positions[name] = max(positions[name], 1 if single else 2)
                    continue
                for i in range(n):
                    solved = part.precondition({name: gradients[name].rows(i, i + 1) for name in names})
                    for name, matrix in solved.items():
                        squares.setdefault(name, []).append(float(matrix.double().square().mean()))
            del gradients
    worth = {name: fmean(values) for name, values in squares.items()}
    return {name: worth.get(name) for name in positions if name in worth or positions[name] == 1}


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
