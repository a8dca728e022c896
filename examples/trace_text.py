"""Trace a sentence to the training texts that make a small language model find it likely, or unlikely.

python examples/trace_text.py --data FOLDER                          # BANKING77's train.csv: questions to a bank
python examples/trace_text.py --data FOLDER --ask "my card was stolen" --by-token
"""

import argparse
import csv
import html
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fastif

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, required=True, help="folder with train.csv, a column of texts")
parser.add_argument("--ask", default="how long does a transfer to my account take")
parser.add_argument("--by-token", action="store_true", help="colour the tokens of the training texts by their part")
parser.add_argument("--texts", type=int, default=2000)
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--index", type=Path, default=Path("runs/trace-text"), help="folder of the index")
parser.add_argument("--out", type=Path, default=Path("trace.html"))
given = parser.parse_args()

LENGTH = 20
with (given.data / "train.csv").open(encoding="utf-8") as file:
    texts = [row["text"].lower().split()[:LENGTH] for row in csv.DictReader(file)]
order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
texts = [texts[i] for i in order[: given.texts]]
words = {word: number for number, word in enumerate(sorted({word for text in texts for word in text}), 1)}
asked = [word for word in given.ask.lower().split()[:LENGTH] if word in words]
if len(asked) < 2:
    parser.error(f"--ask must have two words that are in the training texts, got {given.ask!r}")


def numbers(texts: list[list[str]]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.zeros(len(texts), LENGTH, dtype=torch.int64)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = torch.tensor([words[word] for word in text])
    return tokens, tokens.masked_fill(tokens == 0, -100)


class Model(nn.Module):
    """A causal transformer of two layers."""

    def __init__(self, vocabulary: int, width: int = 64):
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.words(tokens) + self.places(torch.arange(LENGTH))
        return self.head(self.layers(x, mask=nn.Transformer.generate_square_subsequent_mask(LENGTH), is_causal=True))


torch.manual_seed(0)
train, query = numbers(texts), numbers([asked])
model = Model(len(words) + 1)
optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
for _ in range(given.epochs):
    for rows in torch.randperm(len(texts)).split(64):
        optimizer.zero_grad()
        logits = model(train[0][rows])[:, :-1]
        cross_entropy(logits.flatten(0, 1), train[1][rows, 1:].flatten(), ignore_index=-100).backward()
        optimizer.step()
model.eval()

# The layers between table and head; scores are predicted rises of the sentence's loss without a training text.
settings = dict(layers="layers.*linear*", batch_size=64, progress=False)
influence = fastif.Influence(model, "causal_lm", fastif.EKFAC("auto", fisher="empirical"), **settings).fit(train)
index = fastif.Index.build(influence, train, given.index, share=0.04, ids=[" ".join(text) for text in texts])
print(f"{index}\nmeasured: {index.measured}")
rows = []
for what, largest in (("help", True), ("harm", False)):
    values, indices, ids = index.top(query, 8, largest=largest)
    for value, place, text in zip(values[0].tolist(), indices[0].tolist(), ids[0], strict=True):
        print(f"{what} {value:+.4f}  {text}")
        rows.append((what, value, place))


def coloured(place: int, value: float) -> str:
    """A training text; its tokens by their part in the score, or all by the score."""
    parts = torch.full((LENGTH,), value)
    if given.by_token:
        parts = influence.scores(query, tuple(x[[place]] for x in train), by="token")[0, 0]
    strength = (parts / parts.abs().max()).tolist()
    spans = []
    for word, part in zip(texts[place], strength, strict=False):
        colour = "0, 114, 178" if part > 0 else "213, 94, 0"
        spans.append(f'<span style="background: rgba({colour}, {abs(part) / 2:.2f})">{html.escape(word)}</span>')
    return " ".join(spans)


lines = [f"<tr><td>{what}</td><td>{value:+.4f}</td><td>{coloured(i, value)}</td></tr>" for what, value, i in rows]
given.out.write_text(
    f"<!doctype html><meta charset='utf-8'><title>trace</title><h1>{html.escape(' '.join(asked))}</h1>"
    f"<p>Training texts that help and that harm it most: blue helps, orange harms.</p>"
    f"<table>{''.join(lines)}</table>\n",
    encoding="utf-8",
)
print(f"{given.out}: the texts, coloured")
