"""An index that ranks build together has the bits of one process, also after a rank was killed; so have its answers."""

import os
import random
import time
from functools import partial

import pytest
import torch

from fastif import Index
from tests.helpers.crew import Crew
from tests.helpers.indexed import bits
from tests.ranks.cases import exchanges
from tests.ranks.indexes import (
    answered,
    answered_by_products,
    append_anew,
    ask,
    asked,
    build,
    different,
    index_state,
    merged,
    take_out,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def state():
    torch.set_num_threads(1)
    return index_state()


@pytest.fixture(scope="module")
def alone(state, tmp_path_factory):
    """An index that one process built."""
    folder = tmp_path_factory.mktemp("alone") / "index"
    assert build(str(folder), state) == 8
    return folder


def test_two_ranks_build_append_remove_and_ask_as_one_process_does(two, alone, state, tmp_path):
    folder = str(tmp_path / "two")
    written = two(build, folder, state)
    assert sum(written) == 8
    assert min(written) == 3
    assert bits(tmp_path / "two") == bits(alone)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in alone.iterdir()}
    want = ask(str(alone), state)
    for got in two(ask, folder, state):
        assert all(torch.equal(got[name], want[name]) for name in want)
    (tmp_path / "two" / "block-000000048.safetensors").unlink()  # as if the append had ended early
    assert two(append_anew, folder, state) == [60, 60]
    assert bits(tmp_path / "two") == bits(alone)
    gone = torch.tensor([3, 41, 17, 18])
    assert two(take_out, folder, state, gone) == [56, 56]
    assert two(build, folder, state) == [0, 0]  # and what was removed does not come back
    one = Index(alone, asked(state)[0])
    left = Index(tmp_path / "two").examples
    assert not set(gone.tolist()) & set(left.tolist())
    found = two(ask, folder, state)[1]["scores"]
    assert torch.allclose(found, one.scores(asked(state)[2])[:, left], rtol=0, atol=1e-6 * float(found.abs().max()))


def test_a_fit_of_two_ranks_is_indexed_to_rounding(two, alone, tmp_path):
    want = ask(str(alone), None)["scores"]
    two(build, str(tmp_path / "two"), None)
    for got in two(ask, str(tmp_path / "two"), None):
        assert torch.allclose(got["scores"], want, rtol=0, atol=0.02 * float(want.abs().max()))  # int8


def test_a_job_goes_on_with_another_number_of_ranks(alone, state, tmp_path):
    crew, folder = Crew(2, timeout=3), tmp_path / "two"
    try:
        crew.begin(build, str(folder), state, 1)
        left, dead = crew.end()
        assert dead is None
        assert left.kind == "RankFailed"
    finally:
        crew.dismiss()
    there = len([*folder.glob("block-*")])
    assert 1 <= there < 8
    assert build(str(folder), state) == 8 - there
    assert bits(folder) == bits(alone)


def test_several_answers_of_two_ranks(two, state, tmp_path):
    for memory in (1 << 30, 1 << 14):  # all queries at a time, and some
        want = answered(None, state, memory=memory)
        for got in two(partial(answered, memory=memory), None, state):
            assert all(torch.equal(got[name], want[name]) for name in want)
    want = answered(str(tmp_path / "one"), state, share=0.3)
    for got in two(partial(answered, share=0.3), str(tmp_path / "two"), state):
        assert all(torch.equal(got[name], want[name]) for name in want)
    assert bits(tmp_path / "one") == bits(tmp_path / "two")
    want = answered_by_products()
    for got in two(answered_by_products):
        for name, values in want.items():
            assert torch.allclose(got[name], values, rtol=0, atol=1e-8 * float(values.abs().max()))


def test_two_ranks_merge_as_one_process_does(two, state, tmp_path):
    build(str(tmp_path / "a"), state)
    threshold = Index(tmp_path / "a").threshold
    build(str(tmp_path / "b"), state, threshold=threshold)
    folders = [str(tmp_path / name) for name in "ab"]
    assert merged(folders, str(tmp_path / "one"), state) == 120
    assert two(merged, folders, str(tmp_path / "two"), state) == [120, 120]
    assert bits(tmp_path / "one") == bits(tmp_path / "two")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"share": 0.5}, "another share= than rank 0"),
        ({"n": 59}, "another number of examples of train= than rank 0"),
        ({"ids": [str(i) for i in range(60)]}, "another ids than rank 0"),
    ],
)
def test_ranks_that_are_given_different_things_are_named(two, state, tmp_path, given, said):
    two.begin(different, str(tmp_path / "index"), state, by_rank=[{}, given])
    for failed in two.end():
        assert said in failed.text
    assert not (tmp_path / "index").exists()


@pytest.mark.slow
def test_three_ranks_build_and_ask_as_one_process_does(alone, state, tmp_path):
    crew = Crew(3)
    try:
        assert sum(crew(build, str(tmp_path / "three"), state)) == 8
        assert bits(tmp_path / "three") == bits(alone)
        want = ask(str(alone), state)
        for got in crew(ask, str(tmp_path / "three"), state):
            assert all(torch.equal(got[name], want[name]) for name in want)
        want = answered(None, state)
        for got in crew(answered, None, state):
            assert all(torch.equal(got[name], want[name]) for name in want)
    finally:
        crew.dismiss()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("FASTIF_KILLS", "4"))))
def test_a_rank_is_killed_at_any_moment(alone, state, tmp_path, seed):
    draw, folder = random.Random(seed), tmp_path / "two"
    crew = Crew(2)
    try:
        crew(exchanges)
        began = time.monotonic()
        crew(build, str(tmp_path / "unharmed"), state)
        took = time.monotonic() - began
        crew.begin(build, str(folder), state)
        time.sleep(draw.uniform(0, took))
        victim = draw.randrange(2)
        crew.kill(victim)
        answer = crew.end(120)[1 - victim]
        assert isinstance(answer, int) or answer.kind == "RankFailed", answer  # it was done, or it stopped
    finally:
        crew.dismiss()
    there = len([*folder.glob("block-*")]) if (folder / "manifest.json").exists() else 0
    if seed % 2:
        assert build(str(folder), state) == 8 - there
    else:
        crew = Crew(3)
        try:
            assert sum(crew(build, str(folder), state)) == 8 - there
        finally:
            crew.dismiss()
    assert bits(folder) == bits(alone)
    assert {path.name for path in folder.iterdir()} == {path.name for path in alone.iterdir()}  # nothing is left
