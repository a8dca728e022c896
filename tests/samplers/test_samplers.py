"""Each sampler against its definition (docs/math.md (4), (7), (9) to (12)), replayed here by the plainest means."""

import inspect
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastif.samplers import (
    Subset,
    certified,
    draw,
    intermediate_distance,
    k_center,
    logit,
    prefix,
    random,
    stratified,
)
from tests.helpers.sampling import WEIGHTED, Problem, problem, seeded, weighted

pytestmark = pytest.mark.usefixtures("one_thread")

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
    subsets, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            subsets.append(data.draw(sampler))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(subsets[0].indices, subsets[1].indices)
    torch.testing.assert_close(subsets[0].weights, subsets[1].weights, rtol=1e-12, atol=0)


@weighted
def test_rows_are_walked_in_blocks_without_a_trace(sampler, monkeypatch):
    data = problem(100, seed=5)
    whole = data.draw(partial(sampler, k=9))
    monkeypatch.setattr("fastif.samplers.subset._BLOCK", 7)
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
