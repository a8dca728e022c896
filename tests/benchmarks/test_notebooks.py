"""The notebooks of docs/notebooks run as they are, end in a picture, and say what they said when they were kept."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="the notebooks' digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="the notebooks draw with matplotlib")
FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
PAGE = (FOLDER.parent / "examples.md").read_text(encoding="utf-8")


def read(name):
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, monkeypatch):
    notebook = read(name)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    if any("transformers" in line for cell in code for line in cell["source"]):
        pytest.importorskip("transformers", reason="the notebook shows a model of transformers")
        pytest.importorskip("accelerate", reason="a Trainer needs accelerate")
    spec = importlib.util.spec_from_file_location("notebooks_run", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    import fastif

    try:
        runner.execute(notebook)
    finally:
        fastif.set_progress(True)
    assert "image/png" in code[-1]["outputs"][-1]["data"]
    printed = "".join("".join(o.get("text", [])) for cell in code for o in cell["outputs"])
    assert printed.strip()
    if name == "find_wrong_labels.ipynb":
        assert int(printed.split(" of the 88 most suspicious")[0].split()[-1]) >= 75  # by chance: 5
    if name == "why_did_it_say_that.ipynb":
        best = [line.split("  ")[1] for line in printed.splitlines() if line.startswith("+")]
        assert sum("italy" in text for text in best[:6]) >= 5  # by chance: 1.5


def test_they_are_kept_with_their_outputs_and_linked():
    assert len(NOTEBOOKS) == 4
    for name in NOTEBOOKS:
        code = [cell for cell in read(name)["cells"] if cell["cell_type"] == "code"]
        assert all(cell["execution_count"] == i + 1 for i, cell in enumerate(code))
        assert "image/png" in code[-1]["outputs"][-1]["data"]
        assert f"notebooks/{name}" in PAGE
        assert (FOLDER / name).stat().st_size < 200_000
