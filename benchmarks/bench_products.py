"""Products with GGN and Hessian, per second, and what CG and LiSSA take to a residual of 1e-3: CPU time.

Products race against torch.func's jvp of grad (one right-hand side after another, as it is mostly written) and
curvlinops, on the same weighted data, after the same answer has been asserted. Solvers run on subsets of the digits:
their answer is held against the solution with all data, so that time and faithfulness stand side by side.
"""

from __future__ import annotations

import time
import warnings
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp
from torch.nn import functional as F

import fastif
from benchmarks.conftest import DEVICE
from fastif.capture import Capture
from fastif.curvature import FitData
from fastif.curvature.products import Matrix, Operator
from fastif.evaluation.training import train

DAMPING = 1e-2
N = 256


class Problem(NamedTuple):
    model: nn.Module
    x: Tensor
    y: Tensor


@cache
def problem(name: str) -> Problem:
    torch.manual_seed(0)
    y = torch.arange(N, device=DEVICE) % 10
    if name == "mlp":
        sizes = (nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 10))
        return Problem(nn.Sequential(*sizes).to(DEVICE), torch.randn(N, 784, device=DEVICE), y)
    body = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU())
    model = nn.Sequential(*body, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 49, 10)).to(DEVICE)
    return Problem(model, torch.randn(N, 1, 28, 28, device=DEVICE), y)


def fit_data(p: Problem, capture: Capture, batch: int) -> FitData:
    subset = fastif.Subset(torch.arange(N), torch.full((N,), 1 / N, dtype=torch.float64))

    def batches(subset: fastif.Subset):
        for rows in torch.arange(len(subset.indices)).split(batch):
            indices = subset.indices[rows]
            yield p.x[indices], p.y[indices], subset.weights[rows].to(DEVICE)

    return FitData(p.model, "cross_entropy", capture.blocks, subset, batches)


def by_torch(p: Problem, matrix: Matrix, vectors: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """jvp of grad; for the GGN jvp, the loss's own jvp of grad, vjp."""
    parameters = {name: q.detach() for name, q in p.model.named_parameters()}

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(p.model, parameters, (p.x,))

    slope = grad(lambda z: F.cross_entropy(z, p.y))
    if matrix == "hessian":
        gradient = grad(lambda parameters: F.cross_entropy(outputs(parameters), p.y))
        return [jvp(gradient, (parameters,), (v,))[1] for v in vectors]
    found = []
    for v in vectors:
        z, moved = jvp(outputs, (parameters,), (v,))
        back = vjp(outputs, parameters)[1]
        found.append(back(jvp(slope, (z,), (moved,))[1])[0])
    return found


def rows_of(operator: Operator, named: dict[str, nn.Parameter], vectors: list[dict[str, Tensor]]) -> Tensor:
    """Vectors by parameter, flat by block."""
    blocks, rows = operator.data.blocks, []
    for own in vectors:
        values: dict[Tensor, Tensor] = {named[name]: value for name, value in own.items()}
        rows.append(operator.layout.flat({name: block.matrix(values)[None] for name, block in blocks.items()}))
    return torch.cat(rows)


@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.filterwarnings("ignore")
def test_products(name: str, matrix: Matrix, m: int, race) -> None:
    p = problem(name)
    capture, g = Capture(p.model), torch.Generator().manual_seed(0)
    with capture.attached():
        data = fit_data(p, capture, N)
        streamed, kept = Operator(data, matrix), Operator(data, matrix, keep_graph=True)
        named = dict(p.model.named_parameters())
        vectors = [{n: torch.randn(q.shape, generator=g).to(DEVICE) for n, q in named.items()} for _ in range(m)]
        want = by_torch(p, matrix, vectors)
        flat, true = (rows_of(streamed, named, some) for some in (vectors, want))
        for operator in (streamed, kept):
            assert float((operator(flat) - true).norm()) <= 1e-3 * float(true.norm())
        peers = {
            "fastif, graph kept": partial(kept, flat),
            "torch.func, jvp of grad": partial(by_torch, p, matrix, vectors),
        }
        curvlinops = pytest.importorskip("curvlinops")
        kind = curvlinops.GGNLinearOperator if matrix == "ggn" else curvlinops.HessianLinearOperator
        theirs = kind(p.model, nn.CrossEntropyLoss(), list(named.values()), [(p.x, p.y)], check_deterministic=False)
        columns = torch.stack([torch.cat([v.flatten() for v in own.values()]) for own in vectors], 1)
        wanted = torch.stack([torch.cat([own[n].flatten() for n in named]) for own in want], 1)
        assert float((theirs @ columns - wanted).norm()) <= 1e-3 * float(wanted.norm())
        peers["curvlinops"] = lambda: theirs @ columns
        race(partial(streamed, flat), peers, vectors=m, graph_bytes=kept.graph_bytes)


@cache
def digits():
    data = fastif.data.load("digits")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10))
    train(model, data.x_train, data.y_train, epochs=20, lr=0.1, weight_decay=5e-4, progress=False)
    return model, (data.x_train, data.y_train), (data.x_test[:16], data.y_test[:16])


