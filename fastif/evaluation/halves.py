"""Networks trained on complementary random halves of the data, for scores averaged over them. docs/math.md (23)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from fastif.data.checksums import checksum
from fastif.evaluation.trainings import Task, TrainFn, Trainings
from fastif.files import Damaged, sealed, unsealed, whole, write_whole
from fastif.fingerprints import VERSIONS, described
from fastif.folder_lock import locked
from fastif.influence.networks import Networks
from fastif.journal import refuse_differences
from fastif.progress import tqdm

_SEEDS = 1 << 30, 1 << 31  # of the networks: far from the small numbers that an evaluation's seeds are


def train_halves(
    train_fn: TrainFn,
    n: int,
    pairs: int = 5,
    *,
    seed: int = 0,
    training_time: float | None = None,
    processes: int = 1,
    threads: int = 1,
    out: str | Path | None = None,
    resume: bool = False,
    key: str | None = None,
    progress: bool = True,
) -> Networks:
    """Trains pairs of networks, one on a random half of the examples and one on the other: for `Influence(networks=)`.

    Halves and seeds of the networks are drawn from `seed`; those of the networks are at least 2^30, so that they are
    none of an evaluation's. More pairs begin with the same ones.

    Args:
        train_fn: (indices int64 ascending, seed) → the network trained on these examples alone, as for `retrain`, with
            all that is said there of seeds and processes.
        n: training examples, at least 2.
        pairs: of networks.
        training_time: τ of each training, if it is known (`fastif.training_time`): the networks carry it.
        processes, threads, key, progress: as for `retrain`.
        out: a folder that keeps each network in a safetensors file as soon as it is trained.
        resume: take from `out` what is there. Refused where n, the seed, train_fn, the number of threads or the
            versions of fastif, torch and Python are others; another number of pairs goes on.

    Raises ValueError for n < 2 and pairs < 1, for a network with a weight that is not finite, and for a file in `out`
    that has changed (`fastif.files.Damaged`, which names it).
    """
    for name, value, least in (("n", n, 2), ("pairs", pairs, 1), ("seed", seed, 0)):
        if type(value) is not int or value < least:
            raise ValueError(f"train_halves: {name} must be an integer >= {least}, got {value!r}")
    if training_time is not None and not 0 < training_time < float("inf"):
        raise ValueError(f"train_halves: training_time must be a number > 0, got {training_time!r}")
    if key is not None and out is None:
        raise ValueError(f"train_halves: key={key!r} needs out=, the folder of the job")
    trainings = Trainings("train_halves", train_fn, _packed, processes, threads)
    trainings.check()
    tasks = draw_halves(n, pairs, seed)
    states: dict[int, dict[str, Tensor]] = {}
    if out is None:
        _train(trainings, tasks, states, progress)
    else:
        settings = {
            "train_fn": described(train_fn, "train_fn", key),
            "n": n,
            "seed": seed,
            "threads": threads,
            "key": key,
            **VERSIONS,
        }
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            _take_up(folder, settings, tasks, states, resume)
            _train(trainings, tasks, states, progress, folder, settings)
    return Networks([states[task.number] for task in tasks], [task.kept for task in tasks], training_time)


def draw_halves(n: int, pairs: int, seed: int) -> list[Task]:
    """Two trainings for each pair, on halves that together are all n examples."""
    draw = torch.Generator().manual_seed(seed)
    tasks: list[Task] = []
    for _ in range(pairs):
        order = torch.randperm(n, generator=draw)
        seeds = torch.randint(*_SEEDS, (2,), generator=draw).tolist()
        for half, own in zip((order[: n // 2], order[n // 2 :]), seeds, strict=True):
            tasks.append(Task(len(tasks), half.sort().values, own))
    return tasks


def _packed(model: nn.Module) -> bytes:
    """The model's state as a safetensors file."""
    return save({name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()})


def _train(
    trainings: Trainings,
    tasks: list[Task],
    states: dict[int, dict[str, Tensor]],
    progress: bool,
    folder: Path | None = None,
    settings: Any = None,
) -> None:
    """Adds the states that are missing, and keeps each in the folder."""
    todo = [task for task in tasks if task.number not in states]
    bar = tqdm(total=len(tasks), initial=len(states), desc="halves", unit="network", disable=not progress)
    with bar:
        for task, data, _ in trainings.run(todo):
            state = load(data)
            broken = [name for name, value in state.items() if not value.isfinite().all()]
            if broken:
                raise ValueError(
                    f"train_halves: {broken[0]} of network {task.number} (seed {task.seed}) is not finite: its "
                    "training diverged"
                )
            if folder is not None:
                _keep(folder, task, data, state, settings)
            states[task.number] = state
            bar.update()


def _keep(folder: Path, task: Task, data: bytes, state: dict[str, Tensor], settings: Any) -> None:
    """The network's file, and then a note beside it of what it holds: a file without its note is trained again."""
    path = _path(folder, task)
    with whole(path, len(data)) as unfinished:
        unfinished.write_bytes(data)
    note = sealed({"settings": settings, "network": task.number, "tensors": _checksums(state)})
    write_whole(path.with_suffix(".json"), json.dumps(note))


def _take_up(
    folder: Path, settings: Any, tasks: list[Task], states: dict[int, dict[str, Tensor]], resume: bool
) -> None:
    """Takes the networks that are in the folder."""
    for task in tasks:
        path = _path(folder, task)
        note = path.with_suffix(".json")
        if not note.exists():
            continue
        if not resume:
            raise ValueError(f"{folder} holds networks already; resume the job, or remove the folder")
        try:
            found = unsealed(note.read_text(encoding="utf-8", errors="replace"))
            theirs, checksums = found["settings"], found["tensors"]
        except (ValueError, KeyError) as error:
            raise Damaged(note, str(error)) from error
        refuse_differences(folder, theirs, settings)
        try:
            state = load(path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise Damaged(path, str(error), f"remove it and {note.name}, and resume the job") from error
        if _checksums(state) != checksums:
            why = "its tensors are not those that were written"
            raise Damaged(path, why, f"remove it and {note.name}, and resume the job")
        states[task.number] = state


def _path(folder: Path, task: Task) -> Path:
    return folder / f"network-{task.number:03d}.safetensors"


def _checksums(state: dict[str, Tensor]) -> dict[str, int]:
    return {name: checksum(value) for name, value in state.items()}
