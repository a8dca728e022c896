"""`fastif scores|index|query --model FOLDER`: what they write is what `fastif.Influence` gives by hand."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fastif import EKFAC, Index, Influence, ScoreFolder
from fastif.integrations import problem_of

transformers = pytest.importorskip("transformers", reason="models in folders are transformers'")

from tests.helpers.folders import (  # noqa: E402
    ASKED,
    CLASSES,
    LABELS,
    LONGEST,
    SAID,
    numbers,
    save_classifier,
    save_image_classifier,
    save_language_model,
    tokenizer,
    write_file,
)

BANKING = Path(os.environ.get("FASTIF_DATA", "nowhere")).absolute() / "banking77"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_file(Path("train.jsonl"), text=SAID, label=LABELS, code=[f"t{i}" for i in range(len(SAID))])
    write_file(Path("query.csv"), text=ASKED, label=CLASSES, code=["a", "b", "c"])
    return tmp_path


def padded(rows, value, length=None):
    length = max(map(len, rows)) if length is None else length
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def by_hand(texts, labels=None, pad=2):
    """The tensors of texts, one batch; labels of classes, or the texts' own tokens."""
    ids = numbers(texts)
    batch = {"input_ids": padded(ids, pad), "attention_mask": padded([[1] * len(row) for row in ids], 0)}
    return {**batch, "labels": padded(ids, -100) if labels is None else torch.tensor(labels)}


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file)) if str(path).endswith("csv") else [json.loads(line) for line in file]


def signed(value):
    return ("−" if value < 0 else "+") + f"{abs(value):.2e}"


ROW = ["query", "rank", "train", "score", "id", "text", "label"]  # of `scores` and of `query`, files with ids
CLASSIFY = ["--train", "train.jsonl", "--query", "query.csv", "--label", "label"]


