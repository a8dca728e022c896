"""k_center chunk by chunk (docs/math.md (7)): two rounds by hand, and how far from the optimum they can be."""

from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastif import ops
from fastif.samplers import k_center
from tests.helpers.centres import by_hand, distances, lattice, nearest_by_hand, radius, same, seeded

pytestmark = pytest.mark.usefixtures("one_thread")


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
    monkeypatch.setattr("fastif.samplers.centres._CHUNK_BYTES", 400 * 4 * 4)
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


def test_a_walk_that_ends_early_is_an_error():
    class Shrinking(Walks):
        def __iter__(self):
            self.walks += 1
            return iter(self.chunks[self.walks - 1 :])

    chunk = torch.arange(12.0).reshape(6, 2)
    with pytest.raises(ValueError, match="points must have as many rows on every walk, got n=12, then 6"):
        k_center(Shrinking([chunk, chunk]), 2, start=0)
