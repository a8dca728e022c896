"""The certificate by its definition: the bound against the true optimum, the mechanism against numerical divergence."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn
from torch.nn.functional import cross_entropy

from fastif import Certificate, remove, samplers
from fastif.removal import optimal_head
from fastif.removal.certificate import gaussian_delta, largest_shift
from fastif.removal.certifying import distance_bound
from fastif.removal.head import RetainedHead
from fastif.removal.newton import newton
from tests.helpers.problems import QUIET, REMOVED, WEIGHT_DECAY, trained

CLOSE = Certificate(epsilon=1.0, delta=1e-5, noise=0.01)


def divergence(epsilon, shift):
    """∫ max(0, p − e^ε q): what δ is by definition, of N(0, 1) and N(shift, 1)."""
    start = epsilon / shift + shift / 2  # below it q's e^ε multiple is larger: p is N(shift, 1) here

    def excess(x):
        return max(0.0, stats.norm.pdf(x, shift) - math.exp(epsilon) * stats.norm.pdf(x))

    return integrate.quad(excess, start, max(start, shift) + 12, epsabs=1e-14, epsrel=1e-10, limit=500)[0]


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 1.0, 4.0, 12.0])
def test_delta_is_the_divergence_of_two_gaussians(epsilon):
    for shift in (0.02, 0.3, 1.0, 2.5, 6.0):
        assert gaussian_delta(epsilon, shift) == pytest.approx(divergence(epsilon, shift), rel=1e-7, abs=1e-13)


@pytest.mark.parametrize(("epsilon", "delta"), [(1e-3, 1e-6), (0.5, 1e-9), (1.0, 1e-5), (8.0, 1e-3), (30.0, 0.2)])
def test_distance_is_the_largest_that_delta_allows(epsilon, delta):
    shift = largest_shift(epsilon, delta)
    assert divergence(epsilon, shift) <= delta * (1 + 1e-8)
    assert divergence(epsilon, 1.001 * shift) > delta
    assert Certificate(epsilon=epsilon, delta=delta, noise=0.3).distance == pytest.approx(0.3 * shift, rel=1e-12)


def test_delta_covers_every_set_of_heads_in_three_dimensions():
    """Frequencies of the likelihood ratio's sets, the worst there are, among draws of noise around two heads."""
    draw = np.random.default_rng(0)
    shift = np.array([0.4, -1.0, 0.7])
    length = float(np.linalg.norm(shift))
    near, far = draw.standard_normal((400_000, 3)), draw.standard_normal((400_000, 3)) + shift
    for epsilon in (0.2, 1.0):
        ratio = lambda x: x @ shift - length**2 / 2  # noqa: E731  log density of far over near
        found = (ratio(far) > epsilon).mean() - math.exp(epsilon) * (ratio(near) > epsilon).mean()
        assert found == pytest.approx(gaussian_delta(epsilon, length), abs=6e-3)


def test_several_releases_are_gaussians_further_apart():
    """Three heads, each Δ from its own: their joint density ratio depends on a normal variable of variance 3 μ²."""
    shift = largest_shift(CLOSE.epsilon, CLOSE.delta)
    draw = np.random.default_rng(1).standard_normal((2_000_000, 3))
    loose = Certificate(epsilon=0.3, delta=0.05, noise=1.0)
    loss = (loose.distance * draw + loose.distance**2 / 2).sum(1)  # log ratio, drawn from the numerator
    found = np.maximum(0, 1 - np.exp(loose.epsilon - loss)).mean()
    assert loose.delta_after(3) == pytest.approx(found, abs=1e-3)
    assert CLOSE.delta_after(3) == pytest.approx(divergence(1.0, math.sqrt(3) * shift), rel=1e-6)
    assert CLOSE.delta_after(1) == pytest.approx(1e-5, rel=1e-6)


def random_problems(count, n=14, d=2, c=3):
    g = torch.Generator().manual_seed(0)
    features = torch.randn(count, n, d, generator=g, dtype=torch.float64) * (
        0.3 + 3 * torch.rand(count, 1, 1, generator=g, dtype=torch.float64)
    )
    labels = torch.randint(c, (count, n), generator=g)
    theta = torch.randn(count, c, d + 1, generator=g, dtype=torch.float64)
    decay = 10 ** (-2.5 * torch.rand(count, generator=g, dtype=torch.float64))
    removed = 1 + torch.randint(4, (count,), generator=g)
    return features, labels, theta, decay, removed


