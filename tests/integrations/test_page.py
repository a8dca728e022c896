"""What docs/integrations.md shows runs as it stands there, part after part, and gives what it says."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
PARTS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_page_runs():
    pytest.importorskip("transformers", reason="the page shows a Trainer of transformers")
    pytest.importorskip("accelerate", reason="a Trainer needs accelerate")
    names = {}
    for part in PARTS:
        if "lightning" in part and find_spec("lightning") is None:
            continue  # Lightning's own tests say that it is missing
        exec(part, names)
        for left, shape in re.findall(r"^(\w+)(?:, \w+)? = .*# \[([\d, ]+)\]$", part, flags=re.MULTILINE):
            assert list(names[left].shape) == [int(size) for size in shape.split(",")]
