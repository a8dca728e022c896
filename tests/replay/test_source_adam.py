"""SOURCE of Adam and AdamW: against dense matrices, against the training itself, and against retraining."""

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastif import CG, EKFAC, Diagonal, ExactBlock
from fastif.curvature.matrix_free.functions import NotSettled
from fastif.replay import Replay, Source, TrainingLog
from fastif.replay.segments import scales_of
from fastif.replay.unrolling import Scaled
from tests.helpers.trainings import OPTIMIZERS, batches, data, language_model, losses, network, recorded, train
from tests.replay.test_source import QUERY, TARGETS, X, gradients

JOINT = partial(ExactBlock, joint=True)
ADAMS = {
    "Adam": lambda p, **how: torch.optim.Adam(p, weight_decay=0.05, **how),
    "AdamW": lambda p, **how: torch.optim.AdamW(p, weight_decay=0.2, **how),
}


def by_group(make):
    """Weights decay, biases do not: the groups that most trainings of AdamW have."""

    def made(parameters, **how):
        weight, bias = parameters
        return make([{"params": [bias], "weight_decay": 0.0}, {"params": [weight]}], **how)

    return made


GROUPED = {**ADAMS, **{f"{name} in groups": by_group(make) for name, make in ADAMS.items()}}


class Mean(nn.Module):
    def forward(self, words):
        return words.mean(1)


def descended(make, steps, every, held=False, **how):
    """Full batches of a quadratic; `held`: with second moments that a training of long ago has left, and that stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2)).double()
    optimizer = make(model.parameters(), **how)
    if held:
        for number, parameter in enumerate(model.parameters()):
            g = torch.Generator().manual_seed(number)
            square = 0.1 + torch.rand(parameter.shape, generator=g, dtype=torch.float64)
            optimizer.state[parameter] = {
                "step": torch.tensor(1e15), "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": square
            }  # fmt: skip
    log = TrainingLog(model, every=every)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - TARGETS).square().sum(1).mean().backward()
        log.step(optimizer, torch.arange(24))
    return model, log


def source(log, model, **how):
    return Source(log, model, (X, TARGETS), loss="mse", progress=False, **how)


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("name", GROUPED)
def test_a_quadratic_against_its_closed_form(name, segments):
    """Matrix functions of what is not symmetric, P(G + Γ) or PG + Γ, by its own eigenvectors."""
    model, log = descended(GROUPED[name], 12, 2, lr=0.02)
    found = source(log, model, curvature=JOINT, segments=segments).scores(QUERY)
    _, hessian = gradients(log.parameters(), X, TARGETS)
    left, _ = gradients(log.parameters(), *QUERY)
    wanted, steps, ones = torch.zeros(5, 24, dtype=torch.float64), 12 // segments, torch.ones(8, dtype=torch.float64)
    decays = torch.diag(torch.where(torch.arange(8) < 6, ones, 0.0) if "groups" in name else ones)
    for segment in reversed(range(segments)):
        number = (segment * steps + steps // 2) // 2
        first = segment * steps // 2
        inside = range(max(first, 1), first + steps // 2)  # before step 0 there is no second moment
        squares = torch.stack([log.point(c).state[1] / (1 - 0.999 ** (2 * c)) for c in inside])
        v = log.layout.split(squares.mean(0))
        size = torch.cat([v["0.weight"].flatten(), v["0.bias"]]).sqrt() + 1e-8
        p = torch.diag(1 / size)
        a = p @ hessian + 0.2 * decays if "AdamW" in name else p @ (hessian + 0.05 * decays)
        values, vectors = torch.linalg.eig(a)
        time = 0.02 * steps
        response = vectors * ((1 - (-time * values).exp()) / values) @ torch.linalg.inv(vectors)
        decay = vectors * (-time * values).exp() @ torch.linalg.inv(vectors)
        per_example, _ = gradients(log.parameters(number), X, TARGETS)
        wanted += left @ (response.real @ p) @ per_example.T / 24
        left = left @ decay.real
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ADAMS)
def test_many_segments_of_small_steps_with_second_moments_held_are_the_training(name):
    model, log = descended(ADAMS[name], 60, 1, held=True, lr=0.002, betas=(0.0, 1 - 1e-12))
    exact = Replay(log, model, (X, TARGETS), loss="mse", matrix="hessian", progress=False).scores(QUERY)
    away = [
        float((source(log, model, curvature=JOINT, segments=k).scores(QUERY) - exact).norm() / exact.norm())
        for k in (1, 4, 20)
    ]
    assert away[0] > 3 * away[1] > 3 * away[2]
    assert away[2] < 5e-3


@pytest.mark.parametrize(("name", "make"), [("Adam", torch.optim.Adam), ("AdamW", torch.optim.AdamW)])
def test_a_gelu_network_against_retraining(name, make):
    """Central differences of real retraining by every example's weight, in float64.

    What SOURCE leaves out, above all that a gradient also makes the divisor larger, is stated in docs/math.md (25):
    correlations of 0.95 and 0.9, off by 0.3 and 0.8 of the derivatives' length.
    """
    examples, query, eps = data(), data(6, seed=1), 1e-5
    order = batches(torch.arange(24), 8, 20)
    optimizer = partial(make, lr=0.01, betas=(0.9, 0.99), weight_decay=1e-2 if name == "Adam" else 0.1)
    model, log = recorded(optimizer, examples, order, every=4)
    derivatives = []
    for example in range(24):
        ends = []
        for sign in (1, -1):
            weights = torch.ones(24, dtype=torch.float64)
            weights[example] += sign * eps
            ends.append(losses(train(network(), optimizer, examples, order, weights=weights), query))
        derivatives.append((ends[1] - ends[0]) / (2 * eps))
    exact = torch.stack(derivatives, 1)
    for curvature, least, most in ((JOINT, 0.94, 0.35), (EKFAC, 0.88, 0.9)):
        found = Source(log, model, examples, curvature=curvature, segments=3, progress=False).scores(query)
        assert float(torch.corrcoef(torch.stack([found.flatten(), exact.flatten()]))[0, 1]) > least
        assert float((found - exact).norm() / exact.norm()) < most


def test_words_of_one_example_do_not_drown_the_others():
    """Their second moments fall by 0.9 in every step until the next epoch: with those of one checkpoint scores through
    them are many times too large, and correlate with the replay's by 0.54 (with all by 0.93)."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 8, (60, 4), generator=g)
    labels = tokens[:, 0] % 3
    tokens[:20, 3] = torch.arange(8, 28)  # a word each that no other example has
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(28, 3), Mean(), nn.Tanh(), nn.Linear(3, 3)).double()
    log, optimizer = TrainingLog(model, every=7), torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.9))
    for rows in batches(torch.arange(60), 1, 4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens[rows]), labels[rows]).backward()
        log.step(optimizer, rows)
    examples, query = (tokens, labels), (tokens[:8], labels[:8])
    exact = Replay(log, model, examples, progress=False).scores(query)
    found = Source(log, model, examples, curvature=JOINT, segments=2, progress=False).scores(query)
    assert float(torch.corrcoef(torch.stack([found.flatten(), exact.flatten()]))[0, 1]) > 0.8


