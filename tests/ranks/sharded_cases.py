"""What ranks are asked about sharded models and about data that come in parts: functions that processes can be sent."""

from __future__ import annotations

import copy
import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from fastif import EKFAC, Index, Influence, Replay, extract, remove, samplers, sharded
from fastif.influence import score_job
from fastif.influence.owners import Elsewhere
from fastif.ranks import find_ranks
from tests.helpers.by_hand import CLASSES, problem
from tests.ranks.cases import ESTIMATORS


class Blocks(nn.Module):
    """Layers of several kinds, two of them in blocks of their own, and a bare parameter."""

    def __init__(self, bare: bool = True) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(5), requires_grad=bare)
        self.first = nn.Linear(5, 6)
        self.middle = nn.ModuleList(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6, bias=i > 0)) for i in range(2))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x + self.place.tanh())
        for block in self.middle:
            h = h + block(h).tanh()
        return self.head(h)


def network(kind: str = "layers") -> nn.Module:
    """One of `problem`'s, or `Blocks`: "layers" alone, or a "bare" parameter too."""
    if kind not in ("layers", "bare"):
        return copy.deepcopy(problem(kind).model)
    torch.manual_seed(3)
    return Blocks(kind == "bare").double()


def divided(model: nn.Module, whole: bool = True, **how: Any) -> nn.Module:
    """The model as it is on one process, and as its parts where there are several; with whole=False of its blocks."""
    if dist.is_initialized():
        for block in getattr(model, "middle", ()):
            fully_shard(block, **how)
        if whole:
            fully_shard(model, **how)
    return model


def brief_answers(name: str, n: int = 11, q: int = 3, kind: str = "layers") -> dict[str, Any]:
    model, (x, y) = divided(network(kind)), problem("mlp").data
    data, query = (x[:n], y[:n]), (x[:q], y[:q])
    made = Influence(model, curvature=ESTIMATORS[name], progress=False, batch_size=4).fit(data)
    return {
        "scores": made.scores(query, data),
        "self": made.self_influence(data),
        "state": [*made.state_dict().values()],
        "covered": {**made.capture.covered},
    }


def answers(name: str, n: int = 11, q: int = 3, kind: str = "layers", of: Any = None, **options: Any) -> dict[str, Any]:
    """What an Influence of a model, sharded on several ranks, answers on some of the problem's examples."""
    model, (x, y) = divided(network(kind)), problem("mlp" if kind in ("layers", "bare") else kind).data
    data, query = (x[:n], y[:n]), (x[:q], y[:q])
    before = {key: whole(value) for key, value in model.state_dict().items()}
    how: dict[str, Any] = dict(curvature=ESTIMATORS[name] if of is None else of, progress=False, batch_size=4)
    made = Influence(model, **how, **options).fit(data)
    scores = made.scores(query, data)
    values, indices = made.top(query, data, min(n, 5))
    moved = made.on_parameters(data)
    vectors = {key: torch.ones_like(value) for key, value in moved.items()}
    again = Influence(model, **how, **options).load_state_dict(made.state_dict())
    found = {
        "self again": again.self_influence(data),
        "scores": scores,
        "layers": torch.stack([*made.scores(query, data, by="layer").values()]),
        "groups": made.scores(query, data, groups=torch.arange(n) % 3),
        "top": values,
        "indices": indices,
        "self": made.self_influence(data),
        "moved": torch.cat([value.flatten() for value in moved.values()]),
        "solved": torch.cat([value.flatten() for value in made.solve(vectors).values()]),
        "features": extract(model, data, batch_size=4, progress=False).features,
        "state": [*made.state_dict().values()],
        "covered": {**made.capture.covered},
    }
    assert all(torch.equal(whole(value), before[key]) for key, value in model.state_dict().items())
    if dist.is_initialized():
        assert isinstance(model, FSDPModule)
        assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())
        assert all(parameter.grad is None for parameter in model.parameters())
    return found


def whole(value: Any) -> Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()


def moved_state(folder: str, state: Any, checkpoints: bool = False) -> Any:
    """Scores by a state that one process fitted, of checkpoints, and in a folder."""
    model, (x, y) = divided(network()), problem("mlp").data
    options: dict[str, Any] = {"checkpoints": [network().state_dict(), shifted()]} if checkpoints else {}
    made = Influence(model, curvature=EKFAC(1e-2), progress=False, batch_size=4, **options)
    made = made.fit((x, y)) if state is None else made.load_state_dict(state)
    out = made.scores((x[:3], y[:3]), (x, y), out=folder, resume=True).load()
    return out, made.scores((x[:3], y[:3]), (x, y)), made.state_dict()


