"""What a Trainer trains, as fastif sees it: its loss example by example, its data, and what is refused."""

import random
from functools import partial

import pytest
import torch
from torch import nn

import fastif
from fastif.integrations import data_of, influence_of, loss_of
from fastif.integrations.trainer import match_loss
from fastif.integrations.trainer_loss import items_of, one_by_one
from fastif.model.losses import per_sample

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="a Trainer needs accelerate")

from tests.helpers.trainers import classifier, labelled, language_model, language_trainer, settings, texts


def trainer_of(model, data, folder, **extra):
    from transformers import Trainer

    return Trainer(model, settings(folder, **extra), train_dataset=data)


def summed(outputs, labels, num_items_in_batch=None):
    """As users write a compute_loss_func: a sum over tokens, divided by what the Trainer says."""
    logits, y = outputs["logits"][:, :-1], labels[:, 1:]
    total = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100, reduction="sum")
    return total / ((y != -100).sum() if num_items_in_batch is None else num_items_in_batch)


g = torch.Generator().manual_seed(0)
CASES = {
    "causal": lambda f: language_trainer(f),
    "causal, smoothed": lambda f: language_trainer(f, label_smoothing_factor=0.2),
    "causal, a function": lambda f: language_trainer(f, compute_loss_func=summed),
    "classes": lambda f: trainer_of(classifier(num_labels=3), labelled(torch.arange(12) % 3), f),
    "classes, smoothed": lambda f: trainer_of(
        classifier(num_labels=3), labelled(torch.arange(12) % 3), f, label_smoothing_factor=0.1
    ),
    "regression": lambda f: trainer_of(classifier(num_labels=1), labelled(torch.randn(12, generator=g)), f),
    "several labels": lambda f: trainer_of(
        classifier(num_labels=3), labelled(torch.rand(12, 3, generator=g).round()), f
    ),
    "several outputs": lambda f: trainer_of(
        classifier(num_labels=3, problem_type="regression"), labelled(torch.randn(12, 3, generator=g)), f
    ),
    "tokens": lambda f: trainer_of(classifier("ForTokenClassification", num_labels=3), tagged(), f),
}


def tagged():
    found = texts(12)
    return [{**text, "labels": (text["labels"] % 3).masked_fill(text["labels"] == -100, -100)} for text in found]


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_of_a_trainers_batch_is_the_mean_of_those_of_its_examples(case, tmp_path):
    """Autograd through the Trainer's own loss is the judge, of a batch that the match did not see."""
    trainer = CASES[case](tmp_path)
    matched, model = match_loss(trainer), trainer.model.eval()
    batch = dict(list(data_of(trainer, batch_size=5))[1])
    values = per_sample(matched.loss, model(**{k: v for k, v in batch.items() if k != "labels"}), batch, 5)
    own = torch.autograd.grad(values.sum() / float(items_of(batch, matched.mean).sum()), [*used(model)])
    theirs = torch.autograd.grad(trainer.compute_loss(model, dict(batch)), [*used(model)])
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def used(model):
    return [p for name, p in model.named_parameters() if "pooler" not in name or hasattr(model, "classifier")]


def test_two_lines_to_the_top_examples(tmp_path):
    trainer = language_trainer(tmp_path)
    trainer.train()
    influence = influence_of(trainer, fastif.EKFAC(1e-2, fisher="empirical"), layers="*.mlp.*", progress=False)
    train, query = data_of(trainer), data_of(trainer, texts()[:3])
    values, indices = influence.fit(train).top(query, train, k=5)
    assert not trainer.model.training
    columns = {key: torch.stack([text[key] for text in texts()]) for key in texts(1)[0]}
    by_hand = fastif.Influence(
        trainer.model, "causal_lm", fastif.EKFAC(1e-2, fisher="empirical"), layers="*.mlp.*", progress=False
    ).fit(columns)
    expected = by_hand.top({key: value[:3] for key, value in columns.items()}, columns, k=5)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(values, expected[0], rtol=1e-4, atol=1e-9)


