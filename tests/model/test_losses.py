import math

import pytest
import torch
from torch import Generator, nn
from torch.nn import functional as F

from fastif import EKFAC, KFAC, Diagonal, Influence
from fastif.model.losses import measured, output_columns, per_sample, squared_outputs

N = 6


def draws(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def labels(*shape, c=4, seed=4):
    return torch.randint(0, c, shape, generator=torch.Generator().manual_seed(seed))


class Answer:
    """What transformers return."""

    def __init__(self, logits):
        self.logits = logits


def huber(outputs, batch):
    return F.huber_loss(outputs, batch, reduction="none", delta=100.0).sum(1)


def log_cosh(outputs, batch):
    return (outputs - batch).cosh().log().sum(1) + 0.1 * outputs.sum(1).square()


def ignoring(y):
    y = y.clone()
    y[0, 1] = y[3, 2] = -100
    return y


LM = ignoring(labels(N, 5))
CASES = {  # loss, outputs, batch, what torch says of example i
    "cross_entropy": ("cross_entropy", draws(N, 4), labels(N), lambda o, y: F.cross_entropy(o[None], y[None])),
    "cross_entropy of positions": (
        "cross_entropy",
        draws(N, 4, 2, 3),
        labels(N, 2, 3),
        lambda o, y: F.cross_entropy(o[None], y[None], reduction="sum"),
    ),
    "causal_lm": (
        "causal_lm",
        Answer(draws(N, 5, 4)),
        {"labels": LM},
        lambda o, y: F.cross_entropy(o[:-1], y[1:], reduction="sum"),
    ),
    "causal_lm of two words": (
        "causal_lm",
        {"logits": draws(N, 2, 4)},
        {"labels": labels(N, 2)},
        lambda o, y: F.cross_entropy(o[:-1], y[1:], reduction="sum"),
    ),
    "bce": ("bce", draws(N, 3), labels(N, 3, c=2), lambda o, y: _bce(o, y)),
    "bce of one output": ("bce", draws(N, 1), labels(N, c=2), lambda o, y: _bce(o, y.view(1))),
    "mse": ("mse", draws(N, 3), draws(N, 3) + 1, lambda o, y: F.mse_loss(o, y, reduction="sum")),
    "mse of one output": ("mse", draws(N), draws(N) + 1, lambda o, y: F.mse_loss(o, y)),
    "function": (log_cosh, draws(N, 3), draws(N, 3) + 1, lambda o, y: log_cosh(o[None], y[None])[0]),
}


def _bce(o, y):
    return F.binary_cross_entropy_with_logits(o, y.double(), reduction="sum")


def logits_of(outputs):
    if isinstance(outputs, dict):
        return outputs["logits"]
    return getattr(outputs, "logits", outputs)


def labels_of(batch):
    return batch["labels"] if isinstance(batch, dict) else batch


@pytest.mark.parametrize("name", list(CASES))
def test_losses_are_torchs(name):
    loss, outputs, batch, torchs = CASES[name]
    got = per_sample(loss, outputs, batch, N)
    want = torch.stack([torchs(o, y) for o, y in zip(logits_of(outputs), labels_of(batch), strict=True)])
    assert got.shape == (N,)
    assert torch.allclose(got, want, rtol=1e-12)


def example_hessian(torchs, o, y):
    flat = o.flatten()
    return torch.autograd.functional.hessian(lambda v: torchs(v.view(o.shape), y), flat)


def flat_columns(name, fisher, generator=None, times=1):
    """The columns [s, times * n, m] with respect to the outputs themselves, every example so many times."""
    loss, outputs, batch, _ = CASES[name]
    logits, y = (z.repeat(times, *[1] * (z.dim() - 1)) for z in (logits_of(outputs), labels_of(batch)))
    logits.requires_grad_()
    wrapped = logits if isinstance(outputs, torch.Tensor) else Answer(logits)
    found = []
    for scores, column in output_columns(loss, wrapped, y, times * N, fisher, generator):
        assert not column.requires_grad
        (u,) = torch.autograd.grad(scores, logits, column, retain_graph=True)
        found.append(u.reshape(times * N, -1))
    return torch.stack(found)


ONE_POSITION = [name for name in CASES if name not in ("cross_entropy of positions", "causal_lm")]


@pytest.mark.parametrize("name", ONE_POSITION)
def test_exact_columns_are_a_root_of_the_output_hessian(name):
    columns = flat_columns(name, "exact")
    _, outputs, batch, torchs = CASES[name]
    for i, (o, y) in enumerate(zip(logits_of(outputs), labels_of(batch), strict=True)):
        want = example_hessian(torchs, o, y)
        got = torch.einsum("sp,sq->pq", columns[:, i], columns[:, i])
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-12), i


