"""README's example runs, and its tables are those of the kept results."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
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
    spec = importlib.util.spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
    assert spec is not None
    assert spec.loader is not None
    results = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)
    assert results.with_tables(README) == README
    assert README.count("<!-- table:") >= 3
