r"""Removals beside what others do, judged as the field does: digits, Fashion-MNIST, CIFAR-10 with people's labels.

python benchmarks/experiments/unlearning.py
python benchmarks/experiments/unlearning.py fashion-mnist --root FOLDER
python benchmarks/experiments/unlearning.py cifar10 --root FOLDER
python benchmarks/experiments/unlearning.py cifar10 --root FOLDER --architecture vgg11
python benchmarks/experiments/unlearning.py fashion-mnist --root FOLDER --draws 5 --sets 'random 5 %' ...

Forget sets: a class, random 1, 5 and 10 %, the most and the least memorised 5 % by the head's self-influence, the light
half of a class (a subpopulation), and half of the labels that people got wrong (CIFAR-10N). Newton steps of the head,
of the last block and of all layers, the influence step of the two with the head refitted behind it, the steps that
leave the removed looking like unseen examples, and single influence steps of each stand beside fine-tuning, NegGrad+,
random labels, SSD and, on the digits, one LiSSA step. What has settings is tuned by the tug-of-war on training data
alone and on ANOTHER forget set of the same kind: another class, other random examples, the next most memorised.
Resumable: what is finished stays in runs/unlearning-DATA, and the same command goes on. Times are CPU seconds of one
more run of each method, beside a training of the same process. The summary is written to
benchmarks/results/unlearning-DATA.json, from which `python -m benchmarks.figures.keep tables` makes the tables of
docs/removal.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastif import EKFAC, ExactBlock, Influence, samplers
from fastif.data import human_labels, load
from fastif.data.image_sets import Data
from fastif.evaluation import baselines, train_halves, unlearning, without
from fastif.evaluation.models import build
from fastif.evaluation.training import Recipe, train
from fastif.evaluation.unlearning import UnlearnFn
from fastif.files import write_whole
from fastif.measure import environment

ROOT = Path(__file__).parents[2]
BLOCKS = {  # what is below the last pooling of each network, and its head
    "cnn": ["body.8", "body.9", "head"],
    "vgg11": ["body.22", "body.23", "body.25", "body.26", "head"],
}
BATCHES = {"cnn": 1024, "vgg11": 256}  # examples at a time, as they go through fastest
WEIGHT_DECAY = 5e-4
RECIPES = {
    "digits": Recipe("cnn", 0.5, 8, 0.15, 64, WEIGHT_DECAY, 0),
    "fashion-mnist": Recipe("cnn", 0.5, 30, 0.1, 64, WEIGHT_DECAY, 0),
    "cifar10": Recipe("cnn", 0.5, 30, 0.1, 64, WEIGHT_DECAY, 0),
}
WIDTH_OF_VGG11 = 0.25
EXAMPLES = {"digits": None, "fashion-mnist": 5000, "cifar10": 5000}  # of the training set, the first so many
CLASS, OTHER_CLASS = 8, 3  # removed, and the one that settings are chosen with
LIGHT, OTHER_LIGHT = 6, 4  # shirts and coats: of their images the lighter half are a subpopulation
SHARE = 0.05
UNSEEN = 1000  # examples that the removed ones are to look like


@cache
def trained_once(kept: tuple[int, ...], seed: int, x: Tensor, y: Tensor, recipe: Recipe) -> nn.Module:
    """The forget sets have the networks of all examples in common: none is trained twice in a process."""
    rows = torch.tensor(kept)
    return train(
        network(x, recipe, seed), x[rows], y[rows],
        epochs=recipe.epochs, lr=recipe.lr, weight_decay=recipe.weight_decay, batch_size=recipe.batch_size, seed=seed,
        progress=False,
    )  # fmt: skip


def network(x: Tensor, recipe: Recipe, seed: int = 0) -> nn.Module:
    return build(recipe.architecture, (x.shape[1], x.shape[2], x.shape[3]), 10, width=recipe.width, seed=seed)


def trained(kept: Tensor, seed: int, x: Tensor, y: Tensor, recipe: Recipe) -> nn.Module:
    return trained_once(tuple(kept.tolist()), seed, x, y, recipe)


def ours(k: int, architecture: str, unseen: tuple[Tensor, Tensor] | None = None) -> dict[str, UnlearnFn]:
    """What has no settings: steps that lower the retained objective, the influence step with the head refitted, and
    the steps that leave the removed looking like unseen examples, where there are any."""
    block = BLOCKS[architecture]
    how: dict[str, Any] = {"subset": partial(samplers.logit, k=k), "weight_decay": WEIGHT_DECAY}
    further = {**how, "steps": 3, "batch_size": 1024}
    refitted = {**further, "refit_head": True, "subset": partial(samplers.random, k=2 * k), "steps": 4}
    matched = {**refitted, "unseen": unseen, "steps": 6, "batch_size": BATCHES[architecture]}
    found = {
        "remove: head": partial(baselines.newton_steps, **how),
        "remove: last block": partial(baselines.newton_steps, layers=block, **further),
        "remove: all": partial(baselines.newton_steps, layers="*", **further),
        "step and refit: last block": partial(baselines.newton_steps, layers=block, **refitted),
        "step and refit: all": partial(baselines.newton_steps, layers="*", **refitted),
    }
    if unseen is not None:
        found |= {
            "match and refit: last block": partial(baselines.newton_steps, layers=block, **matched),
            "match and refit: all": partial(baselines.newton_steps, layers="*", **matched),
        }
    return found


def influence_step(k: int, damping: float) -> dict[str, Any]:
    """Settings of formula (3) for several layers, without a look at the objective."""
    curvature = {"head": ExactBlock(damping), "*": EKFAC(damping, fisher="monte_carlo")}
    how = {"curvature": curvature, "subset": partial(samplers.random, k=2 * k), "batch_size": 1024}
    return {**how, "steps": 1, "line_search": False, "weight_decay": WEIGHT_DECAY}


def over(make: Callable[[float], UnlearnFn], *dampings: float) -> dict[str, UnlearnFn]:
    return {f"damping {damping:g}": make(damping) for damping in dampings}


def single_steps(k: int, block: list[str]) -> dict[str, dict[str, UnlearnFn]]:
    """One influence step; its damping is chosen."""
    head: dict[str, Any] = {"subset": partial(samplers.logit, k=k), "weight_decay": WEIGHT_DECAY}
    return {
        "one step: head": over(
            lambda d: partial(baselines.newton_steps, steps=1, line_search=False, damping=d, **head), 0.0, 0.01, 0.1
        ),
        "one step: last block": over(
            lambda d: partial(baselines.newton_steps, layers=block, **influence_step(k, d)),
            0.001,
            0.003,
            0.01,
            0.03,
            0.1,
        ),
        "one step: all": over(
            lambda d: partial(baselines.newton_steps, layers="*", **influence_step(k, d)), 0.003, 0.01, 0.03, 0.1, 0.3
        ),
    }


def candidates(k: int) -> dict[str, dict[str, UnlearnFn]]:
    """By method of others, what its settings are chosen from."""
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


def forget_sets(
    x: Tensor, y: Tensor, memorised: Tensor, wrong: Tensor | None = None, draws: int = 1
) -> dict[str, list[Tensor]]:
    """By name: what is removed, and what settings are chosen with. `wrong` are the examples whose labels are wrong.

    Of the random 5 % there are as many as `draws`.
    """
    n = len(y)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    least = memorised.flip(0)

    def next_of(ranked: Tensor, share: float) -> list[Tensor]:
        size = round(share * n)
        return [ranked[:size].sort().values, ranked[size : 2 * size].sort().values]

    def lighter(label: int) -> Tensor:
        rows = (y == label).nonzero()[:, 0]
        light = x[rows].flatten(1).mean(1)
        return rows[light > light.median()]

    sets = {
        "random 5 %": next_of(order, SHARE),
        "most memorised 5 %": next_of(memorised, SHARE),
        f"class {CLASS}": [(y == CLASS).nonzero()[:, 0], (y == OTHER_CLASS).nonzero()[:, 0]],
        "random 1 %": next_of(order, 0.01),
        "random 10 %": next_of(order, 0.1),
        "least memorised 5 %": next_of(least, SHARE),
        f"light half of class {LIGHT}": [lighter(LIGHT), lighter(OTHER_LIGHT)],
    }
    for draw in range(2, draws + 1):
        again = torch.randperm(n, generator=torch.Generator().manual_seed(draw - 1))
        sets[f"random 5 %, draw {draw}"] = next_of(again, SHARE)
    if wrong is None:
        return sets
    mixed = wrong[torch.randperm(len(wrong), generator=torch.Generator().manual_seed(0))]
    return {"half of the wrong labels": [part.sort().values for part in mixed.tensor_split(2)], **sets}


def read(
    name: str, root: Path | None, examples: int | None
) -> tuple[Data, Tensor | None, tuple[Tensor, Tensor] | None]:
    """The first so many training examples, of CIFAR-10 with people's labels; which of these are wrong; and the last
    training examples, which no network is trained on."""
    images, most = load(name, root), EXAMPLES[name] if examples is None else examples
    x, y = images.x_train, images.y_train
    if name == "cifar10":
        assert root is not None
        y = human_labels("aggre", root)
    wrong = (y != images.y_train)[:most].nonzero()[:, 0] if name == "cifar10" else None
    further = len(y) if most is None else max(most, len(y) - UNSEEN)
    unseen = (x[further:], y[further:]) if further < len(y) else None
    return images._replace(x_train=x[:most], y_train=y[:most]), wrong, unseen


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="digits", choices=[*RECIPES])
    parser.add_argument("--root", type=Path, help="the folder of Fashion-MNIST or CIFAR-10")
    parser.add_argument(
        "--architecture", default="cnn", choices=[*BLOCKS], help="vgg11 is a quarter as wide as published"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=5, help="of half networks, the shadows of U-LiRA")
    parser.add_argument("--epochs", type=int, help="of the trainings, default the data set's")
    parser.add_argument("--examples", type=int, help="of the training set, the first so many")
    parser.add_argument("--draws", type=int, default=1, help="of the random 5 %%, each a forget set of its own")
    parser.add_argument("--sets", nargs="+", metavar="NAME", help="default all")
    parser.add_argument("--without", nargs="+", metavar="METHOD", default=[], help="methods to leave out")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="methods to look at, default all")
    parser.add_argument("--relearning-steps", type=int, default=100)
    parser.add_argument("--out", type=Path, help="default runs/unlearning-DATA[-ARCHITECTURE][-draws]")
    parser.add_argument(
        "--kept", type=Path, help="default benchmarks/results/unlearning-DATA[-ARCHITECTURE][-draws].json"
    )
    given = parser.parse_args(arguments)
    name = given.data + ("" if given.architecture == "cnn" else f"-{given.architecture}")
    name += "-draws" if given.draws > 1 else ""
    out = given.out or ROOT / "runs" / f"unlearning-{name}"
    results = given.kept or ROOT / "benchmarks" / "results" / f"unlearning-{name}.json"
    recipe, block = RECIPES[given.data], BLOCKS[given.architecture]
    if given.architecture == "vgg11":
        recipe = recipe._replace(architecture="vgg11", width=WIDTH_OF_VGG11)
    recipe = recipe if given.epochs is None else recipe._replace(epochs=given.epochs)
    images, wrong, unseen = read(given.data, given.root, given.examples)
    x, y = images.x_train, images.y_train
    k = min(len(y) // 10, 250)
    train_fn = partial(trained, x=x, y=y, recipe=recipe)
    halves = train_halves(train_fn, len(y), given.pairs, out=out / "halves", resume=True, progress=False)
    torch.manual_seed(0)
    influence = Influence(train_fn(torch.arange(len(y)), 0), curvature=ExactBlock(1e-3), layers="head", progress=False)
    memorised = influence.fit((x, y)).self_influence((x, y)).argsort(descending=True)
    sets = forget_sets(x, y, memorised, wrong, given.draws)
    if unknown := [name for name in given.sets or [] if name not in sets]:
        parser.error(f"--sets has {unknown[0]!r}; there are {', '.join(sets)}")
    own, every = ours(k, given.architecture, unseen), {**single_steps(k, block), **candidates(k)}
    wanted = {*own, *every} if given.only is None else {*given.only}
    if unknown := wanted - {*own, *every}:
        parser.error(f"--only has {min(unknown)!r}; there are {', '.join([*own, *every])}")
    grids = {name: grid for name, grid in every.items() if name in wanted and name not in given.without}
    tables: dict[str, Any] = {}
    for name, (removed, other) in sets.items():
        if given.sets and name not in given.sets:
            continue
        folder = out / name.replace(",", "").replace(" ", "-").replace("%", "percent")
        tune = partial(
            baselines.tune, model=network(x, recipe), train_fn=train_fn, train=(x, y), removed=other, resume=True,
            relearning_steps=1,
        )  # fmt: skip
        judge = partial(
            unlearning, network(x, recipe), train_fn, (x, y), removed, (images.x_test, images.y_test),
            seeds=given.seeds, networks=halves, relearning_steps=given.relearning_steps, resume=True, progress=False,
        )  # fmt: skip
        chosen = best_of(grids, tune, folder)
        methods = {method: how for method, how in own.items() if method in wanted}
        methods |= {method: grid[chosen[method]] for method, grid in grids.items()}
        table = judge(methods, out=folder / "table")
        seconds = times(methods, (x, y), removed, train_fn, folder / "seconds.json")
        tables[name] = table, chosen, seconds
        write_whole(results, _results(tables, given, images, recipe, arguments))
    return json.loads(results.read_text(encoding="utf-8"))


def times(
    methods: dict[str, UnlearnFn], data: tuple[Tensor, Tensor], removed: Tensor, train_fn: Any, kept: Path
) -> dict[str, Any]:
    """By method its CPU seconds, and those of a retraining just before, in the same process."""
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    todo = {name: method for name, method in methods.items() if name not in found}
    if not todo:
        return found
    rows = without(len(data[1]), removed)
    start = time.process_time()
    trained_once.__wrapped__(tuple(rows.tolist()), 0, **train_fn.keywords)
    retraining = time.process_time() - start
    for name, method in todo.items():
        model = copy.deepcopy(train_fn(torch.arange(len(data[1])), 0))
        start = time.process_time()
        method(model, data, removed, 0)
        found[name] = {"seconds": time.process_time() - start, "retraining": retraining}
    write_whole(kept, json.dumps(found, indent=1) + "\n")
    return found


def _results(tables: dict[str, Any], given: Any, images: Data, recipe: Recipe, arguments: list[str] | None) -> str:
    """The summary as JSON, of the forget sets that are finished."""
    meta = {
        "data": given.data,
        "architecture": recipe.architecture,
        "examples": len(images.y_train),
        "held_out": len(images.y_test),
        "seeds": given.seeds,
        "pairs": given.pairs,
        "epochs": recipe.epochs,
        "relearning_steps": given.relearning_steps,
        "chosen": {name: chosen for name, (_, chosen, _) in tables.items()},
        "removed": {name: table["meta"]["removed"] for name, (table, _, _) in tables.items()},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_of("unlearning", arguments),
        **environment(torch.device("cpu")),
    }
    keys = ("auc", "auc_error", "balanced_accuracy")
    sets = {
        name: {
            "summary": table["summary"],
            "u_lira": {row["method"]: {key: row[key] for key in keys} for row in table["u_lira"]},
            "cpu_seconds": seconds,
        }
        for name, (table, _, seconds) in tables.items()
    }
    return json.dumps({"meta": meta, "sets": sets}, indent=1, allow_nan=False) + "\n"


def best_of(grids: dict[str, dict[str, UnlearnFn]], tune: Callable[..., str], folder: Path) -> dict[str, str]:
    """By method, the name of its best settings."""
    found: dict[str, str] = {}
    for method, grid in grids.items():
        found[method] = tune(grid, out=folder / f"tuning-{method.replace(': ', '-')}")
        print(f"{folder.name}: {method}: {found[method]}", flush=True)
    return found


def command_of(script: str, arguments: list[str] | None) -> str:
    """The command as anyone could type it: their own folder for the data, none for what is kept."""
    words = sys.argv[1:] if arguments is None else arguments
    pairs = list(zip(words, ["", *words], strict=False))
    shown = [
        "FOLDER" if before == "--root" else shlex.quote(word)
        for word, before in pairs
        if word not in ("--out", "--kept") and before not in ("--out", "--kept")
    ]
    return " ".join([f"python benchmarks/experiments/{script}.py", *shown])


if __name__ == "__main__":
    main()
