"""Per-sample gradients whose factors are made a few examples at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastif.model.gradients import Dense, Formed, Gradients, Moment, OneHot, Side, Unfinished

_TOGETHER = 1 << 21  # entries of gradients that are multiplied with directions at a time: 8 MiB in float32


@dataclass(frozen=True)
class Sliced:
    """Gradients whose factors are too large to stand at once: made a few examples at a time, whenever they are asked.

    The patches of a convolution are its kernel's size times its input; of these, only those of a slice exist.
    """

    make: Callable[[int, int], Dense | OneHot | Formed]  # examples begin, ..., end - 1
    begin: int
    end: int
    each: int  # examples of a slice
    moments: Mapping[Side, Moment] = field(default_factory=dict)  # those that take no making of the factors
    filled: Tensor | None = None  # `counts` of all examples, also of those outside begin and end

    def __len__(self) -> int:
        return self.end - self.begin

    def parts(self) -> Iterator[tuple[Dense | OneHot | Formed, slice]]:
        """Every slice, and where its examples stand."""
        for begin in range(self.begin, self.end, self.each):
            end = min(begin + self.each, self.end)
            yield self.make(begin, end), slice(begin - self.begin, end - self.begin)

    def _added(self, weights: Tensor, ask: Callable[[Dense | OneHot | Formed, Tensor], Tensor]) -> Tensor:
        total = None
        for part, rows in self.parts():
            value = ask(part, weights[rows])
            total = value if total is None else total.add_(value)
        assert total is not None
        return total

    def rows(self, begin: int, end: int) -> Gradients:
        begin, end = self.begin + begin, min(self.begin + end, self.end)
        return self.make(begin, end) if end - begin <= self.each else replace(self, begin=begin, end=end)

    def sum(self, weights: Tensor) -> Tensor:
        return self._added(weights, lambda part, w: part.sum(w))

    def squares(self, weights: Tensor) -> Tensor:
        return self._added(weights, lambda part, w: part.squares(w))

    def moment(self, side: Side, weights: Tensor, total: Any = None) -> Tensor | Unfinished:
        if side in self.moments:
            return self.moments[side](self.begin, self.end, weights, total)
        for part, rows in self.parts():
            total = part.moment(side, weights[rows], total)
        assert total is not None
        return total

    def sq_norms(self, scale: Tensor | None = None) -> Tensor:
        return torch.cat([part.sq_norms(scale) for part, _ in self.parts()])

    def dots(self, directions: Tensor) -> Tensor:
        """Several slices together where gradients are formed, so that the directions are read less often."""
        q, t = len(directions), self.positions
        if q * t <= q + t:  # nothing is gained by forming them
            return torch.cat([part.dots(directions) for part, _ in self.parts()], 1)
        each = max(1, _TOGETHER // directions[0].numel())
        formed = directions.new_empty((min(each, len(self)), *directions.shape[1:]))
        out = []
        for begin in range(0, len(self), each):
            together = replace(self, begin=self.begin + begin, end=min(self.begin + begin + each, self.end))
            for part, rows in together.parts():
                part.form(formed[rows])
            out.append(Formed(formed[: len(together)]).dots(directions))
        return torch.cat(out, 1)

    def by_position(self, directions: Tensor) -> Tensor:
        return torch.cat([part.by_position(directions) for part, _ in self.parts()], 1)

    def formed(self) -> Tensor:
        return torch.cat([part.formed() for part, _ in self.parts()])

    def rotated(self, output_basis: Tensor | None, input_basis: Tensor) -> Sliced:
        make = lambda begin, end: self.make(begin, end).rotated(output_basis, input_basis)  # noqa: E731
        return replace(self, make=make, moments={})

    def counts(self) -> Tensor | None:
        return None if self.filled is None else self.filled[self.begin : self.end]

    @property
    def activations(self) -> Side | None:
        return self.make(self.begin, self.begin + 1).activations

    @property
    def positions(self) -> int:
        return self.make(self.begin, self.begin + 1).positions


def whole(gradients: Gradients) -> Dense:
    """Gradients whose factors are dense, with all factors standing."""
    if isinstance(gradients, Sliced):
        return Dense.cat([whole(part) for part, _ in gradients.parts()])
    assert isinstance(gradients, Dense)
    return gradients


def smallest(gradients: Gradients, size: int) -> Gradients:
    """The gradients, of `size` numbers each, in factors where these are fewer numbers, else as matrices; contiguous."""
    if isinstance(gradients, Dense | OneHot) and gradients.entries < size * len(gradients):
        factors = {name: value.contiguous() for name, value in factors_of(gradients).items()}
        return gradients_of(factors, gradients.table_rows if isinstance(gradients, OneHot) else 0)
    return Formed(gradients.formed().contiguous())


def factors_of(gradients: Gradients) -> dict[str, Tensor]:
    """What `gradients_of` makes the gradients of again."""
    if isinstance(gradients, OneHot):
        return {"places": gradients.places, "inputs": gradients.inputs}
    if isinstance(gradients, Dense):
        return {"inputs": gradients.inputs, "output_grads": gradients.output_grads}
    return {"matrices": gradients.formed()}


def gradients_of(factors: Mapping[str, Tensor], table_rows: int) -> Gradients:
    """table_rows: of gradients of a table that is looked up."""
    if "places" in factors:
        return OneHot(factors["places"], factors["inputs"], table_rows)
    if "output_grads" in factors:
        return Dense(factors["inputs"], factors["output_grads"])
    return Formed(factors["matrices"])
