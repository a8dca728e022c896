"""Commands of the shell on two ranks write what one process writes; the first alone prints and writes."""

import contextlib
import io
import json
import os
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer", reason="the command line needs typer")
from safetensors.torch import load_file

from fastif import Index
from fastif.cli import main
from tests.helpers.crew import Crew

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = """
import torch

def problem():
    torch.manual_seed(0)
    x, y = torch.randn(61, 7, dtype=torch.float64), torch.randint(3, (61,))
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    return model, (x, y), (x[:8], y[:8])
"""
CLASSES = (
    *("class-removal", "--data", "digits", "--classes", "1,7,3", "--samplers", "logit", "--k", "5%"),
    *("--seeds", "2", "--steps", "2", "--epochs", "1", "--no-lissa"),
)


def command(folder: str, *arguments: str) -> tuple[int, str]:
    """What a command returns and prints, run in a folder."""
    here, said = os.getcwd(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(said):
            return main(list(arguments)), said.getvalue()
    finally:
        os.chdir(here)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "own.py").write_text(SCRIPT)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_both(two, folder, *arguments):
    """Alone with `one` and on two ranks with `two` in the place of OUT; what the first rank printed."""
    one, both = ([name if word == "OUT" else word for word in arguments] for name in ("one", "two"))
    code, _ = command(str(folder), *one)
    assert code == 0
    (code, said), (other_code, silence) = two(command, str(folder), *both)
    assert (code, other_code) == (0, 0)
    assert silence == ""
    return said


def test_an_index_is_built_and_asked_by_two_ranks(two, folder):
    asked = ("index", "own.py:problem", "--batch-size", "10", "--self-influence", "--share", "0.6", "--out", "OUT")
    assert run_both(two, folder, *asked).count("two: an index of training gradients") == 1
    assert names(folder / "one") == names(folder / "two")
    one, both = (Index(folder / name).self_influence() for name in ("one", "two"))
    assert torch.allclose(one, both, rtol=1e-9)
    again = tuple("two" if word == "OUT" else word for word in asked)
    before = {path.name: path.read_bytes() for path in (folder / "two").glob("*.safetensors")}
    assert command(str(folder), *again, "--resume")[0] == 0  # by another number of ranks
    assert before == {path.name: path.read_bytes() for path in (folder / "two").glob("*.safetensors")}
    query = ("query", "two", "own.py:problem", "--top", "4", "--rerank", "9", "--out")
    assert command(str(folder), *query, "one.csv")[0] == 0
    (code, said), (_, silence) = two(command, str(folder), *query, "two.csv")
    assert (code, silence) == (0, "")
    assert said.count("8 queries: two.csv") == 1
    assert (folder / "one.csv").read_text() == (folder / "two.csv").read_text()


def test_answers_of_an_index_are_explained_by_two_ranks(two, tmp_path):
    """The folder of `query --out`: its table and its pages; all ranks ask, the first writes."""
    pytest.importorskip("transformers", reason="models in folders are transformers'")
    from tests.helpers.folders import ASKED, SAID, save_language_model, write_file

    save_language_model(tmp_path / "model")
    write_file(tmp_path / "train.jsonl", text=SAID)
    write_file(tmp_path / "query.csv", text=ASKED)
    files = ("--model", "model", "--train", "train.jsonl", "--layers", "*.mlp.*", "--fisher", "empirical", "--quiet")
    assert command(str(tmp_path), "index", *files, "--share", "1", "--out", "index") == (0, "")
    for more in ((), ("--rerank", "5")):
        asked = ("query", "index", "--query", "query.csv", "--top", "4", "--pages", "2", *more, "--out")
        one, both = (tmp_path / f"{name} {len(more)}" for name in ("one", "two"))
        assert command(str(tmp_path), *asked, one.name)[0] == 0
        (code, said), (other_code, silence) = two(command, str(tmp_path), *asked, both.name)
        assert (code, other_code, silence) == (0, 0, "")
        assert said.count("the first 2 queries, explained") == 1
        assert names(one) == names(both) == ["explain", "run.toml", "top.csv"]
        assert (one / "top.csv").read_text() == (both / "top.csv").read_text()
        assert names(one / "explain") == names(both / "explain") == ["query-0.html", "query-1.html"]
        for name in names(one / "explain"):
            assert (one / "explain" / name).read_text() == (both / "explain" / name).read_text()


def test_examples_are_removed_by_two_ranks(two, folder):
    (folder / "gone.txt").write_text("3\n9\n12\n")
    asked = ("remove", "own.py:problem", "--indices", "gone.txt", "--k", "30", "--verify", "--out", "OUT")
    assert run_both(two, folder, *asked).count("3 of 61 examples") == 1
    assert names(folder / "one") == names(folder / "two")
    one, both = (load_file(folder / name / "removed.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        assert torch.allclose(both[key], value, rtol=0, atol=1e-8 * float(value.abs().max())), key


def test_classes_are_removed_by_two_ranks(two, folder):
    assert run_both(two, folder, *CLASSES, "--out", "OUT").count("in all") == 1
    assert names(folder / "one") == names(folder / "two")
    one, both = (json.loads((folder / name / "results.json").read_text()) for name in ("one", "two"))
    assert both["meta"]["ranks"] == 2
    for kind in ("original", "retrained_head", "retrained", "rows"):
        assert len(one[kind]) == len(both[kind])
        for want, got in zip(one[kind], both[kind], strict=True):
            assert want.keys() == got.keys()
            for key in want.keys() - {"seconds", "peak_bytes"}:
                expected = pytest.approx(want[key], rel=1e-6, abs=1e-6) if isinstance(want[key], float) else want[key]
                assert got[key] == expected, key


@pytest.mark.slow
def test_classes_are_removed_after_a_rank_was_killed(folder):
    crew = Crew(2)
    try:
        crew.begin(command, str(folder), *CLASSES, "--out", "two")
        began = time.monotonic()
        while not (folder / "two" / "rows.jsonl").exists() and time.monotonic() - began < 120:
            time.sleep(0.01)
        crew.kill(1)
        left, dead = crew.end()
        assert dead is None
        assert left[0] == 1
    finally:
        crew.dismiss()
    assert command(str(folder), *CLASSES, "--out", "two", "--resume")[0] == 0
    assert command(str(folder), *CLASSES, "--out", "one")[0] == 0
    one, both = (json.loads((folder / name / "results.json").read_text()) for name in ("one", "two"))
    for want, got in zip(one["rows"], both["rows"], strict=True):
        assert {key: want[key] for key in ("sampler", "k", "class", "seed", "step")} == {
            key: got[key] for key in ("sampler", "k", "class", "seed", "step")
        }
        assert got["objective"] == pytest.approx(want["objective"], rel=1e-6)
