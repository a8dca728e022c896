"""Scoring: the products of preconditioned query gradients with training gradients, rectangle by rectangle."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastif.curvature.directions import Directions, Explicit
from fastif.data.batches import count, walked
from fastif.data.dealing import Part, deal
from fastif.data.loaders import needs_all
from fastif.data.parts import Parts
from fastif.influence.fitted import Fitted
from fastif.influence.queries import query_blocks, shared_query_blocks
from fastif.influence.states import in_turn
from fastif.influence.tiles import By, Tile, best_of, check_groups, check_one_length, check_positions, merge_best
from fastif.model.gradients import Gradients
from fastif.ranks import ALONE, Ranks


class Scores(NamedTuple):
    """Scores in memory."""

    values: dict[str, Tensor]  # "" or, by layer, its name: [q, n]
    low_rank_error: float


def make_tiles(
    fitted: Fitted,
    query: Any,
    train: Any,
    query_groups: Tensor | None = None,
    low_rank: int | None = None,
    by: By = "all",
    first_train: int = 0,
    matrices: bool = False,
    whole: bool = False,
) -> Generator[Tile]:
    """Rectangles of the scores: queries of a block × training examples of a batch.

    train: None for a rank that takes none, which takes part in solving for the queries all the same.
    first_train: the index of the first example of `train`.
    matrices: hold queries as matrices in any case, as ranks do that keep the curvature for one another.
    whole: for these, see `shared_query_blocks`.
    """
    if low_rank is not None and low_rank < 1:
        raise ValueError(f"scores: low_rank must be at least 1, got {low_rank}")
    passes, checkpoints = fitted.passes, fitted.at_checkpoints()
    share = fitted.n * len(checkpoints)
    total = count(query, passes.batch_size) if query_groups is None else int(query_groups.max()) + 1
    for checkpoint, curvature in checkpoints:
        with passes.running(checkpoint):
            if curvature.owners:
                blocks = shared_query_blocks(fitted, query, curvature, query_groups, low_rank, whole)
            else:
                explicit = matrices or by == "token"
                made = query_blocks(fitted, query, total, curvature, query_groups, low_rank, explicit)
                blocks = (([range(first, first + len_of_all(held))], held) for first, held in made)
            for runs, held in blocks:
                low_rank_error = max(part.error for parts in held.values() for part in parts)
                batches = passes.gradients(train, _of_queries(runs, total))
                for start, _, gradients in batches:
                    parts = {}
                    for name, g in gradients.items():
                        dots = _by_position if by == "token" else _dots
                        parts[name] = dots(held[name], g).div_(share).cpu()
                    if by == "token":
                        check_positions({name: g.positions for name, g in gradients.items()})
                    del gradients  # before those of the next batch come
                    start, values = start + first_train, parts if by == "layer" else {"": _add_up(parts.values())}
                    row = 0
                    for run in runs:
                        of_run = {name: part[row : row + len(run)] for name, part in values.items()}
                        yield Tile(run.start, start, of_run, low_rank_error)
                        row += len(run)
                    del parts, values
                held.clear()  # before the next queries are held


def len_of_all(held: Mapping[str, list[Directions]]) -> int:
    """Queries."""
    return sum(map(len, next(iter(held.values())))) if held else 0


def _of_queries(runs: Sequence[range], total: int) -> str:
    """What a pass over the training data is for, to be shown."""
    if sum(map(len, runs)) == total:
        return "scores"
    told = ", ".join(f"{run.start + 1:,} to {run.stop:,}" for run in runs)
    return f"scores, queries {told} of {total:,}"


def compute_scores(
    fitted: Fitted,
    query: Any,
    train: Any,
    query_groups: Tensor | None = None,
    groups: Tensor | None = None,
    low_rank: int | None = None,
    by: By = "all",
) -> Scores:
    """The tiles put together, groups summed."""
    batch_size = fitted.passes.batch_size
    rows = count(query, batch_size)
    if query_groups is not None:
        check_groups("query_groups", query_groups, rows)
        rows = int(query_groups.max()) + 1
    columns = n = count(train, batch_size)
    if groups is not None:
        check_groups("groups", groups, n)
        columns = int(groups.max()) + 1
    out: dict[str, Tensor] = {}
    low_rank_error = 0.0
    ranks, (mine, begin) = fitted.setup.ranks, share_of(fitted, train)
    if groups is None:
        columns = n if mine is train else 0 if mine is None else len(mine.indices)
    with closing(
        make_tiles(fitted, query, mine, query_groups, low_rank, by)
    ) as tiles:  # releases the model in any case
        for tile in tiles:
            low_rank_error = max(low_rank_error, tile.low_rank_error)
            for key, values in tile.values.items():
                if key not in out:
                    out[key] = values.new_zeros((rows, columns, *values.shape[2:]))
                check_one_length(out[key].shape[2:], values)
                place = out[key][tile.query : tile.query + len(values)]
                if groups is None:
                    place[:, tile.train : tile.train + values.shape[1]] += values
                else:
                    here = begin + tile.train
                    place.index_add_(1, groups[here : here + values.shape[1]].cpu(), values)
    if ranks.world > 1:
        out = of_all_ranks(fitted, out, groups is None)
        low_rank_error = max(ranks.meet("what low_rank= lost", low_rank_error))
    return Scores(out, low_rank_error)


def share_of(fitted: Fitted, train: Any) -> tuple[Any, int]:
    """The examples of `train` that this rank takes, None where it gets none, and the index of the first."""
    ranks = fitted.setup.ranks
    if ranks.world == 1:
        return train, 0
    data = walked(train, fitted.passes.batch_size)
    mine = deal(data, ranks)
    return (Part(data, fitted.passes.batch_size, [mine]) if len(mine) else None), mine.start


def of_all_ranks(fitted: Fitted, own: dict[str, Tensor], columns: bool) -> dict[str, Tensor]:
    """The columns of all ranks side by side, or the sums of theirs; in the order of the blocks."""
    ranks, device = fitted.setup.ranks, fitted.passes.device  # what sends tensors of the device may send no others
    sent = {name: values.to(device) for name, values in own.items()}
    if columns:
        parts = [part for part in ranks.gather("scores", sent, device) if part]
        return {name: torch.cat([part[name].cpu() for part in parts], 1) for name in parts[0]}
    summed = ranks.sum_each("scores", sent, lambda _: None, device)
    return {name: values.cpu() for name, values in summed.items()}


def find_top(fitted: Fitted, query: Any, train: Any, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The k best training examples of each query, (values [q, k], indices int64 [q, k]); see `Influence.top`."""
    if len(fitted.curvatures) > 1:  # a checkpoint's part is no score: the sum has to be there before it is ranked
        scores = compute_scores(fitted, query, train).values[""]
        values, indices = scores.sort(dim=1, descending=largest, stable=True)
        return values[:, :k], indices[:, :k]
    best: dict[int, tuple[Tensor, Tensor]] = {}  # by first query of a block
    mine, begin = share_of(fitted, train)
    with closing(make_tiles(fitted, query, mine, first_train=begin)) as tiles:
        for tile in tiles:
            best[tile.query] = best_of(best.get(tile.query), tile.values[""], tile.train, k, largest)
    parts = [best[start] for start in sorted(best)]
    own = (torch.cat([values for values, _ in parts]), torch.cat([indices for _, indices in parts])) if parts else None
    return best_of_ranks(fitted.setup.ranks, own, k, largest)


