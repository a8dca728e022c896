"""Retraining: what the queries' measurements really are once examples are gone. Every other evaluation rests on it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastif.data.batches import as_loader, batch_length, moved_to
from fastif.evaluation.settings import check_seeds
from fastif.evaluation.trainings import Task, TrainFn, Trainings
from fastif.files import Damaged, sealed, unsealed, write_whole
from fastif.fingerprints import VERSIONS, described, fingerprint, tensors_in
from fastif.influence.shared_folder import held
from fastif.journal import Journal, Key, refuse_differences
from fastif.model.calls import call
from fastif.model.losses import Loss, Measurement, check_loss, check_measurement, labels_in, measured
from fastif.progress import tqdm
from fastif.ranks import find_ranks


class Retrained(NamedTuple):
    """The queries' measurements under networks that were trained on parts of the data."""

    kept: list[Tensor]  # int64: the examples that each network was trained on, ascending
    seeds: list[int]
    values: Tensor  # float64 [sets, seeds, q]
    seconds: Tensor  # float64 [sets, seeds]: wall clock of each retraining


def retrain(
    train_fn: TrainFn,
    kept: Iterable[Tensor],
    query: Any,
    *,
    loss: Loss = "cross_entropy",
    measurement: Measurement = "loss",
    seeds: int | Iterable[int] = 1,
    processes: int = 1,
    threads: int = 1,
    batch_size: int = 256,
    out: str | Path | None = None,
    resume: bool = False,
    key: str | None = None,
    progress: bool = True,
) -> Retrained:
    """Trains a network on each set of examples with each seed, and measures the queries on it.

    Args:
        train_fn: (indices int64 ascending, seed) → the network trained on these examples alone. torch's global
            generator is seeded with `seed` before each call and is afterwards what it was; other randomness is
            train_fn's own to seed. With processes > 1 it must be picklable: a function of a module, or a
            `functools.partial` of one that holds the data.
        kept: for each retraining the examples that stay, int64, distinct, at least one.
        query: labelled data as `fastif.data.as_loader` takes it.
        loss, measurement: what is measured of each query, as for `fastif.Influence`.
        seeds: a number of seeds or the seeds; every set is trained with each.
        processes: networks trained at a time, each in a process of its own where there are several. A script that
            asks for several needs the guard `if __name__ == "__main__":`.
        threads: CPU threads of each retraining. It does not follow `processes`, because sums may round differently
            with other numbers of threads: so the same bits come out whatever the number of processes.
        out: a folder that keeps what is finished, retraining by retraining; all of it is then in `retrained.json`.
            Without resume, a folder that holds a job is refused, and always one that another process writes to.
        resume: take from `out` what is there, of an interrupted job or of a finished one. Refused where the sets, the
            seeds, the queries, train_fn (its code, and all that it closes over, is bound to and reads), the number of
            threads or the versions of fastif, torch and Python are others.
        key: with out=, a name of your own for what cannot be fingerprinted, of which an error tells; change it
            whenever that changes.

    Raises ValueError for a set that is empty, repeats an index or holds a negative one, for a measurement that is not
    finite, with set, seed and query; TypeError for a train_fn that returns no nn.Module, or cannot be pickled.
    """
    check_loss(loss)
    check_measurement(measurement, loss)
    trainings = Trainings("retrain", train_fn, _Measuring(query, loss, measurement, batch_size), processes, threads)
    trainings.check()
    if isinstance(query, Iterator):
        raise ValueError("retrain: query is an iterator, empty after one pass; pass a list, a Dataset or a DataLoader")
    if key is not None and out is None:
        raise ValueError(f"retrain: key={key!r} needs out=, the folder of the job")
    seeds = check_seeds(seeds)
    kept = [_checked(number, indices) for number, indices in enumerate(kept)]
    if not kept:
        raise ValueError("retrain: there must be at least one set to train on")
    ranks = find_ranks()
    progress = progress and ranks.rank == 0
    if out is None:
        with ranks.together("retrain"):
            ranks.compare("retrain", {"kept": fingerprint(kept), "seeds": seeds, "threads": threads})
            return _assembled(kept, seeds, _run_missing(trainings, kept, seeds, {}, progress))
    settings = {
        "train_fn": described(train_fn, "train_fn", key),
        "kept": fingerprint(kept),
        "sets": len(kept),
        "seeds": seeds,
        "query": fingerprint(part for x, y in as_loader(query, batch_size) for part in tensors_in((x, y))),
        "loss": described(loss, "loss", key),
        "measurement": described(measurement, "measurement", key),
        "threads": threads,
        "key": key,
        **VERSIONS,
    }
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with ranks.together("retrain"), held(folder, ranks):
        ranks.compare("retrain", settings)
        if (records := _finished(folder, settings, resume)) is not None:
            return _assembled(kept, seeds, records)
        journal = Journal(folder / "retrained.jsonl", settings, resume) if ranks.rank == 0 else None  # one writes
        (found, *_) = ranks.meet("what is retrained", None if journal is None else journal.found("retrained"))
        records = _run_missing(trainings, kept, seeds, found, progress, journal)
        if journal is not None:
            document = sealed({"settings": settings, "retrained": [*records.values()]})
            write_whole(folder / "retrained.json", json.dumps(document))
            journal.finish()
    return _assembled(kept, seeds, records)


