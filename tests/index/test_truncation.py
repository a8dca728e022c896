"""What is kept of gradients, against dense singular value decompositions in float64."""

import os
import subprocess
import sys

import pytest
import torch

from fastif.curvature.eigenbasis import Eigenbasis
from fastif.index.factors import Factors
from fastif.index.metric import Metric
from fastif.index.truncation import squares_of, truncate
from fastif.model.gradients import Dense, Formed, OneHot


def metric(g, o, d, dtype=torch.float64):
    draw = torch.Generator().manual_seed(3)
    values = torch.rand((g, o, d), generator=draw, dtype=torch.float64).pow(4) * 10
    inverse = 1 / (values + 0.1)
    return Metric.of(Eigenbasis(values.to(dtype), inverse.to(dtype), lambda g: g), torch.device("cpu"), dtype)


def gradients(kind, g, n, t, o, d, dtype=torch.float64):
    draw = torch.Generator().manual_seed(4)
    a = torch.randn(g, n, t, d, generator=draw, dtype=torch.float64) * torch.rand(g, n, 1, 1, generator=draw).pow(6)
    u = torch.randn(g, n, t, o, generator=draw, dtype=torch.float64)
    if kind == "padded":
        u[:, : n // 2, t // 2 :] = 0
    if kind == "repeated":
        a[:, :, -1] = a[:, :, 0]
    dense = Dense(a.to(dtype), u.to(dtype))
    if kind == "table":
        places = torch.randint(0, o, (n, t), generator=draw)
        return OneHot(places, a[0].to(dtype), o)
    return Formed(dense.formed()) if kind == "formed" else dense


SHAPES = [
    ("factors", 1, 9, 3, 7, 8),
    ("padded", 1, 9, 6, 7, 8),
    ("repeated", 1, 9, 4, 7, 8),
    ("one position", 1, 9, 1, 7, 8),
    ("many positions", 1, 9, 12, 5, 8),
    ("groups", 3, 9, 2, 4, 6),
    ("groups, many positions", 3, 9, 7, 4, 2),
    ("formed", 2, 9, 3, 6, 5),
    ("a vector", 1, 9, 4, 1, 5),
]


def weighed(gradients, metric):
    return gradients.formed() * metric.rows[:, :, None] * metric.columns[:, None]


def restored(truncated, metric):
    """The matrices [n, g, o, d] that factors stand for."""
    factors = Factors(truncated.ranks, truncated.left, truncated.right, None)
    out = torch.zeros((len(factors), *metric.shape), dtype=truncated.right.dtype)
    for rows, formed in factors._formed(out):
        out[rows] = formed.view(-1, *metric.shape)
    return out


@pytest.mark.parametrize(("kind", "g", "n", "t", "o", "d"), SHAPES)
def test_factors_are_the_best_of_their_rank(kind, g, n, t, o, d):
    own, given = metric(g, o, d), gradients(kind, g, n, t, o, d)
    matrices = weighed(given, own)
    left, s, right = torch.linalg.svd(matrices, full_matrices=False)
    large = s[s > 1e-9 * s.max()].square()
    threshold = float(large.quantile(0.63)) / (o + d)
    truncated = truncate(given, own, threshold)
    keep = s.square() > threshold * (o + d)
    assert torch.equal(truncated.ranks.long(), keep.sum(2))
    best = (left * (s * keep)[..., None, :]) @ right
    torch.testing.assert_close(restored(truncated, own), best, rtol=1e-9, atol=1e-9 * float(s.max()))
    found = squares_of(given, own).sort(1, descending=True).values[:, : g * s.shape[2]]
    wanted = s.square().flatten(1).sort(1, descending=True).values[:, : found.shape[1]]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11 * float(wanted.max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "g", "n", "t", "o", "d"), SHAPES)
def test_without_a_threshold_nothing_is_lost(kind, g, n, t, o, d, dtype):
    own, given = metric(g, o, d, dtype), gradients(kind, g, n, t, o, d, dtype)
    wanted = weighed(given, own)
    away = (restored(truncate(given, own, 0.0), own) - wanted).flatten(1).norm(dim=1)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12  # sums are float64, factors of the dtype
    assert bool((away <= tolerance * wanted.flatten(1).norm(dim=1)).all())


def test_rows_of_a_table_are_kept_whole():
    own, given = metric(1, 11, 4), gradients("table", 1, 9, 6, 11, 4)
    rows = weighed(given, own)[:, 0]  # [n, o, d]
    squares = rows.square().sum(2)
    threshold = float(squares[squares > 0].median()) / 5
    factors = Factors.store(truncate(given, own, threshold), torch.float32)
    assert torch.equal(factors.ranks[:, 0].long(), (squares > 5 * threshold).sum(1))
    query = torch.randn(3, 1, 11, 4, dtype=torch.float64)
    wanted = (rows * (squares > 5 * threshold)[:, :, None]).flatten(1) @ query.flatten(1).T
    torch.testing.assert_close(factors.dots(query), wanted.T, rtol=1e-5, atol=1e-6)


