"""Per-sample gradients of a batch, kept in the factors that a backward pass leaves behind and never formed.

A block of parameters is seen as g matrices [o, d] (g = 1 but for grouped convolutions). Example i's gradient is

    g_i[s] = Σ_t output_grads[s, i, t] ⊗ inputs[s, i, t]           (docs/math.md (8)),

a sum over t positions: words of a text, pixels of an image, uses of a shared layer. Everything that an estimator asks
of it is a method here, so that no estimator knows how a layer's gradient is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fastif import ops

Side = Literal["inputs", "outputs"]
_ROWS = 1 << 20  # entries of factors whose moment is taken at a time
_SIDE = 128  # of the squares that the lower triangle of a moment is made of


class Unfinished(Protocol):
    """A moment that is kept as something smaller until all examples have been added."""

    def matrix(self) -> Tensor: ...


Moment = Callable[[int, int, Tensor, Any], Tensor | Unfinished]  # of examples begin, ..., end - 1; else as `moment`


class Gradients(Protocol):
    """What a batch of n per-sample gradients [g, o, d] can tell."""

    def __len__(self) -> int: ...

    def rows(self, begin: int, end: int) -> Gradients:
        """Examples begin, ..., end - 1."""
        ...

    def sum(self, weights: Tensor) -> Tensor:
        """Σ_i weights[i] g_i, [g, o, d]."""
        ...

    def squares(self, weights: Tensor) -> Tensor:
        """Σ_i weights[i] g_i², elementwise, [g, o, d]."""
        ...

    def sq_norms(self, scale: Tensor | None = None) -> Tensor:
        """Σ over entries of scale g_i², [n]; scale [g, o, d] >= 0, default 1."""
        ...

    def dots(self, directions: Tensor) -> Tensor:
        """⟨directions[q], g_i⟩, [q, n], for directions [q, g, o, d]."""
        ...

    def formed(self) -> Tensor:
        """The gradients themselves, [n, g, o, d]: for blocks that are small."""
        ...

    def rotated(self, output_basis: Tensor | None, input_basis: Tensor) -> Gradients:
        """Gradients output_basisᵀ g_i input_basis, for bases [g, o, o'] (None: the identity) and [g, d, d']."""
        ...

    def moment(self, side: Side, weights: Tensor, total: Any = None) -> Tensor | Unfinished:
        """Σ_i Σ_t weights[i] x xᵀ of the inputs x = a [g, d, d] or the outputs x = u [g, o, o] (its diagonal [g, o]
        where no two entries of u are ever both nonzero), added to `total`: what an earlier call gave, which may be
        written to.

        Of the matrices the lower triangle counts; what stands above it need not be the same.
        """
        ...

    @property
    def activations(self) -> Side | None:
        """The factor that comes from the forward pass, None if it is not the same one at all positions."""
        ...

    @property
    def positions(self) -> int:
        """t."""
        ...

    def counts(self) -> Tensor | None:
        """Of each example's positions, how many its data fill, [n]; None: all of them. Padding is the rest."""
        ...

    def by_position(self, directions: Tensor) -> Tensor:
        """⟨directions[q], what position t adds to g_i⟩, [q, n, t], for directions [q, g, o, d]."""
        ...