@pytest.mark.parametrize("name", list(CASES))
def test_monte_carlo_columns_are_so_on_average(name):
    times = 1000
    (columns,) = flat_columns(name, "monte_carlo", torch.Generator().manual_seed(0), times)
    columns = columns.view(times, N, -1)
    _, outputs, batch, torchs = CASES[name]
    wants = [example_hessian(torchs, o, y) for o, y in zip(logits_of(outputs), labels_of(batch), strict=True)]
    products = columns[:, :, :, None] * columns[:, :, None, :]
    error = products.mean(0) - torch.stack(wants)
    spread = products.std(0) / math.sqrt(times)  # the mean square of an unbiased error is this one's
    assert (error.flatten(1).norm(dim=1) <= 4 * spread.flatten(1).norm(dim=1) + 1e-9).all()


@pytest.mark.parametrize("name", list(CASES))
def test_draws_do_not_depend_on_the_batch_size(name):
    loss, outputs, batch, _ = CASES[name]

    def columns(rows):
        logits, y = logits_of(outputs)[rows], labels_of(batch)[rows]
        ((_, column),) = output_columns(loss, logits, y, len(logits), "monte_carlo", generator)
        return column

    generator = torch.Generator().manual_seed(0)
    whole = columns(slice(0, N))
    generator.manual_seed(0)
    parts = torch.cat([columns(slice(0, 1)), columns(slice(1, 3)), columns(slice(3, N))])
    assert torch.allclose(parts, whole, rtol=1e-12)


def _features(m):
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, m)).double()


