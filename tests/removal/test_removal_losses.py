"""Heads trained with other losses, against L-BFGS on torch's own loss in float64, and ridge regression."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastif import Certificate, extract, remove
from fastif.removal import head_steps, optimal_head
from fastif.removal.certifying import distance_bound
from fastif.removal.head import RetainedHead
from fastif.removal.losses import SoftmaxLoss, output_loss
from fastif.removal.newton import newton
from tests.helpers.problems import REMOVED, trained

N, DECAY = 90, 0.02
WEIGHTED = nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0]), reduction="none", label_smoothing=0.1)


def log_cosh(outputs, targets):
    return (outputs - targets).cosh().log().sum(1)


def wavy(outputs, targets):
    return ((outputs - targets).sin() ** 2).sum(1)


def problem(kind):
    """Features [90, 6], targets, a head that was not trained, and torch's loss [m] of (outputs, targets)."""
    model, x, y = trained()
    g = torch.Generator().manual_seed(3)
    features = model[:2](x).detach()
    some = features @ torch.randn(6, 2, generator=g, dtype=torch.float64)
    weight = torch.randn(3 if kind == "weighted" else 2, 6, generator=g, dtype=torch.float64)
    bias = torch.randn(len(weight), generator=g, dtype=torch.float64)
    if kind == "weighted":
        targets, loss = y, WEIGHTED
        torchs = lambda z, t: F.cross_entropy(z, t, WEIGHTED.weight.to(z), reduction="none", label_smoothing=0.1)  # noqa: E731
    elif kind == "bce":
        targets, loss = (some > 0.3 * torch.randn(some.shape, generator=g)).double(), "bce"
        torchs = lambda z, t: F.binary_cross_entropy_with_logits(z, t, reduction="none").sum(1)  # noqa: E731
    else:
        targets = some + torch.randn(some.shape, generator=g, dtype=torch.float64)
        loss = "mse" if kind == "mse" else log_cosh
        torchs = (lambda z, t: (z - t).square().sum(1)) if kind == "mse" else log_cosh
    return features, targets, weight, bias, loss, torchs


