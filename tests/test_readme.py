"""README's example runs, and its tables are those of the kept results."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_example_runs(capsys):
    pytest.importorskip("sklearn", reason="the example's digits come with scikit-learn")
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in example.splitlines() if line]) <= 15
    torch.manual_seed(0)
    exec(example, {})
    assert "\n0 of 36 sevens" in "\n" + capsys.readouterr().out


def test_tables_are_those_of_the_results():
    spec = importlib.util.spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
    assert spec is not None
    assert spec.loader is not None
    results = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)
    assert results.with_tables(README) == README
    assert README.count("<!-- table:") >= 3
