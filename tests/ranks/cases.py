"""What ranks, and a process alone, are asked in the tests: module-level functions, which processes can be sent."""

from __future__ import annotations

import copy
import os
import pickle
import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
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
    evaluation,
    extract,
    remove,
    samplers,
)
from fastif import ranks as ranks_module
from fastif.influence import owners, rank_plans, score_job, shared_folder
from fastif.influence.owners import Elsewhere
from fastif.influence.scoring import compute_scores
from fastif.measure import Measure
from fastif.ranks import ALONE, find_ranks
from tests.helpers.by_hand import problem
from tests.helpers.problems import Problem

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


def drawn(rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(rank)
    sizes = {"few": 7, "none": 0, "many": 130, "more": 64, "all": 3}
    return {name: (100 * torch.randn(n, generator=draw)).to(dtype) for name, n in sizes.items()}


def summed(dtype: torch.dtype, bucket: int) -> dict[str, Tensor]:
    """Sums over ranks of what each has drawn, so many bytes at a time; "all" is for all ranks, the others for one."""
    ranks, before = find_ranks(), ranks_module.BUCKET
    ranks_module.BUCKET = bucket
    try:
        owners = {"few": 0, "none": 0, "many": 1, "more": 0}
        return ranks.sum_each("sums", drawn(ranks.rank, dtype), owners.get, ranks.device)
    finally:
        ranks_module.BUCKET = before


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


def features(n: int) -> Any:
    model, (x, y), _ = problem("mlp")
    return extract(model, (x[:n], y[:n]), batch_size=5, progress=False)._asdict()


def removal(problem: Problem) -> Any:
    """What is left of the parameters after a removal from the head, and from all layers; with samplers."""
    model, x, y = problem  # one that was trained in one place: the bits of a training need not be another's
    removed = torch.arange(9) * 3
    how: dict[str, Any] = dict(progress=False, weight_decay=5e-3, steps=2)
    sampler = partial(samplers.logit, k=30)
    drawn = torch.Generator().manual_seed(2)
    head = remove(model, (x, y), removed, subset=sampler, generator=drawn, **how)
    every = remove(model, (x, y), removed, layers="all", **how)
    return torch.cat([v.flatten() for one in (head, every) for v in one.state_dict.values()])


def subset_of_sampler() -> Any:
    model, (x, y), _ = problem("mlp")
    influence = Influence(model, curvature=EKFAC(1e-2), layers="*", progress=False, batch_size=5)
    influence.fit((x, y), partial(samplers.logit, k=8))
    assert influence.subset is not None
    return influence.subset.indices, influence.subset.weights


def groups() -> Any:
    """Each rank alone, in a group of its own: no rank waits for another."""
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    model, (x, y), _ = problem("mlp")
    influence = Influence(model, curvature=EKFAC(1e-2), layers="*", progress=False, group=alone)
    if dist.get_rank() == 0:
        influence.fit((x, y), partial(samplers.logit, k=8))
        copied = copy.deepcopy(influence)  # within the same group: of all ranks the other would be waited for
        scores = copied.scores((x[:2], y[:2]), (x, y))
        return scores, copied.ranks.world, torch.equal(scores, influence.scores((x[:2], y[:2]), (x, y)))
    return None


def train(indices: Any, seed: int) -> nn.Module:
    x, y = problem("mlp").data
    model = nn.Linear(5, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[indices]), y[indices]).backward()
        optimizer.step()
    return model


def train_and_end(indices: Any, seed: int) -> nn.Module:
    if find_ranks().rank == 1 and len(indices) == 21:
        os._exit(9)
    return train(indices, seed)


def retrained(folder: str | None, function: Any = train, **how: Any) -> Any:
    x, y = problem("mlp").data
    kept = [torch.arange(24 - i) for i in range(5)]
    out = {} if folder is None else {"out": folder, "resume": True, "key": "training"}
    return evaluation.retrain(function, kept, (x, y), progress=False, **out, **how).values


