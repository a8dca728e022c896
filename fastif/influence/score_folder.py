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
from collections.abc import Iterator, Mapping
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastif.influence.tiles import best_of
from fastif.journal import refuse_differences, remove_partial, whole, write_whole

MANIFEST = "manifest.json"


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


# ------------------------------------------------------------------------------------------------------------- borders


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