@dataclass(frozen=True)
class Dense:
    """Gradients of linear maps, whose factors are dense."""

    inputs: Tensor  # [g, n, t, d]
    output_grads: Tensor  # [g, n, t, o]
    activations: Side | None = "inputs"
    filled: Tensor | None = None  # [n] as `counts` gives them; the inputs of the other positions are zero

    def __len__(self) -> int:
        return self.inputs.shape[1]

    @property
    def entries(self) -> int:
        return self.inputs.numel() + self.output_grads.numel()

    def rows(self, begin: int, end: int) -> Dense:
        filled = None if self.filled is None else self.filled[begin:end]
        inputs, output_grads = self.inputs[:, begin:end], self.output_grads[:, begin:end]
        return replace(self, inputs=inputs, output_grads=output_grads, filled=filled)

    def regrouped(self, k: int) -> Dense:
        """Every k examples as one, with k times the positions."""
        inputs, grads = (x.unflatten(1, (-1, k)).flatten(2, 3) for x in (self.inputs, self.output_grads))
        return replace(self, inputs=inputs, output_grads=grads)

    def without(self, empty: Tensor) -> Dense:
        """The positions `empty` [n, t], whose output gradients are zero, as positions no longer."""
        inputs = self.inputs.masked_fill(empty[None, :, :, None], 0)
        return replace(self, inputs=inputs, filled=empty.shape[1] - empty.sum(1))

    def counts(self) -> Tensor | None:
        return self.filled

    def sum(self, weights: Tensor) -> Tensor:
        weights = weights.to(self.inputs)
        return torch.stack([ops.per_sample_grad.accumulate(a, u, weights)[0] for a, u in self._groups()])

    def squares(self, weights: Tensor) -> Tensor:
        weights = weights.to(self.inputs)
        return torch.stack([ops.per_sample_grad.accumulate_squares(a, u, weights) for a, u in self._groups()])

    def sq_norms(self, scale: Tensor | None = None) -> Tensor:
        scales = [None] * len(self.inputs) if scale is None else list(scale)
        parts = [ops.per_sample_grad.sq_norms(a, u, r) for (a, u), r in zip(self._groups(), scales, strict=True)]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def dots(self, directions: Tensor) -> Tensor:
        out = None
        for s, (a, u) in enumerate(self._groups()):
            part = ops.per_sample_grad.dots(a, u, directions[:, s].contiguous())
            out = part if out is None else out.add_(part)
        assert out is not None
        return out

    def formed(self) -> Tensor:
        return (self.output_grads.mT @ self.inputs).transpose(0, 1)

    def form(self, out: Tensor) -> None:
        """Writes `formed` to out [n, g, o, d]."""
        for s, (a, u) in enumerate(self._groups()):
            torch.bmm(u.mT, a, out=out[:, s])

    @property
    def formed_to_rotate(self) -> bool:
        """Whether the positions are so many that their sum is turned with fewer operations than they are."""
        (t, d), o = self.inputs.shape[2:], self.output_grads.shape[3]
        return t * (d * d + o * o) > o * d * (o + d)

    def rotated(self, output_basis: Tensor | None, input_basis: Tensor) -> Dense | Formed:
        if output_basis is not None and self.formed_to_rotate:
            return Formed(self.formed()).rotated(output_basis, input_basis)
        grads = self.output_grads if output_basis is None else _times(self.output_grads, output_basis)
        return replace(self, inputs=_times(self.inputs, input_basis), output_grads=grads)

    def moment(self, side: Side, weights: Tensor, total: Tensor | None = None) -> Tensor:
        return second_moment(self.inputs if side == "inputs" else self.output_grads, weights, total)

    @property
    def positions(self) -> int:
        return self.inputs.shape[2]

    def by_position(self, directions: Tensor) -> Tensor:
        parts = [
            (_times(self.output_grads, direction) * self.inputs).sum((0, 3)) for direction in directions
        ]  # one query at a time: [g, n, t, d]
        return torch.stack(parts)

    @staticmethod
    def cat(parts: Sequence[Dense]) -> Dense:
        """One after another; those of fewer positions get empty ones."""
        most = max(part.positions for part in parts)

        def joined(factors: list[Tensor]) -> Tensor:
            return torch.cat([torch.nn.functional.pad(x, (0, 0, 0, most - x.shape[2])) for x in factors], 1)

        factors = joined([part.inputs for part in parts]), joined([part.output_grads for part in parts])
        return replace(parts[0], inputs=factors[0], output_grads=factors[1], filled=_filled(parts, torch.cat))

    def _groups(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.inputs, self.output_grads, strict=True))


@dataclass(frozen=True)
class Column(Dense):
    """Gradients of a vector that is too long for a matrix over all pairs of its entries: of that, the diagonal."""

    def moment(self, side: Side, weights: Tensor, total: Tensor | None = None) -> Tensor:
        if side == "inputs":
            return super().moment(side, weights, total)
        squares = self.output_grads.square().sum(2)  # [1, n, o]
        added = torch.einsum("n,gno->go", weights.to(squares), squares)
        return added if total is None else total.add_(added)


