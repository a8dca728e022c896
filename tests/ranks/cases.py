"""What ranks, and a process alone, are asked in the tests: module-level functions, which processes can be sent."""

from __future__ import annotations

from typing import Any

import torch

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
    RandomProjection,
    RelativeDamping,
    Shampoo,
)
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
    "cg": CG(0.3, tolerance=1e-10),
    "cg preconditioned": CG(RelativeDamping(3.0), tolerance=1e-10, preconditioner=KFAC(0.3)),
    "lissa": LiSSA(1.0, tolerance=1e-6),
    "lissa batches": LiSSA(1.0, batch=8, max_steps=5, tolerance=0.9),
    "arnoldi": Arnoldi(6, 1e-2, tolerance=1e-6),
    "identity": Identity(),
    "mixed": {"head": CG(0.3, tolerance=1e-10), "*": EKFAC(1e-2)},
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
        data = data[0][:11], data[1][:11]
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

