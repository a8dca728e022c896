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
from fastif.data.dealing import Part, deal
from fastif.index.building import build
from fastif.index.encoder import ready, walkable
from fastif.index.index import Index
from fastif.index.sampling import exact_scores
from fastif.influence.fitted import Fitted
from fastif.influence.influence import Influence
from fastif.influence.queries import query_blocks
from fastif.influence.scoring import best_of_ranks, len_of_all, make_tiles
from fastif.influence.sharing import compare_setups
from fastif.influence.tiles import Tile, best_of
from fastif.model.gradients import Gradients
from fastif.ranks import ALONE, Ranks


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

    Of several ranks each walks through a run of the training examples, and all get all answers.

    Raises ValueError where nothing is asked for, or scores without queries; what these methods raise.
    """
    with influence.ranks.together("answer"):
        return _answer(influence, train, query, scores, top, self_influence, out, options)


def _answer(
    influence: Influence,
    train: Any,
    query: Any | None,
    scores: bool,
    top: int,
    self_influence: bool,
    out: Path | str | None,
    options: dict[str, Any],
) -> Answers:
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
    if query is not None:
        query = walkable(influence, query)
    like = options.get("threshold")
    asked: dict[str, Any] = dict(scores=scores, top=top, self_influence=self_influence)
    asked |= {"out": None if out is None else str(out), **{name: options[name] for name in options if name != "ids"}}
    if isinstance(like, Index):
        asked["threshold"], options = like.threshold, {**options, "threshold": like._folder}
    compare_setups(fitted.setup, "answer", {"train": data, "query": query, **asked})
    # Where solving takes all ranks, each solves for all examples, with the curvature of its own.
    together = fitted.setup.estimators.needs_data
    ranks = ALONE if together else fitted.setup.ranks
    whole, fitted = fitted, fitted if together else fitted.alone
    found = _Rows(scores, top)
    total, held = 0, dict[str, list[Directions]]()
    if query is not None:
        total, held = query.n, _first_queries(fitted, query, query.n)
    own: list[Tensor] = []

    def see(first: int, gradients: Mapping[str, Gradients]) -> None:
        if held:
            found.add(0, first, exact_scores(fitted, held, gradients))
        if self_influence and out is None:
            own.append(fitted.curvatures[0].sq_norms(gradients).cpu() / fitted.n)

    index, mine = None, deal(data, ranks)
    part = Part(data, fitted.passes.batch_size, [mine]) if len(mine) else None
    if out is not None:
        settings = {"share": 0.04, "dtype": "int8", "ids": None, "resume": False, "key": None, **options}
        build(whole, data, Path(out), self_influence=self_influence, see=see, **settings)
        index = Index(out, influence)
    elif part is not None:
        with fitted.passes.running(fitted.setup.states[0]):
            for start, _, gradients in fitted.passes.gradients(part, "answers"):
                see(mine.start + start, gradients)
                del gradients
    rows = len_of_all(held)
    held.clear()
    if rows < total:
        rest = Part(query, fitted.passes.batch_size, [range(rows, total)])
        with closing(make_tiles(fitted, rest, part, first_train=mine.start)) as tiles:
            for tile in tiles:
                found.add_tile(rows, tile)
    norms = None
    if index is not None and self_influence:
        norms = index.self_influence()
    elif self_influence:
        of_rank = torch.cat(own).to(ranks.device) if own else None
        norms = ranks.join("self-influence", of_rank, ranks.device).cpu()
    return Answers(found.scores(ranks), found.top(ranks), norms, index)


def _first_queries(fitted: Fitted, query: Any, total: int) -> dict[str, list[Directions]]:
    """The query side of as many queries as memory holds."""
    with fitted.passes.running(fitted.setup.states[0]):
        blocks = query_blocks(fitted, query, total, fitted.curvatures[0], None, None, False)
        _, held = next(blocks)
        return held


class _Rows:
    """Scores as they come: all of them, or the best of each query."""

    def __init__(self, scores: bool, top: int):
        self._k = top
        self._parts: dict[int, list[tuple[int, Tensor]]] | None = {} if scores else None
        self._best: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, row: int, column: int, values: Tensor) -> None:
        if self._parts is not None:
            self._parts.setdefault(row, []).append((column, values))
        if self._k:
            self._best[row] = best_of(self._best.get(row), values, column, self._k, True)

    def add_tile(self, row: int, tile: Tile) -> None:
        self.add(row + tile.query, tile.train, tile.values[""])

    def scores(self, ranks: Ranks) -> Tensor | None:
        """Those of all ranks, whose columns follow one another."""
        if self._parts is None:
            return None
        rows = {row: [values for _, values in sorted(parts, key=_column)] for row, parts in self._parts.items()}
        own = torch.cat([torch.cat(rows[row], 1) for row in sorted(rows)]).to(ranks.device) if rows else None
        return ranks.join("scores", own, ranks.device, dim=1).cpu()

    def top(self, ranks: Ranks) -> tuple[Tensor, Tensor] | None:
        if not self._k:
            return None
        found = [torch.cat(parts) for parts in zip(*(self._best[row] for row in sorted(self._best)), strict=True)]
        own = (found[0], found[1]) if found else None
        return best_of_ranks(ranks, own, self._k, True)


def _column(part: tuple[int, Tensor]) -> int:
    return part[0]
