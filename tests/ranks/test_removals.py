"""Removals on two ranks against those of one process, in float64; all ranks move by the same bits."""

import pytest
import torch

from tests.helpers.crew import Crew
from tests.helpers.problems import sure, trained
from tests.ranks.removals import WAYS, bad_removal, certified, removal, removal_of_texts, shortened

pytestmark = pytest.mark.usefixtures("one_thread")


def held_against(want, answers):
    first, *others = answers
    for name in ("state", "history"):
        assert first[name].shape == want[name].shape
        assert torch.allclose(first[name], want[name], rtol=1e-7, atol=1e-9 * float(want[name].abs().max())), name
        assert all(torch.equal(first[name], other[name]) for other in others)
    assert all(answer["carried"] == want["carried"] for answer in answers)


@pytest.mark.parametrize("name", WAYS)
def test_a_removal_is_that_of_one_process(two, name):
    held_against(removal(trained(), name), two(removal, trained(), name))


@pytest.mark.slow
@pytest.mark.parametrize("batches", [False, True], ids=["tensors", "batches"])
def test_three_ranks_too(batches):
    crew = Crew(3)
    try:
        for name in WAYS:
            held_against(removal(trained(), name, batches), crew(removal, trained(), name, batches))
    finally:
        crew.dismiss()


def test_a_head_that_the_first_rank_cannot_refit_ends_the_search_on_all(two):
    problem = sure(seed=1)
    want, _ = shortened(problem)
    (first, state), (second, other) = two(shortened, problem)
    assert first == second == want == {"0": 0.0, "2": 0.0}
    assert torch.equal(state, other)


def test_texts_are_removed_with_the_labels_that_one_process_draws(two):
    want = removal_of_texts()
    first, second = two(removal_of_texts)
    assert torch.equal(first, second)
    assert torch.allclose(first, want, rtol=0, atol=1e-8 * float(want.abs().max()))


def test_a_certificate_has_one_noise(two):
    (first, bound, steps), (second, *rest) = two(certified, trained(), None)
    assert torch.equal(first, second)
    assert rest == [bound, steps]
    want, bound, steps = certified(trained(), 1)
    for state, own_bound, own_steps in two(certified, trained(), 1):
        assert torch.allclose(state, want, rtol=0, atol=1e-8)
        assert own_bound == pytest.approx(bound, rel=1e-2)
        assert own_steps == steps


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([{}, {"steps": 2}], "another steps than rank 0"),
        ([{}, {"removed": torch.arange(8)}], "another indices than rank 0"),
        ([{}, {"layers": "*"}], "another layers than rank 0"),
        ([{"data": "stream"}] * 2, "is a stream, which each of 2 ranks would read"),
        ([{"data": "iterator"}] * 2, "walked through more than once, got list_iterator; pass a list"),
        ([{"weight_decay": 0.0}] * 2, "is not positive definite"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_on_both(two, given, said):
    two.begin(bad_removal, trained(), by_rank=given)
    for failed in two.end():
        assert said in failed.text
