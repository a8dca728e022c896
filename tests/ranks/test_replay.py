"""Replays divided among ranks: networks, and the queries of those that are not enough for all ranks."""

import pytest
import torch

from fastif.measure import PeakMemory
from fastif.replay.dealing import cut, deal
from tests.helpers.crew import Crew
from tests.ranks.replay_cases import (
    answers,
    exploding,
    given_other,
    in_a_group,
    other_log,
    peaks,
    refused,
    sent,
    sourced,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def check_alike(of_ranks, want, exactly):
    """All ranks have the same bits, and those of one process where it is to be exactly so."""
    for got in of_ranks:
        for name, value in want.items():
            assert torch.equal(got[name], of_ranks[0][name]), name
            if exactly or name in ("indices", "off"):  # every segment of a training is one rank's
                assert torch.equal(got[name], value), name
            torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("networks", range(1, 6))
@pytest.mark.parametrize("queries", [1, 2, 7])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_query_is_taken_once_through_every_network(networks, queries, world):
    shares = [share for rank in range(world) for share in deal(networks, queries, rank, world)]
    taken = [(network, query) for network, parts in shares for query in parts]
    assert sorted(taken) == [(network, query) for network in range(networks) for query in range(queries)]
    work = [sum(len(parts) for _, parts in deal(networks, queries, rank, world)) for rank in range(world)]
    assert max(work) - min(work) <= 1
    if networks % world == 0:
        assert all(parts == range(queries) for _, parts in shares)
    lengths = [queries + number % 2 for number in range(networks)]
    parts_of = [
        (network, part) for rank in range(world) for network, parts in cut(lengths, rank, world) for part in parts
    ]
    assert parts_of == [(network, part) for network, length in enumerate(lengths) for part in range(length)]


@pytest.mark.parametrize(
    ("states", "how"), [(None, {}), (None, {"crossed": False, "matrix": "hessian"}), (12, {"queries_at_a_time": 2})]
)
def test_two_networks_on_two_ranks_to_the_same_bits(two, states, how):
    check_alike(two(answers, 2, states, how), answers(2, states, how), True)


@pytest.mark.parametrize(("networks", "states"), [(1, None), (1, 8), (3, None), (3, 12)])
def test_queries_of_networks_that_are_not_enough_are_divided(two, networks, states):
    check_alike(two(answers, networks, states), answers(networks, states), False)


def test_what_ranks_are_given_is_compared_before_any_work(two):
    for given, what in (
        ({"log": True}, "another log 1 than rank 0"),
        ({"model": True}, "another model"),
        ({"data": 1.001}, "another data of the replay's train="),
        ({"query": 1.001}, "another data of query="),
        ({"seed": 1}, "another seed"),
        ({"crossed": False}, "another crossed"),
        ({"loss": "mse"}, "another loss"),
        ({"k": 2}, "the ranks do not do the same thing: rank 0 at scores; rank 1 at top"),
        ({"call": "self_influence"}, "the ranks do not do the same thing"),
    ):
        two.begin(given_other, by_rank=[{}, given])
        for failed in two.end():
            assert failed.kind == "ValueError"
            assert what in failed.text
    two.begin(given_other, by_rank=[{"k": 2}, {"k": 3}])
    assert all("another k= than rank 0 (3 and 2)" in failed.text for failed in two.end())


def test_an_error_of_one_rank_is_raised_on_both(two):
    for function, args, kind, what in (
        (other_log, (1,), "NotReproduced", "the log does not reproduce its training: after step"),
        (exploding, (), "Diverged", "network 2 of 2 an adjoint's norm"),
    ):
        two.begin(function, *args)
        first, second = two.end()
        assert (first.kind, second.kind) == (kind, kind)
        assert what in second.text
        assert first.text == f"on rank 1: {second.text}"
    check_alike(two(answers, 2), answers(2), True)  # they can go on together


@pytest.mark.parametrize("what", ["train", "query"])
def test_data_in_parts_are_refused(two, what):
    two.begin(refused, what)
    assert all("needs all examples on every rank" in failed.text for failed in two.end())


def test_a_group_narrows_the_ranks(two):
    scores, other = two(in_a_group)
    assert torch.equal(scores, answers(2)["scores"])
    assert other is None


@pytest.mark.parametrize("optimizer", ["Nesterov", "AdamW"])
def test_segments_divide_the_training_examples(two, optimizer):
    check_alike(two(sourced, optimizer), sourced(optimizer), False)
    for given, what in (
        ({"log": True}, "another log 1 than rank 0"),
        ({"query": 1.001}, "another data of query="),
        ({"segments": 1}, "another segments than rank 0 (1 and 2)"),
    ):
        two.begin(sourced, optimizer, by_rank=[{}, given])
        assert all(what in failed.text for failed in two.end())


@pytest.mark.parametrize("networks", [1, 2, 3])
def test_what_ranks_send_is_what_was_planned(two, networks):
    answered = two(sent, networks)
    assert answered[0]["plan"] == answered[1]["plan"]  # a rank plans for all
    for rank, found in enumerate(answered):
        planned = found["plan"].ranks[rank]
        assert (found["sent"], found["received"]) == (planned.sent_bytes, planned.received_bytes)
    ranks, alone = answered[0]["plan"].ranks, sent(networks)["plan"]
    assert sum(one.carried for one in ranks) == 5 * networks
    assert alone.ranks[0].passes == alone.passes <= sum(one.passes for one in ranks)


@pytest.mark.skipif(PeakMemory is None, reason="fastif._memory, which counts allocations, was not built")
@pytest.mark.parametrize("networks", [1, 2])
def test_the_peak_of_a_rank_is_the_measured_one(two, networks):
    for planned, measured in two(peaks, networks):
        assert 0.8 * measured < planned < 1.2 * measured


@pytest.mark.slow
def test_three_and_five_ranks():
    for world, cases in ((3, [(2, None), (2, 12), (4, None), (1, 8)]), (5, [(2, None), (3, 8)])):
        crew = Crew(world, timeout=60)
        try:
            for networks, states in cases:
                check_alike(crew(answers, networks, states), answers(networks, states), False)
            check_alike(crew(answers, 6 if world == 3 else 5), answers(6 if world == 3 else 5), True)
        finally:
            crew.dismiss()