def test_a_language_model_with_tied_weights_and_parameters_without_a_gradient():
    """The key's biases have no gradient but rounding, and divide it by as much: they stand still."""
    model, tokens, log = language_model(partial(torch.optim.AdamW, lr=0.01), 6)
    scales = scales_of(log, [2])
    assert scales is not None
    assert bool((scales["qkv.bias"][4:8] == 0).all())
    assert bool((scales["qkv.bias"][:4] > 0).all())
    text = {"input_ids": tokens, "labels": tokens}
    scores = Source(
        log, model, text, "causal_lm", partial(EKFAC, fisher="empirical"), segments=2, progress=False
    ).scores(text)
    exact = Replay(log, model, text, "causal_lm", progress=False).scores(text)
    assert float(torch.corrcoef(torch.stack([scores.flatten(), exact.flatten()]))[0, 1]) > 0.7


def test_parameters_that_stand_still_decay_all_the_same():
    """AdamW takes their share of weight decay off, whether a gradient comes or not."""
    twice = SimpleNamespace(solve=lambda given: {name: 2 * values for name, values in given.items()})
    curvature: Any = SimpleNamespace(parts={("a",): twice})
    still = {"a": torch.tensor([[[0.0, 1.0]]])}, {"a": torch.tensor([[[0.5, 0.5]]])}
    vectors = {"a": torch.tensor([[[[3.0, 5.0]]]], dtype=torch.float64)}
    response, decayed = Scaled(curvature, *still, time=3.0, first=False, memory=1 << 20)(vectors)
    assert decayed is not None
    assert response["a"].flatten().tolist() == pytest.approx([0.0, 5 * (1 - math.exp(-7.5)) / 2.5])
    assert decayed["a"].flatten().tolist() == pytest.approx([3 * math.exp(-1.5), 5 * math.exp(-7.5)])


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_segment_without_a_learning_rate_changes_nothing(name):
    """Warm-up from zero, or a schedule that ends early: half of these steps move nothing."""
    model, (x, y), found = network(), data(), []
    log, optimizer = TrainingLog(model, every=2), OPTIMIZERS[name](model.parameters())
    for number, rows in enumerate(batches(torch.arange(24), 8, 4)):
        if number == 6:
            optimizer.param_groups[0]["lr"] = 0.0
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        log.step(optimizer, rows)
        if number == 5:
            found.append(Source(log, model, data(), segments=3, progress=False).scores(data(3, seed=1)))
    found.append(Source(log, model, data(), segments=6, progress=False).scores(data(3, seed=1)))
    torch.testing.assert_close(found[0], found[1])


