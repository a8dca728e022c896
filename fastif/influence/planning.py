"""Plans: what `Influence` will cover, store and compute, known before the work.

A plan is a sum over the estimators, each of which says what it costs, and over what a rehearsal with a few examples
found the passes through the model to take.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

from fastif.curvature.protocol import STANDING, BlockWork, Cost, Products
from fastif.data.batches import Walked, walked
from fastif.influence.fitted import Setup
from fastif.influence.queries import MADE, query_bytes_of
from fastif.influence.rank_plans import Asked, PartWork, RankPlan, plan_ranks
from fastif.influence.rehearsal import Rehearsal, rehearse, rehearse_scores
from fastif.measure import in_mib
from fastif.model.calls import dtype_of
from fastif.model.losses import Fisher
from fastif.ranks import ALONE, stretch

_ALIKE = 4  # parameters skipped for one reason that are listed one by one


class LayerPlan(NamedTuple):
    """One block of parameters."""

    shape: tuple[int, int, int]  # g matrices [o, d]
    positions: int  # t
    curvature: str
    bytes: int  # held of its curvature, once fitted
    fisher: Fisher | None = None  # of which gradients its curvature is made; None where it is made of none


class Plan(NamedTuple):
    """What `fit` and `scores` will do; memory is that of tensors beside model and data."""

    covered: dict[str, tuple[int, ...]]  # parameters that influence is computed for
    skipped: dict[str, str]  # parameters that it is not computed for, taken as fixed, and why
    layers: dict[str, LayerPlan]
    n: int  # training examples
    curvature_bytes: int  # held after fit
    fit_bytes: int | None  # peak of fit; None where nothing counts allocations (plain torch on the CPU)
    query_bytes: int  # of one preconditioned query gradient
    fit_flops: float  # of fit on all examples; at most so many where estimators multiply with the curvature
    multiplying: tuple[str, ...] = ()  # those that do, until it suffices
    solve_flops: float = 0.0  # at most, of the products that a query takes; 0 where a fit leaves nothing to multiply
    solve_bytes: int | None = 0  # peak of these for one query, its vectors and kept graphs included; None as above
    q: int = 0  # queries, where they were given; these two are peaks, and None as for fit and where products are made:
    score_bytes: int | None = None  # of scores, [q, n] itself included where it is on the device
    self_bytes: int | None = None  # of self_influence
    score_passes: int | None = None  # of scores over the training data; None where products are made
    ranks: tuple[RankPlan, ...] = ()  # by rank, where plans for several were asked for

    def __repr__(self) -> str:
        size = sum(math.prod(shape) for shape in self.covered.values())
        peak = in_mib(self.fit_bytes)
        return (
            f"Plan({size:,} parameters in {len(self.layers)} blocks, {len(self.skipped)} parameters skipped, "
            f"n={self.n:,}, fit: {self.fit_flops / 1e9:.1f} GFLOP, peak {peak}; print it for all)"
        )

    def __str__(self) -> str:
        covered = "\n".join(f"  {name} {list(shape)}" for name, shape in self.covered.items()) or "  none"
        skipped = "\n".join(f"  {line}" for line in _by_reason(self.skipped)) or "  none"
        size = sum(math.prod(shape) for shape in self.covered.values())
        peak, scores, own = map(in_mib, (self.fit_bytes, self.score_bytes, self.self_bytes))
        passes = "passes" if self.score_passes != 1 else "pass"
        over = "" if self.score_passes is None else f" in {self.score_passes:,} {passes} over the training data"
        queries = f"\n{self.q:,} queries; scores: peak {scores}{over}; self-influence: peak {own}" if self.q else ""
        most = "at most " if self.multiplying else ""
        solve = "" if self.solve_bytes is None else f" and {in_mib(self.solve_bytes, 2)}"
        solve = f", solved for with at most {self.solve_flops / 1e9:.1f} GFLOP{solve}" if self.solve_flops else ""
        products = f"; products with the curvature: {', '.join(self.multiplying)}" if self.multiplying else ""
        kinds = Counter((layer.curvature, layer.fisher) for layer in self.layers.values())
        made = ", ".join(
            f"{kind} of {number:,} block{'s' * (number > 1)}" + (f" (fisher={fisher!r})" if fisher else "")
            for (kind, fisher), number in kinds.items()
        )
        return (
            f"covered: {size:,} parameters\n{covered}\nskipped (taken as fixed):\n{skipped}\ncurvature: {made}\n"
            f"{self.n:,} training examples; fit: {most}{self.fit_flops / 1e9:.1f} GFLOP on all of them, peak {peak}, "
            f"of which {in_mib(self.curvature_bytes)} stay; each query {in_mib(self.query_bytes, 2)}"
            f"{solve}{products}{queries}" + "".join(f"\nrank {rank}: {one}" for rank, one in enumerate(self.ranks))
        )


def _by_reason(skipped: dict[str, str]) -> Iterator[str]:
    """A line for each parameter; of many with one reason, such as all that stand still under adapters, the first."""
    names: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        names.setdefault(reason, []).append(name)
    for reason, alike in names.items():
        shown = alike if len(alike) <= _ALIKE + 1 else alike[:_ALIKE]
        yield from (f"{name}: {reason}" for name in shown)
        if len(shown) < len(alike):
            yield f"and {len(alike) - len(shown):,} more: {reason}"


def make_plan(setup: Setup, train: Walked, query: Any | None, low_rank: int | None, ranks: int | None = None) -> Plan:
    """See `Influence.plan`; the model stands ready with its hooks."""
    setup = setup._replace(ranks=ALONE)  # a rank may plan on its own, if it holds the whole model
    made, seen = _make_plan(setup, train, query, low_rank)
    if ranks is None:
        return made
    states, item = len(setup.states), dtype_of(setup.model).itemsize

    def kept(name: str) -> int:
        """Bytes of a query's preconditioned gradient, as ranks send it."""
        g, o, d = seen.blocks[name].shape
        return item * (g * o * d if low_rank is None else g * min(low_rank, o, d) * (o + d))

    def arriving(block: BlockWork) -> int:
        """Bytes of a query's gradient in its smaller form."""
        (g, o, d), t = block.shape, block.positions
        return min(item * block.size, t * (item * d + 8) if block.table else g * t * item * (o + d))

    works = {
        names: PartWork(
            names,
            seen.costs[names],
            part.products(made.n),
            part.exchanged({name: seen.blocks[name] for name in names}, seen.works[names]),
            sum(seen.blocks[name].size for name in names) * item,
            sum(arriving(seen.blocks[name]) for name in names),
            sum(kept(name) for name in names),
            seen.products[names].fit_bytes or 0,
        )
        for names, part in setup.estimators.parts.items()
    }
    own = sum(cost.operations for cost in seen.costs.values())
    passes, streamed = max(1, setup.estimators.passes), _streamed(seen)
    flops, memory, replicate = made.fit_flops / states - own, setup.memory, setup.replicate
    model = _received_of_model(setup, train, seen, ranks)
    asked = Asked(ranks, passes, states, flops, streamed, made.q, item, memory, replicate, model)
    return made._replace(ranks=tuple(plan_ranks(train, works, asked)))


