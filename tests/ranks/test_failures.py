"""What goes wrong on one rank ends the work of all, soon and with a message that says where and why."""

import copy
import pickle
import re
import time
from functools import partial

import pytest
import torch

from fastif import Automatic, Influence, ranks
from tests.curvature.test_language_models import tagger
from tests.helpers.by_hand import problem
from tests.helpers.crew import Crew, Failed
from tests.ranks.cases import (
    check_cuda,
    exchanges,
    fit_answers,
    fit_slowly,
    fit_stream,
    fit_with,
    leave_out,
)


def failures(crew, function, *args, **options):
    crew.begin(function, *args, **options)
    found = crew.end()
    assert all(isinstance(one, Failed) for one in found), found
    return found


def test_exchanges(two):
    first, second = two(exchanges)
    total = first["x"].double() + second["x"].double()
    assert torch.equal(first["sum"], total.float())
    assert torch.equal(second["sum"], first["sum"])
    assert torch.equal(second["each"]["first"], first["sum"])
    assert "first" not in first["each"]
    assert torch.equal(first["each"]["odd", 1], second["x"][:7].double())
    assert first["each"]["whole"].tolist() == second["each"]["whole"].tolist() == [1, 3, 5]
    for got in (first["gathered"], second["gathered"]):
        assert torch.equal(got[0]["first"], first["x"])
        assert torch.equal(got[1]["first"], second["x"])
        assert ("odd", 1) not in got[0]
        assert got[1]["odd", 1].dtype == torch.float64
    assert torch.equal(first["joined"], second["x"][:1])


def test_texts_of_one_label_among_others(two):
    model, (x, y) = tagger()
    texts = [(x[:6], y[:6]), (x[6:, :1], y[6:, :1])]
    for one in failures(two, partial(fit_answers, loss="token_cross_entropy"), texts, model, Automatic(1e-2)):
        assert "some examples take 0 drawn numbers and others 6" in one.text


def test_what_is_divided():
    assert ranks.divide({"a": 1, "b": 5, "c": 4, "d": 0}, 2) == {"b": 0, "c": 1, "a": 1}
    for number, world in ((0, 3), (2, 3), (7, 3), (9, 3)):
        runs = [ranks.stretch(number, rank, world) for rank in range(world)]
        assert [i for run in runs for i in run] == [*range(number)]
        assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_alone_without_a_group(monkeypatch):
    assert ranks.find_ranks() is ranks.ALONE
    x = torch.ones(3)
    assert ranks.ALONE.sum("x", x) is x
    assert pickle.loads(pickle.dumps(ranks.ALONE)) is copy.deepcopy(ranks.ALONE) is ranks.ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2 is in the environment.*init_process_group"):
        Influence(problem("mlp").model)


def test_an_error_of_one_rank_is_raised_on_all(two):
    model, (x, y), _ = problem("mlp")
    x = x.clone()
    x[20] = float("nan")  # an example of the second rank
    begun = time.monotonic()
    first, second = failures(two, fit_answers, (x, y), model, "auto")
    assert first.kind == second.kind == "ValueError" or first.kind == second.kind == "NotPositiveDefinite"
    assert first.text == f"on rank 1: {second.text}"
    assert "NaN" in second.text
    assert time.monotonic() - begun < 10
    # The owner of a layer's eigenvectors is one rank; the ranks go on together afterwards.
    first, second = failures(two, fit_with, {"damping": 0.0}, by_rank=[{}, {}])
    assert first.kind == "NotPositiveDefinite"
    assert "singular" in first.text
    assert second.kind == "NotPositiveDefinite"
    got = two(fit_with, {"damping": 1e-2}, by_rank=[{}, {}])
    assert torch.equal(got[0], got[1])


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"weights": 1.001}, "another model than rank 0"),
        ({"data": 1.001}, "another data of train= than rank 0"),
        ({"n": 23}, "another number of examples of train="),
        ({"seed": 1}, r"another seed than rank 0 \(1 and 0\)"),
        ({"loss": "mse"}, "another loss"),
        ({"query": 3}, "scores: rank 1 has another number of examples of query="),
        ({"call": "top"}, "rank 0 at scores; rank 1 at top"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_differs_between_ranks_is_found_before_any_work(two, given, match):
    for found in failures(two, fit_with, {}, by_rank=[{}, given]):
        assert found.kind == "ValueError"
        assert re.search(match, found.text), found.text


def test_what_ranks_cannot_read(two):
    for found in failures(two, fit_stream):
        assert "Stream is a stream, which each of 2 ranks would read" in found.text
    for found in failures(two, check_cuda):
        assert "gloo, which sends no CUDA tensors" in found.text


def test_a_rank_that_does_not_come_and_one_that_is_killed():
    crew = Crew(2, timeout=4)
    try:
        crew(exchanges)
        crew.begin(leave_out, 1)
        missing, fine = crew.end()
        assert fine is None
        assert missing.kind == "RankFailed"
        assert "rank 1 did not arrive within the group's timeout of 4 s while rank 0 waited at fit" in missing.text
    finally:
        crew.dismiss()
    crew = Crew(2, timeout=4)
    try:
        crew(exchanges)
        crew.begin(fit_slowly)
        time.sleep(1.5)
        crew.kill(0)
        begun = time.monotonic()
        dead, left = crew.end()
        assert dead is None
        assert left.kind == "RankFailed"
        assert "rank 0" in left.text
        assert time.monotonic() - begun < 15
        assert left.text.partition(" ")[0] in ("rank", "on")
    finally:
        crew.dismiss()
    assert not any(process.is_alive() for process in crew.processes)
