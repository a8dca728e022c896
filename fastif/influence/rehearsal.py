"""Rehearsals: what a few examples take on their way through the model and the estimators, for plans.

The first batch goes through the model to learn the positions of each layer, what passes take, and what a product with
its curvature takes. Estimators that are small are shown a slice of it; in the place of those that are large, whose
moments alone would take what a plan is to warn of, stands one that keeps nothing, and what they keep is computed.
Scores are rehearsed where all estimators are small: their first tiles are computed by the code that computes them all,
with a curvature that has the sizes of a fitted one and not its values.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastif.curvature.matrix_free.operator import Operator
from fastif.curvature.network import NetworkCurvature, prepare
from fastif.curvature.protocol import BlockWork, Cost, FitData, FitWork, JointCurvature, Products, Shape
from fastif.data.batch import parts_of
from fastif.data.batches import Batch, Walked, as_loader, batch_length, moved_to, picked
from fastif.influence.fitted import Fitted, Setup
from fastif.influence.fitting import observe
from fastif.influence.scoring import compute_self_influence, make_tiles
from fastif.measure import Measure
from fastif.model.calls import dtype_of
from fastif.model.gradients import of_table
from fastif.model.losses import Fisher, labels_in, output_columns, per_sample, settle_fisher
from fastif.samplers.subset import Subset

REHEARSED = 32 << 20  # bytes of what estimators learn or hold that a rehearsal may allocate, with one copy of it
_HESSIAN_ROWS = 512  # backward passes that a rehearsal makes at most for an estimator
_COLUMNS = 2  # of the curvature: from the second on, what was learned of the first is there, and nothing new comes


class Rehearsal(NamedTuple):
    """What was seen of a few examples; bytes are None where nothing counts allocations."""

    blocks: dict[str, BlockWork]
    costs: dict[tuple[str, ...], Cost]
    works: dict[tuple[str, ...], FitWork]
    fishers: dict[tuple[str, ...], Fisher]  # of which gradients each is made, what "auto" came to
    products: dict[tuple[str, ...], ProductsTaken]
    flops: float  # per example, of all passes through the model
    batch_bytes: int  # of a batch of the data
    first_pass: int | None  # peak of the first pass, with all that the estimators make of it
    second_pass: int | None  # peak of the second, beside what is held; 0 where there is none
    gradients: int | None  # peak of the passes of a slice that bring its gradients
    backward: list[int]  # by pass of a fit, the backward passes of a slice
    curvature: NetworkCurvature | None  # that has observed a slice; None where some estimator is too large for it


class ProductsTaken(NamedTuple):
    """What products with the curvature of all examples take."""

    fit_flops: float = 0.0  # per example, of all products of a fit at most
    fit_bytes: int | None = 0  # peak of one; None where nothing counts
    solve_flops: float = 0.0  # of those of a solve for one right-hand side
    solve_bytes: int | None = 0


class _KeepsNothing(JointCurvature):
    """In the place of an estimator that is too large to be rehearsed: it is shown the same gradients."""

    def __init__(self, passes: int, fisher: Fisher):
        self.passes, self.fisher = passes, fisher

    def begin(self, shapes: Mapping[str, Shape], data: FitData | None) -> None: ...

    def solve(self, rhs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(rhs)

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...

    def cost(self, blocks: Mapping[str, BlockWork], fit: FitWork) -> Cost:
        del blocks, fit
        return Cost()


class _OneModule:
    """In the place of the counter's tracker of modules, which cannot hook a module whose output is a parameter."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self) -> None: ...


