"""What a plan says before the work is what the work then takes."""

import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastif import (
    CG,
    EKFAC,
    KFAC,
    Arnoldi,
    DataInf,
    Diagonal,
    ExactBlock,
    Identity,
    Influence,
    LiSSA,
    RandomProjection,
    build_info,
)
from fastif.curvature.matrix_free.operator import Operator
from fastif.measure import MEMORY_BY, Measure
from fastif.model.capture import Forward


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(500, 64), nn.Linear(64, 3)
        layer = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.head(self.encoder(self.words(x)).mean(1))


def mlp():
    sizes = (nn.Linear(400, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    return nn.Sequential(nn.Flatten(), *sizes), torch.randn(600, 1, 20, 20)


def cnn():
    body = (nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
    return nn.Sequential(*body, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 25, 10)), torch.randn(600, 1, 20, 20)


def transformer():
    return Transformer().eval(), torch.randint(0, 500, (600, 32))


def gpt():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    return transformers.GPT2LMHeadModel(config).eval(), torch.randint(0, 300, (600, 16))


@pytest.mark.skipif(MEMORY_BY != "allocations", reason="memory is counted by fastif._memory")
@pytest.mark.parametrize("batch_size", [64, 256])
@pytest.mark.parametrize(
    "curvature",
    [EKFAC(1e-3, "empirical"), KFAC(1e-3), Diagonal(1e-3, "empirical"), ExactBlock(1e-3)],
    ids=lambda c: type(c).__name__,
)
@pytest.mark.parametrize("make", [mlp, cnn, transformer])
def test_peak_memory_of_fit_is_predicted_within_a_fifth(make, curvature, batch_size):
    torch.manual_seed(0)
    model, x = make()
    data = x, torch.arange(len(x)) % 3
    influence = Influence(model, curvature=curvature, batch_size=batch_size, progress=False)
    plan = influence.plan(data)
    with Measure() as work:
        influence.fit(data)
    assert 1 / 1.2 <= plan.fit_bytes / work.peak_bytes <= 1.2


@pytest.mark.skipif(MEMORY_BY != "allocations", reason="memory is counted by fastif._memory")
@pytest.mark.parametrize("q", [5, 60])
@pytest.mark.parametrize("form", [{}, {"rank": 2}, {"separable": 1e-2}, {"memory": 1 << 22}], ids=str)
@pytest.mark.parametrize("make", [mlp, cnn, gpt])
def test_peak_memory_of_scores_is_predicted_within_a_fifth(make, form, q):
    curvature = EKFAC(1e-3, "empirical", form.get("separable"))
    _check_scores(make, curvature, q, form.get("rank"), memory=form.get("memory", 1 << 27))


@pytest.mark.skipif(MEMORY_BY != "allocations", reason="memory is counted by fastif._memory")
@pytest.mark.parametrize(
    "curvature",
    [KFAC(1e-3), Diagonal(1e-3), ExactBlock(1e-3), DataInf(1e-3), RandomProjection(64), Identity()],
    ids=lambda c: type(c).__name__,
)
def test_peak_memory_of_scores_is_predicted_whatever_the_curvature(curvature):
    layers = "head" if isinstance(curvature, ExactBlock) else None  # it holds the square of what it covers
    _check_scores(transformer, curvature, 50, None, layers=layers)


@pytest.mark.skipif(MEMORY_BY != "allocations", reason="memory is counted by fastif._memory")
def test_peak_memory_of_scores_is_predicted_with_checkpoints():
    _check_scores(cnn, EKFAC(1e-3, "empirical"), 50, None, checkpoints=[cnn()[0].state_dict()] * 2)


def _check_scores(make, curvature, q, rank, **arguments):
    torch.manual_seed(0)
    model, x = make()
    labels = torch.arange(len(x)) % 3
    data, query = (x[:160], labels[:160]), (x[-q:], labels[-q:])
    if make is gpt:
        data, query = ([{"input_ids": part, "labels": part} for part in both[0].split(32)] for both in (data, query))
    settings = {"curvature": curvature, "batch_size": 32, "progress": False, **arguments}
    influence = Influence(model, "causal_lm" if make is gpt else "cross_entropy", **settings)
    plan = influence.plan(data, query, low_rank=rank)
    peaks = []
    for work in (lambda: influence.scores(query, data, low_rank=rank), lambda: influence.self_influence(data)):
        influence.fit(data)  # anew: what the first use makes and keeps is its own
        with Measure() as measured:
            work()
        peaks.append(measured.peak_bytes)
    assert (plan.q, plan.n) == (q, 160)
    assert 1 / 1.2 <= plan.score_bytes / peaks[0] <= 1.2
    assert 1 / 1.2 <= plan.self_bytes / peaks[1] <= 1.2


@pytest.mark.skipif(MEMORY_BY != "allocations", reason="memory is counted by fastif._memory")
@pytest.mark.parametrize(
    "curvature",
    [EKFAC(1e-2, "empirical"), KFAC(1e-2, "empirical"), Diagonal(1e-2, "empirical")],
    ids=lambda c: type(c).__name__,
)
def test_what_is_too_large_to_be_rehearsed_is_computed_within_a_fifth(curvature, monkeypatch):
    monkeypatch.setattr("fastif.influence.rehearsal.REHEARSED", 0)
    torch.manual_seed(0)
    sizes = (nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    data = torch.randn(512, 784), torch.arange(512) % 10
    query = data[0][:20], data[1][:20]
    influence = Influence(nn.Sequential(*sizes), curvature=curvature, progress=False)
    plan = influence.plan(data, query)
    with Measure() as fitting:
        influence.fit(data)
    assert 1 / 1.2 <= plan.fit_bytes / fitting.peak_bytes <= 1.2
    with Measure() as scoring:
        influence.scores(query, data)
    assert 1 / 1.2 <= plan.score_bytes / scoring.peak_bytes <= 1.2


@pytest.mark.skipif(MEMORY_BY != "allocations", reason="memory is counted by fastif._memory")
def test_a_plan_takes_little_of_what_it_warns_of(monkeypatch):
    """The head's block would take an eighth of a terabyte, and a thousand classes a thousand backward passes."""
    data, passes = (torch.randn(64, 512), torch.arange(64)), []
    gradients = Forward.gradients
    monkeypatch.setattr(Forward, "gradients", lambda *given, **named: passes.append(1) or gradients(*given, **named))
    for curvature in (ExactBlock(), EKFAC(1e-3)):
        influence = Influence(nn.Linear(512, 1000), curvature=curvature, progress=False)
        with Measure() as planning:
            plan = influence.plan(data)
        assert planning.peak_bytes <= 64 << 20
        assert plan.layers["model"].shape == (1, 1000, 513)
        assert plan.fit_flops > 64 * 1000 * 513
    assert plan.fit_bytes < 1 << 30
    assert len(passes) <= 30


def test_only_the_first_tiles_are_rehearsed():
    model, x = mlp()
    data = x, torch.arange(len(x)) % 3
    influence = Influence(model, curvature=EKFAC(1e-3, "empirical"), batch_size=8, memory=1 << 17, progress=False)
    seen = []
    with model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0]))):
        influence.plan(data)
        alone = sum(seen)
        influence.plan(data, data)
    numbers = sum(o + d for o, d in ((256, 785), (128, 257), (10, 129)))  # that layers of one position keep of a query
    held = (1 << 17) // (4 * numbers)  # queries at a time: after two such blocks nothing new comes
    assert sum(seen) - 2 * alone <= 3 * held + 5 * 16
    assert influence.n == 0
    with pytest.raises(ValueError, match="not fitted"):
        influence.scores(data, data)


