"""A rank keeps the factors of its own layers alone; what needs those of others asks their owners, or brings them."""

import copy
from functools import partial

import pytest
import torch

from fastif import EKFAC, ExactBlock, Influence, Shampoo
from tests.helpers.by_hand import problem
from tests.helpers.crew import Crew, Failed
from tests.ranks.cases import ESTIMATORS, answers
from tests.ranks.owner_cases import (
    copied,
    drawn,
    held,
    in_train_mode,
    in_turns,
    keeps_one,
    loads_and_moves,
    owner_fails,
    summed,
)
from tests.ranks.test_estimators import compare

KEPT = {"kfac": 1, "ekfac": 1, "shampoo": 1, "exact": 1, "diagonal": 2}  # copies of the curvature on two ranks


@pytest.mark.parametrize("name", KEPT)
def test_a_rank_holds_what_it_owns(two, name):
    whole, _, reported = held(ESTIMATORS[name])
    for replicate in (False, True):
        ranks = two(partial(held, replicate=replicate), ESTIMATORS[name])
        assert [size for size, _, _ in ranks] == [planned for _, planned, _ in ranks] or name in ("exact", "diagonal")
        copies = 2 if replicate else KEPT[name]
        assert sum(size for size, _, _ in ranks) == copies * whole
        assert max(size for size, _, _ in ranks) < whole or copies == 2
        for _, _, theirs in ranks:
            assert theirs == pytest.approx(reported, rel=1e-9)


def test_what_another_rank_keeps_says_where_it_is(two):
    first, second = two(keeps_one)
    for mine, theirs in ((first, second), (second, first)):
        assert theirs["rank"] != mine["rank"]
        assert f"kept by rank {theirs['rank']}" in mine["said"]
        assert "Influence.gather() on all ranks" in mine["said"]
        assert mine["state of one"] == (mine["rank"] == 1)
    assert all(torch.equal(one, other) for one, other in zip(first["state"], second["state"], strict=True))
    assert torch.equal(first["state of 1"][0], first["state"][0])


def test_copies_pickles_and_gathered_ones_score_alike(two):
    first, second = two(copied)
    for got in (first, second):
        assert torch.allclose(got["copied"], got["scores"], rtol=0, atol=1e-12)
        assert torch.allclose(got["alone"], got["scores"], rtol=0, atol=1e-12)
        assert torch.equal(got["copied"], got["scores"])
        assert got["whole"]


@pytest.mark.parametrize("estimator", [EKFAC(1e-2), Shampoo(1e-2), ExactBlock(1e-2)], ids=lambda e: type(e).__name__)
def test_little_memory_takes_turns(two, estimator):
    want = in_turns(estimator, memory=1 << 27)
    for got in two(partial(in_turns, memory=600), estimator):
        assert got["passes"] > want["passes"] == 2
        assert got["queries"] > 1
        for key in ("scores", "layers", "tokens", "low rank", "self", "groups"):
            assert torch.allclose(got[key], want[key], rtol=0, atol=1e-9 * float(want[key].abs().max())), key


def test_an_error_of_an_owner_ends_all_with_its_number(two):
    for op in ("scores", "self_influence", "on_parameters"):
        two.begin(owner_fails, op)
        first, second = two.end()
        assert isinstance(first, Failed)
        assert isinstance(second, Failed)
        assert first.text == f"on rank 1: {second.text}" == "on rank 1: layer '2' does not solve today"
    assert all(not isinstance(one, Failed) for one in two(keeps_one))  # and they go on together


def test_queries_of_a_model_in_train_mode_stay_in_their_batches(two, tmp_path):
    want = in_train_mode(str(tmp_path / "one"))
    for got in two(in_train_mode, str(tmp_path / "two")):
        compare(got, want)


def test_owners_are_asked_with_one_state_and_the_same_batches(two):
    model, (x, y), _ = problem("mlp")
    fits = [Influence(model, curvature=EKFAC(1e-2), layers="*", progress=False).fit((x[:n], y[:n])) for n in (24, 20)]
    state, other = (made.state_dict() for made in fits)
    want = torch.cat([value.flatten() for value in fits[0].on_parameters((x[3:7], y[3:7])).values()])
    given = {"state": state, "first": 3}
    for got in two(loads_and_moves, by_rank=[given, given]):
        assert torch.allclose(got, want, rtol=0, atol=1e-12 * float(want.abs().max()))
    for differs, name in (({"state": other}, "state="), ({"first": 4}, "batch=")):
        two.begin(loads_and_moves, by_rank=[given, given | differs])
        for found in two.end():
            assert isinstance(found, Failed)
            assert f"rank 1 has another {name} than rank 0" in found.text


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4])
def test_more_ranks_hold_their_own_and_answer_alike(world):
    crew = Crew(world, 60)
    try:
        whole, _, _ = held(ESTIMATORS["ekfac"])
        ranks = crew(held, ESTIMATORS["ekfac"])
        assert sum(size for size, _, _ in ranks) == whole
        assert [size for size, _, _ in ranks] == [planned for _, planned, _ in ranks]
        for name in ("ekfac", "ekfac separable", "exact", "cg", "mixed"):
            compare(crew(partial(answers, replicate=True), name)[-1], answers(name))
        want = in_turns(EKFAC(1e-2), memory=1 << 27)
        got = copy.copy(crew(partial(in_turns, memory=600), EKFAC(1e-2))[-1])
        assert torch.allclose(got["self"], want["self"], rtol=1e-9)
    finally:
        crew.dismiss()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("bucket", [8, 100, 1 << 20])
def test_sums_arrive_with_their_owners_in_pieces_of_any_size(two, dtype, bucket):
    one, other = drawn(0, dtype), drawn(1, dtype)
    for found, names in zip(two(summed, dtype, bucket), ({"few", "none", "more", "all"}, {"many", "all"}), strict=True):
        assert found.keys() == names
        assert all(torch.equal(found[name], one[name] + other[name]) for name in names)
