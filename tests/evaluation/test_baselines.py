"""Baselines of unlearning against torch's own optimizer and gradients one by one."""

import copy
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from fastif.evaluation import baselines, without
from tests.helpers.retrainings import NET, X, Y

DATA = X.float(), Y
GONE = torch.tensor([3, 7, 11, 40, 41])
KEPT = without(60, GONE)


def model(seed=0):
    torch.manual_seed(seed)
    return NET(torch.arange(60), 0)


def descend(loss_of_step, steps, lr):
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of_step(net, step).backward()
        optimizer.step()
    return net.state_dict()


def same(found, want, atol=1e-6):
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert torch.allclose(found[name], value, atol=atol), name


def test_fine_tuning_descends_the_retained_loss():
    x, y = DATA
    found = baselines.fine_tuning(model(), DATA, GONE, 5, lr=0.1, epochs=3, batch_size=100)
    same(found, descend(lambda net, _: F.cross_entropy(net(x[KEPT]), y[KEPT]), 3, 0.1))


def test_neg_grad_plus_ascends_the_removed_loss_beside_it():
    x, y = DATA

    def loss(net, _):
        return 0.8 * F.cross_entropy(net(x[KEPT]), y[KEPT]) - 0.2 * F.cross_entropy(net(x[GONE]), y[GONE])

    found = baselines.neg_grad_plus(model(), DATA, GONE, 5, lr=0.1, alpha=0.8, epochs=3, batch_size=100)
    same(found, descend(loss, 3, 0.1))


def test_random_labels_are_wrong_and_others_right():
    x, y = DATA
    found = baselines.random_labels(model(), DATA, GONE, 5, lr=0.1, epochs=2, batch_size=100)
    offsets = torch.randint(1, 3, (5,), generator=torch.Generator().manual_seed(5))
    wrong = y.clone()
    wrong[GONE] = (y[GONE] + offsets) % 3
    assert (wrong[GONE] != y[GONE]).all()
    same(found, descend(lambda net, _: F.cross_entropy(net(x), wrong), 2, 0.1))


@pytest.mark.parametrize(("alpha", "dampening"), [(1.0, 1.0), (2.0, 0.5)])
def test_ssd_shrinks_what_matters_to_the_removed(alpha, dampening):
    x, y = DATA
    net = model()

    def squares(rows):
        total = [torch.zeros_like(p) for p in net.parameters()]
        for i in rows:
            grads = torch.autograd.grad(F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]), [*net.parameters()])
            total = [t + g.square() / len(rows) for t, g in zip(total, grads, strict=True)]
        return total

    want, touched = {}, 0
    for (name, p), everything, gone in zip(net.named_parameters(), squares(range(60)), squares(GONE), strict=True):
        value = p.detach().clone()
        chosen = gone > alpha * everything
        value[chosen] *= (dampening * everything / gone).clamp(max=1)[chosen]
        want[name], touched = value, touched + int(chosen.sum())
    assert touched > 0
    same(baselines.ssd(net, DATA, GONE, 0, alpha=alpha, dampening=dampening, batch_size=7), want)


def test_newton_steps_and_lissa_are_the_library_s_own():
    from fastif import extract, remove, samplers
    from fastif.evaluation.lissa_step import LiSSAStep

    net = model()
    found = baselines.newton_steps(net, DATA, GONE, 2, steps=2, subset=partial(samplers.random, k=20))
    how = dict(steps=2, subset=partial(samplers.random, k=20), progress=False)
    same(found, remove(net, DATA, GONE, generator=torch.Generator().manual_seed(2), **how).state_dict, 0.0)
    step = LiSSAStep(net, DATA, extract(net, DATA, progress=False), 5e-4, iterations=20)
    same(baselines.lissa(net, DATA, GONE, 1, k=30, iterations=20), step(GONE, samplers.random, 30, 1).state, 0.0)


def test_tuning_takes_the_best_on_training_data_alone():
    """A candidate that ruins the network is not chosen, wherever it stands; the held-out share is not trained on."""
    seen = []

    def train_fn(indices, seed):
        seen.append(indices)
        return NET(indices, seed)

    def ruin(net, data, removed, seed):
        del data, removed, seed
        return {name: -value for name, value in copy.deepcopy(net).state_dict().items()}

    good = partial(baselines.fine_tuning, lr=0.01)
    for candidates in ({"ruin": ruin, "good": good}, {"good": good, "ruin": ruin}):
        assert baselines.tune(candidates, model(), train_fn, DATA, torch.arange(0, 60, 4), seed=1) == "good"
    assert len(seen) == 4
    assert 40 <= len(seen[0]) <= 55
    assert not set(seen[1].tolist()) & set(range(0, 60, 4))
