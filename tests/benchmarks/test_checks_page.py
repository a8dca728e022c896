"""The page on checks: its experiment runs, and its tables are those of the kept results."""

import json
from pathlib import Path

import pytest

from benchmarks.experiments import checks
from benchmarks.figures.pages import with_tables

PAGE = Path(__file__).parents[2] / "docs" / "checks.md"


@pytest.mark.slow
def test_scores_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "SIDE", 8)  # eigenvectors of 3,073 inputs would be most of the time
    out = tmp_path / "checks.json"
    checks.main(["--estimators", "EKFAC", "--networks", "transformer", "--out", str(out)])
    results = json.loads(out.read_text())
    for row in results["rows"]:
        most = 1e-4 if row["dtype"] == "float32" else 1e-12
        assert all(row[change] <= most for change in (*checks.CHANGES, "restart"))
    assert all(seconds > 0 for found in results["looking"].values() for seconds in found.values())


def test_tables_are_those_of_the_results():
    page = PAGE.read_text()
    assert page.count("<!-- table: ") == 2
    assert with_tables(page) == page
