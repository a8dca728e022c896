"""Plans: what `Influence` will cover, store and compute, known before the work.

Two small batches go through the model to learn the positions of each layer and what an example costs; all else is
arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Generator
from torch.utils.flop_counter import FlopCounterMode

from fastif.capture import dtype_of
from fastif.data import batch_length, count, picked
from fastif.features import moved_to
from fastif.gradients import OneHot
from fastif.losses import output_columns, per_sample
from fastif.measure import Measure

if TYPE_CHECKING:
    from fastif.influence import Influence

_PROBES = (4, 8)  # examples


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
    fit_flops: float  # of fit on all examples

    def __str__(self) -> str:
        covered = "\n".join(f"  {name} {list(shape)}" for name, shape in self.covered.items()) or "  none"
        skipped = "\n".join(f"  {name}: {reason}" for name, reason in self.skipped.items()) or "  none"
        size = sum(math.prod(shape) for shape in self.covered.values())
        peak = "unknown" if self.fit_bytes is None else f"{self.fit_bytes / 2**20:.1f} MiB"
        return (
            f"covered: {size:,} parameters\n{covered}\nskipped (taken as fixed):\n{skipped}\n"
            f"{self.n:,} training examples; fit: {self.fit_flops / 1e9:.1f} GFLOP on all of them, peak {peak}, "
            f"of which {self.curvature_bytes / 2**20:.1f} MiB stay; each query {self.query_bytes / 2**20:.2f} MiB"
        )


def plan(influence: Influence, train: Any) -> Plan:
    """See `Influence.plan`; the model stands ready with its hooks."""
    capture, n = influence.capture, count(train, influence.batch_size)
    item, batch = dtype_of(influence.model).itemsize, min(n, influence.batch_size)
    probes = [_probe(influence, train, min(size, n)) for size in _PROBES]
    first, second = probes
    positions, columns = second.positions, second.columns
    held = making = widest = 0
    layers: dict[str, LayerPlan] = {}
    flops = second.flops * n
    for name, block in capture.blocks.items():
        estimator, (g, o, d), t = influence._estimators[name], block.shape, positions[name]
        stays, extra = estimator.footprint(block.shape, second.tables[name], item)
        layers[name] = LayerPlan(block.shape, t, type(estimator).__name__, stays)
        held, making = held + stays, max(making, extra)
        widest = max(widest, batch * g * t * (d + o) * item)  # what an estimator makes of a batch, a block at a time
        turns = min(2, estimator.passes)
        flops += n * g * t * turns * 2 * (d * d + o * o + (o * d if turns == 2 else 0)) * columns[estimator.fisher]
        flops += 10 * g * (d**3 + o**3) if extra else 0
    fit_bytes = None
    if first.peak is not None and second.peak is not None:
        size = second.n - first.n
        each = (second.peak - first.peak) / size if size else second.peak / second.n
        streamed = second.peak + each * (batch - second.n) + widest
        fit_bytes = int(held + max(making, streamed))
    query_bytes = sum(block.size for block in capture.blocks.values()) * item
    return Plan(capture.covered, dict(capture.skipped), layers, n, held, fit_bytes, query_bytes, flops)


class _Probe(NamedTuple):
    """A small batch that went through the model forwards and backwards."""

    n: int
    positions: dict[str, int]
    tables: dict[str, bool]  # blocks whose rows are looked up
    columns: dict[str, int]  # backward passes by fisher
    peak: int | None  # bytes
    flops: float  # per example, of all passes


def _probe(influence: Influence, train: Any, size: int) -> _Probe:
    ((x, y), _) = next(iter(picked(train, size, torch.arange(size))))
    x, y = moved_to(x, influence.device), moved_to(y, influence.device)
    n, labels = batch_length(x), x if y is None and isinstance(x, Mapping) else y
    with Measure(influence.device) as work, FlopCounterMode(display=False) as counter:
        forward = influence.capture.forward(x)
        gradients = forward.gradients(per_sample(influence.loss, forward.outputs, labels, n), keep=True)
    fishers = {estimator.fisher for estimator in influence._estimators.values()}
    columns = {
        fisher: 1
        if fisher == "empirical"
        else sum(1 for _ in output_columns(influence.loss, forward.outputs, labels, n, fisher, Generator()))
        for fisher in fishers
    }
    passes = max(estimator.passes for estimator in influence._estimators.values())
    return _Probe(
        n,
        {name: g.positions for name, g in gradients.items()},
        {name: isinstance(g, OneHot) for name, g in gradients.items()},
        columns,
        work.peak_bytes,
        passes * counter.get_total_flops() * (1 + 2 * max(columns.values())) / 3 / n,
    )