def shifted() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    return {k: v + 0.3 * torch.randn(v.shape, generator=g, dtype=v.dtype) for k, v in network().state_dict().items()}


def refusals(folder: str) -> dict[str, str]:
    """What is said of what a sharded model cannot do, or a model that is divided in other ways."""
    x, y = problem("mlp").data
    model = divided(network())
    fitted = Influence(model, curvature=EKFAC(1e-2), progress=False).fit((x, y))
    mesh = init_device_mesh("cpu", (find_ranks().world,))
    columns = parallelize_module(network(), mesh, {"first": ColwiseParallel()})
    alone = [dist.new_group([rank]) for rank in range(find_ranks().world)][find_ranks().rank]
    later = network()
    made_before = Influence(later, curvature=EKFAC(1e-2), progress=False)
    divided(later)
    flat = type("FullyShardedDataParallel", (nn.Module,), {})()
    flat.inner = network()
    calls: dict[str, Any] = {
        **{name: partial(Influence, model, curvature=ESTIMATORS[name]) for name in ("cg", "lissa")},
        **{name: partial(Influence, model, curvature=ESTIMATORS[name]) for name in ("arnoldi", "hessian")},
        "sharded later": partial(made_before.fit, (x, y)),
        "plan": partial(fitted.plan, (x, y), ranks=5),
        "copy": partial(copy.deepcopy, fitted),
        "index": partial(Index.build, fitted, (x, y), folder),
        "remove": partial(remove, model, (x, y), [0]),
        "remove all": partial(remove, model, (x, y), [0], layers="all"),
        "replay": partial(Replay, [], model, (x, y)),
        "tensor parallel": partial(Influence, columns, curvature=EKFAC()),
        "FSDP1": partial(Influence, flat, curvature=EKFAC()),
        "group": partial(Influence, model, curvature=EKFAC(), group=alone),
    }
    return {name: said_by(call) for name, call in calls.items()}


def said_by(call: Any) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing"


def failing_loss() -> Any:
    """A loss that cannot be had of the last example, which the last rank has."""
    x, y = problem("mlp").data
    made = Influence(divided(network()), curvature=EKFAC(1e-2), progress=False, batch_size=4)

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        if bool((batch == 9).any()):
            raise ValueError("a loss that fails on one rank")
        return F.cross_entropy(outputs, batch.clamp(max=2), reduction="none")

    made.passes.loss = loss
    return made.fit((x, torch.cat([y[:-1], torch.tensor([9])])))


def failing_layer(name: str) -> Any:
    """A layer that fails on the last rank, at its third call; then, without the failure, the same again."""
    (x, y), ranks, calls = problem("mlp").data, find_ranks(), []
    model = divided(network())
    made = Influence(model, curvature=EKFAC(1e-2), progress=False, batch_size=4).fit((x, y))

    def fail(*_: Any) -> None:
        calls.append(name)
        if len(calls) == 3 and ranks.rank == ranks.world - 1:
            raise RuntimeError("a layer that fails on one rank")

    hook = model.get_submodule(name).register_forward_pre_hook(fail)
    said = []
    for call in (partial(made.scores, (x[:3], y[:3]), (x, y)), partial(extract, model, (x, y), batch_size=2)):
        calls.clear()
        try:
            call()
        except RuntimeError as error:
            said.append(str(error))
    hook.remove()
    return said, made.scores((x[:3], y[:3]), (x, y))


def failing_backward(name: str, kind: str, call_number: int, whole: bool = True) -> Any:
    """A layer that fails on the last rank on the way back; what was said, after how long, and scores of another try."""
    (x, y), ranks, calls = problem("mlp").data, find_ranks(), []
    model = divided(network(kind), whole)
    made = Influence(model, curvature=EKFAC(1e-2), progress=False, batch_size=4).fit((x, y))

    def fail(*_: Any) -> None:
        calls.append(name)
        if len(calls) == call_number and ranks.rank == ranks.world - 1:
            raise RuntimeError("a layer that fails on one rank")

    hook = model.get_submodule(name).register_full_backward_pre_hook(fail)
    begun, said = time.monotonic(), "nothing"
    try:
        made.fit((x, y))
    except RuntimeError as error:
        said = str(error)
    hook.remove()
    return said, time.monotonic() - begun, made.scores((x[:3], y[:3]), (x, y))


