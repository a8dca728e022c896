"""Trained networks, each kept in a safetensors file as soon as it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastif.data.tensor_files import load_tensors, save_tensors
from fastif.evaluation.trainings import Task, Trainings
from fastif.files import Damaged
from fastif.journal import refuse_differences
from fastif.progress import tqdm
from fastif.ranks import find_ranks


def packed(model: nn.Module) -> bytes:
    """The model's state as a safetensors file."""
    from safetensors.torch import save

    return save({name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()})


def train_networks(
    trainings: Trainings,
    tasks: list[Task],
    what: str,
    progress: bool,
    folder: Path | None = None,
    settings: Any = None,
    resume: bool = False,
) -> tuple[dict[int, dict[str, Tensor]], dict[int, float]]:
    """Each task's state dict, and the seconds of its training, by number; `trainings.look` must be `packed`.

    With a folder, which must be locked, each network is kept in a file of it, and what is there is not trained again.
    Several ranks train a network each at a time, and the first of them writes.

    Args:
        what: the networks are, for the progress bar.
        settings: of the job, as JSON: of a job with others nothing is taken.

    Raises ValueError for a weight that is not finite, for networks that are there without `resume` and for other
    settings; `Damaged` for a file that has changed.
    """
    from safetensors.torch import load

    states: dict[int, dict[str, Tensor]] = {}
    took: dict[int, float] = {}
    if folder is not None:
        _take_up(folder, settings, tasks, states, took, resume)
    ranks = find_ranks()
    ranks.meet("what is trained", sorted(states))  # before the first one writes
    progress = progress and ranks.rank == 0
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
            if folder is not None and ranks.rank == 0:
                about = {"network": task.number, "seconds": seconds, "settings": settings}
                save_tensors(_path(folder, task), state, about)
            states[task.number], took[task.number] = state, seconds
            bar.update()
    return states, took


def _take_up(
    folder: Path,
    settings: Any,
    tasks: list[Task],
    states: dict[int, dict[str, Tensor]],
    took: dict[int, float],
    resume: bool,
) -> None:
    """Takes the networks that are in the folder."""
    for task in tasks:
        path = _path(folder, task)
        if not path.exists():
            continue
        if not resume:
            raise ValueError(f"{folder} holds networks already; resume the job, or remove the folder")
        about, state = load_tensors(path)
        if about.get("network") != task.number:
            raise Damaged(path, f"it is network {about.get('network')}'s")
        refuse_differences(folder, about["settings"], settings)
        states[task.number], took[task.number] = state, about["seconds"]


def _path(folder: Path, task: Task) -> Path:
    return folder / f"network-{task.number:03d}.safetensors"
