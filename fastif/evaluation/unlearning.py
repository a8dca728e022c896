"""Unlearning: methods that remove training examples, against networks retrained without them. docs/math.md (29)."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from fastif.evaluation.membership import u_lira
from fastif.evaluation.network_files import packed, train_networks
from fastif.evaluation.retraining import without
from fastif.evaluation.settings import check_seeds
from fastif.evaluation.trainings import Task, TrainFn, Trainings
from fastif.evaluation.unlearned import (
    DEFINITIONS,
    METRICS,
    Data,
    Outputs,
    compare,
    logits_in_batches,
    outputs_of,
    relearn,
)
from fastif.files import Damaged, sealed, unsealed, write_whole
from fastif.fingerprints import VERSIONS, described, described_model, fingerprint
from fastif.folder_lock import locked
from fastif.influence.networks import Networks, are_halves
from fastif.journal import Journal, refuse_differences
from fastif.measure import Measure, environment
from fastif.model.losses import log_odds
from fastif.progress import tqdm

UnlearnFn = Callable[[nn.Module, Data, Tensor, int], "nn.Module | Mapping[str, Tensor]"]

BEFORE, RETRAINED = "nothing removed", "retrained"  # rows of the table that are no methods


def unlearning(
    model: nn.Module,
    train_fn: TrainFn,
    train: Data,
    removed: Tensor,
    held_out: Data,
    methods: Mapping[str, UnlearnFn],
    *,
    seeds: int | Iterable[int] = 3,
    networks: Networks | None = None,
    relearning_lr: float = 0.01,
    relearning_steps: int = 100,
    batch_size: int = 1024,
    processes: int = 1,
    threads: int = 1,
    out: str | Path | None = None,
    resume: bool = False,
    key: str | None = None,
    progress: bool = True,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Removes `removed` from trained networks by each method, and compares with networks retrained without them.

    For each seed one network is trained on all examples and one without the removed; every method takes the first of
    them to a network of its own. No method sees held-out examples.

    Args:
        model: of the architecture that train_fn returns, for its networks' states; its own weights are not looked at.
        train_fn: (indices int64 ascending, seed) → the network trained on these examples alone, as for `retrain`.
        train: x [n, ...] and y int64 [n], what train_fn's indices count.
        removed: int64 [r], at least two.
        held_out: x and y of examples that nobody trains on, some of the removed ones' labels.
        methods: by name, functions (model, (x, y), removed, seed) → the network or its state dict without the examples
            `removed` of x and y, on which the model was trained. The model is a copy, theirs to change. Beside
            `fastif.remove` there are those of `fastif.evaluation.baselines`. torch's generator is seeded with `seed`
            before each call. No name may be "nothing removed" or "retrained": these rows are always there.
        seeds: a number of seeds or the seeds, which train_fn and the methods get.
        networks: of `train_halves` with the same train_fn, as shadows for U-LiRA: from each the methods remove those of
            the examples that it was trained on. Nothing is trained twice.
        relearning_lr, relearning_steps: of plain SGD on the removed examples, and the most steps of it.
        batch_size: of passes that measure.
        processes, threads, key, progress: as for `retrain`.
        out: a folder that keeps each network, and each run as soon as it is finished; in the end `results.json`.
        resume: take from `out` what is there. Refused where data, settings, train_fn or methods are others.
        about: is added to `meta`.

    Returns a dict, all of it JSON: `rows` (one per method and seed), `summary` (one per method: mean and standard
    deviation over the seeds of each metric), `u_lira` (one per method, with networks), `by_example` (losses of the
    removed examples by method, of the first seed) and `meta`, with `definitions` of every entry.

    Raises ValueError for what cannot be: indices outside, repeated or all, no held-out examples of the removed labels,
    networks that are not halves of these n examples, or of which no pair saw a removed example on both sides, methods
    whose networks are not finite; for a folder with another job, with the differences; TypeError for methods that
    return neither a network nor a state dict.
    """
    x, y = _checked_data("train", train)
    held_out = _checked_data("held_out", held_out)
    kept = without(len(y), removed)
    removed = _complement(kept, len(y))
    if len(removed) < 2:
        raise ValueError("unlearning: removed must be at least two examples: one alone has no AUC")
    if int(torch.isin(held_out[1], y[removed].unique()).sum()) < 2:
        raise ValueError("unlearning: held_out must hold at least two examples of the removed ones' labels")
    _check_methods(methods)
    if networks is not None:
        _check_networks(networks, len(y))
    for name, value in (("relearning_lr", relearning_lr), ("relearning_steps", relearning_steps)):
        if not 0 < value < math.inf:
            raise ValueError(f"unlearning: {name} must be a finite number > 0, got {value!r}")
    seeds = check_seeds(seeds)
    if key is not None and out is None:
        raise ValueError(f"unlearning: key={key!r} needs out=, the folder of the job")
    trainings = Trainings("unlearning", train_fn, packed, processes, threads)
    trainings.check()
    tasks = [Task(number, torch.arange(len(y)), seed) for number, seed in enumerate(seeds)]
    tasks += [Task(len(seeds) + number, kept, seed) for number, seed in enumerate(seeds)]
    settings: dict[str, Any] = {
        "methods": [*methods],
        "seeds": seeds,
        "removed": len(removed),
        "n": len(y),
        "held_out": len(held_out[1]),
        "relearning_lr": relearning_lr,
        "relearning_steps": relearning_steps,
        "networks": None if networks is None else fingerprint([*networks.kept, *_tensors(networks)]),
        "data": fingerprint([x, y, *held_out, removed]),
        "threads": threads,
        **VERSIONS,
    }
    if out is not None:
        settings["train_fn"] = described(train_fn, "train_fn", key)
        settings["model"] = described_model(model, key)
        settings["code"] = {name: described(method, f"the method {name}", key) for name, method in methods.items()}
        settings["key"] = key
        out = Path(out)
        (out / "networks").mkdir(parents=True, exist_ok=True)
    with nullcontext() if out is None else locked(out):
        if out is not None and (finished := _finished(out, settings, resume)) is not None:
            return finished
        journal = Journal(None if out is None else out / "rows.jsonl", settings, resume)
        folder = None if out is None else out / "networks"
        about_training = {name: settings[name] for name in ("data", "seeds", "train_fn", "key") if name in settings}
        states, took = train_networks(trainings, tasks, "networks", progress, folder, about_training, resume)
        how = relearning_lr, relearning_steps, batch_size
        job = _Job(model, tasks, states, took, (x, y), removed, held_out, *how)
        rows, losses = job.rows(methods, seeds, journal, progress)
        shadows = [] if networks is None else job.shadows(methods, networks, seeds[0], journal, progress)
        results = {
            "meta": {
                **settings,
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                **environment(job.device),
                **(about or {}),
                "definitions": DEFINITIONS,
            },
            "rows": rows,
            "summary": summarise(rows),
            "u_lira": shadows,
            "by_example": losses,
        }
        results = json.loads(json.dumps(results, allow_nan=False))
        if out is not None:
            write_whole(out / "results.json", json.dumps(sealed({"settings": settings, "results": results}), indent=1))
            journal.finish()
    return results


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds of each metric, method by method; None where a seed has none."""
    summary: list[dict[str, Any]] = []
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        entry: dict[str, Any] = {"method": name, "runs": len(own), "relearned": all(row["relearned"] for row in own)}
        for metric in METRICS:
            values = [row[metric] for row in own]
            known = None not in values
            entry[f"{metric}_mean"] = fmean(values) if known else None
            entry[f"{metric}_std"] = stdev(values) if known and len(values) > 1 else None
        summary.append(entry)
    return summary


class _Job:
    """The networks before and after retraining, and what they say of each part."""

    def __init__(
        self,
        model: nn.Module,
        tasks: Sequence[Task],
        states: Mapping[int, Mapping[str, Tensor]],
        took: Mapping[int, float | None],
        train: Data,
        removed: Tensor,
        held_out: Data,
        lr: float,
        most: int,
        batch_size: int,
    ):
        self.train, self.removed, self.lr, self.most, self.batch_size = train, removed, lr, most, batch_size
        kept = tasks[-1].kept
        self.parts = {
            "removed": (train[0][removed], train[1][removed]),
            "retained": (train[0][kept], train[1][kept]),
            "held_out": held_out,
        }
        seeds = len(tasks) // 2
        self.states, self.took = states, [took[number] for number in range(seeds, 2 * seeds)]
        self.model = copy.deepcopy(model)
        self.device = next(self.model.parameters()).device
        self.before = [self._outputs(states[number]) for number in range(seeds)]
        self.after = [self._outputs(states[number]) for number in range(seeds, 2 * seeds)]

    def rows(
        self, methods: Mapping[str, UnlearnFn], seeds: Sequence[int], journal: Journal, progress: bool
    ) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
        """One per method and seed; and the removed examples' losses by method, of the first seed."""
        found = journal.found("row")
        names = [BEFORE, RETRAINED, *methods]
        runs = [(name, number) for number in range(len(seeds)) for name in names]
        for name, number in tqdm(runs, "unlearning", unit="run", disable=not progress, leave=False):
            if (name, seeds[number]) not in found:
                row = {"method": name, "seed": seeds[number], **self._row(name, methods.get(name), number, seeds)}
                journal.append("row", row, (name, seeds[number]))
                found[name, seeds[number]] = row
        ordered = [dict(found[name, seed]) for name in names for seed in seeds]
        losses = {row["method"]: row["losses"] for row in ordered if row["seed"] == seeds[0]}
        losses[f"{BEFORE}: held out"] = self.before[0].losses("held_out").tolist()
        return [{name: value for name, value in row.items() if name != "losses"} for row in ordered], losses

    def _row(self, name: str, method: UnlearnFn | None, number: int, seeds: Sequence[int]) -> dict[str, Any]:
        others, seconds, peak = self.after, 0.0, 0
        if method is not None:
            before = self._network(self.states[number])
            state, seconds, peak = self._without(name, method, before, self.train, self.removed, seeds[number])
            own = self._outputs(state)
        elif name == RETRAINED:
            state, own = self.states[len(seeds) + number], self.after[number]
            others, seconds, peak = [o for o in self.after if o is not own], self.took[number], None
        else:
            state, own = self.states[number], self.before[number]
        row = compare(own, others)
        target = float(self.before[number].losses("removed").mean())
        steps, relearned = relearn(
            self._network(state), self.parts["removed"], target, lr=self.lr, most=self.most, seed=seeds[number]
        )
        known = [value for value in self.took if value is not None]
        share = seconds / fmean(known) if known and seconds is not None else None
        row |= {"relearning_steps": steps, "relearned": relearned, "seconds": seconds}
        return row | {"share_of_retraining": share, "peak_bytes": peak, "losses": own.losses("removed").tolist()}

    def shadows(
        self, methods: Mapping[str, UnlearnFn], networks: Networks, seed: int, journal: Journal, progress: bool
    ) -> list[dict[str, Any]]:
        """U-LiRA by method: each removes from each half network those of the examples that it was trained on."""
        found = journal.found("shadow")
        names = [BEFORE, *methods]
        runs = [(name, number) for number in range(len(networks.states)) for name in names]
        for name, number in tqdm(runs, "u_lira", unit="run", disable=not progress, leave=False):
            if (name, number) not in found:
                values = self._shadow(name, methods.get(name), networks, number, seed).tolist()
                journal.append("shadow", values, (name, number))
                found[name, number] = values
        trained_on = torch.stack([torch.isin(self.removed, kept) for kept in networks.kept])
        table: list[dict[str, Any]] = []
        for name in names:
            values = torch.tensor([found[name, n] for n in range(len(networks.states))], dtype=torch.float64)
            told = u_lira(values, trained_on)
            error = float(told.by_pair.std()) / math.sqrt(len(told.by_pair))
            entry = {"method": name, "auc": told.auc, "auc_error": error, "balanced_accuracy": told.balanced_accuracy}
            table.append({**entry, "by_example": told.by_example.tolist()})
        return table

    def _shadow(self, name: str, method: UnlearnFn | None, networks: Networks, number: int, seed: int) -> Tensor:
        state, kept = networks.states[number], networks.kept[number]
        own = torch.isin(kept, self.removed).nonzero()[:, 0]
        if method is not None and len(own):
            data = self.train[0][kept], self.train[1][kept]
            state, _, _ = self._without(name, method, self._network(state), data, own, seed)
        x, y = self.parts["removed"]
        return log_odds(logits_in_batches(self._network(state), x, self.batch_size), y.cpu())

    def _without(
        self, name: str, method: UnlearnFn, model: nn.Module, data: Data, removed: Tensor, seed: int
    ) -> tuple[Mapping[str, Tensor], float, int | None]:
        """The state dict that a method makes, and what it took."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            with torch.enable_grad(), Measure(self.device) as work:
                given = method(model, data, removed, seed)
        state = given.state_dict() if isinstance(given, nn.Module) else given
        if not isinstance(state, Mapping):
            raise TypeError(
                f"unlearning: {name!r} must return an nn.Module or a state dict, got {type(given).__name__}"
            )
        for entry, value in state.items():
            if not value.isfinite().all():
                raise ValueError(f"unlearning: {entry} of the network that {name!r} made is not finite")
        return state, work.seconds, work.peak_bytes

    def _network(self, state: Mapping[str, Tensor]) -> nn.Module:
        model = copy.deepcopy(self.model)
        model.load_state_dict(state)
        return model.eval()

    def _outputs(self, state: Mapping[str, Tensor]) -> Outputs:
        return outputs_of(self._network(state), self.parts, self.batch_size)


def _finished(out: Path, settings: Mapping[str, Any], resume: bool) -> dict[str, Any] | None:
    """The results of the job with these settings, where it has been finished there."""
    path = out / "results.json"
    if (out / "rows.jsonl").exists() or not path.exists():
        return None
    if not resume:
        raise ValueError(f"{path} holds a finished job; resume it, or remove the file")
    try:
        stored = unsealed(path.read_text(encoding="utf-8", errors="replace"))
        found, results = stored["settings"], stored["results"]
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(path, str(error)) from error
    refuse_differences(path, found, settings)
    return results


def _checked_data(name: str, data: Data) -> Data:
    pair = isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)
    if not pair or data[1].dtype != torch.int64 or data[1].dim() != 1 or len(data[0]) != len(data[1]):
        raise TypeError(f"unlearning: {name} must be a pair of tensors, x [n, ...] and labels y int64 [n]")
    return data[0], data[1]


def _check_methods(methods: Mapping[str, UnlearnFn]) -> None:
    for name, method in methods.items():
        if name in (BEFORE, RETRAINED):
            raise ValueError(f"unlearning: no method may be called {name!r}: that row is always there")
        if not callable(method):
            raise TypeError(f"unlearning: {name!r} must be a function (model, (x, y), removed, seed), got {method!r}")


def _check_networks(networks: Networks, n: int) -> None:
    if not isinstance(networks, Networks):
        raise TypeError(f"unlearning: networks must be fastif.Networks, got {type(networks).__name__}")
    outside = [int(kept.max()) for kept in networks.kept if len(kept) and int(kept.max()) >= n]
    if outside:
        raise ValueError(f"unlearning: networks were trained on other data: example {outside[0]} of n={n}")
    if not are_halves(networks.kept, n) or len(networks.kept) < 4:
        raise ValueError(
            f"unlearning: networks must be at least two pairs trained on complementary halves of the n={n} examples, "
            "as train_halves makes them: only then did each removed example have networks on both sides"
        )


def _tensors(networks: Networks) -> list[Tensor]:
    return [state[name] for state in networks.states for name in sorted(state)]


def _complement(kept: Tensor, n: int) -> Tensor:
    gone = torch.ones(n, dtype=torch.bool)
    gone[kept] = False
    return gone.nonzero()[:, 0]