def _received_of_model(setup: Setup, train: Walked, seen: Rehearsal, world: int) -> int:
    """Bytes of a sharded model that a fit brings every rank: all of them make each pass of any."""
    passes = setup.passes
    if passes.sharding is None:
        return 0
    loose = any(block.loose for block in setup.capture.blocks.values())
    of_ranks: list[list[int]] = []
    for rank in range(world):
        mine = stretch(len(train.lengths), rank, world)
        of_ranks.append([])
        for length in train.lengths[mine.start : mine.stop]:
            each = passes.at_a_time(length)
            of_ranks[-1] += [min(each, length - begin) for begin in range(0, length, each)]
    slices = [max(together) for together in zip_longest(*of_ranks, fillvalue=0)]
    each_of = [1 + (n if loose else 0) for n in slices]  # a bare parameter takes a backward pass per example, too
    return passes.sharding.received(backward * times for backward in seen.backward for times in each_of)


def _streamed(seen: Rehearsal) -> int | None:
    """Peak bytes of the passes of a fit, in which all that the estimators learn is there; None where nothing counts."""
    if seen.first_pass is None:
        return None
    held = sum(cost.held for cost in seen.costs.values())
    return max(seen.first_pass, held + seen.second_pass if seen.second_pass else 0) + seen.batch_bytes


