"""What does a certificate of the head cost? Steps and F1 for several ε and σ, on scikit-learn's digits.

python benchmarks/experiments/certificate.py

A class is removed from the heads of a few networks. The result is written to
benchmarks/results/certificate-digits.json, from which `python -m benchmarks.figures.keep tables` makes the table of
docs/removal.md.
"""

from __future__ import annotations

import argparse
import json
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from fastif import Certificate, extract, remove
from fastif.data import Data, load
from fastif.evaluation.metrics import measure
from fastif.evaluation.models import build
from fastif.evaluation.training import train
from fastif.files import write_whole
from fastif.measure import environment
from fastif.model.features import Extracted

ROOT = Path(__file__).parents[2]
CLASS, DELTA, WEIGHT_DECAY = 8, 1e-5, 5e-4


def trained(images: Data, seed: int) -> nn.Module:
    model = build("cnn", (1, 8, 8), 10, seed=seed)
    return train(
        model, images.x_train, images.y_train,
        epochs=8, lr=0.15, weight_decay=WEIGHT_DECAY, batch_size=64, seed=seed, progress=False,
    )  # fmt: skip


def released(
    models: list[tuple[nn.Module, Extracted, Extracted]], images: Data, certificate: Certificate, draws: int
) -> dict[str, Any]:
    """F1 with each draw of the noise and without, the steps, and the largest bound."""
    gone = (images.y_train == CLASS).nonzero()[:, 0]
    data = images.x_train, images.y_train
    steps, bounds, before, after = [], [], [], []
    for model, seen, held in models:
        for draw in range(draws):
            found = remove(
                model, data, gone, extracted=seen, certificate=certificate, weight_decay=WEIGHT_DECAY, progress=False,
                generator=torch.Generator().manual_seed(draw),
            )  # fmt: skip
            assert found.certified is not None
            after.append(_f1(found.state_dict, held, images.y_test))
        steps.append(len(found.history))
        bounds.append(found.certified.bound)
        before.append(_f1(found.moved[-2], held, images.y_test))
    return {
        "steps_mean": fmean(steps),
        "bound_largest": max(bounds),
        "F1_before_mean": fmean(before),
        "F1_mean": fmean(after),
        "F1_std": stdev(after),
    }


def _f1(state: dict[str, Tensor], held: Extracted, labels: Tensor) -> float:
    return measure(held.features @ state["head.weight"].T + state["head.bias"], labels, CLASS)["F1"]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=3)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--kept", type=Path, default=ROOT / "benchmarks" / "results" / "certificate-digits.json")
    given = parser.parse_args(arguments)
    images = load("digits")
    models = []
    for seed in range(given.networks):
        model = trained(images, seed)
        seen = extract(model, (images.x_train, images.y_train), progress=False)
        models.append((model, seen, extract(model, images.x_test, progress=False)))
    rows: list[dict[str, Any]] = []
    for noise in (1.0, 0.1, 0.01, 0.001):
        for epsilon in (10.0, 1.0, 0.1):
            certificate = Certificate(epsilon, DELTA, noise)
            row: dict[str, Any] = {"noise": noise, "epsilon": epsilon, "distance": certificate.distance}
            try:
                row |= released(models, images, certificate, given.draws)
            except ValueError as error:
                row["refused"] = str(error).partition(": not certified: ")[2].partition(" the head is")[0] or str(error)
            rows.append(row)
    meta = {
        "class": CLASS,
        "delta": DELTA,
        "weight_decay": WEIGHT_DECAY,
        "networks": given.networks,
        "draws": given.draws,
        "examples": len(images.y_train),
        "held_out": len(images.y_test),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python benchmarks/experiments/certificate.py",
        **environment(torch.device("cpu")),
    }
    results = {"meta": meta, "rows": rows}
    write_whole(given.kept, json.dumps(results, indent=1, allow_nan=False) + "\n")
    return results


if __name__ == "__main__":
    main()
