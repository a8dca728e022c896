"""Which scores predict retraining of a language model? LDS and QLD of fastif, kronfluence, BM25 and gradient cosine.

FASTIF_DATA=folder python -m benchmarks.experiments.lds_text       # goes on where it was cut off
python -m benchmarks.figures.keep keep runs/lds-text/results.json lds-text  # `add` for some contenders

A GPT of two layers learns texts of BANKING77 from nothing. LDS: halves of the data, and sets without a random 5 %. QLD:
how far a query's loss rises when the network is trained anew without the 5 % that a contender puts first for it. No
damping is chosen: it comes from the training, or is a tenth of a layer's mean eigenvalue, kronfluence's rule and
fastif's "auto". CPU seconds without the training of the networks that are explained.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from tqdm import tqdm

import fastif
from benchmarks.experiments.lds import timed
from benchmarks.influence.bench_influence import Transformer
from fastif import evaluation, samplers
from fastif.evaluation.halves import draw_halves
from fastif.files import write_whole
from fastif.journal import Journal
from fastif.measure import environment

LENGTH, WIDTH, DEPTH, HEADS = 16, 48, 2, 4
LR, MOMENTUM, WEIGHT_DECAY, BATCH, EPOCHS = 0.03, 0.9, 1e-3, 32, 6
HALVES = 8  # networks on halves
QLD_SHARE = 0.05
EVERY = 10  # steps from one checkpoint of a log to the next


class Texts(NamedTuple):
    """Texts as rows of words' numbers, 0 where a text has ended and 1 for words that stand in one text alone."""

    tokens: Tensor  # int64 [n + q, LENGTH]
    words: int
    raw: list[list[str]]

    @property
    def labels(self) -> Tensor:
        return self.tokens.masked_fill(self.tokens == 0, -100)


def read_texts(root: str, n: int, q: int) -> Texts:
    folder = next(f for f in (Path(root), Path(root) / "banking77") if (f / "train.csv").is_file())
    with (folder / "train.csv").open(encoding="utf-8") as file:
        texts = [row["text"].lower().split()[:LENGTH] for row in csv.DictReader(file)]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [texts[i] for i in order[: n + q]]
    times = Counter(word for text in texts[:n] for word in text)
    words = {word: number for number, word in enumerate(sorted(w for w, k in times.items() if k > 1), 2)}
    tokens = torch.zeros(n + q, LENGTH, dtype=torch.int64)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = torch.tensor([words.get(word, 1) for word in text])
    return Texts(tokens, len(words) + 2, texts)


def train(kept: Tensor, seed: int, tokens: Tensor, words: int, log: list[Any] | None = None) -> nn.Module:
    """A network trained by SGD on the mean over texts of the sum over their words; `log` takes its record."""
    torch.manual_seed(seed)
    model = Transformer(words, LENGTH, WIDTH, DEPTH, HEADS)
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)
    batches = max(1, len(kept) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, EPOCHS * batches)
    record = None if log is None else fastif.TrainingLog(model, every=EVERY)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for rows in kept[torch.randperm(len(kept), generator=draw)].split(BATCH)[:batches]:
            x = tokens[rows]
            targets = x[:, 1:].masked_fill(x[:, 1:] == 0, -100)
            losses = F.cross_entropy(model(x)[:, :-1].transpose(1, 2), targets, ignore_index=-100, reduction="none")
            optimizer.zero_grad()
            losses.sum(1).mean().backward()
            optimizer.step() if record is None else record.step(optimizer, rows)
            schedule.step()
    if log is not None:
        log.append(record)
    return model.eval()


class Given(NamedTuple):
    """What a contender explains, and with what."""

    texts: Texts
    n: int
    model: nn.Module
    log: fastif.TrainingLog
    logs: list[fastif.TrainingLog]  # of the networks on halves
    networks: fastif.Networks

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        return self.texts.tokens[: self.n], self.texts.labels[: self.n]

    @property
    def query(self) -> tuple[Tensor, Tensor]:
        return self.texts.tokens[self.n :], self.texts.labels[self.n :]


Contender = Callable[[Given], Tensor]  # → scores [q, n]


def ours(
    given: Given,
    make: Callable[..., Any],
    share: float | None = None,
    halves: int = 0,
    damping: Any = None,
    blocks_alone: bool = False,
    sampler: str = "random",
) -> Tensor:
    """With the damping that the training gives, where no other is asked for."""
    subset = None if share is None else drawn(given, sampler, round(share * given.n))
    if damping is None:
        damping = given.logs[0].damping if halves else given.log.damping
    layers = linear_of_blocks(given.model) if blocks_alone else "*"
    networks = given.networks.first(halves) if halves else None
    how: dict[str, Any] = {"layers": layers, "networks": networks, "progress": False}
    influence = fastif.Influence(given.model, "causal_lm", make(damping), **how)
    return influence.fit(given.train, subset=subset).scores(given.query, given.train)