def test_scores_of_a_classifier_are_those_by_hand(run, folder):
    save_classifier(Path("model"))
    job = ["scores", "--model", "model", *CLASSIFY, "--id", "code", "--damping", "0.1", "--batch-size", "5", "--out"]
    code, printed, error = run(*job, "out", "--top", "3", "--pages", "2")
    assert code == 0, error
    model = transformers.BertForSequenceClassification.from_pretrained("model").eval()
    train = by_hand(SAID, [CLASSES.index(label) for label in LABELS], pad=1)
    query = by_hand(ASKED, [0, 1, 2], pad=1)
    influence = Influence(model, "cross_entropy", EKFAC(0.1), progress=False).fit(train)
    want = influence.scores(query, train)
    assert torch.allclose(ScoreFolder("out").load(), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
    order = want.argsort(1, descending=True)
    rows = rows_of("out/top.csv")
    assert [row["query"] for row in rows] == list("aaabbbccc")
    assert [row["text"] for row in rows] == [SAID[i] for i in order[:, :3].flatten()]
    assert [row["label"] for row in rows] == [LABELS[i] for i in order[:, :3].flatten()]
    assert list(rows[0]) == ROW
    assert [int(row["train"]) for row in rows] == order[:, :3].flatten().tolist()
    assert [row["id"] for row in rows] == [f"t{i}" for i in order[:, :3].flatten()]
    for text in (*ASKED, SAID[int(order[0, 0])], SAID[int(order[2, 4])]):
        assert text in printed
    assert sorted(path.name for path in Path("out/explain").iterdir()) == ["query-0.html", "query-1.html"]
    page = Path("out/explain/query-1.html").read_text()
    assert "Query 1 · b · transfer" in page
    helps, harms = page.split("Helps most")[1].split("Harms most")
    for side, best in ((helps, order[1]), (harms, order[1].flip(0))):
        assert f"{int(best[0])} · t{int(best[0])} · {LABELS[best[0]]}" in side
        assert signed(float(want[1, best[0]])) in side
    assert run(*job, "again", "--quiet", "--pages", "0") == (0, "", "")
    assert not Path("again/explain").exists()


def test_run_toml_runs_it_again(run, folder):
    save_classifier(Path("model"))
    job = ["scores", "--model", "model", *CLASSIFY, "--layers", "*.dense", "--quiet", "--out", "out"]
    assert run(*job, "--fisher", "empirical", "--seed", "3") == (0, "", "")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    os.chdir(elsewhere)
    assert run("scores", "--config", "../out/run.toml", "--out", "again", "--quiet") == (0, "", "")
    first, second = ScoreFolder("../out"), ScoreFolder("again")
    assert torch.equal(first.load(), second.load())
    assert first.settings == second.settings
    assert run("scores", "--config", "../out/run.toml", "--resume", "--quiet") == (0, "", "")
    assert run("scores", "--config", "../out/run.toml", "--out", "other", "--quiet", "--damping", "3") == (0, "", "")
    assert not torch.equal(first.load(), ScoreFolder("other").load())
    for text, words in (
        ("shares = 3", "scores has no option 'shares'; it has out, script, model, train"),
        ("out = ", "own.toml is no TOML"),
        ('out = "new"\nseed = "much"', "Invalid value for '--seed'"),
        ('out = "new"', "give a script (MODULE:FUNCTION), or a folder with a model (--model), got neither"),
    ):
        Path("own.toml").write_text(text)
        code, _, error = run("scores", "--config", "own.toml")
        assert (code, words in error) == (2, True), error
    assert run("scores", "--config", "no.toml")[2] == "error: no file no.toml for --config\n"


@pytest.mark.parametrize("prompted", [False, True])
def test_scores_of_a_language_model_are_those_by_hand(run, folder, prompted):
    """Prompts are left out of the loss; a tokenizer without a padding token pads with what is masked."""
    save_language_model(Path("model"))
    prompts = {}
    if prompted:
        for name, texts in (("train.jsonl", SAID), ("query.csv", ASKED)):
            halves = [(" ".join(words[:2]) + " ", " ".join(words[2:])) for words in map(str.split, texts)]
            prompts[name], ends = map(list, zip(*halves, strict=True))
            write_file(Path(name), asked=prompts[name], said=ends)
    columns = ["--prompt", "asked", "--text", "said"] if prompted else []
    job = ["scores", "--model", "model", "--train", "train.jsonl", "--query", "query.csv", *columns, "--damping", "0.1"]
    assert run(*job, "--fisher", "empirical", "--quiet", "--out", "out") == (0, "", "")
    model = transformers.GPT2LMHeadModel.from_pretrained("model").eval()
    train, query = by_hand(SAID), by_hand(ASKED)
    if prompted:
        for batch, name in ((train, "train.jsonl"), (query, "query.csv")):
            skip = torch.tensor([len(prompt.split()) for prompt in prompts[name]])
            batch["labels"][torch.arange(batch["labels"].shape[1]) < skip[:, None]] = -100
        assert bool((train["labels"][:, :2] == -100).all())
    influence = Influence(model, "causal_lm", EKFAC(0.1, "empirical"), progress=False).fit(train)
    want = influence.scores(query, train)
    assert torch.allclose(ScoreFolder("out").load(), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_without_a_word_a_language_model_gets_a_fisher_of_drawn_tokens(run, folder):
    save_language_model(Path("model"))
    job = ["scores", "--model", "model", "--train", "train.jsonl", "--query", "query.csv", "--quiet", "--out"]
    assert run(*job, "out", "--fisher", "monte_carlo") == (0, "", "")
    assert run(*job, "again") == (0, "", "")
    assert torch.equal(ScoreFolder("out").load(), ScoreFolder("again").load())


def test_tokens_of_the_pages_have_their_parts(run, folder):
    """By token in the scores, and on the page: of a layer that sees every position the parts add up to the score."""
    save_language_model(Path("model"))
    job = ["scores", "--model", "model", "--train", "train.jsonl", "--query", "query.csv", "--layers", "*.mlp.*"]
    job += ["--fisher", "empirical", "--batch-size", "4", "--quiet", "--out"]
    assert run(*job, "out") == (0, "", "")
    assert run(*job, "tokens", "--by", "token") == (0, "", "")
    parts, whole = ScoreFolder("tokens").load(), ScoreFolder("out").load()
    assert parts.shape == (3, 12, max(len(text.split()) for text in SAID))
    assert torch.allclose(parts.sum(2), whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))
    best = int(whole[0].argmax())
    page = Path("out/explain/query-0.html").read_text()
    for part in parts[0, best][: len(SAID[best].split())]:
        assert f'title="{signed(float(part))}"' in page


def test_texts_of_a_head_alone_are_coloured_whole(run, folder):
    """It sees one position, which is no token of the text."""
    save_classifier(Path("model"))
    job = ["scores", "--model", "model", "--train", "train.jsonl", "--query", "query.csv", "--label", "label"]
    assert run(*job, "--layers", "classifier", "--quiet", "--out", "out") == (0, "", "")
    whole = ScoreFolder("out").load()[0]
    page = Path("out/explain/query-0.html").read_text()
    assert "</span> texts help" in page
    best = int(whole.argmax())
    assert re.search(rf'title="{re.escape(signed(float(whole[best])))}">{SAID[best]}</span>', page)


def test_fewer_examples_than_are_named_without_a_word(run, folder):
    save_classifier(Path("model"))
    write_file(Path("train.csv"), text=SAID[:4], label=LABELS[:4], code=["w" * 40, "x", "y", "z"])
    files = ["--model", "model", "--train", "train.csv", "--label", "label", "--id", "code"]
    code, printed, error = run("scores", *files, "--query", "query.csv", "--layers", "classifier", "--out", "out")
    assert code == 0, error
    assert len(rows_of("out/top.csv")) == 3 * 4
    assert " " + "w" * 15 + "…  " in printed  # long ids leave the scores their place
    scores = ScoreFolder("out").load()
    assert f"{float(scores[0, 0]):+.2e}" in printed
    assert run("index", *files, "--layers", "classifier", "--share", "1", "--out", "index", "--quiet") == (0, "", "")
    assert run("query", "index", "--query", "query.csv", "--out", "best.csv", "--quiet") == (0, "", "")
    assert len(rows_of("best.csv")) == 3 * 4
    code, _, error = run("query", "index")
    assert (code, "--query is needed with a model's folder" in error) == (2, True)


def test_scores_of_pairs_with_several_labels_are_those_by_hand(run, folder):
    """Two columns of texts; lists of labels, whose losses are summed."""
    save_classifier(Path("model"), problem_type="multi_label_classification", max_position_embeddings=20)
    several = [[CLASSES[i % 3]] + [CLASSES[(i + 1) % 3]] * (i % 2) for i in range(12)]
    write_file(Path("train.jsonl"), asked=SAID, said=SAID[::-1], labels=several)
    write_file(Path("query.csv"), asked=ASKED, said=ASKED, labels=[["card"], [], [0.0, 1.0, 1.0]])
    files = ["--model", "model", "--text", "asked", "--text", "said", "--label", "labels", "--damping", "0.1"]
    job = ["scores", *files, "--train", "train.jsonl", "--query", "query.csv"]
    code, printed, error = run(*job, "--out", "out")
    assert code == 0, error
    assert f"{ASKED[2]} | {ASKED[2]}" in printed
    assert "transfer, money" in printed
    marks = [[float(name in one) for name in CLASSES] for one in several]
    train = by_hand([f"{a} {b}" for a, b in zip(SAID, SAID[::-1], strict=True)], marks, pad=1)
    query = by_hand([f"{a} {a}" for a in ASKED], [[1.0, 0, 0], [0.0, 0, 0], [0.0, 1, 1]], pad=1)
    model = transformers.BertForSequenceClassification.from_pretrained("model").eval()
    want = Influence(model, "bce", EKFAC(0.1), progress=False).fit(train).scores(query, train)
    assert torch.allclose(ScoreFolder("out").load(), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
    assert run("scores", "--config", "out/run.toml", "--out", "again", "--quiet") == (0, "", "")
    assert torch.equal(ScoreFolder("again").load(), ScoreFolder("out").load())
    build = ["index", *files, "--train", "train.jsonl", "--share", "1", "--dtype", "float32", "--out", "index"]
    assert run(*build, "--quiet") == (0, "", "")
    assert run("query", "index", "--query", "query.csv", "--out", "best.jsonl", "--quiet") == (0, "", "")
    rows = rows_of("best.jsonl")
    assert [row["score"] for row in rows[:10]] == pytest.approx(want[0].topk(10).values.tolist(), rel=1e-2)
    best = rows[0]["train"]
    assert (rows[0]["text"], rows[0]["label"]) == (f"{SAID[best]} | {SAID[11 - best]}", ", ".join(several[best]))
    Path("own.toml").write_text(Path("out/run.toml").read_text().replace('["asked", "said"]', '"asked"'))
    assert run("scores", "--config", "own.toml", "--out", "one", "--quiet") == (0, "", "")
    assert "asked" in Path("one/run.toml").read_text()
    write_file(Path("query.csv"), asked=ASKED[:1], said=ASKED[:1], labels=["card;money"])
    code, _, error = run(*job, "--out", "new")
    want = 'query.csv, row 0: the label must be a list of the classes of an example, ["a", "b"], got \'card;money\''
    assert (code, want in error) == (2, True), error


def test_images(run, folder):
    from PIL import Image

    save_image_classifier(Path("model"))
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 255, (9, 8, 8, 3), dtype=np.uint8)
    Path("images").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(f"images/{i}.png")
    write_file(Path("images/train.csv"), file=[f"{i}.png" for i in range(6)], kind=[0, 1] * 3)
    write_file(Path("images/query.jsonl"), file=[f"{i}.png" for i in range(6, 9)], kind=["LABEL_1", 0, 1])
    job = ["scores", "--model", "model", "--train", "images/train.csv", "--query", "images/query.jsonl"]
    job += ["--image", "file", "--label", "kind", "--top", "5", "--quiet", "--out"]
    assert run(*job, "out") == (0, "", "")
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 * 2 - 1
    model = transformers.ViTForImageClassification.from_pretrained("model").eval()
    train = {"pixel_values": x[:6], "labels": torch.tensor([0, 1] * 3)}
    query = {"pixel_values": x[6:], "labels": torch.tensor([1, 0, 1])}
    want = Influence(model, "cross_entropy", EKFAC(), progress=False).fit(train).scores(query, train)
    assert torch.allclose(ScoreFolder("out").load(), want, rtol=1e-2, atol=1e-3 * float(want.abs().max()))
    assert Path("out/explain/query-2.html").read_text().count("data:image/png;base64,") == 1 + 6
    Path("images/3.png").write_text("no image")
    code, _, error = run(*job, "new")
    assert (code, "3.png is no image that can be read" in error) == (2, True)
    Path("images/3.png").unlink()
    code, _, error = run(*job, "new")
    assert (code, "images/train.csv, row 3: no file images/3.png" in error) == (2, True)


def test_an_index_is_asked_with_a_file_alone(run, folder):
    save_classifier(Path("model"))
    build = ["index", "--model", "model", "--train", "train.jsonl", "--label", "label", "--id", "code"]
    build += ["--out", "index", "--share", "1", "--dtype", "float32", "--damping", "0.1"]
    code, printed, error = run(*build)
    assert code == 0, error
    assert "examples   12" in printed
    train = by_hand(SAID, [CLASSES.index(label) for label in LABELS], pad=1)
    model = transformers.BertForSequenceClassification.from_pretrained("model").eval()
    influence = Influence(model, "cross_entropy", EKFAC(0.1), progress=False).fit(train)
    values, indices = influence.top(by_hand(ASKED, [0, 1, 2], pad=1), train, 2)
    os.chdir(folder.parent)  # what the index needs is found from anywhere
    query = ["query", folder / "index", "--query", folder / "query.csv", "--top", "2", "--out", folder / "best.jsonl"]
    code, printed, error = run(*query)
    assert code == 0, error
    rows = rows_of(folder / "best.jsonl")
    assert list(rows[0]) == ROW
    assert [row["train"] for row in rows] == indices.flatten().tolist()
    assert [row["id"] for row in rows] == [f"t{i}" for i in indices.flatten()]
    assert [row["text"] for row in rows] == [SAID[i] for i in indices.flatten()]
    assert [row["score"] for row in rows] == pytest.approx(values.flatten().tolist(), rel=1e-2)
    assert SAID[int(indices[1, 0])] in printed
    assert run(*query, "--rerank", "4", "--quiet") == (0, "", "")
    os.rename(folder / "model", folder / "moved")
    code, _, error = run(*query)
    assert (code, "no folder" in error) == (2, True)
    assert run(*query, "--model", folder / "moved", "--quiet") == (0, "", "")
    (folder / "train.jsonl").rename(folder / "old.jsonl")
    code, printed, _ = run(*query, "--model", folder / "moved")
    assert (code, ASKED[1] in printed, SAID[int(indices[1, 0])] in printed) == (0, False, False)
    assert run(*query, "--model", folder / "moved", "--train", folder / "old.jsonl", "--quiet") == (0, "", "")
    write_file(folder / "train.jsonl", text=SAID, label=LABELS)
    code, _, error = run(*query, "--model", folder / "moved")
    assert (code, "train.jsonl is not as it was when" in error) == (2, True)
    code, _, error = run("query", folder / "index", "own:script")
    assert (code, "it takes --query and no script, got own:script" in error) == (2, True)


def test_an_answer_is_a_folder_with_pages_that_can_be_asked_for_again(run, folder):
    """The pages of `query` are those of `scores` where nothing of the gradients was dropped."""
    save_language_model(Path("model"))
    files = ["--model", "model", "--train", "train.jsonl", "--id", "code", "--layers", "*.mlp.*", "--seed", "1"]
    files += ["--fisher", "empirical"]
    assert run("index", *files, "--share", "1", "--dtype", "float32", "--out", "index", "--quiet") == (0, "", "")
    assert run("scores", *files, "--query", "query.csv", "--pages", "2", "--out", "scores", "--quiet") == (0, "", "")
    query = ["query", "index", "--query", "query.csv", "--top", "4", "--pages", "2", "--out"]
    code, printed, error = run(*query, "answers")
    assert code == 0, error
    assert "answers: top.csv, run.toml" in printed
    assert "answers/explain/query-0.html and so on: the first 2 queries, explained" in printed
    assert sorted(path.name for path in Path("answers/explain").iterdir()) == ["query-0.html", "query-1.html"]
    for way in ("answers", "exact"):
        if way == "exact":
            assert run(*query, way, "--rerank", "5", "--quiet") == (0, "", "")
        for name in ("query-0.html", "query-1.html"):
            (told, values), (want, expected) = (said_on(Path(one, "explain", name)) for one in (way, "scores"))
            assert (told, values) == (want, pytest.approx(expected, rel=0.02))
    assert [row["train"] for row in rows_of("answers/top.csv")] == [
        row["train"] for row in rows_of("scores/top.csv") if int(row["rank"]) <= 4
    ]
    (folder / "elsewhere").mkdir()
    os.chdir(folder / "elsewhere")
    assert run("query", "--config", "../answers/run.toml", "--out", "again", "--quiet") == (0, "", "")
    for name in ("top.csv", "explain/query-1.html"):
        assert Path("again", name).read_text() == (folder / "answers" / name).read_text()
    code, _, error = run("query", "--config", "../answers/run.toml", "--quiet")
    assert (code, "answers holds a run already (run.toml): choose another folder" in error) == (2, True)
    assert run("query", "--config", "../answers/run.toml", "--out", "best.csv", "--quiet") == (0, "", "")
    assert sorted(path.name for path in Path().iterdir()) == ["again", "best.csv"]
    Index(folder / "index").remove(torch.tensor([int(rows_of("best.csv")[0]["train"])]))
    assert run("query", "--config", "../answers/run.toml", "--out", "without", "--quiet") == (0, "", "")
    gone, left = rows_of("best.csv")[0]["id"], Path("without/explain/query-0.html").read_text()
    assert f"· {gone}<" not in left
    assert f"· {rows_of('best.csv')[1]['id']}<" in left
    (folder / "train.jsonl").unlink()  # no texts to show
    assert run("query", "--config", "../answers/run.toml", "--out", "bare", "--quiet") == (0, "", "")
    assert sorted(path.name for path in Path("bare").iterdir()) == ["run.toml", "top.csv"]


def said_on(page):
    """What a page shows: all but the numbers, and the scores."""
    told, score = page.read_text(), r"[+−]\d\.\d\de[+-]\d\d"
    scores = [float(value.replace("−", "-")) for value in re.findall(f"<div class=score>({score})", told)]
    return re.sub(rf'{score}|0\.\d\d\)|width="[\d.]+"|\d+% of', "", told), scores


def test_an_index_that_was_appended_to_is_asked_in_python(run, folder):
    save_classifier(Path("model"))
    build = ["index", "--model", "model", "--train", "train.jsonl", "--label", "label", "--out", "index", "--quiet"]
    assert run(*build, "--layers", "classifier", "--share", "1") == (0, "", "")
    problem = problem_of("model", "train.jsonl", None, label="label")
    influence = Influence(problem.model, "cross_entropy", EKFAC(), layers=["classifier"], batch_size=16, progress=False)
    Index("index", influence).append(problem.train.loader)
    code, _, error = run("query", "index", "--query", "query.csv")
    assert (code, "index is of 24 training examples, of which the file has 12" in error) == (2, True)


def test_long_texts_are_cut_and_leave_the_scores_their_place(run, folder):
    save_language_model(Path("model"))
    words = [f"{text} " + "never" * 40 for text in SAID[:6]]
    write_file(Path("train.csv"), text=words)
    job = ["scores", "--model", "model", "--train", "train.csv", "--query", "train.csv", "--fisher", "empirical"]
    code, printed, error = run(*job, "--layers", "*.mlp.*", "--top", "1", "--out", "out")
    assert code == 0, error
    best, index = ScoreFolder("out").load()[0].max(0)
    table = printed.split("help the first queries most")[1].splitlines()
    score = re.escape(f"{float(best):+.2e}")
    assert any(re.search(rf"^ +{int(index)}  {score}  {SAID[int(index)]}", line) for line in table)
    assert any(re.search(r"^ +0 +" + SAID[0] + r" never\w+…", line) for line in table)
    assert max(map(len, table)) <= 120


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "gpt2"], "no folder gpt2: models come from a local folder that save_pretrained wrote, and names"),
        (
            ["own:script", "--model", "model"],
            "a script (MODULE:FUNCTION), or a folder with a model (--model), got both",
        ),
        ([], "got neither"),
        (["own:script", "--label", "label"], "--label must be left out without --model, got label"),
        (["--model", "model", "--loss", "mse"], "--loss must be left out with --model, whose training had one, got"),
        (["--model", "model"], "BertForSequenceClassification (model) needs --label, a column of the files"),
        (["--model", "model", "--label", "label", "--prompt", "p"], "(model) has no use for --prompt, got p"),
        (["--model", "model", "--label", "label", *["--text", "t"] * 3], "or two for pairs of texts, got 3: t, t, t"),
        (["--model", "model", "--label", "kind"], "train.jsonl, row 0: column 'kind' is not there: its columns are"),
        (["--model", "model", "--label", "label", "--max-length", "9"], f"must be in [1, {LONGEST}], the tokens that"),
        (["--model", "model", "--label", "code"], "row 0: the label 't0' is none of the model's 3: 'card', 'money'"),
    ],
)
def test_bad_input_is_one_line(run, folder, arguments, words):
    save_classifier(Path("model"))
    files = ["--train", "train.jsonl", "--query", "query.csv"] if "--model" in arguments else []
    code, printed, error = run("scores", *arguments, *files, "--out", "out", "--quiet")
    assert (code, printed, error.count("\n")) == (2, "", 1), error
    assert words in error
    assert not Path("out").exists()


