"""What ranks, and a process alone, are asked in the tests: module-level functions, which processes can be sent."""

from __future__ import annotations

import copy
import os
import time
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, IterableDataset

from fastif import (
    CG,
    EKFAC,
    KFAC,
    Arnoldi,
    Automatic,
    DataInf,
    Diagonal,
    ExactBlock,
    Identity,
    Influence,
    LiSSA,
    Networks,
    RandomProjection,
    RelativeDamping,
    Shampoo,
    Subset,
)
from fastif import ranks as ranks_module
from fastif.influence import owners, rank_plans, score_job, shared_folder
from fastif.measure import Measure
from fastif.ranks import find_ranks
from tests.helpers.by_hand import problem

ESTIMATORS: dict[str, Any] = {
    "kfac": KFAC(1e-2),
    "kfac monte carlo": KFAC(1e-2, "monte_carlo"),
    "ekfac": EKFAC(1e-2),
    "ekfac separable": EKFAC("auto", separable=1e-2),
    "shampoo": Shampoo(1e-2),
    "diagonal": Diagonal(1e-2, "monte_carlo"),
    "data inf": DataInf(1e-2),
    "exact": ExactBlock(1e-2),
    "exact joint": ExactBlock(1e-2, joint=True),
    "hessian": ExactBlock(1.0, "hessian"),
    "projection": RandomProjection(16, 1e-2),
    "auto": Automatic(1e-2, share=1e-4),
    "cg": CG(3.0, tolerance=1e-10),  # little damping takes many products, of which ranks meet for each
    "cg preconditioned": CG(RelativeDamping(30.0), tolerance=1e-10, preconditioner=KFAC(3.0)),
    "lissa": LiSSA(5.0, tolerance=1e-6),
    "lissa batches": LiSSA(1.0, batch=8, max_steps=5, tolerance=0.9),
    "arnoldi": Arnoldi(6, 1e-2, tolerance=1e-6),
    "identity": Identity(),
    "mixed": {"head": CG(3.0, tolerance=1e-10), "*": EKFAC(1e-2)},
}


def answers(name: str, kind: str = "mlp", batch_size: int = 5, of: Any = None, **options: Any) -> dict[str, Any]:
    """All that an Influence answers, on some of the problem's examples."""
    model, data, _ = problem(kind)
    estimator = ESTIMATORS[name] if of is None else of
    if isinstance(estimator, dict):
        estimator = {"2": estimator["head"], "*": estimator["*"]} if kind == "mlp" else estimator
    influence = Influence(model, curvature=estimator, layers="*", progress=False, batch_size=batch_size, **options)
    influence.fit(data)
    query = data[0][:3], data[1][:3]
    if influence.setup.estimators.needs_data:  # every right-hand side takes many products: few of them
        data = data[0][:7], data[1][:7]
    groups = torch.arange(len(data[1])) % 4
    scores = influence.scores(query, data)
    values, indices = influence.top(query, data, 5)
    worst = influence.top(query, data, 5, largest=False)
    return {
        "scores": scores,
        "layers": torch.stack([*influence.scores(query, data, by="layer").values()]),
        "groups": influence.scores(query, data, groups=groups),
        "query groups": influence.scores(query, data, query_groups=torch.tensor([0, 1, 0])),
        "top": values,
        "indices": indices,
        "worst": worst[0],
        "self": influence.self_influence(data),
        "moved": torch.cat([v.flatten() for v in influence.on_parameters(data).values()]),
        "one moved": torch.cat([v.flatten() for v in influence.on_parameters((data[0][:1], data[1][:1])).values()]),
        "state": [*influence.state_dict().values()] if not isinstance(estimator, dict) else [],
        "traffic": (influence.ranks.bytes_sent, influence.ranks.bytes_received),
    }


def exchanges() -> dict[str, Any]:
    ranks = find_ranks()
    g = torch.Generator().manual_seed(ranks.rank)
    x = torch.randn(1001, generator=g)
    own = {"first": x, ("odd", 1): x[:7].double(), "whole": torch.arange(3) + ranks.rank}
    if ranks.rank == 0:
        del own[("odd", 1)]
    with ranks.together("exchanges"):
        return {
            "x": x,
            "sum": ranks.sum("x", x),
            "each": ranks.sum_each("each", own, {"first": 1}.get, x.device),
            "gathered": ranks.gather("gather", own, x.device),
            "joined": ranks.join("join", None if ranks.rank == 0 else x[: ranks.rank], x.device),
        }


