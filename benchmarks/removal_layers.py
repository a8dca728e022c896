"""Which layers should a removal move, and how? Classes are removed from trained networks and held against retraining.

python benchmarks/removal_layers.py digits
python benchmarks/removal_layers.py fashion-mnist --root DIR --examples 20000

Resumable: what is finished stays in runs/removal-layers-DATA, and the same command goes on. The summary is written to
benchmarks/results/removal-layers-DATA.json, from which `benchmarks/results.py tables` makes the table of
docs/removal.md. The yardstick is the mean over the networks retrained from scratch without the class, one per seed, of
KL(retrained ‖ removed) over the held-out examples; the networks retrained with two seeds are as far apart as the row
"retrained, another seed" says.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from fastif import EKFAC, KFAC, Diagonal, ExactBlock, Removal, extract, remove, samplers
from fastif.data import Data, load
from fastif.evaluation.class_removal import environment
from fastif.evaluation.metrics import measure
from fastif.evaluation.models import build
from fastif.evaluation.training import RECIPES, train
from fastif.journal import Journal, write_whole
from fastif.newton import newton
from fastif.retained_network import RetainedNetwork

ROOT = Path(__file__).parents[1]
BLOCK = ["body.8", "body.9", "head"]  # the last convolution, its batch norm and the head of the small CNN
STEPS = 6


class OneSize(RetainedNetwork):
    """All layers' Newton steps with one size, found by halving: what the search in their span is held against."""

    def step(self) -> bool:
        own = self._newton_steps()
        before, size = {p: p.detach().clone() for p in self.parameters}, 2.0
        while size > 2.0**-20:
            size /= 2
            self._move({name: size * matrix for name, matrix in own.items()})
            value = self._objective()
            if value < self.objective:
                self.objective = value
                return True
            with torch.no_grad():
                for parameter, old in before.items():
                    parameter.copy_(old)
        return False


def one_size(model: nn.Module, data: Any, removed: Tensor, **settings: Any) -> Iterator[dict[str, Tensor]]:
    problem = OneSize(model, data, removed, layers="*", **settings)
    for _ in newton(problem, STEPS):
        yield {**model.state_dict(), **problem.state}


def states(removal: Removal) -> Iterator[dict[str, Tensor]]:
    for step in range(1, len(removal.moved)):
        yield removal.after(step)


def variants(
    share: Callable[[float], int], weight_decay: float
) -> dict[str, Callable[..., Iterator[dict[str, Tensor]]]]:
    """By name: a function of (model, data, removed, generator) that yields the state after each step."""

    def run(k: int | None, model: nn.Module, data: Any, removed: Tensor, generator: torch.Generator, **settings: Any):
        function = settings.pop("function", None)
        settings = dict(subset=None if k is None else partial(samplers.logit, k=k), generator=generator,
                        weight_decay=weight_decay, batch_size=1024) | settings  # fmt: skip
        if function is not None:
            return function(model, data, removed, **settings)
        return states(remove(model, data, removed, steps=STEPS, progress=False, **settings))

    def after_head(k: int, model: nn.Module, data: Any, removed: Tensor, generator: torch.Generator):
        own = build_like(model)
        own.load_state_dict(list(run(k, model, data, removed, generator))[-1])
        return run(k, own, data, removed, generator, layers="*")

    k, all_layers = share(0.1), dict(layers="*")
    exact = ExactBlock(0.0)
    return {
        "head": partial(run, k),
        "last block": partial(run, k, layers=BLOCK),
        "all": partial(run, k, **all_layers),
        "all, after the head": partial(after_head, k),
        "all, k = 2 %": partial(run, share(0.02), **all_layers),
        "all, k = 100 %": partial(run, None, **all_layers),
        "all, EKFAC damping 1e-4": partial(run, k, curvature={"head": exact, "*": EKFAC(1e-4)}, **all_layers),
        "all, EKFAC damping 1e-2": partial(run, k, curvature={"head": exact, "*": EKFAC(1e-2)}, **all_layers),
        "all, EKFAC damping 1e-1": partial(run, k, curvature={"head": exact, "*": EKFAC(1e-1)}, **all_layers),
        "all, KFAC": partial(run, k, curvature={"head": exact, "*": KFAC(1e-3)}, **all_layers),
        "all, Diagonal": partial(run, k, curvature={"head": exact, "*": Diagonal(1e-3)}, **all_layers),
        "all, one step size": partial(run, k, function=one_size),
    }