def halves() -> Any:
    found = evaluation.train_halves(train, 24, pairs=2, progress=False)
    return torch.stack([state["weight"] for state in found.states])


def centres(lengths: Any, start: Any, metric: str = "euclidean", weighted: bool = True) -> Any:
    """Centres of points that stand on the ranks in parts of these lengths."""
    points = torch.randn(sum(lengths), 3, generator=torch.Generator().manual_seed(0)).double()
    ranks = find_ranks()
    own = points.split(lengths)[ranks.rank] if ranks.world > 1 else points
    how: dict[str, Any] = dict(start=start, metric=metric, weighted=weighted)
    return samplers.k_center_of_ranks(own, 6, generator=torch.Generator().manual_seed(1), **how)


def bad_centres(rank: int) -> Any:
    points = torch.randn(5, 3)
    if find_ranks().rank == rank:
        points[2, 1] = float("nan")
    return samplers.k_center_of_ranks(points, 2, start=0)


def wrapped(how: str) -> Any:
    """Scores of a model that torch wrapped for training on several ranks; and of the model."""
    torch.manual_seed(0)
    x, y = torch.randn(21, 4, dtype=torch.float64), torch.arange(21) % 3
    # Buffers, which DistributedDataParallel sends before a pass, and 5 batches, of which no two ranks have as many.
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double().eval()

    def scores(of: nn.Module) -> Any:
        made = Influence(of, curvature=EKFAC(damping=1e-3), batch_size=5, progress=False)
        return made.fit((x, y)).scores((x[:3], y[:3]), (x, y))

    want = scores(model)
    if how == "data parallel":
        made = nn.parallel.DistributedDataParallel(model)
        found = scores(made)
        assert made.forward_sync_buffers
        assert made.require_backward_grad_sync
        return found, want
    return scores(fully_shard(copy.deepcopy(model))), want


def in_train_mode(folder: str) -> dict[str, Any]:
    """A model whose BatchNorm takes its statistics from the batch: an example's gradient depends on its neighbours."""
    torch.manual_seed(0)
    x, y = torch.randn(24, 5, dtype=torch.float64), torch.arange(24) % 3
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    how: dict[str, Any] = dict(allow_train_mode=True, layers=["0", "3"], batch_size=6, progress=False)
    made, query = Influence(model, curvature=EKFAC(1e-2), **how).fit((x, y)), (x[:8], y[:8])
    return {
        "scores": made.scores(query, (x, y)),
        "written": made.scores(query, (x, y), out=folder).load(),
        "query groups": made.scores(query, (x, y), query_groups=torch.arange(8) % 2),
        "low rank": made.scores(query, (x, y), low_rank=1),
        "top": made.top(query, (x, y), 3)[0],
    }


def loads_and_moves(given: dict[str, Any]) -> Any:
    """What a batch moves, by a state that this rank loaded, of a batch that an iterator brings it."""
    model, (x, y), _ = problem("mlp")
    made = Influence(model, curvature=EKFAC(1e-2), layers="*", progress=False).load_state_dict(given["state"])
    first = given["first"]
    moved = made.on_parameters(iter([(x[first : first + 4], y[first : first + 4])]))
    return torch.cat([value.flatten() for value in moved.values()])


def held(estimator: Any, replicate: bool = False) -> tuple[int, int, dict[str, Any]]:
    """Bytes of the curvature that this rank holds, those that a plan foretold, and the damping of every layer."""
    model, data, _ = problem("mlp")
    influence = Influence(model, curvature=estimator, layers="*", progress=False, batch_size=5, replicate=replicate)
    ranks = influence.ranks
    planned = influence.plan(data, ranks=ranks.world).ranks[ranks.rank].curvature_bytes
    influence.fit(data)
    (curvature,) = influence.fitted.curvatures
    here = [part for part in curvature.parts.values() if not isinstance(part, Elsewhere)]
    size = sum(value.nbytes for part in here for value in part.state_dict().values())
    return size, planned, {name: one.damping_used for name, one in influence.curvature.items()}


