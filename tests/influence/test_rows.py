"""Results that join with the user's own data, and objects that say what they are."""

import csv
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

import fastif


@pytest.fixture
def scored(tmp_path):
    torch.manual_seed(0)
    train, query = (torch.randn(9, 3), torch.arange(9) % 2), (torch.randn(2, 3), torch.tensor([0, 1]))
    influence = fastif.Influence(nn.Linear(3, 2), curvature=fastif.Diagonal(1e-2), progress=False).fit(train)
    return influence, influence.scores(query, train, out=tmp_path / "scores"), influence.scores(query, train)


IDS = [f"text-{i}" for i in range(9)]


def test_rows_are_those_of_top(scored):
    _, folder, scores = scored
    rows = folder.rows(3, ids=IDS, query_ids=torch.tensor([70, 80]), columns={"label": torch.arange(9) % 2})
    assert [row["query"] for row in rows] == [70] * 3 + [80] * 3
    assert [row["rank"] for row in rows] == [1, 2, 3] * 2
    for q in range(2):
        order = scores[q].argsort(descending=True)[:3].tolist()
        assert [row["train"] for row in rows[3 * q : 3 * q + 3]] == [IDS[i] for i in order]
        assert [row["label"] for row in rows[3 * q : 3 * q + 3]] == [i % 2 for i in order]
        assert [row["score"] for row in rows[3 * q : 3 * q + 3]] == scores[q][order].tolist()
    assert folder.rows(1, largest=False)[0]["train"] == int(scores[0].argmin())
    assert rows == fastif.top_rows(
        *folder.top(3), ids=IDS, query_ids=torch.tensor([70, 80]), columns={"label": torch.arange(9) % 2}
    )


@pytest.mark.parametrize("name", ["top.csv", "top.jsonl"])
def test_rows_come_back_from_a_file(scored, tmp_path, name):
    _, folder, _ = scored
    texts = ['with "quotes", and a comma', "two\nlines", "ä"] * 3
    path = folder.write(tmp_path / name, top=2, ids=IDS, columns={"text": texts})
    with open(path, encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file)) if name.endswith("csv") else [json.loads(line) for line in file]
    rows = folder.rows(2, ids=IDS, columns={"text": texts})
    assert len(found) == 4
    for row, back in zip(rows, found, strict=True):
        assert list(back) == ["query", "rank", "train", "score", "text"]
        assert (back["train"], back["text"], float(back["score"])) == (row["train"], row["text"], row["score"])


@pytest.mark.parametrize(
    "ids", [IDS, torch.arange(9) + 2**40, np.arange(9) + 2**40, None], ids=["str", "tensor", "numpy", "none"]
)
def test_a_data_frame(scored, ids):
    """Numbers are numbers and names are names, so that it joins with the user's own table without a conversion."""
    pandas = pytest.importorskip("pandas", reason="to_pandas needs pandas")
    _, folder, _ = scored
    frame = folder.to_pandas(top=2, ids=ids, columns={"label": torch.arange(9) % 2, "fresh": np.arange(9) > 3})
    assert list(frame.columns) == ["query", "rank", "train", "score", "label", "fresh"]
    kinds = {name: frame[name].dtype.kind for name in frame.columns if name != "train"}
    assert kinds == {"query": "i", "rank": "i", "score": "f", "label": "i", "fresh": "b"}
    assert {frame[name].dtype for name in ("query", "rank", "label")} == {np.dtype("int64")}
    assert pandas.api.types.is_string_dtype(frame["train"]) if ids is IDS else frame["train"].dtype == np.int64
    assert frame.to_dict("records") == folder.rows(
        2, ids=ids, columns={"label": torch.arange(9) % 2, "fresh": np.arange(9) > 3}
    )
    assert frame["score"].tolist() == [value for row in folder.top(2)[0].tolist() for value in row]
    own = pandas.DataFrame({"name": range(9) if ids is None else ids, "text": [f"said {i}" for i in range(9)]})
    joined = frame.merge(own, left_on="train", right_on="name")
    assert joined["text"].tolist() == [f"said {i}" for i in folder.top(2)[1].flatten().tolist()]
    harmful = folder.to_pandas(top=1, largest=False, ids=ids)
    assert harmful["score"].tolist() == folder.load().amin(1).tolist()
    assert len(folder.to_pandas(top=20)) == 18
    with pytest.raises(ValueError, match=r"top: k must be an integer in \[1, n=9\], got k=0"):
        folder.to_pandas(top=0)


