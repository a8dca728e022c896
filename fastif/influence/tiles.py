"""Tiles: rectangles of scores, what they must agree in, and the best of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

By = Literal["all", "layer", "token"]


class Tile(NamedTuple):
    """A rectangle of scores and where it stands."""

    query: int  # first row
    train: int  # first column
    values: dict[str, Tensor]  # "" or, by layer, its name: [rows, columns]
    low_rank_error: float = 0.0  # relative, of the rows' preconditioned gradients, where they were kept at a lower rank


def best_of(
    held: tuple[Tensor, Tensor] | None, values: Tensor, first: int, k: int, largest: bool
) -> tuple[Tensor, Tensor]:
    """The k best of those held and further columns, which begin at `first`; ties go to the lower index."""
    indices = torch.arange(first, first + values.shape[1]).expand_as(values)
    if held is not None:
        values, indices = torch.cat([held[0], values], 1), torch.cat([held[1], indices], 1)
    order = values.argsort(dim=1, descending=largest, stable=True)[:, :k]
    return values.gather(1, order), indices.gather(1, order)


def merge_best(parts: Sequence[tuple[Tensor, Tensor]], k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The k best of what is the best of runs of columns, run after run; ties go to the lower index."""
    values, indices = (torch.cat(side, 1) for side in zip(*parts, strict=True))
    order = values.argsort(dim=1, descending=largest, stable=True)[:, :k]
    return values.gather(1, order), indices.gather(1, order)


def check_k(k: object, n: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= n:
        raise ValueError(f"top: k must be an integer in [1, n={n}], got k={k}")


def check_positions(positions: dict[str, int]) -> int:
    """The number of positions that all layers have."""
    most = max(positions.values())
    for name, t in positions.items():
        if t != most:
            raise ValueError(
                f"scores(by='token'): layer {name!r} has {t} positions where others have {most}; "
                "leave it out with layers="
            )
    return most


def check_one_length(third: tuple[int, ...], values: Tensor) -> None:
    """Whether parts of scores [rows, columns, t] have the t of those before them."""
    if third != values.shape[2:]:
        raise ValueError(
            f"scores(by='token'): batches must have one number of positions, got {third[0]} and {values.shape[2]}; "
            "pad the examples to one length"
        )


def check_groups(what: str, groups: Tensor, n: int) -> None:
    if not isinstance(groups, Tensor) or groups.dtype != torch.int64:
        got = groups.dtype if isinstance(groups, Tensor) else type(groups).__name__
        raise TypeError(f"scores: {what} must be an int64 tensor [{n}], got {got}")
    if groups.shape != (n,) or (n and int(groups.min()) < 0):
        raise ValueError(
            f"scores: {what} must be [{n}] numbers >= 0, got shape {list(groups.shape)}, "
            f"the smallest {int(groups.min()) if groups.numel() else None}"
        )


def check_certainty(certainty: float) -> None:
    if isinstance(certainty, bool) or not isinstance(certainty, int | float) or not 0 <= certainty < math.inf:
        raise ValueError(f"top: certainty must be a number >= 0 of standard errors, got {certainty!r}")


def add_groups(values: Tensor, groups: Tensor) -> Tensor:
    """Sums of columns by group, [rows, groups]."""
    out = values.new_zeros((len(values), int(groups.max()) + 1, *values.shape[2:]))
    return out.index_add_(1, groups.cpu(), values)
