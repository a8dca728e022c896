r"""Removals beside what others do, judged as the field does, on the digits that come with scikit-learn.

python benchmarks/experiments/unlearning.py

Three forget sets: a class, random 5 % and the 5 % that the head's self-influence says are most memorised. The head's
and the last block's Newton steps, and one influence step of all layers, stand beside fine-tuning, NegGrad+, random
labels, SSD and one LiSSA step. What has settings is tuned by the tug-of-war on training data alone and on ANOTHER
forget set of the same kind: another class, other random examples, the next most memorised. Resumable: what is finished
stays in runs/unlearning-digits, and the same command goes on. The summary is written to
benchmarks/results/unlearning-digits.json, from which `python -m benchmarks.figures.keep tables` makes the table of
docs/removal.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastif import EKFAC, ExactBlock, Influence, samplers
from fastif.data import load
from fastif.evaluation import baselines, train_halves, unlearning
from fastif.evaluation.models import build
from fastif.evaluation.training import train
from fastif.evaluation.unlearning import UnlearnFn
from fastif.files import write_whole
from fastif.measure import environment

ROOT = Path(__file__).parents[2]
BLOCK = ["body.8", "body.9", "head"]  # the last convolution, its batch norm and the head of the small CNN
WEIGHT_DECAY = 5e-4
CLASS, OTHER_CLASS = 8, 3  # removed, and the one that settings are chosen with
SHARE = 0.05


def network(seed: int = 0) -> nn.Module:
    return build("cnn", (1, 8, 8), 10, width=0.5, seed=seed)


def trained(kept: Tensor, seed: int, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    return train(
        network(seed), x[kept], y[kept],
        epochs=epochs, lr=0.15, weight_decay=WEIGHT_DECAY, batch_size=64, seed=seed, progress=False,
    )  # fmt: skip


def ours(k: int) -> dict[str, UnlearnFn]:
    subset = partial(samplers.logit, k=k)
    return {
        "remove: head": partial(baselines.newton_steps, subset=subset, weight_decay=WEIGHT_DECAY),
        "remove: last block": partial(
            baselines.newton_steps, layers=BLOCK, steps=3, subset=subset, weight_decay=WEIGHT_DECAY, batch_size=1024
        ),
    }


def candidates(k: int) -> dict[str, dict[str, UnlearnFn]]:
    """By method, what its settings are chosen from."""
    return {
        "fine-tuning": {
            f"lr {lr:g}, {epochs} epochs": partial(baselines.fine_tuning, lr=lr, epochs=epochs)
            for lr, epochs in ((0.01, 1), (0.05, 1), (0.05, 2))
        },
        "NegGrad+": {
            f"lr {lr:g}, alpha {alpha:g}": partial(baselines.neg_grad_plus, lr=lr, alpha=alpha)
            for lr, alpha in ((0.01, 0.95), (0.01, 0.8), (0.05, 0.95), (0.05, 0.8))
        },
        "random labels": {
            f"lr {lr:g}": partial(baselines.random_labels, lr=lr, epochs=1) for lr in (0.005, 0.02, 0.05)
        },
        "SSD": {
            f"alpha {alpha:g}, dampening {dampening:g}": partial(baselines.ssd, alpha=alpha, dampening=dampening)
            for alpha, dampening in ((2, 0.5), (5, 1), (10, 1), (20, 1))
        },
        "LiSSA": {
            f"damping {damping:g}": partial(baselines.lissa, k=k, damping=damping, weight_decay=WEIGHT_DECAY)
            for damping in (1e-2, 1e-1)
        },
    }


def whole_network() -> dict[str, dict[str, UnlearnFn]]:
    """One influence step of all layers, formula (3), without a look at the objective; its damping is chosen."""
    return {
        "remove: all, one step": {
            f"damping {damping:g}": partial(
                baselines.newton_steps,
                layers="*",
                curvature={"head": ExactBlock(damping), "*": EKFAC(damping)},
                steps=1,
                line_search=False,
                weight_decay=WEIGHT_DECAY,
                batch_size=1024,
            )
            for damping in (0.03, 0.06, 0.1, 0.2)
        }
    }


def forget_sets(y: Tensor, memorised: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """By name: what is removed, and what settings are chosen with."""
    size = round(SHARE * len(y))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return {
        f"class {CLASS}": ((y == CLASS).nonzero()[:, 0], (y == OTHER_CLASS).nonzero()[:, 0]),
        "random 5 %": (order[:size].sort().values, order[size : 2 * size].sort().values),
        "most memorised 5 %": (memorised[:size].sort().values, memorised[size : 2 * size].sort().values),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=5, help="of half networks, the shadows of U-LiRA")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--examples", type=int, help="of the training set, the first so many")
    parser.add_argument("--sets", nargs="+", metavar="NAME", help="default all")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "unlearning-digits")
    parser.add_argument("--kept", type=Path, default=ROOT / "benchmarks" / "results" / "unlearning-digits.json")
    given = parser.parse_args(arguments)
    images = load("digits")
    x, y = images.x_train[: given.examples], images.y_train[: given.examples]
    k = len(y) // 10
    train_fn = partial(trained, x=x, y=y, epochs=given.epochs)
    halves = train_halves(train_fn, len(y), given.pairs, out=given.out / "halves", resume=True)
    torch.manual_seed(0)
    influence = Influence(train_fn(torch.arange(len(y)), 0), curvature=ExactBlock(1e-3), layers="head", progress=False)
    memorised = influence.fit((x, y)).self_influence((x, y)).argsort(descending=True)
    tables: dict[str, Any] = {}
    chosen: dict[str, dict[str, str]] = {}
    for name, (removed, other) in forget_sets(y, memorised).items():
        if given.sets and name not in given.sets:
            continue
        folder = given.out / name.replace(" ", "-").replace("%", "percent")
        tune = partial(baselines.tune, model=network(), train_fn=train_fn, train=(x, y), removed=other, resume=True)
        table = partial(
            unlearning, network(), train_fn, (x, y), removed, (images.x_test, images.y_test),
            seeds=given.seeds, networks=halves, resume=True,
        )  # fmt: skip
        chosen[name] = best_of({**candidates(k), **whole_network()}, tune, folder)
        tuned = {method: grid[chosen[name][method]] for method, grid in candidates(k).items()}
        whole = {method: grid[chosen[name][method]] for method, grid in whole_network().items()}
        tables[name] = merged(
            table({**ours(k), **tuned}, out=folder / "table"), table(whole, out=folder / "whole-network")
        )
    shown = sys.argv[1:] if arguments is None else arguments
    meta = {
        "examples": len(y),
        "held_out": len(images.y_test),
        "seeds": given.seeds,
        "pairs": given.pairs,
        "epochs": given.epochs,
        "chosen": chosen,
        "removed": {name: table["meta"]["removed"] for name, table in tables.items()},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": f"python benchmarks/experiments/unlearning.py {shlex.join(_without_folders(shown))}".strip(),
        **environment(torch.device("cpu")),
    }
    keys = ("auc", "auc_error", "balanced_accuracy")
    results = {
        "meta": meta,
        "sets": {
            name: {
                "summary": table["summary"],
                "u_lira": {row["method"]: {key: row[key] for key in keys} for row in table["u_lira"]},
            }
            for name, table in tables.items()
        },
    }
    write_whole(given.kept, json.dumps(results, indent=1, allow_nan=False) + "\n")
    return results


def best_of(grids: dict[str, dict[str, UnlearnFn]], tune: Callable[..., str], folder: Path) -> dict[str, str]:
    """By method, the name of its best settings."""
    found: dict[str, str] = {}
    for method, grid in grids.items():
        found[method] = tune(grid, out=folder / f"tuning-{method.replace(': ', '-')}")
        print(f"{folder.name}: {method}: {found[method]}", flush=True)
    return found


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """One table of two whose networks are the same; the new methods of the second stand behind the first's removals."""
    found = {**first}
    for part in ("summary", "u_lira"):
        known = {row["method"] for row in first[part]}
        place = 1 + max(n for n, row in enumerate(first[part]) if row["method"].startswith("remove"))
        new = [row for row in second[part] if row["method"] not in known]
        found[part] = [*first[part][:place], *new, *first[part][place:]]
    return found


def _without_folders(arguments: list[str]) -> list[str]:
    pairs = zip(arguments, ["", *arguments], strict=False)
    return [w for w, before in pairs if w not in ("--out", "--kept") and before not in ("--out", "--kept")]


if __name__ == "__main__":
    main()
