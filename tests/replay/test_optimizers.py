"""A step of each optimizer, held against torch's; the step backwards, against autograd and retraining."""

import pytest
import torch
from torch import nn

from fastif.replay import Replay
from fastif.replay.optimizers import Descent, Moments, rule_of
from tests.helpers.trainings import OPTIMIZERS, batches, data, losses, network, recorded, train

RULES = {
    "plain": (Descent(False), [0.1, 0.0, 0.01, 0.0]),
    "momentum": (Descent(True), [0.1, 0.9, 0.01, 0.0]),
    "Nesterov": (Descent(True), [0.1, 0.9, 0.01, 1.0]),
    "Adam": (Moments(), [0.1, 0.8, 0.95, 1e-2, 0.1, 0.0, 3.0]),
    "AdamW": (Moments(), [0.1, 0.8, 0.95, 1e-2, 0.1, 1.0, 1.0]),
}


@pytest.mark.parametrize("name", RULES)
def test_a_step_backwards_is_autograds(name):
    rule, numbers = RULES[name]
    g = torch.Generator().manual_seed(0)
    at, gradient, *state = torch.randn(2 + len(rule.state), 6, generator=g, dtype=torch.float64)
    if len(state) == 2:
        state[1] = state[1].square()
    inputs = [x.clone().requires_grad_() for x in (at, gradient, *state)]
    moved, kept = rule.step(inputs[0], tuple(inputs[2:]), inputs[1], numbers)
    adjoints = torch.randn(1 + len(state), 6, generator=g, dtype=torch.float64)
    wanted = torch.autograd.grad((moved, *kept), inputs, tuple(adjoints))
    c, before = rule.pull(tuple(a[None] for a in adjoints), at, tuple(state), gradient, numbers)
    torch.testing.assert_close(c[0], wanted[1])
    for found, value in zip(before, (wanted[0], *wanted[2:]), strict=True):
        torch.testing.assert_close(found[0], value)


def test_adam_where_no_gradient_ever_came():
    """√v has no derivative at zero; what goes through it is multiplied by g = 0."""
    adjoints = tuple(torch.ones(1, 2, dtype=torch.float64) for _ in range(3))
    nothing = torch.zeros(2, dtype=torch.float64)
    c, before = Moments().pull(adjoints, nothing, (nothing, nothing), nothing, RULES["AdamW"][1])
    assert all(bool(part.isfinite().all()) for part in (c, *before))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scores_are_the_derivative_of_real_retraining(name):
    """Central differences of the losses after training with one example's weight changed, in float64."""
    examples, query, eps = data(), data(4, seed=1), 1e-5
    order = batches(torch.arange(24), 7, 4)
    model, log = recorded(OPTIMIZERS[name], examples, order)
    replay = Replay(log, model, examples, matrix="hessian", progress=False)
    scores = replay.scores(query, examples)
    assert replay.deviations == [0] or max(replay.deviations) < 1e-13
    for example in (0, 13):
        ends = []
        for sign in (1, -1):
            weights = torch.ones(24, dtype=torch.float64)
            weights[example] += sign * eps
            ends.append(losses(train(network(), OPTIMIZERS[name], examples, order, weights=weights), query))
        wanted = (ends[1] - ends[0]) / (2 * eps)
        assert float((scores[:, example] - wanted).norm() / wanted.norm()) < 1e-7


def test_groups_with_numbers_of_their_own():
    examples, query, eps = data(), data(4, seed=1), 1e-5
    order = batches(torch.arange(24), 8, 3)

    def make(parameters):
        w1, b1, w2, b2 = parameters
        groups = [
            {"params": [w2, b1], "lr": 0.02, "weight_decay": 0.1},
            {"params": [b2, w1], "lr": 0.05, "eps": 1e-2, "betas": (0.7, 0.9)},
        ]
        return torch.optim.AdamW(groups, eps=1e-3)

    model, log = recorded(make, examples, order)
    assert log.layout.names == ("2.weight", "0.bias", "2.bias", "0.weight")
    scores = Replay(log, model, examples, matrix="hessian", progress=False).scores(query)
    ends = []
    for sign in (1, -1):
        weights = torch.ones(24, dtype=torch.float64)
        weights[5] += sign * eps
        ends.append(losses(train(network(), make, examples, order, weights=weights), query))
    wanted = (ends[1] - ends[0]) / (2 * eps)
    assert float((scores[:, 5] - wanted).norm() / wanted.norm()) < 1e-7


def test_what_cannot_be_replayed_is_refused_by_name():
    parameters = list(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match=r"must be a torch.optim.SGD, Adam or AdamW itself, got torch.optim.*RMSprop"):
        rule_of(torch.optim.RMSprop(parameters))

    class Own(torch.optim.SGD):
        pass

    with pytest.raises(ValueError, match="Own"):
        rule_of(Own(parameters, lr=0.1))
    for optimizer, words in (
        (torch.optim.Adam(parameters, amsgrad=True), "Adam with amsgrad=True cannot"),
        (torch.optim.AdamW(parameters, maximize=True), "maximize=True"),
        (torch.optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=0.5), "SGD with dampening=0.5"),
    ):
        rule = rule_of(optimizer)
        with pytest.raises(ValueError, match=words):
            rule.read(optimizer.param_groups[0], 0)
    rule = rule_of(torch.optim.SGD(parameters, lr=0.1))
    with pytest.raises(ValueError, match="momentum must be > 0 in all steps and groups or in none, got 0.9"):
        rule.read(torch.optim.SGD(parameters, lr=0.1, momentum=0.9).param_groups[0], 0)