def keeps_one() -> dict[str, Any]:
    model, data, _ = problem("mlp")
    influence = Influence(model, curvature=EKFAC(1e-2), layers="*", progress=False, batch_size=5).fit(data)
    rank, owners = influence.ranks.rank, influence.fitted.curvatures[0].owners
    (elsewhere,) = (names[0] for names, owner in owners.items() if owner != rank)
    try:
        said = str(influence.curvature[elsewhere].eigenvalues)
    except ValueError as error:
        said = str(error)
    state, of_one = influence.state_dict(), influence.state_dict(rank=1)
    return {
        "rank": rank, "said": said, "state": [*state.values()], "state of one": bool(of_one),
        "state of 1": [*(of_one or state).values()],
    }  # fmt: skip


def copied() -> dict[str, Any]:
    """Scores of a fit, of a copy, of a pickle, and of what a rank can do on its own after `gather`."""
    model, (x, y), _ = problem("mlp")
    influence = Influence(model, curvature=EKFAC(1e-2), layers="*", progress=False, batch_size=5).fit((x, y))
    query = x[:3], y[:3]
    scores, copy_of_it = influence.scores(query, (x, y)), copy.deepcopy(influence)
    again = pickle.loads(pickle.dumps(influence))
    assert torch.equal(again.scores(query, (x, y)), scores)
    found = {"scores": scores, "copied": copy_of_it.scores(query, (x, y))}
    influence.gather()
    alone = influence.fitted._replace(setup=influence.setup._replace(ranks=ALONE))
    whole = all(not isinstance(part, Elsewhere) for part in alone.curvatures[0].parts.values())
    return {**found, "alone": compute_scores(alone, query, (x, y)).values[""], "whole": whole}


def in_turns(estimator: Any, memory: int) -> dict[str, Any]:
    """Answers, and how often the training data went through the model for self-influence and for scores."""
    model, data, _ = problem("words")
    influence = Influence(
        model, curvature=estimator, layers=["words", "first", "second"], progress=False, batch_size=5, memory=memory
    )
    influence.fit(data)
    query, passes = (data[0][:7], data[1][:7]), influence.passes
    seen: list[str | None] = []

    def counted(data: Any, name: str | None, value: Any = "loss") -> Any:
        seen.append(name)
        yield from gradients(data, name, value)

    gradients, passes.gradients = passes.gradients, counted
    found = {
        "self": influence.self_influence(data),
        "scores": influence.scores(query, data),
    }
    own, of_queries = seen.count("self-influence"), sum(str(name).startswith("scores") for name in seen)
    rest = {
        "layers": torch.stack([*influence.scores(query, data, by="layer").values()]),
        "tokens": influence.scores(query, data, by="token"),
        "low rank": influence.scores(query, data, low_rank=2),
        "groups": influence.scores(query, data, query_groups=torch.tensor([0, 1, 0, 2, 2, 1, 0])),
    }
    return {**found, **rest, "passes": own + of_queries, "queries": of_queries}


def owner_fails(op: str) -> Any:
    """The owner of a layer cannot solve."""
    model, data, _ = problem("mlp")
    influence = Influence(model, curvature=EKFAC(1e-2), layers="*", progress=False, batch_size=5).fit(data)
    (curvature,) = influence.fitted.curvatures
    owner = curvature.owners["2",]

    def fail(*args: Any) -> Any:
        raise ArithmeticError(f"layer {'2'!r} does not solve today")

    assert owner == 1
    if influence.ranks.rank == owner:
        part = curvature.parts["2",]
        part.solve = part.precondition = part.state_dict = fail
    query = data[0][:3], data[1][:3]
    return influence.scores(query, data) if op == "scores" else getattr(influence, op)(data)
