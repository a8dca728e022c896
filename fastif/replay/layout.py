"""Parameters as one vector: where each of them stands in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """The parameters that an optimizer moves, one behind the other, those of each of its groups side by side."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    groups: tuple[int, ...]  # parameters of each group

    @property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    @property
    def size(self) -> int:
        """P."""
        return sum(self.sizes)

    @property
    def slices(self) -> list[slice]:
        """Where each group stands in the vector."""
        found, first, start = list[slice](), 0, 0
        for count in self.groups:
            stop = start + sum(self.sizes[first : first + count])
            found.append(slice(start, stop))
            first, start = first + count, stop
        return found

    def join(self, values: Iterable[Tensor]) -> Tensor:
        """The vector [P] of the parameters' values: a copy."""
        return torch.cat([value.detach().reshape(-1) for value in values])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """The parameters in a vector [P], as views of it."""
        parts = vector.split(self.sizes)
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def first_difference(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """What of it a model with parameters of these shapes has not."""
        for name, shape in zip(self.names, self.shapes, strict=True):
            if shapes.get(name) != shape:
                found = list(shapes[name]) if name in shapes else "nothing"
                return f"{name!r} is {list(shape)} in the log, {found} in the model"
        return None