def test_a_data_frame_without_pandas(scored, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"to_pandas needs pandas \(pip install pandas\)"):
        scored[1].to_pandas(top=2)


def test_a_data_set_and_back(scored, tmp_path):
    """The columns of a `datasets.Dataset` are ids and columns; rows, frames and files become one again."""
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    pytest.importorskip("pandas", reason="to_pandas needs pandas")
    _, folder, _ = scored
    own = datasets.Dataset.from_dict({"id": IDS, "text": [f'said "{i}", ä' for i in range(9)], "label": [0, 1, 2] * 3})
    asked = datasets.Dataset.from_dict({"id": [70, 80]})
    given = dict(ids=own["id"], query_ids=asked["id"], columns={"text": own["text"], "label": own["label"]})
    rows, frame = folder.rows(3, **given), folder.to_pandas(3, **given)
    kept = datasets.Dataset.from_pandas(frame, preserve_index=False)
    assert kept.column_names == ["query", "rank", "train", "score", "text", "label"]
    assert {name: kept.features[name].dtype.removeprefix("large_") for name in kept.column_names} == {
        "query": "int64", "rank": "int64", "train": "string", "score": "float64", "text": "string", "label": "int64"
    }  # fmt: skip
    assert kept.to_list() == datasets.Dataset.from_list(rows).to_list() == rows
    for name in ("top.csv", "top.jsonl"):
        path = folder.write(tmp_path / name, 3, **given)
        kind = "csv" if name.endswith("csv") else "json"
        read = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
        assert read.to_list() == rows
    picked = own.select([IDS.index(row["train"]) for row in rows])
    assert picked["text"] == [row["text"] for row in rows]


def test_what_does_not_join(scored, tmp_path):
    _, folder, _ = scored
    with pytest.raises(ValueError, match="ids must be of all n > 8 training examples, got 8"):
        folder.rows(9, ids=IDS[:8])
    with pytest.raises(ValueError, match="query_ids must be of the q=2 queries, got 3"):
        folder.rows(2, query_ids=[1, 2, 3])
    with pytest.raises(ValueError, match="columns must have names of their own, got 'score'"):
        folder.rows(2, columns={"score": IDS})
    assert len(folder.rows(20)) == 18
    with pytest.raises(ValueError, match=r"a .csv or a .jsonl file, at least one, got 'top.txt'"):
        folder.write(tmp_path / "top.txt")
    with pytest.raises(ValueError, match="at least one, got 0 rows"):
        fastif.write_rows([], tmp_path / "top.csv")


def test_objects_say_what_they_are(scored):
    influence, _, _ = scored
    curvature = "Diagonal(damping=0.01, fisher='exact')"
    whole = f"Influence(Linear, loss='cross_entropy', curvature={curvature}, 8 parameters in 1 blocks, fitted on n=9)"
    assert repr(influence) == whole
    assert "not fitted" in repr(fastif.Influence(nn.Linear(3, 2), curvature=fastif.Diagonal()))
    plan = influence.plan((torch.randn(9, 3), torch.arange(9) % 2))
    assert repr(plan).startswith("Plan(8 parameters in 1 blocks, 0 parameters skipped, n=9, fit: ")
    assert str(plan).startswith("covered: 8 parameters")
    networks = fastif.Networks([{}, {}], [torch.arange(4), torch.arange(5)], 2.5)
    assert repr(networks) == "Networks(2, trained on 4 to 5 examples each, training_time=2.5)"
    model = nn.Linear(3, 2)
    log = fastif.TrainingLog(model, every=2)
    assert repr(log) == "TrainingLog(no steps yet, a checkpoint every 2)"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(4, 3)).sum().backward()
        log.step(optimizer, [0, 1, 2, 5])
    assert repr(log) == "TrainingLog(3 steps of SGD, 4 examples, 8 parameters, 2 checkpoints in memory)"
    data = torch.randn(6, 3), torch.arange(6) % 2
    replay = fastif.Replay(log, model, data, fastif.model.losses.per_sample, progress=False)
    assert repr(replay) == ("Replay(Linear, loss='per_sample', matrix='ggn', 1 log of 3 steps, n=6, not yet run again)")


