"""Training the networks of the experiments, and keeping them in safetensors files."""

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastif.data.checksums import checksum as checksum_of
from fastif.evaluation.models import ARCHITECTURES, build
from fastif.files import Damaged, canonical, checksum, whole
from fastif.progress import tqdm


class Recipe(NamedTuple):
    """How a network is made: all that `build` and `train` need besides the data."""

    architecture: str
    width: float
    epochs: int
    lr: float
    batch_size: int
    weight_decay: float
    seed: int


RECIPES = {
    "digits": Recipe("cnn", 1.0, 8, 0.15, 64, 5e-4, 0),
    "fashion-mnist": Recipe("cnn", 1.0, 6, 0.1, 128, 5e-4, 0),
    "cifar10": Recipe("vgg11", 1.0, 15, 0.1, 128, 5e-4, 0),
}


MAX_WIDTH = 64  # a factor on channels; the work grows with its square


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    lr: float,
    weight_decay: float = 5e-4,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
    device: torch.device | str | None = None,
    step: Callable[[torch.optim.Optimizer, Tensor], None] | None = None,
) -> nn.Module:
    """Trains `model` in place on images x [n, ...] and labels y [n]; returns it in evaluation mode.

    SGD with Nesterov momentum 0.9 and a one-cycle learning rate that peaks at `lr`, on the mean cross-entropy plus
    ½·weight_decay·‖θ‖² over all parameters. The order of the examples is drawn from `seed` on the CPU: the same call
    gives the same network on the same device with the same number of threads. `step`, given the optimizer and the
    places of the batch's examples, takes the place of the optimizer's own: `fastif.TrainingLog.step` does.

    Raises ValueError for empty data, for x and y of unequal length, and where the loss stops being finite.
    """
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"train: x and y must be of one length, at least 1, got {len(x)} and {len(y)}")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"train: epochs and batch_size must be at least 1, got {epochs} and {batch_size}")
    device = torch.device(device) if device is not None else next(model.parameters()).device
    model.to(device).train()
    # A last batch of one example would have no variance for batch norm: it is left out, and comes first another time.
    batches = max(1, len(x) // batch_size + (len(x) % batch_size > 1))
    optimiser = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=lr, total_steps=epochs * batches)
    draw = torch.Generator().manual_seed(seed)
    bar = tqdm(range(epochs), "training", unit="epoch", disable=not progress, leave=False)
    for _ in bar:
        order = torch.randperm(len(x), generator=draw)
        total = torch.zeros((), device=device)
        for number in range(batches):
            rows = order[number * batch_size : (number + 1) * batch_size]
            loss = F.cross_entropy(model(x[rows].to(device)), y[rows].to(device))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step() if step is None else step(optimiser, rows)
            schedule.step()
            total += loss.detach()
        mean = total.item() / batches
        if not mean < float("inf"):
            raise ValueError(f"train: the loss is {mean} with lr={lr}; a smaller lr may help")
        bar.set_postfix(loss=f"{mean:.3f}")
    return model.eval()


class Checkpoint(NamedTuple):
    """A trained network and how it was made: enough to build it again, or another like it."""

    model: nn.Module
    recipe: Recipe
    data: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]  # of one image: channels, height, width


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes a safetensors file: the model's state, the rest as metadata. It appears whole or not at all."""
    from safetensors.torch import save

    model, recipe, *made_for = checkpoint
    facts = {**recipe._asdict(), **dict(zip(("data", "classes", "shape"), made_for, strict=True))}
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    facts["checksum"] = _checksum(facts, state)
    with whole(Path(path)) as partial:
        partial.write_bytes(save(state, {"fastif": json.dumps(facts)}))