def test_before_the_first_step_the_next_second_moments_stand_in():
    model, log = recorded(OPTIMIZERS["Adam"], data(), batches(torch.arange(24), 8, 2), every=100)
    alone, scales = scales_of(log, [0]), log.final.state[1]
    assert alone is not None
    size = (scales / (1 - 0.95**6)).sqrt() + 1e-3
    torch.testing.assert_close(torch.cat([alone[name].flatten() for name in log.layout.names]), size.rsqrt())
    assert Source(log, model, data(), segments=1, progress=False).scores(data(3, seed=1)).shape == (3, 24)
    _, log = recorded(OPTIMIZERS["Adam"], data(), batches(torch.arange(24), 8, 2), every=2)
    size = (log.point(1).state[1] / (1 - 0.95**2)).sqrt() + 1e-3
    for checkpoints in ([0], [1], [0, 1]):
        found = scales_of(log, checkpoints)
        assert found is not None
        torch.testing.assert_close(torch.cat([found[name].flatten() for name in log.layout.names]), size.rsqrt())
    assert scales_of(recorded(OPTIMIZERS["SGD"], data(), batches(torch.arange(24), 8, 1))[1], [0]) is None


def test_results_do_not_depend_on_memory():
    model, log = recorded(OPTIMIZERS["AdamW"], data(), batches(torch.arange(24), 8, 2), every=2)
    query = data(6, seed=1)
    scores = [
        Source(log, model, data(), curvature=Diagonal, segments=2, memory=memory, progress=False).scores(query)
        for memory in (1 << 20, 1)
    ]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-9, atol=1e-13)


def test_what_source_refuses_of_adam(monkeypatch):
    model, log = recorded(OPTIMIZERS["Adam"], data(), batches(torch.arange(24), 8, 2), every=2)
    for curvature in (CG, lambda damping: EKFAC(1e-3)):
        with pytest.raises(ValueError, match="logs of Adam, need a curvature that knows its eigenvalues"):
            Source(log, model, data(), curvature=curvature, segments=1, progress=False).scores(data(3, seed=1))
    monkeypatch.setattr("fastif.replay.unrolling._PRODUCTS", 3)
    with pytest.raises(
        NotSettled, match=r"Source: '0', training time [0-9.e-]+: after 3 products .* take more segments"
    ):
        Source(log, model, data(), segments=1, progress=False).scores(data(3, seed=1))

    def two_rates(parameters):
        first, second, *rest = parameters
        return torch.optim.Adam([{"params": [first, second]}, {"params": rest, "lr": 0.02}], lr=0.01)

    model, log = recorded(two_rates, data(), batches(torch.arange(24), 8, 1))
    with pytest.raises(ValueError, match=r"parameter groups differ in step 0: lr is 0.01, 0.02"):
        Source(log, model, data(), segments=1)

    model = network()
    log, optimizer = TrainingLog(model, every=1), OPTIMIZERS["AdamW"](model.parameters())
    x, y = data()
    for decay in (0.1, 0.2):
        optimizer.param_groups[0].update(weight_decay=decay)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        log.step(optimizer, torch.arange(24))
    with pytest.raises(ValueError, match=r"steps of parameter group 0 differ in weight_decay: \[0.1, 0.2\]"):
        Source(log, model, data(), segments=1)

    def still(parameters):
        return torch.optim.AdamW(parameters, lr=0.0)

    model, log = recorded(still, data(), batches(torch.arange(24), 8, 1))
    with pytest.raises(ValueError, match="a step of the log must have a learning rate > 0, got 3 steps without"):
        Source(log, model, data(), segments=1)
