"""Folders with networks of transformers of a few hundred parameters, and files of examples for them."""

import csv
import json
from pathlib import Path
from typing import Any

import torch

SAID = [
    "where is my new card",
    "my card is not here",
    "the card was lost today",
    "how long does a transfer take",
    "my transfer is late today",
    "the transfer was sent twice",
    "where is my money",
    "my money is lost",
    "a new card please",
    "how do i get a card",
    "is my transfer here",
    "the money was not sent",
]
CLASSES = ["card", "transfer", "money"]
LABELS = [next(name for name in CLASSES if name in text) for text in SAID]
ASKED = ["where is the card", "how late is the transfer", "my money was sent"]
WORDS = sorted({word for text in (*SAID, *ASKED) for word in text.split()})
SPECIAL = ["<unk>", "<pad>", "<eos>"]
LONGEST = 8


def tokenizer(words: list[str] = WORDS, **special: Any) -> Any:
    """One token a word; with `pad_token` and `eos_token` only where they are given."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(SPECIAL + sorted({*words}))}, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **special)


def numbers(texts: list[str]) -> list[list[int]]:
    """The tokens by hand."""
    return [[len(SPECIAL) + WORDS.index(word) for word in text.split()] for text in texts]


def save_language_model(folder: Path, **special: str) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = dict(vocab_size=len(SPECIAL + WORDS), n_positions=LONGEST, n_embd=8, n_layer=1, n_head=2)
    still = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    GPT2LMHeadModel(GPT2Config(**size, **still, bos_token_id=None, eos_token_id=2)).save_pretrained(folder)
    tokenizer(**special).save_pretrained(folder)
    return folder


def save_classifier(folder: Path, special: dict[str, str] | None = None, **config: Any) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    size = dict(vocab_size=len(SPECIAL + WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    rest: dict[str, Any] = dict(intermediate_size=12, max_position_embeddings=LONGEST, pad_token_id=None)
    if "num_labels" not in config:
        rest |= dict(id2label=dict(enumerate(CLASSES)), label2id={name: i for i, name in enumerate(CLASSES)})
    model = BertForSequenceClassification(BertConfig(**size, **{**rest, **config}))
    model.save_pretrained(folder)
    tokenizer(**({"pad_token": "<pad>"} if special is None else special)).save_pretrained(folder)
    return folder


def save_image_classifier(folder: Path) -> Path:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    torch.manual_seed(0)
    size = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
    ViTForImageClassification(ViTConfig(**size, image_size=8, patch_size=4, num_labels=2)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def write_file(path: Path, **columns: Any) -> Path:
    """A .jsonl or .csv file of columns."""
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)
    return path
