"""Each sampler against its definition (docs/math.md (4), (7), (9) to (12)), replayed here by the plainest means."""

import inspect
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastif import samplers
from fastif.samplers import (
    Subset,
    certified,
    check_subset,
    draw,
    intermediate_distance,
    k_center,
    k_center_by_class,
    leverage,
    logit,
    prefix,
    random,
    stratified,
)
from fastif.systematic import inclusion_probabilities


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of draws from tiny data: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Problem(NamedTuple):
    features: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor

    def draw(self, sampler, seed: int = 0) -> Subset:
        return draw(sampler, **self._asdict(), generator=seeded(seed))


def problem(n: int = 60, d: int = 5, c: int = 4, seed: int = 0, confidence: float = 2.0) -> Problem:
    g = seeded(seed)
    features = torch.randn(n, d, generator=g)
    logits = confidence * torch.randn(n, c, generator=g)
    labels = torch.randint(c, (n,), generator=g)
    return Problem(features, logits, labels)


WEIGHTED = {
    "random": random,
    "prefix": prefix,
    "stratified": stratified,
    "intermediate_distance": intermediate_distance,
    "k_center": k_center,
    "k_center-cosine": partial(k_center, metric="cosine"),
    "k_center_by_class": k_center_by_class,
    "logit": logit,
    "leverage-trace": partial(leverage, kind="trace"),
    "leverage-ridge": partial(leverage, kind="ridge", damping=1e-2),
    "certified": certified,
}
IMPORTANCE = {key: WEIGHTED[key] for key in ("logit", "leverage-trace", "leverage-ridge")}
weighted = pytest.mark.parametrize("sampler", WEIGHTED.values(), ids=WEIGHTED)
importance = pytest.mark.parametrize("sampler", IMPORTANCE.values(), ids=IMPORTANCE)


# -------------------------------------------------------------------------------------------------------- every sampler


@weighted
@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), d=st.integers(1, 6), c=st.integers(1, 5), seed=st.integers(0, 10**6), data=st.data())
def test_every_sampler_returns_k_distinct_examples_with_valid_weights(sampler, n, d, c, seed, data):
    k = data.draw(st.integers(1, n))
    subset = problem(n, d, c, seed).draw(partial(sampler, k=k), seed)  # draw() checks the rules of a subset
    assert len(subset.indices) == k
    assert subset.indices.dtype == torch.int64
    assert subset.weights.dtype == torch.float64


@weighted
@pytest.mark.parametrize("n", [1, 2, 37])
def test_the_whole_set_weighs_one_over_n_each_exactly(sampler, n):
    subset = problem(n).draw(partial(sampler, k=n))
    assert sorted(subset.indices.tolist()) == list(range(n))
    assert torch.equal(subset.weights, torch.full((n,), 1 / n, dtype=torch.float64))


@weighted
def test_the_generator_alone_decides(sampler):
    data = problem(200, seed=3)
    sampler = partial(sampler, k=20)
    torch.manual_seed(0)
    first = data.draw(sampler, seed=5)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    again = data.draw(sampler, seed=5)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched
    assert torch.equal(first.indices, again.indices)
    assert torch.equal(first.weights, again.weights)
    if "generator" in inspect.signature(sampler).parameters:
        assert len({tuple(data.draw(sampler, seed=s).indices.tolist()) for s in range(5)}) == 5


@weighted
def test_the_number_of_threads_does_not_matter(sampler):
    data = problem(3000, d=40, c=10, seed=4)
    sampler = partial(sampler, k=100)
    subsets = []
    for count in (1, 2):
        torch.set_num_threads(count)
        subsets.append(data.draw(sampler))
    assert torch.equal(subsets[0].indices, subsets[1].indices)
    torch.testing.assert_close(subsets[0].weights, subsets[1].weights, rtol=1e-12, atol=0)


