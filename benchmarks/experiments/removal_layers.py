r"""Which layers should a removal move, and how? Classes are removed from trained networks and held against retraining.

python benchmarks/experiments/removal_layers.py digits
python benchmarks/experiments/removal_layers.py fashion-mnist --root DIR --examples 10000 --share 0.02 --steps 3 \
    --classes 2 5 --seeds 2 --variants head "last block" all "all, going on with the training"

Resumable: what is finished stays in runs/removal-layers-DATA, and the same command goes on. The summary is written to
benchmarks/results/removal-layers-DATA.json, from which `python -m benchmarks.figures.keep tables` makes the table of
docs/removal.md. The yardstick is the mean over the networks retrained from scratch without the class, one per seed, of
KL(retrained ‖ removed) over the held-out examples; the networks retrained with two seeds are as far apart as the row
"retrained, another seed" says. The method and its default damping were chosen with classes 0, 3 and 8 of the
digits and class 0 of Fashion-MNIST: other classes are reported.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from fastif import EKFAC, KFAC, Diagonal, ExactBlock, extract, remove, samplers
from fastif.data import Data, load
from fastif.evaluation.metrics import measure
from fastif.evaluation.models import build
from fastif.evaluation.training import RECIPES, train
from fastif.files import write_whole
from fastif.journal import Journal
from fastif.measure import environment
from fastif.removal.network import RetainedNetwork
from fastif.removal.newton import newton

ROOT = Path(__file__).parents[2]
BLOCK = ["body.8", "body.9", "head"]  # the last convolution, its batch norm and the head of the small CNN

States = Iterator[tuple[dict[str, Tensor], float]]  # the model's state after each step, and the seconds up to there


class OneSize(RetainedNetwork):
    """All layers' Newton steps with one size, found by halving: what the search in their span is held against."""

    def step(self) -> bool:
        own = self._newton_steps()
        before, size = {p: p.detach().clone() for p in self._names}, 2.0
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


class GoesOn(RetainedNetwork):
    """Newton steps on F itself: they do not only remove, they also go on with the training."""

    def gradient(self) -> float:
        norm = super().gradient()
        self._shift = {p: torch.zeros_like(g) for p, g in self._gradient.items()}
        return norm


