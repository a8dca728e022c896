"""The job that writes a folder of scores: what is missing, block by block, and what determines the numbers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastif._version import __version__
from fastif.curvature.called import as_called
from fastif.data.batches import Batch, as_loader, batch_lengths, indexable, picked
from fastif.influence.queries import query_bytes
from fastif.influence.score_folder import ScoreFolder
from fastif.influence.scoring import tiles
from fastif.influence.tiles import By, Tile, check_groups, check_one_length, check_positions
from fastif.journal import described, fingerprint, tensors_in
from fastif.model.calls import dtype_of

if TYPE_CHECKING:
    from fastif.influence.influence import Influence

BLOCK_BYTES = 64 << 20  # of a block at most, where a single batch of training examples does not take more


def write_scores(
    influence: Influence,
    query: Any,
    train: Any,
    folder: Path | str,
    *,
    resume: bool,
    query_groups: Tensor | None = None,
    rank: int | None = None,
    by: By = "all",
) -> ScoreFolder:
    """Computes what is missing of the scores in `folder`; `Influence.scores` documents it."""
    for data in (query, train):
        if isinstance(data, Iterator):
            raise ValueError("scores: out= walks through the data more than once, got an iterator; pass a list")
    settings = settings_of(influence, query, train, query_groups, rank, by)
    scores = ScoreFolder._begun(Path(folder), settings, resume)
    checkpoints = len(influence.at_checkpoints())
    for rows in scores._rows:
        missing = [columns for columns in scores._columns if not scores._has(rows, columns)]
        # All checkpoints are in a block before the next one begins; with one alone, the queries are seen to once.
        for columns in [missing] if checkpoints == 1 and missing else [[run] for run in missing]:
            mine = query if query_groups is not None else _Part(query, influence.passes.batch_size, [rows])
            made = tiles(influence, mine, _Part(train, influence.passes.batch_size, columns), query_groups, rank, by)
            _write_tiles(influence, scores, made, rows, columns)
    if rank is not None:
        influence.rank_error = scores.rank_error
    return scores


def _write_tiles(
    influence: Influence, scores: ScoreFolder, made: Generator[Tile], rows: range, missing: list[range]
) -> None:
    """Blocks of one run of queries, from the tiles of all their missing runs of training examples."""
    starts = list(accumulate((len(run) for run in missing), initial=0))  # where the runs begin in the part
    under_way: dict[int, Tensor] = {}
    left = [len(rows) * len(run) * len(influence.at_checkpoints()) for run in missing]
    with closing(made):
        for tile in made:
            number = bisect_right(starts, tile.train) - 1  # a batch lies in one run
            run = missing[number]
            values = tile.values[""] if scores.layers is None else torch.stack([*tile.values.values()], 2)
            check_one_length(scores.shape[2:], values)
            if number not in under_way:
                under_way[number] = torch.zeros((len(rows), len(run), *scores.shape[2:]), dtype=scores.dtype)
            column = tile.train - starts[number]
            under_way[number][tile.query : tile.query + len(values), column : column + values.shape[1]] += values
            left[number] -= values.shape[0] * values.shape[1]
            if left[number] == 0:
                scores._write(rows, run, under_way.pop(number), influence.rank_error)
    if any(left):
        raise ValueError("scores: the data gave fewer examples than at its first pass")


class _Part:
    """Some runs of the examples of data, as data: no batch of it crosses a border."""

    def __init__(self, data: Any, batch_size: int, runs: list[range]):
        self.data, self.batch_size = data, batch_size
        self.indices = torch.cat([torch.arange(run.start, run.stop) for run in runs])

    def __len__(self) -> int:
        """Batches, for the progress bar."""
        if not indexable(self.data):
            raise TypeError("data that can only be walked does not know")
        return -(-len(self.indices) // batch_lengths(self.data, self.batch_size)[0])

    def __iter__(self) -> Iterator[Batch]:
        for batch, _ in picked(self.data, self.batch_size, self.indices):
            yield batch


# ------------------------------------------------------------------------------------------------------------- settings


def settings_of(
    influence: Influence, query: Any, train: Any, query_groups: Tensor | None, rank: int | None, by: By
) -> dict[str, Any]:
    """All that determines the scores' bits, but for the data, of which the first batches stand for the rest."""
    parts = [*influence.capture.blocks] if by == "layer" else _positions(influence, train) if by == "token" else None
    item = dtype_of(influence.model).itemsize
    lengths = [batch_lengths(data, influence.passes.batch_size) for data in (query, train)]
    each = query_bytes(influence, query, rank, by)
    if parts is not None:  # the bytes of a score are those of all its parts
        item *= parts if isinstance(parts, int) else len(parts)
    widest, height = max(lengths[1]), sum(lengths[0])
    rows = max(1, min(height, influence.memory // each, BLOCK_BYTES // (widest * item)))
    if len(influence.at_checkpoints()) > 1:  # queries go through the model again for every block: no higher than wide
        rows = max(1, min(rows, int((BLOCK_BYTES / item) ** 0.5)))
    if query_groups is not None:  # a group's queries may be anywhere: all go through the model at once
        check_groups("query_groups", query_groups, height)
        rows = height = int(query_groups.max()) + 1
    return {
        "q": sum(lengths[0]),
        "n": sum(lengths[1]),
        **fit_settings(influence, train),
        "measurement": described(influence.measurement),
        "rank": rank,
        "by": None if by == "all" else by,
        "parts": parts,
        "query groups": None if query_groups is None else fingerprint([query_groups]),
        "curvature state": fingerprint((*influence.state_dict().values(), *_multiplied(influence))),
        "factors in place": _in_place(influence),
        "memory": influence.memory,
        "query": _first_batch(query, influence.passes.batch_size),
        "rows": [*range(0, height, rows), height],
        "columns": _borders(lengths[1], max(widest, BLOCK_BYTES // (rows * item))),
    }


def fit_settings(influence: Influence, train: Any) -> dict[str, Any]:
    """All that determines the curvature but for its subset."""
    model, checkpoints = influence.model, influence.checkpoints
    own = dict(chain(model.named_parameters(), model.named_buffers()))
    states = [own] if checkpoints is None else checkpoints
    covered: dict[str, list[str]] = {}
    for name, estimator in influence.parts.by_block.items():
        covered.setdefault(as_called(estimator), []).append(name)
    return {
        "loss": described(influence.passes.loss),
        "curvature": "; ".join(f"{estimator} of {', '.join(names)}" for estimator, names in covered.items()),
        "checkpoints": None if checkpoints is None else len(checkpoints),
        "model": fingerprint(t for state in states for t in state.values() if isinstance(t, Tensor)),
        "train": _first_batch(train, influence.passes.batch_size),
        "batch_size": influence.passes.batch_size,
        "dtype": str(dtype_of(model)).removeprefix("torch."),
        "autocast": None if influence.passes.autocast is None else str(influence.passes.autocast),
        "allow_train_mode": influence.passes.allow_train_mode,
        "device": influence.device.type,
        "seed": influence.seed,
        "fastif": __version__,
        "torch": torch.__version__,
    }


def _multiplied(influence: Influence) -> Iterable[Tensor]:
    """The subset with whose curvature solves multiply, which no state holds."""
    return influence.subset if influence.parts.needs_data and influence.subset is not None else ()


def _in_place(influence: Influence) -> list[str]:
    """Exact blocks whose factor stands in their own square: as near, but not the same to the bit."""
    fitted = [curvature.by_block for _, curvature in influence.at_checkpoints()]
    return sorted({name for by in fitted for name, block in by.items() if getattr(block, "in_place_used", False)})


def _positions(influence: Influence, train: Any) -> int:
    """Of the first batch; at others', if they have another number, `check_one_length` raises."""
    checkpoint, _ = influence.at_checkpoints()[0]
    batch = next(iter(as_loader(train, influence.passes.batch_size)))
    with influence.passes.running(checkpoint):
        (_, _, gradients), *_ = influence.passes.gradients([batch], "positions")
    return check_positions({name: g.positions for name, g in gradients.items()})


def _first_batch(data: Any, batch_size: int) -> str:
    return fingerprint(tensors_in(next(iter(as_loader(data, batch_size)))))


def _borders(lengths: Iterable[int], most: int) -> list[int]:
    """Borders of runs of whole batches with at most `most` examples each."""
    borders, end = [0], 0
    for length in lengths:
        if end + length - borders[-1] > most:
            borders.append(end)
        end += length
    return [*borders, end]