def test_an_example_without_a_gradient_takes_no_factor():
    given = Dense(torch.zeros(1, 4, 3, 8), torch.randn(1, 4, 3, 7))
    truncated = truncate(given, metric(1, 7, 8, torch.float32), 0.0)
    assert int(truncated.ranks.sum()) == len(truncated.left) == len(truncated.right) == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
def test_stored_vectors_err_within_the_stated_bound(dtype):
    own, given = metric(1, 7, 8), gradients("factors", 1, 40, 3, 7, 8)
    exact = truncate(given, own, 0.0)
    stored = Factors.store(exact, dtype)
    assert stored.left.dtype == stored.right.dtype == dtype
    left, right = (x.double() for x in stored._vectors(slice(None), torch.zeros((), dtype=torch.float64)))
    products = left[:, :, None] * right[:, None]
    wanted = exact.left[:, :, None] * exact.right[:, None]
    share = {torch.int8: 1 / 254, torch.float16: 2**-11}[dtype]  # of the largest entry of either vector
    largest_left, largest_right = exact.left.abs().amax(1)[:, None, None], exact.right.abs().amax(1)[:, None, None]
    bound = share * (largest_left * exact.right.abs()[:, None] + exact.left.abs()[:, :, None] * largest_right)
    bound = bound + share**2 * largest_left * largest_right
    assert bool(((products - wanted).abs() <= bound * (1 + 1e-6)).all())
    assert bool((products != wanted).any())


def test_the_metric_is_a_product_with_the_sums_of_its_own():
    draw = torch.Generator().manual_seed(5)
    values = torch.rand((2, 6, 5), generator=draw, dtype=torch.float64).pow(3)
    inverse = 1 / (values + 0.01)
    own = Metric.of(Eigenbasis(values, inverse, lambda g: g), torch.device("cpu"), torch.float64)
    weights = values + values.mean((1, 2), keepdim=True) / 1000
    wanted = weights * weights * inverse.square()
    found = weights * (own.rows[:, :, None] * own.columns[:, None]).square()
    torch.testing.assert_close(found.sum(1), wanted.sum(1), rtol=1e-3, atol=0)
    torch.testing.assert_close(found.sum(2), wanted.sum(2), rtol=1e-3, atol=0)


@pytest.mark.parametrize("q", [1, 2, 30])
@pytest.mark.parametrize("g", [1, 2])
def test_few_queries_and_many_meet_the_same_factors(q, g):
    own, given = metric(g, 6, 9), gradients("factors", g, 12, 3, 6, 9)
    truncated = truncate(given, own, 1e-3)
    queries = torch.randn(q, g, 6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    wanted = queries.flatten(1) @ restored(truncated, own).flatten(1).T
    factors = Factors(truncated.ranks, truncated.left, truncated.right, None)
    torch.testing.assert_close(factors.dots(queries), wanted)
    some = torch.tensor([0, 3, 4, 11])
    torch.testing.assert_close(factors.select(some).dots(queries), wanted[:, some])


@pytest.mark.parametrize(("o", "d"), [(6, 9), (9, 6), (1, 5)])
def test_int8_factors_meet_queries_as_integers_within_the_stated_bound(monkeypatch, o, d):
    monkeypatch.setattr("fastif.index.factors._CACHED", 40)  # several pieces, the last one shorter
    truncated = truncate(gradients("factors", 1, 12, 3, o, d), metric(1, o, d), 1e-3)
    factors = Factors.store(truncated, torch.int8)
    queries = torch.randn(3, 1, o, d, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    queries[1, :, o // 2] = 0
    monkeypatch.setattr("fastif.index.factors._has_integer_products", lambda: False)
    exact = factors.dots(queries)
    monkeypatch.setattr("fastif.index.factors._has_integer_products", lambda: True)
    found = factors.dots(queries)
    left, right = (x.abs().double() for x in factors._vectors(slice(None), queries))
    largest = queries[:, 0].abs().amax(2 if o <= d else 1) / (254 * 127)  # steps of each row, or column
    each = left @ largest.T * right.sum(1)[:, None] if o <= d else right @ largest.T * left.sum(1)[:, None]
    owners = torch.arange(12).repeat_interleave(factors.ranks[:, 0].long())
    bound = torch.zeros_like(exact).index_add_(1, owners, each.T / 2)
    assert bool(((found - exact).abs() <= bound * (1 + 1e-9)).all())
    assert bool((found != exact).any())
    assert bool((exact[1] != 0).any()) == (o > 1)


def test_a_block_of_one_number_meets_queries_as_floats(monkeypatch):
    # torch's product of int8 [f, 1] and [1, k] returns memory that was never written.
    monkeypatch.setattr("fastif.index.factors._has_integer_products", lambda: True)
    factors = Factors.store(truncate(gradients("factors", 1, 12, 3, 1, 1), metric(1, 1, 1), 0), torch.int8)
    queries = torch.randn(3, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    left, right = factors._vectors(slice(None), queries)
    torch.testing.assert_close(factors.dots(queries), queries.flatten(1) @ (left * right).T)


@pytest.mark.slow
@pytest.mark.parametrize("most", ["AVX512_CORE", "AVX2"])
def test_integers_are_not_multiplied_where_torch_is_told_to_do_without_the_instructions(most):
    code = "from fastif.index.factors import _has_integer_products as has; print(has())"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": most}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
