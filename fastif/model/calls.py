"""How a model is called, where it stands meanwhile, and the type of its parameters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def placed(model: nn.Module, device: torch.device, op: str) -> Iterator[None]:
    """The model on `device`, and afterwards where it was. Raises ValueError for one that would have to be gathered."""
    homes = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    moved = device not in homes
    if moved and len(homes) > 1:
        places = ", ".join(sorted(map(str, homes)))
        raise ValueError(f"{op}: the model is spread over {places} and cannot be moved to {device}")
    try:
        if moved:
            model.to(device)
        yield
    finally:
        if moved:
            model.to(homes.pop())


def call(model: nn.Module, x: Any) -> Any:
    """The model's outputs; a mapping is taken as keyword arguments, without "labels"."""
    if isinstance(x, Mapping):
        return model(**{key: value for key, value in x.items() if key != "labels"})
    return model(x)


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of a model's gradients as they are computed with: float64 for a float64 model, else float32."""
    double = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    return torch.float64 if double else torch.float32
