"""Scores on disk: the matrix [q, n], or its parts by layer or token, in blocks, so that a job that is cut off goes on
where it stopped.

    FOLDER/manifest.json                           what determines the numbers, and the borders of the blocks
    FOLDER/scores-000000000-000016384.npy          one block, by its first query and first training example

A block is a run of queries × a run of whole training batches, with the parts as a last axis. What it holds depends on
these alone, so that a resumed job ends with the bits of one that was never cut off (on one machine with one number of
threads: matrix products round as these have it). A file appears whole or not at all.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from itertools import accumulate, chain, pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastif._version import __version__
from fastif.curvature.called import as_called
from fastif.data.batches import Batch, as_loader, batch_lengths, indexable, picked
from fastif.journal import described, fingerprint, refuse_differences, remove_partial, tensors_in, whole, write_whole
from fastif.model.calls import dtype_of
from fastif.scoring import By, Tile, check_groups, check_one_length, check_positions, query_bytes, tiles

if TYPE_CHECKING:
    from fastif.influence import Influence

MANIFEST = "manifest.json"
BLOCK_BYTES = 64 << 20  # of a block at most, where a single batch of training examples does not take more


class Block(NamedTuple):
    """A rectangle of the scores and where it stands."""

    query: int  # first row
    train: int  # first column
    values: Tensor  # [rows, columns], [rows, columns, parts]


class ScoreFolder:
    """The scores [q, n] that `Influence.scores(out=folder)` wrote; they are read from the disk when they are asked for.

    `scores[rows, columns]` reads a part as a tensor, rows and columns being integers or slices as for a tensor;
    `scores.load()` all of it, `scores.blocks()` one block after another. `scores.settings` holds what determined the
    numbers, `scores.rank_error` what rank= lost. Those of `scores_by_layer` are [q, n, layers], in the order of
    `scores.layers`: `scores[rows, columns, "name"]` reads one layer's; those of `scores_by_token` are [q, n, t].

    >>> from tempfile import TemporaryDirectory
    >>> from fastif import Diagonal, Influence
    >>> _ = torch.manual_seed(0)
    >>> train = torch.randn(8, 2), torch.arange(8) % 3
    >>> influence = Influence(torch.nn.Linear(2, 3), curvature=Diagonal(), progress=False).fit(train)
    >>> with TemporaryDirectory() as folder:
    ...     _ = influence.scores(train, train, out=folder)
    ...     ScoreFolder(folder)[2:4, 5].shape
    torch.Size([2])

    Raises FileNotFoundError for a folder without scores, ValueError for one that is damaged and where a part is read
    that an unfinished job has not computed yet.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{self.folder} holds no scores: it has no {MANIFEST}")
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            self.settings: dict[str, Any] = manifest["settings"]
            self.rank_error: float = manifest["rank_error"]
            self._rows, self._columns = _runs(self.settings["rows"]), _runs(self.settings["columns"])
            parts: list[str] | int | None = self.settings.get("parts")
            self.layers = parts if isinstance(parts, list) else None
            third = () if parts is None else (parts if isinstance(parts, int) else len(parts),)
            self.shape: tuple[int, ...] = (self._rows[-1].stop, self._columns[-1].stop, *third)
            self.dtype: torch.dtype = getattr(torch, self.settings["dtype"])
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error!r}") from error

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        done, blocks = self._progress()
        return f"ScoreFolder({str(self.folder)!r}, shape={list(self.shape)}, {done} of {blocks} blocks)"

    @property
    def finished(self) -> bool:
        """Whether every block is there."""
        done, blocks = self._progress()
        return done == blocks

    def __getitem__(self, index: Any) -> Tensor:
        rows, *rest = index if isinstance(index, tuple) else (index,)
        columns, *part = rest or (slice(None),)
        wanted = _range(rows, self.shape[0]), _range(columns, self.shape[1])
        part = tuple(self._layer(one) if isinstance(one, str) else one for one in part)
        third = torch.empty(self.shape[2:])[part].shape  # IndexError, TypeError as for any tensor
        out = torch.empty((len(wanted[0]), len(wanted[1]), *third), dtype=self.dtype)
        for run in self._rows:
            to_rows, from_rows = _common(wanted[0], run)
            for stretch in self._columns if len(from_rows) else ():
                to_columns, from_columns = _common(wanted[1], stretch)
                if len(from_columns):
                    values = self._read(run, stretch)[(_slice(from_rows), _slice(from_columns), *part)]
                    out[_slice(to_rows), _slice(to_columns)] = torch.from_numpy(np.array(values))
        whole_axes = tuple(slice(None) if isinstance(part, slice) else 0 for part in (rows, columns))
        return out[whole_axes]

    def _layer(self, name: str) -> int:
        if name not in (self.layers or ()):
            raise ValueError(f"scores: no layer {name!r} in {self.folder}: {', '.join(self.layers or ['none'])}")
        assert self.layers is not None
        return self.layers.index(name)

    def load(self) -> Tensor:
        """All scores, [q, n], or with the parts as a last axis."""
        return self[:, :]

    def blocks(self) -> Iterator[Block]:
        """The blocks that are there, rows first."""
        for rows, columns in product(self._rows, self._columns):
            if self._has(rows, columns):
                yield Block(rows.start, columns.start, torch.from_numpy(np.array(self._read(rows, columns))))

    def top(self, k: int, *, largest: bool = True) -> tuple[Tensor, Tensor]:
        """The k training examples with the largest scores for each query, as `Influence.top` gives them.

        Of scores by layer or by token, those with the largest sums of parts, which are the scores.
        """
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= self.shape[1]:
            raise ValueError(f"top: k must be an integer in [1, n={self.shape[1]}], got k={k}")
        best: list[tuple[Tensor, Tensor]] = []
        for rows in self._rows:
            held = None
            for columns in self._columns:
                values = self[rows.start : rows.stop, columns.start : columns.stop]
                values = values.sum(2) if self.shape[2:] else values
                held = best_of(held, values, columns.start, k, largest)
            assert held is not None
            best.append(held)
        values, indices = zip(*best, strict=True)
        return torch.cat(values), torch.cat(indices)

    # ----------------------------------------------------------------------------------------------------------- files

    def _path(self, rows: range, columns: range) -> Path:
        return self.folder / f"scores-{rows.start:09d}-{columns.start:09d}.npy"

    def _has(self, rows: range, columns: range) -> bool:
        return self._path(rows, columns).exists()

    def _progress(self) -> tuple[int, int]:
        have = [self._has(rows, columns) for rows, columns in product(self._rows, self._columns)]
        return sum(have), len(have)

    def _read(self, rows: range, columns: range) -> np.ndarray:
        """A block, mapped and not read."""
        path = self._path(rows, columns)
        if not path.exists():
            done, blocks = self._progress()
            raise ValueError(
                f"{self.folder} has no scores of queries {rows.start} to {rows.stop - 1} and training examples "
                f"{columns.start} to {columns.stop - 1} yet: {done} of {blocks} blocks are there; resume the job"
            )
        try:
            values = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is damaged: {error}; remove it and resume the job") from error
        dtype, shape = torch.empty(0, dtype=self.dtype).numpy().dtype, (len(rows), len(columns), *self.shape[2:])
        if values.shape != shape or values.dtype != dtype:
            raise ValueError(
                f"{path} is damaged: it must be {dtype} {list(shape)}, got {values.dtype} {list(values.shape)}; "
                "remove it and resume the job"
            )
        return values

    def _write(self, rows: range, columns: range, values: Tensor, rank_error: float) -> None:
        try:
            if rank_error > self.rank_error:  # first: a block whose error is not noted would be taken for exact
                self.rank_error = rank_error
                _write_manifest(self.folder, self.settings, rank_error)
            with whole(self._path(rows, columns)) as partial:
                np.save(partial, values.numpy())
        except OSError as error:
            done, blocks = self._progress()
            why = f"{error.strerror or error}; {done} of {blocks} blocks are kept in {self.folder}"
            raise OSError(error.errno, f"{why}, and the same job goes on from there when it is resumed") from error

    @classmethod
    def _begun(cls, folder: Path, settings: Mapping[str, Any], resume: bool) -> ScoreFolder:
        """The folder of a job, made where there is none yet; one of another job is refused."""
        begun = (folder / MANIFEST).exists()
        if begun and not resume:
            raise ValueError(f"{folder} holds scores already; resume the job, or remove the folder")
        if begun:
            refuse_differences(folder, cls(folder).settings, settings)
        elif any(folder.glob("scores-*.npy")):
            raise ValueError(f"{folder} holds blocks of scores but no {MANIFEST} that says of what; remove them")
        folder.mkdir(parents=True, exist_ok=True)
        for name in (MANIFEST, "scores-*.npy"):
            remove_partial(folder, name)
        if not begun:
            _write_manifest(folder, settings, 0.0)
        scores = cls(folder)
        for rows, columns in product(scores._rows, scores._columns):
            if scores._has(rows, columns):
                scores._read(rows, columns)  # refuses what is damaged
        return scores


