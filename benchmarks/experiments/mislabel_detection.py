"""Real label noise, found by self-influence: CIFAR-10N, a small CNN trained on the labels that people gave.

FASTIF_DATA=folder python benchmarks/experiments/mislabel_detection.py  # about 10 CPU minutes; resumable
python -m benchmarks.figures.keep keep runs/mislabel/results.json mislabel

The suspicion of an example is its self-influence: how much its own loss would rise if it were removed. The curvature in
it comes from 1 %, 5 %, 20 % of the training data, picked by a sampler, or from all; of the head alone (exact) or of all
layers (EK-FAC). Baselines: the loss, TracIn (gradient norms, mean over checkpoints), and the gradient norm at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import fastif
from fastif import samplers
from fastif.evaluation import mislabel_detection
from fastif.evaluation.models import build
from fastif.evaluation.settings import check_budgets
from fastif.files import whole, write_whole
from fastif.journal import Journal
from fastif.measure import environment

DAMPING = 1e-3
SHARES = ("1%", "5%", "20%")
HEAD_SAMPLERS = ("random", "stratified", "k_center", "logit", "leverage")
WHOLE_SAMPLERS = ("random", "logit")
SEEDS = 5  # of the samplers, for the head; one for all layers


class Trained(NamedTuple):
    model: nn.Module
    checkpoints: list[dict[str, Tensor]]  # the last one is the model's own
    test_accuracy: float


def trained(data: fastif.data.Data, x: Tensor, y: Tensor, epochs: int, file: Path) -> Trained:
    """The network, kept in `file`: SGD with a cosine rate, checkpoints after each quarter of the epochs."""
    channels, height, width = x.shape[1:]
    model = build("cnn", (channels, height, width), len(data.classes))
    if not file.exists():
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
        batch = min(128, len(x))
        batches = len(x) // batch
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
        draw, checkpoints = torch.Generator().manual_seed(0), []
        model.train()
        for epoch in tqdm(range(1, epochs + 1), f"train on {file.stem}", leave=False):
            for rows in torch.randperm(len(x), generator=draw)[: batches * batch].split(batch):
                optimizer.zero_grad()
                cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
                schedule.step()
            if epoch * 4 % epochs < 4:
                checkpoints.append({name: value.clone() for name, value in model.state_dict().items()})
        with whole(file) as partial_file:
            torch.save(checkpoints, partial_file)
    checkpoints = torch.load(file)
    model.load_state_dict(checkpoints[-1])
    model.eval()
    right = fastif.extract(model, (data.x_test, data.y_test), progress=False).logits.argmax(1) == data.y_test
    return Trained(model, checkpoints, float(right.double().mean()))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=os.environ.get("FASTIF_DATA"), help="folder with cifar10 and cifar10n")
    parser.add_argument("--n", type=int, default=20_000, help="training examples, the first ones in official order")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--labels", nargs="+", default=["aggre", "worse"], choices=fastif.data.HUMAN_LABELS)
    parser.add_argument("--out", type=Path, default=Path("runs/mislabel"))
    given = parser.parse_args(arguments)
    if given.root is None:
        parser.error("--root or FASTIF_DATA must name the folder with the data")
    given.out.mkdir(parents=True, exist_ok=True)
    settings = {"n": given.n, "epochs": given.epochs, "labels": given.labels, "damping": DAMPING}
    journal = Journal(given.out / "rows.jsonl", settings, resume=True)
    rows = list(journal.of_kind("row"))
    data = fastif.data.load("cifar10", given.root)
    x, clean = data.x_train[: given.n].clone(), data.y_train[: given.n]
    accuracies = {}
    for labels in given.labels:
        noisy = fastif.data.human_labels(labels, given.root)[: given.n]
        network = trained(data, x, noisy, given.epochs, given.out / f"{labels}-{given.n}-{given.epochs}.pt")
        accuracies[labels] = network.test_accuracy
        jobs = contenders(network, x, noisy)
        done = {tuple(row["contender"]) for row in rows if row["labels"] == labels}
        for contender, work in tqdm({k: v for k, v in jobs.items() if k not in done}.items(), labels, leave=False):
            began = time.process_time()
            suspicion = work()
            seconds = time.process_time() - began
            found = mislabel_detection(suspicion, noisy, clean)._asdict()
            rows.append({"labels": labels, "contender": contender, "cpu_seconds": seconds, **found})
            journal.append("row", rows[-1])
    results = {
        "meta": {**settings, "test_accuracy": accuracies, **environment(torch.device("cpu"))},
        "detection": json.loads(json.dumps(rows)),
    }
    write_whole(given.out / "results.json", json.dumps(results, indent=1))
    journal.finish()
    return results


Contender = tuple[str, str, str, int]  # what is computed, sampler, share of the examples, seed


def contenders(network: Trained, x: Tensor, noisy: Tensor) -> dict[Contender, Callable[[], Tensor]]:
    """Each gives the suspicion of every training example."""
    model, data = network.model, (x, noisy)
    features, logits, labels = fastif.extract(model, data, progress=False)
    head = nn.Sequential(fastif.find_head(model)[1])  # on stored features: the same scores as within the network

    def subset(name: str, share: str, seed: int) -> fastif.Subset:
        (k,) = check_budgets(share, len(x))
        sampler = partial(getattr(samplers, name), k=k)
        draw = torch.Generator().manual_seed(seed)
        return samplers.draw(sampler, features=features, logits=logits, labels=labels, generator=draw)

    def influence(which: str, sampler: str = "", share: str = "", seed: int = 0) -> Tensor:
        curvature = fastif.ExactBlock(DAMPING) if which == "head" else fastif.EKFAC(DAMPING, "monte_carlo")
        module, examples = (head, (features, noisy)) if which == "head" else (model, data)
        fitted = fastif.Influence(module, curvature=curvature, progress=False)
        fitted.fit(examples, subset=subset(sampler, share, seed) if sampler else None)
        return fitted.self_influence(examples)

    def tracin(checkpoints: list[dict[str, Tensor]]) -> Tensor:
        fitted = fastif.Influence(model, curvature=fastif.Identity(), checkpoints=checkpoints, progress=False)
        return fitted.fit(data).self_influence(data)

    jobs: dict[Contender, Callable[[], Tensor]] = {
        ("loss", "", "", 0): lambda: cross_entropy(logits.double(), noisy, reduction="none"),
        ("gradient norm", "", "", 0): lambda: tracin(network.checkpoints[-1:]),
        ("TracIn", "", "", 0): lambda: tracin(network.checkpoints),
    }
    for which, names, seeds in (("head", HEAD_SAMPLERS, SEEDS), ("all layers", WHOLE_SAMPLERS, 1)):
        jobs[which, "", "100%", 0] = partial(influence, which)
        for share in SHARES:
            for name in names:
                for seed in range(seeds):
                    jobs[which, name, share, seed] = partial(influence, which, name, share, seed)
    return jobs


if __name__ == "__main__":
    made = main()
    for row in made["detection"]:
        what, sampler, share, seed = row["contender"]
        if seed == 0:
            found = f"AUC {row['auc']:.4f}, of the highest {row['checked']:,} {row['precision']:.1%} wrong"
            print(f"{row['labels']:6} {what:14} {sampler:10} {share:5} {found}")
