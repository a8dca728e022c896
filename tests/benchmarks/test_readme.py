"""README's example runs, and its tables and its picture are those of the kept results."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks.figures import tables

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_examples_run(capsys, tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the example's digits come with scikit-learn")
    monkeypatch.chdir(tmp_path)  # the second one writes scores
    first, second = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in first.splitlines() if line]) <= 15
    torch.manual_seed(0)
    names = {}
    exec(first, names)
    assert "\n0 of 36 sevens" in "\n" + capsys.readouterr().out
    exec(second, names)  # goes on where the first one ends
    assert names["scores"].shape == (5, len(names["digits"].y_train))
    assert torch.allclose(names["stored"].load(), names["scores"])


def test_tables_are_those_of_the_results():
    assert tables.with_tables(README) == README
    assert README.count("<!-- table:") >= 3


def test_picture_is_that_of_the_results():
    """The PNG carries the date of the results that it shows."""
    kept = json.loads((ROOT / "benchmarks" / "results" / "influence-cpu.json").read_text())
    (picture,) = re.findall(r"!\[[^\]]+\]\((docs/[\w.-]+)\)", README)
    assert kept["datetime"].encode() in (ROOT / picture).read_bytes()
