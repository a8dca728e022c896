"""What can be asked of farthest_first, of one cloud of points or many: starts, masks, a radius to stop at."""

import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastif.ops import farthest_first
from tests import reference
from tests.helpers.points import KINDS, check_equal, op, problem

pytestmark = pytest.mark.usefixtures("kernel")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
VIEWS = {
    "contiguous": lambda x: x,
    "columns": lambda x: x.mT.contiguous().mT,
    "every second": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "backwards": lambda x: x.flip(-2).contiguous().flip(-2),
}


@st.composite
def clouds(draw, b: int | None = None):
    """Clouds [n, d], or [b, n, d], and what can be asked of them, as keyword arguments of the op."""
    n, d = draw(st.integers(1, 24)), draw(st.sampled_from([1, 2, 3, 7, 33, 65]))
    dtype, kind = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(KINDS))
    r = random.Random(draw(st.integers(0, 10**6)))
    x = torch.stack([problem(n, d, kind, torch.float64, r.randrange(100)).clamp(-6e4, 6e4) for _ in range(b or 1)])
    x = VIEWS[draw(st.sampled_from(sorted(VIEWS)))](x.to(dtype))
    mask, picks = torch.ones(b or 1, n, dtype=torch.bool), []
    holes, s = draw(st.sampled_from(["none", "any", "end"])), draw(st.integers(1, n))
    for cloud in mask:
        out = 0 if holes == "none" else r.randint(0, n - s)
        cloud[r.sample(range(n), out) if holes == "any" else torch.arange(n - out, n)] = False
        picks.append(r.randint(s, int(cloud.sum())))
    x[~mask] = draw(st.sampled_from([float("nan"), float("inf"), 3.0]))
    starts = torch.tensor([r.sample(cloud.nonzero().flatten().tolist(), s) for cloud in mask])
    until = draw(st.sampled_from([None, 0.0, 1.0, "a radius", 1e300]))
    if until == "a radius":  # one at which a run has to stop, with its square exactly met where that can be
        radii = reference.farthest_first(x[0], picks[0], starts[0].tolist(), mask[0])[1]
        until = radii[r.randrange(len(radii))].sqrt().item()
    given = {"points": x, "k": max(picks), "start": starts, "picks": torch.tensor(picks), "mask": mask}
    if b is None:
        given = {"points": x[0], "k": picks[0], "start": starts[0], "picks": None, "mask": mask[0]}
    if holes == "none":
        given["mask"] = None
    return given | {"until_radius": until}


@given(clouds())
def test_all_that_can_be_asked_of_a_cloud_is_the_definition(given):
    want = reference.farthest_first(
        given["points"], given["k"], given["start"].tolist(), given["mask"], given["until_radius"]
    )
    check_equal(op(**given), want)


@settings(max_examples=40)
@given(st.sampled_from([1, 2, 5]).flatmap(clouds), st.sampled_from([1, 2, 3]))
def test_clouds_do_not_meet(given, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)  # more than clouds: these take turns, else the threads do
        got = op(**given)
    finally:
        torch.set_num_threads(before)
    for j, cloud in enumerate(given["points"]):
        made = int(given["picks"][j])
        mask = None if given["mask"] is None else given["mask"][j]
        want = reference.farthest_first(cloud, made, given["start"][j].tolist(), mask, given["until_radius"])
        indices, sq_radii, sq_dists, nearest = (result[j] for result in got)
        check_equal((indices[:made], sq_radii[:made], sq_dists, nearest), want)
        assert bool((indices[made:] == -1).all())
        assert bool((sq_radii[made:] == want[1][-1]).all())


