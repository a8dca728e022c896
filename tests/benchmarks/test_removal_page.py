"""docs/removal.md: its examples run in order, and its tables are those of the kept results."""

import re
from pathlib import Path

import pytest

from benchmarks.figures import pages

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "removal.md").read_text()


def test_examples_run(capsys):
    pytest.importorskip("sklearn", reason="the page's digits come with scikit-learn")
    names = {}
    for example in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(example, names)
    model, digits = names["model"], names["digits"]
    gone = digits.y_test == 8
    found = {}
    for name in ("head", "whole", "last_block"):
        model.load_state_dict(names[name].state_dict)
        hits = model(digits.x_test).argmax(1) == digits.y_test
        found[name] = int(hits[gone].sum())
        assert hits[~gone].double().mean() > 0.9
    assert max(found.values()) <= 3, found  # of 35 eights
    assert capsys.readouterr().out.count("F = ") == 3


def test_tables_are_those_of_the_results():
    assert pages.with_tables(PAGE) == PAGE
    assert PAGE.count("<!-- table:") == 13
