"""Products with GGN and Hessian, per second, and what CG and LiSSA take to a residual of 1e-3: CPU time.

Products race against torch.func's jvp of grad (one right-hand side after another, as it is mostly written) and
curvlinops, on the same weighted data, after the same answer has been asserted. Solvers run on subsets of the digits:
their answer is held against the solution with all data, so that time and faithfulness stand side by side. With
FASTIF_DATA, a folder with Fashion-MNIST, the same for a CNN and subsets of three sizes: OMP_NUM_THREADS=1
pytest benchmarks/influence/bench_products.py -k shares --benchmark-enable -s --benchmark-json runs/solvers.json
"""

from __future__ import annotations

import os
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
from fastif.curvature import FitData, JointCurvature
from fastif.curvature.matrix_free.operator import Matrix, Operator
from fastif.evaluation.training import train
from fastif.model.capture import Capture

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


def fit_data(p: Problem, capture: Capture, batch: int, subset: fastif.Subset | None = None) -> FitData:
    n = len(p.y)
    subset = fastif.Subset(torch.arange(n), torch.full((n,), 1 / n, dtype=torch.float64)) if subset is None else subset

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
        facts = {"network": name, "parameters": streamed.layout.size, "matrix": matrix, "examples": N}
        race(partial(streamed, flat), peers, rounds=5, vectors=m, graph_bytes=kept.graph_bytes, **facts)


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
    "LiSSA": fastif.LiSSA(DAMPING, tolerance=1e-3, max_steps=20000),
    "LiSSA, graph kept": fastif.LiSSA(DAMPING, tolerance=1e-3, max_steps=20000, keep_graph=True),
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


# -------------------------------------------------------------------------------------- shares of Fashion-MNIST, a CNN

EXAMPLES, QUERIES, DRAWS = 1000, 2, 3
SHARES = (0.01, 0.05, 0.2)
TOLERANCE, STEPS, STRONGER = 1e-3, 5000, 0.5  # STRONGER: damping, LiSSA's steps are in proportion to its inverse
ESTIMATORS = {
    "CG": partial(fastif.CG, STRONGER, tolerance=TOLERANCE, max_steps=STEPS),
    "LiSSA": partial(fastif.LiSSA, STRONGER, tolerance=TOLERANCE, max_steps=STEPS),
}


@cache
def fashion() -> tuple[Problem, tuple[Tensor, Tensor]]:
    """A trained CNN with its training examples, and the queries."""
    data = fastif.data.load("fashion-mnist", os.environ["FASTIF_DATA"])
    draw = torch.Generator().manual_seed(0)
    some = torch.randperm(len(data.y_train), generator=draw)[:EXAMPLES]
    torch.manual_seed(0)
    body = (nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2), nn.ReLU())
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(256, 10))
    x, y = data.x_train[some], data.y_train[some]
    train(model, x, y, epochs=20, lr=0.05, weight_decay=1e-3, progress=False)
    return Problem(model.to(DEVICE).eval(), x.to(DEVICE), y.to(DEVICE)), (data.x_test[:QUERIES], data.y_test[:QUERIES])


@pytest.mark.skipif("FASTIF_DATA" not in os.environ, reason="FASTIF_DATA names no folder with data sets")
def test_solvers_with_shares_of_the_data(benchmark, capsys, monkeypatch) -> None:
    """Seconds and products to a residual of TOLERANCE for the gradients of a few queries, with subsets and all data."""
    p, (query_x, query_y) = fashion()
    features, logits, labels = fastif.extract(p.model, (p.x, p.y), progress=False)
    assert labels is not None
    samplers = {
        "random": lambda k, g: fastif.samplers.random(EXAMPLES, k, generator=g),
        "logit": lambda k, g: fastif.samplers.logit(logits, labels, k, generator=g),
        "leverage": lambda k, g: fastif.samplers.leverage(features, logits, k, generator=g),
    }
    named, capture = dict(p.model.named_parameters()), Capture(p.model)
    product, products = Operator.__call__, []

    def counting(operator: Operator, *arguments, **options) -> Tensor:
        products.append(operator)
        return product(operator, *arguments, **options)

    monkeypatch.setattr(Operator, "__call__", counting)
    rows = []
    with capture.attached(), warnings.catch_warnings():
        warnings.simplefilter("ignore", fastif.NotConverged)  # the residual is told
        whole = Operator(fit_data(p, capture, 250))
        losses = F.cross_entropy(p.model(query_x.to(DEVICE)), query_y.to(DEVICE), reduction="none")
        gradients = [torch.autograd.grad(loss, list(named.values()), retain_graph=True) for loss in losses]
        rhs = rows_of(whole, named, [dict(zip(named, own, strict=True)) for own in gradients])
        shapes = whole.layout.shapes

        def solved(made: JointCurvature, subset: fastif.Subset | None) -> tuple[Tensor, float, int]:
            products.clear()
            start = time.process_time()
            made.begin(shapes, fit_data(p, capture, 250, subset))
            made.end(0)
            x = whole.layout.flat(made.solve(whole.layout.by_block(rhs)))
            return x, time.process_time() - start, len(products)

        def residual(x: Tensor, subset: fastif.Subset | None) -> float:
            left = rhs - product(whole, x, subset) - STRONGER * x
            return float((left.norm(dim=1) / rhs.norm(dim=1)).max())

        true, seconds, made = solved(fastif.CG(STRONGER, tolerance=1e-5), None)
        assert residual(true, None) <= 1.1e-5  # verified before anything is timed
        x, seconds, made = solved(ESTIMATORS["CG"](), None)
        own = dict(cpu=seconds, products=made, residual=residual(x, None), error=float((x - true).norm() / true.norm()))
        rows.append(dict(estimator="CG", sampler="all", share=1.0, draws=1, **own))
        for share in SHARES:
            for sampler, pick in samplers.items():
                for estimator, make in ESTIMATORS.items():
                    found = []
                    for seed in range(DRAWS if estimator == "CG" else 1):
                        g = torch.Generator().manual_seed(seed)
                        subset = fastif.Subset(*pick(round(share * EXAMPLES), g)[:2])
                        x, seconds, made = solved(make(), subset)
                        left, error = residual(x, subset), float((x - true).norm() / true.norm())
                        assert left <= 1.05 * TOLERANCE or estimator == "LiSSA"
                        found.append((seconds, made, left, error))
                    own = dict(
                        zip(("cpu", "products", "residual", "error"), torch.tensor(found).mean(0).tolist(), strict=True)
                    )
                    rows.append(dict(estimator=estimator, sampler=sampler, share=share, draws=len(found), **own))
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(
        rows=rows,
        parameters=whole.layout.size,
        examples=EXAMPLES,
        queries=QUERIES,
        damping=STRONGER,
        tolerance=TOLERANCE,
        steps=STEPS,
    )
    with capsys.disabled():
        for row in rows:
            print("\n" + ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{v}" for k, v in row.items()), end="")
