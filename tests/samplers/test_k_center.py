"""k_center against its definition (docs/math.md (7)), in memory and by class; what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastif.samplers import k_center, k_center_by_class, stratified
from tests.helpers.centres import by_hand, lattice, nearest_by_hand, radius, same, seeded

pytestmark = pytest.mark.usefixtures("one_thread")

# ------------------------------------------------------------------------------------------------------------ in memory


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 25), d=st.integers(1, 4), seed=st.integers(0, 10**6), data=st.data())
def test_farthest_first_with_cell_weights(n, d, seed, data):
    k = data.draw(st.integers(1, n))
    points = lattice(n, d, seed)
    subset = k_center(points, k, generator=seeded(seed))
    picks = by_hand(points, k, [int(torch.randint(n, (), generator=seeded(seed)))])
    nearest = nearest_by_hand(points, points[picks])
    assert subset.indices.tolist() == picks
    assert subset.weights.tolist() == [nearest.count(j) / n for j in range(k)]
    plain = k_center(points, k, weighted=False, generator=seeded(seed))
    assert torch.equal(plain.indices, subset.indices)
    assert plain.weights.tolist() == [1 / k] * k


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 25), d=st.integers(1, 4), seed=st.integers(0, 10**6), data=st.data())
def test_given_centres_come_first_and_are_extended(n, d, seed, data):
    k = data.draw(st.integers(1, n))
    s = data.draw(st.integers(1, k))
    start = torch.randperm(n, generator=seeded(seed))[:s]
    points = lattice(n, d, seed)
    state = (g := seeded(seed)).get_state()
    subset = k_center(points, k, start=start, generator=g)
    assert torch.equal(g.get_state(), state)  # nothing is drawn
    picks = by_hand(points, k, start.tolist())
    assert subset.indices.tolist() == picks
    nearest = nearest_by_hand(points, points[picks])
    assert subset.weights.tolist() == [nearest.count(j) / n for j in range(k)]
    assert same(k_center(points, k, start=int(start[0])), k_center(points, k, start=start[:1]))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 25), seed=st.integers(0, 10**6), until=st.sampled_from([0.0, 1.0, 2.0, 2.5, 3.0, 99.0]))
def test_until_radius_stops_at_the_first_radius_that_is_small_enough(n, seed, until):
    points = lattice(n, 3, seed)
    subset = k_center(points, start=0, until_radius=until)
    assert subset.indices.tolist() == by_hand(points, None, [0], until)
    assert radius(points, subset.indices) <= until
    if len(subset.indices) > 1:
        assert radius(points, subset.indices[:-1]) > until
    assert float(subset.weights.sum()) == pytest.approx(1)
    fewer = k_center(points, k=min(n, 3), start=0, until_radius=until)  # k is an upper bound then
    assert torch.equal(fewer.indices, subset.indices[:3])
    equal = k_center(points, start=0, until_radius=until, weighted=False)
    assert equal.weights.tolist() == [1 / len(subset.indices)] * len(subset.indices)


def test_cosine_sees_directions_only():
    g = seeded(0)
    points = torch.randn(50, 3, generator=g, dtype=torch.float64)
    lengths = 10 ** torch.linspace(-200, 130, 50, dtype=torch.float64)
    scaled = k_center(points * lengths[:, None], 8, metric="cosine", generator=seeded(1))
    unit = points / points.norm(dim=1, keepdim=True)
    picks = by_hand(unit, 8, [int(torch.randint(50, (), generator=seeded(1)))])
    nearest = nearest_by_hand(unit, unit[picks])
    assert scaled.indices.tolist() == picks
    assert scaled.weights.tolist() == [nearest.count(j) / 50 for j in range(8)]
    chunked = k_center(points * lengths[:, None], 8, metric="cosine", start=picks[0], chunk_rows=50)
    assert same(chunked, scaled)


def test_a_duplicate_has_no_weight():
    subset = k_center(torch.tensor([[1.0], [1.0], [5.0]]), 3, generator=seeded(0))
    mass = dict(zip(subset.indices.tolist(), subset.weights.tolist(), strict=True))
    assert mass[2] == pytest.approx(1 / 3)
    assert sorted([mass[0], mass[1]]) == [0.0, pytest.approx(2 / 3)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_read_exactly(dtype):
    points = torch.randn(300, 7, generator=seeded(0)).to(dtype)
    for options in ({}, {"chunk_rows": 90}):
        narrow, wide = (k_center(x, 20, start=3, **options) for x in (points, points.double()))
        assert same(narrow, wide)


def test_an_array_is_a_tensor():
    points = torch.randn(40, 3, generator=seeded(0))
    want = k_center(points, 5, start=2)
    for array in (points.numpy(), points.numpy().astype(">f4"), np.flipud(np.flipud(points.numpy()).copy())):
        assert same(k_center(array, 5, start=2), want)
    frozen = points.numpy().copy()
    frozen.flags.writeable = False
    assert same(k_center(frozen, 5, start=2), want)


# ------------------------------------------------------------------------------------------------------------- by class


@settings(max_examples=30, deadline=None)
@given(labels=st.lists(st.integers(0, 4).map(lambda c: c**5), min_size=1, max_size=40), data=st.data())
def test_by_class_is_k_center_in_each_class(labels, data):
    k = data.draw(st.integers(1, len(labels)))
    points, labels = lattice(len(labels), 3, k), torch.tensor(labels)
    subset = k_center_by_class(points, labels, k, generator=seeded(k))
    classes = labels[stratified(labels, k).indices].tolist()  # the same share of each class
    g, indices, cells = seeded(k), [], []
    for c in sorted(set(labels.tolist())):
        if classes.count(c):
            members = (labels == c).nonzero()[:, 0]
            own = k_center(points[members], classes.count(c), generator=g)
            indices += members[own.indices].tolist()
            cells += (own.weights * len(members)).tolist()
    assert subset.indices.tolist() == indices
    assert subset.weights.tolist() == pytest.approx([cell / sum(cells) for cell in cells])
    plain = k_center_by_class(points, labels, k, weighted=False, generator=seeded(k))
    assert torch.equal(plain.indices, subset.indices)
    assert plain.weights.tolist() == [1 / k] * k


# -------------------------------------------------------------------------------------------------- progress and errors


def test_progress_shows_a_bar(capfd):
    points = torch.randn(4000, 8, generator=seeded(0))
    k_center(points, 50, start=0, chunk_rows=1000, progress=False)
    assert capfd.readouterr().err == ""
    k_center(points, 50, start=0, chunk_rows=1000)
    err = capfd.readouterr().err
    assert "k-center, round 1" in err
    assert "k-center, cells" in err
    k_center(points, 50, start=0)
    assert "50" in capfd.readouterr().err


X = torch.arange(12.0).reshape(6, 2)


def bad(row: int, value: float = float("nan"), dtype=torch.float32) -> torch.Tensor:
    x = X.to(dtype, copy=True)
    x[row, 1] = value
    return x


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: k_center(X), ValueError, "k_center: give k, until_radius or both"),
        (lambda: k_center(X, 7), ValueError, r"k_center: k must be in \[1, n=6\], got k=7"),
        (lambda: k_center(X, 0), ValueError, r"k_center: k must be in \[1, n=6\], got k=0"),
        (lambda: k_center(X, True), TypeError, "k_center: k must be an integer, got bool"),
        (lambda: k_center(X, 7, chunk_rows=2), ValueError, r"k_center: k must be in \[1, n=6\], got k=7"),
        (lambda: k_center(iter([X]), 0), ValueError, "k_center: k must be >= 1, got k=0"),
        (lambda: k_center(iter([X, X]), 13), ValueError, r"k_center: k must be in \[1, n=12\], got k=13"),
        (lambda: k_center(iter([X]), "3"), TypeError, "k_center: k must be an integer, got str"),
        (lambda: k_center(X, until_radius=-1.0), ValueError, "until_radius must be finite and >= 0, got -1.0"),
        (lambda: k_center(X, until_radius=float("nan")), ValueError, "until_radius must be finite and >= 0, got nan"),
        (lambda: k_center(X, 2, metric="dot"), ValueError, "metric must be 'euclidean' or 'cosine', got 'dot'"),
        (lambda: k_center(X, 2, chunk_rows=0), ValueError, "k_center: chunk_rows must be >= 1, got 0"),
        (lambda: k_center(X, 2, start=6), ValueError, r"k_center: start must be in \[0, n=6\), got 6"),
        (lambda: k_center(X, 2, start=-1), ValueError, r"k_center: start must be in \[0, n=6\), got -1"),
        (lambda: k_center(iter([X]), 2, start=-1), ValueError, "k_center: start must be >= 0, got -1"),
        (lambda: k_center(iter([X]), 2, start=6), ValueError, r"k_center: start must be in \[0, n=6\), got 6"),
        (lambda: k_center(X, 2, start=torch.tensor([1, 1])), ValueError, "distinct, 1 appears more than once"),
        (lambda: k_center(X, 1, start=torch.tensor([1, 2])), ValueError, "start must have at most k=1 entries, got 2"),
        (lambda: k_center(X, 1, start=torch.tensor([[1]])), ValueError, r"must be an index or \[s\], .*\[1, 1\]"),
        (lambda: k_center(X, 1, start=X[0, :0].long()), ValueError, r"must be an index or \[s\], .*\[0\]"),
        (lambda: k_center(X, 1, start=1.0), TypeError, "k_center: start must be int64, got torch.float32"),
        (lambda: k_center(X[0], 1), ValueError, r"k_center: points must be \[n, d\], got shape \[2\]"),
        (lambda: k_center(X[0], 1, chunk_rows=1), ValueError, r"k_center: points must be \[n, d\], got shape \[2\]"),
        (lambda: k_center(X.long().numpy(), 1), TypeError, "of a floating-point type, got an array of int64"),
        (lambda: k_center(X[:0], 1), ValueError, r"points must have at least one row and one column, .*\[0, 2\]"),
        (lambda: k_center(X[:, :0], 1, chunk_rows=1), ValueError, r"at least one row and one column, .*\[1, 0\]"),
        (lambda: k_center(X.long(), 1), TypeError, "points must be a floating-point tensor, got torch.int64"),
        (
            lambda: k_center(np.array([["a"]]), 1),
            TypeError,
            "of a floating-point type, got an array of <U1",
        ),
        (lambda: k_center(3, 1), TypeError, "points must be a tensor, an array or an iterable of chunks, got int"),
        (lambda: k_center([], 1), ValueError, "k_center: points must have at least one chunk, got none"),
        (lambda: k_center(iter([]), 1), ValueError, "k_center: points must have at least one chunk, got none"),
        (lambda: k_center([X, X[:, :1]], 1), ValueError, "k_center: chunk 1 must have d=2 columns, got 1"),
        (lambda: k_center([X, X[0]], 1), ValueError, r"k_center: chunk 1 must be \[m, d\], got shape \[2\]"),
        (lambda: k_center([X, "x"], 1), TypeError, "k_center: chunk 1 must be a floating-point tensor, got str"),
        (lambda: k_center([X[:0]], 1), ValueError, r"k_center: chunk 0 must have at least one row and one column"),
        (lambda: k_center(bad(4), 2), ValueError, "k_center: points must be finite, row 4 holds NaN or Inf"),
        (lambda: k_center(bad(4), 2, chunk_rows=3), ValueError, "points must be finite, row 4 holds NaN or Inf"),
        (lambda: k_center(iter([X, X, bad(4)]), 2), ValueError, "points must be finite, row 16 holds NaN or Inf"),
        (
            lambda: k_center([X, bad(1, -1e141, torch.float64)], 2),
            ValueError,
            r"k_center: \|points\| must be at most 1e\+140 \(squares overflow\), got 1e\+141",
        ),
        (lambda: k_center(X - X[0], 2, metric="cosine"), ValueError, "rows that are not zero, row 0 is"),
        (lambda: k_center([X + 1, X - X[0]], 2, metric="cosine"), ValueError, "rows that are not zero, row 6 is"),
        (lambda: k_center(X.to("meta"), 1), ValueError, "k_center: points must hold values, got a tensor on meta"),
        (lambda: k_center([X, X.to("meta")], 1), ValueError, "k_center: points must hold values"),
        (lambda: k_center(X.to_sparse(), 1), TypeError, "k_center: points must be a dense tensor"),
        (lambda: k_center(X, 1, start=torch.arange(1).to("meta")), ValueError, "k_center: start must hold values"),
        (lambda: k_center(X, 1, until_radius=True), TypeError, "k_center: until_radius must be a number, got bool"),
        (lambda: k_center(X, 1, chunk_rows=2.5), TypeError, "k_center: chunk_rows must be an integer, got float 2.5"),
        (
            lambda: k_center_by_class(X, torch.zeros(6, device="meta").long(), 2),
            ValueError,
            "k_center_by_class: labels must hold values",
        ),
        (lambda: k_center_by_class(X, torch.zeros(5).long(), 2), ValueError, "labels must have n=6 entries, got 5"),
        (lambda: k_center_by_class(X, torch.zeros(6).long(), 7), ValueError, r"k must be in \[1, n=6\], got k=7"),
    ],
)
def test_errors_name_the_rule_and_the_value(call, error, message):
    with pytest.raises(error, match=message):
        call()
