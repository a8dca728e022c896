"""docs/evaluation.md: its code runs as it stands, and its tables are those of the kept results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.figures import pages

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()


def test_the_code_runs(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the page's digits come with scikit-learn")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(block, names)
    assert names["left_out"].rises.shape == (20, 10)
    assert (tmp_path / "report" / "evaluations.html").exists()


def test_tables_are_those_of_the_results():
    assert pages.with_tables(PAGE) == PAGE
    assert PAGE.count("<!-- table:") == 6
