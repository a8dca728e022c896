r"""Two hundred examples removed one after another: how far the drift is from one removal of all, and from retraining.

python benchmarks/experiments/removal_sequence.py
python benchmarks/experiments/removal_sequence.py fashion-mnist --root FOLDER

Networks as in unlearning.py. Each removal takes one step from where the one before ended (`remove(start=)`), on
features that are extracted once. *The head*: after every removal its retained objective stands beside the minimum of
it, which `optimal_head` finds in float64; single influence steps (`line_search=False`) answer the removals alone, and
do not go on with the training. *The last block*, on what comes out below it, which is computed once, too: its objective
is not convex and has no known minimum, so that it stands beside that of one removal of all. All stand beside networks
retrained without them. CPU seconds. Resumable. The summary is written to
benchmarks/results/removal-sequence-DATA.json, from which `python -m benchmarks.figures.keep tables` makes the table and
the picture of docs/removal.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.experiments.unlearning import RECIPES, WEIGHT_DECAY, command_of, read, trained
from fastif import Removal, extract, remove, samplers
from fastif.data.image_sets import Data as ImageData
from fastif.evaluation import without
from fastif.evaluation.models import SmallCNN
from fastif.evaluation.training import Recipe
from fastif.evaluation.unlearned import Outputs, compare, outputs_of
from fastif.files import write_whole
from fastif.journal import Journal
from fastif.measure import environment
from fastif.removal import optimal_head

ROOT = Path(__file__).parents[2]
BELOW = 8  # modules of the small CNN's body before its last block
Data = tuple[Tensor, Tensor]
States = dict[str, dict[str, Tensor]]
Made = TypeVar("Made")


def one_by_one(
    model: nn.Module, data: Data, order: Tensor, progress: Callable[[int, Removal], None], **how: Any
) -> tuple[Removal, float, int]:
    """The last of the removals, one step each, the CPU seconds of all and how many of them took no step."""
    removal, seconds, still = None, 0.0, 0
    for number in range(1, len(order) + 1):
        start = time.process_time()
        removal = remove(model, data, order[:number], start=removal, steps=1, progress=False, **how)
        seconds += time.process_time() - start
        still += not removal.history
        progress(number, removal)
    assert removal is not None
    return removal, seconds, still


def measured(work: Callable[[], Made]) -> tuple[Made, float]:
    """What it made, and its CPU seconds."""
    start = time.process_time()
    return work(), time.process_time() - start


def head_in_sequence(model: nn.Module, data: Data, order: Tensor, k: int, seed: int) -> tuple[dict[str, Any], States]:
    """Objective above its minimum after each removal; of one removal of all, too; and the states of both."""
    seen, took = measured(lambda: extract(model, data, progress=False))
    how: dict[str, Any] = {
        "extracted": seen,
        "subset": partial(samplers.logit, k=k),
        "weight_decay": WEIGHT_DECAY,
        "generator": torch.Generator().manual_seed(seed),
    }
    assert seen.labels is not None
    features, labels = seen.features.double(), seen.labels
    away: list[float] = []

    def above(removal: Removal, gone: Tensor) -> float:
        """F − min F, both in float64, at the head that the removal led to."""
        kept = without(len(labels), gone)
        weight, bias = removal.state_dict["head.weight"].double(), removal.state_dict["head.bias"].double()
        losses = nn.functional.cross_entropy(features[kept] @ weight.T + bias, labels[kept], reduction="sum")
        decay = WEIGHT_DECAY / 2 * (weight.square().sum() + bias.square().sum())
        best = optimal_head(features, labels, weight, bias, gone, weight_decay=WEIGHT_DECAY)
        return float(losses / len(labels) + decay) - best.objective

    last, seconds, still = one_by_one(
        model, data, order, lambda number, removal: away.append(above(removal, order[:number])), **how
    )
    joint, joint_seconds = measured(lambda: remove(model, data, order, progress=False, **how))
    alone = {**how, "line_search": False}
    influence, influence_seconds, _ = one_by_one(model, data, order, lambda *_: None, **alone)
    influence_at_once = remove(model, data, order, steps=1, progress=False, **alone)
    begin = Removal(joint.after(0), [], [])
    row = {
        "above the minimum": away,
        "before": above(begin, order),
        "of one removal": above(joint, order),
        "steps of one removal": len(joint.history),
        "without a step": still,
        "CPU s": seconds,
        "CPU s of one removal": joint_seconds,
        "CPU s of the features": took,
        "CPU s of influence steps": influence_seconds,
    }
    states = {
        "head, one by one": last,
        "head, at once": joint,
        "head, influence steps one by one": influence,
        "head, one influence step": influence_at_once,
    }
    return row, {name: removal.state_dict for name, removal in states.items()}


class Block(nn.Module):
    """What is left of a small CNN above `BELOW`: many removals have what comes out below computed once for all."""

    def __init__(self, model: SmallCNN):
        super().__init__()
        self.body, self.head = model.body[BELOW:], model.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def block_in_sequence(model: Any, data: Data, order: Tensor, k: int, seed: int) -> tuple[dict[str, Any], States]:
    """Objective after the last removal beside that of one removal of all; and the states of both."""
    with torch.no_grad():
        below = torch.cat([model.body[:BELOW](part) for part in data[0].split(1024)])
    block, inputs = Block(model), (below, data[1])
    how: dict[str, Any] = {
        "layers": "*",
        "subset": partial(samplers.logit, k=k),
        "weight_decay": WEIGHT_DECAY,
        "generator": torch.Generator().manual_seed(seed),
        "batch_size": 1024,
    }
    objectives: list[float] = []

    def note(_: int, removal: Removal) -> None:
        objectives.extend(step.objective for step in removal.history)

    last, seconds, still = one_by_one(block, inputs, order, note, **how)
    joint, joint_seconds = measured(lambda: remove(block, inputs, order, steps=3, progress=False, **how))
    states: States = {}
    for name, removal in (("one by one", last), ("at once", joint)):
        block.load_state_dict(removal.state_dict)
        states[f"last block, {name}"] = copy.deepcopy(model.state_dict())
    row = {
        "objective": objectives[-1],
        "of one removal": joint.history[-1].objective,
        "steps of one removal": len(joint.history),
        "without a step": still,
        "CPU s": seconds,
        "CPU s of one removal": joint_seconds,
    }
    return row, states


def judged(model: nn.Module, states: States, parts: dict[str, Data]) -> dict[str, Any]:
    """What each network says of the parts, beside the last of them, the retrained one."""

    def told(state: dict[str, Tensor]) -> Outputs:
        model.load_state_dict(state)
        return outputs_of(model, parts)

    found = {name: told(state) for name, state in states.items()}
    retrained = found["retrained"]
    keys = ("removed_accuracy", "retained_loss", "held_out_accuracy", "held_out_kl", "tug_of_war")
    return {name: {key: compare(own, [retrained])[key] for key in keys} for name, own in found.items()}


def run(seed: int, images: ImageData, recipe: Recipe, removals: int) -> dict[str, Any]:
    """Of one network and one order of removals: the head in sequence, the last block, and what their networks say."""
    data = x, y = images.x_train, images.y_train
    model = copy.deepcopy(trained(torch.arange(len(y)), seed, x, y, recipe))
    before = copy.deepcopy(model.state_dict())
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:removals]
    kept, k = without(len(y), order), min(len(y) // 10, 250)
    head, heads = head_in_sequence(model, data, order, k, seed)
    block, blocks = block_in_sequence(model, data, order, k, seed)
    states = {
        "nothing removed": before,
        **heads,
        **blocks,
        "retrained": trained(kept, seed, x, y, recipe).state_dict(),
    }
    parts = {
        "removed": (x[order], y[order]),
        "retained": (x[kept], y[kept]),
        "held_out": (images.x_test, images.y_test),
    }
    return {"head": head, "last block": block, "networks": judged(model, states, parts)}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="digits", choices=["digits", "fashion-mnist"])
    parser.add_argument("--root", type=Path, help="the folder of Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--removals", type=int, default=200)
    parser.add_argument("--epochs", type=int, help="of the trainings, default the data set's")
    parser.add_argument("--examples", type=int, help="of the training set, the first so many")
    parser.add_argument("--out", type=Path, help="default runs/removal-sequence-DATA")
    parser.add_argument("--kept", type=Path, help="default benchmarks/results/removal-sequence-DATA.json")
    given = parser.parse_args(arguments)
    images, _, _ = read(given.data, given.root, given.examples)
    recipe = RECIPES[given.data]
    recipe = recipe if given.epochs is None else recipe._replace(epochs=given.epochs)
    out = given.out or ROOT / "runs" / f"removal-sequence-{given.data}"
    out.mkdir(parents=True, exist_ok=True)
    settings = {"removals": given.removals, "examples": len(images.y_train), "recipe": recipe._asdict()}
    journal = Journal(out / "rows.jsonl", settings, resume=True)
    found = journal.found("seed")
    for seed in range(given.seeds):
        if (seed,) not in found:
            found[seed,] = run(seed, images, recipe, given.removals)
            journal.append("seed", found[seed,], (seed,))
            print(f"{given.data}: seed {seed}: {found[seed,]['head']['above the minimum'][-1]:.2g}", flush=True)
    meta = {
        "data": given.data,
        "held_out": len(images.y_test),
        "seeds": given.seeds,
        **settings,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_of("removal_sequence", arguments),
        **environment(torch.device("cpu")),
    }
    results = {"meta": meta, "rows": [found[seed,] for seed in range(given.seeds)]}
    kept = given.kept or ROOT / "benchmarks" / "results" / f"removal-sequence-{given.data}.json"
    write_whole(kept, json.dumps(results, indent=1, allow_nan=False) + "\n")
    return results


if __name__ == "__main__":
    main()
