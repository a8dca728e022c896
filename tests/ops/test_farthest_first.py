import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastif.ops import FarthestFirst, _library, build_info, farthest_first
from tests import reference

op = torch.ops.fastif.farthest_first


COMPILED = build_info()["compiled"]


@pytest.fixture(autouse=True, scope="module", params=["plain", "lazy"] if COMPILED else ["plain"])
def kernel(request):
    """Every test runs on the kernel that reads all points for each pick, and on the lazy one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTIF_KCENTER", request.param)
        yield request.param


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
    for name, mine, theirs in zip(FarthestFirst._fields, got, want, strict=True):
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_floats_are_taken_exactly(dtype):
    points = problem(3000, 40, "heavy", torch.float64).clamp(-6e4, 6e4).to(dtype)
    check_equal(farthest_first(points[:, ::2], 300), farthest_first(points[:, ::2].double(), 300))


def free_memory() -> int:
    known = "SC_AVPHYS_PAGES" in os.sysconf_names
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 0


@pytest.mark.skipif(not COMPILED or free_memory() < 14e9, reason="needs the extension and 14 GB of free memory")
def test_past_two_to_the_31_entries(kernel):
    if kernel == "plain":
        pytest.skip("the lazy kernel begins as the plain one")
    n, d = 1_100_003, 2_000
    points = torch.zeros(n, d)
    points[-1, -1] = 3
    result = farthest_first(points, 2)
    assert result.indices.tolist() == [0, n - 1]
    assert result.sq_radii.tolist() == [9, 0]
    assert result.nearest[-1] == 1
    del points


def test_progress_is_reported(kernel):
    points, k = torch.randn(60_000, 64), {"plain": 400, "lazy": 20_000}[kernel] if COMPILED else 40
    seen = []
    _library._report_to(lambda done, total: seen.append((done, total)))
    try:
        farthest_first(points, k)
        farthest_first(points.view(4, -1, 64), k // 4)
    finally:
        _library._report_to(None)
    assert len(seen) >= 2
    assert {total for _, total in seen} == {k}
    assert all(0 <= done <= k for done, _ in seen)


def test_a_bar_is_shown(capsys):
    result = farthest_first(torch.randn(300, 8), 100, progress=True)
    assert "100/100" in capsys.readouterr().err
    farthest_first(torch.zeros(3, 9, 2), 4, picks=torch.tensor([1, 4, 2]), until_radius=1.0, progress=True)
    assert "7/7" in capsys.readouterr().err
    assert len(result.indices) == 100


def test_what_a_report_raises_ends_the_run():
    class Enough(Exception):
        pass

    def report(done, total):
        raise Enough

    points = torch.randn(60_000, 64)
    for _ in range(3):
        _library._report_to(report)
        held = sys.getrefcount(report)
        try:
            with pytest.raises(Enough):
                farthest_first(points, 30_000)
            with pytest.raises(Enough):
                farthest_first(points.view(6, 10_000, 64), 9_000)
            assert sys.getrefcount(report) == held
        finally:
            _library._report_to(None)
    assert len(farthest_first(points, 3).indices) == 3


@pytest.mark.parametrize(
    ("shape", "picks"),
    [((400_000, 64), None), ((6, 80_000, 64), [80_000] * 6), ((2, 150_000, 64), [1, 150_000])],
    ids=["one cloud", "many clouds", "one cloud of two"],
)
def test_interrupt_is_answered_within_a_second(shape, picks):
    code = (
        "import time, torch\n"
        "from fastif.ops import farthest_first\n"
        f"points, picks = torch.randn({shape}), {picks}\n"
        "print('running', flush=True)\n"
        "try:\n"
        "    farthest_first(points, 200_000 if picks is None else picks[-1], picks=picks and torch.tensor(picks))\n"
        "except KeyboardInterrupt:\n"
        "    print(time.monotonic(), flush=True)\n"
        "print(farthest_first(torch.eye(3), 2).indices.tolist())\n"
    )
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "running\n"
            time.sleep(1.5)
            sent = time.monotonic()
            process.send_signal(signal.SIGINT)
            ended, after = process.communicate(timeout=60)[0].splitlines()
        finally:
            process.kill()
    assert float(ended) - sent < 1
    assert after == "[0, 1]"


def test_gradients_are_cut():
    assert not any(out.requires_grad for out in farthest_first(torch.randn(4, 2, requires_grad=True), 2))


@pytest.mark.parametrize(
    "args",
    [
        (torch.randn(20, 5), 4, torch.tensor([1])),
        (torch.randn(20, 5).half(), 4, torch.tensor([1, 3]), None, torch.arange(20) % 5 > 0, 1.0),
        (torch.randn(3, 20, 5), 4, torch.tensor([[1], [0], [7]]), torch.tensor([1, 4, 2])),
    ],
    ids=["one", "masked", "many"],
)
def test_opcheck(args):
    torch.library.opcheck(op.default, args)


@pytest.mark.parametrize("shape", [(10, 4), (3, 10, 4)])
def test_compiles_whole(shape):
    def radii(x, start, mask):
        result = farthest_first(x, 3, start, mask=mask)
        return result.sq_radii, result.counts

    compiled = torch.compile(radii, fullgraph=True, backend="eager")
    x = torch.randn(shape)
    mask = torch.arange(10).expand(shape[:-1]) < 9
    for start in (2, torch.tensor([2, 5]).expand(*shape[:-2], 2)):
        for got, want in zip(compiled(x, start, mask), radii(x, start, mask), strict=True):
            assert torch.equal(got, want)


NAN = torch.tensor([[0.0, 1.0], [2.0, torch.nan], [torch.nan, 1.0]])
X, XS = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 1.0]]), torch.zeros(2, 3, 2)
START, STARTS = torch.tensor([0]), torch.tensor([[0], [2]])
MANY = dict(points=XS, start=STARTS)
FIRST_LAST = torch.tensor([True, False, True])

GOOD = dict(points=X, k=2, start=START)
BAD = [  # what is given in place of these, the error, the end of its message
    (dict(points=X[0]), ValueError, "points must be [n, d] or [b, n, d], got shape [2]"),
    (dict(points=X.long()), TypeError, "points must be float16, bfloat16, float32 or float64, got Long"),
    (dict(points=X[:0]), ValueError, "points must have at least one row and one column, got shape [0, 2]"),
    (dict(points=X[:, :0]), ValueError, "points must have at least one row and one column, got shape [3, 0]"),
    (dict(points=XS[:0]), ValueError, "must have at least one cloud, one row and one column, got shape [0, 3, 2]"),
    (dict(k=4), ValueError, "k must be in [1, n=3], got k=4"),
    (dict(k=0), ValueError, "k must be in [1, n=3], got k=0"),
    (dict(start=START.int()), TypeError, "start must be int64, got Int"),
    (dict(start=START[:0]), ValueError, "start must be [s], s >= 1, with points [3, 2], got shape [0]"),
    (dict(start=STARTS), ValueError, "start must be [s], s >= 1, with points [3, 2], got shape [2, 1]"),
    (
        MANY | dict(start=STARTS[:1]),
        ValueError,
        "start must be [b, s], s >= 1, with points [2, 3, 2], got shape [1, 1]",
    ),
    (dict(start=torch.arange(3)), ValueError, "k must be at least the number of starts, 3, got k=2"),
    (dict(start=START + 3), ValueError, "start must be in [0, n=3), got start=3"),
    (MANY | dict(start=STARTS - 1), ValueError, "start must be in [0, n=3), got start=-1 in cloud 0"),
    (dict(start=START.expand(2)), ValueError, "start must not repeat a point, got start=0 twice"),
    (MANY | dict(start=torch.tensor([[0, 1], [2, 2]])), ValueError, "got start=2 twice in cloud 1"),
    (dict(mask=torch.ones(3)), TypeError, "mask must be bool, got Float"),
    (dict(mask=torch.ones(1, 3).bool()), ValueError, "mask must be [n] with points [3, 2], got shape [1, 3]"),
    (MANY | dict(mask=FIRST_LAST), ValueError, "mask must be [b, n] with points [2, 3, 2], got shape [3]"),
    (dict(k=3, mask=FIRST_LAST), ValueError, "k must be at most the number of points that mask lets in, 2, got 3"),
    (dict(start=START + 1, mask=FIRST_LAST), ValueError, "must be a point, got start=1, which mask leaves out"),
    (dict(picks=START + 1), ValueError, "picks must be [b], with points [b, n, d], got shape [1] with points [3, 2]"),
    (MANY | dict(picks=START), ValueError, "with points [b, n, d], got shape [1] with points [2, 3, 2]"),
    (MANY | dict(picks=STARTS[:, 0].int()), TypeError, "picks must be int64, got Int"),
    (MANY | dict(picks=STARTS[:, 0]), ValueError, "picks must be in [s=1, k=2], got 0 in cloud 0"),
    (MANY | dict(picks=STARTS[:, 0] + 1), ValueError, "picks must be in [s=1, k=2], got 3 in cloud 1"),
    (MANY | dict(picks=STARTS[:, 0] + 1, k=3, mask=FIRST_LAST.expand(2, 3)), ValueError, "in, 2 in cloud 1, got 3"),
    (dict(until_radius=-1.0), ValueError, "until_radius must be at least 0, got -1"),
    (dict(until_radius=torch.nan), ValueError, "until_radius must be at least 0, got nan"),
    (dict(points=NAN), ValueError, "points must be finite, row 1 holds NaN or Inf"),
    (dict(points=NAN.double(), k=1), ValueError, "points must be finite, row 1 holds NaN or Inf"),
    (dict(points=NAN[1:], k=1), ValueError, "points must be finite, row 0 holds NaN or Inf"),
    (dict(points=NAN[1:2], k=1), ValueError, "points must be finite, row 0 holds NaN or Inf"),
    (dict(points=NAN.nan_to_num(nan=-torch.inf)), ValueError, "points must be finite, row 1 holds NaN or Inf"),
    (dict(points=NAN.bfloat16()), ValueError, "points must be finite, row 1 holds NaN or Inf"),
    (dict(points=NAN, mask=FIRST_LAST), ValueError, "points must be finite, row 2 holds NaN or Inf"),
    (MANY | dict(points=torch.stack([X, NAN])), ValueError, "row 1 of cloud 1 holds NaN or Inf"),
    (dict(points=1e200 * X.double()), ValueError, "(squares overflow), got 2e+200 in row 1"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input(given, error, message):
    with pytest.raises(error) as caught:
        op(**(GOOD | given))
    assert str(caught.value).splitlines()[0].startswith("farthest_first: ")
    assert str(caught.value).splitlines()[0].endswith(message)


@pytest.mark.parametrize("start", [-1, 3])
def test_start_out_of_range(start):
    with pytest.raises(ValueError, match=rf"start must be in \[0, n=3\), got start={start}"):
        farthest_first(X, 1, start)


def test_largest_float32_is_no_overflow():
    points = torch.tensor([[3e38], [-3e38], [0.0]])
    assert farthest_first(points, 2).sq_radii.isfinite().all()
