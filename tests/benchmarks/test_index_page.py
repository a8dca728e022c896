"""docs/index-of-gradients.md: its code runs as it stands, its table and its picture are those of the kept results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.figures import pages, tables

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "index-of-gradients.md").read_text()


def test_the_code_runs():
    pytest.importorskip("sklearn", reason="the page's digits come with scikit-learn")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(block, names)
    assert names["scores"].shape == (5, len(names["train"][0]))
    assert names["index"].measured.r > 0.8
    exact = names["influence"].top(names["query"], names["train"], 10)[0]
    assert float((names["exact"] - exact).abs().max()) <= 0.05 * float(exact.abs().max())


def test_the_table_is_that_of_the_results():
    assert pages.with_tables(PAGE) == PAGE
    assert PAGE.count("<!-- table: index-cpu -->") == 1


def test_the_picture_is_of_the_kept_results():
    from PIL import Image

    kept = json.loads((tables.KEPT / "index-cpu.json").read_text())
    assert Image.open(DOCS / "index-fidelity.png").text["Description"] == kept["datetime"]
