"""The smallest form of benchmarks/experiments/people: it runs, goes on where it was, and its table is its rows'."""

import json
from functools import partial

import pytest
import torch
from scipy.stats import ks_2samp

from benchmarks.experiments import people as experiment
from benchmarks.experiments.invented_people import QUESTIONS, WRONG, invent
from benchmarks.figures import tables
from benchmarks.figures.unlearning import people_table
from fastif.evaluation import answers
from fastif.journal import Journal


def few():
    every = experiment.METHODS
    small = {name: dict([*grid.items()][:2]) for name, grid in every.items() if name in ("fine-tuning", "GradDiff")}
    small |= {"NPO": {"one": partial(experiment.npo, lr=1e-3, epochs=1)}}
    return {"remove: one step": {"damping 1": partial(experiment.one_step, damping=1.0)}, **small}


def test_it_runs_and_goes_on(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(experiment, "METHODS", few())
    monkeypatch.setattr(experiment, "EPOCHS", 2)
    monkeypatch.setattr(tables, "KEPT", tmp_path)
    arguments = ["--people", "10", "--share", "0.2", "--out", str(tmp_path / "a")]
    kept = []
    append = Journal.append
    monkeypatch.setattr(
        Journal, "append", lambda own, *given: (kept.append((dict(own.settings), *given)), append(own, *given))[1]
    )
    first = experiment.main(arguments)
    names = ["nothing removed", "retrained 1", "retrained 2", *few()]
    assert [row["method"] for row in first["rows"]] == names
    assert first["meta"]["removed"] == 2
    assert first["meta"]["ratios"] == 2 * len(QUESTIONS)
    assert {row["method"]: row.get("chosen") for row in first["rows"]}["NPO"] == "one"
    for row in first["rows"]:
        assert all(p is None or 0 <= p <= 1 for p in row["forget quality"])
    assert [row["forget quality"].count(None) for row in first["rows"]] == [0, 1, 1, *[0] * len(few())]
    (tmp_path / "people.json").write_text(json.dumps(first))
    assert people_table("people").count("\n| ") == len(names)

    def never(*_given, **_how):
        raise AssertionError("trained again")

    for settings, *given in kept[:-1]:  # cut off before its last row
        append(Journal(tmp_path / "a" / "rows.jsonl", settings, resume=True), *given)
    monkeypatch.setattr(experiment, "train", never)
    monkeypatch.setattr(experiment, "grad_diff", never)
    again = experiment.main(arguments)
    assert again["rows"][:-1] == first["rows"][:-1]
    differ = {key for key, value in again["rows"][-1].items() if value != first["rows"][-1][key]}
    assert differ <= {"seconds", "share"}


def test_people_are_told_from_strangers_and_facts_by_their_texts():
    world = invent(12, strangers=3, facts=4)
    tokens, labels = world.train
    assert len(tokens) == len(world.owner) == len(tokens.unique(dim=0))
    assert (world.owner == -1).sum() == 8
    assert (world.people.owner.bincount() == len(QUESTIONS)).all()
    kept = labels != -100
    assert (tokens[kept] == labels[kept]).all()
    assert kept.any(1).all()
    assert int(tokens.max()) < world.words
    rows = {tuple(row) for row in tokens.tolist()}
    for learnt, texts in zip(world.people.twice.tolist(), world.people.other[0].tolist(), strict=True):
        assert (tuple(texts) in rows) == learnt
    assert not rows & {
        tuple(row) for texts in (world.strangers.first, world.strangers.other) for row in texts[0].tolist()
    }
    assert len(world.people.wrong) == WRONG
    for wrong, answer in world.people.wrong:
        asked = answer == -100
        assert (wrong[asked] == world.people.other[0][asked]).all()
        assert (wrong != world.people.other[0]).any(1).all()
    again = invent(12, strangers=3, facts=4)
    assert all(torch.equal(a, b) for a, b in zip(again.train, world.train, strict=True))
    with pytest.raises(ValueError, match="facts at most 32, got 12 \\+ 20 and 33"):
        invent(12, facts=33)


def test_settings_are_chosen_by_the_stated_rule():
    tried = {
        "far": {"utility": 0.8, "distance": 0.5},
        "near": {"utility": 0.77, "distance": 0.2},
        "ruined": {"utility": 0.5, "distance": 0.1},
    }
    assert experiment.choose(tried, 0.8) == "near"
    assert experiment.choose(tried, 0.9) == "far"  # none leaves enough


def test_the_distance_is_kolmogorovs_and_smirnovs():
    a, b = torch.rand(30, generator=torch.Generator().manual_seed(0)), torch.rand(40).square()
    assert experiment.distance(a, b) == pytest.approx(ks_2samp(a.numpy(), b.numpy()).statistic)


def test_npos_gradient_fades_with_the_removed_answers_probability():
    """At the reference π = π_ref its gradient is that of ascent on the removed, plus the retained one's."""
    world = invent(6, strangers=1, facts=2)
    data, removed = world.train, torch.arange(8)
    model = experiment.network(world.words)
    seen = []

    def keep(model, losses, lr):
        loss = next(losses)
        seen.append(torch.autograd.grad(loss, [*model.parameters()]))
        return model.state_dict()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "_descended", keep)
        experiment.npo(model, data, removed, 0, lr=1.0, epochs=1)
        experiment.grad_diff(model, data, removed, 0, lr=1.0, epochs=1)
    for own, difference in zip(*seen, strict=True):
        torch.testing.assert_close(own, difference, rtol=1e-4, atol=1e-5)


def test_the_judge_asks_for_what_is_removed_and_what_stays():
    world = invent(10, strangers=2, facts=3)
    judge = experiment.Judge(world, torch.tensor([2, 7]))
    assert set(world.owner[judge.removed].tolist()) == {2, 7}
    assert len(judge.removed) == sum(int(p in (2, 7)) for p in world.owner.tolist())
    model = experiment.network(world.words).eval()
    found = judge.figures(model)
    part = judge._people(True)
    assert found["ratios"] == answers.truth_ratios(model, part.other, part.wrong).tolist()
    assert set(part.owner.tolist()) == {2, 7}
    assert not {2, 7} & set(judge._people(False).owner.tolist())