@weighted
def test_rows_are_walked_in_blocks_without_a_trace(sampler, monkeypatch):
    data = problem(100, seed=5)
    whole = data.draw(partial(sampler, k=9))
    monkeypatch.setattr("fastif.subset._BLOCK", 7)
    blocks = data.draw(partial(sampler, k=9))
    assert torch.equal(whole.indices, blocks.indices)
    torch.testing.assert_close(whole.weights, blocks.weights, rtol=1e-12, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@weighted
def test_the_device_does_not_matter(sampler):
    data = problem(3000, d=40, c=10, seed=4)
    sampler = partial(sampler, k=100)
    cpu, cuda = data.draw(sampler), Problem(*(x.cuda() for x in data)).draw(sampler)
    assert cuda.indices.device.type == cuda.weights.device.type == "cpu"
    assert torch.equal(cpu.indices, cuda.indices)
    assert torch.equal(cpu.weights, cuda.weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@weighted
def test_any_float_dtype_is_read_exactly(sampler, dtype):
    data = problem(80)
    narrow = Problem(data.features.to(dtype), data.logits.to(dtype), data.labels.int())
    wide = Problem(narrow.features.double(), narrow.logits.double(), data.labels)
    if sampler is WEIGHTED["k_center-cosine"] and dtype != torch.float64:
        pytest.skip("unit rows are rounded to the dtype of the points")
    first, second = narrow.draw(partial(sampler, k=8)), wide.draw(partial(sampler, k=8))
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.weights, second.weights)


# ------------------------------------------------------------------------------------------- random, prefix, stratified


def test_random_picks_every_set_equally_often():
    draws = torch.stack([random(4, 2, generator=seeded(s)).indices for s in range(3000)])
    counts = torch.bincount(draws[:, 0] * 4 + draws[:, 1], minlength=16)[[1, 2, 3, 6, 7, 11]].double()
    assert counts.sum() == 3000
    assert ((counts - 500) ** 2 / 500).sum() < 20.5  # chi-square with 5 degrees of freedom, p = 0.001


def test_prefix_is_the_first_k():
    subset = prefix(10, 4)
    assert subset.indices.tolist() == [0, 1, 2, 3]
    assert subset.weights.tolist() == [0.25] * 4


def allocation_by_hand(labels: list[int], k: int) -> dict[int, int]:
    classes = sorted(set(labels))
    quota = {c: Fraction(k * labels.count(c), len(labels)) for c in classes}
    picks = {c: int(quota[c]) for c in classes}
    by_remainder = sorted(classes, key=lambda c: (-(quota[c] - picks[c]), c))
    for c in by_remainder[: k - sum(picks.values())]:
        picks[c] += 1
    return picks


@settings(max_examples=100, deadline=None)
@given(labels=st.lists(st.integers(0, 6).map(lambda c: c**5), min_size=1, max_size=50), data=st.data())
def test_stratified_allocates_by_largest_remainder_and_weighs_by_class_share(labels, data):
    k = data.draw(st.integers(1, len(labels)))
    picks = allocation_by_hand(labels, k)
    represented = sum(labels.count(c) for c in picks if picks[c])
    for subset in (
        stratified(torch.tensor(labels), k, generator=seeded(k)),
        intermediate_distance(torch.randn(len(labels), 2, generator=seeded(k)), torch.tensor(labels), k),
    ):
        chosen = [labels[i] for i in subset.indices.tolist()]
        assert {c: chosen.count(c) for c in picks} == picks
        for c, count in picks.items():
            mass = sum(w for w, label in zip(subset.weights.tolist(), chosen, strict=True) if label == c)
            assert mass == pytest.approx(labels.count(c) / represented if count else 0)
        assert float(subset.weights.sum()) == pytest.approx(1)


def test_stratified_is_uniform_within_a_class():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    counts = sum(torch.bincount(stratified(labels, 4, generator=seeded(s)).indices, minlength=8) for s in range(2000))
    assert (counts - 1000).abs().max() < 100  # 4.5 standard deviations of Binomial(2000, 1/2)


# ------------------------------------------------------------------------------------------------ intermediate distance


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 30), d=st.integers(1, 4), c=st.integers(1, 4), seed=st.integers(0, 10**6), data=st.data())
def test_intermediate_distance_keeps_the_middle_band_of_each_class(n, d, c, seed, data):
    k = data.draw(st.integers(1, n))
    # Small integers: distances are exact, and ties and duplicates are frequent.
    features = torch.randint(-3, 4, (n, d), generator=seeded(seed)).double()
    labels = torch.randint(c, (n,), generator=seeded(seed + 1))
    x, y = features.numpy(), labels.tolist()
    expected = []
    for label, k_c in allocation_by_hand(y, k).items():
        members = [i for i in range(n) if y[i] == label]
        prototype = np.median(x[members], axis=0)
        ranked = sorted(members, key=lambda i: (((x[i] - prototype) ** 2).sum(), i))
        first = (len(members) - k_c) // 2
        expected += ranked[first : first + k_c]
    subset = intermediate_distance(features, labels, k)
    assert subset.indices.tolist() == sorted(expected)
    plain = intermediate_distance(features, labels, k, weighted=False)
    assert torch.equal(plain.indices, subset.indices)
    assert plain.weights.tolist() == [1 / k] * k


