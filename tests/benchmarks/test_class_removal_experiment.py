"""The smallest form of benchmarks/experiments/class_removal: it runs, can be cut off, and its tables are its rows'."""

import json

import pytest
import torch

from benchmarks.experiments.class_removal import __main__ as experiment
from benchmarks.experiments.class_removal import networks, tasks
from benchmarks.experiments.class_removal.report import summarised, tables
from fastif.data import Data
from fastif.evaluation.training import Recipe

pytest.importorskip("safetensors")
CPU = torch.device("cpu")
SMALL = ["--data", "digits", "--examples", "300", "--width", "0.25", "--epochs", "4", "--batch-size", "32"]
RUNS = ["--cases", "3", "--seeds", "1", "--samplers", "random", "logit", "leverage", "--shares", "0.1"]
RUNS += ["--methods", "head", "all"]


def blobs():
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(80) % 4
    x = torch.randn(80, 1, 8, 8, generator=draw) + y[:, None, None, None]
    return Data(x, y, x, y, tuple("abcd"))


RECIPE = Recipe("cnn", 0.25, 3, 0.05, 16, 5e-4, 0)


class Killed(Exception): ...


@pytest.mark.parametrize("data", ["digits", "cifar10"])  # without and with shifts and flips
def test_training_that_was_cut_off_ends_with_the_same_network(tmp_path, monkeypatch, data):
    images, everything = blobs(), torch.arange(80)
    whole = networks.network(tmp_path / "whole.safetensors", RECIPE, data, images, everything, CPU)
    save = torch.save

    def dies_after_two_epochs(state, file):
        save(state, file)
        if state["epochs"] == 2:
            raise Killed

    path = tmp_path / "again.safetensors"
    monkeypatch.setattr(torch, "save", dies_after_two_epochs)
    with pytest.raises(Killed):
        networks.network(path, RECIPE, data, images, everything, CPU)
    assert not path.exists()
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())).count("again") == 1  # the first epoch's state
    monkeypatch.setattr(torch, "save", save)
    again = networks.network(path, RECIPE, data, images, everything, CPU)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.safetensors", "whole.safetensors"]
    assert networks.sha256(path) == networks.sha256(tmp_path / "whole.safetensors")
    read = networks.network(path, RECIPE, data, images, everything, CPU)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), read.parameters(), strict=True))
    with pytest.raises(ValueError, match="epochs is 3, expected 4"):
        networks.network(path, RECIPE._replace(epochs=4), data, images, everything, CPU)


def test_augmentation_shifts_and_flips():
    x = torch.arange(2.0 * 3 * 16 * 16).view(2, 3, 16, 16) + 1
    out = torch.cat([networks._augmented(x, torch.Generator().manual_seed(seed)) for seed in range(20)])
    assert out.shape == (40, 3, 16, 16)
    inner = out[:, :, 2:-2, 2:-2]
    rows, columns = inner.diff(dim=2), inner.diff(dim=3)
    assert bool((rows[rows.abs() < 100] == 16).all())  # the next row of the same image
    assert set(columns.unique().tolist()) == {-1.0, 1.0}  # flipped, and not
    assert bool((out == 0).any())  # the border


def test_the_experiment_runs_and_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    runs = [*RUNS, "LiSSA", "--m", "16", "--iterations", "5"]
    taken = []
    newton = experiment.newton

    def dies(*given):
        taken.append(given)
        if len(taken) == 4:
            raise Killed
        return newton(*given)

    monkeypatch.setattr(experiment, "newton", dies)
    with pytest.raises(Killed):
        experiment.main([*SMALL, *runs, "--out", str(tmp_path)])
    before = (tmp_path / "class" / "rows.jsonl").read_text().splitlines()
    results = experiment.main([*SMALL, *runs, "--out", str(tmp_path)])
    assert (tmp_path / "class" / "rows.jsonl").read_text().splitlines()[: len(before)] == before
    assert len(taken) == 4 + 6 - 3
    assert json.loads((tmp_path / "class" / "results.json").read_text()) == results
    assert results["meta"]["command"].endswith(" ".join([*SMALL, *runs]))
    for name, digest in results["meta"]["sha256"].items():
        assert networks.sha256(tmp_path / f"{name}.safetensors") == digest
    names = {entry["method"] for entry in results["summary"]}
    assert names == {"head", "all", "LiSSA"}
    original, retrained = results["references"]
    for row in results["rows"]:
        if "failed" not in row:
            assert row["RTE"] > 0
            if row["method"] == "head":
                assert row["SA"] < original["SA"]
    assert retrained["SA"] == 0
    for name in ("radar.png", "sizes.png"):
        assert (tmp_path / "class" / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "class" / "tables.md").read_text() == tables(results)
    with pytest.raises(ValueError, match="other settings"):
        experiment.main([*SMALL, *runs, "--damping", "0.5", "--out", str(tmp_path)])


