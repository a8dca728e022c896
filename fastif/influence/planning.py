"""Plans: what `Influence` will cover, store and compute, known before the work.

One batch goes through the model to learn the positions of each layer, what a batch takes, and what a product with its
curvature takes; the rest of `fit` is arithmetic. Scores are rehearsed: their first tiles are computed by the code that
computes them all, with a curvature that has the sizes of a fitted one and not its values.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastif.curvature.matrix_free.operator import Operator
from fastif.curvature.network import NetworkCurvature, prepare
from fastif.curvature.protocol import STANDING, BlockWork, FitData, FitWork, Products
from fastif.data.batches import Batch, as_loader, batch_length, count, moved_to, picked
from fastif.influence.fitted import Fitted, Setup
from fastif.influence.fitting import observe
from fastif.influence.scoring import compute_self_influence, make_tiles
from fastif.measure import Measure
from fastif.model.calls import dtype_of
from fastif.model.gradients import of_table
from fastif.model.losses import labels_in, output_columns, per_sample
from fastif.samplers.subset import Subset


class LayerPlan(NamedTuple):
    """One block of parameters."""

    shape: tuple[int, int, int]  # g matrices [o, d]
    positions: int  # t
    curvature: str
    bytes: int  # held of its curvature, once fitted


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

    def __str__(self) -> str:
        covered = "\n".join(f"  {name} {list(shape)}" for name, shape in self.covered.items()) or "  none"
        skipped = "\n".join(f"  {name}: {reason}" for name, reason in self.skipped.items()) or "  none"
        size = sum(math.prod(shape) for shape in self.covered.values())
        peak, scores, own = (
            "unknown" if taken is None else f"{taken / 2**20:.1f} MiB"
            for taken in (self.fit_bytes, self.score_bytes, self.self_bytes)
        )
        passes = "passes" if self.score_passes != 1 else "pass"
        over = "" if self.score_passes is None else f" in {self.score_passes:,} {passes} over the training data"
        queries = f"\n{self.q:,} queries; scores: peak {scores}{over}; self-influence: peak {own}" if self.q else ""
        most = "at most " if self.multiplying else ""
        solve = "" if self.solve_bytes is None else f" and {self.solve_bytes / 2**20:.2f} MiB"
        solve = f", solved for with at most {self.solve_flops / 1e9:.1f} GFLOP{solve}" if self.solve_flops else ""
        products = f"; products with the curvature: {', '.join(self.multiplying)}" if self.multiplying else ""
        return (
            f"covered: {size:,} parameters\n{covered}\nskipped (taken as fixed):\n{skipped}\n"
            f"{self.n:,} training examples; fit: {most}{self.fit_flops / 1e9:.1f} GFLOP on all of them, peak {peak}, "
            f"of which {self.curvature_bytes / 2**20:.1f} MiB stay; each query {self.query_bytes / 2**20:.2f} MiB"
            f"{solve}{products}{queries}"
        )


def make_plan(setup: Setup, train: Any, query: Any | None, low_rank: int | None) -> Plan:
    """See `Influence.plan`; the model stands ready with its hooks."""
    passes, n = setup.passes, count(train, setup.passes.batch_size)
    item = dtype_of(setup.model).itemsize
    batch = min(n, getattr(train, "batch_size", None) or passes.batch_size)
    probe = _probe(setup, train, batch)
    held = making = solving = 0
    solve_flops, flops = 0.0, probe.flops * n
    layers: dict[str, LayerPlan] = {}
    for names, part in probe.curvature.parts.items():  # which knows its device
        blocks = {name: probe.blocks[name] for name in names}
        work = FitWork(n, probe.columns[part.fisher], item, all(name in probe.heads for name in names))
        cost, products = part.cost(blocks, work), probe.products[names]
        size = sum(block.size for block in blocks.values())
        held, making = held + cost.held, max(making, cost.making + (products.fit_bytes or 0))
        flops += cost.operations + n * products.fit_flops
        solve_flops += n * products.solve_flops
        if products.solve_flops:
            solving = max(solving, STANDING * size * item + (products.solve_bytes or 0))
        kind = type(part.given).__name__
        for name, block in blocks.items():
            layers[name] = LayerPlan(block.shape, block.positions, kind, cost.held * block.size // size)
    fit_bytes = None
    if probe.peaks is not None:
        first, second = probe.peaks
        streamed = max(first, held + second if second else 0) + batch * probe.input_bytes
        fit_bytes = int(max(streamed, held + making))
    parts = setup.estimators.parts.values()
    multiplying = {type(part.given).__name__ for part in parts if part.products(n) != Products()}
    made = Plan(
        setup.capture.covered,
        dict(setup.capture.skipped),
        layers,
        n,
        held,
        fit_bytes,
        sum(block.size for block in probe.blocks.values()) * item,
        flops,
        tuple(sorted(multiplying)),
        solve_flops,
        None if solve_flops and probe.peaks is None else solving,
    )
    if query is None:
        return made
    q = count(query, passes.batch_size)
    if multiplying:
        return made._replace(q=q)
    scores, own, held = _rehearse(setup, probe.curvature, query, train, n, low_rank)
    scored = q * n * item if setup.device.type == "cpu" else 0
    return made._replace(
        q=q,
        score_bytes=None if scores is None else scores + scored,
        self_bytes=None if own is None else own + n * item,
        score_passes=-(-q // held) * len(setup.states),
    )


def _rehearse(
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
    with Measure(setup.device) as scoring, closing(make_tiles(fitted, query, first, low_rank=low_rank)) as tiles:
        for tile in tiles:
            if tile.query > 0:
                break
            held = len(tile.values[""])
    fitted = stand_in()
    with Measure(setup.device) as own:
        compute_self_influence(fitted, first)
    return scoring.peak_bytes, own.peak_bytes, held


class _First:
    """The first two batches of data, as data: the second comes while something of the first is there."""

    def __init__(self, data: Any, batch_size: int):
        self.data, self.batch_size = data, batch_size

    def __iter__(self) -> Iterator[Batch]:
        yield from islice(as_loader(self.data, self.batch_size), 2)


class _Probe(NamedTuple):
    """A slice of a batch that went through the model forwards and backwards."""

    curvature: NetworkCurvature  # that has observed it
    blocks: dict[str, BlockWork]
    heads: set[str]  # blocks whose outputs are the logits of a softmax
    columns: dict[str, int]  # backward passes by fisher
    peaks: tuple[int, int] | None  # bytes of the first pass, with all that the estimators make of it, and of the second
    flops: float  # per example, of all passes
    input_bytes: float  # per example
    products: dict[tuple[str, ...], _ProductsTaken]


class _ProductsTaken(NamedTuple):
    """What products with the curvature of all examples take."""

    fit_flops: float = 0.0  # per example, of all products of a fit at most
    fit_bytes: int | None = 0  # peak of one; None where nothing counts
    solve_flops: float = 0.0  # of those of a solve for one right-hand side
    solve_bytes: int | None = 0


def _probe(setup: Setup, train: Any, size: int) -> _Probe:
    ((x, y), _) = next(iter(picked(train, size, torch.arange(size))))
    x, y = moved_to(x, setup.device), moved_to(y, setup.device)
    passes, capture = setup.passes, setup.capture
    passes.check(x, y)
    weights = torch.full((size,), 1 / size, dtype=torch.float64, device=setup.device)
    batch, input_bytes = (x, y, weights), _bytes_of(x) / size
    _, x, y = next(passes.slices(x, y))
    n, labels = batch_length(x), labels_in(x, y)
    with FlopCounterMode(display=False) as counter:
        forward = capture.forward(x)
        gradients = forward.gradients(per_sample(passes.loss, forward.outputs, labels, n), keep=True)
    parts = setup.estimators.parts
    columns = {
        fisher: 1
        if fisher == "empirical"
        else sum(1 for _ in output_columns(passes.loss, forward.outputs, labels, n, fisher, Generator()))
        for fisher in {part.fisher for part in parts.values()}
    }
    blocks = {name: BlockWork(capture.blocks[name].shape, g.positions, of_table(g)) for name, g in gradients.items()}
    softmax = passes.loss == "cross_entropy"
    heads = {name for name in blocks if softmax and forward.head(name) is not None}
    del forward, gradients
    curvature = prepare(setup.estimators, capture.blocks, None, setup.memory)
    weights = weights[:n]
    with Measure(setup.device) as observed:
        for _ in range(2):  # from the second batch on, what was learned is there beside what is being learned
            observe(passes, curvature.open(0), x, y, weights, 0, Generator())
    second = copy.deepcopy(curvature.open(1))
    for part in second.parts.values():
        part.stand_in()
    with Measure(setup.device) as turned:
        if second.parts:
            observe(passes, second, x, y, weights, 1, Generator())
    peaks = None
    if observed.peak_bytes is not None and turned.peak_bytes is not None:
        peaks = observed.peak_bytes, turned.peak_bytes
    flops = setup.estimators.passes * counter.get_total_flops() * (1 + 2 * max(columns.values())) / 3 / n
    total = count(train, passes.batch_size)
    products: dict[tuple[str, ...], _ProductsTaken] = {}
    for names, part in parts.items():
        work = FitWork(total, columns[part.fisher], 4, all(name in heads for name in names))
        rows = part.cost({name: blocks[name] for name in names}, work).hessian_rows
        data = _as_whole_data(setup, names, *batch)
        products[names] = _rows_taken(data, rows) if rows else _products_taken(data, part.products(total), total)
    return _Probe(curvature, blocks, heads, columns, peaks, flops, input_bytes, products)


def _rows_taken(data: FitData, rows: int) -> _ProductsTaken:
    """Rows of a Hessian, each a backward pass through the graph of the gradient."""
    operator = Operator(data, "hessian", keep_graph=True)
    return _ProductsTaken(rows * _flops(operator, 1) / len(data.subset.weights))


def _products_taken(data: FitData, products: Products, total: int) -> _ProductsTaken:
    if products == Products():
        return _ProductsTaken()
    n = len(data.subset.weights)
    with FlopCounterMode(display=False) as counter:
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
        with Measure(operator.device) as work:
            if calls:
                operator(_zeros(operator, together))
        found += [flops, None if work.peak_bytes is None else work.peak_bytes + (graph if calls else 0)]
    return _ProductsTaken(*found)


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
    with FlopCounterMode(display=False) as counter:
        operator(_zeros(operator, m))
    return counter.get_total_flops()


def _zeros(operator: Operator, m: int) -> Tensor:
    return torch.zeros(m, operator.layout.size, dtype=operator.dtype, device=operator.device)


def _bytes_of(x: Any) -> int:
    if isinstance(x, Tensor):
        return x.nbytes
    parts = x.values() if isinstance(x, Mapping) else x if isinstance(x, list | tuple) else ()
    return sum(_bytes_of(part) for part in parts)