# -------------------------------------------------------------------------------------------------- systematic sampling


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
    u = samplers._curvature_traces(logits)
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
    bound = traces * samplers._ridge_norms(data.features, traces, damping)
    assert (bound <= exact * (1 + 1e-9)).all()
    assert bound.sum() / n <= 4  # the effective dimension of a d + 1 = 4 dimensional problem


# ------------------------------------------------------------------------------------------------------------ certified


def ggn_blocks(features: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The last layer's G_i, one dense matrix per example."""
    a = torch.nn.functional.pad(features.double(), (0, 1), value=1.0)
    p = logits.double().softmax(1)
    h = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("iab,ij,ik->iajbk", h, a, a).reshape(len(a), a.shape[1] * p.shape[1], -1)


@pytest.mark.parametrize("confidence", [0.1, 2.0, 20.0])
@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.1, 0.5, 0.99])
def test_certified_bounds_the_error_with_as_few_examples_as_can_be(confidence, tolerance):
    data = problem(50, d=3, c=3, confidence=confidence)
    blocks = ggn_blocks(data.features, data.logits)
    traces = blocks.diagonal(dim1=1, dim2=2).sum(1)
    subset = certified(data.features, data.logits, tolerance)
    error = blocks.mean(0) - torch.einsum("i,ijk->jk", subset.weights, blocks[subset.indices])
    assert float(torch.linalg.matrix_norm(error, 2)) <= subset.bound * (1 + 1e-9) + 1e-15
    assert subset.bound == pytest.approx(float(error.trace()), rel=1e-6, abs=1e-12)
    assert subset.bound <= tolerance * float(traces.mean()) * (1 + 1e-9)
    assert subset.weights.tolist() == [1 / 50] * len(subset.indices)
    # No set with one example less is good enough: not even the one of the largest traces.
    fewer = len(subset.indices) - 1
    if fewer:
        assert float(traces.sort(descending=True).values[fewer:].sum()) > tolerance * float(traces.sum()) * (1 - 1e-9)
    assert set(subset.indices.tolist()) == set(traces.argsort(descending=True)[: fewer + 1].tolist())


def test_certified_bound_is_attained_by_one_example_left_out_of_two_classes():
    features, logits = torch.tensor([[3.0], [1.0]]), torch.zeros(2, 2)
    subset = certified(features, logits, k=1)
    error = ggn_blocks(features, logits)[1] / 2
    assert float(torch.linalg.matrix_norm(error, 2)) == pytest.approx(subset.bound, rel=1e-12)


def test_certified_takes_ties_from_the_front_and_k_largest():
    features, logits = torch.ones(6, 2), torch.zeros(6, 3)
    assert certified(features, logits, k=2).indices.tolist() == [0, 1]
    assert certified(features, logits, 0.5).indices.tolist() == [0, 1, 2]  # half of the trace left out, exactly
    assert certified(features, logits, 0.0).indices.tolist() == list(range(6))
    features[4] = 2.0
    assert certified(features, logits, k=2).indices.tolist() == [0, 4]


def test_certified_of_a_model_without_any_uncertainty_is_one_example():
    subset = certified(torch.ones(5, 2), torch.tensor([[2000.0, 0.0]] * 5), 0.1)
    assert subset.indices.tolist() == [0]
    assert subset.bound == 0.0


# ----------------------------------------------------------------------------------------------------------------- draw


def test_draw_passes_what_the_signature_names():
    data = problem()
    assert data.draw(partial(random, k=4)).indices.tolist() == random(60, 4, generator=seeded(0)).indices.tolist()
    on_logits = data.draw(partial(k_center, points=data.logits, k=4))
    assert torch.equal(on_logits.indices, k_center(data.logits, 4, generator=seeded(0)).indices)
    bound_seed = partial(logit, k=5, generator=seeded(7))
    assert torch.equal(data.draw(bound_seed).indices, logit(data.logits, data.labels, 5, generator=seeded(7)).indices)
    assert data.draw(partial(certified, tolerance=0.2)).indices.numel() < 60

    class FirstAndLast:
        def __call__(self, n, *, labels=None, **anything):
            assert labels is None
            assert not anything
            return Subset(torch.tensor([0, n - 1]), torch.tensor([0.5, 0.5]))

    subset = draw(FirstAndLast(), features=data.features, logits=data.logits)
    assert subset.indices.tolist() == [0, 59]
    assert subset.weights.dtype == torch.float64


def test_draw_says_what_is_missing():
    data = problem()
    with pytest.raises(ValueError, match=r"draw: random needs k, which is none of n, features, .*partial\(random, k="):
        data.draw(random)
    with pytest.raises(ValueError, match="draw: logit needs labels, and the data has none"):
        data._replace(labels=None).draw(partial(logit, k=3))
    with pytest.raises(ValueError, match=r"subset: indices must be in \[0, n=60\), got 60"):
        data.draw(lambda n: Subset(torch.tensor([n]), torch.ones(1)))
    with pytest.raises(TypeError, match="subset: must have indices and weights, got list"):
        data.draw(lambda: [1, 2])


