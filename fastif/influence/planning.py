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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastif.curvature import CG, KFAC, Arnoldi, ExactBlock, LiSSA
from fastif.curvature.matrix_free.operator import Operator
from fastif.curvature.network import Alone, NetworkCurvature, Together
from fastif.curvature.protocol import STANDING, FitData, JointCurvature, Multiplied
from fastif.data.batches import Batch, as_loader, batch_length, count, moved_to, picked
from fastif.influence.fitting import begun, head_of, observe
from fastif.influence.scoring import tiles
from fastif.measure import Measure
from fastif.model.calls import dtype_of
from fastif.model.gradients import of_table
from fastif.model.losses import labels_in, output_columns, per_sample
from fastif.samplers.subset import Subset

if TYPE_CHECKING:
    from fastif.influence.influence import Influence


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


def plan(influence: Influence, train: Any, query: Any | None, rank: int | None) -> Plan:
    """See `Influence.plan`; the model stands ready with its hooks."""
    capture, n = influence.capture, count(train, influence.passes.batch_size)
    item, batch = dtype_of(influence.model).itemsize, getattr(train, "batch_size", None) or influence.passes.batch_size
    batch = min(n, batch)
    probe = _probe(influence, train, batch)
    held = making = solving = 0
    solve_flops = 0.0
    layers: dict[str, LayerPlan] = {}
    flops = probe.flops * n
    for names, part in influence.parts.parts.items():
        shapes = {name: capture.blocks[name].shape for name in names}
        stays, extra = probe.curvature.parts[names].footprint(shapes, probe.tables, item)  # knows its device
        for name, (g, o, d) in shapes.items():  # gradients of all examples that are kept, in their smaller form
            if getattr(influence.parts.by_block[name], "keeps_gradients", False):
                stays += n * item * g * min(o * d, probe.positions[name] * (d + (0 if probe.tables[name] else o)))
        size = sum(math.prod(shape) for shape in shapes.values())
        products = probe.products[names]
        extra += products.fit_bytes or 0
        flops, solve_flops = flops + n * products.fit_flops, solve_flops + n * products.solve_flops
        if products.solve_flops:
            solving = max(solving, STANDING * size * item + (products.solve_bytes or 0))
        held, making = held + stays, max(making, extra)
        for name, (g, o, d) in shapes.items():
            t, kind = probe.positions[name], type(influence.parts.by_block[name]).__name__
            layers[name] = LayerPlan((g, o, d), t, kind, stays * g * o * d // size)
            moments = d * d + o * o + (o * d if part.passes > 1 else 0)
            if not isinstance(influence.parts.by_block[name], ExactBlock):
                flops += n * g * t * min(2, part.passes) * 2 * moments * probe.columns[part.fisher]
                flops += 10 * g * (d**3 + o**3) if isinstance(_of_layers(part), KFAC) else 0
        if isinstance(influence.parts.by_block[names[0]], ExactBlock):
            alone = shapes[names[0]] if len(names) == 1 and probe.positions[names[0]] == 1 else None
            if products.fit_flops:  # rows are derivatives, not made of gradients
                alone, columns = None, 0
            else:
                columns = probe.columns[part.fisher]
            flops += ExactBlock.operations(size, n, columns, alone)
    fit_bytes = None
    if probe.peaks is not None:
        first, second = probe.peaks
        streamed = max(first, held + second if second else 0) + batch * probe.input_bytes
        fit_bytes = int(max(streamed, held + making))
    query_bytes = sum(block.size for block in capture.blocks.values()) * item
    multiplying = sorted({type(p).__name__ for p in influence.parts.parts.values() if p.multiplied(n) != Multiplied()})
    made = Plan(
        capture.covered,
        dict(capture.skipped),
        layers,
        n,
        held,
        fit_bytes,
        query_bytes,
        flops,
        tuple(multiplying),
        solve_flops,
        None if solve_flops and probe.peaks is None else solving,
    )
    if query is None:
        return made
    q = count(query, influence.passes.batch_size)
    if multiplying:
        return made._replace(q=q)
    scores, own, held = _rehearsed(influence, probe.curvature, query, train, n, rank)
    scored = q * n * item if influence.device.type == "cpu" else 0
    return made._replace(
        q=q,
        score_bytes=None if scores is None else scores + scored,
        self_bytes=None if own is None else own + n * item,
        score_passes=-(-q // held) * len(influence.checkpoints or [None]),
    )


def _rehearsed(
    influence: Influence, curvature: NetworkCurvature, query: Any, train: Any, n: int, rank: int | None
) -> tuple[int | None, int | None, int]:
    """Peak bytes of the first two blocks of queries times two batches of training examples, and of the latter's
    self-influence: from then on, whatever is held at a time has been held. And how many queries the first block has."""
    for part in curvature.parts.values():
        part.memory = influence.memory
        part.stand_in()
    first = _First(train, influence.passes.batch_size)

    def fitted() -> Influence:
        """The same with the stand-in, which keeps what it makes on the way as what is fitted would."""
        made = copy.copy(influence)
        made.passes = copy.copy(influence.passes)
        made.passes.progress = False
        made.checkpoints = None if influence.checkpoints is None else influence.checkpoints[:1]
        made._fitted, made.n = [copy.deepcopy(curvature)], n
        return made

    one, held = fitted(), 0
    with Measure(influence.device) as scoring, closing(tiles(one, query, first, rank=rank)) as made:
        for tile in made:
            if tile.query > 0:
                break
            held = len(tile.values[""])
    one = fitted()
    with Measure(influence.device) as own:
        one.self_influence(first)
    return scoring.peak_bytes, own.peak_bytes, held


class _First:
    """The first two batches of data, as data: the second comes while something of the first is there."""

    def __init__(self, data: Any, batch_size: int):
        self.data, self.batch_size = data, batch_size

    def __iter__(self) -> Iterator[Batch]:
        yield from islice(as_loader(self.data, self.batch_size), 2)


def _of_layers(part: JointCurvature) -> Any:
    """What learns from the gradients of single layers in it: their estimator, or CG's preconditioner."""
    return part.estimator if isinstance(part, Alone) else part.preconditioner if isinstance(part, CG) else None


class _Probe(NamedTuple):
    """A slice of a batch that went through the model forwards and backwards."""

    curvature: NetworkCurvature  # that has observed it
    positions: dict[str, int]
    tables: dict[str, bool]  # blocks whose rows are looked up
    columns: dict[str, int]  # backward passes by fisher
    peaks: tuple[int, int] | None  # bytes of the first pass, with all that the estimators make of it, and of the second
    flops: float  # per example, of all passes
    input_bytes: float  # per example
    products: dict[tuple[str, ...], _Products]


class _Products(NamedTuple):
    """Products with the curvature of all examples."""

    fit_flops: float = 0.0  # per example, of all products of a fit at most
    fit_bytes: int | None = 0  # peak of one; None where nothing counts
    solve_flops: float = 0.0  # of those of a solve for one right-hand side
    solve_bytes: int | None = 0


def _probe(influence: Influence, train: Any, size: int) -> _Probe:
    ((x, y), _) = next(iter(picked(train, size, torch.arange(size))))
    x, y = moved_to(x, influence.device), moved_to(y, influence.device)
    influence.passes.check(x, y)
    weights = torch.full((size,), 1 / size, dtype=torch.float64, device=influence.device)
    batch, input_bytes = (x, y, weights), _bytes_of(x) / size
    _, x, y = next(influence.passes.slices(x, y))
    n, labels = batch_length(x), labels_in(x, y)
    with FlopCounterMode(display=False) as counter:
        forward = influence.capture.forward(x)
        gradients = forward.gradients(per_sample(influence.passes.loss, forward.outputs, labels, n), keep=True)
    parts = influence.parts.parts.values()
    columns = {
        fisher: 1
        if fisher == "empirical"
        else sum(1 for _ in output_columns(influence.passes.loss, forward.outputs, labels, n, fisher, Generator()))
        for fisher in {part.fisher for part in parts}
    }
    passes = influence.parts.passes
    positions = {name: g.positions for name, g in gradients.items()}
    tables = {name: of_table(g) for name, g in gradients.items()}
    by_rows = {
        names
        for names, part in influence.parts.parts.items()
        if _is_hessian(part) and head_of(influence.passes, forward, names, part) is None
    }
    del forward, gradients
    curvature = begun(influence.parts, influence.capture, None)
    weights = weights[:n]
    with Measure(influence.device) as observed:
        for _ in range(2):  # from the second batch on, what was learned is there beside what is being learned
            observe(influence.passes, curvature.open(0), x, y, weights, 0, Generator())
    second = copy.deepcopy(curvature.open(1))
    for part in second.parts.values():
        part.stand_in()
    with Measure(influence.device) as turned:
        if second.parts:
            observe(influence.passes, second, x, y, weights, 1, Generator())
    peaks = None
    if observed.peak_bytes is not None and turned.peak_bytes is not None:
        peaks = observed.peak_bytes, turned.peak_bytes
    flops = passes * counter.get_total_flops() * (1 + 2 * max(columns.values())) / 3 / n
    total = count(train, influence.passes.batch_size)
    products = {
        names: _rows_of(influence, names, *batch)
        if names in by_rows
        else _products_of(influence, names, part, *batch, total)
        for names, part in influence.parts.parts.items()
    }
    return _Probe(curvature, positions, tables, columns, peaks, flops, input_bytes, products)


def _is_hessian(part: JointCurvature) -> bool:
    return isinstance(part, Alone | Together) and getattr(part.estimator, "matrix", None) == "hessian"


def _rows_of(influence: Influence, names: tuple[str, ...], x: Any, y: Any, weights: Tensor) -> _Products:
    """An ExactBlock of the Hessian: each of its rows is a backward pass through the graph of the gradient."""
    operator = Operator(_data(influence, names, x, y, weights), "hessian", keep_graph=True)
    return _Products(operator.layout.size * _flops(operator, 1) / len(weights))


def _products_of(
    influence: Influence, names: tuple[str, ...], part: JointCurvature, x: Any, y: Any, weights: Tensor, total: int
) -> _Products:
    if not isinstance(part, CG | LiSSA | Arnoldi):
        return _Products()
    times = part.multiplied(total)
    n = len(weights)
    with FlopCounterMode(display=False) as counter:
        operator = Operator(_data(influence, names, x, y, weights), part.matrix, keep_graph=part.keep_graph)
    made = counter.get_total_flops() / n  # the graph, where it is kept
    graph = 0
    if part.keep_graph:  # holds the parameters once, a gradient of each batch, and what depends on examples
        parameters = sum(parameter.nbytes for parameter in operator.parameters)
        each = max(0, operator.graph_bytes - parameters) // n
        graph = total * each + -(-total // n) * operator.layout.size * operator.dtype.itemsize
    found = []
    for calls, together in ((times.fit, times.together), (times.solve, 1)):
        flops = made + calls * _flops(operator, together) / n if calls else 0.0
        with Measure(influence.device) as work:
            if calls:
                operator(_zeros(operator, together))
        found += [flops, None if work.peak_bytes is None else work.peak_bytes + (graph if calls else 0)]
    return _Products(*found)


def _data(influence: Influence, names: tuple[str, ...], x: Any, y: Any, weights: Tensor) -> FitData:
    """The batch as if it were the whole data."""
    blocks = {name: influence.capture.blocks[name] for name in names}
    subset = Subset(torch.arange(len(weights)), weights.cpu())
    passes = influence.passes
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