def best_of_ranks(ranks: Ranks, own: tuple[Tensor, Tensor] | None, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The k best of each query, (values [q, k], indices int64 [q, k]), of the best of all ranks; `own`: of this one's
    training examples, None where it has none."""
    if ranks.world == 1:
        assert own is not None
        return own
    device = ranks.device
    found = {} if own is None else {"values": own[0].to(device), "indices": own[1].to(device)}
    of_ranks = [part for part in ranks.gather("the best of each rank", found, device) if part]
    return merge_best([(part["values"].cpu(), part["indices"].cpu()) for part in of_ranks], k, largest)


def compute_self_influence(fitted: Fitted, train: Any) -> Tensor:
    """scores[t, t] of every training example, [n]."""
    total = None
    ranks, (mine, _) = fitted.setup.ranks, share_of(fitted, train)
    if fitted.setup.estimators.needs_data:  # all ranks multiply for all examples, each with the curvature of its own
        if isinstance(train, Parts):
            raise ValueError(needs_all("self_influence: a curvature that multiplies with the data for every solve"))
        ranks, mine = ALONE, train
    for checkpoint, curvature in fitted.at_checkpoints():
        for here in in_turn(curvature, fitted.setup):
            with fitted.passes.running(checkpoint):
                batches = fitted.passes.gradients(mine, "self-influence")
                parts = [here.sq_norms(gradients).cpu() for _, _, gradients in batches]
            own = torch.cat(parts) if parts else None
            total = own if total is None or own is None else total + own
    if ranks.world > 1:
        device = fitted.passes.device
        total = ranks.join("self-influence", None if total is None else total.to(device), device).cpu()
    assert total is not None
    return total / (fitted.n * len(fitted.curvatures))


def _dots(parts: list[Directions], g: Gradients) -> Tensor:
    return torch.cat([part.dots(g) for part in parts])


def _by_position(parts: list[Directions], g: Gradients) -> Tensor:
    return torch.cat([g.by_position(part.matrices) for part in parts if isinstance(part, Explicit)])


def _add_up(parts: Any) -> Tensor:
    first, *rest = parts
    for part in rest:
        first += part
    return first