# --------------------------------------------------------------------------------------------------------------- errors


def test_check_subset_accepts_any_object_with_indices_and_weights():
    class Mine:
        indices = np.array([4, 2])
        weights = (0.25, 0.75)

    subset = check_subset(Mine(), 5)
    assert subset.indices.tolist() == [4, 2]
    assert subset.weights.tolist() == [0.25, 0.75]
    assert subset.weights.dtype == torch.float64
    whole = certified(torch.ones(3, 1), torch.zeros(3, 2), k=2)
    assert torch.equal(check_subset(whole, 3).indices, whole.indices)


@pytest.mark.parametrize(
    ("indices", "weights", "error", "message"),
    [
        ([[0]], [1.0], ValueError, r"subset: indices must be \[k\], got shape \[1, 1\]"),
        ([], [], ValueError, "subset: indices must not be empty"),
        ([0.0], [1.0], TypeError, "subset: indices must be int64, got torch.float32"),
        ([0, 3], [0.5, 0.5], ValueError, r"subset: indices must be in \[0, n=3\), got 3"),
        ([-1], [1.0], ValueError, r"subset: indices must be in \[0, n=3\), got -1"),
        ([2, 1, 2], [0.1] * 3, ValueError, "subset: indices must be distinct, 2 appears more than once"),
        ([0, 1], [1.0], ValueError, r"subset: weights must be \[k=2\], got shape \[1\]"),
        ([0, 1], [1, 1], TypeError, "subset: weights must be floating point, got torch.int64"),
        ([0, 1], [1.0, -0.5], ValueError, "subset: weights must be finite and >= 0, entry 1 is -0.5"),
        ([0, 1], [float("nan"), 1.0], ValueError, "subset: weights must be finite and >= 0, entry 0 is nan"),
        ([0, 1], [1.0, float("inf")], ValueError, "subset: weights must be finite and >= 0, entry 1 is inf"),
    ],
)
def test_check_subset_names_the_broken_rule(indices, weights, error, message):
    with pytest.raises(error, match=message):
        check_subset(Subset(torch.tensor(indices), torch.tensor(weights)), 3)


X, Z, Y = torch.ones(3, 2), torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
TAKES_K = {
    "random": partial(random, 3),
    "prefix": partial(prefix, 3),
    "stratified": partial(stratified, Y),
    "intermediate_distance": partial(intermediate_distance, X, Y),
    "k_center": partial(k_center, X),
    "k_center_by_class": partial(k_center_by_class, X, Y),
    "logit": partial(logit, Z, Y),
    "leverage": partial(leverage, X, Z),
    "certified": lambda k: certified(X, Z, k=k),
    "inclusion_probabilities": partial(inclusion_probabilities, torch.ones(3)),
}


@pytest.mark.parametrize("name", TAKES_K)
def test_k_is_an_integer_from_one_to_n(name):
    for k in (0, -1, 4):
        with pytest.raises(ValueError, match=rf"{name}: k must be in \[1, n=3\], got k={k}"):
            TAKES_K[name](k)
    for k, kind in ((1.0, "float"), (True, "bool"), ("2", "str")):
        with pytest.raises(TypeError, match=f"{name}: k must be an integer, got {kind}"):
            TAKES_K[name](k)
    TAKES_K[name](np.int64(2))


def spoiled(x: torch.Tensor, row: int, value: float) -> torch.Tensor:
    x = x.clone()
    x[row, -1] = value
    return x


MATRICES = {
    "intermediate_distance: features": (lambda x: intermediate_distance(x, Y, 1), "d"),
    "k_center_by_class: points": (lambda x: k_center_by_class(x, Y, 1), "d"),
    "logit: logits": (lambda x: logit(x, Y, 1), "c"),
    "leverage: features": (lambda x: leverage(x, Z, 1), "d"),
    "leverage: logits": (lambda x: leverage(X, x, 1), "c"),
    "certified: features": (lambda x: certified(x, Z, k=1), "d"),
    "certified: logits": (lambda x: certified(X, x, k=1), "c"),
}