SOLVERS = {
    "CG": fastif.CG(DAMPING, tolerance=1e-3),
    "CG, Diagonal": fastif.CG(DAMPING, tolerance=1e-3, preconditioner=fastif.Diagonal(DAMPING)),
    "CG, EKFAC": fastif.CG(DAMPING, tolerance=1e-3, preconditioner=fastif.EKFAC(DAMPING)),
    "CG, graph kept": fastif.CG(DAMPING, tolerance=1e-3, keep_graph=True),
    "LiSSA": fastif.LiSSA(DAMPING, tolerance=1e-3, steps=20000),
    "LiSSA, graph kept": fastif.LiSSA(DAMPING, tolerance=1e-3, steps=20000, keep_graph=True),
}


def test_solvers(benchmark, capsys) -> None:
    model, data, query = digits()
    features, logits, labels = fastif.extract(model, data, progress=False)
    assert labels is not None
    g = torch.Generator().manual_seed(0)
    k = len(labels) // 10
    subsets = {
        "random": fastif.samplers.random(len(labels), k, generator=g),
        "logit": fastif.samplers.logit(logits, labels, k, generator=g),
        "leverage": fastif.samplers.leverage(features, logits, k, generator=g),
        "all": None,
    }
    exact = fastif.CG(DAMPING, tolerance=1e-5, preconditioner=fastif.EKFAC(DAMPING))
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastif.NotConverged)
        true = fastif.Influence(model, curvature=exact, progress=False).fit(data).scores(query, data)
        lines = []
        for (which, subset), (solver, made) in (
            (a, b) for a in subsets.items() for b in SOLVERS.items() if a[0] != "all" or "CG" in b[0]
        ):
            influence = fastif.Influence(model, curvature=made, progress=False, memory=1 << 30).fit(data, subset)
            start = time.process_time()
            scores = influence.scores(query, data)
            cpu = time.process_time() - start
            found = next(iter(influence.curvature.values()))
            assert found.residual <= 1e-3  # obeyed before it is timed
            error = float((scores - true).norm() / true.norm())
            assert which != "all" or error < 0.02
            lines.append((which, solver, found.steps_taken, cpu, error))
            benchmark.extra_info[f"{which}, {solver}"] = {"steps": found.steps_taken, "cpu": cpu, "error": error}
    benchmark.pedantic(lambda: None, rounds=1)
    with capsys.disabled():
        print(
            f"\nscores of 16 queries with {len(labels)} digits, {sum(q.numel() for q in model.parameters())} parameters"
        )
        print(f"{'subset':>10} {'solver':>18} {'steps':>6} {'CPU s':>7} {'off the full solution':>22}")
        for which, solver, steps, cpu, error in lines:
            print(f"{which:>10} {solver:>18} {steps:>6} {cpu:>7.2f} {error:>22.3f}")
