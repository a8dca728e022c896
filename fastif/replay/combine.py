"""Several networks: whether their logs fit a model, and one row of scores from theirs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastif.replay.log import TrainingLog


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


def average(rows: list[Tensor]) -> Tensor:
    """s = median_k σ_k · mean_k(s_k/σ_k) of the networks' scores s_k [q, n], σ_k the standard deviation of each row.

    A row of one value all along says nothing and is taken as zero.
    """
    if len(rows) == 1:
        return rows[0]
    stacked = torch.stack(rows)
    spread = stacked.std(dim=2, correction=0)
    scaled = torch.where(spread[..., None] > 0, stacked / spread[..., None], 0.0)
    ordered = spread.sort(dim=0).values
    k = len(rows)
    median = (ordered[(k - 1) // 2] + ordered[k // 2]) / 2
    return median[:, None] * scaled.mean(0)


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