def without(n: int, removed: Iterable[int] | Tensor) -> Tensor:
    """The examples of [0, n) that stay when `removed` go, ascending.

    >>> without(5, [3, 1])
    tensor([0, 2, 4])

    Raises ValueError for an index outside [0, n) or named twice, and where nothing stays.
    """
    gone = torch.as_tensor(removed if isinstance(removed, Tensor) else list(removed)).detach().cpu().reshape(-1)
    if len(gone) and (gone.is_floating_point() or gone.dtype == torch.bool):
        raise TypeError(f"without: indices must be integers, got {gone.dtype}")
    gone = gone.long()
    outside = gone[(gone < 0) | (gone >= n)]
    if len(outside):
        raise ValueError(f"without: indices must be in [0, n={n}), got {int(outside[0])}")
    values, counts = gone.unique(return_counts=True)
    if len(values) < len(gone):
        raise ValueError(f"without: index {int(values[counts > 1][0])} is removed twice")
    if len(gone) == n:
        raise ValueError(f"without: all n={n} examples are removed, nothing stays to train on")
    stays = torch.ones(n, dtype=torch.bool)
    stays[gone] = False
    return stays.nonzero()[:, 0]


class _Measuring(NamedTuple):
    """Measures the queries on a network."""

    query: Any
    loss: Any
    measurement: Any
    batch_size: int

    def __call__(self, model: nn.Module) -> list[float]:
        """[q], in eval mode."""
        model.eval()
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        values: list[Tensor] = []
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for x, y in as_loader(self.query, self.batch_size):
                n, x, y = batch_length(x), moved_to(x, device), moved_to(y, device)
                found = measured(self.measurement, self.loss, call(model, x), labels_in(x, y), n)
                values.append(found.detach().double().cpu())
        return torch.cat(values).tolist()


def _run_missing(
    trainings: Trainings,
    kept: list[Tensor],
    seeds: list[int],
    found: Mapping[Key, Any],
    progress: bool,
    journal: Journal | None = None,
) -> dict[Key, Any]:
    """What each retraining gave, by set and seed: those that are not found are run, and kept in the journal."""
    wanted = [(number, seed) for seed in seeds for number in range(len(kept))]
    records = {key: found[key] for key in wanted if key in found}
    todo = [Task(number, kept[number], seed) for number, seed in wanted if (number, seed) not in records]
    bar = tqdm(total=len(wanted), initial=len(records), desc="retrain", unit="network", disable=not progress)
    with bar:
        for task, values, seconds in trainings.run(todo):
            broken = [query for query, value in enumerate(values) if not math.isfinite(value)]
            if broken:
                raise ValueError(
                    f"retrain: the network of set {task.number}, seed {task.seed} gives query {broken[0]} a "
                    f"measurement of {values[broken[0]]}; it must be finite"
                )
            record = {"set": task.number, "seed": task.seed, "values": values, "seconds": seconds}
            records[task.number, task.seed] = record
            if journal is not None:
                journal.append("retrained", record, (task.number, task.seed))
            bar.update()
    return records


def _checked(number: int, indices: Tensor) -> Tensor:
    """The examples of a set, ascending."""
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.dim() != 1:
        got = f"{indices.dtype} {list(indices.shape)}" if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"retrain: set {number} must be indices, int64 [k], got {got}")
    if not len(indices):
        raise ValueError(f"retrain: set {number} keeps no example")
    indices = indices.detach().cpu().sort().values
    if int(indices[0]) < 0:
        raise ValueError(f"retrain: indices must be >= 0, set {number} has {int(indices[0])}")
    twice = indices[1:][indices[1:] == indices[:-1]]
    if len(twice):
        raise ValueError(f"retrain: indices must be distinct, set {number} has {int(twice[0])} twice")
    return indices


def _assembled(kept: list[Tensor], seeds: list[int], records: Mapping[Key, Any]) -> Retrained:
    ordered = [[records[number, seed] for seed in seeds] for number in range(len(kept))]
    values = torch.tensor([[record["values"] for record in row] for row in ordered], dtype=torch.float64)
    seconds = torch.tensor([[record["seconds"] for record in row] for row in ordered], dtype=torch.float64)
    return Retrained(kept, seeds, values, seconds)


def _finished(folder: Path, settings: Mapping[str, Any], resume: bool) -> dict[Key, Any] | None:
    """The records of the job with these settings, where it has been finished there."""
    path = folder / "retrained.json"
    if (folder / "retrained.jsonl").exists() or not path.exists():
        return None
    if not resume:
        raise ValueError(f"{path} holds a finished job; resume it, or remove the file")
    try:
        stored = unsealed(path.read_text(encoding="utf-8", errors="replace"))
        found, records = stored["settings"], {(r["set"], r["seed"]): r for r in stored["retrained"]}
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(path, str(error)) from error
    refuse_differences(path, found, settings)
    return records