@pytest.mark.skipif(
    not (BANKING / "train.csv").is_file(), reason="FASTIF_DATA names no folder with banking77/train.csv"
)
def test_questions_to_a_bank(run, tmp_path, monkeypatch):
    """A classifier of all intents, hardly trained: texts of real length, and the same question backs itself."""
    from transformers import BertConfig, BertForSequenceClassification

    monkeypatch.chdir(tmp_path)
    rows = rows_of(BANKING / "train.csv")[::50]
    write_file(Path("train.csv"), **{name: [row[name] for row in rows] for name in ("text", "category")})
    write_file(Path("query.jsonl"), **{name: [row[name] for row in rows[:4]] for name in ("text", "category")})
    names = sorted({row["category"] for row in rows})
    words = tokenizer(re.findall(r"\w+|[^\w\s]+", " ".join(row["text"] for row in rows)), pad_token="<pad>")
    torch.manual_seed(0)
    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    classes = dict(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    BertForSequenceClassification(BertConfig(vocab_size=len(words), **size, **classes)).save_pretrained("model")
    words.save_pretrained("model")
    job = ["scores", "--model", "model", "--train", "train.csv", "--query", "query.jsonl", "--label", "category"]
    code, printed, error = run(*job, "--layers", "*.dense,classifier", "--fisher", "empirical", "--out", "out")
    assert code == 0, error
    scores = ScoreFolder("out").load()
    assert scores.argmax(1).tolist() == [0, 1, 2, 3]
    assert rows[0]["text"][:40] in printed
    assert f"{signed(float(scores[0, 0]))}  {rows[0]['category']}" in printed  # long texts make way for the rest
    page = Path("out/explain/query-3.html").read_text()
    assert rows[3]["category"].replace("_", "_<wbr>") in page
    assert page.count("<li") <= 16
