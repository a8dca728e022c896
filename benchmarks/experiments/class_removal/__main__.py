"""One command, resumable: python -m benchmarks.experiments.class_removal --root DIR [--device cuda] ...; README.md."""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.experiments.class_removal.networks import channels_last, network, sha256
from benchmarks.experiments.class_removal.removals import SAMPLERS, Setting, last_block, newton
from benchmarks.experiments.class_removal.report import summarised, write_report
from benchmarks.experiments.class_removal.tasks import TASKS, better_high, metrics, prepared
from fastif import extract, samplers
from fastif.data import load
from fastif.evaluation.lissa_step import LiSSAStep, Removed, lowest
from fastif.evaluation.training import RECIPES
from fastif.files import write_whole
from fastif.journal import Journal, refuse_differences
from fastif.measure import Measure, environment
from fastif.model.features import Extracted

ROOT = Path(__file__).parents[3]
OWN_SAMPLERS = {
    "random": samplers.random,
    "stratified": samplers.stratified,
    "intermediate distance, weighted": samplers.intermediate_distance,
    "k-center": samplers.k_center,
    "logit": samplers.logit,
    "leverage": samplers.leverage,
    "certified": samplers.certified,
}
METHODS = ("LiSSA", "head", "last block", "all")
STEPS = {"head": 6, "last block": 3, "all": 3}


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments.class_removal", description=__doc__)
    parser.add_argument("--data", choices=("cifar10", "fashion-mnist", "digits"), default="cifar10")
    parser.add_argument("--root", help="folder with the data set's files")
    parser.add_argument("--examples", type=int, help="of the training set, the first so many; default all")
    parser.add_argument("--width", type=float, default=1.0, help="factor on the network's channels")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=512, help="of training")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument(
        "--bfloat16", action="store_true", help="train in it on a CPU too, where it has instructions for it"
    )
    parser.add_argument("--task", choices=TASKS, default="class")
    parser.add_argument("--cases", type=int, nargs="+", help="classes, or draws of the random examples")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--m", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048], help="LiSSA's examples")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.005, 0.01, 0.05, 0.2], help="fastif's examples")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--samplers", nargs="+", choices=sorted({*SAMPLERS, *OWN_SAMPLERS}), help="default all")
    parser.add_argument("--matrix", choices=("hessian", "ggn"), default="ggn", help="of LiSSA")
    parser.add_argument("--damping", type=float, default=1e-2, help="of LiSSA, beside the weight decay")
    parser.add_argument("--iterations", type=int, default=1000, help="of LiSSA, at most")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="default runs/class-removal-DATA-WIDTH; a folder TASK is made in it")
    options = parser.parse_args(given)
    if options.cases is None:
        options.cases = list(range({"class": 10, "random": 3, "mislabelled": 1}[options.task]))
    return options