def true_optima(features, labels, theta, decay, removed):
    """All problems at once by L-BFGS on their sum, in float64; and each one's gradient norm there."""
    count, n, _ = features.shape
    kept = (torch.arange(n) >= removed[:, None]).double()
    inputs = torch.cat([features, torch.ones(count, n, 1, dtype=torch.float64)], 2)
    found = torch.zeros_like(theta, requires_grad=True)

    def objectives():
        losses = cross_entropy((inputs @ found.mT).flatten(0, 1), labels.flatten(), reduction="none").view(count, n)
        return (losses * kept).sum(1) / n + 0.5 * decay * found.square().sum((1, 2))

    optimizer = torch.optim.LBFGS(
        [found], max_iter=1500, history_size=10, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        total = objectives().sum()
        total.backward()
        return total

    optimizer.step(closure)
    closure()
    assert found.grad is not None
    return found.detach(), found.grad.flatten(1).norm(dim=1)


def test_bound_holds_on_a_thousand_problems(one_thread):
    """The distance to the true optimum is never above the bound: before steps and after; and it is of use."""
    problems = random_problems(1000)
    optima, leftover = true_optima(*problems)
    reach = leftover / problems[3]  # how far the judge's own optimum can be from the true one
    assert reach.max() < 1e-3
    assert reach.median() < 1e-6
    tightness = []
    for number, (x, y, theta, decay, r) in enumerate(zip(*problems, strict=True)):
        head = RetainedHead(x, y, theta[:, :-1], theta[:, -1], torch.arange(int(r)), weight_decay=float(decay))
        for steps in (0, 2):  # before any, and after two
            list(newton(head, steps))
            bound, distance = distance_bound(head), float((head.theta - optima[number]).norm())
            assert distance <= bound + float(reach[number]), (number, steps)
            if distance > 100 * float(reach[number]):
                tightness.append(bound / distance)
    assert np.median(tightness) < 50  # not a bound that is always true because it is huge


def test_rounding_is_part_of_the_bound():
    """At an optimum in float64 the gradient that is computed is rounding: a bound without it could be below."""
    problem = RetainedHead(
        trained().model[:2](trained().x).detach(),
        trained().y,
        trained().model[2].weight.detach(),
        trained().model[2].bias.detach(),
        REMOVED,
        weight_decay=WEIGHT_DECAY,
    )
    list(newton(problem, 30))
    computed = problem.gradient()
    kept = torch.ones(90, dtype=torch.bool)
    kept[REMOVED] = False
    x, y = problem.inputs.numpy().astype(np.longdouble), problem.labels.numpy()
    theta = problem.theta.numpy().astype(np.longdouble)
    logits = x @ theta.T
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    probs[np.arange(len(y)), y] -= 1
    exact = probs.T @ x / np.longdouble(90) + np.longdouble(WEIGHT_DECAY) * theta
    error = np.sqrt(((exact - problem._gradient.numpy()) ** 2).sum())
    assert 0 < error <= problem.gradient_error() < 1e-11
    assert abs(computed - np.sqrt((exact**2).sum())) <= problem.gradient_error()


@pytest.mark.parametrize("noise", [0.3, 0.003])
@pytest.mark.parametrize("subset", [None, partial(samplers.logit, k=40)])
def test_steps_go_on_until_the_bound_is_below_the_distance(noise, subset):
    """Without its noise the released head is within Δ of the head that scratch training of it gives."""
    model, x, y = trained()
    certificate = Certificate(epsilon=1.0, delta=1e-5, noise=noise)
    seed = lambda: torch.Generator().manual_seed(5)  # noqa: E731
    gone = (y == 0).nonzero()[:, 0]
    found = remove(model, (x, y), gone, certificate=certificate, subset=subset, generator=seed(), **QUIET)
    assert found.certified is not None
    assert found.certified.bound <= found.certified.distance == certificate.distance
    features, kept = model[:2](x).detach(), y != 0
    head = nn.Linear(6, 3).double()
    optimizer = torch.optim.LBFGS(
        head.parameters(), max_iter=1000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(head(features[kept]), y[kept], reduction="sum") / 90
        loss = loss + 0.5 * WEIGHT_DECAY * sum(p.square().sum() for p in head.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    before = found.moved[-2]  # without noise
    apart = torch.cat([(before["2.weight"] - head.weight).flatten(), before["2.bias"] - head.bias])
    assert apart.detach().norm() <= found.certified.bound + 1e-7
    assert apart.detach().norm() <= certificate.distance
    added = torch.cat([(found.state_dict[k] - before[k]).flatten() for k in ("2.weight", "2.bias")])
    assert added.std() == pytest.approx(noise, rel=0.5)  # of 21 draws
    assert all(torch.equal(found.state_dict[k], v) for k, v in found.moved[-1].items())
    assert len(found.moved) == len(found.history) + 2
    untouched = found.after(0)
    assert all(torch.equal(untouched[k], v) for k, v in model.state_dict().items())


def test_smaller_noise_takes_more_steps_and_the_noise_is_the_generators():
    model, x, y = trained()
    gone = (y == 0).nonzero()[:, 0]
    steps = [
        len(remove(model, (x, y), gone, certificate=Certificate(1.0, 1e-5, noise), **QUIET).history)
        for noise in (300.0, 1.0, 1e-4)
    ]
    assert steps[0] < steps[1] < steps[2]

    def released(generator):
        return remove(model, (x, y), gone, certificate=CLOSE, generator=generator, **QUIET).state_dict["2.weight"]

    torch.manual_seed(0)
    first = released(None)
    torch.manual_seed(0)
    assert not torch.equal(first, released(None))  # a script's seed must not give the noise away
    same = [released(torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*same)


def test_words_say_what_is_certified_and_what_is_not():
    model, x, y = trained()
    found = remove(model, (x, y), REMOVED, certificate=CLOSE, **QUIET)
    words = str(found.certified)
    assert "the head" in words
    assert "Not certified: the features" in words
    assert "must not be released" in words
    assert remove(model, (x, y), REMOVED, **QUIET).certified is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(epsilon=0.0), "epsilon must be a finite number > 0, got 0.0"),
        (dict(epsilon=-1.0), "epsilon must be"),
        (dict(epsilon=math.nan), "epsilon must be"),
        (dict(epsilon=math.inf), "epsilon must be"),
        (dict(delta=0.0), r"delta must be in \(0, 1\), got 0.0"),
        (dict(delta=1.0), "delta must be"),
        (dict(noise=0.0), "noise must be a finite number > 0"),
    ],
)
def test_certificates_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Certificate(**{"epsilon": 1.0, "delta": 1e-5, "noise": 0.1, **arguments})
    with pytest.raises(ValueError, match="removals must be an integer >= 1"):
        CLOSE.delta_after(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(weight_decay=0.0), "needs weight_decay > 0, got 0.0: without it the objective is not strongly convex"),
        (dict(line_search=False), "needs line_search=True"),
        (dict(layers="*"), "for the head alone"),
        (dict(steps=1, certificate=Certificate(1.0, 1e-5, 1e-6)), "not certified: after 1 steps the head is at most"),
        (dict(certificate=Certificate(1.0, 1e-9, 1e-12)), "F no longer falls after"),
    ],
)
def test_refusals(arguments, message):
    model, x, y = trained()
    with pytest.raises(ValueError, match=message):
        remove(model, (x, y), REMOVED, **{**QUIET, "certificate": CLOSE, **arguments})