def test_a_replay_says_how_far_it_was_off():
    model, (x, y) = nn.Linear(3, 2), (torch.randn(6, 3), torch.arange(6) % 2)
    log, optimizer = fastif.TrainingLog(model, every=1), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        log.step(optimizer, torch.arange(6))
    replay = fastif.Replay([log, log], model, (x, y), progress=False)
    replay.verify()
    assert replay.deviations is not None
    off = f"{max(replay.deviations):.1e}"
    assert repr(replay).endswith(f"2 logs of 4 steps, n=6, run again, checkpoints off by {off} at most)")


def test_subsets_and_removals_do_not_show_all_their_numbers():
    few = fastif.Subset(torch.tensor([3, 5]), torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert repr(few) == "Subset(2 examples, weights 0.25 to 0.75, 1 in all)"
    assert repr(fastif.Subset(few.indices[:1], few.weights[:1])) == "Subset(1 examples, weights 0.25 each, 0.25 in all)"
    assert repr(fastif.Subset(few.indices[:0], few.weights[:0])) == "Subset(no examples)"
    certified = fastif.CertifiedSubset(few.indices, few.weights, 0.5)
    assert repr(certified) == "CertifiedSubset(2 examples, weights 0.25 to 0.75, 1 in all, bound=0.5)"
    torch.manual_seed(0)
    model, data = nn.Linear(3, 2), (torch.randn(20, 3), torch.arange(20) % 2)
    removal = fastif.remove(model, data, torch.arange(4), steps=2, progress=False)
    (first, *_) = removal.history
    size = f"{next(iter(first.step_size.values())):.3g}"
    said = f"Step(1, objective={first.objective:.6g}, gradient_norm={first.gradient_norm:.3g}, step_size="
    assert repr(first).startswith(said)
    assert f": {size}" in repr(first)
    steps, end = len(removal.history), removal.history[-1].objective
    assert repr(removal) == f"Removal({steps} steps of 8 parameters (weight, bias), objective={end:.6g})"
    bare = removal._replace(history=[], moved=removal.moved[:1])
    assert repr(bare) == "Removal(no step, as none would have lowered the objective of 8 parameters (weight, bias))"


def test_a_capture_says_what_it_has():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with fastif.capture(model, keep="numbers") as captured:
        said = "Captured(Sequential, keep='numbers', 26 parameters in 2 blocks, "
        assert repr(captured) == said + "no gradients: ask after backward())"
        model(torch.randn(5, 3)).sum().backward()
        assert repr(captured) == said + "gradients of n=5 examples)"


def test_bars_are_switched_off_for_all(capsys):
    train = torch.randn(9, 3), torch.arange(9) % 2

    def shown():
        fastif.Influence(nn.Linear(3, 2), curvature=fastif.Diagonal(1e-2), progress=True).fit(train)
        return capsys.readouterr().err

    assert "fit" in shown()
    fastif.set_progress(False)
    try:
        assert shown() == ""
        fastif.samplers.k_center(torch.randn(50, 2), 5, progress=True)
        assert capsys.readouterr().err == ""
    finally:
        fastif.set_progress(True)
    assert "fit" in shown()
    with pytest.raises(TypeError, match="shown must be True or False, got 0"):
        fastif.set_progress(0)
