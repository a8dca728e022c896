"""SOURCE against its closed form with dense matrices, and against the training itself."""

from functools import partial

import pytest
import torch
from torch import nn

from fastif import CG, EKFAC, DataInf, ExactBlock, Identity, Influence, TrainingDamping
from fastif.replay import Replay, Source, TrainingLog
from tests.helpers.trainings import OPTIMIZERS, batches, data, language_model, network, recorded

X, _ = data()
TARGETS = X @ torch.tensor([[1.0, -0.5], [0.3, 2.0], [-1.0, 0.4]], dtype=torch.float64) + data(seed=3)[0][:, :2]
QUERY = (data(5, seed=1)[0], data(5, seed=2)[0][:, :2])
JOINT = partial(ExactBlock, joint=True)


def descended(lr, steps, every=1, momentum=0.0, kept=None):
    """Full-batch descent on a quadratic, the squared error of a linear model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2)).double()
    log, rows = TrainingLog(model, every=every), torch.arange(24) if kept is None else kept
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X[rows]) - TARGETS[rows]).square().sum(1).mean().backward()
        log.step(optimizer, rows)
    return model, log


def source(log, model, **how):
    return Source(log, model, (X, TARGETS), loss="mse", progress=False, **how)


def gradients(parameters, x, y):
    """∇ of (W x + b − y)², [n, 8], and the mean Hessian, in the order weight, bias."""
    weight, bias = parameters["0.weight"], parameters["0.bias"]
    off = 2 * (x @ weight.T + bias - y)
    rows = torch.cat([(off[:, :, None] * x[:, None, :]).flatten(1), off], 1)
    inputs = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    jacobian = torch.stack(
        [
            torch.cat([torch.kron(torch.eye(2, dtype=x.dtype)[o], a[:3]), torch.eye(2, dtype=x.dtype)[o]])
            for a in inputs
            for o in (0, 1)
        ]
    )
    return rows, 2 * jacobian.T @ jacobian / len(x)


@pytest.mark.parametrize("segments", [1, 3])
def test_a_quadratic_against_its_closed_form(segments):
    model, log = descended(0.02, 12, every=2)
    found = source(log, model, curvature=JOINT, segments=segments).scores(QUERY)
    _, hessian = gradients(log.parameters(), X, TARGETS)
    values, vectors = torch.linalg.eigh(hessian)
    left, _ = gradients(log.parameters(), *QUERY)
    wanted = torch.zeros(5, 24, dtype=torch.float64)
    steps = 12 // segments
    time = 0.02 * steps
    decay = torch.exp(-time * (values + 0.05))
    for segment in reversed(range(segments)):
        middle = log.parameters((segment * steps + steps // 2) // 2)
        per_example, _ = gradients(middle, X, TARGETS)
        response = (vectors * ((1 - decay) / (values + 0.05))) @ vectors.T
        wanted += left @ response @ per_example.T / 24
        left = left @ (vectors * decay) @ vectors.T
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12)


def test_many_segments_of_small_steps_are_the_training():
    model, log = descended(0.002, 60)
    wanted = Replay(log, model, (X, TARGETS), loss="mse", progress=False).scores(QUERY)
    away = [
        float((source(log, model, curvature=JOINT, segments=k).scores(QUERY) - wanted).norm() / wanted.norm())
        for k in (1, 4, 20)
    ]
    assert away[0] > 3 * away[1] > 3 * away[2]
    assert away[2] < 5e-3


def test_one_segment_is_influence_with_a_training_damping():
    examples, query = data(), data(4, seed=1)
    model, log = recorded(OPTIMIZERS["Nesterov"], examples, batches(torch.arange(24), 8, 4), every=100)
    found = Source(log, model, examples, segments=1, progress=False).scores(query, examples)
    damping = TrainingDamping(log.training_time, log.weight_decay)
    influence = Influence(network(), curvature=EKFAC(damping), checkpoints=[log.parameters(0)], progress=False)
    influence.fit(examples)
    at_end = torch.stack([torch.cat([g.flatten() for g in one]) for one in (_gradients(model, *query))])
    solved = []
    for row in at_end:
        parts = row.split([p.numel() for p in model.parameters()])
        vector = {n: v.view_as(p) for (n, p), v in zip(model.named_parameters(), parts, strict=True)}
        made = influence.solve(vector)
        solved.append(torch.cat([made[n].flatten() for n, _ in model.named_parameters()]))
    start = network()
    right = torch.stack([torch.cat([g.flatten() for g in one]) for one in _gradients(start, *examples)])
    torch.testing.assert_close(found, torch.stack(solved) @ right.T / 24, rtol=1e-8, atol=1e-12)


def _gradients(model, x, y):
    for one, label in zip(x, y, strict=True):
        value = nn.functional.cross_entropy(model(one[None]), label[None])
        yield torch.autograd.grad(value, list(model.parameters()))


def test_halves_groups_and_the_model_left_as_it_is():
    model, log = descended(0.02, 12, every=2)
    _, other = descended(0.02, 12, every=2, kept=torch.arange(12))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    alone = [source([one, one], model, curvature=JOINT).scores(QUERY) for one in (log, other)]
    both = source([log, other], model, curvature=JOINT)
    scores = both.scores(QUERY)
    spreads = torch.stack([row.std(1, correction=0, keepdim=True) for row in alone])
    wanted = spreads.mean(0) * torch.stack([a / s for a, s in zip(alone, spreads, strict=True)]).mean(0)
    torch.testing.assert_close(scores, wanted)
    grouped = both.scores(QUERY, query_groups=torch.tensor([0, 1, 0, 1, 1]))
    torch.testing.assert_close(grouped[0], scores[0] + scores[2])
    torch.testing.assert_close(both.scores(QUERY, (X[:7], TARGETS[:7])).shape, (5, 7))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_language_model_with_tied_weights():
    model, tokens, log = language_model(partial(torch.optim.SGD, lr=0.1), 3)
    text = {"input_ids": tokens, "labels": tokens}
    empirical = partial(EKFAC, fisher="empirical")
    made = Source(log, model, text, "causal_lm", empirical, segments=2, progress=False)
    exact = Replay(log, model, text, "causal_lm", progress=False).scores(text)
    scores = made.scores(text)
    assert float(torch.corrcoef(torch.stack([scores.flatten(), exact.flatten()]))[0, 1]) > 0.8


def test_what_source_refuses():
    model, log = descended(0.02, 12, every=5)
    words = r"segment 2 \(steps 6 to 8\) has no checkpoint, the log has one every 5 steps: choose fewer segments than 4"
    with pytest.raises(ValueError, match=words):
        source(log, model, segments=4)
    with pytest.raises(ValueError, match="segments must be at most the log's 12 steps, got 13"):
        source(log, model, segments=13)
    with pytest.raises(ValueError, match="segments must be an integer >= 1, got 0"):
        source(log, model, segments=0)
    for curvature in (CG, DataInf, lambda damping: EKFAC(1e-3), lambda damping: Identity()):
        with pytest.raises(ValueError, match="need a curvature that knows its eigenvalues"):
            source(log, model, curvature=curvature, segments=2).scores(QUERY)
        assert source(log, model, curvature=curvature, segments=1).scores(QUERY).shape == (5, 24)
    with pytest.raises(ValueError, match="Source: the model is not what the log ended with"):
        source(log, nn.Sequential(nn.Linear(3, 2)).double())