def test_without_weight_decay_a_class_that_is_gone_is_refused_and_with_it_is_certified():
    """Nothing holds the row of a class without retained examples: its optimum is infinitely far."""
    model, x, y = trained()
    gone = (y == 0).nonzero()[:, 0]
    with pytest.raises(ValueError, match=r"head \(damping here: weight_decay \+ damping\) .* not positive definite"):
        remove(model, (x, y), gone, weight_decay=0.0, progress=False)
    with pytest.raises(ValueError, match=r"a certificate needs weight_decay > 0, got 0\.0"):
        remove(model, (x, y), gone, weight_decay=0.0, certificate=CLOSE, progress=False)
    found = remove(model, (x, y), gone, certificate=CLOSE, **QUIET)
    head = model[:2](x).detach(), y, *(parameter.detach() for parameter in model[2].parameters())
    best = optimal_head(*head, gone, weight_decay=WEIGHT_DECAY)
    apart = sum(float((found.moved[-2][f"2.{key}"] - value).square().sum()) for key, value in best.parameters.items())
    assert apart**0.5 <= found.certified.bound <= found.certified.distance


def test_other_certificates_and_shared_heads_are_refused():
    model, x, y = trained()
    with pytest.raises(TypeError, match=r"must be a fastif.Certificate, got tuple"):
        remove(model, (x, y), REMOVED, certificate=(1.0, 1e-5, 0.1), **QUIET)
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).double()
    tied[2].weight = tied[0].weight
    with pytest.raises(ValueError, match="serves elsewhere"):
        remove(tied, (x, y), REMOVED, certificate=CLOSE, **QUIET)