@dataclass(frozen=True)
class Formed:
    """Gradients as matrices: what is left of many positions once they had to be summed."""

    matrices: Tensor  # [n, g, o, d]
    activations: Side | None = None
    positions: int = 1

    def __len__(self) -> int:
        return len(self.matrices)

    @property
    def entries(self) -> int:
        return self.matrices.numel()

    def rows(self, begin: int, end: int) -> Formed:
        return Formed(self.matrices[begin:end])

    def sum(self, weights: Tensor) -> Tensor:
        return torch.einsum("n,nsod->sod", weights.to(self.matrices), self.matrices)

    def squares(self, weights: Tensor) -> Tensor:
        return torch.einsum("n,nsod->sod", weights.to(self.matrices), self.matrices.square())

    def sq_norms(self, scale: Tensor | None = None) -> Tensor:
        squares = self.matrices.square().flatten(1)
        return squares.sum(1) if scale is None else squares @ scale.flatten()

    def dots(self, directions: Tensor) -> Tensor:
        return directions.flatten(1) @ self.matrices.flatten(1).T

    def formed(self) -> Tensor:
        return self.matrices

    def form(self, out: Tensor) -> None:
        out.copy_(self.matrices)

    def rotated(self, output_basis: Tensor | None, input_basis: Tensor) -> Formed:
        turned = self.matrices @ input_basis
        return Formed(turned if output_basis is None else output_basis.mT @ turned)

    def moment(self, side: Side, weights: Tensor, total: Tensor | None = None) -> Tensor:
        return second_moment((self.matrices if side == "inputs" else self.matrices.mT).transpose(0, 1), weights, total)

    def counts(self) -> Tensor | None:
        return None

    def by_position(self, directions: Tensor) -> Tensor:
        return self.dots(directions)[:, :, None]


