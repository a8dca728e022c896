"""What people do where they cannot retrain: unlearning methods to hold removals against, each in a few lines.

Each is a function (model, (x, y), removed, seed, *, settings) → state dict, for `fastif.evaluation.unlearning`: bind
the settings with `functools.partial`. The model may be changed. `tune` chooses settings on training data alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastif.evaluation.lissa_step import LiSSAStep
from fastif.evaluation.retraining import without
from fastif.evaluation.trainings import TrainFn
from fastif.evaluation.unlearned import Data
from fastif.evaluation.unlearning import UnlearnFn, unlearning
from fastif.model.calls import call
from fastif.model.features import extract
from fastif.model.losses import logits_of
from fastif.removal import remove
from fastif.samplers import random

State = dict[str, Tensor]


def newton_steps(model: nn.Module, data: Data, removed: Tensor, seed: int, **settings: Any) -> State:
    """`fastif.remove` with these settings, its generator seeded with `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return remove(model, data, removed, generator=generator, progress=False, **settings).state_dict


def fine_tuning(
    model: nn.Module,
    data: Data,
    removed: Tensor,
    seed: int,
    *,
    lr: float,
    epochs: int = 1,
    weight_decay: float = 5e-4,
    batch_size: int = 64,
) -> State:
    """Goes on training on the retained examples: SGD with momentum 0.9, in the hope that the others are forgotten."""
    x, y = data
    kept = without(len(y), removed)
    return _descended(
        model,
        (_cross_entropy(model, x[rows], y[rows]) for rows in _batches(kept, batch_size, epochs, seed)),
        lr,
        weight_decay,
    )


def neg_grad_plus(
    model: nn.Module,
    data: Data,
    removed: Tensor,
    seed: int,
    *,
    lr: float,
    alpha: float = 0.95,
    epochs: int = 1,
    weight_decay: float = 5e-4,
    batch_size: int = 64,
) -> State:
    """NegGrad+: descends α ℓ(retained) − (1 − α) ℓ(removed), batch by batch (Kurmanji et al. 2023)."""
    x, y = data
    again = _batches(removed, batch_size, None, seed + 1)

    def losses() -> Iterator[Tensor]:
        for rows in _batches(without(len(y), removed), batch_size, epochs, seed):
            gone = next(again)
            yield alpha * _cross_entropy(model, x[rows], y[rows]) - (1 - alpha) * _cross_entropy(
                model, x[gone], y[gone]
            )

    return _descended(model, losses(), lr, weight_decay)


def random_labels(
    model: nn.Module,
    data: Data,
    removed: Tensor,
    seed: int,
    *,
    lr: float,
    epochs: int = 1,
    weight_decay: float = 5e-4,
    batch_size: int = 64,
) -> State:
    """Goes on training on all, the removed with another label each, drawn at random (Graves et al. 2021)."""
    x, y = data
    c = int(y.max()) + 1
    wrong = y.clone()
    offsets = torch.randint(1, c, (len(removed),), generator=torch.Generator().manual_seed(seed)).to(y)
    wrong[removed] = (y[removed] + offsets) % c
    return _descended(
        model,
        (
            _cross_entropy(model, x[rows], wrong[rows])
            for rows in _batches(torch.arange(len(y)), batch_size, epochs, seed)
        ),
        lr,
        weight_decay,
    )


def ssd(
    model: nn.Module,
    data: Data,
    removed: Tensor,
    seed: int,
    *,
    alpha: float = 10.0,
    dampening: float = 1.0,
    batch_size: int = 128,
) -> State:
    """Selective synaptic dampening (Foster et al. 2024): parameters that matter to the removed more than to all shrink.

    With the mean squares D of all examples' gradients and D_r of the removed ones', each parameter with
    D_r > alpha · D is multiplied by min(1, dampening · D / D_r). Two passes, no training.
    """
    del seed
    everything, gone = (_squares(model, data, rows, batch_size) for rows in (torch.arange(len(data[1])), removed))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, own in gone.items():
        factor = (dampening * everything[name] / own).clamp(max=1)
        state[name] = torch.where(own > alpha * everything[name], factor * state[name], state[name])
    return state


def lissa(
    model: nn.Module, data: Data, removed: Tensor, seed: int, *, k: int, weight_decay: float = 5e-4, **settings: Any
) -> State:
    """One influence step of all parameters, its inverse by LiSSA from k retained examples at random (`LiSSAStep`)."""
    device = next(model.parameters()).device
    step = LiSSAStep(model, data, extract(model, data, progress=False), weight_decay, device=device, **settings)
    return step(removed, random, k, seed).state


def tune(
    candidates: Mapping[str, UnlearnFn],
    model: nn.Module,
    train_fn: TrainFn,
    train: Data,
    removed: Tensor,
    *,
    share: float = 0.2,
    seed: int = 0,
    **how: Any,
) -> str:
    """The candidate with the highest tug-of-war on training data alone, the first of several.

    A `share` of the training examples, drawn from `seed`, is set aside as held-out. A network is trained on the others
    and one without those of `removed` among them: examples like those that will be removed, but not these. The cost is
    two trainings and every candidate's. `model`, `train_fn`, `how`: as for `unlearning`.
    """
    x, y = train
    aside = torch.rand(len(y), generator=torch.Generator().manual_seed(seed)) < share
    part = (~aside).nonzero()[:, 0]
    gone = torch.isin(part, removed).nonzero()[:, 0]
    table = unlearning(
        model,
        lambda indices, own: train_fn(part[indices], own),
        (x[part], y[part]),
        gone,
        (x[aside], y[aside]),
        candidates,
        seeds=[seed],
        progress=False,
        **how,
    )
    found = {row["method"]: row["tug_of_war"] for row in table["rows"] if row["method"] in candidates}
    return max(found, key=lambda name: found[name])


def _cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    device = next(model.parameters()).device
    return F.cross_entropy(logits_of(call(model, x.to(device))), y.to(device))


def _batches(rows: Tensor, size: int, epochs: int | None, seed: int) -> Iterator[Tensor]:
    """Batches of the rows in an order of its own for each epoch; without end for None.

    A last batch of one example, which has no variance for batch norm, is left out.
    """
    draw, epoch = torch.Generator().manual_seed(seed), 0
    while epochs is None or epoch < epochs:
        parts = rows[torch.randperm(len(rows), generator=draw)].split(size)
        yield from parts if len(parts) == 1 else (part for part in parts if len(part) > 1)
        epoch += 1


def _descended(model: nn.Module, losses: Iterator[Tensor], lr: float, weight_decay: float) -> State:
    """The state after a step of SGD, with momentum 0.9, down each of the losses."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().state_dict()


def _squares(model: nn.Module, data: Data, rows: Tensor, batch_size: int) -> State:
    """By parameter, the mean over the rows of the squared gradients of their losses, in eval mode."""
    model = copy.deepcopy(model).eval()
    device = next(model.parameters()).device
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters: State, x: Tensor, y: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model, {**parameters, **buffers}, (x[None],))
        return F.cross_entropy(logits_of(outputs), y[None])

    each: Callable[..., State] = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for part in rows.split(batch_size):
        for name, grads in each(parameters, data[0][part].to(device), data[1][part].to(device)).items():
            total[name] += grads.square().sum(0)
    return {name: value / len(rows) for name, value in total.items()}
