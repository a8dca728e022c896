import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastif.ops import _library, farthest_first
from tests import reference
from tests.helpers.points import COMPILED, HARD, KINDS, check_equal, check_same_bits, op, problem

pytestmark = pytest.mark.usefixtures("kernel")


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
    torch.library.opcheck(torch.ops.fastif.farthest_first.default, args)


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
