"""The page and the JSON of evaluations hold every result with its figures."""

from __future__ import annotations

import json
import re

import pytest
import torch

from fastif.evaluation import LDS, Agreement, Brittleness, Counterfactual, Detection, Interval, LeftOut
from fastif.evaluation_report import write_evaluations
from tests.report.test_report import Tags

RESULTS = {
    "EK-FAC <1>": LDS(Interval(0.51234, 0.4, 0.6), [0.4, 0.62], 3),
    "TracIn": LDS(Interval(-0.1, -0.2, 0.0), [-0.2, 0.0], 0),
    "agreement": Agreement(Interval(0.9, 0.8, 1.0), Interval(0.7, 0.6, 0.75), [0.7], 0),
    "left out": LeftOut(
        [[0], [1, 2]], torch.tensor([0.5]), torch.tensor([[1e-3, -3e-3]]), torch.tensor([[1e-4, 3e-4]])
    ),
    "one seed": LeftOut([[0]], torch.tensor([0.5]), torch.tensor([[1e-3]]), None),
    "noise": Detection(0.98765, 0.6, 1250, 0.0901),
    "brittle": Brittleness([1, 8], [8, None], [True, False], [0.25, 1.0]),
    "more brittle": Brittleness([8, 64], [8, None], [True, True], [0.5, 0.5]),
    "counter": Counterfactual(
        [2, 40],
        torch.tensor([[0.1], [0.4]]),
        torch.tensor([[0.0], [0.01]]),
        [Interval(0.1, 0.1, 0.1), Interval(0.4, 0.35, 0.45)],
        [Interval(0.0, 0.0, 0.0), Interval(0.01, 0.0, 0.02)],
    ),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    paths = write_evaluations(
        RESULTS, tmp_path_factory.mktemp("page") / "new", title="A & B", about={"n": 60, "t": (1, 2)}
    )
    return [path.read_text(encoding="utf-8") for path in paths]


def test_json_holds_everything(written):
    stored = json.loads(written[0])
    assert stored["about"] == {"n": 60, "t": [1, 2]}
    assert list(stored["results"]) == list(RESULTS)
    assert stored["results"]["TracIn"] == {
        "kind": "LDS",
        "score": {"mean": -0.1, "low": -0.2, "high": 0.0},
        "by_query": [-0.2, 0.0],
        "constant": 0,
    }
    assert stored["results"]["one seed"]["errors"] is None
    assert stored["results"]["counter"]["rises"] == RESULTS["counter"].rises.tolist()
    assert stored["results"]["brittle"]["flipped_at"] == [8, None]


def test_page_shows_every_result(written):
    found = Tags(written[1])
    assert found.open == []
    rows = {row[0]: row[1:] for row in found.rows}
    assert rows["EK-FAC <1>"] == ["0.512 [0.400, 0.600]", "2", "3"]
    assert rows["TracIn"] == ["-0.100 [-0.200, 0.000]", "2", "0"]
    assert rows["agreement"] == ["0.700 [0.600, 0.750]", "0.900 [0.800, 1.000]", "0"]
    assert rows["left out"] == ["2", "-1.00e-03", "2.00e-03", "2.00e-04"]
    assert rows["one seed"][-1] == "one seed"
    assert rows["noise"] == ["0.9877", "0.6000", "1,250", "0.0901"]
    assert rows["brittle"] == ["1 of 2", "0.25", "1.00", ""]
    assert rows["more brittle"] == ["2 of 2", "", "0.50", "0.50"]
    assert ["counter", "40", "0.400 [0.350, 0.450]", "0.010 [0.000, 0.020]"] in found.rows
    assert "A &amp; B" in written[1]
    assert written[1].count("data:image/png") == 1
    assert not re.search(r"https?:|<script|<link|href", re.sub(r"base64,[^\"]*", "", written[1]))


def test_what_is_no_result_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there are no results"):
        write_evaluations({}, tmp_path)
    with pytest.raises(TypeError, match="'x' is no result of an evaluation but Interval"):
        write_evaluations({"x": Interval(0, 0, 0)}, tmp_path)
    assert not list(tmp_path.iterdir())
