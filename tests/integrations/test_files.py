"""Examples from a model's folder and files: what the model gets, what people read, and what is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastif import Diagonal, Influence
from fastif.integrations import problem_of
from fastif.integrations.tables import read_columns
from fastif.model.losses import per_sample

transformers = pytest.importorskip("transformers", reason="models in folders are transformers'")

from tests.helpers.folders import (  # noqa: E402
    CLASSES,
    LABELS,
    SAID,
    numbers,
    save_classifier,
    save_image_classifier,
    save_language_model,
    tokenizer,
    write_file,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_language_model(folder / "lm")
    save_classifier(folder / "classifier")
    return folder


def batches(examples):
    return list(examples.loader)


def byte_pairs(folder):
    """A language model whose tokenizer cuts words into pairs of bytes, as those of GPT-2 and its like do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        SAID, trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    )
    words = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    config = transformers.GPT2Config(vocab_size=len(words), n_positions=64, n_embd=4, n_layer=1, n_head=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return words


# ----------------------------------------------------------------------------------------------------- what comes of it


def test_batches_are_padded_masked_and_labelled(saved, tmp_path):
    file = write_file(tmp_path / "a.jsonl", text=SAID, n=list(range(len(SAID))))
    problem = problem_of(saved / "lm", file, None, batch_size=5, id="n")
    assert problem.query is None
    assert problem.loss == "causal_lm"
    assert problem.train.ids == [str(i) for i in range(12)]
    assert problem.train.texts == SAID
    assert not problem.model.training
    ids = numbers(SAID)
    given = batches(problem.train)
    assert [len(batch["input_ids"]) for batch in given] == [5, 5, 2]
    for first, batch in zip((0, 5, 10), given, strict=True):
        rows = ids[first : first + 5]
        assert batch["input_ids"].shape[1] == max(map(len, rows))
        for row, own, mask, labels in zip(
            rows, *(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True
        ):
            assert own.tolist()[: len(row)] == row == labels.tolist()[: len(row)]
            assert mask.tolist() == [1] * len(row) + [0] * (len(own) - len(row))
            assert (labels[len(row) :] == -100).all()
    one = batches(problem_of(saved / "lm", file, None, batch_size=5, one_length=True).train)
    assert {batch["input_ids"].shape[1] for batch in one} == {max(map(len, ids))}


def test_labels_are_names_or_numbers(saved, tmp_path):
    order = json.loads((saved / "classifier" / "config.json").read_text())["label2id"]
    assert order == {name: i for i, name in enumerate(CLASSES)}
    labels = ["money", "1", 0, "card"]
    file = write_file(tmp_path / "a.jsonl", text=SAID[:4], label=labels)
    train = problem_of(saved / "classifier", file, None, label="label").train
    assert batches(train)[0]["labels"].tolist() == [2, 1, 0, 0]
    assert train.labels == ["money", "1", "0", "card"]
    for value in ("cards", 3, -1, True, 1.0, "-1", "3", "²"):
        write_file(file, text=SAID[:2], label=["card", value])
        with pytest.raises(ValueError, match=re.escape(f"row 1: the label {value!r} is none of the model's 3: 'card'")):
            problem_of(saved / "classifier", file, None, label="label")


def test_a_number_that_is_the_name_of_another_class_is_refused(tmp_path):
    stars = dict(id2label={0: "1", 1: "2"}, label2id={"1": 0, "2": 1})
    save_classifier(tmp_path / "model", num_labels=2, **stars)
    file = write_file(tmp_path / "a.jsonl", text=SAID[:3], label=["1", "2", 0])
    train = problem_of(tmp_path / "model", file, None, label="label").train
    assert batches(train)[0]["labels"].tolist() == [0, 1, 0]
    write_file(file, text=SAID[:1], label=[1])
    with pytest.raises(ValueError, match="row 0: the label 1 is the number of a class, and '1' the name of number 0"):
        problem_of(tmp_path / "model", file, None, label="label")


def test_positions_that_are_counted_from_behind_the_padding_are_fewer(tmp_path):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    size = dict(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    config = RobertaConfig(**size, max_position_embeddings=8, type_vocab_size=1)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer(pad_token="<pad>").save_pretrained(tmp_path / "model")
    file = write_file(tmp_path / "a.csv", text=["the card was lost today is", SAID[0]], label=[0, 1])
    problem = problem_of(tmp_path / "model", file, None, label="label", max_length=6)
    assert len(problem.model(**batches(problem.train)[0]).logits) == 2
    write_file(file, text=["the card was lost today is my"], label=[0])
    with pytest.raises(ValueError, match="row 0: the text has 7 tokens, and the model takes 6"):
        problem_of(tmp_path / "model", file, None, label="label")


def test_a_model_of_one_number_has_squared_errors(tmp_path):
    save_classifier(tmp_path / "model", num_labels=1)
    file = write_file(tmp_path / "a.csv", text=SAID[:3], label=[0.5, -2, "3e-1"])
    problem = problem_of(tmp_path / "model", file, file, label="label")
    assert problem.loss == "mse"
    assert batches(problem.train)[0]["labels"].tolist() == pytest.approx([0.5, -2, 0.3])
    influence = Influence(problem.model, problem.loss, Diagonal(), progress=False).fit(problem.train.loader)
    assert bool((influence.scores(problem.query.loader, problem.train.loader).diag() > 0).all())
    write_file(file, text=SAID[:1], label=["much"])
    with pytest.raises(ValueError, match="row 0: the label must be a number, got 'much'"):
        problem_of(tmp_path / "model", file, None, label="label")


def test_prompts_of_pairs_of_bytes(tmp_path):
    """Tokens joined are the text, blanks and all; what counts begins with the first token of the text."""
    words = byte_pairs(tmp_path / "model")
    prompts = ["where is:\n", "how long  ", "é my", "a:", ""]
    texts = ["my new card", "does it take<end>", " money 🙂", "   the  card", "card was"]
    file = write_file(tmp_path / "a.jsonl", asked=prompts, said=texts)
    train = problem_of(tmp_path / "model", file, None, prompt="asked", text="said").train
    for prompt, text, tokens, example in zip(prompts, texts, train.shown, train.loader.dataset, strict=True):
        assert "".join(tokens) == prompt + text
        own = example["input_ids"]
        assert own.tolist() == words(prompt + text)["input_ids"]
        counted = own[example["labels"] != -100]
        assert words.decode(counted).strip(" ") == text.strip(" ")
        assert words.decode(own[: len(own) - len(counted)]).strip(" ") == prompt.strip(" ")
        assert torch.equal(own[len(own) - len(counted) :], counted)
    for prompt, text, said in (
        ("where is my mon", "ey", "row 0: the token 'money' is half of the prompt's"),
        ("where is my ", "  money", "row 0: the prompt ends and the text begins with a blank"),
    ):
        write_file(file, asked=[prompt], said=[text])
        with pytest.raises(ValueError, match=said):
            problem_of(tmp_path / "model", file, None, prompt="asked", text="said")


def test_long_texts_are_refused_or_cut(saved, tmp_path):
    long = "the card was lost today is my transfer here"
    file = write_file(tmp_path / "a.csv", text=[SAID[0], long])
    with pytest.raises(ValueError, match=re.escape(f"{file}, row 1: the text has 9 tokens, and the model takes 8")):
        problem_of(saved / "lm", file, None)
    train = problem_of(saved / "lm", file, None, max_length=4).train
    assert batches(train)[0]["input_ids"].shape == (2, 4)
    assert "".join(train.shown[1]) == "the card was lost …"
    assert "".join(train.shown[0]) == "where is my new …"
    with pytest.raises(
        ValueError, match=re.escape("max_length must be in [1, 8], the tokens that the model takes, got 9")
    ):
        problem_of(saved / "lm", file, None, max_length=9)
    write_file(file, text=[SAID[0], "card"])
    with pytest.raises(ValueError, match="row 1: the text has one token alone, and the first is predicted by none"):
        problem_of(saved / "lm", file, None)
    write_file(file, text=["", ""], asked=["where is my", "card"])
    with pytest.raises(ValueError, match="row 0: the text has no token after the prompt"):
        problem_of(saved / "lm", file, None, prompt="asked")
    write_file(file, text=[SAID[0], " "])
    with pytest.raises(ValueError, match="row 1: the text has no token"):
        problem_of(saved / "lm", file, None)


# -------------------------------------------------------------------------------------- pairs of texts, several labels


def joining():
    """A tokenizer that joins pairs as BERT's does."""
    from tokenizers.processors import TemplateProcessing

    names = ["input_ids", "token_type_ids", "attention_mask"]
    words = tokenizer(pad_token="<pad>", sep_token="<eos>", cls_token="<unk>", model_input_names=names)
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A <eos>", pair="<unk> $A <eos> $B:1 <eos>:1", special_tokens=[("<unk>", 0), ("<eos>", 2)]
    )
    return words


def test_pairs_of_texts_are_joined_by_the_tokenizer(tmp_path):
    save_classifier(tmp_path / "model", max_position_embeddings=20)
    words = joining()
    words.save_pretrained(tmp_path / "model")
    file = write_file(tmp_path / "a.jsonl", one=SAID, two=SAID[::-1], label=LABELS)
    train = problem_of(tmp_path / "model", file, None, text=["one", "two"], label="label").train
    assert train.texts[0] == f"{SAID[0]} | {SAID[-1]}"
    assert "".join(train.shown[0]) == f"<unk> {SAID[0]} <eos> {SAID[-1]} <eos> "
    whole = words(SAID, SAID[::-1], padding=True, return_tensors="pt")
    assert int(whole["token_type_ids"].max()) == 1
    for batch, rows in zip(batches(train), torch.arange(12).split(16), strict=True):
        for key in ("input_ids", "token_type_ids", "attention_mask"):
            assert torch.equal(batch[key], whole[key][rows])
    cut = problem_of(tmp_path / "model", file, None, text=["one", "two"], label="label", max_length=8).train
    assert "".join(cut.shown[0]) == "<unk> where is … <eos> the money was … <eos> "
    assert problem_of(tmp_path / "model", file, None, text="two", label="label").train.texts == SAID[::-1]
    write_file(file, one=["card", "card"], two=["money", 3], label=LABELS[:2])
    with pytest.raises(ValueError, match="row 1: column 'two' must be a string, got 3"):
        problem_of(tmp_path / "model", file, None, text=["one", "two"], label="label")
    with pytest.raises(ValueError, match="takes one --text, or two for pairs of texts, got 3: one, two, label"):
        problem_of(tmp_path / "model", file, None, text=["one", "two", "label"], label="label")


def test_pairs_with_nothing_between_them(saved, tmp_path):
    file = write_file(tmp_path / "a.csv", one=["my card"], two=["was lost"], label=["card"])
    train = problem_of(saved / "classifier", file, None, text=["one", "two"], label="label").train
    assert "".join(train.shown[0]) == "my card was lost"
    assert batches(train)[0]["input_ids"].tolist() == numbers(["my card was lost"])
    with pytest.raises(ValueError, match="one --text, or with --prompt for what stands before it, got 2: one, two"):
        problem_of(saved / "lm", file, None, text=["one", "two"])


SEVERAL = [["card"], ["transfer", "card"], [], [2, 0], [1.0, 0.0, 1], [True, False, False], [0, 0, 1], ["1"]]
MARKS = [[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 1], [1, 0, 1], [1, 0, 0], [0, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_several_labels_are_lists(tmp_path, name):
    """Names or numbers of classes, or a number for each class; in CSV as JSON or Python write lists."""
    save_classifier(tmp_path / "model", problem_type="multi_label_classification")
    file = write_file(tmp_path / name, text=SAID[:8], label=SEVERAL)
    problem = problem_of(tmp_path / "model", file, None, label="label")
    assert problem.loss == "bce"
    (batch,) = batches(problem.train)
    assert batch["labels"].tolist() == MARKS
    assert problem.train.labels[:4] == ["card", "card, transfer", "none", "card, money"]
    outputs = problem.model(**batch)  # with transformers' loss, the mean over examples and classes
    own = per_sample(problem.loss, outputs, batch, 8)
    assert float(own.detach().mean() / 3) == pytest.approx(float(outputs.loss.detach()), rel=1e-5)
    for value, words in (
        ("card", 'must be a list of the classes of an example, ["a", "b"], got \'card\''),
        (["card", "cards"], "'cards' is none of the model's 3"),
        (["card", 0], "name a class twice"),
        ([0.5, 0, 0], "0.5 is none of the model's 3"),
        ([0, 1, 2, 3], "3 is none of the model's 3"),
    ):
        write_file(file, text=SAID[:2], label=[["card"], value])
        with pytest.raises(ValueError, match=re.escape("row 1: the label") + ".*" + re.escape(words)):
            problem_of(tmp_path / "model", file, None, label="label")


def test_zeros_and_ones_that_may_be_classes_are_refused(tmp_path):
    save_classifier(tmp_path / "model", num_labels=2, problem_type="multi_label_classification")
    file = write_file(tmp_path / "a.jsonl", text=SAID[:4], label=[[1.0, 0.0], ["LABEL_1"], [1, 1], [1]])
    (batch,) = batches(problem_of(tmp_path / "model", file, None, label="label").train)
    assert batch["labels"].tolist() == [[1, 0], [0, 1], [1, 1], [0, 1]]
    write_file(file, text=SAID[:1], label=[[1, 0]])
    with pytest.raises(ValueError, match=r"row 0: the labels \[1, 0\] may be the numbers of classes, or 0 and 1 for"):
        problem_of(tmp_path / "model", file, None, label="label")


def test_several_numbers_are_lists(tmp_path):
    save_classifier(tmp_path / "model", num_labels=2, problem_type="regression")
    file = write_file(tmp_path / "a.csv", text=SAID[:2], label=[[0.5, -1], (2, "3e-1")])
    with pytest.raises(ValueError, match=re.escape("row 1: the label must be a list of 2 numbers, as many as the mod")):
        problem_of(tmp_path / "model", file, None, label="label")
    write_file(file, text=SAID[:2], label=[[0.5, -1], [2, "3e-1"]])
    problem = problem_of(tmp_path / "model", file, None, label="label")
    assert problem.loss == "mse"
    torch.testing.assert_close(batches(problem.train)[0]["labels"], torch.tensor([[0.5, -1.0], [2.0, 0.3]]))
    for value, words in (([1], "must be 2 numbers, got 1"), ([1, "much"], "the label must be a number, got 'much'")):
        write_file(file, text=SAID[:1], label=[value])
        with pytest.raises(ValueError, match=f"row 0: .*{words}"):
            problem_of(tmp_path / "model", file, None, label="label")


# -------------------------------------------------------------------------------------------------------------- folders


def changed(folder, source, **config):
    """A copy of a model's folder with other entries in config.json."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, **config}))
    return folder


def pickled(folder, source):
    changed(folder, source)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def lacking(folder, source):
    from safetensors.torch import load_file, save_file

    changed(folder, source)
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def alone(folder, source):
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")


def without_tokenizer(folder, source):
    changed(folder, source)
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda *_: None, "no folder * names on a hub are not fetched"),
        (lambda folder, _: folder.mkdir(), "has no config.json: models come from a folder that save_pretrained wrote"),
        (pickled, "has no weights in safetensors, and pytorch_model.bin is not read, as pickled weights can run code"),
        (lacking, "its weights lack classifier.weight (1 of BertForSequenceClassification's), which would be drawn"),
        (alone, "holds adapters alone: merge them into their base"),
        (without_tokenizer, "has no tokenizer (tokenizer.json, vocab.txt): save_pretrained writes it"),
        (
            lambda folder, source: changed(folder, source, auto_map={"AutoConfig": "own.Config"}),
            "brings code of its own (auto_map in config.json), which is not run: use a script",
        ),
        (
            lambda folder, source: changed(folder, source, architectures=["BertForMaskedLM"]),
            "its architecture is BertForMaskedLM, and folders may hold a causal language model",
        ),
        (lambda folder, source: changed(folder, source, architectures=None), "its architecture is None, and"),
        (lambda folder, source: changed(folder, source, model_type="own"), "transformers cannot read its config.json"),
        (
            lambda folder, source: changed(folder, source, quantization_config={"quant_method": "bitsandbytes"}),
            "its weights are quantised, and what they compute is not what gradients are of",
        ),
        (lambda folder, source: changed(folder, source, hidden_size=12), "BertForSequenceClassification"),
        (lambda folder, _: save_classifier(folder, {}), "neither tokenizer nor model has a padding token"),
    ],
)
def test_folders_that_are_refused(saved, tmp_path, capfd, make, words):
    make(tmp_path / "model", saved / "classifier")
    capfd.readouterr()
    file = write_file(tmp_path / "a.csv", text=SAID, label=LABELS)
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words.split("*")))) as error:
        problem_of(tmp_path / "model", file, file, label="label")
    assert str(error.value).count("\n") == 0
    assert str(tmp_path / "model") in str(error.value)
    assert capfd.readouterr() == ("", "")  # no report of transformers' beside it


def test_columns_that_a_model_has_no_use_for(saved, tmp_path):
    save_image_classifier(tmp_path / "images")
    file = write_file(tmp_path / "a.jsonl", text=SAID, label=LABELS)
    for folder, columns, words in (
        (saved / "lm", dict(label="label"), "has no use for --label, got label"),
        (saved / "classifier", dict(label="label", image="file"), "has no use for --image, got file"),
        (tmp_path / "images", dict(label="label"), "needs --image, a column of the files"),
        (tmp_path / "images", dict(image="text", label="label", text="text"), "has no use for --text, got text"),
        (tmp_path / "images", dict(image="text", label="label", max_length=3), "has no use for --max-length, got 3"),
    ):
        with pytest.raises(ValueError, match=words):
            problem_of(folder, file, None, **columns)


def test_nothing_of_transformers_is_imported_before_a_folder_is_read():
    code = "import sys, fastif.integrations, fastif.cli; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# --------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", "", "a.txt: examples come from a .jsonl or a .csv file, got .txt"),
        ("a.jsonl", "", "a.jsonl holds no rows"),
        ("a.csv", "text\n", "a.csv holds no rows"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": ', "a.jsonl, line 3 is no JSON"),
        ("a.jsonl", '["a"]', "a.jsonl, line 1 must be a JSON object, got list"),
        ("a.jsonl", '{"text": "a"}\n{"text": null}', "a.jsonl, row 1: column 'text' is null"),
        ("a.jsonl", '{"text": "a"}\n{"tekst": "a"}', "row 1: column 'text' is not there: its columns are 'tekst'"),
        ("a.csv", "text,b\na,b\nc,d,e\n", "a.csv, line 3 has more values than the header has columns"),
        ("a.csv", "b,text\na\n", "a.csv, row 0: column 'text' is null"),
        ("a.csv", 'text\n"a"b\n', "a.csv is no CSV after line 1"),
    ],
)
def test_tables_that_are_refused(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)):
        read_columns(tmp_path / name, ["text"])


def test_tables_keep_what_texts_hold(tmp_path):
    texts = ["two\nlines", 'a "word"', "a\u2028b", " blanks ", "é"]
    for name in ("a.csv", "a.jsonl"):
        write_file(tmp_path / name, text=texts, label=list("abcde"))
        assert read_columns(tmp_path / name, ["text", "label"]) == {"text": texts, "label": list("abcde")}
    (tmp_path / "a.csv").write_bytes("\ufefftext\r\nä\r\n\r\n".encode())
    assert read_columns(tmp_path / "a.csv", ["text"]) == {"text": ["ä"]}
    (tmp_path / "a.csv").write_bytes(b"text\n\xff\n")
    with pytest.raises(ValueError, match=r"a\.csv must be UTF-8"):
        read_columns(tmp_path / "a.csv", ["text"])
    with pytest.raises(FileNotFoundError, match="no file"):
        read_columns(tmp_path / "b.csv", ["text"])
