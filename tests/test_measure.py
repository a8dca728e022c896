"""Peak memory is that of the block's own tensors, whoever else counts, and nothing is said of it."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from fastif.measure import MEMORY_BY, Measure, PeakMemory

ROOT = Path(__file__).parents[1]
counted = pytest.mark.skipif(MEMORY_BY != "allocations", reason="memory is counted by fastif._memory")


def bytes_of(count):
    return torch.empty(count, dtype=torch.uint8)


def gone(thread):
    """Waits for the end of the thread, not of Python's part of it alone."""
    thread.join()
    end = time.monotonic() + 30
    while Path(f"/proc/self/task/{thread.native_id}").exists():
        assert time.monotonic() < end
        time.sleep(0.01)


@counted
def test_the_peak_is_of_what_stands_at_a_time():
    before = bytes_of(7000)
    with Measure() as work:
        del before  # was there: no credit
        first = bytes_of(1000)
        second = bytes_of(500)
        del first
        third = bytes_of(800)
        second.resize_(1200)
    assert work.peak_bytes == 2500  # a resized tensor stands beside what it was
    del second, third


@counted
def test_measures_stand_within_one_another():
    with Measure() as outer:
        held = bytes_of(1000)
        with Measure() as inner:
            del held  # the outer one's
            bytes_of(300)
        with Measure() as nothing:
            pass
    assert (outer.peak_bytes, inner.peak_bytes, nothing.peak_bytes) == (1000, 300, 0)


@counted
def test_a_block_that_another_thread_frees_is_no_loss():
    passed = []

    def elsewhere():
        with Measure() as work:
            passed.pop()
            bytes_of(50)
        passed.append(work.peak_bytes)

    with Measure() as work:
        passed.append(bytes_of(1000))
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        again = [bytes_of(1000) for _ in range(20)]  # one of them where the first was
    assert passed == [50]
    assert 20_000 <= work.peak_bytes <= 21_000
    del again


@counted
def test_a_measure_may_end_in_another_thread_and_nothing_of_it_stays():
    alive = PeakMemory.alive()
    work, inner = Measure(), Measure()
    work.__enter__()
    first = bytes_of(1000)
    inner.__enter__()
    first = bytes_of(300)
    thread = threading.Thread(target=lambda: (bytes_of(5000), work.__exit__()))
    thread.start()
    thread.join()
    bytes_of(9000)
    inner.__exit__()
    assert work.peak_bytes == 1300  # of this thread, until the other ended it
    assert inner.peak_bytes == 9300
    assert PeakMemory.alive() == alive
    del first


@counted
@pytest.mark.parametrize("ended", [True, False])
def test_a_measure_may_outlive_its_thread(ended):
    alive = PeakMemory.alive()
    work = [Measure()]

    def begin():
        work[0].__enter__()
        bytes_of(700)

    thread = threading.Thread(target=begin)
    thread.start()
    gone(thread)
    assert PeakMemory.alive() == alive + 1
    bytes_of(5000)
    if ended:
        work[0].__exit__()
        assert work[0].peak_bytes == 700
    work.clear()
    assert PeakMemory.alive() == alive


@pytest.mark.parametrize(
    "work",
    [
        "fastif.Influence(model, curvature=fastif.EKFAC(), progress=False).plan((x, y))",
        "fastif.remove(model, (x, y), torch.tensor([0]), progress=False)",
        "with Measure():\n    del x",
    ],
)
def test_nothing_is_said_on_stderr(work):
    """torch's own reporter warns, once in a process, of a block that is freed and was there before."""
    setup = (
        "import torch, fastif\n"
        "from fastif.measure import Measure\n"
        "model, x, y = torch.nn.Linear(4, 3), torch.randn(30, 4), torch.arange(30) % 3\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", setup + work], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_without_the_counter_the_resident_set_is_taken():
    """Two measures within one another share the process's one high-water mark; a process of its own has no reserve."""
    code = (
        "import torch\nfrom fastif import measure\nfrom fastif.measure import Measure\nmeasure.PeakMemory = None\n"
        "assert Measure(exact=True)._cpu is None\n"
        "with Measure() as outer:\n"
        "    torch.ones(96 << 20, dtype=torch.uint8)\n"
        "    with Measure() as inner:\n"
        "        torch.ones(40 << 20, dtype=torch.uint8)\n"
        "print(outer.peak_bytes, inner.peak_bytes)"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    if "None" in said:
        pytest.skip("no high-water mark of the resident set here")
    outer, inner = map(int, said.split())
    assert 90 << 20 <= outer <= 128 << 20
    assert 36 << 20 <= inner <= 60 << 20
