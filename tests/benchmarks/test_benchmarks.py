"""The experiments of docs/evaluation.md run at a small scale, go on where they were cut off, and fill their tables."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import fastif
from benchmarks.experiments import lds, lds_contenders, lds_text, lds_trainings, mislabel_detection
from benchmarks.figures import faithfulness, keep, pages, tables
from benchmarks.influence import operations
from fastif import evaluation
from fastif.journal import Journal
from fastif.model.gradients import Dense, second_moment
from tests.data.test_data import real_data, write_shard


def test_mislabel_detection_runs_and_resumes(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    clean = draw.integers(0, 10, 80)
    images = (clean[:, None, None, None] * 20 + draw.integers(0, 50, (80, 3, 32, 32))).astype(np.uint8)
    write_shard(tmp_path / "shard0.npz", images, clean.tolist(), list(range(80)), [0] * 64 + [1] * 16)
    worse = np.where(np.arange(80) % 4 == 0, (clean + 1) % 10, clean)
    np.savez(tmp_path / "labels.npz", clean=clean.astype(np.int8), worse=worse.astype(np.int8))
    monkeypatch.setattr(mislabel_detection, "SHARES", ("20%",))
    monkeypatch.setattr(mislabel_detection, "SEEDS", 2)
    options = dict(root=tmp_path, n=60, epochs=4, labels="worse", out=tmp_path / "a")
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    made = mislabel_detection.main(arguments)["detection"]
    names = [tuple(row["contender"]) for row in made]
    assert len(set(names)) == len(names) == 3 + 2 + 5 * 2 + 2
    again = {tuple(row["contender"]): row for row in made}
    assert again["loss", "", "", 0]["auc"] != again["head", "", "100%", 0]["auc"]
    # A job that was cut off after three rows: these are kept, the others come out alike.
    settings = {"n": 60, "epochs": 4, "labels": ["worse"], "damping": mislabel_detection.DAMPING}
    journal = Journal(tmp_path / "a" / "rows.jsonl", settings, resume=False)
    for row in made[:3]:
        journal.append("row", {**row, "cpu_seconds": -1})
    resumed = mislabel_detection.main(arguments)["detection"]
    assert [row["cpu_seconds"] == -1 for row in resumed] == [True] * 3 + [False] * (len(made) - 3)
    assert [row["auc"] for row in resumed] == [row["auc"] for row in made]
    stored = tmp_path / "a" / "results.json"
    monkeypatch.setattr(tables, "KEPT", tmp_path)
    keep.keep(stored, "mislabel")
    assert tables.mislabel_table("mislabel").count("\n| ") == 3 + 2 + 5 + 2


def narrow() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)),
    )


def test_lds_runs_and_its_table_is_whole(tmp_path, monkeypatch):
    root = real_data("fashion_mnist")
    monkeypatch.setattr(lds, "DAMPINGS", (1e-2,))
    monkeypatch.setattr(lds_trainings, "cnn", narrow)  # eigenvectors of the wide one's head are most of the time
    options = dict(root=root, n=120, queries=4, subsets=3, fresh=3, out=tmp_path / "a")
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    made = lds.main([*arguments, "--left-out", "2", "--models", "digits", "--contenders", "fastif"])["lds"]
    ours = [name for name in lds_contenders.CONTENDERS if name.startswith("fastif")]
    two = {name: 2 if name not in lds_contenders.DESCENT else 1 for name in ours}  # logistic regression is no descent
    assert [row["contender"] for row in made] == [name for name in ours for _ in range(two[name])]
    assert all(-1 <= row["lds"]["mean"] <= 1 for row in made)
    monkeypatch.setattr(tables, "KEPT", tmp_path)
    keep.keep(tmp_path / "a" / "results.json", "lds")
    assert faithfulness.lds_table("lds").count("\n| fastif") == len(ours)


def test_the_language_models_lds_runs_resumes_and_its_table_is_whole(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    words = [" ".join(draw.choice(["my", "card", "was", "not", "there", "today", "why"], 5)) for _ in range(40)]
    (tmp_path / "train.csv").write_text("text,category\n" + "\n".join(f"{text},none" for text in words))
    monkeypatch.setattr(lds_text, "EPOCHS", 2)
    options = dict(root=tmp_path, n=32, queries=4, subsets=3, qld=2, out=tmp_path / "a")
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    arguments += ["--contenders", "BM25", "cosine", "EK-FAC from a random 10 %"]
    made = lds_text.main(arguments)
    names = [row["contender"] for row in made["rows"]]
    assert names == [name for name in lds_text.CONTENDERS if any(part in name for part in arguments[-3:])]
    assert all(-1 <= row[what]["mean"] <= 1 for row in made["rows"] for what in ("halves", "without 5 %"))
    settings = {"n": 32, "queries": 4, "subsets": 3, "seeds": 2, "qld": 2, "contenders": arguments[-3:]}
    journal = Journal(tmp_path / "a" / "rows.jsonl", settings, resume=False)
    journal.append("row", {**made["rows"][0], "cpu_seconds": -1})  # cut off after the first
    resumed = lds_text.main(arguments)["rows"]
    assert [row["cpu_seconds"] == -1 for row in resumed] == [True, False, False]
    assert [row["qld"] for row in resumed] == [row["qld"] for row in made["rows"]]
    monkeypatch.setattr(tables, "KEPT", tmp_path)
    keep.keep(tmp_path / "a" / "results.json", "lds-text")
    assert faithfulness.lds_text_table("lds-text").count("\n| ") == len(names) + 1
    kept = json.loads((tmp_path / "lds-text.json").read_text())
    some = {**kept, "rows": [{**kept["rows"][1], "cpu_seconds": 7.0}], "meta": {**kept["meta"], "contenders": ["x"]}}
    (tmp_path / "some.json").write_text(json.dumps(some))
    keep.add(tmp_path / "some.json", "lds-text")
    rows = json.loads((tmp_path / "lds-text.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == names
    assert [row["cpu_seconds"] == 7 for row in rows] == [False, True, False]
    (tmp_path / "some.json").write_text(json.dumps({**some, "meta": {**some["meta"], "words": 1}}))
    with pytest.raises(ValueError, match="words must be that of the kept results"):
        keep.add(tmp_path / "some.json", "lds-text")


def test_a_tenth_of_the_texts_is_drawn_by_what_samplers_know_of_them():
    torch.manual_seed(0)
    tokens = torch.randint(1, 9, (30, lds_text.LENGTH))
    tokens[:, 9:] = 0
    model = lds_text.Transformer(9, lds_text.LENGTH, 8, 1, 2).eval()
    given = lds_text.Given(lds_text.Texts(tokens, 9, []), 30, model, None, [], None)
    drawn = {name: lds_text.drawn(given, name, 3) for name in ("random", "logit", "leverage")}
    assert all(len(one.indices) == 3 for one in drawn.values())
    features, _, _ = fastif.extract(model, tokens, progress=False)
    logits = model.head(features)[:, :8].mean(1)
    draw = torch.Generator().manual_seed(0)
    want = fastif.samplers.logit(logits, torch.zeros(30, dtype=torch.int64), 3, generator=draw)
    assert torch.equal(drawn["logit"].indices, want.indices)
    torch.testing.assert_close(drawn["logit"].weights, want.weights)


def test_bm25_by_hand():
    """Two words in two of three texts: idf log(1 + 1.5/2.5), tf 2.2·f/(f + 1.2·(0.25 + 0.75·length/mean))."""
    texts = lds_text.Texts(torch.zeros(4, 3, dtype=torch.int64), 0, [["a", "b"], ["a", "a", "c"], ["b"], ["a", "d"]])
    given = lds_text.Given(texts, 3, None, None, [], None)
    rarity = np.log(1 + 1.5 / 2.5)
    want = [rarity * f * 2.2 / (f + 1.2 * (0.25 + 0.75 * length / 2)) for f, length in ((1, 2), (2, 3))]
    assert lds_text.bm25(given)[0].tolist() == pytest.approx([*want, 0.0])


def test_rows_of_another_run_are_added_to_those_that_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "KEPT", tmp_path)

    def write(name, *rows, **facts):
        meta = {"models": {"CNN": {"n": 9, "seconds_of_a_retraining": len(rows), **facts}}}
        found = [{"model": model, "contender": who, "damping": damping} for model, who, damping in rows]
        (tmp_path / f"{name}.json").write_text(json.dumps({"meta": meta, "lds": found}))

    write("lds", ("MLP", "a", 1), ("CNN", "b", 1), ("MLP", "b", 1), ("MLP", "c", 1))
    write("part", ("CNN", "b", 1), ("CNN", "b", 2), ("CNN", "a", 3))
    keep.main(["add", str(tmp_path / "part.json"), "lds"])
    rows = [tuple(row.values()) for row in json.loads((tmp_path / "lds.json").read_text())["lds"]]
    order = [("MLP", "a", 1), ("CNN", "a", 3), ("MLP", "b", 1), ("CNN", "b", 1), ("CNN", "b", 2), ("MLP", "c", 1)]
    assert rows == order
    write("other", ("CNN", "a", 1), n=8)
    with pytest.raises(ValueError, match="add: CNN: n must be that of the kept results, 9, got 8"):
        keep.add(tmp_path / "other.json", "lds")


def test_benchmarks_take_the_place_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "KEPT", tmp_path)
    machine = {"cpu": {"brand_raw": "x", "hz": 1}, "threads": 2, "build": {"isa": "avx512"}, "torch": "2"}

    def write(name, names, **facts):
        found = [{"name": benchmark, "from": name} for benchmark in names]
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine_info": {**machine, **facts}, "benchmarks": found}))

    write("blocks", ["test_a[1]", "test_b"])
    write("some", ["test_a[2]", "test_a[3]"], cpu={"brand_raw": "x", "hz": 2})
    keep.add(tmp_path / "some.json", "blocks")
    kept = json.loads((tmp_path / "blocks.json").read_text())["benchmarks"]
    assert [(b["name"], b["from"]) for b in kept] == [
        ("test_b", "blocks"),
        ("test_a[2]", "some"),
        ("test_a[3]", "some"),
    ]
    write("other", ["test_b"], threads=1)
    with pytest.raises(ValueError, match="add: threads must be that of the kept results, 2, got 1"):
        keep.add(tmp_path / "other.json", "blocks")


def test_products_that_are_added_to_something_are_counted():
    """Second moments are such; torch's own counter leaves them out."""
    left, right, total = torch.randn(7, 3), torch.randn(3, 5), torch.zeros(7, 5)
    with operations.counted() as counter:
        total.addmm_(left, right)
        total[None].baddbmm_(left[None], right[None])
        _ = left @ right
    assert counter.get_total_flops() == 3 * 2 * 7 * 3 * 5
    x = torch.randn(1, 11, 1, 40)
    with operations.counted() as counter:
        second_moment(x, torch.ones(11))
    assert counter.get_total_flops() == 2 * 11 * 40 * 40  # one square suffices


