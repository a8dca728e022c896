"""k_center against its definition (docs/math.md (7)): in memory, by class, chunk by chunk; and against the optimum."""

from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastif import ops
from fastif.samplers import Subset, k_center, k_center_by_class, stratified

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lattice(n: int, d: int, seed: int) -> torch.Tensor:
    """Small integers: distances are exact, and ties and duplicates are frequent."""
    return torch.randint(-2, 3, (n, d), generator=seeded(seed)).float()


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(((x[:, None].astype(np.float64) - y[None].astype(np.float64)) ** 2).sum(2))


def by_hand(x, k: int | None, start: list[int], until: float = -1.0) -> list[int]:
    """The picks: the definition, one distance at a time."""
    x, picks = np.asarray(x), list(start)
    while len(picks) < (k or len(x)) and distances(x, x[picks]).min(1).max() > until:
        reach = [min(distances(x[i : i + 1], x[picks])[0]) if i not in picks else -1.0 for i in range(len(x))]
        picks.append(int(np.argmax(reach)))
    return picks


def nearest_by_hand(x, centres) -> list[int]:
    """For every row of x the position of its nearest centre, the earliest on ties."""
    return distances(np.asarray(x), np.asarray(centres)).argmin(1).tolist()


def radius(x, indices) -> float:
    x = np.asarray(x)
    return distances(x, x[np.asarray(indices)]).min(1).max()


def same(a: Subset, b: Subset) -> bool:
    return torch.equal(a.indices, b.indices) and torch.equal(a.weights, b.weights)


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


# ------------------------------------------------------------------------------------------------------- chunk by chunk


class Walks:
    """Chunks that can be walked again and count how often they are."""

    def __init__(self, chunks):
        self.chunks, self.walks = list(chunks), 0

    def __iter__(self):
        self.walks += 1
        return iter(self.chunks)


def memmap(folder: Path, points: torch.Tensor) -> np.memmap:
    np.save(folder / "points.npy", points.numpy())
    array = np.load(folder / "points.npy", mmap_mode="r")
    assert isinstance(array, np.memmap)
    return array


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 30), d=st.integers(1, 3), seed=st.integers(0, 10**6), data=st.data())
def test_two_rounds_by_hand(n, d, seed, data):
    k = data.draw(st.integers(1, n))
    rows = data.draw(st.integers(1, n))
    start = torch.randperm(n, generator=seeded(seed))[: data.draw(st.integers(1, k))]
    points = lattice(n, d, seed)
    union, counts = [], []
    for first in range(0, n, rows):
        chunk = points[first : first + rows]
        given = [i - first for i in start.tolist() if first <= i < first + len(chunk)] or [0]
        picks = by_hand(chunk, min(k, len(chunk)), given)
        nearest = nearest_by_hand(chunk, chunk[picks])
        union += [first + i for i in picks]
        counts += [nearest.count(j) for j in range(len(picks))]
    picks = by_hand(points[union], k, [union.index(i) for i in start.tolist()])
    indices = [union[i] for i in picks]
    nearest = nearest_by_hand(points, points[indices])
    passed_on = nearest_by_hand(points[union], points[indices])
    once = [sum(c for c, j in zip(counts, passed_on, strict=True) if j == centre) / n for centre in range(k)]

    source = Walks(points.split(rows))
    for again in (
        k_center(points, k, start=start, chunk_rows=rows),
        k_center(points.numpy(), k, start=start, chunk_rows=rows),
        k_center(source, k, start=start, chunk_rows=rows),
        k_center(list(points.numpy()[:, None]), k, start=start, chunk_rows=rows),  # gathered from single rows
    ):
        assert again.indices.tolist() == indices
        assert again.weights.tolist() == [nearest.count(j) / n for j in range(k)]
    assert source.walks == 2
    only = k_center(iter(points.split(rows)), k, start=start, chunk_rows=rows)
    assert only.indices.tolist() == indices
    assert only.weights.tolist() == once
    assert k_center(source, k, start=start, chunk_rows=rows, weighted=False).weights.tolist() == [1 / k] * k
    assert source.walks == 3


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("rows", [1, 3, 4, 12, 100])
def test_a_reader_may_fill_one_buffer_again_and_again(rows, metric):
    points = 1 + torch.rand(30, 2, generator=seeded(0))
    want = k_center(points, 7, start=1, chunk_rows=rows, metric=metric)

    def read(buffer):
        for row in points:
            buffer[:] = row if isinstance(buffer, torch.Tensor) else row.numpy()
            yield buffer

    for make in (lambda: torch.empty(1, 2), lambda: np.empty((1, 2), np.float32)):
        got = k_center(read(make()), 7, start=1, chunk_rows=rows, metric=metric)
        assert torch.equal(got.indices, want.indices)