@pytest.mark.parametrize("name", ["bce", "mse", "mse of one output", "function"])
@pytest.mark.parametrize("fisher", ["exact", "monte_carlo", "empirical"])
def test_influence_under_other_losses(name, fisher):
    """The head's diagonal of the curvature, and scores, by autograd."""
    loss, outputs, y, torchs = CASES[name]
    torch.manual_seed(0)
    model, x = _features(outputs.shape[1] if outputs.dim() > 1 else 1), draws(N, 5)
    y = y.view(N, -1) if name == "mse of one output" else y
    data = x, y
    influence = Influence(model, loss, Diagonal(1e-2, fisher), layers="2", progress=False).fit(data)
    head = model[2]
    features = torch.cat([model[:2](x), torch.ones(N, 1)], 1).detach()
    rows = []
    for o, target in zip(model(x), y, strict=True):
        grads = torch.autograd.grad(torchs(o, target), [head.weight, head.bias], retain_graph=True)
        rows.append(torch.cat([grads[0], grads[1][:, None]], 1))
    gradients = torch.stack(rows)
    got = influence.curvature["2"].diagonal[0]
    if fisher == "exact":
        hessians = torch.stack([example_hessian(torchs, o, t) for o, t in zip(model(x).detach(), y, strict=True)])
        want = torch.einsum("nop,nd->opd", hessians, features.square()).diagonal().mT / N
        assert torch.allclose(got, want, rtol=1e-9)
    elif fisher == "empirical":
        assert torch.allclose(got, gradients.square().mean(0), rtol=1e-9)
    want = torch.einsum("qod,nod,od->qn", gradients, gradients, 1 / (got + 1e-2)) / N
    assert torch.allclose(influence.scores(data, data), want, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_monte_carlo_does_not_depend_on_the_batch_size(loss):
    torch.manual_seed(0)
    model, x, y = _features(2), draws(20, 5), labels(20, 2, c=2)
    fits = [
        Influence(model, loss, EKFAC(1e-2, "monte_carlo"), batch_size=b, progress=False).fit((x, y)) for b in (20, 7, 1)
    ]
    scores = [influence.scores((x, y), (x, y)) for influence in fits]
    assert torch.allclose(scores[1], scores[0], rtol=1e-8, atol=1e-13)
    assert torch.allclose(scores[2], scores[0], rtol=1e-8, atol=1e-13)


# --------------------------------------------------------------------------------------------------------- measurements


def own_minus_largest_other(o, y):
    return o[y] - torch.stack([o[k] for k in range(len(o)) if k != y]).max()


def log_odds(o, y):
    p = o.softmax(0)[y]
    return (p / (1 - p)).log()


def entropy(outputs, _batch):
    return -(outputs.softmax(1) * outputs.log_softmax(1)).sum(1)


MEASUREMENTS = {
    "loss": lambda o, y: F.cross_entropy(o[None], y[None]),
    "margin": own_minus_largest_other,
    "log_odds": log_odds,
    entropy: lambda o, y: entropy(o[None], y)[0],
}


@pytest.mark.parametrize("measurement", list(MEASUREMENTS))
def test_measurements_and_their_scores_are_by_autograd(measurement):
    torch.manual_seed(0)
    model, x, y = _features(4), draws(N, 5), labels(N)
    data = x, y
    assert torch.allclose(
        measured(measurement, "cross_entropy", model(x), y, N),
        torch.stack([MEASUREMENTS[measurement](o, t) for o, t in zip(model(x), y, strict=True)]),
        rtol=1e-11,
    )
    influence = Influence(model, curvature=KFAC(1e-2), measurement=measurement, layers="*", progress=False).fit(data)

    def gradients(what):
        return [torch.autograd.grad(what(model(x[i]), y[i]), list(model.parameters())) for i in range(N)]

    want = torch.zeros(N, N, dtype=torch.float64)
    asked, losses = gradients(MEASUREMENTS[measurement]), gradients(MEASUREMENTS["loss"])
    for key, number in (("0", 0), ("2", 2)):
        q, t = (
            torch.stack([torch.cat([g[number], g[number + 1][:, None]], 1) for g in rows]) for rows in (asked, losses)
        )
        solved = influence.curvature[key].solve(q[:, None])[:, 0]
        want += torch.einsum("qod,nod->qn", solved, t) / N
    assert torch.allclose(influence.scores(data, data), want, rtol=1e-9, atol=1e-14)


def test_extreme_log_odds_are_finite():
    logits = torch.tensor([[800.0, -800.0, 0.0], [0.0, 40.0, 0.0]], dtype=torch.float64)
    got = measured("log_odds", "cross_entropy", logits, torch.tensor([0, 1]), 2)
    assert got[0] == 800
    assert got[1] == pytest.approx(40 - math.log(2))


@pytest.mark.parametrize("fisher", ["exact", "monte_carlo"])
def test_a_function_of_single_outputs_has_a_root_without_a_decomposition(fisher, monkeypatch):
    torch.manual_seed(0)
    outputs, slopes = torch.randn(4, 3, dtype=torch.float64), torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64)
    monkeypatch.setattr(torch.linalg, "eigh", lambda _: pytest.fail("a diagonal Hessian was decomposed"))
    found = output_columns(
        lambda z, _: 0.5 * (slopes * z.square()).sum(1), outputs, None, 4, fisher, torch.Generator().manual_seed(0)
    )
    columns = torch.stack([column for _, column in found], 2)  # [n, 3, columns]
    if fisher == "exact":
        assert torch.allclose(columns @ columns.mT, torch.diag(slopes).expand(4, 3, 3))
    else:
        assert torch.allclose(columns[..., 0].square(), slopes.expand(4, 3))


# ------------------------------------------------------------------------------------------------------------- refusals


def concave(outputs, _batch):
    return -outputs.square().sum(1)


