"""The report holds every figure and every sampler, and needs nothing from outside."""

import base64
import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from fastif.evaluation import class_removal
from fastif.evaluation.metrics import METRICS
from fastif.report.class_removal import page, share, write_report

FIGURES = ("radar", "bars", "budget", "steps")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def results():
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    x = nn.functional.one_hot(y).float() + 0.5 * torch.randn(90, 3, generator=draw)
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 3))
    with torch.no_grad():
        model[1].weight.copy_(3 * torch.eye(3))
        model[1].bias.zero_()
    return class_removal(
        model,
        (x, y),
        (x, y),
        samplers=["random", "k_center", "logit"],
        k=[9, 45],
        seeds=2,
        steps=2,
        retrain=lambda keep: model,
        progress=False,
        about={"data": "<three> & more", "class_names": ["a", "b", "<c>"]},
    )


@pytest.fixture(scope="module")
def report(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    paths = write_report(results, folder / "new")
    return paths, paths[-1].read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Opening tags with their attributes, the stack of open ones, and the cells of every table row."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.rows = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def test_the_files(report):
    paths, _ = report
    assert [path.name for path in paths] == [*(f"{name}.png" for name in FIGURES), "report.html"]
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(path.name for path in paths)
    for path in paths[:-1]:
        assert path.read_bytes().startswith(PNG)


def test_the_page_is_self_contained(report):
    paths, text = report
    found = Tags(text)
    assert found.open == []
    sources = [attributes["src"] for tag, attributes in found.tags if tag == "img"]
    pngs = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
    assert pngs == [path.read_bytes() for path in paths[:-1]]
    without_images = re.sub(r"base64,[^\"]*", "", text)
    assert not re.search(r"https?:|//|url\(|@import|<script|<link|href", without_images)
    assert all(attributes.get("alt") for tag, attributes in found.tags if tag == "img")


def test_the_summary_table_holds_each_sampler_and_budget_with_its_figures(report, results):
    _, text = report
    rows = Tags(text).rows
    for name, words in (("random", "random"), ("k_center", "k-center"), ("logit", "logit")):
        for k in (9, 45):
            entry = next(e for e in results["summary"] if (e["sampler"], e["k"], e["step"]) == (name, k, 2))
            (row,) = [row for row in rows if row[:2] == [words, share(k, results)] and len(row) == 10]
            assert [cell.split(" ")[0] for cell in row[2:7]] == [f"{entry[f'{m}_mean']:.4f}" for m in METRICS]
            every_step = [row for row in rows if row[:2] == [words, share(k, results)] and len(row) == 11]
            assert [row[2] for row in every_step] == ["1", "2"]


def test_references_classes_and_meta_are_there_and_escaped(report, results):
    _, text = report
    rows = Tags(text).rows
    for words in ("original model", "head retrained to convergence", "whole network retrained"):
        assert sum(row[0] == words for row in rows) == 1
        assert sum(row[1] == words for row in rows if len(row) == 7) == 3
    assert any(row[0] == "2: <c>" for row in rows)
    assert "<three>" not in text
    assert "Class removal: &lt;three&gt; &amp; more" in text
    for name in results["meta"]:
        assert name == "definitions" or any(row[0] == name for row in rows)


def test_a_job_of_one_sampler_budget_seed_and_step_has_a_report(results, tmp_path):
    rows = [e for e in results["summary"] if (e["sampler"], e["k"], e["step"]) == ("logit", 9, 1)]
    small = {**results, "summary": [{**rows[0], "ME_mean": None, "ME_std": None, "ME_ratio": None}], "retrained": []}
    small["summary"][0] |= {f"{m}_std": None for m in METRICS}
    *_, html = write_report(small, tmp_path)
    text = html.read_text(encoding="utf-8")
    assert "not measured" in text
    assert not any(row[0] == "whole network retrained" for row in Tags(text).rows)


def test_results_without_a_summary_are_refused(results, tmp_path):
    with pytest.raises(ValueError, match="have no summary"):
        write_report({**results, "summary": []}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_samplers_get_colours_of_their_own(results, tmp_path):
    renamed = [{**e, "sampler": e["sampler"].replace("logit", "mine")} for e in results["summary"]]
    assert "mine" in page({**results, "summary": renamed}, dict.fromkeys(FIGURES, PNG))
    assert len(write_report({**results, "summary": renamed}, tmp_path)) == 5
