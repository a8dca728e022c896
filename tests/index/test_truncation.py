"""What is kept of gradients, against dense singular value decompositions in float64."""

import pytest
import torch

from fastif.curvature.eigenbasis import Eigenbasis
from fastif.index.factors import Factors
from fastif.index.metric import Metric
from fastif.index.truncation import squares_of, truncate
from fastif.model.gradients import Dense, Formed, OneHot
from tests.ops.test_factor_dots import error_bound


def metric(g, o, d, dtype=torch.float64):
    draw = torch.Generator().manual_seed(3)
    values = torch.rand((g, o, d), generator=draw, dtype=torch.float64).pow(4) * 10
    inverse = 1 / (values + 0.1)
    return Metric.of(Eigenbasis(values.to(dtype), inverse.to(dtype)), torch.device("cpu"), dtype)


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
    own = Metric.of(Eigenbasis(values, inverse), torch.device("cpu"), torch.float64)
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


@pytest.mark.parametrize(("o", "d"), [(6, 9), (9, 6), (1, 5), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_int8_factors_meet_few_queries_within_the_stated_bound(o, d, dtype):
    truncated = truncate(gradients("factors", 1, 12, 3, o, d), metric(1, o, d), 1e-3)
    factors = Factors.store(truncated, torch.int8)
    queries = torch.randn(3, 1, o, d, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    queries[1, :, o // 2] = 0
    queries = queries.to(dtype)
    found, exact = factors.dots(queries), torch.zeros(3, 12, dtype=torch.float64)
    factors._add_products(exact, queries[:, 0].double())
    assert found.dtype == dtype
    given = {"left": factors.left, "right": factors.right, "ranks": factors.ranks[:, 0], "scale": factors.scale}
    bound = error_bound(**given, queries=queries[:, 0].float())
    assert bool(((found - exact).abs() <= bound).all())
    assert bool((exact[1] != 0).any()) == (o > 1)


@pytest.mark.parametrize("q", [1, 40])  # by factors, and by formed matrices
@pytest.mark.parametrize("stored", [torch.int8, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["factors", "table"])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_products_with_16_bit_queries_are_not_held_by_16_bits(kind, stored, q, half):
    given = gradients(kind, 1, 12, 3, 6, 9)
    factors = Factors.store(truncate(given, metric(1, 6, 9), 0), stored)
    queries = torch.full((q, 1, 6, 9), 6e4, dtype=half)
    found = factors.dots(queries)
    assert found.dtype == torch.float32
    assert bool(found.isfinite().all())
    assert float(found.abs().max()) > 65504
    torch.testing.assert_close(found.double(), factors.dots(queries.double()), rtol=1e-4, atol=1e-4 * 6e4)
