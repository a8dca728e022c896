"""docs/blocks.md: its code runs as it stands, and its tables are those of the kept results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks.figures import pages

PAGE = (Path(__file__).parents[2] / "docs" / "blocks.md").read_text()


def test_the_code_runs():
    pytest.importorskip("sklearn", reason="the page's digits come with scikit-learn")
    torch.manual_seed(0)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(block, names)
    assert names["scores"].shape == (4, len(names["data"][1]))
    assert names["moved"].isfinite().all()
    assert {layer.curvature for layer in names["plan"].layers.values()} == {"ExactBlock"}


def test_tables_are_those_of_the_results():
    assert pages.with_tables(PAGE) == PAGE
    assert PAGE.count("<!-- table:") >= 1
