"""A folder of scores that ranks write together: the bits of one process, also after some of them were killed."""

import random
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from fastif import CG, EKFAC, Influence, ScoreFolder
from fastif.folder_lock import locked
from tests.helpers.by_hand import problem
from tests.helpers.crew import Crew
from tests.ranks.cases import exchanges, job, job_elsewhere

pytestmark = pytest.mark.usefixtures("one_thread")


def state_of():
    model, data, _ = problem("mlp")
    return Influence(model, curvature=EKFAC(1e-2), layers="*", progress=False, batch_size=3).fit(data).state_dict()


@pytest.mark.parametrize(
    "how",
    [{"replicate": True}, {"replicate": True, "by": "layer"}, {"low_rank": 1}, {"low_rank": 2}],
    ids=["all", "layer", "rank 1", "rank 2"],
)
def test_two_ranks_write_the_bits_of_one_process(two, tmp_path, how):
    state = state_of()
    want, error, blocks = job(str(tmp_path / "one"), state, **how)
    got = two(partial(job, **how), str(tmp_path / "two"), state)
    assert all(torch.equal(found, want) for found, _, _ in got)
    assert [lost for _, lost, _ in got] == [error, error]
    assert got[0][2] + got[1][2] == blocks
    assert min(got[0][2], got[1][2]) > 0
    kept = ScoreFolder(tmp_path / "two")
    assert kept.finished
    assert kept.settings == ScoreFolder(tmp_path / "one").settings
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )
    again = two(partial(job, **how), str(tmp_path / "one"), state)
    assert [written for _, _, written in again] == [0, 0]


def test_estimators_that_multiply_write_together(two, tmp_path):
    cg = CG(0.3, tolerance=1e-10)
    want, _, _ = job(str(tmp_path / "one"), None, of=cg)
    first, second = two(partial(job, of=cg), str(tmp_path / "two"), None)
    assert torch.equal(first[0], second[0])
    assert torch.allclose(first[0], want, rtol=0, atol=1e-8 * float(want.abs().max()))
    assert ScoreFolder(tmp_path / "two").settings["ranks"] == 2


@pytest.mark.parametrize("by", ["all", "layer"])
def test_a_job_goes_on_as_it_was_begun(two, tmp_path, by):
    """Ranks that keep the curvature for one another hold queries as matrices, one process in factors."""
    state, one, both = state_of(), str(tmp_path / "one"), str(tmp_path / "two")
    alone, together = job(one, state, by), two(job, both, state, by)[0]
    assert torch.allclose(alone[0], together[0], rtol=0, atol=1e-9 * float(alone[0].abs().max()))
    assert not torch.equal(alone[0], together[0])  # else this test would show nothing
    for folder, want in ((one, alone), (both, together)):
        lost = sorted(Path(folder).glob("scores-*.npy"))[1::2]
        for block in lost:
            block.unlink()
        found = [job(folder, state, by)] if folder == both else two(job, folder, state, by)
        assert all(torch.equal(scores, want[0]) for scores, _, _ in found)
        assert sum(written for _, _, written in found) == len(lost) > 1


def test_a_job_goes_on_with_another_number_of_ranks(two, tmp_path):
    state = state_of()
    want, _, blocks = two(job, str(tmp_path / "whole"), state)[0]
    blocks = ScoreFolder(tmp_path / "whole").count_blocks()[1]
    crew, folder = Crew(2, timeout=5), tmp_path / "two"
    try:
        crew.begin(job, str(folder), state, "all", 2)
        left, dead = crew.end()
        assert dead is None
        assert left.kind == "RankFailed"
        assert "rank 1" in left.text or "store" in left.text
    finally:
        crew.dismiss()
    there = ScoreFolder(folder).count_blocks()[0]
    assert 2 <= there < blocks
    found, _, written = job(str(folder), state)
    assert torch.equal(found, want)
    assert written == blocks - there


def test_folders_that_are_not_shared_or_in_use(two, tmp_path):
    two.begin(job_elsewhere, str(tmp_path))
    for found in two.end():
        assert "is not the folder that the first rank writes to" in found.text
    (tmp_path / "held").mkdir()
    with locked(tmp_path / "held"):
        two.begin(job, str(tmp_path / "held"), None)
        for found in two.end():
            assert found.kind == "FolderInUse"
            assert "is being written by process" in found.text


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_rank_is_killed_at_any_moment(tmp_path, seed):
    state, draw = state_of(), random.Random(seed)
    replicate = seed % 2 == 0
    whole = Crew(2)
    try:
        want = whole(partial(job, replicate=replicate), str(tmp_path / "whole"), state)[0][0]
    finally:
        whole.dismiss()
    blocks = ScoreFolder(tmp_path / "whole").count_blocks()[1]
    crew, folder = Crew(2, timeout=4), tmp_path / "two"
    try:
        crew(exchanges)
        crew.begin(partial(job, replicate=replicate), str(folder), state)
        time.sleep(draw.uniform(0, 0.4))
        victim = draw.randrange(2)
        crew.kill(victim)
        answer = crew.end(60)[1 - victim]
        assert isinstance(answer, tuple) or answer.kind == "RankFailed", answer  # it was done, or it stopped
    finally:
        crew.dismiss()
    begun = (folder / "manifest.json").exists()
    there = ScoreFolder(folder).count_blocks()[0] if begun else 0
    found, _, written = job(str(folder), state)
    assert torch.allclose(found, want, rtol=0, atol=1e-9 * float(want.abs().max()))
    assert torch.equal(found, want) or not (begun or replicate)  # begun by one process, it is in that one's form
    assert written == blocks - there