@dataclass(frozen=True)
class OneHot:
    """Gradients of a table that is looked up (an embedding): at every position one row takes the gradient."""

    places: Tensor  # int64 [n, t]: which row of the table [o, d]
    inputs: Tensor  # [n, t, d]: the gradient that it takes
    table_rows: int  # o
    activations: Side = "outputs"
    empty: Tensor | None = None  # bool [n, t]: positions that no data fill; their gradients are zero

    def __len__(self) -> int:
        return self.inputs.shape[0]

    @property
    def entries(self) -> int:
        return self.inputs.numel()

    def rows(self, begin: int, end: int) -> OneHot:
        empty = None if self.empty is None else self.empty[begin:end]
        return replace(self, places=self.places[begin:end], inputs=self.inputs[begin:end], empty=empty)

    def regrouped(self, k: int) -> OneHot:
        """Every k examples as one, with k times the positions."""
        places, inputs = (x.unflatten(0, (-1, k)).flatten(1, 2) for x in (self.places, self.inputs))
        return replace(self, places=places, inputs=inputs)

    def without(self, empty: Tensor) -> OneHot:
        """The positions `empty` [n, t], whose gradients are zero, as positions no longer."""
        return replace(self, empty=empty)

    def counts(self) -> Tensor | None:
        return None if self.empty is None else self.empty.shape[1] - self.empty.sum(1)

    def sum(self, weights: Tensor) -> Tensor:
        total = self.inputs.new_zeros((self.table_rows, self.inputs.shape[2]))
        weighted = self.inputs * weights.to(self.inputs)[:, None, None]
        return total.index_add_(0, self.places.flatten(), weighted.flatten(0, 1))[None]

    def squares(self, weights: Tensor) -> Tensor:
        rows, gradients, example = self._merged()
        total = self.inputs.new_zeros((self.table_rows, self.inputs.shape[2]))
        return total.index_add_(0, rows, gradients.square() * weights.to(self.inputs)[example, None])[None]

    def sq_norms(self, scale: Tensor | None = None) -> Tensor:
        rows, gradients, example = self._merged()
        values = gradients.square()
        if scale is not None:
            values = values * scale[0, rows]
        return values.new_zeros(len(self)).index_add_(0, example, values.sum(1))

    def dots(self, directions: Tensor) -> Tensor:
        parts = [torch.einsum("ntd,ntd->n", direction[0][self.places], self.inputs) for direction in directions]
        return torch.stack(parts)

    def formed(self) -> Tensor:
        n, d = len(self), self.inputs.shape[2]
        out = self.inputs.new_zeros((n * self.table_rows, d))
        place = self.places + self.table_rows * torch.arange(n, device=self.places.device)[:, None]
        return out.index_add_(0, place.flatten(), self.inputs.flatten(0, 1)).view(n, 1, self.table_rows, d)

    def form(self, out: Tensor) -> None:
        out.copy_(self.formed())

    def rotated(self, output_basis: Tensor | None, input_basis: Tensor) -> OneHot:
        assert output_basis is None, "rows of a table stay as they are"
        return replace(self, inputs=self.inputs @ input_basis[0])

    def moment(self, side: Side, weights: Tensor, total: Tensor | None = None) -> Tensor:
        if side == "inputs":
            return second_moment(self.inputs[None], weights, total)
        each = weights.to(self.inputs)[:, None].expand_as(self.places)
        each = (each if self.empty is None else each.masked_fill(self.empty, 0)).flatten()
        total = each.new_zeros(1, self.table_rows) if total is None else total
        return total.index_add_(1, self.places.flatten(), each[None])

    @property
    def positions(self) -> int:
        return self.places.shape[1]

    def by_position(self, directions: Tensor) -> Tensor:
        parts = [torch.einsum("ntd,ntd->nt", direction[0][self.places], self.inputs) for direction in directions]
        return torch.stack(parts)

    def dense(self) -> Dense:
        rows = torch.nn.functional.one_hot(self.places, self.table_rows).to(self.inputs)
        rows = rows if self.empty is None else rows.masked_fill(self.empty[:, :, None], 0)
        return Dense(self.inputs[None], rows[None], filled=self.counts())

    def _merged(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [m], gradients [m, d] and examples [m], each row at most once per example."""
        n = len(self)
        place = self.places + self.table_rows * torch.arange(n, device=self.places.device)[:, None]
        unique, inverse = place.flatten().unique(return_inverse=True)
        gradients = self.inputs.new_zeros((len(unique), self.inputs.shape[2]))
        gradients.index_add_(0, inverse, self.inputs.flatten(0, 1))
        return unique % self.table_rows, gradients, unique // self.table_rows


def of_table(gradients: Gradients) -> bool:
    """Whether the block's rows are looked up, or a vector's too many entries: the output side is then a diagonal."""
    return isinstance(gradients.rows(0, 1), OneHot | Column)


def _filled(parts: Sequence[Dense | OneHot], join: Callable[[list[Tensor]], Tensor]) -> Tensor | None:
    """`counts` of several; None where all positions of all of them are filled."""
    counts = [part.counts() for part in parts]
    if all(count is None for count in counts):
        return None
    whole = [torch.full((len(part),), part.positions, device=part.inputs.device) for part in parts]
    return join([own if count is None else count for own, count in zip(whole, counts, strict=True)])


def joined(parts: list[Dense | OneHot]) -> Dense | OneHot:
    """The sum of the gradients of several uses of one block, as further positions."""
    if len(parts) == 1:
        return parts[0]
    tables = [part for part in parts if isinstance(part, OneHot)]
    if len(tables) == len(parts):
        places, inputs = torch.cat([p.places for p in tables], 1), torch.cat([p.inputs for p in tables], 1)
        empty = None
        if any(p.empty is not None for p in tables):
            none = [torch.zeros_like(p.places, dtype=torch.bool) for p in tables]
            empty = torch.cat([no if p.empty is None else p.empty for p, no in zip(tables, none, strict=True)], 1)
        return replace(tables[0], places=places, inputs=inputs, empty=empty)
    dense = [part.dense() if isinstance(part, OneHot) else part for part in parts]
    first = parts[0].activations
    same = all(part.activations == first for part in parts)
    inputs, grads = torch.cat([p.inputs for p in dense], 2), torch.cat([p.output_grads for p in dense], 2)
    filled = _filled(parts, lambda counts: torch.stack(counts).sum(0))
    return Dense(inputs, grads, first if same else None, filled)


def _times(x: Tensor, basis: Tensor) -> Tensor:
    """x [g, n, t, d] times basis [g, d, e]: one product for all examples and positions."""
    return (x.flatten(1, 2) @ basis).unflatten(1, x.shape[1:3])


def second_moment(x: Tensor, weights: Tensor, total: Tensor | None = None) -> Tensor:
    """Σ_i Σ_t weights[i] x[s, i, t] x[s, i, t]ᵀ for x [g, n, t, d], added to total [g, d, d]: its lower triangle."""
    g, n, t, d = x.shape
    total = x.new_zeros((g, d, d)) if total is None else total
    roots = weights.to(x).sqrt()[:, None, None]
    each = max(1, _ROWS // (g * t * d))
    for begin in range(0, n, each):
        rows = x[:, begin : begin + each] * roots[begin : begin + each]
        if t > 1 and d <= t and x.stride(2) == 1:  # positions run fastest in memory: turning costs more than adding
            total += (rows.mT @ rows).sum(1)
            continue
        rows = rows.flatten(1, 2)
        for i in range(0, d, _SIDE):
            below = slice(i, min(i + _SIDE, d))
            total[:, below, : below.stop].baddbmm_(rows[:, :, below].mT, rows[:, :, : below.stop])
    return total