def fit_answers(data: Any, model: nn.Module, estimator: Any, query: Any = None, **options: Any) -> dict[str, Any]:
    """What a fit on some data answers; the estimator's state too."""
    influence = Influence(model, curvature=estimator, layers="*", progress=False, **options).fit(data)
    scores = influence.scores(data if query is None else query, data)
    return {
        "scores": scores,
        "self": influence.self_influence(data),
        "state": [*influence.state_dict().values()],
        "blocks": list(influence.capture.blocks),
    }


def fit_late() -> dict[str, Any]:
    """An expert that is called for the last examples alone: one rank meets it, and all take it up."""
    _model, data, _ = problem("mlp")
    torch.manual_seed(1)
    experts = Experts().double()
    x = torch.cat([data[0][:20], data[0][20:] + 100], 0)
    return fit_answers((x, data[1]), experts, EKFAC(1e-2), (x[:2], data[1][:2]), batch_size=5)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 4)
        self.usual, self.rare = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Any) -> Any:
        h, far = self.body(x / (1 + x.abs())).tanh(), x[:, 0] > 50
        out = torch.zeros(len(x), 3, dtype=x.dtype)
        if bool((~far).any()):
            out = out.index_put((~far,), self.usual(h[~far]))
        if bool(far.any()):
            out = out.index_put((far,), self.rare(h[far]))
        return out


def fit_stream() -> None:
    fit_answers(DataLoader(Stream(), batch_size=5), problem("mlp").model, KFAC(1e-2))


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        x, y = problem("mlp").data
        return iter(zip(x, y, strict=True))


def fit_with(options: dict[str, Any], given: dict[str, Any]) -> Any:
    """A fit where ranks may be given different things: the scale of the weights, of the data, or arguments."""
    model, (x, y), _ = problem("mlp")
    model = copy.deepcopy(model)
    with torch.no_grad():
        next(model.parameters()).mul_(given.get("weights", 1.0))
    x = x.clone()
    x[20] *= given.get("data", 1.0)
    arguments = {key: value for key, value in given.items() if key not in ("weights", "data", "n", "query", "call")}
    n = given.get("n", len(y))
    influence = Influence(model, curvature=EKFAC(**options), layers="*", progress=False, batch_size=5, **arguments)
    influence.fit((x[:n], y[:n]))
    query = x[: given.get("query", 2)], y[: given.get("query", 2)]
    return influence.scores(query, (x, y)) if given.get("call") != "top" else influence.top(query, (x, y), 2)


def check_cuda() -> None:
    find_ranks().check_device(torch.device("cuda", 0))


def leave_out(rank: int) -> None:
    """A call that one rank does not make."""
    if find_ranks().rank != rank:
        fit_with({}, {})


def fit_slowly() -> None:
    model, (x, y), _ = problem("mlp")
    slow = nn.Sequential(Slow(), copy.deepcopy(model))
    Influence(slow, curvature=EKFAC(1e-2), layers="*", progress=False, batch_size=1).fit((x, y))


class Slow(nn.Module):
    def forward(self, x: Any) -> Any:
        time.sleep(0.1)
        return x


def parts_of_data(subset: bool = False, networks: bool = False, checkpoints: bool = False) -> dict[str, Any]:
    """Scores with a weighted subset in an order of its own, of networks trained on halves, or of checkpoints."""
    model, (x, y), _ = problem("mlp")
    g = torch.Generator().manual_seed(3)
    states = [
        {k: v + 0.3 * torch.randn(v.shape, generator=g, dtype=v.dtype) for k, v in model.state_dict().items()}
        for _ in range(2)
    ]
    options: dict[str, Any] = {}
    order = torch.randperm(len(y), generator=g)
    if networks:
        options["networks"] = Networks(states, [order[:12].sort().values, order[12:].sort().values])
    if checkpoints:
        options["checkpoints"] = states
    influence = Influence(
        model, curvature=EKFAC(1e-2, "monte_carlo"), layers="*", progress=False, batch_size=5, **options
    )
    part = Subset(order[:13], torch.rand(13, generator=g, dtype=torch.float64) / 13) if subset else None
    influence.fit((x, y), part)
    query = x[:3], y[:3]
    values, indices = influence.top(query, (x, y), 4)
    scores = influence.scores(query, (x, y))
    return {"scores": scores, "top": values, "indices": indices, "self": influence.self_influence((x, y))}


