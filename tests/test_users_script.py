"""A script as users write it: it runs, and `make lint` reads it by pyright's strict rules."""

import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import fastif

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "typed" / "users_script.py"


def test_it_runs(tmp_path, monkeypatch):
    for name in ("pandas", "sklearn"):
        pytest.importorskip(name, reason=f"the script uses {name}")
    monkeypatch.chdir(tmp_path)
    try:
        found = runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        fastif.set_progress(True)
    assert found["replayed"].shape == found["scores"].shape
    assert found["block"].equal(found["scores"][0, :3])
    assert len(found["pages"]) == 5


def test_lint_reads_it_strictly():
    assert SCRIPT.read_text().startswith("# pyright: strict\n")
    assert re.search(r'^include = .*"tests/typed"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)


@pytest.mark.slow
def test_its_types_hold(tmp_path):
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("pyright is not installed; make lint does the same")
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
