"""Results that join with the user's own data, and objects that say what they are."""

import csv
import json

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


def test_a_data_frame(scored):
    _, folder, _ = scored
    try:
        import pandas
    except ImportError:
        with pytest.raises(ImportError, match="to_pandas needs pandas"):
            folder.to_pandas(top=2)
        pytest.skip("pandas is not installed")
    frame = folder.to_pandas(top=2, ids=IDS)
    assert isinstance(frame, pandas.DataFrame)
    assert frame.to_dict("records") == folder.rows(2, ids=IDS)


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
