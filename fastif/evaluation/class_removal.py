"""Class removal: take one class out of a trained classifier, sampler by sampler, and compare with retraining.

The model's last linear layer is moved by subsampled Newton steps (`fastif.removal.head_steps`); after each step the
held-out examples say what became of it (`fastif.evaluation.metrics`). They are only ever looked at to report: no step,
no stop and no sampler depends on them.
"""

import copy
import inspect
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime, timezone
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastif.evaluation.lissa_step import Removed
from fastif.evaluation.metrics import DEFINITIONS, measure, summarise
from fastif.evaluation.settings import (
    SAMPLERS,
    Sampler,
    check_budgets,
    check_classes,
    check_seeds,
    choose_samplers,
    integers,
)
from fastif.files import CHECKSUM, Damaged, canonical, checksum, write_whole
from fastif.fingerprints import described, described_model, fingerprint
from fastif.influence import shared_folder
from fastif.journal import Journal, refuse_differences
from fastif.measure import environment
from fastif.model.features import Extracted, extract, find_head
from fastif.progress import tqdm
from fastif.ranks import Ranks, apart, find_ranks, on_all_ranks
from fastif.removal import head_steps, optimal_head

Task = TypeVar("Task")


@on_all_ranks
def class_removal(
    model: nn.Module,
    train: Any,
    test: Any,
    *,
    samplers: Iterable[str | tuple[str, Sampler]] = SAMPLERS,
    k: int | str | Iterable[int | str] = "5%",
    seeds: int | Iterable[int] = 3,
    classes: Iterable[int] | None = None,
    steps: int = 6,
    weight_decay: float = 5e-4,
    damping: float = 0.0,
    retrain: Callable[[Tensor], nn.Module] | None = None,
    baseline: Callable[[Tensor, int, int], Removed] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    key: str | None = None,
    head: str | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Removes each class with each sampler, budget and seed, and returns the table of what it did.

    `train` and `test` are labelled data as `fastif.extract` takes it. `samplers` are names from `fastif.samplers`, or
    pairs (name, function) of the same form, the function taking `k=`; `k` counts training examples, as numbers or as
    shares of them ("0.5%"), of which no more are drawn than are retained; `seeds` is a number of seeds or the seeds;
    `classes` defaults to all. `weight_decay` is what the model was trained with. `retrain(keep)` returns a network
    trained from scratch on the examples `keep` (int64, ascending), for the column `retrained`. `baseline(removed, k,
    seed)` removes the examples `removed` (int64, ascending) in another way with k of the retained ones, as a
    `LiSSAStep` does; it is called with the first seed alone. `about` is added to `meta`.

    Returns a dict, all of it JSON: `meta`, `original`, `retrained_head` and `retrained` (one entry per class: EA, EL,
    SA, SL, F1, ...), `baseline` (one row per k and class), `rows` (one per sampler, k, class, seed and step), `summary`
    (one per sampler, k and step). The entries are defined in `meta.definitions`; docs/math.md (5) has the formulas.

    With `out`, a folder, the dict is written to `out/results.json` when it is complete; until then every finished run
    is kept in `out/rows.jsonl`, and the same call with `resume=True` goes on from there. `key` is a name of your own
    for what of the model, the samplers and `retrain` cannot be fingerprinted, of which an error tells.

    On several ranks (`torchrun`) each does one retraining, baseline or run at a time, and all return the results; the
    first one writes them, and seconds are those with so many at work (`meta.ranks`).

    Raises ValueError for settings that name no such thing, labels that are missing, classes without held-out examples,
    and for a resumption with other settings, model or data than before, with the list of differences; TypeError for
    settings of the wrong type.
    """
    began = time.perf_counter()
    chosen = choose_samplers(samplers)
    seeds = check_seeds(seeds)
    (steps,) = integers("steps", "an integer", [steps])
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not (isinstance(weight_decay, Real) and 0 < weight_decay < math.inf):
        raise ValueError(f"weight_decay must be > 0 and finite, got {weight_decay!r}")
    if not (isinstance(damping, Real) and 0 <= damping < math.inf):
        raise ValueError(f"damping must be a finite number >= 0, got {damping!r}")
    weight_decay, damping = float(weight_decay), float(damping)
    ranks = find_ranks()
    progress = progress and ranks.rank == 0
    _, layer = find_head(model, head, op="class_removal")
    removed_classes = check_classes(classes, layer.out_features)
    features, labels = _labelled("train", extract(model, train, head=head, device=device, progress=progress))
    held_features, held_labels = _labelled("test", extract(model, test, head=head, device=device, progress=progress))
    _check_examples("training", labels, removed_classes)
    _check_examples("held-out", held_labels, removed_classes)
    budgets = check_budgets(k, len(labels))
    if key is not None and out is None:
        raise ValueError(f"class_removal: key={key!r} needs out=, the folder of the job")
    place = torch.device(device or layer.weight.device)
    where = environment(place)
    settings = {
        "samplers": [name for name, _ in chosen],
        "k": budgets,
        "seeds": seeds,
        "classes": removed_classes,
        "steps": steps,
        "weight_decay": weight_decay,
        "damping": damping,
        "retrain": retrain is not None,
        "threads": where["threads"],
        "versions": where["versions"],
        "device type": place.type,
        "model": fingerprint(model.state_dict().values()),
        "labels": fingerprint((labels, held_labels)),
        "examples": fingerprint((features, held_features)),
    }
    if out is not None:
        settings["code"] = {
            "model": described_model(model, key),
            "retrain": described(retrain, "retrain", key),
            "samplers": {name: described(function, f"the sampler {name}", key) for name, function in chosen},
            "baseline": described(baseline, "baseline", key),
        }
        settings["key"] = key
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
    ranks.compare("class_removal", settings)
    with nullcontext() if out is None else shared_folder.held(out, ranks):
        first = ranks.rank == 0  # which alone reads and writes
        finished = _finished(out, settings) if out is not None and resume and first else None
        (finished, *_) = ranks.meet("what is finished", finished)
        if finished:
            return finished
        journal = Journal(out / "rows.jsonl" if out is not None and first else None, settings, resume)
        kinds = ("retrained_head", "retrained", "baseline", "rows")
        (found, *_) = ranks.meet("what is kept", {kind: journal.found(kind) for kind in kinds})

        fit, held = (features.to(place), labels.to(place)), (held_features.to(place), held_labels.to(place))
        job = _Job(fit, held, layer, weight_decay, damping, steps)
        original = [job.original(c) for c in removed_classes]
        heads, networks, compared = found["retrained_head"], found["retrained"], found["baseline"]
        missing = [c for c in removed_classes if (c,) not in heads]
        for c, made in _spread("retrained heads", missing, job.retrained_head, ranks):
            heads[c,] = made
            journal.append("retrained_head", made, (c,))
        if retrain is not None:
            missing = [c for c in removed_classes if (c,) not in networks]
            train_without = partial(_retrained, retrain, labels, held_labels, test, head, device)
            for c, made in _spread("retrain the network", missing, train_without, ranks, "class", progress):
                networks[c,] = made
                journal.append("retrained", made, (c,))
        retrained_head = [heads[c,] for c in removed_classes]
        retrained = [networks[c,] for c in removed_classes if (c,) in networks]

        if baseline is not None:
            asked = [(budget, c) for budget in budgets for c in removed_classes if (budget, c) not in compared]

            def compare(budget: int, c: int) -> dict[str, Any]:
                removed = baseline(job.members(c).cpu(), min(budget, int((labels != c).sum())), seeds[0])
                return _compared(removed, model, budget, c, seeds[0], held_labels, test, head, device)

            for key_of, made in _spread("baseline", asked, lambda one: compare(*one), ranks, "run", progress):
                compared[key_of] = made
                journal.append("baseline", made, key_of)

        rows: list[dict[str, Any]] = [row for run in found["rows"].values() for row in run]
        done = {(row["sampler"], row["k"], row["class"], row["seed"]) for row in rows}
        kept = len(rows)
        # Samplers in the innermost place: what slows the machine for a while slows them all.
        runs = [
            (name, function, budget, index, seed)
            for seed in seeds
            for index in range(len(removed_classes))
            for budget in budgets
            for name, function in chosen
            if (_draws(function) or seed == seeds[0]) and (name, budget, removed_classes[index], seed) not in done
        ]
        if runs:
            with apart():  # the first run pays for the warming up: not measured
                job.run(runs[0][1], runs[0][2], 0, original[0], 0.0)

        def remove(run: tuple[str, Sampler, int, int, int]) -> list[dict[str, Any]]:
            name, function, budget, index, seed = run
            made = job.run(function, budget, seed, original[index], retrained_head[index]["objective"])
            return [{"sampler": name, "k": budget, **row} for row in made]

        for (name, _, budget, index, seed), made in _spread("runs", runs, remove, ranks, "run", progress):
            journal.append("rows", made, (name, budget, removed_classes[index], seed))
            rows += made

        meta = {
            **settings,
            "n_train": len(labels),
            "n_test": len(held_labels),
            "features": layer.in_features,
            "outputs": layer.out_features,
            "draws_nothing": [name for name, function in chosen if not _draws(function)],
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join([Path(sys.argv[0]).name.replace("__main__.py", "fastif"), *sys.argv[1:]]),
            **where,
            **(about or {}),
            **({"ranks": ranks.world} if ranks.world > 1 else {}),
            "rows_kept_from_before": kept,
            "total_seconds": time.perf_counter() - began,
            "definitions": DEFINITIONS,
        }
        (meta, *_) = ranks.meet("how it was made", meta)
        results = {
            "meta": meta,
            "original": original,
            "retrained_head": retrained_head,
            "retrained": retrained,
            "baseline": list(compared.values()),
            "rows": rows,
            "summary": summarise(rows),
        }
        results = json.loads(json.dumps(results, allow_nan=False))  # the same whether it is returned or read back
        results["meta"][CHECKSUM] = _checksum(results)
        if out is not None and first:
            write_whole(out / "results.json", json.dumps(results, indent=1, allow_nan=False))
            journal.finish()
        return results


class _Job:
    """Features, held-out features and the head, where the runs compute with them."""

    def __init__(
        self,
        fit: tuple[Tensor, Tensor],
        held: tuple[Tensor, Tensor],
        layer: nn.Linear,
        weight_decay: float,
        damping: float,
        steps: int,
    ):
        self.features, self.labels = fit
        self.held_features, self.held_labels = held
        self.weight = layer.weight.detach().to(self.features.device)
        self.bias = None if layer.bias is None else layer.bias.detach().to(self.features.device)
        self.weight_decay, self.damping, self.steps = weight_decay, damping, steps

    def original(self, removed: int) -> dict[str, Any]:
        losses = F.cross_entropy(_logits(self.features, self.weight, self.bias), self.labels, reduction="none").double()
        norm = sum(float(p.double().square().sum()) for p in (self.weight, self.bias) if p is not None)
        objective = float(losses[self.labels != removed].sum()) / len(losses) + self.weight_decay / 2 * norm
        return {**self.measured(removed, self.weight, self.bias), "objective": objective}

    def retrained_head(self, removed: int) -> dict[str, Any]:
        began = time.perf_counter()
        members = self.members(removed)
        head = optimal_head(self.features, self.labels, self.weight, self.bias, members, weight_decay=self.weight_decay)
        return {
            **self.measured(removed, **head.parameters),
            "objective": head.objective,
            "gradient_norm": head.gradient_norm,
            "seconds": time.perf_counter() - began,
        }

    def run(
        self, sampler: Sampler, k: int, seed: int, original: Mapping[str, Any], optimum: float
    ) -> list[dict[str, Any]]:
        """One row per step: one removal of one class with one seed."""
        removed = original["class"]
        members = self.members(removed)
        rows: list[dict[str, Any]] = []
        for step in head_steps(
            self.features,
            self.labels,
            self.weight,
            self.bias,
            members,
            subset=partial(sampler, k=min(k, len(self.labels) - len(members))),
            steps=self.steps,
            damping=self.damping,
            weight_decay=self.weight_decay,
            generator=torch.Generator().manual_seed(seed * 1_000_003 + removed),
        ):
            metrics = self.measured(removed, **step.parameters)
            rows.append(
                {
                    **metrics,
                    "seed": seed,
                    "step": step.step,
                    "objective": step.objective,
                    "excess": step.objective - optimum,
                    "gradient_norm": step.gradient_norm,
                    "step_size": step.step_size["head"],
                    "seconds": step.seconds,
                    "peak_bytes": step.peak_bytes,
                    "stopped": False,
                }
            )
        last = rows[-1] if rows else {**original, "seed": seed, "excess": original["objective"] - optimum}
        rest = {"step_size": 0.0, "seconds": 0.0, "peak_bytes": 0, "stopped": True}
        return rows + [{**last, **rest, "step": step} for step in range(len(rows) + 1, self.steps + 1)]

    def measured(self, removed: int, weight: Tensor, bias: Tensor | None = None) -> dict[str, Any]:
        logits = _logits(self.held_features, weight, bias)
        return {"class": removed, **measure(logits, self.held_labels, removed)}

    def members(self, removed: int) -> Tensor:
        return (self.labels == removed).nonzero().flatten()


def _logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """features [m, d] through the head, in the features' dtype."""
    return F.linear(features, weight.to(features.dtype), None if bias is None else bias.to(features.dtype))


def _spread(
    what: str, tasks: Sequence[Task], work: Callable[[Task], Any], ranks: Ranks, unit: str = "", progress: bool = False
) -> Iterator[tuple[Task, Any]]:
    """What came of each task, in their order. Of several ranks each does one at a time, on its own, and all see what
    came of all: a rank that ends takes no more with it than its round."""
    with tqdm(total=len(tasks), desc=what, unit=unit, disable=not progress, leave=False) as bar:
        for begin in range(0, len(tasks), ranks.world):
            some, own = tasks[begin : begin + ranks.world], None
            if ranks.rank < len(some):
                with apart():
                    own = work(some[ranks.rank])
            for task, made in zip(some, ranks.meet(what, own), strict=False):
                yield task, made
                bar.update()


def _retrained(
    retrain: Callable[[Tensor], nn.Module],
    labels: Tensor,
    held_labels: Tensor,
    test: Any,
    head: str | None,
    device: torch.device | str | None,
    removed: int,
) -> dict[str, Any]:
    began = time.perf_counter()
    network = retrain((labels != removed).nonzero().flatten())
    seconds = time.perf_counter() - began
    logits = extract(network, test, head=head, device=device, progress=False).logits
    return {"class": removed, **measure(logits, held_labels, removed), "seconds": seconds}


def _compared(
    removed: Removed,
    model: nn.Module,
    k: int,
    label: int,
    seed: int,
    held_labels: Tensor,
    test: Any,
    head: str | None,
    device: torch.device | str | None,
) -> dict[str, Any]:
    """The baseline's row: of one step, without an objective, since more than the head may have moved."""
    network = copy.deepcopy(model)
    network.load_state_dict(removed.state)
    logits = extract(network, test, head=head, device=device, progress=False).logits
    return {
        "sampler": "baseline",
        "k": k,
        "class": label,
        "seed": seed,
        "step": 1,
        **measure(logits, held_labels, label),
        "objective": None,
        "excess": None,
        "step_size": removed.step_size,
        "seconds": removed.seconds,
        "peak_bytes": removed.peak_bytes,
    }


def _check_examples(name: str, labels: Tensor, classes: Iterable[int]) -> None:
    """Each class to remove needs examples, and so does what is left without it."""
    for label in classes:
        members = int((labels == label).sum())
        if members in (0, len(labels)):
            raise ValueError(f"class {label} has {members} of the {len(labels)} {name} examples: nothing to compare")


def _labelled(name: str, extracted: Extracted) -> tuple[Tensor, Tensor]:
    """Features and labels of the data."""
    if extracted.labels is None:
        raise ValueError(f"class_removal: the {name} data has no labels")
    return extracted.features, extracted.labels


def _draws(sampler: Sampler) -> bool:
    return "generator" in inspect.signature(sampler).parameters


def _finished(out: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The results in `out`, where the job with these settings has been finished there."""
    path = out / "results.json"
    if (out / "rows.jsonl").exists() or not path.exists():
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        found = {name: results["meta"].get(name) for name in settings}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(path, f"it is not a results file of class_removal: {error!r}") from error
    if results["meta"].get(CHECKSUM) != _checksum(results):
        raise Damaged(path, "its checksum does not fit what it holds")
    refuse_differences(path, found, settings)
    return results


def _checksum(results: Mapping[str, Any]) -> str:
    """Of all of the results but itself."""
    meta = {name: value for name, value in results["meta"].items() if name != CHECKSUM}
    return checksum(canonical({**results, "meta": meta}))
