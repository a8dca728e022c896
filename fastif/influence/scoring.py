"""Scoring: the products of preconditioned query gradients with training gradients, rectangle by rectangle."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastif.curvature import Directions, Explicit
from fastif.data.batches import count
from fastif.influence.queries import query_blocks
from fastif.influence.tiles import By, Tile, check_groups, check_one_length, check_positions
from fastif.model.gradients import Gradients

if TYPE_CHECKING:
    from fastif.influence.influence import Influence


def tiles(
    influence: Influence,
    query: Any,
    train: Any,
    query_groups: Tensor | None = None,
    rank: int | None = None,
    by: By = "all",
) -> Generator[Tile]:
    """Rectangles of the scores: queries of a block × training examples of a batch."""
    if rank is not None and rank < 1:
        raise ValueError(f"scores: rank must be at least 1, got {rank}")
    influence.rank_error = 0.0
    share = influence.n * len(influence.at_checkpoints())
    total = count(query, influence.passes.batch_size) if query_groups is None else int(query_groups.max()) + 1
    for checkpoint, curvature in influence.at_checkpoints():
        with influence.passes.running(checkpoint):
            for first, held in query_blocks(influence, query, total, curvature, query_groups, rank, by == "token"):
                for start, _, gradients in influence.passes.gradients(train, _of_queries(first, held, total)):
                    parts = {}
                    for name, g in gradients.items():
                        dots = _by_position if by == "token" else _dots
                        parts[name] = dots(held[name], g).div_(share).cpu()
                    if by == "token":
                        check_positions({name: g.positions for name, g in gradients.items()})
                    del gradients  # before those of the next batch come
                    yield Tile(first, start, parts if by == "layer" else {"": _added(parts.values())})
                held.clear()  # before the next queries are held


def _of_queries(first: int, held: Mapping[str, list[Directions]], total: int) -> str:
    """What a pass over the training data is for, to be shown."""
    rows = sum(map(len, next(iter(held.values()))))
    return "scores" if rows == total else f"scores, queries {first + 1:,} to {first + rows:,} of {total:,}"


def assembled(
    influence: Influence,
    query: Any,
    train: Any,
    query_groups: Tensor | None = None,
    groups: Tensor | None = None,
    rank: int | None = None,
    by: By = "all",
) -> dict[str, Tensor]:
    """The tiles put together, groups summed."""
    rows = count(query, influence.passes.batch_size)
    if query_groups is not None:
        check_groups("query_groups", query_groups, rows)
        rows = int(query_groups.max()) + 1
    columns = n = count(train, influence.passes.batch_size)
    if groups is not None:
        check_groups("groups", groups, n)
        columns = int(groups.max()) + 1
    out: dict[str, Tensor] = {}
    with closing(tiles(influence, query, train, query_groups, rank, by)) as made:  # the model is released in any case
        for tile in made:
            for key, values in tile.values.items():
                if key not in out:
                    out[key] = values.new_zeros((rows, columns, *values.shape[2:]))
                check_one_length(out[key].shape[2:], values)
                place = out[key][tile.query : tile.query + len(values)]
                if groups is None:
                    place[:, tile.train : tile.train + values.shape[1]] += values
                else:
                    place.index_add_(1, groups[tile.train : tile.train + values.shape[1]].cpu(), values)
    return out


def _dots(parts: list[Directions], g: Gradients) -> Tensor:
    return torch.cat([part.dots(g) for part in parts])


def _by_position(parts: list[Directions], g: Gradients) -> Tensor:
    return torch.cat([g.by_position(part.matrices) for part in parts if isinstance(part, Explicit)])


def _added(parts: Any) -> Tensor:
    first, *rest = parts
    for part in rest:
        first += part
    return first
