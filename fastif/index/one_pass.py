"""Several answers from one walk through the training data: their gradients are computed once for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastif.curvature.directions import Directions
from fastif.data.dealing import Part
from fastif.index.building import build
from fastif.index.index import Index, ready, walkable
from fastif.influence.fitted import Fitted
from fastif.influence.influence import Influence
from fastif.influence.queries import query_blocks
from fastif.influence.scoring import len_of_all, make_tiles
from fastif.influence.tiles import Tile, best_of
from fastif.model.gradients import Gradients


@dataclass(frozen=True)
class Answers:
    """What was asked for; None for the rest."""

    scores: Tensor | None  # [q, n]
    top: tuple[Tensor, Tensor] | None  # values [q, k], indices int64 [q, k]
    self_influence: Tensor | None  # [n]
    index: Index | None


def answer(
    influence: Influence,
    train: Any,
    query: Any | None = None,
    *,
    scores: bool = False,
    top: int = 0,
    self_influence: bool = False,
    out: Path | str | None = None,
    **options: Any,
) -> Answers:
    """What `Influence.scores`, `.top`, `.self_influence` and `Index.build` give, from one walk through the data.

    >>> from fastif import EKFAC
    >>> _ = torch.manual_seed(0)
    >>> model, x, y = torch.nn.Linear(2, 3), torch.randn(8, 2), torch.arange(8) % 3
    >>> influence = Influence(model, curvature=EKFAC(damping=1e-2), progress=False).fit((x, y))
    >>> found = answer(influence, (x, y), (x[:2], y[:2]), scores=True, top=3, self_influence=True)
    >>> found.scores.shape, found.top[1].shape, torch.equal(found.scores.diagonal() > 0, found.self_influence[:2] > 0)
    (torch.Size([2, 8]), torch.Size([2, 3]), True)

    Args:
        influence: fitted, at one model.
        query: data with labels; for `scores` and `top`. Those that `memory` does not hold take further walks.
        scores: whether the scores are asked for.
        top: how many of the best of each query; 0: none.
        self_influence: whether each example's score on itself is asked for.
        out: a folder for an index; `options` are those of `Index.build`.

    Raises ValueError where nothing is asked for, or scores without queries; what these methods raise.
    """
    fitted, data = ready(influence), walkable(influence, train)
    if len(fitted.curvatures) > 1:
        raise ValueError(f"answer: one model alone, got {len(fitted.curvatures)} checkpoints")
    wants_queries = scores or top > 0
    if not (wants_queries or self_influence or out is not None):
        raise ValueError("answer: ask for one of scores, top, self_influence, out")
    if wants_queries != (query is not None):
        raise ValueError("answer: query goes with scores and top, and they with it")
    if options and out is None:
        raise ValueError(f"answer: {', '.join(options)} go with out=, the folder of an index")
    if top and not 1 <= top <= data.n:
        raise ValueError(f"top: k must be an integer in [1, n={data.n}], got k={top}")
    found = _Rows(data.n, scores, top)
    total, held = 0, dict[str, list[Directions]]()
    if query is not None:
        query = walkable(influence, query)
        total, held = query.n, _first_queries(fitted, query, query.n)
    own: list[Tensor] = []

    def see(first: int, gradients: Mapping[str, Gradients]) -> None:
        if held:
            found.add(0, first, _scores(fitted, held, gradients))
        if self_influence and out is None:
            own.append(fitted.curvatures[0].sq_norms(gradients).cpu() / fitted.n)

    index = None
    if out is not None:
        settings = {"share": 0.04, "dtype": "int8", "ids": None, "resume": False, "key": None, **options}
        build(fitted, data, Path(out), self_influence=self_influence, see=see, **settings)
        index = Index(out, influence)
    else:
        with fitted.passes.running(fitted.setup.states[0]):
            for start, _, gradients in fitted.passes.gradients(data, "answers"):
                see(start, gradients)
                del gradients
    rows = len_of_all(held)
    held.clear()
    if rows < total:
        rest = Part(query, fitted.passes.batch_size, [range(rows, total)])
        with closing(make_tiles(fitted, rest, data)) as tiles:
            for tile in tiles:
                found.add_tile(rows, tile)
    norms = (index.self_influence() if index is not None else torch.cat(own)) if self_influence else None
    return Answers(found.scores(), found.top(), norms, index)


def _first_queries(fitted: Fitted, query: Any, total: int) -> dict[str, list[Directions]]:
    """The query side of as many queries as memory holds."""
    with fitted.passes.running(fitted.setup.states[0]):
        blocks = query_blocks(fitted, query, total, fitted.curvatures[0], None, None, False)
        _, held = next(blocks)
        return held


def _scores(fitted: Fitted, held: Mapping[str, list[Directions]], gradients: Mapping[str, Gradients]) -> Tensor:
    parts = [torch.cat([part.dots(g) for part in held[name]]).div_(fitted.n) for name, g in gradients.items()]
    return torch.stack(parts).sum(0).cpu()


class _Rows:
    """Scores as they come: all of them, or the best of each query."""

    def __init__(self, n: int, scores: bool, top: int):
        self._n, self._k = n, top
        self._parts: dict[int, list[tuple[int, Tensor]]] | None = {} if scores else None
        self._best: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, row: int, column: int, values: Tensor) -> None:
        if self._parts is not None:
            self._parts.setdefault(row, []).append((column, values))
        if self._k:
            self._best[row] = best_of(self._best.get(row), values, column, self._k, True)

    def add_tile(self, row: int, tile: Tile) -> None:
        self.add(row + tile.query, tile.train, tile.values[""])

    def scores(self) -> Tensor | None:
        if self._parts is None:
            return None
        rows = ([values for _, values in sorted(parts, key=_column)] for _, parts in sorted(self._parts.items()))
        return torch.cat([torch.cat(parts, 1) for parts in rows])

    def top(self) -> tuple[Tensor, Tensor] | None:
        if not self._k:
            return None
        values, indices = zip(*(self._best[row] for row in sorted(self._best)), strict=True)
        return torch.cat(values), torch.cat(indices)


def _column(part: tuple[int, Tensor]) -> int:
    return part[0]
