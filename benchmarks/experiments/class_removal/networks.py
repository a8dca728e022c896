"""Training a network so that it can be cut off at any time: the same bits whether it was or not."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastif.data import Data
from fastif.evaluation.models import build
from fastif.evaluation.training import Checkpoint, Recipe, load_checkpoint, save_checkpoint
from fastif.files import whole


def network(
    path: Path, recipe: Recipe, data: str, images: Data, keep: Tensor, device: torch.device, *, bfloat16: bool = False
) -> nn.Module:
    """The network of `recipe` trained on the examples `keep`: read from the safetensors file `path`, or trained first.

    Unfinished epochs are in `path` with the suffix .partial, which the finished file replaces. On a GPU, and on a CPU
    where `bfloat16` says so, forward passes of training run in bfloat16.
    """
    channels, height, width = images.x_train.shape[1:]
    shape, classes = (channels, height, width), images.classes
    if path.exists():
        return load_checkpoint(path, {**recipe._asdict(), "data": data, "shape": shape}).model.to(device)
    model = build(recipe.architecture, shape, len(classes), width=recipe.width, seed=recipe.seed)
    x, y, partial = images.x_train[keep], images.y_train[keep], path.with_suffix(".partial")
    bfloat16 = bfloat16 or device.type == "cuda"
    _train(model, x, y, recipe, partial, device, augment=data == "cifar10", bfloat16=bfloat16)
    save_checkpoint(path, Checkpoint(model, recipe, data, classes, shape))
    partial.unlink(missing_ok=True)
    return model


def channels_last(model: nn.Module, last: bool = True) -> nn.Module:
    """The model, its weights laid out in place so that convolutions of it run faster, or as they were."""
    layout = torch.channels_last if last else torch.contiguous_format
    return model.to(memory_format=layout)  # pyright: ignore[reportCallIssue] # torch's stubs leave this argument out


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    partial: Path,
    device: torch.device,
    *,
    augment: bool,
    bfloat16: bool,
) -> None:
    """SGD with Nesterov momentum 0.9, a one-cycle learning rate and weight decay over all parameters, channels last.
    What is drawn in an epoch depends on the seed and its number alone.
    """
    channels_last(model.to(device))
    batches = max(1, len(x) // recipe.batch_size)
    optimiser = torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=recipe.lr, total_steps=recipe.epochs * batches)
    begun: list[tuple[str, Any]] = [("model", model), ("optimiser", optimiser), ("schedule", schedule)]
    first = 0
    if partial.exists():
        state = torch.load(partial, map_location=device)
        for name, part in begun:
            part.load_state_dict(state[name])
        first = state["epochs"]
    for epoch in tqdm(range(first, recipe.epochs), partial.stem, unit="epoch", leave=False):
        model.train()
        draw = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
        order = torch.randperm(len(x), generator=draw)
        for rows in order.split(recipe.batch_size)[:batches]:
            inputs = _augmented(x[rows], draw) if augment else x[rows]
            inputs, labels = inputs.to(device, memory_format=torch.channels_last), y[rows].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                loss = F.cross_entropy(model(inputs).float(), labels)
            if not bool(loss.isfinite()):
                raise ValueError(f"train: the loss is {float(loss)} in epoch {epoch} with lr={recipe.lr}")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
        with whole(partial) as file:
            torch.save({**{name: part.state_dict() for name, part in begun}, "epochs": epoch + 1}, file)
    channels_last(model, False).eval()


def _augmented(x: Tensor, draw: torch.Generator) -> Tensor:
    """Each image shifted by up to an eighth of its side, the border filled with zeros, and flipped half of the time."""
    n, _, height, width = x.shape
    margin = width // 8
    padded = F.pad(x, (margin,) * 4)
    top, left = torch.randint(0, 2 * margin + 1, (2, n, 1, 1), generator=draw)
    columns = left + torch.arange(width)
    flip = torch.rand(n, 1, 1, generator=draw) < 0.5
    columns = torch.where(flip, columns.flip(-1), columns)
    rows = top + torch.arange(height)[:, None]
    picked = padded[torch.arange(n)[:, None, None], :, rows, columns]  # [n, height, width, channels]
    return picked.movedim(-1, 1).contiguous()