def drawn(given: Given, sampler: str, k: int) -> Any:
    """Texts that carry the curvature. What samplers know of a text, a row of features and one of logits, is the mean
    over the places where it has a next word."""
    draw = torch.Generator().manual_seed(0)
    if sampler == "random":
        return samplers.random(given.n, k, generator=draw)
    features, logits, _ = fastif.extract(given.model, given.train[0], progress=False)
    follows = (given.train[0][:, 1:] != 0).float()[:, :, None]
    x, z = ((rows[:, :-1] * follows).sum(1) / follows.sum(1).clamp(min=1) for rows in (features, logits))
    if sampler == "leverage":
        return samplers.leverage(x, z, k, generator=draw)
    return samplers.logit(z, torch.zeros(given.n, dtype=torch.int64), k, generator=draw)


def linear_of_blocks(model: nn.Module) -> list[str]:
    """Attention and MLP without norms, tables and head: what kronfluence covers of this network."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks" in name]


def replayed(given: Given, halves: int, crossed: bool = False) -> Tensor:
    """Crossed residuals of all epochs, texts, places and words take half a gigabyte."""
    logs, memory = given.logs[:halves] or [given.log], 1 << (31 if crossed else 27)
    how: dict[str, Any] = {"crossed": crossed, "memory": memory, "progress": False}
    return fastif.Replay(logs, given.model, given.train, "causal_lm", **how).scores(given.query, given.train)


def source(given: Given, segments: int) -> Tensor:
    how: dict[str, Any] = {"curvature": EK, "segments": segments, "layers": "*", "progress": False}
    return fastif.Source(given.log, given.model, given.train, "causal_lm", **how).scores(given.query)


def cosine(given: Given) -> Tensor:
    """Of the gradients of all parameters."""
    influence = fastif.Influence(given.model, "causal_lm", fastif.Identity(), layers="*", progress=False)
    influence.fit(given.train)
    norms = [influence.self_influence(data).sqrt() for data in (given.query, given.train)]
    return influence.scores(given.query, given.train) / (norms[0][:, None] * norms[1])


def bm25(given: Given) -> Tensor:
    """Okapi BM25 of the texts' words, k1 = 1.2 and b = 0.75 (Robertson & Zaragoza 2009)."""
    documents, queries = given.texts.raw[: given.n], given.texts.raw[given.n :]
    held = [Counter(text) for text in documents]
    frequency = Counter(word for counts in held for word in counts)
    lengths = torch.tensor([len(text) for text in documents], dtype=torch.float64)
    relative = 0.25 + 0.75 * lengths / lengths.mean()
    scores = torch.zeros(len(queries), given.n, dtype=torch.float64)
    for row, text in zip(scores, queries, strict=True):
        for word in set(text) & frequency.keys():
            times = torch.tensor([counts[word] for counts in held], dtype=torch.float64)
            rarity = torch.tensor(1 + (given.n - frequency[word] + 0.5) / (frequency[word] + 0.5)).log()
            row += rarity * times * 2.2 / (times + 1.2 * relative)
    return scores


