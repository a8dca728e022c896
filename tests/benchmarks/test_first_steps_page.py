"""docs/first_steps.md and docs/samplers.md: their code runs as it stands, and finds what the page says it finds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def run(page: str) -> dict:
    pytest.importorskip("sklearn", reason="the page's digits come with scikit-learn")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL):
        exec(block, names)
    return names


def test_first_steps_find_the_wrong_labels(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run("first_steps.md")
    printed = capsys.readouterr().out
    assert names["found"] > 0.8 * len(names["wrong"])
    assert f"{names['found']} of the {len(names['wrong'])} wrong labels" in printed
    run("first_steps.md")  # in the same folder: the scores on disk are found again


def test_the_samplers_of_the_page():
    names = run("samplers.md")
    assert len(names["subset"].indices) == 200
    assert 0 < len(names["bound"].indices) < len(names["labels"])
