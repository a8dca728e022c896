"""What ranks do in tests of owners: each holds its own layers' factors, gradients travel."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from torch import Tensor, nn

from fastif import (
    EKFAC,
    Influence,
)
from fastif import ranks as ranks_module
from fastif.influence.owners import Elsewhere
from fastif.influence.scoring import compute_scores
from fastif.ranks import ALONE, find_ranks
from tests.helpers.by_hand import problem


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