def test_a_plan_with_queries_says_what_it_knows():
    model, x = cnn()
    data = x, torch.arange(len(x)) % 3
    said = str(Influence(model, curvature=EKFAC(1e-3), progress=False).plan(data, (x[:7], data[1][:7])))
    peak = (
        "scores: peak [0-9.]+ MiB in 1 pass over the training data; self-influence: peak [0-9.]+ MiB"
        if build_info()["compiled"]
        else "scores: peak unknown in 1 pass"
    )
    assert re.search(f"\n7 queries; {peak}", said)
    solver = Influence(model, curvature=CG(1e-2), layers="7", progress=False).plan(data, (x[:7], data[1][:7]))
    assert (solver.q, solver.score_bytes, solver.self_bytes) == (7, None, None)
    assert "7 queries; scores: peak unknown; self-influence: peak unknown" in str(solver)
    assert "queries" not in str(Influence(model, progress=False).plan(data))


def test_positions_bytes_and_operations_are_those_of_the_layers():
    model, x = cnn()
    plan = Influence(model, curvature=EKFAC(), layers=["0", "7"], progress=False).plan((x, torch.zeros(600).long()))
    assert {name: (layer.shape, layer.positions) for name, layer in plan.layers.items()} == {
        "0": ((1, 8, 10), 400),
        "7": ((1, 10, 401), 1),
    }
    assert plan.query_bytes == 4 * (80 + 4010)
    assert plan.curvature_bytes == 4 * (8 * 8 + 10 * 10 + 80 + 10 * 10 + 401 * 401 + 4010)
    assert plan.skipped == {"3.weight": "layers= leaves '3' out", "3.bias": "layers= leaves '3' out"}
    assert plan.fit_flops > 600 * 2 * 2 * 401 * 401
    assert "600 training examples" in str(plan)


