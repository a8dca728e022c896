"""The chooser: the most faithful candidate within the budget, by the plans' own figures."""

import math

import pytest
import torch

from fastif import Automatic, Influence, Networks, TrainingDamping, choose
from fastif.influence.choosing import measure_rate
from tests.helpers.problems import wide

RATE = 1e9


def data():
    model, (x, y) = wide()
    return model, (x, y), (x[:5], y[:5])


def test_without_a_budget_the_most_faithful_is_chosen():
    model, train, query = data()
    choice = choose(model, train, query, operations=RATE)
    assert choice.chosen.name == "CG over the whole network"
    halves = Networks([model.state_dict()] * 4, list(torch.arange(60).view(4, 15)))
    rule = TrainingDamping(3.0, 1e-3)
    choice = choose(model, train, query, networks=halves, damping=rule, operations=RATE)
    assert choice.chosen.name == "exact blocks and EK-FAC over 4 half networks"
    assert [one.name for one in choice.considered][1:3] == [
        "exact blocks and EK-FAC over 2 half networks", "CG over the whole network"
    ]  # fmt: skip
    influence = choice.influence(model, progress=False).fit(train, subset=choice.subset(60))
    want = Influence(model, curvature=Automatic(rule), layers="*", networks=halves, progress=False).fit(train)
    assert torch.equal(influence.scores(query, train), want.scores(query, train))


def test_a_budget_rules_out_what_takes_more_and_says_so():
    model, train, query = data()
    everything = choose(model, train, query, operations=RATE).considered
    for one in everything:
        choice = choose(model, train, query, seconds=one.seconds, operations=RATE)
        place = next(i for i, other in enumerate(everything) if other.seconds <= one.seconds)
        assert choice.chosen.name == everything[place].name
        assert all(f"{other.name}, takes about" in choice.reason for other in everything[:place])
    least = min(everything, key=lambda one: one.seconds)
    assert choose(model, train, query, seconds=10 * least.seconds, operations=RATE / 10).chosen.seconds > 0
    with pytest.raises(ValueError, match=f"no candidate fits the budget; the fastest, {least.name}, takes about"):
        choose(model, train, query, seconds=0.9 * least.seconds, operations=RATE)
    with pytest.raises(ValueError, match="no candidate fits the budget"):
        choose(model, train, query, bytes=10, operations=RATE)
    with pytest.raises(ValueError, match="seconds and bytes must be > 0"):
        choose(model, train, query, seconds=0.0)


def test_time_and_memory_are_the_plans():
    model, train, query = data()
    for one in choose(model, train, query, operations=RATE).considered:
        plan = Influence(model, curvature=one.curvature, layers=one.layers, progress=False).plan(train, query)
        assert one.seconds * RATE > plan.fit_flops * (one.share or 1)
        assert one.bytes is None or one.bytes >= plan.fit_bytes
    tenth = [one for one in choose(model, train, query, operations=RATE).considered if one.share]
    assert all(one.share == 0.1 for one in tenth)
    subset = choose(model, train, query, seconds=math.inf, operations=RATE)._replace(chosen=tenth[0]).subset(60)
    assert subset.keywords == {"k": 6}


def test_the_rate_is_a_rate():
    assert 1e7 < measure_rate(wide()[0]) < 1e16
