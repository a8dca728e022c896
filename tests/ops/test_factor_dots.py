import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastif.ops import _library, build_info, factor_dots
from tests import reference

NAMES = ["left", "right", "ranks", "queries", "scale"]
KERNELS = ["vnni", "avx512", "avx2", "generic"]


def problem(n: int, most: int, o: int, d: int, q: int, seed: int = 0, extremes: bool = False) -> dict[str, Tensor]:
    """Examples of no to `most` factors each; with extremes, all entries ±127 and signs that let products add up."""
    g = torch.Generator().manual_seed(seed)
    ranks = torch.randint(0, most + 1, (n,), generator=g).int()
    f = int(ranks.sum())
    left, right = (torch.randint(-127, 128, (f, size), generator=g).to(torch.int8) for size in (o, d))
    queries, scale = torch.randn(q, o, d, generator=g), torch.rand(f, generator=g) - 0.5
    if extremes:
        left, right = (torch.where(torch.arange(size) % 3 > 0, 127, -127).to(torch.int8) for size in (o, d))
        queries = (left.float()[:, None] * right).sign() * (1 + torch.arange(q).float()[:, None, None])
        left, right = left.expand(f, o).clone(), right.expand(f, d).clone()
    return dict(zip(NAMES, (left, right, ranks, queries, scale), strict=True))


def two_parts(q: int, o: int, d: int, r: int) -> dict[str, Tensor]:
    """Queries as products, whose columns have unlike sizes."""
    g = torch.Generator().manual_seed(r)
    sizes = 10.0 ** -(torch.arange(r) % 5)
    return {
        "queries": torch.randn(q, o, r, generator=g) * sizes,
        "along": torch.randn(q, r, d, generator=g) / sizes[:, None],
    }


def error_bound(
    left: Tensor,
    right: Tensor,
    ranks: Tensor,
    queries: Tensor,
    scale: Tensor | None = None,
    along: Tensor | None = None,
) -> Tensor:
    """Of what is given of a query, 1/65,000 of the largest in its row or column; of sums, float32's rounding."""
    if queries.numel() == 0:
        return torch.zeros(len(queries), len(ranks))
    sizes, away = queries.abs().double(), _rounding(queries)
    if along is not None:
        other, other_away = along.abs().double(), _rounding(along)
        sizes, away = sizes @ other, away @ other + (sizes + away) @ other_away
    scale = None if scale is None else scale.abs()
    steps = left.shape[1] + right.shape[1] + queries.shape[2] + int(ranks.max()) if len(ranks) else 0
    both = away + steps * 2.0**-24 * sizes
    return reference.factor_dots(left.double().abs(), right.double().abs(), ranks, both, scale)


def _rounding(x: Tensor) -> Tensor:
    largest = torch.maximum(x.abs().amax(1, keepdim=True), x.abs().amax(2, keepdim=True)).double()
    return (largest / 65_000 + 2.0**-127).expand(x.shape)


def check_is_the_definition(**given: Tensor) -> None:
    got, want = factor_dots(**given), reference.factor_dots(**given)
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    assert ((got.double() - want).abs() <= error_bound(**given) + 1e-37).all()


SIZES = st.sampled_from([1, 2, 3, 15, 16, 17, 33, 64, 65, 100, 513, 1030])


@given(
    n=st.sampled_from([0, 1, 2, 23, 24, 25, 200]),
    most=st.sampled_from([0, 1, 2, 7]),
    o=SIZES,
    d=SIZES,
    q=st.sampled_from([0, 1, 3]),
    extremes=st.booleans(),
    scaled=st.booleans(),
)
def test_is_the_definition(n, most, o, d, q, extremes, scaled):
    given = problem(n, most, o, d, q, extremes=extremes)
    check_is_the_definition(**given if scaled else {name: given[name] for name in NAMES[:4]})


@given(
    n=st.sampled_from([0, 1, 25, 60]),
    o=SIZES,
    d=SIZES,
    r=st.sampled_from([1, 2, 16, 17, 40, 70]),
    q=st.sampled_from([0, 1, 3]),
    extremes=st.booleans(),
    scaled=st.booleans(),
)
def test_queries_in_two_parts_are_the_definition(n, o, d, r, q, extremes, scaled):
    given = problem(n, 3, o, d, q, extremes=extremes) | two_parts(q, o, d, r)
    if not scaled:
        del given["scale"]
    check_is_the_definition(**given)


