"""What is made of an Influence, or stands beside it, on two ranks: features, removals, samplers, retrainings."""

import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist

from fastif.ranks import RankFailed, Ranks
from fastif.samplers import k_center
from tests.helpers.crew import Crew
from tests.helpers.problems import trained
from tests.ranks.other_cases import (
    bad_centres,
    centres,
    features,
    groups,
    halves,
    removal,
    retrained,
    subset_of_sampler,
    train_and_end,
    wrapped,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("n", [24, 3])
def test_features_stand_in_the_order_of_the_examples(two, n):
    want = features(n)
    for got in two(features, n):
        assert torch.equal(got["labels"], want["labels"])
        for key in ("features", "logits"):
            assert torch.allclose(got[key], want[key], rtol=0, atol=1e-14)


def test_samplers_draw_the_same_and_removals_agree(two):
    (indices, weights), want = subset_of_sampler(), removal(trained())
    for got in two(subset_of_sampler):
        assert torch.equal(got[0], indices)
        assert torch.allclose(got[1], weights, rtol=1e-12)
    first, second = two(removal, trained())
    assert torch.equal(first, second)
    assert torch.allclose(first, want, rtol=0, atol=1e-8 * float(want.abs().max()))


def test_a_group_narrows_the_ranks(two):
    (scores, world, alike), other = two(groups)
    assert alike
    assert scores.shape == (2, 24)
    assert world == 1
    assert other is None


def test_networks_are_trained_by_all_ranks_to_the_same_bits(two, tmp_path):
    want = retrained(None)
    for folder in (None, str(tmp_path / "two")):
        assert all(torch.equal(got, want) for got in two(retrained, folder))
    assert all(torch.equal(got, halves()) for got in two(halves))
    assert torch.equal(retrained(str(tmp_path / "two")), want)
    two.begin(partial(retrained, processes=2), None)
    for failed in two.end():
        assert "processes=2 on 2 ranks: each rank trains one network at a time" in failed.text


def test_retrainings_go_on_after_a_rank_was_killed(tmp_path):
    crew, folder = Crew(2, timeout=5), str(tmp_path / "job")
    try:
        crew.begin(retrained, folder, train_and_end)
        left, dead = crew.end()
        assert dead is None
        assert left.kind == "RankFailed"
    finally:
        crew.dismiss()
    lines = (tmp_path / "job" / "retrained.jsonl").read_text().count('"set"')
    assert 2 <= lines < 5
    assert torch.equal(retrained(folder, train_and_end), retrained(None))


@pytest.mark.parametrize("lengths", [(40, 25), (3, 50), (0, 20)], ids=str)
def test_centres_of_ranks_are_those_of_chunks(two, lengths):
    points = torch.randn(sum(lengths), 3, generator=torch.Generator().manual_seed(0)).double()
    pieces = [part for part in points.split(lengths) if len(part)]
    for start, metric, weighted in (
        (None, "euclidean", True),
        (7, "cosine", True),
        (torch.tensor([9, 2]), "euclidean", False),
    ):
        first, second = two(centres, lengths, start, metric, weighted)
        begun = start
        if start is None:
            begun = int(torch.randint(len(points), (1,), generator=torch.Generator().manual_seed(1)))
        want = k_center(pieces, 6, start=begun, metric=metric, weighted=weighted, chunk_rows=1, progress=False)
        for got in (first, second):
            assert torch.equal(got.indices, want.indices)
            assert torch.equal(got.weights, want.weights)
    best = k_center(points, 6, start=7, progress=False).indices
    reach = [torch.cdist(points, points[of]).amin(1).max() for of in (best, two(centres, lengths, 7)[0].indices)]
    assert reach[1] <= 4 * reach[0]  # the smallest radius is no larger than that of the exact scheme
    assert torch.equal(centres(lengths, 7).indices, best)


def test_centres_of_a_rank_with_nan(two):
    two.begin(bad_centres, 1)
    first, second = two.end()
    assert first.text == f"on rank 1: {second.text}"
    assert "row 2" in second.text


@pytest.mark.parametrize("how", ["data parallel", "sharded"])
def test_a_model_wrapped_for_training_scores_as_it_is(two, how):
    for got, want in two(wrapped, how):
        assert torch.allclose(got, want, rtol=0, atol=1e-12 * float(want.abs().max()))


def test_a_process_group_is_gone_when_it_is_destroyed(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        ranks, group = Ranks(dist.group.WORLD), weakref.ref(dist.group.WORLD)
        assert ranks.group is dist.group.WORLD
    finally:
        dist.destroy_process_group()
    assert group() is None
    with pytest.raises(RankFailed, match="the process group of 1 ranks was destroyed"):
        _ = ranks.group