def main(given: list[str] | None = None) -> dict[str, Any]:
    options = arguments(given)
    device = torch.device(options.device)
    images = load(options.data, options.root)
    if options.examples is not None:
        images = images._replace(x_train=images.x_train[: options.examples], y_train=images.y_train[: options.examples])
    recipe = RECIPES[options.data]._replace(
        width=options.width, epochs=options.epochs, batch_size=options.batch_size, lr=options.lr
    )
    out = options.out or ROOT / "runs" / f"class-removal-{options.data}-{options.width:g}"
    folder = out / options.task
    folder.mkdir(parents=True, exist_ok=True)
    task = prepared(options.task, images, options.cases, options.root, options.data)
    n = len(task.images.y_train)
    learning = {"data": options.data, "examples": n, "recipe": recipe._asdict(), "bfloat16": options.bfloat16}
    _keep_to(out / "networks.json", learning)
    settings = {**learning, "task": options.task, "matrix": options.matrix, "damping": options.damping,
                "iterations": options.iterations}  # fmt: skip
    journal = Journal(folder / "rows.jsonl", settings, resume=True)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {_key(row): row for row in journal.of_kind("row")}

    hashes: dict[str, str] = {}

    def trained(name: str, keep: Tensor) -> nn.Module:
        path = out / f"{name}.safetensors"
        made = network(path, recipe, options.data, task.images, keep, device, bfloat16=options.bfloat16)
        hashes[name] = sha256(path)
        return made

    def held_out(network: nn.Module) -> Extracted:
        return extract(network, (images.x_test, images.y_test), device=device, progress=False)

    model = trained(task.learnt, torch.arange(n))
    moved, held = channels_last(copy.deepcopy(model)), held_out(model)
    references: list[dict[str, Any]] = []
    retrained: dict[int, Tensor] = {}
    for case, removed in task.removed.items():
        keep = torch.ones(n, dtype=torch.bool).index_fill(0, removed, False).nonzero()[:, 0]
        retrained[case] = held_out(trained(task.without(case), keep)).logits
        for method, logits in (("nothing removed", held.logits), ("retrained", retrained[case])):
            references.append({"method": method, "case": case, **task.judged(logits, case, retrained[case])})

    setting = Setting(model, task.images, device, recipe.weight_decay, 256)
    with Measure(device) as looking:
        seen = extract(model, setting.data, device=device, progress=False)
    lissa = LiSSAStep(
        model,
        setting.data,
        seen,
        recipe.weight_decay,
        matrix=options.matrix,
        damping=options.damping,
        iterations=options.iterations,
        device=device,
        batch_size=setting.batch_size,
    )
    blocks = {"head": None, "last block": last_block(model), "all": "*"}

    def job(method: str, sampler: str, k: int, case: int, seed: int) -> Removed:
        members, drawn = task.removed[case], seed * 1_000_003 + case
        if method == "LiSSA":
            return lissa(members, SAMPLERS[sampler], k, drawn)
        features = seen if method == "head" else None
        return newton(setting, members, blocks[method], STEPS[method], OWN_SAMPLERS[sampler], k, drawn, features)

    decides = metrics(options.task)[-1]

    def judged(method: str, state: dict[str, Tensor], case: int) -> dict[str, float]:
        if method == "head":  # what it sees has not changed
            logits = F.linear(held.features, state["head.weight"].cpu(), state["head.bias"].cpu())
        else:
            moved.load_state_dict({name: value.to(device) for name, value in state.items()})
            logits = held_out(moved).logits
        return task.judged(logits, case, retrained[case])

    def at_the_best_step(sized: Callable[[float], dict[str, Tensor]], case: int) -> dict[str, float]:
        """What decides, where the held-out data chose the step size: the published code's way, to compare with."""
        found: dict[float, float] = {}

        def value(size: float) -> float:
            found[size] = judged("LiSSA", sized(size), case)[decides]
            return -found[size] if better_high(decides) else found[size]

        size = lowest(value)
        return {"held_out_step": size, "held_out": found[size]}

    budgets = {"LiSSA": options.m} | {name: [round(share * n) for share in options.shares] for name in blocks}
    names = {"LiSSA": SAMPLERS} | dict.fromkeys(blocks, OWN_SAMPLERS)
    # Methods in the innermost place: what slows the machine for a while slows them all.
    jobs = [
        (method, sampler, k, case, seed)
        for seed in range(options.seeds)
        for case in options.cases
        for method in options.methods
        for k in budgets[method]
        for sampler in names[method]
        if options.samplers is None or sampler in options.samplers
    ]
    for key in (bar := tqdm([key for key in jobs if key not in rows], unit="run")):
        bar.set_description(", ".join(map(str, key[:3])))
        row: dict[str, Any] = dict(zip(("method", "sampler", "k", "case", "seed"), key, strict=True))
        try:
            removal = job(*key)
        except ValueError as error:  # a series that diverges is a result, too
            rows[key] = {**row, "failed": str(error)}
        else:
            costs = {"RTE": removal.seconds, "ME": removal.peak_bytes}
            lissa_only = {"step_size": removal.step_size, "converged": removal.converged}
            if removal.sized is not None:
                lissa_only |= at_the_best_step(removal.sized, row["case"])
            rows[key] = {**row, **judged(row["method"], removal.state, row["case"]), **costs, **lissa_only}
        journal.append("row", rows[key])

    meta = {**settings, "cases": options.cases, "seeds": options.seeds, "n_test": len(images.y_test),
            "parameters": sum(p.numel() for p in model.parameters()), "sha256": hashes, "steps": STEPS,
            "pass": {"seconds": looking.seconds, "peak_bytes": looking.peak_bytes,
                     "kept_bytes": sum(values.nbytes for values in seen if values is not None)},
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": _command(sys.argv[1:] if given is None else given), **environment(device)}  # fmt: skip
    asked = [rows[key] for key in jobs]
    summary = summarised(asked, references, metrics(options.task))
    results = {"meta": meta, "references": references, "summary": summary, "rows": asked}
    write_whole(folder / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_report(results, folder)
    return results


def _keep_to(path: Path, settings: dict[str, Any]) -> None:
    """Notes what the folder's networks learn from and how, which they serve all tasks with; refuses anything else."""
    if path.exists():
        refuse_differences(path, json.loads(path.read_text(encoding="utf-8")), settings)
    else:
        write_whole(path, json.dumps(settings, indent=1) + "\n")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["method"], row["sampler"], row["k"], row["case"], row["seed"]


def _command(words: list[str]) -> str:
    """As it may be repeated elsewhere: one machine's folders are left out."""
    kept: list[str] = []
    for word, before in zip(words, ["", *words], strict=False):
        if word != "--out" and before != "--out":
            kept.append("DIR" if before == "--root" else word)
    return f"python -m benchmarks.experiments.class_removal {shlex.join(kept)}"


if __name__ == "__main__":
    main()