@pytest.mark.parametrize(("n", "most"), [(3, 1000), (40_000, 0), (1, 50)])
def test_many_factors_of_an_example_and_many_examples_without(n, most):
    check_is_the_definition(**problem(n, most, 5, 9, 2))


def test_the_largest_sums_do_not_overflow():
    """Each product is 127 · 32767, the largest there is, of 4,096 entries: of 512 at a time they just fit int32."""
    ones, ranks = torch.full((1, 4096), 127, dtype=torch.int8), torch.ones(1, dtype=torch.int32)
    left = torch.eye(16, dtype=torch.int8)[:1]
    got = factor_dots(left, ones, ranks, torch.full((1, 16, 4096), 32767.0))
    compiled = build_info()["compiled"]
    assert float(got) == pytest.approx(127 * 32767 * 4096, rel=1e-6 if compiled else 4096 * 2**-24)
    signs = torch.where(torch.arange(4096) % 2 == 0, 1.0, -1.0)
    signs[-1] = 0.0  # of the sum, one product is left; plain torch's sums are float32
    left_over = float(factor_dots(left, ones, ranks, (32767 * signs).expand(1, 16, 4096)))
    assert left_over == 127 * 32767 or not compiled


def test_entries_far_below_the_largest_of_another_row_stay():
    """Each row of a query has a step of its own."""
    given = problem(50, 2, 8, 200, 1)
    given["queries"] *= 10.0 ** -torch.arange(8.0)[:, None] * 1e3
    check_is_the_definition(**given)


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-39, 1e-30, 1e30])
def test_the_ends_of_the_range(size):
    given = problem(30, 2, 20, 40, 2)
    given["queries"] *= size
    check_is_the_definition(**given)


@pytest.mark.skipif(not build_info()["compiled"], reason="plain torch has no kernels to choose from")
@pytest.mark.parametrize(("o", "d"), [(1, 1), (10, 65), (40, 33), (64, 1100), (100, 16), (200, 9)])
@pytest.mark.parametrize("along", [False, True])
def test_every_kernel_gives_the_same_bits(o, d, along, monkeypatch):
    given = problem(60, 3, o, d, 2) | (two_parts(2, o, d, 21) if along else {})
    monkeypatch.setenv("FASTIF_FACTORS", "generic")
    want, ran = factor_dots(**given), 1
    for name in KERNELS[:3]:
        monkeypatch.setenv("FASTIF_FACTORS", name)
        try:
            found = factor_dots(**given)
        except ValueError:  # not on this processor
            continue
        ran += 1
        assert torch.equal(found, want), name
    assert ran > {"avx512": 2, "avx2": 1}.get(str(build_info()["isa"]), 0)
    monkeypatch.delenv("FASTIF_FACTORS")
    assert torch.equal(factor_dots(**given), want)


@pytest.mark.skipif(not build_info()["compiled"], reason="plain torch has no kernels to choose from")
def test_a_kernel_that_there_is_not_is_refused(monkeypatch):
    monkeypatch.setenv("FASTIF_FACTORS", "sse")
    with pytest.raises(ValueError, match="FASTIF_FACTORS must be vnni, avx512, avx2 or generic, .* got sse"):
        factor_dots(**problem(3, 1, 2, 2, 1))


@pytest.mark.skipif(not build_info()["compiled"], reason="of plain torch, whose sums are torch's")
@pytest.mark.parametrize(("o", "d", "q", "r"), [(40, 30, 5, 0), (10, 600, 1, 0), (50, 60, 3, 20)])
def test_threads_do_not_matter(o, d, q, r):
    given = problem(3_000, 4, o, d, q) | (two_parts(q, o, d, r) if r else {})
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(factor_dots(**given))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.skipif(not build_info()["compiled"], reason="of plain torch, whose sums are torch's")
def test_what_else_is_asked_does_not_matter():
    """An example's product depends on neither the other examples nor the other queries."""
    given = problem(300, 3, 20, 50, 4)
    whole = factor_dots(**given)
    for query in range(4):
        assert torch.equal(factor_dots(**given | {"queries": given["queries"][query : query + 1]})[0], whole[query])
    cut = int(given["ranks"][:77].sum())
    some = {name: given[name][cut:] for name in ("left", "right", "scale")} | {"ranks": given["ranks"][77:]}
    assert torch.equal(factor_dots(**some, queries=given["queries"]), whole[:, 77:])