def columns(loss, outputs, batch, fisher="exact"):
    return list(output_columns(loss, outputs, batch, N, fisher, None))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: per_sample(lambda o, y: F.cross_entropy(o, y), draws(N, 4), labels(N), N),
            r'shape \[n=6\], got \[\]; a mean or a sum will not do: use reduction="none"',
        ),
        (lambda: per_sample(lambda o, y: o, draws(N, 4), None, N), r"shape \[n=6\], got \[6, 4\]"),
        (lambda: per_sample(lambda o, y: 3.0, draws(N, 4), None, N), "got float"),
        (lambda: per_sample("cross_entropy", draws(N, 4), None, N), "the data has no labels"),
        (lambda: per_sample("cross_entropy", draws(N, 4), {"x": 1}, N), "the data has no labels"),
        (
            lambda: per_sample("cross_entropy", draws(N, 4), labels(N) + 1, N),
            r"labels must be in \[0, c=4\), example \d of the batch has 4",
        ),
        (
            lambda: per_sample("cross_entropy", draws(N, 4), labels(N, 2), N),
            r"needs logits \[n=6, c, ...\] or \[n, ..., c\] and labels \[n=6, ...\], got \[6, 4\] and \[6, 2\]",
        ),
        (
            lambda: per_sample("causal_lm", draws(N, 4), labels(N), N),
            r"'causal_lm' needs logits \[n, t, v\] and labels \[n, t\] with t >= 2, got \[6, 4\] and \[6\]",
        ),
        (
            lambda: per_sample("mse", draws(N, 4), draws(N, 3), N),
            r"of one shape \[n=6, ...\], got \[6, 4\] and \[6, 3\]",
        ),
        (
            lambda: columns("causal_lm", draws(N, 5, 4), labels(N, 5)),
            "fisher='exact' with loss='causal_lm' would need 4 x 4 backward passes per batch: choose fisher=",
        ),
        (
            lambda: columns(concave, draws(N, 2), None),
            r"output Hessian of example \d of the batch is not positive semidefinite \(lowest eigenvalue -2\)",
        ),
        (lambda: columns(lambda o, y: o.sum(1), draws(N, 2), None), "no second derivative in the outputs"),
        (
            lambda: Influence(nn.Linear(2, 2), "mse", measurement="margin"),
            "measurement='margin' is defined for loss='cross_entropy', got loss='mse'",
        ),
        (lambda: Influence(nn.Linear(2, 2), measurement="gap"), "measurement must be one of .*, got 'gap'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: per_sample("cross_entropy", draws(N, 4), draws(N), N), "must be integers, got torch.float64"),
        (lambda: per_sample("cross_entropy", [draws(N, 4)], labels(N), N), "must return a tensor or something with"),
    ],
)
def test_bad_types(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_exact_fisher_of_a_language_model_is_refused_when_fitting():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).double()
    ids = labels(N, 5, c=7)
    with pytest.raises(ValueError, match="fisher='exact' with loss='causal_lm' would need 4 x 7 backward passes"):
        Influence(model, "causal_lm", KFAC(1e-2), progress=False).fit((ids, ids))
    assert Influence(model, "causal_lm", KFAC(1e-2, "monte_carlo"), progress=False).fit((ids, ids)).curvature


@pytest.mark.parametrize("fisher", ["exact", "monte_carlo"])
def test_the_curvature_of_squared_outputs_is_that_of_the_function_without_its_hessians(fisher):
    outputs, y = torch.randn(4, 5, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    found, want = (
        torch.stack([column for _, column in output_columns(loss, outputs, y, 4, fisher, Generator().manual_seed(3))])
        for loss in (squared_outputs, lambda *args: squared_outputs(*args))
    )
    assert torch.equal(found, want)
    many = torch.zeros(2, 200_000), y[:2]  # whose Hessians no machine holds
    (column,) = (column for _, column in output_columns(squared_outputs, *many, 2, "monte_carlo", None))
    assert torch.equal(column.abs(), torch.ones_like(column))