MULTIPLYING = [
    CG(1e-3, tolerance=0.1, max_steps=10),
    CG(100.0, "hessian", tolerance=1e-6, max_steps=3, keep_graph=True),
    CG(1e-3, tolerance=1e-2, max_steps=3, preconditioner=KFAC(1e-2)),
    LiSSA(1e-3, max_steps=10),
    LiSSA(1e-3, max_steps=10, batch=40, repeats=2),
    LiSSA(1e-3, max_steps=10, scale=1e3, keep_graph=True),
    Arnoldi(4, 1e-2, tolerance=1e-6, max_steps=4),
    Arnoldi(4, 1e-2, tolerance=1e-6, block=2, max_steps=5, keep_graph=True),
]


def small(make, n=60):
    torch.manual_seed(0)
    model, x = make()
    return model, (x[:n], torch.arange(n) % 3)


def somewhere(model):
    return {name: torch.randn_like(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("made", MULTIPLYING, ids=lambda made: type(made).__name__)
@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.filterwarnings("ignore::fastif.NotConverged")
def test_products_take_at_most_the_operations_of_the_plan(make, made, monkeypatch):
    """Those of all Operators, by fit and by the solve of one right-hand side, and not many fewer."""
    model, data = small(make)
    influence = Influence(model, curvature=made, batch_size=30, progress=False)
    plan = influence.plan(data)
    counted = []

    def counting(method):
        def wrapped(*arguments, **options):
            with FlopCounterMode(display=False) as counter:
                found = method(*arguments, **options)
            counted.append(counter.get_total_flops())
            return found

        return wrapped

    monkeypatch.setattr(Operator, "__init__", counting(Operator.__init__))
    monkeypatch.setattr(Operator, "__call__", counting(Operator.__call__))
    influence.fit(data)
    if isinstance(made, CG):
        assert not counted  # a preconditioner takes no products
    else:  # an Operator looks at what one example keeps, once
        assert sum(counted) <= 1.001 * plan.fit_flops <= 1.6 * sum(counted)  # draws with repetition are fewer
    counted.clear()
    influence.solve(somewhere(model))
    assert sum(counted) <= 1.001 * plan.solve_flops <= 1.6 * sum(counted)


@pytest.mark.skipif(MEMORY_BY != "allocations", reason="memory is counted by fastif._memory")
@pytest.mark.parametrize("made", MULTIPLYING, ids=lambda made: type(made).__name__)
@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.filterwarnings("ignore::fastif.NotConverged")
def test_products_take_the_bytes_of_the_plan(make, made):
    model, data = small(make)
    influence = Influence(model, curvature=made, batch_size=30, progress=False)
    plan = influence.plan(data)
    with Measure() as fit_work:
        influence.fit(data)
    with Measure() as work:
        influence.solve(somewhere(model))
    assert 1 / 1.3 <= plan.fit_bytes / fit_work.peak_bytes <= 1.3
    if not isinstance(made, Arnoldi):
        assert 1 / 1.3 <= plan.solve_bytes / work.peak_bytes <= 1.3


def test_the_rows_of_a_hessian_are_counted():
    """A backward pass through the gradient's graph for each parameter; the head alone has a closed form."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 6), nn.Tanh(), nn.Linear(6, 4))
    data = torch.randn(40, 20), torch.arange(40) % 4
    plans = {}
    for matrix in ("ggn", "hessian"):
        for layers in ("0", "2"):
            curvature = ExactBlock(10.0, matrix)
            influence = Influence(model, curvature=curvature, layers=layers, batch_size=20, progress=False)
            plans[matrix, layers] = influence.plan(data)
            with FlopCounterMode(display=False) as counter:
                influence.fit(data)
            if (matrix, layers) == ("hessian", "0"):
                passes = counter.get_total_flops()
    cholesky = 126**3 / 3
    assert 0.9 * passes <= plans["hessian", "0"].fit_flops - cholesky <= 1.3 * passes
    assert plans["hessian", "2"] == plans["ggn", "2"]
    assert not plans["hessian", "0"].multiplying


class Uncertainty(nn.Module):
    """Two heads, and the parameter that weighs them among the outputs."""

    def __init__(self):
        super().__init__()
        self.heads, self.log_variance = nn.Linear(6, 2), nn.Parameter(torch.randn(2))

    def forward(self, x):
        return {"values": self.heads(x), "log variance": self.log_variance}


def weighed(outputs, y):
    squares = (outputs["values"] - y).square() * (-outputs["log variance"]).exp()
    return (squares + outputs["log variance"]).sum(1)


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (Uncertainty, weighed),
        (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 2))), "mse"),
    ],
    ids=["among the outputs", "parametrized"],
)
@pytest.mark.parametrize(
    "curvature", [EKFAC(1e-2, fisher="empirical"), CG(1e-2, matrix="hessian")], ids=["EKFAC", "CG"]
)
def test_a_module_may_give_a_parameter(make, loss, curvature):
    torch.manual_seed(0)
    data = torch.randn(20, 6), torch.randn(20, 2)
    plan = Influence(make(), loss, curvature, progress=False).plan(data)
    assert not plan.skipped
    assert plan.fit_flops + plan.solve_flops > 0


def test_a_plan_takes_up_a_layer_that_is_called_later():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.always, self.sometimes = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            sent = (x > 2).any(1, keepdim=True)
            return self.always(x) + (torch.where(sent, self.sometimes(x), 0.0) if bool(sent.any()) else 0)

    torch.manual_seed(0)
    x = torch.randn(20, 6).clamp(max=2)
    x[11] = 3.0  # of 20 examples, 0, 5, 10, 14 and 19 are looked at
    data = x, torch.arange(20) % 3
    influence = Influence(Expert(), curvature=EKFAC(1e-2), batch_size=20, progress=False)
    plan = influence.plan(data)
    assert set(plan.covered) == {"always.weight", "always.bias", "sometimes.weight", "sometimes.bias"}
    assert set(influence.fit(data).capture.covered) == set(plan.covered)
