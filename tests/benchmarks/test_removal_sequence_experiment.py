"""The smallest form of benchmarks/experiments/removal_sequence: it runs, goes on, and its table is its rows'."""

import json

import pytest

from benchmarks.experiments import removal_sequence as experiment
from benchmarks.figures import removals, tables

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def test_it_runs_and_goes_on(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(tables, "KEPT", tmp_path)
    arguments = ["--seeds", "1", "--removals", "12", "--epochs", "1", "--examples", "200"]
    folders = ["--out", str(tmp_path / "runs"), "--kept", str(tmp_path / "removal-sequence-small.json")]
    first = experiment.main([*arguments, *folders])
    assert first["meta"]["command"] == f"python benchmarks/experiments/removal_sequence.py {' '.join(arguments)}"
    (row,) = first["rows"]
    away = row["head"]["above the minimum"]
    assert len(away) == 12
    assert min(away) > -1e-8, "nothing lies below the minimum"
    assert away[-1] < row["head"]["before"] / 10
    assert row["networks"]["retrained"]["tug_of_war"] == 1
    assert row["networks"]["nothing removed"]["retained_loss"] > row["networks"]["head, one by one"]["retained_loss"]
    assert json.loads((tmp_path / "removal-sequence-small.json").read_text()) == first
    table = removals.sequence_table("removal-sequence-small")
    assert table.count("\n| ") == 1 + len(row["networks"]) - 1
    for network in row["networks"].values():
        assert f"{network['held_out_accuracy']:.4f}" in table
    removals.sequence_picture("removal-sequence-small", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    monkeypatch.setattr(experiment, "run", lambda *given: pytest.fail("run again"))
    assert experiment.main([*arguments, *folders])["rows"] == first["rows"]