def _make_plan(setup: Setup, train: Walked, query: Any | None, low_rank: int | None) -> tuple[Plan, Rehearsal]:
    passes, n = setup.passes, train.n
    item = dtype_of(setup.model).itemsize
    seen = rehearse(setup, train, n)
    states = len(setup.states)
    seen_of_all = states if setup.kept is None else sum(map(len, setup.kept)) / n  # times that a fit walks through them
    total, making, solving = Cost(), 0, 0
    solve_flops, flops = 0.0, seen.flops * n
    layers: dict[str, LayerPlan] = {}
    for names, part in setup.estimators.parts.items():
        cost, products = seen.costs[names], seen.products[names]
        blocks = {name: seen.blocks[name] for name in names}
        size = sum(block.size for block in blocks.values())
        total, making = total + cost, max(making, cost.making + (products.fit_bytes or 0))
        flops += cost.operations + n * products.fit_flops
        solve_flops += n * products.solve_flops
        if products.solve_flops:
            solving = max(solving, STANDING * size * item + (products.solve_bytes or 0))
        kind, fisher = type(part.given).__name__, seen.fishers[names] if part.passes else None
        for name, block in blocks.items():
            held = states * cost.held * block.size // size
            layers[name] = LayerPlan(block.shape, block.positions, kind, held, fisher)
    fit_bytes = None
    streamed = _streamed(seen)
    if streamed is not None:
        fit_bytes = int(max(streamed, total.held + making)) + (states - 1) * total.held
    parts = setup.estimators.parts.values()
    multiplying = {type(part.given).__name__ for part in parts if part.products(n) != Products()}
    made = Plan(
        setup.capture.covered,
        dict(setup.capture.skipped),
        layers,
        n,
        states * total.held,
        fit_bytes,
        sum(block.size for block in seen.blocks.values()) * item,
        flops * seen_of_all,
        tuple(sorted(multiplying)),
        solve_flops * states,
        None if solve_flops and seen.first_pass is None else solving,
    )
    if query is None:
        return made, seen
    query = walked(query, passes.batch_size)
    q = query.n
    if multiplying:
        return made._replace(q=q), seen
    if seen.curvature is not None:
        scores, own, held = rehearse_scores(setup, seen.curvature, query, train, n, low_rank)
    else:
        scores, own, held = _computed_scores(setup, seen, total, query, q, low_rank)
    scored = q * n * item if setup.device.type == "cpu" else 0
    if setup.kept is not None:  # one network's, the same at one scale, and the sum
        scored *= 3
    made = made._replace(
        q=q,
        score_bytes=None if scores is None else scores + scored,
        self_bytes=None if own is None else own + n * item,
        score_passes=-(-q // held) * states,
    )
    return made, seen


def _computed_scores(
    setup: Setup, seen: Rehearsal, total: Cost, query: Any, q: int, low_rank: int | None
) -> tuple[int | None, int | None, int]:
    """Peak bytes of scores and of self-influence, and queries of the first block, by arithmetic: where the curvature is
    too large to stand in for."""
    whole = sum(block.size for block in seen.blocks.values()) * dtype_of(setup.model).itemsize
    factored = {name for name, estimator in setup.estimators.by_block.items() if estimator.keeps_query_factors}
    each = query_bytes_of(setup, query, factored, low_rank)
    held = max(1, min(q, setup.memory // each))
    if seen.gradients is None:
        return None, None, held
    kept = held * each
    if kept + held * whole <= setup.memory:  # factors become matrices where these find room beside them
        kept += held * whole
    largest = max(block.size for block in seen.blocks.values()) * dtype_of(setup.model).itemsize
    made = max(1, min(held, min(setup.memory // 4, MADE) // whole))
    making = made * (whole + 2 * largest) if each == whole or low_rank is not None else made * each
    passing = 2 * seen.gradients  # the gradients of a slice, and what becomes of them
    beside = min(total.beside, 4 * made * largest)  # a few queries at a time
    return (
        total.solving + kept + max(making + beside, passing),
        total.solving + max(total.beside, passing),
        held,
    )
