"""What ranks do in tests of all that is neither a fit nor scores: features, samplers, removals, retrainings."""

from __future__ import annotations

import copy
import os
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from fastif import (
    EKFAC,
    Influence,
    evaluation,
    extract,
    remove,
    samplers,
)
from fastif.ranks import find_ranks
from tests.helpers.by_hand import problem
from tests.helpers.problems import Problem


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