@pytest.mark.parametrize("what", MATRICES)
def test_matrices_are_checked_and_the_row_is_named(what):
    call, columns = MATRICES[what]
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match=f"{what} must be finite, row 2 holds NaN or Inf"):
            call(spoiled(X, 2, value))
    with pytest.raises(ValueError, match=rf"{what} must be \[n, {columns}\], got shape \[3\]"):
        call(torch.ones(3))
    with pytest.raises(ValueError, match=rf"{what} must have at least one row and one column, got shape \[0, 2\]"):
        call(torch.ones(0, 2))
    with pytest.raises(ValueError, match=rf"{what} must have at least one row and one column, got shape \[3, 0\]"):
        call(torch.ones(3, 0))
    with pytest.raises(TypeError, match=f"{what} must be a floating-point tensor, got torch.int64"):
        call(torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=f"{what} must be a floating-point tensor, got ndarray"):
        call(np.ones((3, 2)))
    name = what.replace(": ", r": \|") + r"\|"
    with pytest.raises(ValueError, match=rf"{name} must be at most 1e\+140 \(squares overflow\), got 1e\+141"):
        call(spoiled(X.double(), 0, -1e141))
    call(spoiled(X, 0, 3e38))  # finite, although a row of such sums to more than float32 can hold
    call(spoiled(X.double(), 0, 1e140))


LABELLED = {
    "stratified": lambda y: stratified(y, 1),
    "intermediate_distance": lambda y: intermediate_distance(X, y, 1),
    "k_center_by_class": lambda y: k_center_by_class(X, y, 1),
    "logit": lambda y: logit(Z, y, 1),
}


@pytest.mark.parametrize("name", LABELLED)
def test_labels_are_checked_and_the_row_is_named(name):
    call = LABELLED[name]
    with pytest.raises(TypeError, match=f"{name}: labels must be an integer tensor, got torch.float32"):
        call(torch.zeros(3))
    with pytest.raises(TypeError, match=f"{name}: labels must be an integer tensor, got torch.bool"):
        call(torch.zeros(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=f"{name}: labels must be an integer tensor, got list"):
        call([0, 1, 2])
    with pytest.raises(ValueError, match=rf"{name}: labels must be \[n\], got shape \[3, 1\]"):
        call(Y[:, None])
    with pytest.raises(ValueError, match=f"{name}: labels must not be empty"):
        call(Y[:0])
    with pytest.raises(ValueError, match=rf"{name}: labels must be .*0.*, row 1 is -1"):
        call(torch.tensor([0, -1, 0]))
    if name != "stratified":
        with pytest.raises(ValueError, match=f"{name}: labels must have n=3 entries, got 2"):
            call(Y[:2])


def test_other_rules():
    with pytest.raises(ValueError, match=r"logit: labels must be in \[0, c=4\), row 2 is 4"):
        logit(Z, torch.tensor([0, 1, 4]), 1)
    with pytest.raises(ValueError, match="leverage: logits must have n=3 rows, got 2"):
        leverage(X, Z[:2], 1)
    with pytest.raises(ValueError, match="certified: logits must have n=3 rows, got 2"):
        certified(X, Z[:2], 0.1)
    with pytest.raises(ValueError, match="leverage: kind must be 'trace' or 'ridge', got 'row'"):
        leverage(X, Z, 1, kind="row")
    for damping in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"leverage: damping must be finite and > 0, got {damping}"):
            leverage(X, Z, 1, kind="ridge", damping=damping)
    with pytest.raises(ValueError, match=r"leverage: .* is not positive definite at row 1: damping=1e-12 .* would do"):
        leverage(torch.full((3, 2), 1e6), Z, 1, kind="ridge", damping=1e-12)
    for tolerance in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"certified: tolerance must be in \[0, 1\), got {tolerance}"):
            certified(X, Z, tolerance)
    with pytest.raises(ValueError, match="certified: give exactly one of tolerance and k, got tolerance=None, k=None"):
        certified(X, Z)
    with pytest.raises(ValueError, match=r"certified: give exactly one of tolerance and k, got tolerance=0\.1, k=2"):
        certified(X, Z, 0.1, k=2)
    for shares in ([1.0, 0.0], [1.0, float("nan")], [1.0, -1.0]):
        with pytest.raises(ValueError, match="inclusion_probabilities: shares must be finite and > 0, got"):
            inclusion_probabilities(torch.tensor(shares), 1)
    with pytest.raises(ValueError, match=r"inclusion_probabilities: shares must be \[n\], got shape \[1, 2\]"):
        inclusion_probabilities(torch.ones(1, 2), 1)
    with pytest.raises(ValueError, match="prefix: n must be >= 1, got n=0"):
        prefix(0, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_generator_is_refused():
    with pytest.raises(ValueError, match="random: generator must be a CPU generator, got one on cuda"):
        random(3, 1, generator=torch.Generator("cuda"))