def job(
    folder: str, state: dict[str, Any] | None, by: str = "all", end_after: int | None = None, **options: Any
) -> Any:
    """A job of scores on disk in small blocks; the last rank ends, as if it were killed, after some blocks."""
    model, (x, y), _ = problem("mlp")
    low_rank, fitted = options.pop("low_rank", None), options.pop("of", EKFAC(1e-2))
    influence = Influence(model, curvature=fitted, layers="*", progress=False, batch_size=3, **options)
    influence = influence.fit((x, y)) if state is None else influence.load_state_dict(state)
    written = []

    def write(scores: Any, *args: Any) -> None:
        if end_after is not None and influence.ranks.rank == influence.ranks.world - 1 and len(written) == end_after:
            os._exit(9)
        written.append(args[:2])
        write_block(scores, *args)

    write_block, before = score_job.write_block, score_job.BLOCK_BYTES
    score_job.write_block, score_job.BLOCK_BYTES = write, 250
    try:
        how: dict[str, Any] = {"low_rank": low_rank} if low_rank else {"by": by}
        found = influence.scores((x[:10], y[:10]), (x, y), out=folder, resume=True, **how)
    finally:
        score_job.write_block, score_job.BLOCK_BYTES = write_block, before
    return found.load(), found.low_rank_error, len(written)


def job_elsewhere(folder: str) -> Any:
    """The same name, of another folder on every rank."""
    here = os.getcwd()
    own = f"{folder}/{find_ranks().rank}"
    os.makedirs(own)
    os.chdir(own)
    shared_folder._SEEN_WITHIN = 0.5
    try:
        return job("job", None)
    finally:
        os.chdir(here)


def planned_and_sent(estimator: Any, width: int = 40, low_rank: int | None = None, **options: Any) -> Any:
    """What a plan for these ranks foretells of this one's traffic, and what a fit and scores come to."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 5))
    data, query = (torch.randn(90, 20), torch.arange(90) % 5), (torch.randn(16, 20), torch.arange(16) % 5)
    influence = Influence(model, curvature=estimator, layers="*", progress=False, batch_size=9, **options)
    ranks = influence.ranks
    plan = influence.plan(data, query, low_rank=low_rank, ranks=ranks.world).ranks[ranks.rank]
    before = ranks.bytes_sent, ranks.bytes_received
    influence.fit(data)
    fitted = ranks.bytes_sent, ranks.bytes_received
    influence.scores(query, data, low_rank=low_rank)
    after = ranks.bytes_sent, ranks.bytes_received
    moved = (fitted[0] - before[0], fitted[1] - before[1], after[0] - fitted[0], after[1] - fitted[1])
    return plan, moved


def planned_and_held(estimator: Any, divide: bool = False) -> tuple[int, int]:
    """The peak of a fit of many like layers that a plan foretells, and the peak itself, with small messages."""
    torch.manual_seed(0)
    layers = [layer for _ in range(16) for layer in (nn.Linear(256, 256, bias=False), nn.Tanh())]
    data = torch.randn(64, 256), torch.arange(64) % 5
    model = nn.Sequential(*layers, nn.Linear(256, 5))
    if divide:
        for layer in model[:-1:2]:
            fully_shard(layer)
        fully_shard(model)
    made = Influence(model, curvature=estimator, layers="*", progress=False, batch_size=8)
    places = ranks_module, owners, rank_plans
    before = ranks_module.BUCKET
    for place in places:
        place.BUCKET = 1 << 19
    try:
        planned = made.plan(data, ranks=made.ranks.world).ranks[made.ranks.rank].fit_bytes
        with Measure(exact=True) as work:
            made.fit(data)
    finally:
        for place in places:
            place.BUCKET = before
    assert planned is not None
    assert work.peak_bytes is not None
    return planned, work.peak_bytes
