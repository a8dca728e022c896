"""The factors of a block's gradients as they are stored: vectors in 8, 16 or 32 bits, and how queries meet them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fastif.index.thin import Runs, Thin, share_of
from fastif.index.truncation import Truncated
from fastif.model.gradients import Dense, OneHot
from fastif.ops import factor_dots

Stored = Literal["int8", "float16", "float32"]
_LARGEST = {torch.int8: 127.0, torch.float16: 1.0}  # what the largest entry of a vector becomes
HALF = (torch.float16, torch.bfloat16)
ENTRIES = 1 << 21  # of matrices that are made of factors at a time
_CACHED = 1 << 18  # of vectors and their products at a time: what is written stays near until it is read
GAIN = 3  # by which products with int8 factors are faster than those with floats
_FORMING = 48  # products with a matrix that take as long as forming it, writing and reading it again


@dataclass(frozen=True)
class Factors:
    """Σ_f scale_f left_f right_fᵀ of every example and group, in the order of the examples.

    A vector is divided by its largest entry, so that the error of an entry is at most 1/254 of that in int8 and 1/2048
    of the entry, or 2⁻²⁵ of the largest, in float16; the product of both largest entries is the factor's scale.
    """

    ranks: Tensor  # int32 [n, g]
    left: Tensor  # [F, o] of the type stored; of a table int32 [F], its rows
    right: Tensor  # [F, d]
    scale: Tensor | None  # float32 [F]; None: 1

    @classmethod
    def store(cls, truncated: Truncated, dtype: torch.dtype) -> Factors:
        ranks, left, right = truncated
        table = left.dim() == 1
        if dtype == torch.float32:
            return cls(ranks.cpu(), (left.int() if table else left.to(dtype)).cpu(), right.to(dtype).cpu(), None)
        left, left_scale = (left.int(), None) if table else _scaled(left, dtype)
        right, scale = _scaled(right, dtype)
        scale = scale if left_scale is None else scale * left_scale
        return cls(ranks.cpu(), left.cpu(), right.cpu(), scale.float().cpu())

    @classmethod
    def cat(cls, parts: Sequence[Factors]) -> Factors:
        scales = [part.scale for part in parts if part.scale is not None]
        ranks, left, right = (torch.cat([getattr(part, name) for part in parts]) for name in ("ranks", "left", "right"))
        return cls(ranks, left, right, torch.cat(scales) if scales else None)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str) -> Factors:
        ranks, left, right = (tensors[prefix + name] for name in ("ranks", "left", "right"))
        return cls(ranks, left, right, tensors.get(prefix + "scale"))

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        found = {prefix + name: getattr(self, name) for name in ("ranks", "left", "right")}
        return found if self.scale is None else {**found, prefix + "scale": self.scale}

    def __len__(self) -> int:
        """Examples."""
        return len(self.ranks)

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.tensors("").values())

    @property
    def table(self) -> bool:
        return self.left.dim() == 1

    def select(self, examples: Tensor) -> Factors:
        """Those of some examples, increasing int64."""
        chosen = torch.zeros(len(self), dtype=torch.bool).index_fill_(0, examples, True)
        keep = chosen.repeat_interleave(self.ranks.sum(1))
        scale = None if self.scale is None else self.scale[keep]
        return Factors(self.ranks[examples], self.left[keep], self.right[keep], scale)

    def rows(self, begin: int, end: int) -> Factors:
        """Those of examples begin, ..., end - 1."""
        counts = self.ranks.sum(1)
        first = int(counts[:begin].sum())
        some = slice(first, first + int(counts[begin:end].sum()))
        return Factors(self.ranks[begin:end], self.left[some], self.right[some], _rows(self.scale, some))

    def turned(self, turn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], like: Tensor) -> Factors:
        """With vectors that `turn` makes of these, unpacked."""
        left, right = turn(*self._vectors(slice(None), like))
        return Factors(self.ranks, left, right, None)

    def dots(self, queries: Tensor) -> Tensor:
        """Products with weighed queries [q, g, o, d], [q, n], on their device; of 16-bit queries they are float32.

        Few queries meet int8 factors by `fastif.ops.factor_dots`: each of their entries errs by at most 1/65,000 of the
        largest in its row, or in its column.
        """
        if queries.dtype in HALF:
            queries = queries.float()  # the products of numbers that 16 bits hold need not fit them
        found = self.dots_of_few([queries[:, 0]]) if self.ranks.shape[1] == 1 else None
        if found is not None:
            return found
        out = queries.new_zeros((len(queries), len(self)))
        if self.table or self._are_few(len(queries), 1.0):
            self._add_products(out, queries[:, 0])
        else:
            self._add_formed(out, queries)
        return out

    def dots_of_few(self, runs: Runs) -> Tensor | None:
        """The same with weighed queries of one group, thin or [q, o, d], where int8 factors meet them by the op; None
        where it is less work to form matrices of the factors."""
        one = runs[0] if runs else None
        if one is None or self.right.dtype != torch.int8 or self.table:
            return None
        if not self._are_few(
            sum(len(part[0]) if isinstance(part, Thin) else len(part) for part in runs), share_of(runs)
        ):
            return None
        like = one.left if isinstance(one, Thin) else one
        left, right, ranks = (x.to(like.device) for x in (self.left, self.right, self.ranks[:, 0]))
        scale = None if self.scale is None else self.scale.to(like.device)
        found: list[Tensor] = []
        for part in runs:
            some, along = part if isinstance(part, Thin) else (part, None)
            found.append(factor_dots(left, right, ranks, some.float(), scale, None if along is None else along.float()))
        return torch.cat(found).to(torch.float32 if like.dtype in HALF else like.dtype)

    def _are_few(self, q: int, share: float) -> bool:
        """Whether products of factors with q queries, of which `share` is left where these are thin, are less work than
        forming each example's matrix first."""
        products = share * q * len(self.right) / (GAIN if self.right.dtype == torch.int8 and not self.table else 1)
        return self.ranks.shape[1] == 1 and products <= len(self.right) + (q + _FORMING) * len(self)

    def gradients(self, rows: Tensor, columns: Tensor) -> Dense | OneHot:
        """The examples' gradients that they stand for, whose metric is x [g, o] and y [g, d]."""
        n, g = self.ranks.shape
        ranks = self.ranks.flatten().long()
        most = max(1, int(ranks.max())) if len(ranks) else 1
        there = torch.arange(most) < ranks[:, None]  # [n g, t]
        left, right = self._vectors(slice(None), columns)
        inputs = columns.new_zeros((n * g, most, columns.shape[1]))
        inputs[there] = right
        inputs = inputs.view(n, g, most, -1).transpose(0, 1) / columns[:, None, None]
        if self.table:
            places = torch.zeros((n, most), dtype=torch.int64)
            places[there] = left.cpu()
            places = places.to(columns.device)
            return OneHot(places, inputs[0] / rows[0, places][:, :, None], rows.shape[1])
        output_grads = rows.new_zeros((n * g, most, rows.shape[1]))
        output_grads[there] = left
        return Dense(inputs, output_grads.view(n, g, most, -1).transpose(0, 1) / rows[:, None, None])

    def _vectors(self, rows: slice, like: Tensor) -> tuple[Tensor, Tensor]:
        """left, with the scale in it, and right of some factors; of a table, left is the rows and right has it."""
        left, right = self.left[rows].to(like.device), self.right[rows].to(like)
        scale = None if self.scale is None else self.scale[rows].to(like)[:, None]
        if self.table:
            return left.long(), right if scale is None else right.mul_(scale)
        return (left.to(like) if scale is None else left.to(like).mul_(scale)), right

    def _add_products(self, out: Tensor, queries: Tensor) -> None:
        """Factor by factor: a matrix product with each query."""
        owners = torch.arange(len(self)).repeat_interleave(self.ranks[:, 0].long())
        d = self.right.shape[1]
        each = max(1, _CACHED // (d if self.table else max(d, self.left.shape[1])))
        for begin in range(0, len(self.right), each):
            rows = slice(begin, begin + each)
            left, right = self._vectors(rows, queries)
            own = owners[rows].to(out.device)
            for query, row in zip(queries, out, strict=True):
                if self.table:
                    products = torch.einsum("fd,fd->f", query[left], right)
                elif query.shape[0] <= query.shape[1]:
                    products = (right @ query.T).mul_(left).sum(1)
                else:
                    products = (left @ query).mul_(right).sum(1)
                row.index_add_(0, own, products)

    def _add_formed(self, out: Tensor, queries: Tensor) -> None:
        """For many queries, or groups: matrices are formed once for all of them."""
        flat = queries.flatten(1)
        for chosen, formed in self._formed(queries):
            out[:, chosen] = flat @ formed.T

    def _formed(self, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Some examples and their matrices, [m, g·o·d], those of like ranks together; like [..., g, o, d]."""
        g, o, d = like.shape[-3:]
        ranks = self.ranks.flatten().long()
        begins = ranks.cumsum(0) - ranks
        order = self.ranks.sum(1).argsort(stable=True)
        each = max(1, ENTRIES // (g * o * d))
        for chosen in order.split(each):
            few = (chosen[:, None] * g + torch.arange(g)).flatten()  # matrices
            most = int(ranks[few].max())
            if most == 0:
                continue
            place = torch.arange(most)
            there = place < ranks[few][:, None]
            left, right = self._gathered((begins[few][:, None] + place)[there], like)
            padded_left = like.new_zeros((len(few), most, o))
            padded_right = like.new_zeros((len(few), most, d))
            padded_left[there], padded_right[there] = left, right
            yield chosen.to(like.device), torch.bmm(padded_left.mT, padded_right).view(len(chosen), -1)

    def _gathered(self, factors: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        some = Factors(self.ranks, self.left[factors], self.right[factors], _rows(self.scale, factors))
        return some._vectors(slice(None), like)


def runs_of(parts: Sequence[Factors]) -> Iterator[tuple[int, int]]:
    """Begin and end of runs of the examples that blocks of parameters have in common, of which little is unpacked at a
    time, in `Factors.gradients` too: there all examples get as many positions as the one with the most factors."""
    left = [(0, len(parts[0]))]
    while left:
        begin, end = left.pop()
        entries = sum(_padded(part, part.ranks[begin:end]) for part in parts)
        if entries <= ENTRIES or end - begin <= 1:
            yield begin, end
        else:
            half = (begin + end) // 2
            left += [(half, end), (begin, half)]


def _padded(part: Factors, ranks: Tensor) -> int:
    width = part.right.shape[1] + (0 if part.table else part.left.shape[1])
    return ranks.numel() * int(ranks.max()) * width if ranks.numel() else 0


def _rows(values: Tensor | None, rows: Tensor | slice) -> Tensor | None:
    return None if values is None else values[rows]


def _scaled(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Vectors [F, d] with the largest entry of each as `_LARGEST` has it, and by what to multiply them."""
    scale = vectors.abs().amax(1) / _LARGEST[dtype] if len(vectors) else vectors.new_zeros(0)
    divided = vectors / torch.where(scale > 0, scale, 1)[:, None]
    return (divided.round_() if dtype == torch.int8 else divided).to(dtype), scale


def dtype_named(name: str) -> torch.dtype:
    """Raises ValueError for what vectors are not stored in."""
    if name not in get_args(Stored):
        raise ValueError(f"index: dtype must be one of {', '.join(map(repr, get_args(Stored)))}, got {name!r}")
    return getattr(torch, name)
