"""What recording costs a training, in docs/integrations.md: what is verified, what is measured, and the table of it."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fastif
from benchmarks.experiments import overheads
from benchmarks.figures import keep, pages, tables
from benchmarks.figures.overheads import overheads_table

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
SMALL = overheads.Sizes(layers=1, width=8, words=20, batch=3, length=6, steps=4, every=2, turns=1, looks=1)


def test_what_is_installed_is_measured_and_fills_the_table(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="the network is one of transformers'")
    given = [word for name, value in SMALL._asdict().items() for word in (f"--{name}", str(value))]
    made = overheads.main([*given, "--out", str(tmp_path / "a")])
    there = {name: find_spec(package) is not None for name, (_, package) in overheads.LOOPS.items()}
    assert [row["loop"] for row in made["logs"]] == [name for name, found in there.items() if found]
    for row in made["logs"]:
        assert row["checkpoint_bytes"] == pytest.approx(3 * row["model_bytes"], rel=1e-3)  # with AdamW's two moments
        assert row["plain_seconds"] > 0
        assert row["ratio"] > 0
    assert next(row["way"] for row in made["captures"]) == "plain"
    assert made["captures"][0]["ratio"] == 1
    assert made["meta"]["difference"] <= overheads.AGREE
    monkeypatch.setattr(tables, "KEPT", tmp_path)
    keep.keep(tmp_path / "a" / "results.json", "overheads")
    table = overheads_table("overheads")
    assert table.count("times the model a checkpoint") == len(made["logs"])
    assert table.count("`fastif.capture`: ") == len(made["captures"]) - 1


def test_a_log_that_is_not_of_its_training_is_not_timed(tmp_path):
    pytest.importorskip("transformers", reason="the network is one of transformers'")

    def other(*given):
        made = overheads.own_loop(*given)
        return made._replace(loss=lambda: lambda outputs, batch: 2 * overheads.loss_of(outputs, batch))

    small = SMALL._replace(every=1)
    assert overheads.verify_log(overheads.own_loop, small, torch.device("cpu"), tmp_path) < 1e-5
    with pytest.raises(fastif.NotReproduced):
        overheads.verify_log(other, small, torch.device("cpu"), tmp_path)


def test_captured_gradients_that_are_not_autograds_are_not_timed(monkeypatch):
    pytest.importorskip("transformers", reason="the network is one of transformers'")
    own = fastif.Captured.gradients
    monkeypatch.setattr(fastif.Captured, "gradients", lambda self: {k: 1.01 * v for k, v in own(self).items()})
    with pytest.raises(AssertionError, match="captured gradients differ from autograd's by 0.01"):
        overheads.verify_capture(SMALL, torch.device("cpu"))


def test_the_page_is_that_of_the_results():
    assert pages.with_tables(PAGE) == PAGE
    assert PAGE.count("<!-- table: overheads -->") == 1
    results = tables.results_of("overheads")
    assert len(results["logs"]) == len(overheads.LOOPS)
    assert results["meta"]["difference"] <= overheads.AGREE