def retrained(features, targets, weight, torchs, removed):
    """The optimum by L-BFGS, and its objective."""
    kept = torch.ones(N, dtype=torch.bool)
    kept[removed] = False
    head = nn.Linear(6, len(weight)).double()
    optimizer = torch.optim.LBFGS(
        head.parameters(), max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = torchs(head(features[kept]), targets[kept]).sum() / N
        value = value + DECAY / 2 * sum(p.square().sum() for p in head.parameters())
        value.backward()
        return value

    optimizer.step(closure)
    return head, float(closure().detach())


@pytest.mark.parametrize("kind", ["weighted", "bce", "mse", "own"])
def test_steps_reach_the_retrained_head(kind):
    features, targets, weight, bias, loss, torchs = problem(kind)
    head, objective = retrained(features, targets, weight, torchs, REMOVED)
    steps = list(head_steps(features, targets, weight, bias, REMOVED, steps=12, weight_decay=DECAY, loss=loss))
    assert steps[-1].objective == pytest.approx(objective, abs=1e-9)
    best = optimal_head(features, targets, weight, bias, REMOVED, weight_decay=DECAY, loss=loss)
    assert torch.allclose(best.parameters["weight"], head.weight, atol=1e-6)
    assert torch.allclose(best.parameters["bias"], head.bias, atol=1e-6)


def test_one_step_of_least_squares_is_ridge_regression():
    features, targets, weight, bias, loss, _ = problem("mse")
    kept = torch.ones(N, dtype=torch.bool)
    kept[REMOVED] = False
    a = torch.cat([features, torch.ones(N, 1, dtype=torch.float64)], 1)[kept]
    want = torch.linalg.solve(2 / N * a.T @ a + DECAY * torch.eye(7).double(), 2 / N * a.T @ targets[kept]).T
    step = next(head_steps(features, targets, weight, bias, REMOVED, steps=1, weight_decay=DECAY, loss=loss))
    found = torch.cat([step.parameters["weight"], step.parameters["bias"][:, None]], 1)
    assert torch.allclose(found, want, atol=1e-10)
    assert step.step_size == {"head": 1.0}


@pytest.mark.parametrize("kind", ["weighted", "bce", "mse", "own"])
def test_gradients_and_curvature_are_autograds(kind):
    features, targets, weight, bias, loss, torchs = problem(kind)
    head = RetainedHead(features, targets, weight, bias, REMOVED, weight_decay=DECAY, loss=loss)
    kept = torch.ones(N, dtype=torch.bool)
    kept[REMOVED] = False

    def objective(theta):
        logits = features[kept] @ theta[:, :-1].T + theta[:, -1]
        return torchs(logits, targets[kept]).sum() / N + DECAY / 2 * theta.square().sum()

    theta = torch.cat([weight, bias[:, None]], 1)
    assert head.objective == pytest.approx(float(objective(theta)), rel=1e-12)
    gradient = torch.autograd.functional.jacobian(objective, theta)
    assert head.gradient() == pytest.approx(float(gradient.norm()), rel=1e-10)
    size = theta.numel()
    hessian = torch.autograd.functional.hessian(objective, theta).view(size, size)
    head.curvature()
    want = torch.linalg.solve(hessian, gradient.flatten())
    assert torch.allclose(head._block.solve(gradient).flatten(), want, atol=1e-9)


def test_cross_entropy_by_autograd_is_that_by_hand():
    """Two ways of one loss: the general one must give the steps of the named one."""
    model, x, y = trained()
    head = model[:2](x).detach(), y, model[2].weight.detach(), model[2].bias.detach()
    plain = nn.CrossEntropyLoss(reduction="none")
    for one, other in zip(
        head_steps(*head, REMOVED, weight_decay=DECAY, steps=3),
        head_steps(*head, REMOVED, weight_decay=DECAY, steps=3, loss=plain),
        strict=True,
    ):
        assert torch.allclose(one.parameters["weight"], other.parameters["weight"], atol=1e-9)
    assert output_loss(plain).smoothness == SoftmaxLoss().smoothness == 0.5


@pytest.mark.parametrize("kind", ["weighted", "bce", "mse"])
def test_bound_holds(kind):
    features, targets, weight, bias, loss, torchs = problem(kind)
    head, _ = retrained(features, targets, weight, torchs, REMOVED)
    best = torch.cat([head.weight, head.bias[:, None]], 1).detach()
    found = RetainedHead(features, targets, weight, bias, REMOVED, weight_decay=DECAY, loss=loss)
    assert head.weight.grad is not None and head.bias.grad is not None  # noqa: PT018
    left = torch.cat([head.weight.grad, head.bias.grad[:, None]], 1).norm() / DECAY  # the judge's own distance
    assert left < 1e-5
    for steps in (0, 1, 2):
        list(newton(found, steps))
        assert (found.theta - best).norm() <= distance_bound(found) + left
    assert found.gradient_error() < 1e-10
    logits = 30 * torch.randn(50, len(weight), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    judged = output_loss(loss)
    hessians = judged._hessians(logits, targets[:50], 0)  # pyright: ignore
    assert torch.linalg.eigvalsh(hessians).max() <= judged.smoothness + 1e-9


@pytest.mark.parametrize("kind", ["bce", "mse"])
def test_models_of_regression_and_of_several_labels(kind):
    """`remove` on a float32 model, its targets no labels of classes; a certificate; the pass over the data given."""
    features, targets, _, _, loss, torchs = problem(kind)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    data = features.float(), targets.float()
    how = dict(loss=loss, weight_decay=DECAY, progress=False)
    found = remove(model, data, REMOVED, **how)
    kept = torch.ones(N, dtype=torch.bool)
    kept[REMOVED] = False

    def objective(state):
        own = nn.Linear(5, 2)
        own.load_state_dict({name[2:]: value for name, value in state.items() if name.startswith("2.")})
        with torch.no_grad():
            losses = torchs(own(model[:2](data[0][kept])), data[1][kept]).sum() / N
            return float(losses + DECAY / 2 * sum(p.square().sum() for p in own.parameters()))

    values = [objective(found.after(step)) for step in range(len(found.moved))]
    assert all(later < earlier + 1e-5 for earlier, later in pairwise(values))
    assert values[-1] < values[0]
    assert found.history[-1].objective == pytest.approx(values[-1], rel=1e-5)
    seen = extract(model, data[0], progress=False)
    again = remove(model, [data], REMOVED, extracted=seen, **how)
    assert torch.allclose(again.state_dict["2.weight"], found.state_dict["2.weight"], atol=1e-6)
    certificate = Certificate(1.0, 1e-5, 0.1)
    assert remove(model, data, REMOVED, certificate=certificate, **how).certified is not None


def test_refusals():
    features, targets, weight, bias, _, _ = problem("own")

    def refused(message, loss, error=ValueError, goal=targets):
        with pytest.raises(error, match=message):
            list(head_steps(features, goal, weight, bias, REMOVED, weight_decay=DECAY, loss=loss))

    refused("loss must be cross_entropy, bce, mse or a function", "hinge")
    refused("not convex in the outputs: at example .* has the eigenvalue -", wavy)
    refused('use reduction="none"', nn.MSELoss())
    refused("of retained example 0 is nan; it must be finite", lambda z, t: log_cosh(z, t) * float("nan"))
    refused(r"targets must be a tensor of n=90 examples, got \[3, 2\]", "mse", goal=targets[:3])
    model = nn.Sequential(nn.Linear(6, 2))
    data = features.float(), targets.float()
    with pytest.raises(ValueError, match="loss that is known to be convex"):
        remove(model, data, REMOVED, loss=log_cosh, certificate=Certificate(1.0, 1e-5, 0.1), progress=False)
    with pytest.raises(ValueError, match="loss= is for the head alone"):
        remove(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), data, REMOVED, loss="mse", layers="*", progress=False)
    with pytest.raises(ValueError, match="no targets"):
        remove(model, data[0], REMOVED, loss="mse", progress=False)
    doubled, wide = torch.cat([features, features], 1), torch.cat([weight, weight], 1)
    with pytest.raises(ValueError, match="not positive definite with 0 on its diagonal"):
        list(head_steps(doubled, targets, wide, bias, REMOVED, weight_decay=0.0, loss="mse"))
