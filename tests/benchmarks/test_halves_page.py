"""docs/halves.md: its code runs as it stands."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "halves.md").read_text()


def test_the_code_runs():
    pytest.importorskip("sklearn", reason="the page's digits come with scikit-learn")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(block, names)
    assert names["scores"].shape == names["errors"].shape == (20, 300)
    assert (names["errors"] > 0).all()
    assert names["indices"].shape == (20, 5)