def test_looking_changes_nothing(tmp_path):
    trainer = language_trainer(tmp_path)
    trainer.model.train()
    torch.manual_seed(5)
    random.seed(5)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    assert loss_of(trainer) == "causal_lm"
    data_of(trainer)
    assert all(module.training for module in trainer.model.modules())
    drawn = torch.rand(1), random.random()
    torch.manual_seed(5)
    random.seed(5)
    assert (torch.rand(1), random.random()) == drawn
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_columns_that_the_model_does_not_take_are_left_out(tmp_path):
    trainer = language_trainer(tmp_path, data=[{**text, "source": 3.0} for text in texts()])
    assert sorted(next(iter(data_of(trainer)))) == ["attention_mask", "input_ids", "labels"]


def mean_of_means(outputs, labels, num_items_in_batch=None):
    logits, y = outputs["logits"][:, :-1], labels[:, 1:]
    losses = nn.functional.cross_entropy(logits.mT, y, ignore_index=-100, reduction="none")
    return (losses.sum(1) / (y != -100).sum(1)).mean() + losses.var()  # the spread belongs to no example


def test_a_loss_that_is_of_no_example_is_refused(tmp_path):
    trainer = language_trainer(tmp_path, compute_loss_func=mean_of_means)
    with pytest.raises(ValueError, match=r"no loss of single examples gives it .*one_by_one\(\).*: pass loss="):
        influence_of(trainer)


def per_text(outputs, batch):
    y = batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(outputs["logits"][:, :-1].mT, y, ignore_index=-100, reduction="none")
    return losses.sum(1) / (y != -100).sum(1)


def test_a_loss_of_ones_own_is_held_against_the_trainers(tmp_path):
    def mean(outputs, labels, num_items_in_batch=None):
        return per_text(outputs, {"labels": labels}).mean()

    trainer = language_trainer(tmp_path, compute_loss_func=mean)
    assert match_loss(trainer, per_text)[:2] == (per_text, "examples")
    matched = match_loss(trainer)  # found without help, too
    assert isinstance(matched.loss, partial)
    assert (matched.loss.func, matched.mean, matched.by_items) == (one_by_one, "examples", False)
    with pytest.raises(ValueError, match="causal_lm, mean over examples"):
        influence_of(trainer, loss="causal_lm")


def test_two_losses_that_agree_are_told(tmp_path):
    model = language_model()
    nn.init.zeros_(model.lm_head.weight)  # tied: all logits are zero, all tokens as likely
    with pytest.raises(ValueError, match="causal_lm and token_cross_entropy give the Trainer's loss .* alike"):
        influence_of(language_trainer(tmp_path, model))
    influence = influence_of(language_trainer(tmp_path, model), fastif.EKFAC(1e-2), loss="causal_lm")
    assert influence.passes.loss == "causal_lm"


# ---------------------------------------------------------------------------------------------------------- bad input


def test_a_collator_that_draws(tmp_path):
    def masking(examples):
        batch = {key: torch.stack([e[key] for e in examples]) for key in examples[0]}
        hidden = torch.rand(batch["input_ids"].shape) < 0.3
        return {**batch, "input_ids": batch["input_ids"].masked_fill(hidden, 0)}

    trainer = language_trainer(tmp_path, data_collator=masking)
    with pytest.raises(ValueError, match="'input_ids' differs between two readings .* draw masks or augmentation once"):
        data_of(trainer)


def test_a_collator_that_masks_so_little_that_it_does_not_show(tmp_path):
    from transformers import default_data_collator

    def collate(examples):
        return default_data_collator(examples)

    collate.mlm = True
    with pytest.raises(ValueError, match="draws \\(mlm=True\\)"):
        data_of(language_trainer(tmp_path, data_collator=collate))


