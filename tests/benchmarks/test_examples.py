"""The examples run as they are, draw their pictures, and say what is so."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.data.test_data import write_shard

pytest.importorskip("sklearn", reason="the examples' digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="the examples draw with matplotlib")
EXAMPLES = Path(__file__).parents[2] / "examples"
PAGE = Path(__file__).parents[2] / "docs" / "examples.md"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    def example(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, "--out", str(tmp_path / "picture.png"), *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
        return capsys.readouterr().out

    return example


def test_find_mislabelled(run):
    said = run("find_mislabelled.py", "--epochs", "4")
    found, wrong, checked = map(int, re.search(r"(\d+) of the (\d+) wrong labels are among the (\d+)", said).groups())
    assert (wrong, checked) == (88, 144)
    assert found >= 80  # by chance: 9


def test_find_mislabelled_in_cifar10n(run, tmp_path):
    draw = np.random.default_rng(0)
    clean, index = draw.integers(0, 10, 40), np.arange(40)
    images = (clean[:, None, None, None] * 20 + draw.integers(0, 50, (40, 3, 32, 32))).astype(np.uint8)
    write_shard(tmp_path / "shard0.npz", images, clean.tolist(), index.tolist(), [0] * 38 + [1] * 2)
    labels = np.where(index % 8 == 0, (clean + 1) % 10, clean).astype(np.int8)
    np.savez(tmp_path / "labels.npz", clean=clean.astype(np.int8), aggre=labels)
    said = run("find_mislabelled.py", "--data", "cifar10n", "--root", str(tmp_path), "--epochs", "1")
    assert re.search("of the 5 wrong labels are among the 4 most suspicious of 38", said)


def test_find_mislabelled_lora(monkeypatch, capsys):
    pytest.importorskip("peft", reason="the example's adapters are peft's")
    pytest.importorskip("accelerate", reason="peft needs accelerate")
    monkeypatch.setattr(sys, "argv", ["find_mislabelled_lora.py", "--epochs", "10"])
    runpy.run_path(str(EXAMPLES / "find_mislabelled_lora.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "6 matrices of the adapters, 1,320 of 10,290 parameters" in said
    found, wrong, checked = map(int, re.search(r"(\d+) of the (\d+) wrong labels are among the (\d+)", said).groups())
    assert (wrong, checked) == (68, 114)
    assert found >= 60  # by chance: 7


def test_explain_prediction(run):
    said = run("explain_prediction.py", "--query", "330")
    before = float(re.search(r"is a 9, called 3: loss ([\d.]+)", said)[1])
    found = re.findall(r"most (helpful|harmful): predicted ([-\d.]+), trained anew ([\d.]+)", said)
    predicted, anew = ({row[0]: float(row[column]) for row in found} for column in (1, 2))
    assert predicted["harmful"] < before < predicted["helpful"]
    assert anew["harmful"] < anew["helpful"]  # one training differs from the next by more than the harmful ones' part


def test_remove_class(run):
    said = run("remove_class.py", "--digit", "3", "--epochs", "4")
    found = re.findall(r"(as trained|removed|never seen): ([\d.]+)% of the 3s are right, ([\d.]+)% of the others", said)
    own = {words: float(share) for words, share, _ in found}
    others = {words: float(share) for words, _, share in found}
    assert own["as trained"] > 80
    assert own["removed"] == own["never seen"] == 0
    assert others["removed"] > 90


def test_the_page_shows_every_example_and_its_picture():
    text = PAGE.read_text()
    pictures = re.findall(r"!\[[^\]]+\]\((examples/\w+\.png)\)", text)
    assert len(pictures) == 3
    for picture in pictures:
        assert (PAGE.parent / picture).stat().st_size < 150_000
    assert set(re.findall(r"examples/(\w+\.py)", text)) == {path.name for path in EXAMPLES.glob("*.py")}