def _counter() -> FlopCounterMode:
    """Counts operations, whichever module they are of."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _OneModule()  # pyright: ignore[reportAttributeAccessIssue]
    return counter


def rehearse(setup: Setup, train: Walked, n: int) -> Rehearsal:
    """Sends the first slice of the first batch through the model, and shows it to the estimators."""
    passes, capture = setup.passes, setup.capture
    size = train.lengths[0]
    ((x, y), _) = next(iter(picked(train, size, torch.arange(size))))
    x, y = moved_to(x, setup.device), moved_to(y, setup.device)
    if passes.needs_check(x):
        passes.check(x, y)
    batch = x, y, torch.full((size,), 1 / size, dtype=torch.float64, device=setup.device)
    _, x, y = next(passes.slices(x, y))
    each, labels = batch_length(x), labels_in(x, y)
    with _counter() as counter, Measure(setup.device, exact=True) as passed:
        forward = capture.forward(x)
        gradients = forward.gradients(per_sample(passes.loss, forward.outputs, labels, each), keep=True)
    fishers: dict[tuple[str, ...], Fisher] = {
        names: settle_fisher(part.fisher, passes.loss, forward.outputs, labels, each)
        for names, part in setup.estimators.parts.items()
    }
    columns = {
        fisher: 1
        if fisher == "empirical"
        else sum(1 for _ in output_columns(passes.loss, forward.outputs, labels, each, fisher, Generator()))
        for fisher in {*fishers.values()}
    }
    blocks = {name: BlockWork(capture.blocks[name].shape, g.positions, of_table(g)) for name, g in gradients.items()}
    softmax = passes.loss == "cross_entropy"
    heads = {name for name in blocks if softmax and forward.head(name) is not None}
    del forward, gradients
    item = dtype_of(setup.model).itemsize
    costs: dict[tuple[str, ...], Cost] = {}
    works: dict[tuple[str, ...], FitWork] = {}
    taking: dict[tuple[str, ...], Cost] = {}  # what a rehearsal would
    products: dict[tuple[str, ...], ProductsTaken] = {}
    for names, part in setup.estimators.parts.items():
        work = FitWork(n, columns[fishers[names]], item, all(name in heads for name in names), setup.device)
        works[names] = work
        cost = costs[names] = part.cost({name: blocks[name] for name in names}, work)
        taking[names] = part.cost({name: blocks[name] for name in names}, work._replace(n=2 * each))  # two slices
        data = _as_whole_data(setup, names, *batch)
        rows = cost.hessian_rows
        products[names] = _rows_taken(data, rows) if rows else _products_taken(data, part.products(n), n)
    curvature, first, second, taken = _observe_some(setup, x, y, costs, taking)
    backward = [sum(columns[fisher] for fisher in of_pass) for of_pass in taken]
    flops = setup.estimators.passes * counter.get_total_flops() * (1 + 2 * max(columns.values())) / 3 / each
    batch_bytes = sum(part.nbytes for _, part in parts_of(batch[0]) if isinstance(part, Tensor))
    peaks = first, second, passed.peak_bytes
    return Rehearsal(blocks, costs, works, fishers, products, flops, batch_bytes, *peaks, backward, curvature)


def _observe_some(
    setup: Setup,
    x: Any,
    y: Any,
    costs: Mapping[tuple[str, ...], Cost],
    taking: Mapping[tuple[str, ...], Cost],
) -> tuple[NetworkCurvature | None, int | None, int | None, list[set[Fisher]]]:
    """The estimators after a slice of a batch, if all of them are small; the peaks of both passes over it, and of which
    Fishers gradients are taken in each."""
    small: set[tuple[str, ...]] = set()
    room = REHEARSED
    for names, cost in sorted(taking.items(), key=lambda entry: max(entry[1].learned, entry[1].held)):
        room -= max(cost.learned, cost.held)
        if room >= 0 and cost.hessian_rows <= _HESSIAN_ROWS:
            small.add(names)
    large = [cost for names, cost in costs.items() if names not in small]
    shown = {
        names: part if names in small else _KeepsNothing(max(part.passes, 1), part.fisher)
        for names, part in setup.estimators.parts.items()
    }
    curvature = prepare(NetworkCurvature(shown), setup.capture.blocks, None, setup.memory)
    n = batch_length(x)
    weights = torch.full((n,), 1 / n, dtype=torch.float64, device=setup.device)
    taken = list[set[Fisher]]()
    with Measure(setup.device, exact=True) as observed:
        for _ in range(2):  # from the second batch on, what was learned is there beside what is being learned
            taken = [observe(setup.passes, curvature.open(0), x, y, weights, 0, Generator(), _COLUMNS)]
    again = copy.deepcopy(curvature.open(1))
    for part in again.parts.values():
        part.stand_in()
    with Measure(setup.device, exact=True) as turned:
        if again.parts:
            taken.append(observe(setup.passes, again, x, y, weights, 1, Generator(), _COLUMNS))
    if observed.peak_bytes is None or turned.peak_bytes is None:
        return (None if large else curvature), None, None, taken
    beside = max((cost.observing for cost in large), default=0)
    first = observed.peak_bytes + sum(cost.learned for cost in large) + beside
    second = turned.peak_bytes + beside if again.parts else 0
    return (None if large else curvature), first, second, taken


def rehearse_scores(
    setup: Setup, curvature: NetworkCurvature, query: Any, train: Any, n: int, low_rank: int | None
) -> tuple[int | None, int | None, int]:
    """Peak bytes of the first two blocks of queries times two batches of training examples, and of the latter's
    self-influence: from then on, whatever is held at a time has been held. And how many queries the first block has."""
    for part in curvature.parts.values():
        part.memory = setup.memory
        part.stand_in()
    first = _First(train, setup.passes.batch_size)
    quiet = copy.copy(setup.passes)
    quiet.progress = False
    states = None if setup.checkpoints is None else setup.checkpoints[:1]

    def stand_in() -> Fitted:
        """A copy each time, which keeps what it makes on the way as what is fitted would."""
        return Fitted(setup._replace(passes=quiet, checkpoints=states), (copy.deepcopy(curvature),), n)

    fitted, held = stand_in(), 0
    with (
        Measure(setup.device, exact=True) as scoring,
        closing(make_tiles(fitted, query, first, low_rank=low_rank)) as tiles,
    ):
        for tile in tiles:
            if tile.query > 0:
                break
            held = len(tile.values[""])
    del fitted
    fitted = stand_in()
    with Measure(setup.device, exact=True) as own:
        compute_self_influence(fitted, first)
    return scoring.peak_bytes, own.peak_bytes, held


class _First:
    """The first two batches of data, as data: the second comes while something of the first is there."""

    def __init__(self, data: Any, batch_size: int):
        self.data, self.batch_size = data, batch_size

    def __iter__(self) -> Iterator[Batch]:
        yield from islice(as_loader(self.data, self.batch_size), 2)


def _rows_taken(data: FitData, rows: int) -> ProductsTaken:
    """Rows of a Hessian, each a backward pass through the graph of the gradient."""
    operator = Operator(data, "hessian", keep_graph=True)
    return ProductsTaken(rows * _flops(operator, 1) / len(data.subset.weights))


def _products_taken(data: FitData, products: Products, total: int) -> ProductsTaken:
    if products == Products():
        return ProductsTaken()
    n = len(data.subset.weights)
    with _counter() as counter:
        operator = Operator(data, products.matrix, keep_graph=products.keep_graph)
    made = counter.get_total_flops() / n  # the graph, where it is kept
    graph = 0
    if products.keep_graph:  # holds the parameters once, a gradient of each batch, and what depends on examples
        parameters = sum(parameter.nbytes for parameter in operator.parameters)
        each = max(0, operator.graph_bytes - parameters) // n
        graph = total * each + -(-total // n) * operator.layout.size * operator.dtype.itemsize
    found = []
    for calls, together in ((products.fit, products.together), (products.solve, 1)):
        flops = made + calls * _flops(operator, together) / n if calls else 0.0
        with Measure(operator.device, exact=True) as work:
            if calls:
                operator(_zeros(operator, together))
        found += [flops, None if work.peak_bytes is None else work.peak_bytes + (graph if calls else 0)]
    return ProductsTaken(*found)


def _as_whole_data(setup: Setup, names: tuple[str, ...], x: Any, y: Any, weights: Tensor) -> FitData:
    """The batch as if it were the whole data."""
    blocks = {name: setup.capture.blocks[name] for name in names}
    subset = Subset(torch.arange(len(weights)), weights.cpu())
    passes = setup.passes
    return FitData(
        passes.model, passes.loss, blocks, subset, lambda _: iter([(x, y, weights)]), autocast=passes.autocast
    )


def _flops(operator: Operator, m: int) -> float:
    """Operations of a product with m vectors at once."""
    operator(_zeros(operator, m))  # the first one learns how products can be made
    with _counter() as counter:
        operator(_zeros(operator, m))
    return counter.get_total_flops()


def _zeros(operator: Operator, m: int) -> Tensor:
    return torch.zeros(m, operator.layout.size, dtype=operator.dtype, device=operator.device)