def test_strides_do_not_matter():
    given = problem(40, 3, 12, 30, 2)
    turned = {name: x.mT.contiguous().mT if x.dim() > 1 else torch.stack([x, x], 1)[:, 0] for name, x in given.items()}
    assert torch.equal(factor_dots(**turned), factor_dots(**given))


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("along", [True, False])
def test_opcheck(scaled, along):
    given = problem(9, 2, 4, 3, 2) | (two_parts(2, 4, 3, 2) if along else {})
    scale = given["scale"] if scaled else None
    args = given["left"], given["right"], scale, given["ranks"], given["queries"], given.get("along")
    torch.library.opcheck(torch.ops.fastif.factor_dots.default, args)


def test_gradients_are_cut():
    given = problem(5, 2, 3, 4, 1)
    assert not factor_dots(**given | {"queries": given["queries"].requires_grad_()}).requires_grad


GOOD = problem(5, 2, 3, 4, 2, seed=1)
F = len(GOOD["left"])


BAD = [
    ({"left": GOOD["left"][0]}, ValueError, r"factor_dots: left must be \[F, o\], got shape \[3\]"),
    ({"right": GOOD["right"][:1]}, ValueError, rf"right must have F={F} rows, got 1"),
    ({"left": GOOD["left"].float()}, TypeError, "left must be int8, got Float"),
    ({"right": GOOD["right"].float()}, TypeError, r"right must have the dtype of left \(Char\), got Float"),
    ({"queries": GOOD["queries"].double()}, TypeError, "queries must be float32, got Double"),
    ({"queries": GOOD["queries"].mT}, ValueError, r"queries must be \[q, o=3, d=4\], got \[2, 4, 3\]"),
    ({"queries": GOOD["queries"].index_fill(0, torch.tensor(1), torch.nan)}, ValueError, "finite, row 1 holds"),
    ({"scale": GOOD["scale"] / 0}, ValueError, "scale must be finite, row 0 holds"),
    ({"scale": GOOD["scale"][1:]}, ValueError, f"scale must have F={F} entries, got {F - 1}"),
    ({"scale": GOOD["scale"].double()}, TypeError, "scale must be float32, got Double"),
    ({"ranks": GOOD["ranks"].long()}, TypeError, "ranks must be int32, got Long"),
    ({"ranks": GOOD["ranks"] + 1}, ValueError, f"ranks must sum to F={F}, got {F + 5}"),
    ({"ranks": torch.tensor([F + 1, -1]).int()}, ValueError, "ranks must be >= 0, got -1"),
    ({"left": GOOD["left"][:, :0]}, ValueError, rf"vectors must not be empty, got left \[{F}, 0\]"),
    ({"along": GOOD["queries"][:, :2]}, ValueError, r"along must be \[q=2, r=4, d=4\], got \[2, 2, 4\]"),
    ({"along": GOOD["queries"][0]}, ValueError, r"along must be \[q, r, d\], got shape \[3, 4\]"),
    ({"along": GOOD["queries"].double()}, TypeError, r"along must have the dtype of queries \(Float\), got Double"),
    ({"along": torch.full((2, 4, 4), torch.nan)}, ValueError, "along must be finite, row 0 holds"),
    ({"queries": GOOD["queries"][:, :, :0], "along": torch.ones(2, 0, 4)}, ValueError, r"\[q, o=3, r > 0\], got"),
    ({"queries": GOOD["queries"] * 1e36}, ValueError, "the result overflows Float; scale the queries"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD)
def test_bad_input(given, error, message):
    with pytest.raises(error, match=message):
        factor_dots(**GOOD | given)


@pytest.mark.skipif(not build_info()["compiled"], reason="a signal ends plain torch between two operations")
def test_it_can_be_interrupted():
    """What a progress callback raises ends the op, as Ctrl-C does."""
    given = problem(400, 2, 600, 700, 40)
    args = [given[name] for name in ("left", "right", "scale", "ranks", "queries")]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt(f"{done} of {total}")

    def ask_longer_and_longer() -> None:  # it looks after 0.1 s
        for _ in range(8):
            _library.run(torch.ops.fastif.factor_dots, *args)
            args[-1] = args[-1].repeat(2, 1, 1)

    _library._report_to(stop)
    try:
        with pytest.raises(KeyboardInterrupt, match=" of "):
            ask_longer_and_longer()
    finally:
        _library._report_to(None)
