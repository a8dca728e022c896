"""Trained networks, each kept in a safetensors file as soon as it is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from tqdm import tqdm

from fastif.data.checksums import checksum
from fastif.evaluation.trainings import Task, Trainings
from fastif.files import Damaged, sealed, unsealed, whole, write_whole
from fastif.journal import refuse_differences


def packed(model: nn.Module) -> bytes:
    """The model's state as a safetensors file."""
    return save({name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()})


def train_networks(
    trainings: Trainings,
    tasks: list[Task],
    what: str,
    progress: bool,
    folder: Path | None = None,
    settings: Any = None,
    resume: bool = False,
) -> tuple[dict[int, dict[str, Tensor]], dict[int, float | None]]:
    """Each task's state dict, and the seconds of its training, by number; `trainings.look` must be `packed`.

    With a folder, which must be locked, each network is kept in a file of it, and what is there is not trained again.

    Args:
        what: the networks are, for the progress bar.
        settings: of the job, as JSON: of a job with others nothing is taken.

    Raises ValueError for a weight that is not finite, for networks that are there without `resume` and for other
    settings; `Damaged` for a file that has changed.
    """
    states: dict[int, dict[str, Tensor]] = {}
    took: dict[int, float | None] = {}  # None: by a version that did not note it
    if folder is not None:
        _take_up(folder, settings, tasks, states, took, resume)
    todo = [task for task in tasks if task.number not in states]
    bar = tqdm(total=len(tasks), initial=len(states), desc=what, unit="network", disable=not progress)
    with bar:
        for task, data, seconds in trainings.run(todo):
            state = load(data)
            broken = [name for name, value in state.items() if not value.isfinite().all()]
            if broken:
                raise ValueError(
                    f"{trainings.op}: {broken[0]} of network {task.number} (seed {task.seed}) is not finite: its "
                    "training diverged"
                )
            if folder is not None:
                _keep(folder, task, data, state, seconds, settings)
            states[task.number], took[task.number] = state, seconds
            bar.update()
    return states, took


def _keep(folder: Path, task: Task, data: bytes, state: dict[str, Tensor], seconds: float, settings: Any) -> None:
    """The network's file, and then a note beside it of what it holds: a file without its note is trained again."""
    path = _path(folder, task)
    with whole(path, len(data)) as unfinished:
        unfinished.write_bytes(data)
    note = sealed({"settings": settings, "network": task.number, "tensors": _checksums(state), "seconds": seconds})
    write_whole(path.with_suffix(".json"), json.dumps(note))


def _take_up(
    folder: Path,
    settings: Any,
    tasks: list[Task],
    states: dict[int, dict[str, Tensor]],
    took: dict[int, float | None],
    resume: bool,
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
        states[task.number], took[task.number] = state, found.get("seconds")


def _path(folder: Path, task: Task) -> Path:
    return folder / f"network-{task.number:03d}.safetensors"


def _checksums(state: dict[str, Tensor]) -> dict[str, int]:
    return {name: checksum(value) for name, value in state.items()}
