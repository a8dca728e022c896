"""Every estimator on two ranks answers as one process does, to the rounding of sums, and the same each time."""

import pytest
import torch

from tests.helpers.crew import Crew
from tests.ranks.cases import ESTIMATORS, answers

ROUNDING = 1e-9  # relative to the largest answer; sums of float64 differ by n ε = 5e-15 and solves amplify that


@pytest.fixture(scope="module")
def crew():
    made = Crew(2)
    yield made
    made.dismiss()


def compare(got, want, rounding=ROUNDING):
    for key in want:
        if key in ("traffic", "state"):
            continue
        if key == "indices":
            assert torch.equal(got[key], want[key])
            continue
        scale = float(want[key].abs().max())
        assert got[key].shape == want[key].shape, key
        assert float((got[key] - want[key]).abs().max()) <= rounding * scale, key


@pytest.mark.parametrize("name", ESTIMATORS)
def test_two_ranks_answer_as_one_process(crew, name):
    want = answers(name)
    first, second = crew(answers, name)
    compare(first, want, 1e-6 if name == "arnoldi" else ROUNDING)
    for key in want:
        if key not in ("traffic", "state"):
            assert torch.equal(first[key], second[key]), key
    assert all(torch.equal(a, b) for a, b in zip(first["state"], second["state"], strict=True))
    assert sum(first["traffic"]) > 0 and want["traffic"] == (0, 0)
