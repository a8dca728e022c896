"""The lazy CPU kernel of farthest_first, with each of its filters, against the plain one: the same bits."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fastif.ops import build_info, farthest_first
from tests.helpers.points import HARD, KINDS, check_equal, problem

pytestmark = pytest.mark.skipif(not build_info()["compiled"], reason="the extension is not compiled")


def run_on(kernel: str, points: torch.Tensor, k: int, start: int = 0):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTIF_KCENTER", kernel)
        return farthest_first(points, k, start)


def lazy_kernels() -> list[str]:
    """The lazy kernel with every filter that this processor has."""
    kernels = []
    for name in ("vnni", "avx512", "avx2", "generic"):
        try:
            run_on(f"lazy:{name}", torch.zeros(1, 1), 1)
        except ValueError:
            continue
        kernels.append(f"lazy:{name}")
    return kernels


@given(
    n=st.sampled_from([3, 95, 97, 500, 2048, 2049, 3000, 9000]),
    d=st.sampled_from([1, 3, 4, 17, 67, 130, 200]),
    kind=st.sampled_from(KINDS + HARD),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    k=st.sampled_from([1, 2, 3, 40, 100, 300, 700]),
    seed=st.integers(0, 1000),
)
@example(n=3000, d=4, kind="integers", dtype=torch.float32, k=3000, seed=0)
@example(n=3000, d=130, kind="sphere", dtype=torch.float32, k=700, seed=0)
@example(n=3000, d=200, kind="nearly", dtype=torch.float32, k=700, seed=1)
@example(n=2500, d=3, kind="normal", dtype=torch.float64, k=2500, seed=0)
def test_lazy_is_plain_to_the_last_bit(n, d, kind, dtype, k, seed):
    points, k, start = problem(n, d, kind, dtype, seed), min(n, k), seed % n
    want = run_on("plain", points, k, start)
    for lazy in lazy_kernels():
        check_equal(run_on(lazy, points, k, start), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "ties", "nearly"])
def test_many_points_any_threads(kind, dtype):
    points = problem(20_000, 48, kind, dtype)
    want = run_on("plain", points, 400)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            check_equal(run_on("lazy", points, 400), want)
    finally:
        torch.set_num_threads(threads)


def test_unset_chooses_by_size():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FASTIF_KCENTER", raising=False)
        for n, k in ((50, 3), (20_000, 64)):
            points = problem(n, 16, "normal", torch.float32)
            check_equal(farthest_first(points, k), run_on("plain", points, k))


@pytest.mark.parametrize("name", ["fast", "lazy:", "lazy:sse", "plain "])
def test_unknown_kernel(name):
    with pytest.raises(ValueError, match=f"FASTIF_KCENTER must be plain, lazy or lazy:FILTER .*, got {name}"):
        run_on(name, torch.zeros(2, 2), 1)


def test_an_unknown_kernel_is_told_before_the_points_are_read():
    for points in (torch.full((2, 2), torch.nan), torch.full((8, 2, 2), torch.nan)):  # one cloud; one for each thread
        with pytest.raises(ValueError, match="FASTIF_KCENTER must be plain, lazy or lazy:FILTER .*, got fast"):
            run_on("fast", points, 1)
