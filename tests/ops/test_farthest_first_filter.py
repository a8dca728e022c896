"""The filters of the lazy CPU kernel of farthest_first, each with and without its stage of axes: never a wrong bit."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastif.measure import MEMORY_BY, Measure
from fastif.ops import build_info, farthest_first
from tests.helpers.points import HARD, KINDS, check_equal, problem
from tests.ops.test_farthest_first_lazy import run_on

pytestmark = pytest.mark.skipif(not build_info()["compiled"], reason="the extension is not compiled")

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
GXX = shutil.which("g++")

FILTERS = ("vnni", "avxvnni", "int8", "avx512", "avx2", "generic")
ANYWHERE = ("int8", "generic")  # need no particular processor


def available() -> list[str]:
    """lazy:FILTER for every filter that this processor has."""
    found = []
    for name in FILTERS:
        try:
            run_on(f"lazy:{name}", torch.zeros(1, 1), 1)
        except ValueError:
            assert name not in ANYWHERE
            continue
        found.append(f"lazy:{name}")
    return found


def subspace(n: int, d: int, rank: int, noise: float, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Points near a subspace of low dimension, as the axes like them; with noise 0 nothing is left beside them."""
    g = torch.Generator().manual_seed(seed)
    signal = torch.randn(n, rank, generator=g, dtype=torch.float64) @ torch.randn(
        rank, d, generator=g, dtype=torch.float64
    )
    return (signal + noise * torch.randn(n, d, generator=g, dtype=torch.float64)).to(dtype)


def check_all_filters(points: torch.Tensor, k: int, start: int = 0) -> None:
    want = run_on("plain", points, k, start)
    for lazy in available():
        for axes in ("", "+axes"):
            check_equal(run_on(lazy + axes, points, k, start), want)


@settings(max_examples=20)
@given(
    n=st.sampled_from([5, 64, 300, 1000]),
    d=st.sampled_from([1, 2, 5, 63, 64, 65, 128, 129, 300]),
    kind=st.sampled_from(KINDS + HARD),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    k=st.sampled_from([4, 50, 200]),
    seed=st.integers(0, 1000),
)
@example(n=700, d=700, kind="offset", dtype=torch.float32, k=100, seed=0)
@example(n=1000, d=300, kind="nearly", dtype=torch.float32, k=200, seed=1)
@example(n=1000, d=129, kind="tails", dtype=torch.float32, k=200, seed=2)
@example(n=1000, d=65, kind="extremes", dtype=torch.float64, k=200, seed=3)
@example(n=1000, d=64, kind="tiny", dtype=torch.float32, k=200, seed=4)
@example(n=1000, d=63, kind="huge", dtype=torch.float64, k=200, seed=5)
@example(n=300, d=128, kind="equal", dtype=torch.float32, k=200, seed=6)
@example(n=300, d=31, kind="beyond", dtype=torch.float64, k=200, seed=7)
def test_every_filter_is_plain_to_the_last_bit(n, d, kind, dtype, k, seed):
    check_all_filters(problem(n, d, kind, dtype, seed), min(n, k), seed % n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("noise", [0.0, 1e-6])
@pytest.mark.parametrize("rank", [1, 20, 80])
def test_near_a_subspace(rank, noise, offset, dtype):
    points = subspace(1000, 130, rank, noise, dtype) + offset
    check_all_filters(points, 120, 7)


def test_distances_that_only_the_rest_tells_apart():
    """Rows with the same coordinates along the first axes: what the axes leave decides, and its norm says nothing."""
    g = torch.Generator().manual_seed(0)
    main = 100 * torch.randn(40, 200, generator=g).repeat(15, 1)
    turned = torch.nn.functional.normalize(torch.randn(600, 200, generator=g), dim=1)
    check_all_filters(main + 0.01 * turned, 150)


@pytest.mark.skipif(MEMORY_BY != "allocations", reason="memory is counted by fastif._memory")
def test_autocast_does_not_matter():
    """Nor do the axes: rounded to bfloat16 they would be of no use, and the memory of the coordinates not taken."""
    points = subspace(5000, 130, 10, 0.01, torch.float32)
    want = run_on("plain", points, 120)
    for lazy in available():
        peaks = []
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled), Measure() as work:
                check_equal(run_on(lazy + "+axes", points, 120), want)
            peaks.append(work.peak_bytes)
        assert peaks[0] is not None
        assert peaks[0] == peaks[1]


@pytest.mark.skipif(MEMORY_BY != "allocations", reason="memory is counted by fastif._memory")
def test_axes_are_chosen_by_a_sample():
    """Large enough for the lazy kernel to try the axes: it keeps their coordinates where they pay, and only there."""
    peaks, threads = [], torch.get_num_threads()
    for points in (subspace(40_000, 512, 10, 0.01, torch.float32), problem(40_000, 512, "normal", torch.float32)):
        want = run_on(available()[0], points, 1600)
        with Measure() as work:
            check_equal(run_on("lazy", points, 1600), want)
        peaks.append(work.peak_bytes)
        try:
            torch.set_num_threads(5 if threads != 5 else 3)
            check_equal(run_on("lazy", points, 1600), want)
        finally:
            torch.set_num_threads(threads)
    assert peaks[0] > peaks[1] + 40_000 * 10  # both have paid for the sample, which is gone by then


@pytest.mark.skipif(MEMORY_BY != "allocations", reason="memory is counted by fastif._memory")
def test_memory_is_a_fraction_of_the_points():
    """Besides the points and what is returned: int8 codes, coordinates, a sample."""
    points = subspace(20_000, 512, 10, 0.01, torch.float32)
    for lazy in available():
        if lazy.removeprefix("lazy:") in ("vnni", "avxvnni", "int8"):
            with pytest.MonkeyPatch.context() as patch, Measure() as work:
                patch.setenv("FASTIF_KCENTER", lazy + "+axes")
                farthest_first(points, 300)
            assert work.peak_bytes is not None
            assert work.peak_bytes <= 0.4 * points.nbytes


@pytest.mark.parametrize("name", ["vnni+", "generic+axis", "+axes", "generic+axes+axes", "generic +axes"])
def test_unknown_filter(name):
    with pytest.raises(ValueError, match=r"lazy or lazy:FILTER .*\+axes\), got lazy:"):
        run_on(f"lazy:{name}", torch.zeros(2, 2), 1)


@pytest.mark.parametrize("axes", ["", "+axes"])
def test_int8_has_a_largest_dimension(axes):
    points = torch.ones(1, 2**16 + 1)
    with pytest.raises(
        ValueError, match=re.escape(f"lazy:int8{axes} holds int8 codes and needs d <= 65536, got d=65537")
    ):
        run_on(f"lazy:int8{axes}", points, 1)
    assert run_on(f"lazy:generic{axes}", points, 1).indices.tolist() == [0]
    assert run_on(f"lazy:int8{axes}", points[:, 1:], 1).indices.tolist() == [0]


@pytest.mark.skipif(GXX is None, reason="g++ not found")
def test_dot_products(tmp_path):
    """The kernels by themselves: one that errs on the safe side would only cost time, and pass every test above."""
    sources = [HERE / "farthest_first_dots.cpp", CSRC / "farthest_first" / "cpu" / "dots.cpp"]
    flags = ["-std=c++20", "-O3", "-ffp-contract=off", "-Wall", "-Wextra", f"-I{CSRC}"]
    program = tmp_path / "dots"
    subprocess.run([GXX, *flags, *map(str, sources), "-o", str(program)], check=True, timeout=300)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert f"{len(available())} kinds, 0 failures" in done.stdout