def test_sequences_packed_by_the_collator(tmp_path):
    from transformers import DataCollatorWithFlattening

    data = [{"input_ids": text["input_ids"].tolist(), "labels": text["labels"].tolist()} for text in texts()]
    trainer = language_trainer(tmp_path, data=data, data_collator=DataCollatorWithFlattening())
    with pytest.raises(ValueError, match="packs 8 examples into 1 rows, .* use a collator that pads"):
        data_of(trainer)


def test_sequences_packed_in_the_data(tmp_path):
    positions = torch.tensor([0, 1, 2, 0, 1, 2, 3])
    trainer = language_trainer(tmp_path, data=[{**text, "position_ids": positions} for text in texts()])
    with pytest.raises(ValueError, match="packs several sequences into one row"):
        data_of(trainer)


def test_a_stream(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(texts())

    trainer = language_trainer(tmp_path, data=Stream(), max_steps=2)
    with pytest.raises(
        ValueError, match=r"streaming data set \(Stream\) gives its examples no places: pass a map-style"
    ):
        influence_of(trainer)


def test_a_table_of_datasets_and_its_stream(tmp_path):
    """The table is taken as it is, columns without use for the model too; streamed, its examples have no places."""
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    rows = [{**{key: value.tolist() for key, value in text.items()}, "said": "text"} for text in texts()]
    table = datasets.Dataset.from_list(rows)
    trainer = language_trainer(tmp_path, data=table)
    assert loss_of(trainer) == "causal_lm"
    for key, value in next(iter(data_of(trainer))).items():
        assert torch.equal(value, torch.stack([text[key] for text in texts()[:4]]))
    streaming = language_trainer(tmp_path, data=table.to_iterable_dataset(), max_steps=2)
    with pytest.raises(ValueError, match=r"a streaming data set \(IterableDataset\) gives its examples no places"):
        data_of(streaming)


def test_a_quantised_base(tmp_path):
    trainer = language_trainer(tmp_path)
    trainer.model.quantization_method = "bitsandbytes"
    with pytest.raises(
        ValueError, match=r"the model is quantised \(bitsandbytes\).*load its base in float32 or bfloat16"
    ):
        influence_of(trainer)
    trainer.model.quantization_method = None
    trainer.model.packed = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="packed holds integers"):
        influence_of(trainer)


def test_a_tokenizer_without_padding(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(20)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0")
    data = [{"input_ids": [1, 2, 3, 4][: 2 + i % 3]} for i in range(8)]
    tokenizer.pad_token = "0"
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = language_trainer(tmp_path, data=data, data_collator=collator, processing_class=tokenizer)
    assert loss_of(trainer) == "causal_lm"
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"no padding token.*tokenizer.pad_token = tokenizer.eos_token will do"):
        data_of(trainer)


def test_no_labels_and_no_data(tmp_path):
    bare = [{key: text[key] for key in ("input_ids", "attention_mask")} for text in texts()]
    with pytest.raises(ValueError, match="hold no 'labels'"):
        influence_of(language_trainer(tmp_path, data=bare))
    trainer = language_trainer(tmp_path)
    trainer.train_dataset = None
    with pytest.raises(ValueError, match="no training data: pass dataset="):
        data_of(trainer)
    with pytest.raises(ValueError, match="no examples"):
        data_of(trainer, [])


def test_auto_takes_a_trainers_language_model(tmp_path):
    """Of labels drawn for each word; what `choose` considers can be planned, too."""
    trainer = language_trainer(tmp_path)
    train = data_of(trainer)
    influence = influence_of(trainer, "auto", progress=False).fit(train)
    scores = influence.scores(train, train)
    want = influence_of(trainer, fastif.Automatic(fisher="monte_carlo"), progress=False).fit(train)
    assert torch.equal(scores, want.scores(train, train))
    assert {layer.fisher for layer in influence.plan(train).layers.values()} == {"monte_carlo"}
    choice = fastif.choose(trainer.model, train, train, loss=loss_of(trainer), operations=1e9)
    assert choice.subset(18) is None
    assert choice._replace(chosen=choice.considered[-1]).subset(18).func is fastif.samplers.random
