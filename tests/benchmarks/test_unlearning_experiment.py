"""The smallest form of benchmarks/experiments/unlearning: it runs, goes on where it was, and its table is its rows'."""

import json

import pytest

from benchmarks.experiments import unlearning as experiment
from benchmarks.figures import tables
from benchmarks.figures.unlearning import unlearning_table
from fastif.evaluation import baselines
from fastif.evaluation.trainings import Trainings

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
SMALL = ["--examples", "160", "--seeds", "1", "--pairs", "2", "--epochs", "1", "--sets", "random 5 %"]


def few(k):
    every = EVERY(k)
    return {"fine-tuning": every["fine-tuning"], "SSD": dict(list(every["SSD"].items())[:2])}


EVERY = experiment.candidates


def test_it_runs_and_goes_on(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(experiment, "candidates", few)
    monkeypatch.setattr(tables, "KEPT", tmp_path)
    arguments = [*SMALL, "--out", str(tmp_path / "runs"), "--kept", str(tmp_path / "unlearning-small.json")]
    first = experiment.main(arguments)
    assert first["meta"]["command"] == (
        "python benchmarks/experiments/unlearning.py --examples 160 --seeds 1 --pairs 2 --epochs 1 --sets 'random 5 %'"
    )
    found = first["sets"]["random 5 %"]
    methods = ["nothing removed", "retrained", "remove: head", "remove: last block", "remove: all, one step"]
    methods += ["fine-tuning", "SSD"]
    assert [entry["method"] for entry in found["summary"]] == methods
    assert first["meta"]["chosen"]["random 5 %"].keys() == {"fine-tuning", "SSD", "remove: all, one step"}
    assert json.loads((tmp_path / "unlearning-small.json").read_text()) == first
    table = unlearning_table("unlearning-small")
    assert table.count("\n| ") == 1 + len(methods) - 1
    for entry in found["summary"]:
        assert f"{entry['held_out_accuracy_mean']:.3f}" in table

    def never(self, task):
        raise AssertionError("trained again")

    monkeypatch.setattr(Trainings, "train", never)
    monkeypatch.setattr(baselines, "_descended", never)
    again = experiment.main(arguments)
    assert again["sets"] == first["sets"]


def test_settings_are_chosen_with_other_examples():
    from fastif.data import load

    y = load("digits").y_train
    memorised = y.argsort()
    for name, (removed, other) in experiment.forget_sets(y, memorised).items():
        assert not set(removed.tolist()) & set(other.tolist()), name
        assert min(len(removed), len(other)) > 50
