"""Data and trainings on a part of them, for the tests of evaluations that retrain."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from tests.helpers.problems import clusters

N, QUERIES, PENALTY = 60, 8, 0.05
DRAWN = clusters(N + QUERIES, 0)
BLURRED = DRAWN[0] + torch.randn(N + QUERIES, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
X, Y = BLURRED[:N], DRAWN[1][:N]
QUERY = BLURRED[N:], DRAWN[1][N:]
HOW = dict(progress=False)


def ridge(kept: Tensor, seed: int, x: Tensor, y: Tensor, penalty: float) -> nn.Module:
    """The minimiser of Σ_kept (y − xᵀθ)² + penalty·‖θ‖²."""
    del seed
    model = nn.Linear(x.shape[1], 1, bias=False, dtype=torch.float64)
    x, y = x[kept], y[kept]
    with torch.no_grad():
        model.weight.copy_(torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]).double(), x.T @ y).T)
    return model


def logistic(kept: Tensor, seed: int) -> nn.Module:
    """The optimum of (1/N) Σ_kept ℓ + ½ PENALTY ‖θ‖²: N whatever is kept, as in docs/math.md (3)."""
    del seed
    model = nn.Sequential(nn.Linear(5, 3, dtype=torch.float64))
    parameters = list(model.parameters())
    for parameter in parameters:
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=200, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(X[kept]), Y[kept], reduction="sum") / N
        value = value + PENALTY / 2 * sum(parameter.square().sum() for parameter in parameters)
        value.backward()
        return value

    optimizer.step(objective)
    return model


def few_steps(kept: Tensor, seed: int, x: Tensor, y: Tensor, steps: int = 3) -> nn.Module:
    """A float32 net whose start is drawn from torch's global generator: it differs from seed to seed."""
    del seed
    model = nn.Sequential(nn.Linear(x.shape[1], 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[kept]), y[kept]).backward()
        optimizer.step()
    return model


NET = partial(few_steps, x=X.float(), y=Y)
NET_QUERY = (QUERY[0].float(), QUERY[1])
SETS = [torch.arange(k, N) for k in range(4)]