def test_one_chunk_is_the_whole(tmp_path):
    points = torch.randn(500, 6, generator=seeded(0))
    whole = k_center(points, 30, generator=seeded(1))
    chunks = points.split(77)
    for source in (memmap(tmp_path, points), Walks(chunks), iter(chunks), (x.numpy() for x in chunks)):
        assert same(k_center(source, 30, generator=seeded(1)), whole)


def test_the_first_centre_of_a_memmap_is_drawn_from_all_and_of_an_iterable_from_the_first_chunk():
    points = torch.randn(40, 2, generator=seeded(0))
    draws = [int(k_center(points, 1, chunk_rows=10, generator=seeded(s)).indices) for s in range(200)]
    assert len(set(draws)) == 40
    draws = [int(k_center(iter(points.split(10)), 1, chunk_rows=10, generator=seeded(s)).indices) for s in range(200)]
    assert set(draws) == set(range(10))


def test_no_more_than_a_chunk_and_the_picks_is_looked_at_together(tmp_path, monkeypatch):
    points = memmap(tmp_path, torch.randn(5000, 4, generator=seeded(0)))
    sizes = []
    op = ops.farthest_first

    def record(rows, *args, **kwargs):
        sizes.append(len(rows))
        return op(rows, *args, **kwargs)

    monkeypatch.setattr(ops, "farthest_first", record)
    k_center(points, 10, chunk_rows=500)
    assert sizes == [500] * 10 + [100] + [510] * 10  # round 1, round 2, the weights
    sizes.clear()
    monkeypatch.setattr("fastif.k_center._CHUNK_BYTES", 400 * 4 * 4)
    k_center(points, 10, weighted=False)
    assert sizes == [400] * 12 + [200, 130]
    sizes.clear()
    k_center(points, 100, weighted=False)  # at least 8 k rows
    assert sizes == [800] * 6 + [200, 700]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 30), seed=st.integers(0, 10**6), until=st.sampled_from([0.0, 1.0, 2.0, 4.5]), data=st.data())
def test_until_radius_holds_for_every_point_whatever_the_chunks(n, seed, until, data):
    points = lattice(n, 2, seed)
    rows = data.draw(st.integers(1, n))
    free = k_center(iter(points.split(rows)), start=0, until_radius=until, chunk_rows=rows)
    assert radius(points, free.indices) <= until + 1e-12
    picked = distances(np.asarray(points), np.asarray(points))[np.ix_(free.indices, free.indices)]
    apart = picked[~np.eye(len(picked), dtype=bool)]
    assert (apart > until / 2 - 1e-12).all()  # no more of them than balls of radius until_radius / 4 could cover
    k = data.draw(st.integers(1, n))
    bounded = k_center(iter(points.split(rows)), k, start=0, until_radius=until, chunk_rows=rows)
    assert len(bounded.indices) <= k
    assert len(bounded.indices) == k or radius(points, bounded.indices) <= until + 1e-12
    assert float(bounded.weights.sum()) == pytest.approx(1)


