"""Logs and models: whether they fit together, and what ranks tell one another of theirs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastif.files import checksum
from fastif.fingerprints import VERSIONS, fingerprint, told_function
from fastif.replay.log import TrainingLog
from fastif.replay.path import Path


def check_logs(op: str, logs: TrainingLog | Sequence[TrainingLog], model: nn.Module) -> list[TrainingLog]:
    """The logs, where they are of the model's architecture, and a single one is of the model itself."""
    found = [logs] if isinstance(logs, TrainingLog) else list(logs)
    if not found or not all(isinstance(log, TrainingLog) for log in found):
        raise ValueError(f"{op}: logs must be a TrainingLog or several")
    for number, log in enumerate(found):
        _check_fits(op, f"log {number}" if len(found) > 1 else "the log", log, model)
    if len(found) == 1:
        _check_weights(op, found[0], model)
    return found


def _check_fits(op: str, what: str, log: TrainingLog, model: nn.Module) -> None:
    _ = log.final  # raises where nothing was recorded
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    difference = log.layout.first_difference(shapes)
    if difference is not None:
        raise ValueError(f"{op}: {what} is of another model: {difference}")
    dtypes = {value.dtype for name, value in model.named_parameters() if name in log.layout.names}
    if dtypes != {log.dtype}:
        raise ValueError(f"{op}: {what} is of {log.dtype}, the model is {', '.join(map(str, dtypes))}")


def _check_weights(op: str, log: TrainingLog, model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    for name, value in log.layout.split(log.final.at).items():
        if not torch.equal(parameters[name].detach().cpu(), value.cpu()):
            away = float((parameters[name].detach().cpu() - value.cpu()).abs().max())
            raise ValueError(
                f"{op}: the model is not what the log ended with: {name!r} differs by up to {away:.3g}; load its "
                "weights (log.parameters()), or record the training again"
            )


def tell_replay(replay: Any, paths: Sequence[Path]) -> dict[str, Any]:
    """What a `Replay` was given but for the data, and the versions it runs with."""
    return {
        **{f"version of {name}": version for name, version in VERSIONS.items()},
        "kind of device": paths[0].device.type,
        "number of threads": torch.get_num_threads(),
        "loss": told_function(replay.loss),
        "measurement": told_function(replay.measurement),
        **{name: getattr(replay, name) for name in ("matrix", "crossed", "memory", "max_growth", "seed")},
        "batch_size": replay.train.batch_size,
        "queries_at_a_time": paths[0].network.at_a_time,
        "model": tell_model(replay.model),
        "number of logs": len(paths),
        **{f"log {number}": tell_log(path.log) for number, path in enumerate(paths)},
    }


def tell_log(log: TrainingLog) -> str:
    """A digest of a log's steps, of its end and of what was constant. Checkpoints are not read for it: they are held
    against these when the training is computed again."""
    steps = log.steps
    tensors = [
        torch.tensor([len(step.rows) for step in steps]),
        torch.cat([step.rows for step in steps]),
        *(step.weights for step in steps if step.weights is not None),
        torch.tensor([step.numbers for step in steps], dtype=torch.float64),
        torch.stack([step.norm.cpu() for step in steps]),
        log.final.at,
        *log.final.state,
        *log.constants.values(),
    ]
    weighed = [number for number, step in enumerate(steps) if step.weights is not None]
    words = (log.rule.name, log.every, log.modes, tuple(log.layout), tuple(log.constants), weighed)
    return checksum(repr(words), fingerprint(tensors))


def tell_model(model: nn.Module) -> str:
    """A digest of a model's modules and of the shapes of its state: a replay takes the numbers from the logs."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = (f"{name} {list(value.shape)} {value.dtype}" for name, value in tensors.items())
    return checksum(re.sub(" at 0x[0-9a-f]+", "", repr(model)), *shapes)  # addresses differ from process to process
