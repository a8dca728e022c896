"""The table of docs/integrations.md, of fastif beside other libraries: what counts its lines, compares and fills it."""

from pathlib import Path
from queue import SimpleQueue

import pytest
import torch

import fastif
from benchmarks.experiments import libraries
from benchmarks.experiments.libraries_code import CONTENDERS
from benchmarks.figures import keep, pages, tables
from benchmarks.figures.libraries import libraries_table

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()


def counted():
    """Not a line."""
    import math

    # Not a line either.
    class Inner:
        """Nor this."""

        def value(self):  # one line, with the one above that names the class
            from math import pi

            return [
                pi,
                math.e,
            ]

    return Inner().value()


def test_lines_are_those_that_hold_code():
    assert counted()
    assert libraries.count_lines(counted) == 7


def test_scores_are_compared_text_by_text():
    ours = {"scores": [[4.0, 2.0], [-8.0, -8.5]], "rows": [[5, 3], [1, 2]]}
    theirs = {"scores": [[4.0, 2.2], [-8.0, 9.0]], "rows": [[5, 3], [1, 7]]}
    error, shared = libraries.compare(ours, theirs)
    assert error == pytest.approx(0.2 / 4)
    assert shared == 3 / 4


def test_what_is_installed_agrees_and_fills_the_table(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="the networks are those of transformers")
    pytest.importorskip("accelerate", reason="a Trainer needs accelerate")

    def here(place, folder):
        answers = SimpleQueue()
        libraries.run_contender(place, folder, answers)
        return answers.get()

    monkeypatch.setattr(libraries, "in_own_process", here)
    monkeypatch.setattr(fastif, "set_progress", lambda shown: None)  # it stays for the process
    threads = torch.get_num_threads()
    try:
        small = ["--root", "", "--n", "60", "--queries", "3", "--epochs", "1", "--out", str(tmp_path / "a")]
        made = libraries.main(small)
    finally:
        torch.set_num_threads(threads)
    there = {"fastif", *(library for library, version in made["meta"]["libraries"].items() if version)}
    assert [row["library"] for row in made["rows"]] == [one.library for one in CONTENDERS if one.library in there]
    assert all(row["error"] <= libraries.AGREE for row in made["rows"])
    monkeypatch.setattr(tables, "KEPT", tmp_path)
    keep.keep(tmp_path / "a" / "results.json", "libraries")
    assert libraries_table("libraries").count(" lines, ") == len(made["rows"])


def test_scores_that_differ_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(libraries, "make_problems", lambda *given: {})
    kept = {"rows": [[0]], "seconds": 1.0, "cpu_seconds": 1.0, "peak_bytes": None}
    answers = iter([{"scores": [[1.0]], **kept}, {"scores": [[1.1]], **kept}])
    monkeypatch.setattr(libraries, "in_own_process", lambda *given: next(answers))
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(libraries, "version", lambda name: "1")
    with pytest.raises(AssertionError, match=r"scores of captum differ from fastif's by 0\.1 .*\(at most 0\.001\)"):
        libraries.main(["--root", "", "--out", str(tmp_path)])


def test_the_page_is_that_of_the_results_and_of_the_code():
    assert pages.with_tables(PAGE) == PAGE
    assert PAGE.count("<!-- table: libraries -->") == 1
    code = {(one.task, one.library): one.code for one in CONTENDERS}
    rows = tables.results_of("libraries")["rows"]
    assert {(row["task"], row["library"]) for row in rows} == set(code)
    for row in rows:
        assert row["lines"] == libraries.count_lines(code[row["task"], row["library"]])
        assert row["error"] <= libraries.AGREE
        assert row["shared"] >= libraries.SHARED
