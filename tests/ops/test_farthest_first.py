import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastif.ops import farthest_first
from tests import reference


@pytest.fixture(autouse=True, scope="module", params=["plain", "lazy"])
def kernel(request):
    """Every test runs on the kernel that reads all points for each pick, and on the lazy one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTIF_KCENTER", request.param)
        yield


def problem(n: int, d: int, kind: str, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Points that make the traversal hard: ties, duplicates, offsets beside which the spread is tiny, heavy tails."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    return {
        "normal": x,
        "ties": x.sign(),
        "duplicates": x[torch.randint(0, max(1, n // 3), (n,), generator=g)],
        "zeros": torch.zeros(n, d, dtype=torch.float64),
        "offset": x + 1e3,
        "heavy": x / torch.rand(n, 1, generator=g, dtype=torch.float64).clamp(1e-6),
        "far": x + 1e6,
        "integers": (2 * x).round(),
        "equal": x[:1].expand(n, d),
        "nearly": x[torch.randint(0, max(1, n // 3), (n,), generator=g)] * (1 + 1e-7 * x),
        "sphere": torch.nn.functional.normalize(x, dim=1),
        "tails": x * 10 ** (12 * torch.rand(n, 1, generator=g, dtype=torch.float64) - 6),
        "tiny": x * (1e-42 if dtype == torch.float32 else 1e-160),
        "huge": x * (1e37 if dtype == torch.float32 else 1e139),
        "extremes": x
        * 10 ** ((70 if dtype == torch.float32 else 300) * (torch.rand(n, 1, generator=g, dtype=torch.float64) - 0.55)),
        "beyond": x * (1e37 if dtype == torch.float32 else 1e148),
    }[kind].to(dtype)


KINDS = ("normal", "ties", "duplicates", "zeros", "offset", "heavy")
# Near the limits of the lazy kernel's certificate: bounds within rounding of the distance, underflow, overflow.
HARD = ("far", "integers", "equal", "nearly", "sphere", "tails", "tiny", "huge", "extremes", "beyond")


def check_same_bits(points: torch.Tensor, k: int, start: int) -> None:
    got, want = farthest_first(points, k, start), reference.farthest_first(points, k, start)
    check_equal(got, want)


def check_equal(got, want) -> None:
    for name, mine, theirs in zip(got._fields, got, want, strict=True):
        assert mine.dtype == theirs.dtype, name
        assert torch.equal(mine, theirs), name


@given(
    n=st.integers(1, 40),
    d=st.sampled_from([1, 2, 3, 31, 32, 33, 64, 100]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    data=st.data(),
)
def test_is_the_definition_to_the_last_bit(n, d, kind, dtype, data):
    k, start = data.draw(st.integers(1, n)), data.draw(st.integers(0, n - 1))
    check_same_bits(problem(n, d, kind, dtype), k, start)


@settings(max_examples=30)
@given(
    n=st.integers(2, 250),
    d=st.sampled_from([1, 2, 5, 33, 150]),
    kind=st.sampled_from(KINDS + HARD),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    data=st.data(),
)
def test_hard_points_by_the_definition(n, d, kind, dtype, data):
    check_same_bits(
        problem(n, d, kind, dtype), data.draw(st.integers(1, min(n, 120))), data.draw(st.integers(0, n - 1))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_pick_is_the_farthest_from_those_before(kind):
    points = problem(300, 37, kind, torch.float32)
    indices, sq_radii, sq_dists, nearest = farthest_first(points, k=25, start=7)
    to_picks = torch.stack([reference.sq_distances(points, points[i]) for i in indices])  # [k, n]
    for t in range(1, 25):
        before = to_picks[:t].min(0).values
        before[indices[:t]] = -1
        assert indices[t] == (before == before.max()).nonzero()[0]
    assert torch.equal(sq_radii, to_picks.cummin(0).values.max(1).values)
    assert torch.equal(sq_dists, to_picks.min(0).values)
    assert torch.equal(to_picks.gather(0, nearest[None])[0], sq_dists)


def test_k_equals_n_picks_everything_once():
    indices = farthest_first(problem(50, 3, "duplicates", torch.float32), k=50).indices
    assert sorted(indices.tolist()) == list(range(50))


def test_distinct_points_run_out():
    points = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    result = farthest_first(points, k=4, start=2)
    assert result.indices.tolist() == [2, 1, 0, 3]
    assert result.sq_radii.tolist() == [1, 0, 0, 0]
    assert result.nearest.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    "view",
    [lambda x: x[::2], lambda x: x[:, ::3], lambda x: x.T.contiguous().T, lambda x: x[:1].expand(9, -1)],
    ids=["rows", "columns", "transposed", "expanded"],
)
def test_strides_do_not_matter(view):
    points = view(problem(60, 45, "normal", torch.float32))
    check_same_bits(points, min(20, len(points)), 3)


def test_threads_do_not_matter():
    points = problem(20_000, 40, "ties", torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(farthest_first(points, 12))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_gradients_are_cut():
    assert not any(out.requires_grad for out in farthest_first(torch.randn(4, 2, requires_grad=True), 2))


def test_opcheck():
    torch.library.opcheck(torch.ops.fastif.farthest_first.default, (torch.randn(20, 5), 4, 1))


def test_compiles_whole():
    compiled = torch.compile(lambda x: farthest_first(x, 3).sq_radii, fullgraph=True, backend="eager")
    points = torch.randn(10, 4)
    assert torch.equal(compiled(points), farthest_first(points, 3).sq_radii)


NAN = torch.tensor([[0.0, 1.0], [2.0, float("nan")]])


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((torch.randn(3), 1), ValueError, r"farthest_first: points must be \[n, d\], got shape \[3\]"),
        ((torch.randn(3, 2), 4), ValueError, r"farthest_first: k must be in \[1, n=3\], got k=4"),
        ((torch.randn(3, 2), 0), ValueError, r"k must be in \[1, n=3\], got k=0"),
        ((torch.randn(3, 2), 1, 3), ValueError, r"start must be in \[0, n=3\), got start=3"),
        ((torch.randn(3, 2), 1, -1), ValueError, "got start=-1"),
        ((torch.randn(0, 2), 1), ValueError, r"at least one row and one column, got shape \[0, 2\]"),
        ((torch.randn(2, 0), 1), ValueError, r"got shape \[2, 0\]"),
        ((torch.ones(3, 2, dtype=torch.int64), 1), TypeError, "must be float32 or float64, got Long"),
        ((NAN, 1), ValueError, "points must be finite, row 1 holds NaN or Inf"),
        ((NAN.nan_to_num(nan=-torch.inf), 1), ValueError, "row 1 holds NaN or Inf"),
        ((torch.tensor([[1e200]], dtype=torch.float64), 1), ValueError, r"at most 1e150 \(squares overflow\)"),
    ],
)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=message):
        farthest_first(*args)


def test_largest_float32_is_no_overflow():
    points = torch.tensor([[3e38], [-3e38], [0.0]])
    assert farthest_first(points, 2).sq_radii.isfinite().all()