def removals(k: int, steps: int, weight_decay: float) -> dict[str, Callable[..., States]]:
    """By name: a function of (model, data, removed, generator)."""
    exact = ExactBlock(0.0)

    def settings(k: int | None, generator: torch.Generator) -> dict[str, Any]:
        subset = None if k is None else partial(samplers.logit, k=k)
        return dict(subset=subset, generator=generator, weight_decay=weight_decay, batch_size=1024)

    def run(k: int | None, layers: Any, curvature: Any, *given: Any) -> States:
        *given, generator = given
        removal = remove(
            *given, layers=layers, curvature=curvature, steps=steps, progress=False, **settings(k, generator)
        )
        seconds = accumulate(step.seconds for step in removal.history)
        yield from ((removal.after(number), spent) for number, spent in enumerate(seconds, 1))

    def network(kind: type[RetainedNetwork], model: nn.Module, *given: Any) -> States:
        *given, generator = given
        problem, spent = kind(model, *given, layers="*", **settings(k, generator)), 0.0
        for figures in newton(problem, steps):
            spent += figures.seconds
            yield {**model.state_dict(), **problem.parameters}, spent

    def body(estimator: Any) -> Callable[..., States]:
        return partial(run, k, "*", {"head": exact, "*": estimator})

    return {
        "head": partial(run, k, None, None),
        "last block": partial(run, k, BLOCK, None),
        "all": partial(run, k, "*", None),
        "all, going on with the training": partial(network, GoesOn),
        "all, a fifth of the subset": partial(run, k // 5, "*", None),
        "all, curvature of all examples": partial(run, None, "*", None),
        "all, EKFAC damping 1e-3": body(EKFAC(1e-3)),
        "all, EKFAC damping 1e-2": body(EKFAC(1e-2)),
        "all, EKFAC damping 1e-1": body(EKFAC(1e-1)),
        "all, KFAC": body(KFAC("auto")),
        "all, Diagonal damping 1e-2": body(Diagonal(1e-2)),
        "all, one size for every layer": partial(network, OneSize),
    }


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
    parser.add_argument("--classes", type=int, nargs="+", default=[1, 4, 7])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--share", type=float, default=0.1, help="of the training examples that carry the curvature")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="default all")
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
    data = images.x_train, images.y_train
    table = removals(round(given.share * n), given.steps, experiment.recipe.weight_decay)
    chosen = list(table) if given.variants is None else given.variants
    settings = {
        "data": given.data,
        "examples": n,
        "share": given.share,
        "steps": given.steps,
        "recipe": experiment.recipe._asdict(),
    }
    journal = Journal(out / "rows.jsonl", settings, resume=True)
    runs: dict[tuple[str, int, int], list[dict[str, Any]]] = {run_of(run): run for run in journal.of_kind("run")}

    for removed in given.classes:
        references = [experiment.logits(experiment.trained(seed, removed)) for seed in range(given.seeds)]
        members = (images.y_train == removed).nonzero()[:, 0]
        for seed in range(given.seeds):
            others = [reference for s, reference in enumerate(references) if s != seed]
            model, moved = experiment.trained(seed), experiment.trained(seed)
            base = {"class": removed, "seed": seed, "step": 0, "seconds": 0.0}
            for name, logits, against in (
                ("retrained, another seed", references[seed], others),
                ("nothing removed", experiment.logits(model), references),
            ):
                runs[name, removed, seed] = [{"variant": name, **base, **experiment.row(logits, against, removed)}]
            for name in chosen:
                if (name, removed, seed) in runs:
                    continue
                run: list[dict[str, Any]] = []
                generator = torch.Generator().manual_seed(1000 * removed + seed)
                for step, (state, seconds) in enumerate(table[name](model, data, members, generator), 1):
                    moved.load_state_dict(state)
                    metrics = experiment.row(experiment.logits(moved), references, removed)
                    run.append({"variant": name, **base, "step": step, "seconds": seconds, **metrics})
                runs[run_of(run)] = run
                journal.append("run", run)
    shown = {*chosen, "retrained, another seed", "nothing removed"}
    asked = [
        run
        for (name, removed, seed), run in runs.items()
        if name in shown and removed in given.classes and seed < given.seeds
    ]
    results = {
        "meta": {**settings, "classes": given.classes, "seeds": given.seeds, "n_test": len(images.y_test),
                 "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                 "command": command(sys.argv[1:] if arguments is None else arguments),
                 **environment(torch.device("cpu"))},
        "summary": summarised([row for run in asked for row in carried_on(run, given.steps)]),
    }  # fmt: skip
    kept = given.kept or ROOT / "benchmarks" / "results" / f"removal-layers-{given.data}.json"
    write_whole(kept, json.dumps(results, indent=1, allow_nan=False) + "\n")
    return results


def command(arguments: list[str]) -> str:
    """As it may be repeated elsewhere: one machine's folders are left out."""
    pairs = list(zip(arguments, ["", *arguments], strict=False))
    kept = [w for w, before in pairs if w not in ("--out", "--kept") and before not in ("--out", "--kept")]
    kept = ["DIR" if before == "--root" else w for w, before in zip(kept, ["", *kept], strict=False)]
    return f"python benchmarks/experiments/removal_layers.py {shlex.join(kept)}"


def carried_on(run: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """A run that ended early, where no step lowered F, stays where it is."""
    last = run[-1]["step"]
    return run if last == 0 else [*run, *({**run[-1], "step": step} for step in range(last + 1, steps + 1))]


def run_of(run: list[dict[str, Any]]) -> tuple[str, int, int]:
    return run[0]["variant"], run[0]["class"], run[0]["seed"]


def summarised(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per variant and step: means over classes and seeds; of KL also the difference to the head after its last step,
    run by run, with its standard error.
    """
    cells: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["variant"], row["step"]), []).append(row)
    last = max((step for variant, step in cells if variant == "head"), default=0)
    head = {(row["class"], row["seed"]): row["KL"] for row in cells.get(("head", last), [])}
    summary = []
    for (variant, step), cell in cells.items():
        entry: dict[str, Any] = {"variant": variant, "step": step, "runs": len(cell)}
        for metric in ("F1", "EA", "SA", "EL", "SL", "KL", "KL_retained", "KL_removed", "seconds"):
            entry[metric] = fmean(row[metric] for row in cell)
        differences = [row["KL"] - head[key] for row in cell if (key := (row["class"], row["seed"])) in head]
        if len(differences) > 1:
            entry["KL_to_head"] = fmean(differences)
            entry["KL_to_head_error"] = stdev(differences) / len(differences) ** 0.5
        summary.append(entry)
    return summary


if __name__ == "__main__":
    for entry in main()["summary"]:
        print(f"{entry['variant']:28s} {entry['step']} F1 {entry['F1']:.4f} KL {entry['KL']:.4f} "
              f"retained {entry['KL_retained']:.4f} removed {entry['KL_removed']:.4f} "
              f"{entry['seconds']:.1f} s ({entry['runs']} runs)")  # fmt: skip