def test_fuzz():
    """FASTIF_FUZZ random problems, each with all that can be asked of it, against the definition."""
    for seed in range(int(os.environ.get("FASTIF_FUZZ", 1000)) // 2):  # on either kernel
        r, g = random.Random(seed), torch.Generator().manual_seed(seed)
        many = r.random() < 0.05  # more than the lazy kernel looks at together
        n, d, dtype = r.randint(1, 12), r.choice([1, 1, 2, 3, 5, 34]), r.choice(DTYPES)
        n = r.randint(100, 3000) if many else n
        if many or r.random() < 0.5:  # ties and duplicates
            points = torch.randint(-2, 3, (n, d), generator=g).to(dtype)
        else:
            points = (r.choice([0, 1, 1e3]) + r.choice([1e-6, 1, 10]) * torch.randn(n, d, generator=g)).to(dtype)
        mask = torch.rand(n, generator=g) < r.choice([0.7, 1])
        mask[r.randrange(n)] = True
        points[~mask] = r.choice([torch.nan, -torch.inf, 0.0])
        rows = mask.nonzero().flatten().tolist()
        k = r.randint(1, min(len(rows), 200))
        given = r.sample(rows, r.randint(1, min(k, 3)))
        until = r.choice([None, None, 0.0, 10 ** r.uniform(-3, 3)])
        want = reference.farthest_first(points, k, given, mask, until)
        if r.random() < 0.5:
            got = op(points, k, torch.tensor(given), None, mask, until)
        else:  # as the second of two clouds
            both = torch.stack([torch.zeros_like(points), points])
            starts, masks = torch.tensor([rows[: len(given)], given]), torch.stack([mask, mask])
            got = (result[1] for result in op(both, k, starts, torch.tensor([len(given), k]), masks, until))
        check_equal(got, want)


def test_given_starts_are_extended():
    points = torch.tensor([[0.0], [1.0], [5.0], [9.0], [4.0]])
    result = farthest_first(points, 4, torch.tensor([1, 4]))
    assert result.indices.tolist() == [1, 4, 3, 0]
    assert result.sq_radii.tolist() == [64, 25, 1, 1]
    assert result.nearest.tolist() == [3, 0, 1, 2, 1]
    check_equal(farthest_first(points, 2, torch.tensor(3).reshape(1)), farthest_first(points, 2, start=3))


def test_starts_may_be_all_points():
    points = problem(9, 2, "normal", torch.float32)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    result = farthest_first(points, 9, order, until_radius=1e9)  # starts are taken even so
    assert torch.equal(result.indices, order)
    assert torch.equal(result.nearest[order], torch.arange(9))
    assert result.sq_radii[-1] == 0


def test_what_is_masked_out_is_not_there():
    points = problem(200, 5, "ties", torch.float32)
    mask = torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.4
    rows = mask.nonzero().flatten()
    want = farthest_first(points[rows], 40, start=7)
    points[~mask] = torch.nan
    for dressed in (points, torch.cat([points[rows], points[~mask]])):  # holes; padding
        at = rows if dressed is points else torch.arange(len(rows))
        got = farthest_first(dressed, 40, int(at[7]), mask=~dressed.isnan().any(1))
        assert torch.equal(got.indices, at[want.indices])
        assert torch.equal(got.sq_radii, want.sq_radii)
        assert torch.equal(got.sq_dists[at], want.sq_dists)
        assert torch.equal(got.nearest[at], want.nearest)
        assert torch.equal(got.counts, want.counts)


def test_one_point_let_in():
    mask = torch.tensor([[False, False, True], [True, False, False]])
    result = farthest_first(
        torch.full((2, 3, 4), torch.nan).masked_fill(mask[..., None], 1.5), 1, torch.tensor([[2], [0]]), mask=mask
    )
    assert result.indices.tolist() == [[2], [0]]
    assert result.sq_dists.tolist() == [[0, 0, 0]] * 2
    assert result.nearest.tolist() == [[-1, -1, 0], [0, -1, -1]]


@pytest.mark.parametrize(
    ("until_radius", "made"), [(8.0, 1), (7.999, 2), (4.0, 2), (3.999, 3), (1.0, 3), (0.5, 4), (0.0, 5), (torch.inf, 1)]
)
def test_stops_at_a_radius(until_radius, made):
    points = torch.tensor([[1.0], [1.0], [5.0], [9.0], [0.0], [0.5]])
    result = farthest_first(points, 6, until_radius=until_radius)
    everything = farthest_first(points, 6)
    assert torch.equal(result.indices, everything.indices[:made])
    assert torch.equal(result.sq_radii, everything.sq_radii[:made])
    assert result.sq_radii[-1] <= until_radius**2
    assert result.counts.sum() == 6
    both = farthest_first(torch.stack([points, 100 * points]), 6, until_radius=until_radius)
    assert both.indices[0].tolist() == result.indices.tolist() + [-1] * (6 - made)
    assert both.sq_radii[0].tolist() == result.sq_radii.tolist() + [result.sq_radii[-1].item()] * (6 - made)


def test_counts_are_the_cells():
    points = problem(500, 6, "duplicates", torch.float32)
    result = farthest_first(points, 200)
    assert torch.equal(result.counts, torch.bincount(result.nearest, minlength=200))
    assert bool((result.counts == 0).any())  # duplicates are picked when nothing else is left
    both = farthest_first(torch.stack([points, points + 1]), 200)
    for cloud in (0, 1):
        assert torch.equal(both.counts[cloud], torch.bincount(both.nearest[cloud], minlength=200))
