"""What other libraries keep of training gradients, and their scores: dattri's LoGra and TRAK, dattri-llm's store.

dattri's keep about as many bytes as they are told to, dattri-llm's keeps gradients whole. dattri-llm 0.1.0 was
installed by `pip install --no-deps --target`, so that torch stayed as it was, into a folder on PYTHONPATH. What is not
installed is left out.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.conftest import DEVICE
from benchmarks.influence.bench_influence import DAMPING, Work, summed
from fastif.index.sampling import compare
from fastif.measure import Measure

QUERIES = (1, 10, 100)
Data = tuple[Tensor, Tensor]


def installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """A result, its processor seconds and its peak MiB."""
    with Measure(DEVICE) as measured:
        start = time.process_time()
        result = work()
        seconds = time.process_time() - start
    return result, seconds, (measured.peak_bytes or 0) / 2**20


def repeated(query: Data, q: int) -> Data:
    """q queries, the same ones again where there are fewer."""
    x, y = (part.repeat(-(-q // len(part)), *[1] * (part.dim() - 1))[:q] for part in query)
    return x, y


def row_of(
    contender: str, work: Work, exact: Tensor, build: Callable[[Data], Any], ask: Callable[[Data], Tensor]
) -> dict[str, Any]:
    """Seconds and MiB of building, seconds of asking, and what the scores [q, n] have of the exact ones."""
    build((work.train[0][: work.batch], work.train[1][: work.batch]))  # warms up
    _, seconds, peak = timed(lambda: build(work.train))
    asked, scores = {}, exact[:0]
    for q in QUERIES:
        query = repeated(work.query, q)
        ask(query)  # warms up: of another number of queries it is not enough
        scores, asked[q], _ = timed(lambda query=query: ask(query))
    scores = scores[: len(exact)] if len(scores) >= len(exact) else ask(work.query)
    assert scores.shape == exact.shape, f"{contender}: scores must be {list(exact.shape)}, got {list(scores.shape)}"
    found = compare(exact, scores)
    return {
        "contender": contender, "build": seconds, "peak_mib": peak, "asked": asked,
        "r": found.r, "rho": found.rho, "top": found.top,
    }  # fmt: skip


def batches(work: Work, data: Data) -> Any:
    return DataLoader(TensorDataset(*data), batch_size=work.batch)


def logra(work: Work, exact: Tensor, each: float, folder: str) -> dict[str, Any]:
    """dattri's LoGra with about `each` bytes: its own curvature of projected gradients, of linear layers."""
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask

    def loss(model: Any, batch: Any, device: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    model = copy.deepcopy(work.model)
    task = AttributionTask(loss_func=loss, model=model, checkpoints=[model.state_dict()])
    side = max(1, math.isqrt(int(each / 4 / len(work.layers))))
    torch.manual_seed(0)
    attributor = LoGraAttributor(task, work.layers, damping=DAMPING, proj_dim=side**2, cache_dir=folder)
    row = row_of(
        "LoGra of dattri, float32",
        work,
        exact,
        lambda train: attributor.cache(batches(work, train)),
        lambda query: attributor.attribute(batches(work, work.train), batches(work, query)).T,
    )
    return {**row, "bytes_each": 4 * side**2 * len(work.layers)}


def trak(work: Work, exact: Tensor, each: float, folder: str) -> dict[str, Any]:
    """dattri's TRAK of one network with about `each` bytes: gradients of the log-odds of all parameters, projected.

    It adds its damping to a sum over n examples of gradients that are divided by the root of their number of entries,
    projected by a matrix whose columns have that number times 1/proj_dim as their squared norms: n/proj_dim times ours
    is the same. `folder` stays empty, as TRAK keeps its gradients in memory.
    """
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask

    model = copy.deepcopy(work.model)
    shape = (-1, *work.train[0].shape[1:])

    def log_p(parameters: Any, batch: Any) -> Tensor:
        return -F.cross_entropy(functional_call(model, parameters, batch[0].reshape(shape)), batch[1].reshape(-1))

    def log_odds(parameters: Any, batch: Any) -> Tensor:
        logp = log_p(parameters, batch)
        return logp - torch.log1p(-torch.exp(logp).clamp(max=1 - 1e-6))

    few = max(1, int(each / 4))
    attributor = TRAKAttributor(
        AttributionTask(loss_func=log_odds, model=model, checkpoints=[model.state_dict()]),
        lambda parameters, batch: torch.exp(log_p(parameters, batch)),
        projector_kwargs={"proj_dim": few, "proj_max_batch_size": 32, "proj_seed": 0},
        regularization=DAMPING * len(work.train[0]) / few,
    )
    row = row_of(
        "TRAK of dattri, float32",
        work,
        exact,
        lambda train: attributor.cache(batches(work, train)),
        lambda query: attributor.attribute(batches(work, query)).detach().T,
    )
    return {**row, "bytes_each": 4 * few}


def stored_pairs(work: Work, exact: Tensor, each: float, folder: str) -> dict[str, Any]:
    """dattri-llm's store, which keeps of each layer its inputs and the gradients of its outputs, whole, whatever `each`
    is; scores are those of its EK-FAC, whose fit reads the store and is part of the building."""
    from dattri_llm import (  # pyright: ignore[reportMissingImports]
        AttributionArguments,
        EKFACAttributor,
        GradientStorageManager,
        HookManager,
        HookManagerConfig,
        OffloadCallback,
    )

    model = copy.deepcopy(work.model)
    attributor = EKFACAttributor(AttributionArguments(output_dir=f"{folder}/scores"))
    config = HookManagerConfig(hook_types=dict.fromkeys(work.layers, "linear_io"))
    store, fisher = f"{folder}/store", f"{folder}/fisher"

    def keep(data: Data, into: Any) -> Any:
        hooks = HookManager(model, config=config, callbacks=[OffloadCallback(1, into)])
        with hooks.collect(deregister_on_exit=True):
            for x, y in batches(work, data):
                model.zero_grad()
                summed(work.loss, model(x), y).backward()
        return into

    def build(train: Data) -> None:
        for part in (store, fisher):
            shutil.rmtree(part, ignore_errors=True)
        keep(train, GradientStorageManager(store))
        attributor.fit(store, fisher)

    def ask(query: Data) -> Tensor:
        asked = keep(query, GradientStorageManager(f"{folder}/query", residency="memory"))
        return attributor.attribute_from_cache(store, asked, damping=DAMPING, fisher_dir=fisher).scores.T

    row = row_of("store of dattri-llm, float32", work, exact, build, ask)
    size = sum(file.stat().st_size for file in Path(store).rglob("*") if file.is_file())
    return {**row, "bytes_each": size / len(work.train[0])}
