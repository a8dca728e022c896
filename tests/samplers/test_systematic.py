"""Systematic sampling by inclusion probabilities (docs/math.md (9), (11)), and the samplers that draw so."""

from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastif.samplers import logit
from fastif.samplers.importance import _curvature_traces, _ridge_norms
from fastif.samplers.systematic import inclusion_probabilities
from tests.helpers.sampling import Problem, importance, problem

pytestmark = pytest.mark.usefixtures("one_thread")


def water_filled(shares: list[float], k: int) -> list[float]:
    """min(1, alpha s_i) with sum k: cap at 1 what exceeds it and rescale the rest, until nothing does."""
    capped: set[int] = set()
    while True:
        free = [i for i in range(len(shares)) if i not in capped]
        total = sum(Fraction(shares[i]) for i in free)
        over = {i for i in free if (k - len(capped)) * Fraction(shares[i]) > total}
        if not over:
            pi = dict.fromkeys(capped, 1.0)
            pi.update({i: float((k - len(capped)) * Fraction(shares[i]) / total) for i in free})
            return [pi[i] for i in range(len(shares))]
        capped |= over


@settings(max_examples=100, deadline=None)
@given(
    shares=st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=60),
    data=st.data(),
)
def test_inclusion_probabilities_sum_to_k_exactly(shares, data):
    k = data.draw(st.integers(1, len(shares)))
    pi = inclusion_probabilities(torch.tensor(shares, dtype=torch.float64), k)
    assert sum(map(Fraction, pi.tolist())) == k
    assert 0 < pi.min() <= pi.max() <= 1
    np.testing.assert_allclose(pi.numpy(), water_filled(shares, k), rtol=1e-9, atol=len(shares) * 2.0**-47)


def test_inclusion_probabilities_of_equal_shares_are_equal():
    assert torch.equal(inclusion_probabilities(torch.ones(8), 4), torch.full((8,), 0.5, dtype=torch.float64))
    pi = inclusion_probabilities(torch.ones(3), 2)
    assert sum(map(Fraction, pi.tolist())) == 2
    assert (pi - 2 / 3).abs().max() < 1e-14


def test_inclusion_probabilities_under_extreme_shares():
    for shares in ([1e300, 1e-300, 1e-300], [1.0, 5e-324], [1e-320] * 3, [1.0] + [1e-30] * 999):
        for k in range(1, min(len(shares), 5)):
            pi = inclusion_probabilities(torch.tensor(shares, dtype=torch.float64), k)
            assert sum(map(Fraction, pi.tolist())) == k
            assert 0 < pi.min() <= pi.max() <= 1


def shares_by_hand(data: Problem, sampler) -> torch.Tensor:
    p = data.logits.double().softmax(1)
    u = 1 - p.square().sum(1)
    n = len(u)
    if sampler is not logit:
        a = torch.cat([data.features.double(), torch.ones(n, 1, dtype=torch.float64)], 1)
        if sampler.keywords["kind"] == "trace":
            u = u * a.square().sum(1)
        else:
            inverse = torch.linalg.inv(a.T @ (u[:, None] * a) / n + 1e-2 * torch.eye(a.shape[1], dtype=torch.float64))
            u = u * torch.einsum("ij,jk,ik->i", a, inverse, a)
    return 0.9 * u / u.sum() + 0.1 / n


@importance
def test_weights_are_inverse_inclusion_probabilities(sampler):
    data = problem(80, confidence=6.0)
    for k in (1, 7, 40, 79):
        pi = inclusion_probabilities(shares_by_hand(data, sampler), k)
        subset = data.draw(partial(sampler, k=k))
        torch.testing.assert_close(subset.weights, 1 / (80 * pi[subset.indices]), rtol=1e-9, atol=0)
        assert subset.weights.max() <= 10 / k * (1 + 1e-9)
        plain = data.draw(partial(sampler, k=k, weighted=False))
        assert torch.equal(plain.indices, subset.indices)
        assert plain.weights.tolist() == [1 / k] * k


@importance
def test_examples_are_included_with_their_probability_and_sums_are_unbiased(sampler):
    data = problem(30, confidence=4.0, seed=1)
    x = data.features.double().square().sum(1) * 10 ** torch.linspace(-1, 1, 30)  # nothing to do with the shares
    draws = 3000
    included = torch.zeros(30, dtype=torch.float64)
    sums = []
    for seed in range(draws):
        subset = data.draw(partial(sampler, k=6), seed)
        included[subset.indices] += 1
        sums.append(float((subset.weights * x[subset.indices]).sum()))
    pi = inclusion_probabilities(shares_by_hand(data, sampler), 6)
    deviation = (included / draws - pi) / (pi * (1 - pi) / draws).sqrt().clamp(min=1e-9)
    assert deviation.abs().max() < 4.5
    assert abs(np.mean(sums) - float(x.mean())) < 4 * np.std(sums) / draws**0.5


@importance
def test_each_class_gets_its_expected_number_of_picks_rounded_up_or_down(sampler):
    data = problem(90, confidence=3.0, seed=2)
    classes = data.labels if sampler is logit else data.logits.argmax(1)
    pi = inclusion_probabilities(shares_by_hand(data, sampler), 17)
    expected = torch.zeros(4, dtype=torch.float64).index_add_(0, classes, pi)
    for seed in range(100):
        picks = torch.bincount(classes[data.draw(partial(sampler, k=17), seed).indices], minlength=4)
        assert ((picks - expected).abs() < 1).all()


@importance
def test_without_any_uncertainty_the_shares_are_uniform(sampler):
    certain = problem(20)._replace(logits=1000 * torch.nn.functional.one_hot(torch.arange(20) % 4).float())
    subset = certain.draw(partial(sampler, k=5))
    torch.testing.assert_close(subset.weights, torch.full((5,), 1 / 5, dtype=torch.float64), rtol=1e-12, atol=0)


def test_uncertainty_keeps_its_digits_when_the_model_is_confident():
    logits = torch.tensor([[40.0, 0.0, 0.0], [50.0, 0.0, 0.0]])  # 1 - sum(p^2) would be 0 in float64
    # u is close to 2 (1 - p_top) = 4 exp(-z): the ratio of the two is exp(10)
    u = _curvature_traces(logits)
    torch.testing.assert_close(u, 4 * torch.tensor([-40.0, -50.0], dtype=torch.float64).exp(), rtol=1e-12, atol=0)


def test_ridge_leverage_is_below_the_exact_one():
    data, damping = problem(40, d=3, c=3), 1e-2
    n, a = 40, torch.nn.functional.pad(data.features.double(), (0, 1), value=1.0)
    p = data.logits.double().softmax(1)
    blocks = torch.stack(
        [torch.kron(torch.diag(p[i]) - torch.outer(p[i], p[i]), torch.outer(a[i], a[i])) for i in range(n)]
    )
    inverse = torch.linalg.inv(blocks.mean(0) + damping * torch.eye(blocks.shape[1], dtype=torch.float64))
    exact = torch.einsum("ijk,kj->i", blocks, inverse)
    traces = 1 - p.square().sum(1)
    bound = traces * _ridge_norms(data.features, traces, damping)
    assert (bound <= exact * (1 + 1e-9)).all()
    assert bound.sum() / n <= 4  # the effective dimension of a d + 1 = 4 dimensional problem