@pytest.mark.parametrize(("t", "q", "products"), [(1, 5, 5), (3, 5, 8), (3, 1, 3)])
def test_dots_are_counted_as_the_fewest_products(t, q, products):
    gradients = Dense(torch.randn(1, 7, t, 4), torch.randn(1, 7, t, 6))
    with operations.counted() as counter:
        gradients.dots(torch.randn(q, 1, 6, 4))
    assert counter.get_total_flops() == 2 * 7 * 4 * 6 * products


def test_attention_is_counted():
    one = torch.randn(2, 4, 16, 8, requires_grad=True)
    with operations.counted() as counter:
        nn.functional.scaled_dot_product_attention(one, one, one).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * 2 * 4 * 16 * 16 * 8


def test_scores_that_are_not_finite_are_told_and_not_judged():
    retrained = evaluation.Retrained([], [], torch.zeros(0), torch.zeros(0))
    left_out = evaluation.LeftOut([], torch.zeros(0), torch.zeros(0), None)
    found = lds.judged(torch.full((2, 3), torch.nan), lds.Judges(retrained, retrained, left_out))
    assert found == {"lds": None, "fresh": None, "loo": None}


def test_the_table_of_gpus_has_the_newest_result_of_each(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "KEPT", tmp_path)
    page = "before\n<!-- table: gpu -->\n<!-- end -->\nafter"
    assert "No GPU has run them yet." in pages.with_tables(page)
    stages = [{"name": "build", "passed": True}, {"name": "racecheck", "passed": False}, {"name": "x", "passed": None}]
    rows = [
        {"name": "test_dots", "seconds": {"fastif": 0.012}, "share_of_limit": 0.61, "ratio": {"torch": 2.5}},
        {"name": "test_influence[mlp]", "ratio": {"kronfluence / exact": 4.0}},
    ]
    for device, date, scale in (("A", "2026-01-01", 2), ("A", "2026-02-01", 1), ("B", "2026-01-01", 3)):
        benchmarks = [rows[0] | {"seconds": {"fastif": 0.012 * scale}}, rows[1]]
        kept = dict(device=device, driver="1", torch="2", cuda="13", date=date, stages=stages, benchmarks=benchmarks)
        limits = {"copy_bytes_per_second": 4e12, "matmul_float32_flops_per_second": 5e13}
        (tmp_path / f"gpu-{device.lower()}-{date}.json").write_text(json.dumps({**kept, "limits": limits}))
    made = pages.with_tables(page)
    assert made.count("`dots`") == 2
    assert "| `dots` | 0.012 | 61% | 2.5× torch |" in made
    assert "| `dots` | 0.036 | 61% | 2.5× torch |" in made
    assert "| `influence[mlp]` |  |  | 4.0× kronfluence / exact |" in made
    assert "A, driver 1, torch 2, CUDA 13, 2026-02-01" in made
    assert "4.00 TB/s copied, 50 TFLOP/s in float32 and 0 in TF32 products. Passed: build. Failed: racecheck." in made
