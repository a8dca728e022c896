"""The smallest form of benchmarks/experiments/unlearning: it runs, goes on where it was, and its table is its rows'."""

import json

import pytest
import torch

from benchmarks.experiments import unlearning as experiment
from benchmarks.figures import removals, tables
from benchmarks.figures.unlearning import unlearning_table
from fastif.data import load
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
    methods = ["nothing removed", "retrained", "remove: head", "remove: last block", "remove: all"]
    methods += ["step and refit: last block", "step and refit: all"]
    methods += ["match and refit: last block", "match and refit: all"]
    steps = ["one step: head", "one step: last block", "one step: all"]
    methods += [*steps, "fine-tuning", "SSD"]
    assert [entry["method"] for entry in found["summary"]] == methods
    assert first["meta"]["chosen"]["random 5 %"].keys() == {*steps, "fine-tuning", "SSD"}
    assert found["cpu_seconds"].keys() == set(methods[2:])
    assert all(0 < took["seconds"] < 100 * took["retraining"] for took in found["cpu_seconds"].values())
    assert json.loads((tmp_path / "unlearning-small.json").read_text()) == first
    table = unlearning_table("unlearning-small")
    assert table.count("\n| ") == 1 + len(methods) - 1
    for entry in found["summary"]:
        assert f"{entry['held_out_accuracy_mean']:.3f}" in table

    experiment.trained_once.cache_clear()
    glance = removals.glance_table("removal-glance-small")
    within = {m: found["cpu_seconds"][m]["seconds"] / found["cpu_seconds"][m]["retraining"] for m in methods[2:]}
    rows = {entry["method"]: entry["tug_of_war_mean"] for entry in found["summary"]}
    most = sorted(within.values())[4]
    affordable = [method for method in methods[2:] if within[method] <= most]
    assert removals.best_within(found, most) == max(affordable, key=lambda method: rows[method])
    assert removals.best_within(found, 0.0) is None
    assert glance.count("\n| ") == len(methods)
    removals.frontier_picture("unlearning-small", tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 1000

    both = {**first, "sets": {"one": found, "two": found}}
    (tmp_path / "unlearning-two.json").write_text(json.dumps(both))
    spread = removals.spread_table("removal-spread-two")
    assert spread.count("\n| ") == len(methods)
    tug = rows["remove: head"]
    assert f"| remove: head | {tug:.3f} ± 0.000 | {tug:.3f} | {tug:.3f} |" in spread

    def never(self, task):
        raise AssertionError("trained again")

    monkeypatch.setattr(Trainings, "train", never)
    monkeypatch.setattr(baselines, "_descended", never)
    again = experiment.main(arguments)
    assert again["sets"] == first["sets"]
    assert experiment.trained_once.cache_info().misses == 1, "the network whose self-influence ranks the examples"


def test_the_last_block_of_each_architecture_is_what_stands_behind_its_last_pooling():
    for architecture, layers in experiment.BLOCKS.items():
        network = experiment.network(
            torch.zeros(1, 3, 32, 32), experiment.RECIPES["cifar10"]._replace(architecture=architecture)
        )
        body = [*network.body]
        pools = [number for number, module in enumerate(body[:-1]) if isinstance(module, torch.nn.MaxPool2d)]
        own = [f"body.{number}" for number in range(pools[-1] + 1, len(body)) if [*body[number].parameters()]]
        assert layers == [*own, "head"]


def test_settings_are_chosen_with_other_examples():
    images = load("digits")
    x, y = images.x_train, images.y_train
    sets = experiment.forget_sets(x, y, y.argsort(), wrong=torch.arange(0, 1400, 9))
    assert len(sets) == 8
    for name, (removed, other) in sets.items():
        assert not set(removed.tolist()) & set(other.tolist()), name
        assert min(len(removed), len(other)) >= 14, name
    drawn = experiment.forget_sets(x, y, y.argsort(), draws=3)
    draws = [drawn[name][0].tolist() for name in ("random 5 %", "random 5 %, draw 2", "random 5 %, draw 3")]
    assert len({*map(tuple, draws)}) == 3
    assert {len(draw) for draw in draws} == {72}
    light, dark = sets["light half of class 6"][0], (y == 6).nonzero()[:, 0]
    dark = dark[~torch.isin(dark, light)]
    assert x[light].flatten(1).mean(1).min() > x[dark].flatten(1).mean(1).max()
