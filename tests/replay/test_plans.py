"""Plans of replays, held against what replays do; and the errors that their networks give to scores."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastif.measure import Measure, PeakMemory
from fastif.replay import Replay, TrainingLog
from fastif.replay.path import Path, Reversal
from tests.helpers.trainings import MANY, OPTIMIZERS, WIDE, batches, data, logs_of, network, recorded


@pytest.mark.skipif(PeakMemory is None, reason="fastif._memory, which counts allocations, was not built")
@pytest.mark.parametrize(
    ("number", "queries", "how"),
    [
        (1, 12, {}),
        (1, 3, {"matrix": "hessian"}),
        (1, 12, {"queries_at_a_time": 5}),
        (1, 12, {"optimizer": "Adam", "every": 50}),
        (1, 12, {"optimizer": "Adam", "every": 50, "states": 20}),
        (2, 12, {}),
        (4, 12, {"crossed": False, "optimizer": "SGD"}),
        (1, 12, {"stored": True, "every": 50}),
    ],
)  # fmt: skip
def test_the_peak_is_the_measured_one(number, queries, how, tmp_path):
    how = dict(how)
    logs, model = logs_of(number, how.pop("optimizer", "Nesterov"), how.pop("every", 6))
    if "states" in how:
        log = logs if number == 1 else logs[0]
        how["memory"] = how.pop("states") * (1 + len(log.rule.state)) * log.layout.size * 4
    if how.pop("stored", False):  # a checkpoint is read where it is needed
        logs.save(tmp_path / "log")
        logs = TrainingLog.load(tmp_path / "log")
    query = MANY[0][:queries], MANY[1][:queries]
    replay = Replay(logs, model, WIDE, progress=False, **how)
    with Measure() as planning:
        plan = replay.plan(query)
    with Measure() as work:
        replay.scores(query)
    assert plan.peak_bytes is not None
    assert work.peak_bytes is not None
    assert planning.peak_bytes is not None
    assert 0.8 * work.peak_bytes < plan.peak_bytes < 1.2 * work.peak_bytes
    assert planning.peak_bytes < 0.6 * work.peak_bytes or queries <= 4
    assert replay.deviations is not None  # by the scores, not by the plan


def test_a_plan_computes_nothing_again():
    logs, model = logs_of(2)
    replay = Replay(logs, model, WIDE, progress=False)
    plan = replay.plan(MANY, query_groups=torch.tensor([0, 1, 1, 2] * 3))
    assert replay.deviations is None
    assert replay.adjoint_norms == []
    assert (plan.networks, plan.steps, plan.n, plan.q) == (2, 18, 60, 3)
    assert plan.residual_bytes == 3 * 60 * 3 * 4
    assert plan.state_bytes == 2 * plan.adjoint_bytes // (4 * plan.queries_at_once)
    words = str(plan)
    assert "18 steps of 2 networks, 60 training examples, 3 queries in 1 round of 3" in words
    assert "crossed residuals" in words
    with pytest.raises(ValueError, match="ranks must be an integer >= 1, got 0"):
        replay.plan(MANY, ranks=0)


@pytest.mark.parametrize(("every", "states"), [(6, 60), (50, 60), (50, 20), (50, 8)])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_steps_that_are_run_again_are_counted(every, states, optimizer, monkeypatch):
    logs, model = logs_of(1, optimizer, every, epochs=5)
    memory = states * (1 + len(logs.rule.state)) * logs.layout.size * 4
    replay = Replay(logs, model, WIDE, memory=memory, progress=False)
    plan = replay.plan(MANY)
    replay.verify()
    path, ran = replay.runs[0].path, []
    advance = path.advance
    monkeypatch.setattr(path, "advance", lambda *args: ran.append(args[1]) or advance(*args))
    replay.scores(MANY)
    assert len(ran) == plan.recomputed * plan.rounds
    assert plan.rounds == math.ceil(12 / max(1, states // 4))
    assert plan.held_states <= states // 2 + 1


@pytest.mark.parametrize(("optimizer", "matrix"), [("SGD", "ggn"), ("Adam", "hessian")])
@pytest.mark.parametrize("number", [1, 2])
def test_passes_are_those_that_are_made(optimizer, matrix, number):
    """In operations of a forward pass of one example; the first layer and the last cost less on their way back."""
    logs, model = logs_of(number, optimizer)

    def operations(what):
        with FlopCounterMode(display=False) as counted:
            what()
        return counted.get_total_flops()

    forward = operations(lambda: model(WIDE[0])) / 60
    replay = Replay(logs, model, WIDE, matrix=matrix, progress=False)
    plan = replay.plan(MANY)
    done = operations(lambda: replay.scores(MANY))
    assert 0.75 * plan.passes * forward < done < 1.1 * plan.passes * forward


@pytest.mark.parametrize("room", range(1, 12))
def test_what_is_held_and_run_by_arithmetic(room):
    """Against the same turns with points that are numbers."""

    class Counted(Path):
        def __init__(self):
            self.run, self.alive, self.most = [], 0, 0

        def advance(self, point, number, gradient=None):
            assert point == number
            self.run.append(number)
            return number + 1

    for steps in (1, 2, 5, 17, 40):
        path = Counted()
        found = [(number, point) for number, point in path._reverse(3, 3, 3 + steps, room)]
        assert found == [(number, number) for number in reversed(range(3, 3 + steps))]
        reversal = Reversal.of(3, 3 + steps, room)
        assert sorted(reversal.run.elements()) == sorted(path.run)
        assert reversal.held <= room + 1  # where there is room for one, what runs on from it stands beside it


# ------------------------------------------------------------------------------------------------------ standard errors


def four(**how):
    small = data()
    logs = []
    for place in range(4):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(place // 2))
        made = batches(order[place % 2 * 12 :][:12], 5, 3, seed=place)
        logs.append(recorded(OPTIMIZERS["Nesterov"], small, made)[1])
    return logs, small, Replay(logs, network(), small, progress=False, **how)


def test_standard_errors_are_those_over_pairs():
    logs, small, replay = four(crossed=False)
    query = data(5, seed=1)
    values, errors = replay.scores(query, spread=True)
    torch.testing.assert_close(values, replay.scores(query), rtol=0, atol=0)
    alone = []
    for place, log in enumerate(logs):
        model = network()
        model.load_state_dict(log.parameters())  # those that a network did not see join its steps in the same order:
        alone.append(Replay(log, model, small, seed=7919 * place, progress=False).scores(query))
    sigma = torch.stack([rows.std(1, correction=0) for rows in alone])
    scaled = torch.stack([rows / s[:, None] for rows, s in zip(alone, sigma, strict=True)])
    pairs = scaled.view(2, 2, 5, 24).mean(1)
    middle = sigma.quantile(0.5, dim=0)[:, None]
    torch.testing.assert_close(values, middle * pairs.mean(0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(errors, middle * pairs.std(0) / 2**0.5, rtol=1e-9, atol=1e-12)
    own, off = replay.self_influence(spread=True)
    torch.testing.assert_close(own, replay.self_influence(), rtol=0, atol=0)
    assert off.shape == own.shape == (24,)
    few, few_errors = replay.scores(query, query_groups=torch.tensor([0, 0, 1, 1, 1]), spread=True)
    assert few.shape == few_errors.shape == (2, 24)


@pytest.mark.parametrize("largest", [True, False])
def test_top_by_a_bound(largest):
    _, _, replay = four()
    query = data(5, seed=1)
    values, errors = replay.scores(query, spread=True)
    bound = values - (2 if largest else -2) * errors
    found, indices = replay.top(query, None, 4, largest=largest, certainty=2.0)
    want = bound.sort(dim=1, descending=largest, stable=True)
    assert torch.equal(indices, want.indices[:, :4])
    assert torch.equal(found, want.values[:, :4])
    assert not torch.equal(indices, replay.top(query, None, 4, largest=largest)[1])


def test_one_network_has_no_spread():
    model, log = recorded(OPTIMIZERS["SGD"], data(), batches(torch.arange(24), 8, 2))
    replay, query = Replay(log, model, data(), progress=False), data(3, seed=1)
    for call in (
        lambda: replay.scores(query, spread=True),
        lambda: replay.self_influence(spread=True),
        lambda: replay.top(query, None, 2, certainty=1),
    ):
        with pytest.raises(ValueError, match="needs several logs, over whose networks scores spread"):
            call()
    with pytest.raises(ValueError, match="certainty must be a number >= 0"):
        replay.top(query, None, 2, certainty=-1)
    logs, small, _ = four()
    with pytest.raises(ValueError, match="at least two pairs of halves to tell how far they differ, got 1"):
        Replay(logs[:2], network(), small, progress=False).scores(query, spread=True)