def optimum_on_a_line(x: np.ndarray, k: int) -> float:
    """The smallest covering radius of k centres anywhere on the line: all ways to cut it into k intervals."""
    x = np.sort(x)
    cuts = ((0, *cut, len(x)) for cut in combinations(range(1, len(x)), k - 1))
    return min(max((x[j - 1] - x[i]) / 2 for i, j in pairwise(c)) for c in cuts)


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.integers(-50, 50), min_size=2, max_size=10),
    rows=st.integers(1, 10),
    data=st.data(),
)
def test_the_radius_is_within_two_and_four_times_the_optimum_on_a_line(values, rows, data):
    x = np.array(values, dtype=np.float32)
    k = data.draw(st.integers(1, len(x)))
    start = data.draw(st.integers(0, len(x) - 1))
    best = optimum_on_a_line(x, k)
    assert radius(x[:, None], k_center(x[:, None], k, start=start).indices) <= 2 * best
    chunked = k_center(iter(torch.tensor(x)[:, None].split(rows)), k, start=start, chunk_rows=rows)
    assert radius(x[:, None], chunked.indices) <= 4 * best


def test_the_factor_of_two_rounds_can_exceed_two():
    """Else the page's claim that chunks can cost something would never be seen."""
    worst = 0.0
    for seed in range(300):
        x = torch.randint(-20, 21, (9, 1), generator=seeded(seed)).float()
        best = optimum_on_a_line(x.numpy()[:, 0], 3)
        worst = max(worst, radius(x, k_center(x, 3, start=0, chunk_rows=3 + seed % 3).indices) / max(best, 1e-9))
    assert 2 < worst <= 4


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 9), rows=st.integers(1, 9), seed=st.integers(0, 10**6), data=st.data())
def test_extending_given_centres_is_within_four_times_the_best_extension(n, rows, seed, data):
    k = data.draw(st.integers(1, n))
    s = data.draw(st.integers(1, k))
    start = torch.randperm(n, generator=seeded(seed))[:s]
    points = torch.randn(n, 2, generator=seeded(seed))
    rest = [i for i in range(n) if i not in start.tolist()]
    best = min(radius(points, start.tolist() + list(more)) for more in combinations(rest, k - s))
    assert radius(points, k_center(points, k, start=start).indices) <= 2 * best + 1e-9
    chunked = k_center(points, k, start=start, chunk_rows=rows)
    assert chunked.indices[:s].tolist() == start.tolist()
    assert radius(points, chunked.indices) <= 4 * best + 1e-9


@pytest.mark.parametrize("rows", [400, 1000, 3000])
def test_chunks_cost_little_on_larger_data(rows):
    centres = 3 * torch.randn(40, 8, generator=seeded(0))
    points = centres[torch.randint(40, (6000,), generator=seeded(1))] + torch.randn(6000, 8, generator=seeded(2))
    whole = k_center(points, 100, start=0)
    chunked = k_center(points, 100, start=0, chunk_rows=rows)
    once = k_center(iter(points.split(rows)), 100, start=0, chunk_rows=rows)
    assert radius(points, chunked.indices) <= 1.2 * radius(points, whole.indices)  # 4 at most, were whole the optimum
    assert torch.equal(once.indices, chunked.indices)
    assert float((once.weights - chunked.weights).abs().sum()) < 0.5  # total variation 1/4: the centres are near enough


# -------------------------------------------------------------------------------------------------- progress and errors


def test_progress_shows_a_bar(capfd):
    points = torch.randn(4000, 8, generator=seeded(0))
    k_center(points, 50, start=0, chunk_rows=1000)
    assert capfd.readouterr().err == ""
    k_center(points, 50, start=0, chunk_rows=1000, progress=True)
    err = capfd.readouterr().err
    assert "k-center, round 1" in err
    assert "k-center, cells" in err
    k_center(points, 50, start=0, progress=True)
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
        (lambda: k_center_by_class(X, torch.zeros(5).long(), 2), ValueError, "labels must have n=6 entries, got 5"),
        (lambda: k_center_by_class(X, torch.zeros(6).long(), 7), ValueError, r"k must be in \[1, n=6\], got k=7"),
    ],
)
def test_errors_name_the_rule_and_the_value(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_walk_that_ends_early_is_an_error():
    class Shrinking(Walks):
        def __iter__(self):
            self.walks += 1
            return iter(self.chunks[self.walks - 1 :])

    with pytest.raises(ValueError, match="points must have as many rows on every walk, got n=12, then 6"):
        k_center(Shrinking([X, X]), 2, start=0)
