"""Training data of which each rank brings a part count as all of them, in the order of the ranks."""

import pytest
import torch

from tests.helpers.crew import Crew
from tests.ranks.sharded_cases import job_of_parts, of_parts, parts_refused
from tests.ranks.test_estimators import compare

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("kind", "n", "name", "divide"),
    [
        ("sampler", 24, "ekfac", False),
        ("stream", 23, "kfac monte carlo", False),
        ("tensors", 23, "data inf", False),
        ("batches", 5, "cg", False),
        ("stream", 1, "ekfac", False),
        ("tensors", 1, "ekfac", False),
        ("stream", 9, "ekfac", True),
        ("tensors", 1, "ekfac", True),
    ],
)
def test_parts_count_as_all_of_them_in_the_order_of_the_ranks(two, kind, n, name, divide):
    want = of_parts(kind, n, 2, name, k=min(n, 4))
    for got in two(of_parts, kind, n, 2, name, divide, min(n, 4)):
        compare(got, want, 1e-6 if name == "cg" else 1e-9)


@pytest.mark.parametrize(("n", "divide", "by"), [(23, False, "all"), (9, True, "layer"), (1, True, "token")])
def test_a_folder_of_parts(two, tmp_path, n, divide, by):
    want = job_of_parts(str(tmp_path / "one"), n, 2, divide, by)
    for got in two(job_of_parts, str(tmp_path / "two"), n, 2, divide, by):
        assert got.shape == want.shape
        assert torch.allclose(got, want, rtol=0, atol=1e-9 * float(want.abs().max()))


def test_what_cannot_be_told_of_parts_is_refused_on_all_ranks(two, tmp_path):
    for rank, said in enumerate(two(parts_refused, str(tmp_path / "scores"))):
        assert "DistributedSampler shuffles" in said["shuffles"]
        assert "repeats 1 of 23 examples" in said["repeats"]
        assert (
            f"drop_last=True to it, which leaves out the last 1, or a sampler of your own, such as range({rank}, 23, 2)"
            in (said["repeats"])
        )
        assert f"is that of rank 0 of 3, and this is rank {rank} of 2" in said["another's"]
        assert "say so with fastif.sharded(loader)" in said["unsaid"]
        assert "draws its order with DistributedSampler" in said["unsaid and shuffled"]
        assert "is a stream, which each of 2 ranks would read" in said["stream"]
        assert "ranks 0 and 1 bring the same 24 examples" in said["not shared"]
        assert "ranks 0 and 1 bring the same 24 examples" in said["same tensors"]
        assert "holds no examples, on any rank" in said["empty"]
        assert said["query"].startswith("scores: query= needs all examples on every rank")
        assert "multiplies with the data for every solve needs all examples on every rank" in said["solves"]
        assert said["plan"].startswith("plan needs all examples on every rank")
        assert said["index"].startswith("index needs all examples on every rank")
        assert said["remove"].startswith("remove needs all examples on every rank")
        assert said["dropped"] == "22"


@pytest.mark.slow
def test_parts_on_three_ranks():
    crew = Crew(3, 60)
    try:
        for kind, n, divide in (
            ("sampler", 24, False),
            ("stream", 23, True),
            ("tensors", 2, True),
            ("batches", 7, True),
        ):
            want = of_parts(kind, n, 3, k=2)
            for got in crew(of_parts, kind, n, 3, "ekfac", divide, 2):
                compare(got, want)
    finally:
        crew.dismiss()
