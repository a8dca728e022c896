"""Texts as a model's tokens, with what counts in the loss and what people read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastif.integrations.model_folder import ModelFolder
from fastif.model.losses import IGNORED

_SPAN = tuple[int, int]


class Tokenised(NamedTuple):
    """Texts, one entry each."""

    examples: list[dict[str, Tensor]]  # input_ids [t], token_type_ids where the tokenizer gives them
    tokens: list[list[str]]  # joined they are the text, with the special tokens' names
    spans: list[list[_SPAN]] | None  # of each token in its text; None where the tokenizer does not say


def tokenise(
    given: ModelFolder, texts: Sequence[str], file: Path, max_length: int | None, pairs: Sequence[str] | None = None
) -> Tokenised:
    """The texts as the folder's tokenizer has them, its special tokens included; with `pairs` joined to one by it.

    Raises ValueError for a text of more tokens than the model takes or of none, naming the row, unless `max_length`
    cuts texts; for one that the model does not take.
    """
    tokenizer, longest = given.processor, given.longest
    if max_length is not None and not 1 <= max_length <= (longest or max_length):
        raise ValueError(f"max_length must be in [1, {longest}], the tokens that the model takes, got {max_length}")
    how: dict[str, Any] = dict(truncation=True, max_length=max_length) if max_length is not None else {}
    if tokenizer.is_fast:
        how["return_offsets_mapping"] = True
    both = (list(texts),) if pairs is None else (list(texts), list(pairs))
    found = tokenizer(*both, verbose=False, **how)
    keys = [key for key in ("input_ids", "token_type_ids") if key in found]
    tokens: list[list[str]] = []
    for row, ids in enumerate(found["input_ids"]):
        if longest is not None and len(ids) > longest:
            raise ValueError(
                f"{file}, row {row}: the text has {len(ids)} tokens, and the model takes {longest}: --max-length "
                f"{longest} cuts texts to that"
            )
        if not ids:
            raise ValueError(f"{file}, row {row}: the text has no token")
        names = tokenizer.convert_ids_to_tokens(ids)
        if not tokenizer.is_fast:
            tokens.append([f"{name} " for name in names])
            continue
        special = [one in tokenizer.all_special_ids for one in ids]
        own = [one[row] for one in both]
        tokens.append(_read(own, found.sequence_ids(row), names, found["offset_mapping"][row], special))
    examples = [{key: torch.tensor(found[key][row], dtype=torch.int64) for key in keys} for row in range(len(texts))]
    return Tokenised(
        examples, tokens, [list(map(tuple, s)) for s in found["offset_mapping"]] if tokenizer.is_fast else None
    )


def _read(
    texts: Sequence[str],
    of: Sequence[int | None],
    names: Sequence[str],
    spans: Sequence[_SPAN],
    special: Sequence[bool],
) -> list[str]:
    """Each token's stretch of its text, with the blanks before it; some tokenizers leave blanks out of spans.

    `of`: which of the texts each token is of; the tokens that a tokenizer adds are of none.
    """
    read, ends, last = [], [0] * len(texts), [-1] * len(texts)
    for place, (which, name, (start, stop), added) in enumerate(zip(of, names, spans, special, strict=True)):
        if which is None or (added and start == stop):
            read.append(f"{name} " if not any(ends) else f" {name}" + " " * (len(texts) > 1))
            continue
        read.append(texts[which][ends[which] : max(ends[which], stop)])
        ends[which], last[which] = max(ends[which], stop), place
    if len(texts) > 1 and last[0] >= 0 and last[0] + 1 == next((i for i, one in enumerate(of) if one == 1), 0):
        read[last[0]] += " "  # nothing stands between the two
    for text, end, place in zip(texts, ends, last, strict=True):
        if text[end:].strip() and read:  # what was cut off
            read[place] += " …"
    return read


def next_tokens(tokenised: Tokenised, texts: Sequence[str], prompts: Sequence[str] | None, file: Path) -> list[Tensor]:
    """The labels of a causal language model, [t] each: its own tokens, −100 where they are a prompt's.

    Raises ValueError, naming the row, for a token that is half of the prompt's and half of the text's, and where no
    token counts: the first is predicted by none.
    """
    labels: list[Tensor] = []
    for row, example in enumerate(tokenised.examples):
        own = example["input_ids"].clone()
        if prompts is not None:
            if tokenised.spans is None:
                raise ValueError("prompts need a tokenizer that says where tokens stand (tokenizer.json)")
            own[: _prompt_tokens(tokenised.spans[row], prompts[row], texts[row], f"{file}, row {row}")] = IGNORED
        if not bool((own[1:] != IGNORED).any()):
            what = "one token alone, and the first" if prompts is None else "no token after the prompt"
            raise ValueError(f"{file}, row {row}: the text has {what}{' is predicted by none' * (prompts is None)}")
        labels.append(own)
    return labels


def _prompt_tokens(spans: Sequence[_SPAN], prompt: str, text: str, where: str) -> int:
    """How many tokens a prompt has. Tokens of blanks may have empty spans, and the strings must tell whose they are."""
    end = len(prompt)
    last = max((place + 1 for place, (start, stop) in enumerate(spans) if start < stop <= end), default=0)
    first = next((place for place, (start, stop) in enumerate(spans) if end <= start < stop), len(spans))
    across = next(((start, stop) for start, stop in spans if start < end < stop), None)
    if across is not None:
        token = (prompt + text)[slice(*across)]
        raise ValueError(
            f"{where}: the token {token!r} is half of the prompt's and half of the text's: move one of them, such as "
            "the blank between prompt and text to the beginning of the text"
        )
    if first > last and prompt[-1:].isspace() and text[:1].isspace():
        raise ValueError(
            f"{where}: the prompt ends and the text begins with a blank, whose tokens cannot be told apart: leave the "
            "blank to the beginning of the text alone"
        )
    return last if text[:1].isspace() else first


class Padding:
    """Makes batches, as long as their longest text or all of one length; padding is masked and does not count."""

    def __init__(self, given: ModelFolder, length: int | None):
        self.token, self.length = padding_token(given), length
        self.fill: dict[str, int] = {"input_ids": self.token, "token_type_ids": 0}
        if given.kind == "causal_lm":
            self.fill["labels"] = IGNORED

    def __call__(self, examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        length = int(lengths.max()) if self.length is None else self.length
        batch = {
            key: torch.stack([_filled(example[key], length, self.fill.get(key)) for example in examples])
            for key in examples[0]
        }
        batch["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
        return batch


def _filled(values: Tensor, length: int, value: int | None) -> Tensor:
    """Values of tokens, [t] to [length]; labels of the whole text as they are."""
    if value is None:
        return values
    return torch.cat([values, values.new_full((length - len(values),), value)])


def padding_token(given: ModelFolder) -> int:
    """What stands where a text is shorter than its batch.

    A language model's is masked, and any token will do. Some classifiers look for it to find a text's end: theirs must
    be the one of their training. Raises ValueError for a classifier without one.
    """
    config: Any = given.model.config
    known = [config.pad_token_id, given.processor.pad_token_id]
    if given.kind == "causal_lm":
        known += [given.processor.eos_token_id, 0]
    token = next((one for one in known if one is not None), None)
    if token is None:
        raise ValueError(
            f"{given.path}: neither tokenizer nor model has a padding token, by which a classifier may find the end of "
            "a text: set tokenizer.pad_token and model.config.pad_token_id to the one of its training, and save both"
        )
    if given.kind == "texts":
        config.pad_token_id = token
    return int(token)