def kronfluence(given: Given) -> Tensor:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    linear = linear_of_blocks(given.model)

    def summed(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="sum")

    class Language(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits, targets = model(batch[0])[:, :-1], batch[1][:, 1:]
            if sample:
                drawn = torch.multinomial(logits.detach().softmax(2).flatten(0, 1), 1).view(targets.shape)
                targets = drawn.masked_fill(targets == -100, -100)
            return summed(logits, targets)

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return linear

        def get_attention_mask(self, batch: Any) -> Tensor:
            return (batch[0] != 0).long()

    task = Language()
    torch.manual_seed(0)
    model = Transformer(given.texts.words, LENGTH, WIDTH, DEPTH, HEADS)
    model.load_state_dict(given.model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "lds", prepare_model(model.eval(), task), task, cpu=True, disable_tqdm=True, output_dir=folder
        )
        sets = [TensorDataset(*data) for data in (given.train, given.query)]
        analyzer.fit_all_factors("f", sets[0], per_device_batch_size=100, factor_args=FactorArguments("ekfac"))
        analyzer.compute_pairwise_scores(
            "s", "f", sets[1], sets[0], per_device_query_batch_size=len(given.query[0]),
            per_device_train_batch_size=100, score_args=ScoreArguments(damping_factor=None),
        )  # fmt: skip
        return analyzer.load_pairwise_scores("s")["all_modules"].float() / given.n


EK = partial(fastif.EKFAC, fisher="monte_carlo")
CONTENDERS: dict[str, Contender] = {
    "fastif, EK-FAC": partial(ours, make=EK),
    "fastif, EK-FAC from a random 10 %": partial(ours, make=EK, share=0.1),
    **{f"fastif, EK-FAC, {k} half networks": partial(ours, make=EK, halves=k) for k in (2, 4, HALVES)},
    'fastif, "auto"': partial(ours, make=fastif.Automatic),
    **{
        f'fastif, "auto" from a {kind} 10 %': partial(ours, make=fastif.Automatic, share=0.1, sampler=sampler)
        for kind, sampler in (("random", "random"), ("`logit`", "logit"), ("`leverage`", "leverage"))
    },
    f'fastif, "auto", {HALVES} half networks': partial(ours, make=fastif.Automatic, halves=HALVES),
    "fastif, CG": partial(ours, make=partial(fastif.CG, tolerance=1e-2)),
    **{f"fastif, SOURCE, EK-FAC, {k} segments": partial(source, segments=k) for k in (3, 6)},
    "fastif, replay": partial(replayed, halves=0),
    f"fastif, replay, {HALVES} half networks": partial(replayed, halves=HALVES),
    **{
        f"fastif, replay, crossed over {k} half networks": partial(replayed, halves=k, crossed=True)
        for k in (2, HALVES)
    },
    "fastif, EK-FAC, a tenth of the mean eigenvalue": partial(ours, make=EK, damping="auto"),
    'fastif, "auto", a tenth of the mean eigenvalue': partial(ours, make=fastif.Automatic, damping="auto"),
    "fastif, EK-FAC of the blocks' linear layers, a tenth of the mean eigenvalue": partial(
        ours, make=EK, damping="auto", blocks_alone=True
    ),
    "kronfluence, EK-FAC of the blocks' linear layers, a tenth of the mean eigenvalue": kronfluence,
    "gradient cosine": cosine,
    "BM25": bm25,
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=os.environ.get("FASTIF_DATA"), help="folder with banking77")
    parser.add_argument("--n", type=int, default=1000, help="training texts")
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--subsets", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=2, help="retrainings of each set")
    parser.add_argument("--qld", type=int, default=15, help="queries that networks are trained anew for")
    parser.add_argument("--contenders", nargs="+", help="parts of their names; default all")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/lds-text"))
    asked = parser.parse_args(arguments)
    if asked.root is None:
        parser.error("--root or FASTIF_DATA must name the folder with the data")
    n, q = asked.n, asked.queries
    texts = read_texts(asked.root, n, q)
    train_fn = partial(train, tokens=texts.tokens[:n], words=texts.words)
    logs: list[fastif.TrainingLog] = []
    model = train_fn(torch.arange(n), 0, log=logs)
    for task in draw_halves(n, HALVES // 2, 0):
        train_fn(task.kept, task.seed, log=logs)
    networks = fastif.Networks([log.parameters() for log in logs[1:]], [log.kept for log in logs[1:]])
    given = Given(texts, n, model, logs[0], logs[1:], networks)
    how = dict(loss="causal_lm", processes=asked.processes, resume=True)
    judges = {
        name: evaluation.retrain(
            train_fn, evaluation.random_subsets(n, asked.subsets, share, seed=3), given.query, seeds=asked.seeds,
            out=asked.out / name, **how,
        )
        for name, share in (("halves", 0.5), ("without 5 %", 0.95))
    }  # fmt: skip
    settings = {name: getattr(asked, name) for name in ("n", "queries", "subsets", "seeds", "qld", "contenders")}
    journal = Journal(asked.out / "rows.jsonl", settings, resume=True)
    rows: list[dict[str, Any]] = list(journal.of_kind("row"))
    done = {row["contender"] for row in rows}
    few = tuple(part[: asked.qld] for part in given.query)
    for name, scores_of in tqdm(CONTENDERS.items(), "contenders", leave=False):
        if name in done or not (asked.contenders is None or any(part in name for part in asked.contenders)):
            continue
        scores, seconds = timed(partial(scores_of, given))
        row: dict[str, Any] = {"contender": name, "cpu_seconds": seconds}
        for what, retrained in judges.items():
            row[what] = evaluation.linear_datamodeling_score(scores, retrained).score._asdict()
        moved = evaluation.subset_counterfactual(
            train_fn, scores[: asked.qld], few, [max(1, round(QLD_SHARE * n))], draws=2,
            out=asked.out / "qld" / name, **how,
        )  # fmt: skip
        row["qld"], row["qld at random"] = moved.mean[0]._asdict(), moved.random_mean[0]._asdict()
        journal.append("row", row)
        rows.append(row)
    rows.sort(key=lambda row: [*CONTENDERS].index(row["contender"]))
    ceilings = {what: evaluation.ceiling(one) if asked.seeds > 1 else None for what, one in judges.items()}
    results = {
        "meta": {
            **settings, "ceilings": ceilings, "parameters": sum(p.numel() for p in model.parameters()),
            "words": texts.words, "loss_of_queries": float(judges["halves"].values.mean()),
            "seconds_of_a_retraining": float(judges["halves"].seconds.mean()), **environment(torch.device("cpu")),
        },
        "rows": json.loads(json.dumps(rows)),
    }  # fmt: skip
    asked.out.mkdir(parents=True, exist_ok=True)
    write_whole(asked.out / "results.json", json.dumps(results, indent=1))
    journal.finish()
    return results


if __name__ == "__main__":
    for row in main()["rows"]:
        print(f"{row['contender']:45}", *(f"{k} {row[k]['mean']:.3f}" for k in ("halves", "without 5 %", "qld")))
