"""`fastif index`, `query` and `info` on a user's own script: what they write is what Python gives."""

import csv
import json

import pytest

from fastif import EKFAC, Index, Influence
from tests.helpers.user_script import returned

BUILD = ["index", "ownscript:problem", "--out", "out", "--share", "1", "--dtype", "float32"]


@pytest.fixture
def built(run, script):
    code, printed, _ = run(*BUILD)
    assert code == 0
    return printed


def test_it_builds_an_index_and_asks_it(run, script, built):
    model, train, query = returned()
    influence = Influence(model, curvature=EKFAC(), progress=False).fit(train)
    values, indices = influence.top(query, train, 4)
    for words in ("examples   40", "in 2 blocks", "EKFAC(", "share 1 of the numbers", "bytes per example", "r 1.0000"):
        assert words in built
    for name in ("best.csv", "best.jsonl"):
        code, printed, _ = run("query", "out", "ownscript:problem", "--top", "4", "--out", name)
        assert code == 0
        assert f"{int(indices[0, 0])}  " in printed
        assert "training examples that help the first queries most (of 40)" in printed
        with open(name, newline="") as file:
            rows = list(csv.DictReader(file)) if name.endswith("csv") else [json.loads(line) for line in file]
        assert [(int(row["query"]), int(row["rank"])) for row in rows] == [
            (q, r) for q in range(6) for r in range(1, 5)
        ]
        assert [int(row["train"]) for row in rows] == indices.flatten().tolist()
        assert [float(row["score"]) for row in rows] == pytest.approx(values.flatten().tolist(), rel=1e-4)
    code, printed, _ = run("query", "out", "ownscript:problem", "--harmful", "--rerank", "20")
    assert code == 0
    assert "that harm the first queries most" in printed
    code, printed, _ = run("info", "out")
    assert code == 0
    assert printed in built
    assert Index("out").n == 40


def test_it_goes_on_where_it_was_cut_off(run, script, built):
    before = {path.name: path.read_bytes() for path in (script / "out").iterdir()}
    (script / "out" / "block-000000000.safetensors").unlink()
    code, printed, _ = run("info", "out")
    assert "no: --resume goes on" in printed
    code, _, error = run("query", "out", "ownscript:problem")
    assert code == 2
    assert "unfinished: 1 of 1 blocks" in error
    code, printed, _ = run(*BUILD, "--resume", "--quiet")
    assert (code, printed) == (0, "")
    assert {path.name: path.read_bytes() for path in (script / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*BUILD], "out holds an index already: go on with --resume"),
        ([*BUILD[:-2], "--dtype", "int4", "--resume"], "--dtype must be one of int8, float16, float32, got int4"),
        (["index", "ownscript:problem", "--out", "b", "--share", "2"], "--share must be in (0, 1], got 2.0"),
        (
            ["index", "ownscript:problem", "--out", "b", "--curvature", "cg"],
            "--curvature must be one of ekfac, kfac, diagonal, identity, exact, arnoldi, data-inf, random-projection, "
            "got cg",
        ),
        (["query", "out", "ownscript:problem", "--top", "41"], "--top must be in [1, 40], the training examples"),
        (["query", "out", "ownscript:problem", "--rerank", "5"], "--rerank must be 0, or in [--top 10, 40], got 5"),
        (
            ["query", "out", "ownscript:problem", "--out", "a.txt"],
            "--out must be a folder, or a .csv or .jsonl file, got a.txt",
        ),
        (["query", "out", "ownscript:pooled"], "of another model, or with other arguments"),
        (["query", "nowhere", "ownscript:problem"], "nowhere holds no index"),
        (["info", "nowhere"], "nowhere holds no index"),
    ],
)
def test_bad_input_is_one_line(run, script, built, arguments, message):
    code, _, error = run(*arguments)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_an_index_without_the_options_is_asked_in_python(run, script, built):
    (script / "out" / "options.json").write_text("{}")
    code, _, error = run("query", "out", "ownscript:problem")
    assert code == 2
    assert "options.json is damaged" in error
    (script / "out" / "options.json").unlink()
    code, _, error = run("query", "out", "ownscript:problem")
    assert code == 2
    assert "was not made by `fastif index`" in error
    model, _, query = returned()
    scores = Index("out", Influence(model, curvature=EKFAC(), progress=False)).scores(query)
    assert bool(scores.isfinite().all())
