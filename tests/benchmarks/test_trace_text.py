"""examples/trace_text.py over BANKING77, where FASTIF_DATA names a folder that has it."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "trace_text.py"
DATA = Path(os.environ.get("FASTIF_DATA", "nowhere")).absolute() / "banking77"


@pytest.mark.skipif(not (DATA / "train.csv").is_file(), reason="FASTIF_DATA names no folder with banking77/train.csv")
@pytest.mark.parametrize("more", [[], ["--by-token"]])
def test_trace_text(tmp_path, monkeypatch, capsys, more):
    arguments = ["--data", str(DATA), "--index", str(tmp_path / "index"), "--out", str(tmp_path / "trace.html")]
    arguments += ["--texts", "200", "--epochs", "1", *more]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = capsys.readouterr().out
    assert said.count("\nhelp +") == 8
    assert said.count("\nharm -") == 8
    page = (tmp_path / "trace.html").read_text()
    assert page.count("<tr>") == 16
    assert "how long does a transfer" in page
