"""docs/kcenter.md: its examples run in order, its table and its picture are those of the kept results."""

import json
import re
from pathlib import Path

from benchmarks.figures import pages

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "kcenter.md").read_text()


def test_examples_run():
    examples = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(examples) >= 5
    names = {}
    for example in examples:
        exec(example, names)
    assert 100 < len(names["enough"].indices) < 2000  # the stop does something


def test_table_is_that_of_the_results():
    assert pages.with_tables(PAGE) == PAGE
    assert PAGE.count("<!-- table:") == 1


def test_picture_is_that_of_the_results():
    """The PNG carries the date of the results that it shows."""
    kept = json.loads((ROOT / "benchmarks" / "results" / "kcenter-cpu.json").read_text())
    picture = re.search(r"!\[[^\]]+\]\(([\w.-]+)\)", PAGE)
    assert picture is not None
    assert kept["datetime"].encode() in (ROOT / "docs" / picture[1]).read_bytes()
