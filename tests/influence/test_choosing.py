"""The chooser: the most faithful candidate within the budget, by the plans' own figures."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from fastif import Automatic, Influence, Networks, TrainingDamping, choose
from fastif.influence.choosing import is_language_model, measure_rate
from fastif.samplers import random
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


class Words(nn.Module):
    """Predicts the next of seven words."""

    def __init__(self):
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)

    def forward(self, ids):
        return self.head(torch.tanh(self.hidden(self.table(ids))))


ROWS = {  # of docs/evaluation.md, for a language model
    "exact blocks and EK-FAC over 8 half networks": 'fastif, "auto", 8 half networks',
    "exact blocks and EK-FAC": 'fastif, "auto"',
    "EK-FAC": "fastif, EK-FAC",
    "EK-FAC from a tenth of the data": "fastif, EK-FAC from a random 10 %",
    "exact blocks and EK-FAC over 4 half networks": "fastif, EK-FAC, 4 half networks",
    "exact blocks and EK-FAC over 2 half networks": "fastif, EK-FAC, 2 half networks",
}


def test_a_language_model_has_an_order_of_its_own():
    torch.manual_seed(0)
    model, ids = Words(), torch.randint(0, 7, (16, 5))
    halves = Networks([model.state_dict()] * 8, [*torch.arange(16).view(2, 8).repeat(4, 1)])

    def names(loss, networks=halves, model=model):
        found = choose(
            model, (ids, ids), (ids[:2], ids[:2]), loss=loss, networks=networks, operations=RATE, batch_size=8
        )
        return [one.name for one in found.considered], found.sampler

    order, sampler = names("causal_lm")
    assert order[: len(ROWS)] == [*ROWS]
    assert order[len(ROWS) :] == [
        "the exact block of the head",
        "the exact block of the head, from a tenth of the data",
    ]
    assert sampler is random
    kept = json.loads((Path(__file__).parents[2] / "benchmarks/results/lds-text.json").read_text())["rows"]
    means = {row["contender"]: row["halves"]["mean"] + row["without 5 %"]["mean"] for row in kept}
    figures = [means[row] for row in ROWS.values()]
    assert figures == sorted(figures, reverse=True)
    assert names("causal_lm", halves.first(4))[0] == [*[*ROWS][1:], *order[-2:]]
    summed = partial(own_loss, reduction="sum")
    assert names(summed)[0] == order
    model.head = nn.Linear(4, 3)
    assert not is_language_model(model, summed)
    assert not is_language_model(model, "token_cross_entropy")


def own_loss(outputs, labels, reduction):
    losses = nn.functional.cross_entropy(outputs[:, :-1].mT, labels[:, 1:], reduction="none")
    return losses.sum(1) if reduction == "sum" else losses.mean(1)


def test_a_network_without_a_linear_layer_has_no_head_to_choose():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 3, 3), nn.Tanh(), nn.Flatten())
    data = torch.randn(20, 1, 6), torch.randn(20, 12)
    query = data[0][:2], data[1][:2]
    for loss in ("mse", lambda outputs, batch: (outputs - batch).square().sum(1)):
        choice = choose(model, data, query, loss=loss, operations=RATE)
        assert choice.chosen.name == "CG over the whole network"
        assert not any("head" in one.name for one in choice.considered)
