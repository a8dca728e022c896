"""A problem of files alone: a model's folder, training examples and queries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastif.integrations.labels import Label
from fastif.integrations.model_folder import ModelFolder, TrainedLoss, load_model_folder
from fastif.integrations.tables import read_columns
from fastif.integrations.texts import Padding, next_tokens, tokenise


class Examples(NamedTuple):
    """The examples of a file, n of them."""

    loader: DataLoader[Any]  # mappings, as the model takes them, with "labels"
    shown: list[list[str]] | list[Path]  # the tokens of each text, or the image's file
    texts: list[str]  # each in a line, to be read
    labels: list[str] | None  # as people read them
    ids: list[str] | None  # from their column

    def __repr__(self) -> str:
        further = [name for name, column in (("labels", self.labels), ("ids", self.ids)) if column is not None]
        what = "images" if isinstance(self.shown[0], Path) else "texts"
        return f"Examples({', '.join([f'{len(self.texts):,} {what}', *further])})"

    @property
    def columns(self) -> dict[str, list[str]]:
        """What people read of them, for `fastif.influence.rows.top_rows`."""
        return {"text": self.texts, **({} if self.labels is None else {"label": self.labels})}

    def picked(self, indices: Tensor) -> DataLoader[Any]:
        """Some of the examples, all in one batch."""
        chosen = [self.loader.dataset[i] for i in indices.tolist()]
        return DataLoader(chosen, batch_size=len(chosen), collate_fn=self.loader.collate_fn)  # pyright: ignore[reportArgumentType]  a list will do


class Problem(NamedTuple):
    """What `fastif.Influence` needs."""

    model: nn.Module
    loss: TrainedLoss
    train: Examples | None
    query: Examples | None

    def __repr__(self) -> str:
        model = type(self.model).__name__
        return f"Problem({model}, loss={self.loss!r}, train={self.train!r}, query={self.query!r})"


def problem_of(
    folder: str | Path,
    train: str | Path | None,
    query: str | Path | None,
    *,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    prompt: str | None = None,
    image: str | None = None,
    id: str | None = None,
    max_length: int | None = None,
    batch_size: int = 16,
    one_length: bool = False,
) -> Problem:
    """Model, loss and data from a folder that transformers' `save_pretrained` wrote and .jsonl or .csv files.

        problem = fastif.integrations.problem_of("model", "train.csv", "query.csv", text="text", label="category")
        influence = fastif.Influence(problem.model, problem.loss, fastif.EKFAC()).fit(problem.train.loader)
        scores = influence.scores(problem.query.loader, problem.train.loader)

    A causal language model's loss is summed over the tokens of the text, those of the prompt left out; `prompt` and
    text are joined as they are. Texts have the special tokens that the tokenizer gives them and no others. What is read
    of the folder, and what is refused: `load_model_folder`.

    Args:
        folder: the model, its tokenizer or image processor, on this machine.
        train, query: files; None where not needed.
        text: the column of texts, default "text"; for classifiers of pairs of texts two columns, which the tokenizer
            joins.
        label: for classifiers, the column of labels: names as in the model's config.label2id, or numbers of classes.
            Where examples may have several labels (problem_type="multi_label_classification"), lists of these, or of 0
            and 1 for each class; of a model of several numbers, lists of them. Losses are summed over the outputs.
        prompt: for language models, a column of prompts.
        image: for classifiers of images, the column of their files, relative to the table's folder.
        id: a column of the examples' own names.
        max_length: cut texts to so many tokens. Default: a text that is too long for the model is an error.
        batch_size: of the loaders.
        one_length: pad all texts of a file to the longest, not to the longest of their batch: for by="token".

    Raises ValueError, naming the file, the row (counted from 0) and the value, for whatever cannot be read as one
    example.
    """
    given = load_model_folder(folder)
    columns = _columns(given, text=text, label=label, prompt=prompt, image=image, max_length=max_length)
    if id is not None:
        columns["id"] = id
    read = [
        None if file is None else _examples(given, Path(file), columns, max_length, batch_size, one_length)
        for file in (train, query)
    ]
    return Problem(given.model, given.loss, read[0], read[1])


def _columns(given: ModelFolder, text: str | Sequence[str] | None, **named: Any) -> dict[str, str]:
    """The columns that this kind of model needs. Raises ValueError for those that it has no use for or that lack."""
    needed = {"causal_lm": (), "texts": ("label",), "images": ("image", "label")}[given.kind]
    further = {"causal_lm": ("text", "prompt", "max_length"), "texts": ("text", "max_length"), "images": ()}[given.kind]
    allowed = {*needed, *further}
    what = f"{type(given.model).__name__} ({given.path})"
    texts = [text] if isinstance(text, str) else list(text or ())
    for name, column in {"text": " and ".join(texts) or None, **named}.items():
        if column is None and name in needed:
            raise ValueError(f"{what} needs --{name}, a column of the files")
        if column is not None and name not in allowed:
            raise ValueError(f"{what} has no use for --{name.replace('_', '-')}, got {column}")
    if len(texts) > (most := 2 if given.kind == "texts" else 1):
        do = "two for pairs of texts" if most == 2 else "with --prompt for what stands before it"
        raise ValueError(f"{what} takes one --text, or {do}, got {len(texts)}: {', '.join(texts)}")
    if given.kind != "images":
        named.update(zip(("text", "pair"), texts or ["text"], strict=False))
    return {name: column for name, column in named.items() if column is not None and name != "max_length"}


def _examples(
    given: ModelFolder, file: Path, columns: dict[str, str], max_length: int | None, batch_size: int, one_length: bool
) -> Examples:
    read = read_columns(file, columns.values())
    values = {name: read[column] for name, column in columns.items()}
    for name in ("text", "pair", "prompt", "image"):
        for row, value in enumerate(values.get(name, ())):
            if not isinstance(value, str):
                raise ValueError(f"{file}, row {row}: column {columns[name]!r} must be a string, got {value!r}")
    read_labels = [Label(given, value, f"{file}, row {row}") for row, value in enumerate(values.get("label", ()))]
    labels = [torch.tensor(one.target) for one in read_labels]
    named = [one.shown for one in read_labels] if "label" in values else None
    ids = [str(value) for value in values["id"]] if "id" in values else None
    if given.kind == "images":
        paths = [file.parent / name for name in values["image"]]
        loader = DataLoader(_Images(given.processor, paths, labels, file), batch_size=batch_size)
        return Examples(loader, paths, values["image"], named, ids)
    texts: list[str] = values["text"]
    prompts: list[str] | None = values.get("prompt")
    whole = texts if prompts is None else [a + b for a, b in zip(prompts, texts, strict=True)]
    found = tokenise(given, whole, file, max_length, values.get("pair"))
    if "pair" in values:
        whole = [f"{a} | {b}" for a, b in zip(texts, values["pair"], strict=True)]
    own = next_tokens(found, texts, prompts, file) if given.kind == "causal_lm" else labels
    examples = [{**example, "labels": y} for example, y in zip(found.examples, own, strict=True)]
    length = max(len(tokens) for tokens in found.tokens) if one_length else None
    loader = DataLoader(examples, batch_size=batch_size, collate_fn=Padding(given, length))  # pyright: ignore[reportArgumentType]  a list will do
    return Examples(loader, found.tokens, [" ".join(one.split()) for one in whole], named, ids)


class _Images(Dataset):
    """Images from their files, as the folder's processor has them."""

    def __init__(self, processor: Any, paths: list[Path], labels: list[Tensor], file: Path):
        self.processor, self.paths, self.labels = processor, paths, labels
        for row, path in enumerate(paths):
            if not path.is_file():
                raise FileNotFoundError(f"{file}, row {row}: no file {path}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> dict[str, Any]:
        from PIL import Image, UnidentifiedImageError

        try:
            image = Image.open(self.paths[i]).convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{self.paths[i]} is no image that can be read: {error}") from error
        pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": self.labels[i]}