def gathered_bytes() -> Any:
    """The most bytes of whole parameters that stand at a time on this rank, and those of all and of the root's own."""
    x, y = problem("mlp").data
    model, most = divided(network()), 0
    made = Influence(model, curvature=EKFAC(1e-2), progress=False, batch_size=4)
    sharding = made.passes.sharding
    assert sharding is not None

    def look(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(whole.untyped_storage().size() for whole in sharding._whole.values()))

    for block in model.get_submodule("middle").children():
        block.register_forward_hook(look)  # behind torch's own, which lets a block's parameters go
        block.register_full_backward_pre_hook(look)
    made.fit((x, y)).scores((x[:3], y[:3]), (x, y))
    sizes = {name: parameter.numel() * parameter.itemsize for name, parameter in model.named_parameters()}
    of_blocks = [sum(size for name, size in sizes.items() if name.startswith(f"middle.{i}")) for i in range(2)]
    return most, sum(sizes.values()), of_blocks


def planned_and_moved(name: str, kind: str = "layers", **how: Any) -> Any:
    """A plan for this rank of a sharded model; what a fit then holds, sends, and receives of torch."""
    x, y = problem("mlp").data
    model, x = (network(kind).float(), x.float()) if how.get("mp_policy") else (network(kind), x)
    made = Influence(divided(model, **how), curvature=ESTIMATORS[name], progress=False, batch_size=4)
    ranks, received = made.ranks, 0
    plan = made.plan((x, y)).ranks[ranks.rank]
    made.fit((x, y))  # the first one looks at the first batch, which takes passes of its own
    calls = [call for call in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, call)]
    of_torch = {call: getattr(dist, call) for call in calls}

    def counted(call: str) -> Any:
        def gather(out: Tensor, part: Tensor, *args: Any, **options: Any) -> Any:
            nonlocal received
            received += out.nbytes - part.nbytes
            return of_torch[call](out, part, *args, **options)

        return gather

    before = ranks.bytes_sent, ranks.bytes_received
    try:
        for call in calls:
            setattr(dist, call, counted(call))
        made.fit((x, y))
    finally:
        for call in calls:
            setattr(dist, call, of_torch[call])
    (curvature,) = made.fitted.curvatures
    here = [part for part in curvature.parts.values() if not isinstance(part, Elsewhere)]
    held = sum(value.nbytes for part in here for value in part.state_dict().values())
    moved = ranks.bytes_sent - before[0], ranks.bytes_received - before[1]
    return plan, held, moved, received


def mixed_precision(kind: str) -> Any:
    x, y = problem("mlp").data
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if kind == "policy" else MixedPrecisionPolicy()
    model = divided(network().float(), mp_policy=policy)
    made = Influence(model, curvature=EKFAC(1e-2), progress=False, batch_size=4).fit((x.float(), y))
    return made.scores((x[:3].float(), y[:3]), (x.float(), y))


def on_mesh(shape: tuple[int, ...]) -> Any:
    """Copies of a model, each held in parts by some ranks."""
    (x, y), ranks = problem("mlp").data, find_ranks()
    model = network()
    if ranks.world > 1:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts")[-len(shape) :])
        fully_shard(model, mesh=mesh)
    made = Influence(model, curvature=EKFAC(1e-2), progress=False, batch_size=4).fit((x, y))
    return made.scores((x[:3], y[:3]), (x, y))


def sampled() -> Any:
    """A subset that a sampler draws by features of a sharded model, head alone."""
    x, y = problem("mlp").data
    made = Influence(divided(network()), progress=False, batch_size=4).fit((x, y), partial(samplers.logit, k=8))
    assert made.subset is not None
    return made.subset.indices, made.scores((x[:2], y[:2]), (x, y))


# ----------------------------------------------------------------------------------------------------- data in parts


class Stream(IterableDataset):
    """Each rank its examples, every second one of two."""

    def __init__(self, n: int, shared: bool = True):
        self.n, self.shared = n, shared

    def __iter__(self) -> Any:
        ranks, (x, y) = find_ranks(), problem("mlp").data
        rows = range(ranks.rank if self.shared else 0, self.n, ranks.world if self.shared else 1)
        return iter([(x[i], y[i]) for i in rows])