def load_checkpoint(path: str | Path, expect: Mapping[str, Any] | None = None) -> Checkpoint:
    """The network that `save_checkpoint` wrote to `path`, in evaluation mode on the CPU.

    `expect` gives facts that must hold, by the names of Recipe's and Checkpoint's fields: {"data": "digits"}.

    Raises FileNotFoundError, and ValueError that names the file: where it is damaged, where something else wrote it,
    where a fact in its metadata cannot be (named), where its tensors are not those of its architecture, and where a
    fact differs from the expected one (each named).
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a safe_open is no dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}") from error
    if "fastif" not in metadata:
        raise ValueError(f"{path} was not written by fastif: its metadata lacks the entry 'fastif'")
    try:
        facts = json.loads(metadata["fastif"])
        _check_facts(facts)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has metadata that make no network: {error}") from error
    if "checksum" in facts and facts["checksum"] != _checksum(facts, state):  # files of before have none
        raise Damaged(path, "its checksum does not fit what it holds", "make it anew")
    recipe = Recipe(**{name: facts[name] for name in Recipe._fields})
    data, classes, shape = facts["data"], tuple(facts["classes"]), tuple(facts["shape"])
    known = {**recipe._asdict(), "data": data, "classes": classes, "shape": shape}
    if differing := [
        f"{name} is {known[name]!r}, expected {value!r}"
        for name, value in (expect or {}).items()
        if known[name] != value
    ]:
        raise ValueError(f"{path} holds another network: {'; '.join(differing)}")
    with torch.device("meta"):  # the shapes alone: nothing is allocated for a network that the file does not hold
        expected = build(recipe.architecture, shape, len(classes), width=recipe.width).state_dict()
    if difference := _first_difference(expected, state):
        raise ValueError(f"{path} does not fit its architecture {recipe.architecture}: {difference}")
    model = build(recipe.architecture, shape, len(classes), width=recipe.width, seed=recipe.seed)
    model.load_state_dict(state)
    return Checkpoint(model.eval(), recipe, data, classes, shape)


def _checksum(facts: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """Of all facts but itself, and of every tensor's bits."""
    told = canonical({name: value for name, value in facts.items() if name != "checksum"})
    return checksum(told, *(f"{name} {checksum_of(state[name])}" for name in sorted(state)))


def _whole(value: Any, least: int = 1, below: int = 2**63) -> bool:
    return type(value) is int and least <= value < below


def _positive(value: Any, most: float = math.inf) -> bool:
    return type(value) in (int, float) and 0 < value <= most and value < math.inf


# What save_checkpoint writes: for each fact, whether a value can be one, and the rule in words.
_FACTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "architecture": (lambda value: value in ARCHITECTURES, f"one of {', '.join(ARCHITECTURES)}"),
    "width": (lambda value: _positive(value, MAX_WIDTH), f"a number in (0, {MAX_WIDTH}]"),
    "epochs": (_whole, "an integer >= 1"),
    "lr": (_positive, "a positive number"),
    "batch_size": (_whole, "an integer >= 1"),
    "weight_decay": (_positive, "a positive number"),
    "seed": (lambda value: _whole(value, 0), "an integer in [0, 2^63)"),
    "data": (lambda value: type(value) is str, "a string"),
    "classes": (lambda value: _list_of(value, lambda name: type(name) is str), "a list of strings"),
    "shape": (
        lambda value: _list_of(value, lambda size: _whole(size, 1, 2**16)) and len(value) == 3,
        f"three integers in [1, {2**16})",
    ),
}


def _list_of(value: Any, holds: Callable[[Any], bool]) -> bool:
    return type(value) is list and len(value) > 0 and all(map(holds, value))


def _check_facts(facts: Any) -> None:
    if not isinstance(facts, dict):
        raise ValueError(f"the entry 'fastif' must be a JSON object, got {reprlib.repr(facts)}")
    for name, (holds, rule) in _FACTS.items():
        if name not in facts:
            raise ValueError(f"{name} is missing")
        if not holds(facts[name]):
            raise ValueError(f"{name} must be {rule}, got {reprlib.repr(facts[name])}")


def _first_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    for name in expected:
        if name not in found:
            return f"the tensor {name} is missing"
        if found[name].shape != expected[name].shape:
            return f"{name} must be {list(expected[name].shape)}, got {list(found[name].shape)}"
        if not found[name].isfinite().all():
            return f"{name} holds NaN or Inf"
    extra = sorted(found.keys() - expected.keys())
    return f"the tensor {extra[0]} is not part of it" if extra else None