def test_a_random_part_is_removed(tmp_path):
    runs = ["--task", "random", "--seeds", "1", "--cases", "0", "1", "--shares", "0.2", "--methods", "head"]
    results = experiment.main([*SMALL, *runs, "--out", str(tmp_path)])
    networks = {"all.safetensors", "without-random-0.safetensors", "without-random-1.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == networks | {"networks.json", "random"}
    of = {(row["method"], row["case"]): row for row in results["references"]}
    assert of["retrained", 0]["KL"] == 0 < of["nothing removed", 0]["KL"]
    assert all(row["KL"] > 0 and 0 < row["accuracy"] < 1 for row in results["rows"])
    assert results["summary"][0]["beyond_retrained"] == results["summary"][0]["KL"]
    for other in (["--examples", "200"], ["--bfloat16"]):  # of another task, too: they share the networks
        with pytest.raises(ValueError, match=r"networks.json holds a job with other settings.*(300, is 200|was False)"):
            experiment.main([*SMALL, *other, "--task", "class", "--cases", "0", "--out", str(tmp_path)])


def test_wrong_labels_are_those_that_people_gave(monkeypatch):
    images = blobs()
    people = images.y_train.clone()
    people[::10] = 3
    monkeypatch.setattr(tasks, "human_labels", lambda kind, root: people)
    task = tasks.prepared("mislabelled", images, [0], "somewhere", "cifar10")
    assert torch.equal(task.images.y_train, people)
    assert task.removed[0].tolist() == [i for i in range(0, 80, 10) if i % 4 != 3]
    with pytest.raises(ValueError, match="labels of CIFAR-10N, got --data digits"):
        tasks.prepared("mislabelled", images, [0], None, "digits")
    with pytest.raises(ValueError, match="classes, 0 to 3, got"):
        tasks.prepared("class", images, [4], None, "digits")


def row(method, k, seed, f1, seconds, c=0):
    return {"method": method, "sampler": "random", "k": k, "case": c, "seed": seed, "F1": f1, "RTE": seconds,
            "ME": 2**20 * k, "EA": 0.9, "EL": 0.1, "SA": 0.0, "SL": 9.0}  # fmt: skip


def test_summary_and_costs_at_equal_f1_by_hand():
    rows = [
        row("LiSSA", 8, s, f1, 4.0, c) for s, pair in ((0, (0.6, 0.8)), (1, (0.7, 0.9))) for c, f1 in enumerate(pair)
    ]
    failed = {"method": "LiSSA", "sampler": "logit", "k": 8, "case": 0, "seed": 0, "failed": "diverged"}
    rows += [failed, row("head", 1, 0, 0.7, 0.5), row("head", 2, 0, 0.8, 1.0), row("all", 2, 0, 0.1, 1.0)]
    names = ("nothing removed", "retrained")
    references = [{**row("", 0, 0, 0.5, 0.0, c), "method": name} for name in names for c in (0, 1)]
    summary = summarised(rows, references, ("EA", "EL", "SA", "SL", "F1"))
    assert summary[0]["beyond_retrained"] == pytest.approx(0.25)
    assert summary[0]["F1"] == pytest.approx(0.75)
    assert summary[0]["F1_std"] == pytest.approx(0.1 / 2**0.5)
    assert (summary[0]["runs"], summary[1]["runs"], summary[1]["failed"]) == (4, 0, 1)
    meta = {"parameters": 5, "recipe": {"width": 1.0, "epochs": 2}, "examples": 9, "cases": [0], "seeds": 2,
            "task": "class", "pass": {"seconds": 3.0, "peak_bytes": 2**22, "kept_bytes": 3 * 2**20},
            "matrix": "ggn", "damping": 1.0, "iterations": 3, "threads": 1, "device": "x", "versions": {"torch": "2"},
            "date": "2026-01-01", "command": "c"}  # fmt: skip
    page = tables({"meta": meta, "references": references, "summary": summary, "rows": rows})
    assert "| head | random | 2 | 0.8000 | -75.0% | -75.0% | +0.0% | -37.5% |" in page
    assert "| all | random | | never | | | | |" in page
    assert "| LiSSA | logit | | never | | | | |" in page
    assert "one pass for features and logits, which serves all removals, takes 3 s and 4 MiB;" in page
