"""README runs, twice in one folder; its tables and pictures and those of docs/benchmarks.md are the kept results."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

import fastif
from benchmarks.figures import pages

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text()


def test_the_example_runs_and_goes_on_where_it_was(capsys, tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the example's digits come with scikit-learn")
    monkeypatch.chdir(tmp_path)  # it writes scores
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in example.splitlines() if line]) <= 15
    names = {}
    exec(example, names)
    assert "\n0 of 36 sevens" in "\n" + capsys.readouterr().out
    n = len(names["digits"].y_train)
    scores = names["stored"].load()
    assert scores.shape == (5, n)
    assert torch.allclose(scores.gather(1, names["indices"]), names["values"], rtol=1e-3)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "scores").glob("*.npy")}
    assert written
    exec(example, names)
    assert torch.equal(names["stored"].load(), scores)
    assert {path: path.stat().st_mtime_ns for path in written} == written  # nothing was computed again


def test_tables_are_those_of_the_results():
    assert pages.with_tables(README) == README
    assert re.findall("<!-- table: ([\\w-]+) -->", README) == ["story", "glance"]
    assert pages.with_tables(BENCHMARKS) == BENCHMARKS
    kept = ["influence-cpu", "class-removal-fashion-mnist", "class-removal-digits", "cpu", "gpu"]
    assert re.findall("<!-- table: ([\\w-]+) -->", BENCHMARKS) == kept


def test_pictures_are_those_of_the_results():
    """The PNGs carry the date of the results that they show."""
    (picture,) = re.findall(r"!\[[^\]]+\]\((docs/[\w.-]+)\)", README)
    kept = json.loads((ROOT / "benchmarks" / "results" / "class-removal-demo.json").read_text())
    assert kept["meta"]["date"].encode() in (ROOT / picture).read_bytes()
    (picture,) = re.findall(r"!\[[^\]]+\]\(([\w.-]+)\)", BENCHMARKS)
    kept = json.loads((ROOT / "benchmarks" / "results" / "influence-cpu.json").read_text())
    assert kept["datetime"].encode() in (ROOT / "docs" / picture).read_bytes()


def test_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 120
    for page in (README, *(path.read_text() for path in (ROOT / "docs").glob("*.md"))):
        folder = ROOT if page is README else ROOT / "docs"
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page):
            assert (folder / link).exists(), link


def test_each_formula_names_the_files_that_compute_it():
    page = (ROOT / "docs" / "math.md").read_text()
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        if number := re.match(r"\((\d+)\) ", section):
            code = re.search(r"^\*Code: (.*)\*$", section, flags=re.MULTILINE)
            assert code is not None, section[:40]
            files = re.findall(r"\]\(\.\./([\w/.]+)\)", code[1])
            texts = [(ROOT / file).read_text() for file in files]
            assert any(f"({number[1]})" in text and "docs/math.md" in text for text in texts), section[:40]


def test_the_reference_has_every_public_name():
    for room in ("ops", "model", "samplers", "curvature", "influence", "removal", "evaluation", "report"):
        page = (ROOT / "docs" / "api" / f"{room}.md").read_text()
        for name in importlib.import_module(f"fastif.{room}").__all__:
            assert re.search(rf"^\.\. auto\w+:: fastif\.([\w.]+\.)?{name}$", page, flags=re.MULTILINE), name
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    for name in set(fastif.__all__) - {"__version__", "curvature", "data", "evaluation", "ops", "samplers"}:
        assert f":: fastif.{name}\n" in pages or f".{name}\n" in pages, name
