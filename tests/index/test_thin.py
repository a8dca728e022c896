"""Queries of few columns: what they leave out, and when they are not made."""

import pytest
import torch

from fastif.index.factors import Factors
from fastif.index.metric import Metric
from fastif.index.reading import Asked, products
from fastif.index.thin import REST, Thin, share_of, thinned
from tests import reference
from tests.ops.test_factor_dots import error_bound, problem

PLAIN = Metric.without_basis((1, 1, 1), 1.0, torch.device("cpu"), torch.float32)
MANY = 10**6  # examples: enough that any saving pays


def falling(q: int, o: int, d: int, rate: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Matrices whose singular values fall by `rate`."""
    draw = torch.Generator().manual_seed(0)
    k = min(o, d)
    left, right = (torch.linalg.qr(torch.randn(q, s, k, generator=draw, dtype=torch.float64)).Q for s in (o, d))
    return ((left * rate ** torch.arange(k)) @ right.mT).to(dtype)


@pytest.mark.parametrize(("o", "d"), [(100, 200), (200, 100), (120, 120)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_left_out_is_within_the_stated_share(o, d, dtype):
    queries = falling(3, o, d, 0.5, dtype)
    (thin,) = thinned(queries, MANY)
    assert isinstance(thin, Thin)
    assert thin.left.dtype == thin.right.dtype == dtype
    assert thin.left.shape[2] == 16  # 0.5¹⁰ is REST: no fewer do, in steps of 16
    away = (thin.left.double() @ thin.right.double() - queries.double()).flatten(1).norm(dim=1)
    assert bool((away <= 1.001 * REST * queries.double().flatten(1).norm(dim=1)).all())
    assert share_of([thin]) == pytest.approx(16 * (o + d) / (o * d))


@pytest.mark.parametrize(
    ("queries", "n"),
    [
        (torch.randn(2, 100, 200, generator=torch.Generator().manual_seed(1)), MANY),  # no direction counts more
        (falling(2, 100, 200, 0.5), 1023),  # few examples
        (falling(2, 200, 400, 0.8), 1535),  # 48 directions take longer to find than they save
        (falling(2, 20, 200, 0.5), MANY),  # sixteen columns would be no less
        (falling(1, 100, 200, 0.5) * 3e38, MANY),  # sums on the way overflow
    ],
    ids=["flat", "few examples", "many directions", "narrow", "large"],
)
def test_whole_where_that_is_no_more_work(queries, n):
    (same,) = thinned(queries, n)
    assert isinstance(same, torch.Tensor)
    assert torch.equal(same, queries)
    assert share_of([same]) == 1


@pytest.mark.parametrize(("rate", "n", "width"), [(0.5, 1024, 16), (0.8, 1536, 48)])
def test_thin_from_as_many_examples_as_pay_for_the_directions(rate, n, width):
    (thin,) = thinned(falling(2, 200, 400, rate), n)
    assert isinstance(thin, Thin)
    assert thin.left.shape[2] == width


def test_the_query_that_overflows_is_named_thin_or_whole():
    """Thin ones overflow at other sizes than whole ones do: each is asked again as it was."""
    vectors = {name: torch.full((4, size), 127, dtype=torch.int8) for name, size in (("left", 100), ("right", 200))}
    factors = Factors(torch.ones(4, 1, dtype=torch.int32), **vectors, scale=torch.full((4,), 1e3))
    queries = torch.stack([torch.ones(100, 200), torch.full((100, 200), 1e30)])
    for runs in ([queries], thinned(queries, MANY)):
        assert isinstance(runs[0], Thin) == (runs[0] is not queries)
        with pytest.raises(ValueError, match="scores of query 4 are not finite in block 'w'"):
            products({"w": factors}, {"w": Asked(queries[:, None], PLAIN, runs)}, first=3)


def test_what_no_single_query_is_at_fault_for_is_said_as_it_is(monkeypatch):
    def dots(_, queries):
        if len(queries) > 1:
            raise ValueError("two at once")
        return torch.zeros(1, 4)

    monkeypatch.setattr(Factors, "dots", dots)
    nothing = torch.zeros(4, 1, dtype=torch.int8)
    factors = Factors(torch.ones(4, 1, dtype=torch.int32), nothing, nothing, None)
    with pytest.raises(ValueError, match="^two at once$"):
        products({"w": factors}, {"w": Asked(torch.zeros(2, 1, 1, 1), PLAIN)})


def test_no_queries():
    assert thinned(torch.zeros(0, 100, 200), MANY) == []
    assert share_of([]) == 1


def test_a_query_becomes_the_same_whatever_else_is_asked():
    flat = torch.randn(2, 100, 200, generator=torch.Generator().manual_seed(1))
    queries = torch.cat([falling(2, 100, 200, 0.5), flat, falling(1, 100, 200, 0.7), torch.zeros(1, 100, 200)])
    runs = thinned(queries, MANY)
    assert [len(run[0]) if isinstance(run, Thin) else len(run) for run in runs] == [2, 2, 1, 1]
    assert [isinstance(run, Thin) for run in runs] == [True, False, True, True]
    row = 0
    for run in runs:
        parts = [*zip(*run, strict=True)] if isinstance(run, Thin) else [(one,) for one in run]
        for part in parts:
            (alone,) = thinned(queries[row : row + 1], MANY)
            assert isinstance(alone, Thin) == isinstance(run, Thin)
            for mine, same in zip(part, alone if isinstance(alone, Thin) else (alone,), strict=True):
                assert torch.equal(mine, same[0])
            row += 1
    assert row == len(queries)


@pytest.mark.parametrize("q", [1, 4])
def test_products_with_thin_queries_err_by_no_more_than_what_is_left_out(q):
    given = problem(300, 2, 100, 200, q)
    queries = falling(q, 100, 200, 0.5)
    factors = Factors(given["ranks"][:, None], given["left"], given["right"], given["scale"])
    runs = thinned(queries, MANY)
    (thin,) = runs
    assert isinstance(thin, Thin)
    found, wanted = factors.dots_of_few(runs), reference.factor_dots(**given | {"queries": queries})
    rounding = error_bound(**given | {"queries": thin.left, "along": thin.right})
    left, right = (given[name].double().norm(dim=1) for name in ("left", "right"))
    owners = torch.arange(300).repeat_interleave(given["ranks"].long())
    norms = torch.zeros(300, dtype=torch.float64).index_add_(0, owners, left * right * given["scale"].abs())
    rest = 1.001 * REST * queries.double().flatten(1).norm(dim=1)[:, None] * norms
    assert bool(((found.double() - wanted).abs() <= rounding + rest).all())
    assert not torch.equal(found, factors.dots(queries[:, None]))
