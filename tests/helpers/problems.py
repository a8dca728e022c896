"""Small trained problems that several tests share."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

WEIGHT_DECAY = 5e-3
REMOVED = torch.tensor([3, 7, 11, 40])  # of `trained` and `small_images`
QUIET = dict(progress=False, weight_decay=WEIGHT_DECAY)


class Problem(NamedTuple):
    model: nn.Sequential
    x: Tensor  # [n, 5]
    y: Tensor  # [n]


def clusters(n: int, seed: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Overlapping Gaussian clusters: no class is separable, so that optima are finite and losses informative."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = torch.randn(classes, 5, generator=g, dtype=torch.float64)
    return centres[y] + torch.randn(n, 5, generator=g, dtype=torch.float64), y


def _descend(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


@cache
def trained(n: int = 90, seed: int = 0) -> Problem:
    """A float64 net whose head is at the optimum of the mean loss + ½ WEIGHT_DECAY ‖θ‖²."""
    torch.manual_seed(seed)
    x, y = clusters(n, seed)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    _descend(model, x, y, 200)
    converge(model[2], model[:2](x).detach(), y)
    return Problem(model, x, y)


def sure(seed: int = 0) -> Problem:
    """A float64 net that is sure of all its training data, four wrong labels too: it knows them by heart."""
    torch.manual_seed(seed)
    x, y = clusters(60, seed)
    y[:4] = (y[:4] + 1) % 3
    model = nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 3)).double()
    _descend(model, x, y, 500)
    return Problem(model, x, y)


@cache
def small_images() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A convolutional net with batch norm (statistics of its own, in eval mode) in float64, partly trained; x and y."""
    torch.manual_seed(1)
    x, y = torch.randn(60, 1, 5, 5, dtype=torch.float64), torch.arange(60) % 3
    x[:, 0, 0, 0] += 2.0 * y  # something to learn
    body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(body, nn.Linear(27, 3)).double()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(30):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


def flat(values: Mapping[str, Tensor]) -> Tensor:
    """Tensors by name as one vector."""
    return torch.cat([value.flatten() for value in values.values()])


def converge(head: nn.Linear, features: Tensor, labels: Tensor, n: int | None = None) -> float:
    """Trains a head to the optimum of (1/n) Σ ℓ + ½ WEIGHT_DECAY ‖θ‖² by L-BFGS in float64; returns the objective."""
    n = len(features) if n is None else n
    parameters = list(head.parameters())
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(head(features), labels, reduction="sum") / n
        value = value + 0.5 * WEIGHT_DECAY * sum(p.square().sum() for p in parameters)
        value.backward()
        return value

    optimizer.step(objective)
    return objective().item()


def head_gradients(problem: Problem) -> Tensor:
    """∇ℓ_i with respect to head weight and bias by autograd, [n, 3, 7], bias last."""
    rows = []
    for x, y in zip(problem.x, problem.y, strict=True):
        head = problem.model[2]
        grads = torch.autograd.grad(cross_entropy(problem.model(x[None]), y[None]), [head.weight, head.bias])
        rows.append(torch.cat([grads[0], grads[1][:, None]], 1))
    return torch.stack(rows)


def symmetric(values, seed=0):
    """A symmetric matrix with these eigenvalues."""
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64))
    return q @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ q.T


def rows(m, size, seed=1):
    return torch.randn(m, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def residuals(a, x, b, damping=0.0):
    """Of x (A + λI) = b, row by row, relative to b."""
    left = b - x @ a - damping * x
    return left.norm(dim=1) / b.norm(dim=1).clamp(min=1e-300)


@cache
def wide() -> tuple[nn.Sequential, tuple[Tensor, Tensor]]:
    """A float64 net whose first layer has 40 inputs, of scales that fall, and 30 outputs, with its data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 4)).double()
    scales = torch.logspace(0, -2, 40, dtype=torch.float64)
    return model, (torch.randn(60, 40, dtype=torch.float64) * scales, torch.arange(60) % 4)