def build_like(model: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(model)


class Experiment:
    def __init__(self, name: str, images: Data, out: Path, seeds: int):
        self.name, self.images, self.out, self.seeds = name, images, out, seeds
        self.recipe = RECIPES[name]
        self.x, self.y = images.x_train, images.y_train

    def trained(self, seed: int, without: int | None = None) -> nn.Module:
        """Trained from scratch with a seed, or read from where it was kept."""
        shape = tuple(self.x.shape[1:])
        model = build(self.recipe.architecture, shape, len(self.images.classes), seed=seed)  # pyright: ignore
        path = self.out / f"without-{without}-seed-{seed}.pt"
        if path.exists():
            model.load_state_dict(torch.load(path))
            return model.eval()
        keep = torch.arange(len(self.y)) if without is None else (self.y != without).nonzero()[:, 0]
        r = self.recipe
        train(model, self.x[keep], self.y[keep], epochs=r.epochs, lr=r.lr, weight_decay=r.weight_decay,
              batch_size=r.batch_size, seed=seed, progress=False)  # fmt: skip
        torch.save(model.state_dict(), path)
        return model

    def logits(self, model: nn.Module) -> Tensor:
        return extract(model, self.images.x_test, batch_size=2048, progress=False).logits

    def row(self, logits: Tensor, references: list[Tensor], removed: int) -> dict[str, float]:
        found = measure(logits, self.images.y_test, removed)
        gone = self.images.y_test == removed
        for key, rows in (("KL", slice(None)), ("KL_retained", ~gone), ("KL_removed", gone)):
            found[key] = fmean(divergence(reference[rows], logits[rows]) for reference in references)
        return found


def divergence(reference: Tensor, logits: Tensor) -> float:
    """Mean over examples of KL(softmax(reference) ‖ softmax(logits)), in nats."""
    p, q = reference.double().log_softmax(1), logits.double().log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("digits", "fashion-mnist"))
    parser.add_argument("--root", help="folder with the data set's files")
    parser.add_argument("--examples", type=int, help="of the training set, the first so many")
    parser.add_argument("--classes", type=int, nargs="+", default=[0, 3, 5, 8])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", help="names; default all")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kept", type=Path, help="where the summary goes")
    given = parser.parse_args(arguments)
    images = load(given.data, given.root)
    if given.examples is not None:
        images = images._replace(x_train=images.x_train[: given.examples], y_train=images.y_train[: given.examples])
    out = given.out or ROOT / "runs" / f"removal-layers-{given.data}"
    out.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(given.data, images, out, given.seeds)
    n = len(images.y_train)
    table = variants(lambda part: round(part * n), experiment.recipe.weight_decay)
    chosen = list(table) if given.variants is None else given.variants
    settings = {"data": given.data, "examples": n, "recipe": experiment.recipe._asdict()}
    journal = Journal(out / "rows.jsonl", settings, resume=True)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {key_of(row): row for row in journal.of_kind("row")}

    def note(row: dict[str, Any]) -> None:
        rows[key_of(row)] = row
        journal.append("row", row)

    for removed in given.classes:
        references = [experiment.logits(experiment.trained(seed, removed)) for seed in range(given.seeds)]
        members = (images.y_train == removed).nonzero()[:, 0]
        for seed in range(given.seeds):
            others = [reference for s, reference in enumerate(references) if s != seed]
            base = {"class": removed, "seed": seed, "step": 0, "seconds": 0.0}
            note({"variant": "retrained, another seed", **base, **experiment.row(references[seed], others, removed)})
            model = experiment.trained(seed)
            note(
                {"variant": "nothing removed", **base, **experiment.row(experiment.logits(model), references, removed)}
            )
            for name in chosen:
                if (name, removed, seed, 1) in rows:
                    continue
                generator = torch.Generator().manual_seed(1000 * removed + seed)
                other = build_like(model)
                began = time.process_time()
                for step, state in enumerate(table[name](model, (images.x_train, images.y_train), members, generator=generator), 1):  # fmt: skip  # noqa: E501
                    seconds = time.process_time() - began
                    other.load_state_dict(state)
                    metrics = experiment.row(experiment.logits(other), references, removed)
                    note({"variant": name, "class": removed, "seed": seed, "step": step, "seconds": seconds, **metrics})
    results = {
        "meta": {**settings, "classes": given.classes, "seeds": given.seeds, "n_test": len(images.y_test),
                 "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                 "command": "python benchmarks/removal_layers.py " + given.data
                 + (f" --root DIR --examples {given.examples}" if given.root else ""),
                 **environment(torch.device("cpu"))},
        "summary": summarised([row for row in rows.values() if row["class"] in given.classes]),
    }  # fmt: skip
    kept = given.kept or ROOT / "benchmarks" / "results" / f"removal-layers-{given.data}.json"
    write_whole(kept, json.dumps(results, indent=1, allow_nan=False) + "\n")
    return results


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["variant"], row["class"], row["seed"], row["step"]


def summarised(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per variant and step: means over classes and seeds, and the standard deviation over seeds of the class means."""
    cells: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["variant"], row["step"]), []).append(row)
    summary = []
    for (variant, step), cell in cells.items():
        entry: dict[str, Any] = {"variant": variant, "step": step, "runs": len(cell)}
        for metric in ("F1", "EA", "SA", "EL", "SL", "KL", "KL_retained", "KL_removed", "seconds"):
            entry[metric] = fmean(row[metric] for row in cell)
            seeds = sorted({row["seed"] for row in cell})
            means = [fmean(row[metric] for row in cell if row["seed"] == seed) for seed in seeds]
            entry[f"{metric}_std"] = stdev(means) if len(means) > 1 else None
        summary.append(entry)
    return summary


if __name__ == "__main__":
    for entry in main(sys.argv[1:])["summary"]:
        print(f"{entry['variant']:28s} {entry['step']} F1 {entry['F1']:.4f} KL {entry['KL']:.4f} "
              f"retained {entry['KL_retained']:.4f} removed {entry['KL_removed']:.4f} "
              f"{entry['seconds']:.1f} s ({entry['runs']} runs)")  # fmt: skip