def _write_manifest(folder: Path, settings: Mapping[str, Any], rank_error: float) -> None:
    manifest = {"settings": settings, "rank_error": rank_error}
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False) + "\n")


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


def best_of(
    held: tuple[Tensor, Tensor] | None, values: Tensor, first: int, k: int, largest: bool
) -> tuple[Tensor, Tensor]:
    """The k best of those held and further columns, which begin at `first`; ties go to the lower index."""
    indices = torch.arange(first, first + values.shape[1]).expand_as(values)
    if held is not None:
        values, indices = torch.cat([held[0], values], 1), torch.cat([held[1], indices], 1)
    order = values.argsort(dim=1, descending=largest, stable=True)[:, :k]
    return values.gather(1, order), indices.gather(1, order)


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


# ------------------------------------------------------------------------------------------------------------- borders


def _borders(lengths: Iterable[int], most: int) -> list[int]:
    """Borders of runs of whole batches with at most `most` examples each."""
    borders, end = [0], 0
    for length in lengths:
        if end + length - borders[-1] > most:
            borders.append(end)
        end += length
    return [*borders, end]


def _runs(borders: list[int]) -> list[range]:
    return [range(begin, end) for begin, end in pairwise(borders)]


def _range(index: Any, size: int) -> range:
    if isinstance(index, slice):
        if index.step is not None and index.step < 1:
            raise ValueError(f"scores: the step of a slice must be at least 1, got {index.step}")
        return range(size)[index]
    place = range(size)[index]  # IndexError, TypeError as for any sequence
    return range(place, place + 1)


def _common(wanted: range, run: range) -> tuple[range, range]:
    """Places in `wanted` and in `run` of what both hold."""
    first = max(0, -(-(run.start - wanted.start) // wanted.step))
    last = min(len(wanted), max(first, -(-(run.stop - wanted.start) // wanted.step)))
    here = wanted[first:last]
    return range(first, first + len(here)), range(here.start - run.start, here.stop - run.start, here.step)


def _slice(places: range) -> slice:
    return slice(places.start, places.stop, places.step)