def in_parts(kind: str, n: int, world: int) -> Any:
    """Training data as this rank's part; on one process, all of them in the same order and batches."""
    x, y = problem("mlp").data
    rows = [torch.arange(n)[rank::world] for rank in range(world)]
    if not dist.is_initialized():
        return [(x[part], y[part]) for own in rows for part in own.split(4)]
    rank = find_ranks().rank
    if kind == "sampler":
        set_ = TensorDataset(x[:n], y[:n])
        return sharded(DataLoader(set_, batch_size=4, sampler=DistributedSampler(set_, shuffle=False)))
    if kind == "stream":
        return sharded(DataLoader(Stream(n), batch_size=4))
    own = x[rows[rank]], y[rows[rank]]
    return sharded(own if kind == "tensors" else [(x[part], y[part]) for part in rows[rank].split(4)])


def of_parts(kind: str, n: int, world: int, name: str = "ekfac", divide: bool = False, k: int = 4) -> dict[str, Any]:
    train = in_parts(kind, n, world)
    x, y = problem("mlp").data
    query = x[:3], y[:3]
    model = divided(network()) if divide else network()
    made = Influence(model, curvature=ESTIMATORS[name], progress=False, batch_size=4).fit(train)
    values, indices = made.top(query, train, k)
    worth = {} if made.setup.estimators.needs_data else {"self": made.self_influence(train)}
    return {
        **worth,
        "scores": made.scores(query, train),
        "groups": made.scores(query, train, groups=torch.arange(n) % 3),
        "top": values,
        "indices": indices,
        "moved": torch.cat([value.flatten() for value in made.on_parameters(train).values()]),
        "features": extract(model, train, batch_size=4, progress=False).features,
        "labels": extract(model, train, batch_size=4, progress=False).labels,
    }


def job_of_parts(folder: str, n: int, world: int, divide: bool, by: str = "all") -> Any:
    """Scores of parts in a folder, in small blocks; twice, of which the second reads what the first wrote."""
    train, (x, y) = in_parts("stream", n, world), problem("mlp").data
    kind = "layers" if divide else "mlp"
    made = Influence(divided(network()) if divide else network(kind), curvature=EKFAC(1e-2), progress=False)
    made.fit(train)
    before, score_job.BLOCK_BYTES = score_job.BLOCK_BYTES, 250
    try:
        for _ in range(2):
            found = made.scores((x[:3], y[:3]), train, out=folder, resume=True, by=by)
    finally:
        score_job.BLOCK_BYTES = before
    return found.load()


def parts_refused(folder: str) -> dict[str, str]:
    (x, y), ranks = problem("mlp").data, find_ranks()
    set_ = TensorDataset(x[:23], y[:23])

    def loader(of: Any = set_, **how: Any) -> DataLoader:
        return DataLoader(of, batch_size=4, sampler=DistributedSampler(of, **how))

    made = Influence(network(), curvature=EKFAC(1e-2), progress=False, batch_size=4)
    other = Influence(network(), curvature=ESTIMATORS["cg"], progress=False, batch_size=4)
    good, query = in_parts("tensors", 24, ranks.world), (x[:2], y[:2])
    made.fit(good)
    other.fit(good)
    calls: dict[str, Any] = {
        "shuffles": lambda: sharded(loader(shuffle=True)),
        "repeats": lambda: sharded(loader(shuffle=False)),
        "another's": lambda: sharded(loader(shuffle=False, num_replicas=3, rank=0)),
        "unsaid": lambda: made.fit(loader(TensorDataset(x[:24], y[:24]), shuffle=False)),
        "unsaid and shuffled": lambda: made.fit(loader(TensorDataset(x[:24], y[:24]))),
        "stream": lambda: made.fit(DataLoader(Stream(24, shared=False), batch_size=4)),
        "not shared": lambda: made.fit(sharded(DataLoader(Stream(24, shared=False), batch_size=4))),
        "same tensors": lambda: made.fit(sharded((x, y))),
        "empty": lambda: made.fit(sharded((x[:0], y[:0]))),
        "query": lambda: made.scores(good, query),
        "solves": lambda: other.self_influence(good),
        "plan": lambda: made.plan(good),
        "index": lambda: Index.build(made, good, folder),
        "remove": lambda: remove(network(), good, [0]),
    }
    said = {name: said_by(call) for name, call in calls.items()}
    last = sharded(loader(shuffle=False, drop_last=True))
    return {**said, "dropped": str(made.fit(last).n)}
