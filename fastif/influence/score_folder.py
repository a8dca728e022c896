"""Scores on disk: the matrix [q, n], or its parts by layer or token, in blocks, so that a job that is cut off goes on
where it stopped.

    FOLDER/manifest.json                           what determines the numbers, and the borders of the blocks
    FOLDER/scores-000000000-000016384.npy          one block, by its first query and first training example

A block is a run of queries × a run of whole training batches, with the parts as a last axis. What it holds depends on
these alone, so that a resumed job ends with the bits of one that was never cut off (on one machine with one number of
threads: matrix products round as these have it). A file appears whole or not at all. Both kinds hold a checksum: a
block's is of its bytes, its place and the settings, so that neither a changed bit nor a block of another place or
another job is read as if it were right.
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

from fastif.files import Damaged, canonical, checksum, load_array, save_array, sealed, unsealed, write_whole
from fastif.influence.rows import Row, frame_of, top_rows, write_rows
from fastif.influence.tiles import best_of
from fastif.renamed import warn_renamed

MANIFEST = "manifest.json"
_FORMAT = 2  # of the manifest and the blocks; 1 had no checksums


class ScoreBlock(NamedTuple):
    """A rectangle of the scores and where it stands."""

    query: int  # first row
    train: int  # first column
    values: Tensor  # [rows, columns], [rows, columns, parts]


class ScoreFolder:
    """The scores [q, n] that `Influence.scores(out=folder)` wrote; they are read from the disk when they are asked for.

    `scores[rows, columns]` reads a part as a tensor, rows and columns being integers or slices as for a tensor;
    `scores.load()` all of it, `scores.blocks()` one block after another. `scores.settings` holds what determined the
    numbers, `scores.low_rank_error` what low_rank= lost. Those by layer are [q, n, layers], in the order of
    `scores.layers`: `scores[rows, columns, "name"]` reads one layer's; those by token are [q, n, t].

    >>> from tempfile import TemporaryDirectory
    >>> from fastif import Diagonal, Influence
    >>> _ = torch.manual_seed(0)
    >>> train = torch.randn(8, 2), torch.arange(8) % 3
    >>> influence = Influence(torch.nn.Linear(2, 3), curvature=Diagonal(), progress=False).fit(train)
    >>> with TemporaryDirectory() as folder:
    ...     _ = influence.scores(train, train, out=folder)
    ...     ScoreFolder(folder)[2:4, 5].shape
    torch.Size([2])

    Raises FileNotFoundError for a folder without scores, ValueError for one that is damaged, for one of a fastif that
    kept no checksums, and where a part is read that an unfinished job has not computed yet. A block's checksum is
    looked at when it is read for the first time, and again once its file has changed.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{self.folder} holds no scores: it has no {MANIFEST}")
        try:
            manifest = _read_manifest(self.folder, path.read_text(encoding="utf-8"))
            self.settings: dict[str, Any] = manifest["settings"]
            self.low_rank_error: float = manifest["rank_error"]
            self.row_runs, self.column_runs = _runs(self.settings["rows"]), _runs(self.settings["columns"])
            parts: list[str] | int | None = self.settings.get("parts")
            self.layers = parts if isinstance(parts, list) else None
            third = () if parts is None else (parts if isinstance(parts, int) else len(parts),)
            self.shape: tuple[int, ...] = (self.row_runs[-1].stop, self.column_runs[-1].stop, *third)
            self.dtype: torch.dtype = getattr(torch, self.settings["dtype"])
        except _Older:
            raise
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise Damaged(path, str(error), "remove the folder and compute the scores anew") from error
        self._job = checksum(canonical(self.settings))
        self._verified: dict[Path, tuple[int, ...]] = {}  # files whose checksum fits, and how they were then

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        done, blocks = self.count_blocks()
        return f"ScoreFolder({str(self.folder)!r}, shape={list(self.shape)}, {done} of {blocks} blocks)"

    @property
    def rank_error(self) -> float:
        """The old name of `low_rank_error`."""
        warn_renamed("ScoreFolder.rank_error", "ScoreFolder.low_rank_error")
        return self.low_rank_error

    @property
    def finished(self) -> bool:
        """Whether every block is there."""
        done, blocks = self.count_blocks()
        return done == blocks

    def __getitem__(self, index: Any) -> Tensor:
        rows, *rest = index if isinstance(index, tuple) else (index,)
        columns, *part = rest or (slice(None),)
        wanted = _range(rows, self.shape[0]), _range(columns, self.shape[1])
        part = tuple(self._layer(one) if isinstance(one, str) else one for one in part)
        third = torch.empty(self.shape[2:])[part].shape  # IndexError, TypeError as for any tensor
        out = torch.empty((len(wanted[0]), len(wanted[1]), *third), dtype=self.dtype)
        for run in self.row_runs:
            to_rows, from_rows = _common(wanted[0], run)
            for stretch in self.column_runs if len(from_rows) else ():
                to_columns, from_columns = _common(wanted[1], stretch)
                if len(from_columns):
                    values = self.read_block(run, stretch)[(_slice(from_rows), _slice(from_columns), *part)]
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

    def blocks(self) -> Iterator[ScoreBlock]:
        """The blocks that are there, rows first."""
        for rows, columns in product(self.row_runs, self.column_runs):
            if self.has_block(rows, columns):
                yield ScoreBlock(rows.start, columns.start, torch.from_numpy(np.array(self.read_block(rows, columns))))

    def top(self, k: int, *, largest: bool = True) -> tuple[Tensor, Tensor]:
        """The k training examples with the largest scores for each query, as `Influence.top` gives them.

        Of scores by layer or by token, those with the largest sums of parts, which are the scores.
        """
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= self.shape[1]:
            raise ValueError(f"top: k must be an integer in [1, n={self.shape[1]}], got k={k}")
        best: list[tuple[Tensor, Tensor]] = []
        for rows in self.row_runs:
            held = None
            for columns in self.column_runs:
                values = self[rows.start : rows.stop, columns.start : columns.stop]
                values = values.sum(2) if self.shape[2:] else values
                held = best_of(held, values, columns.start, k, largest)
            assert held is not None
            best.append(held)
        values, indices = zip(*best, strict=True)
        return torch.cat(values), torch.cat(indices)

    def rows(self, top: int = 10, *, largest: bool = True, **columns: Any) -> list[Row]:
        """The `top` training examples of each query, at most all, as rows; ids=, query_ids= and columns= are those of
        `top_rows`."""
        return top_rows(*self.top(min(top, self.shape[1]), largest=largest), **columns)

    def to_pandas(self, top: int = 10, *, largest: bool = True, **columns: Any) -> Any:
        """The same as a DataFrame of pandas, which has to be installed."""
        return frame_of(self.rows(top, largest=largest, **columns))

    def write(self, path: Path | str, top: int = 10, *, largest: bool = True, **columns: Any) -> Path:
        """The same as a file, .csv or .jsonl."""
        return write_rows(self.rows(top, largest=largest, **columns), path)

    # ----------------------------------------------------------------------------------------------------------- files

    def block_path(self, rows: range, columns: range) -> Path:
        return self.folder / f"scores-{rows.start:09d}-{columns.start:09d}.npy"

    def has_block(self, rows: range, columns: range) -> bool:
        return self.block_path(rows, columns).exists()

    def count_blocks(self) -> tuple[int, int]:
        have = [self.has_block(rows, columns) for rows, columns in product(self.row_runs, self.column_runs)]
        return sum(have), len(have)

    def read_block(self, rows: range, columns: range) -> np.ndarray:
        """A block, mapped; it is read as a whole the first time, for its checksum."""
        path = self.block_path(rows, columns)
        if not path.exists():
            done, blocks = self.count_blocks()
            raise ValueError(
                f"{self.folder} has no scores of queries {rows.start} to {rows.stop - 1} and training examples "
                f"{columns.start} to {columns.stop - 1} yet: {done} of {blocks} blocks are there; resume the job"
            )
        status = path.stat()
        now = status.st_ino, status.st_size, status.st_mtime_ns
        dtype, shape = torch.empty(0, dtype=self.dtype).numpy().dtype, (len(rows), len(columns), *self.shape[2:])
        values = load_array(path, dtype, shape, self._place(rows, columns), verify=self._verified.get(path) != now)
        self._verified[path] = now
        return values

    def write_block(self, rows: range, columns: range, values: np.ndarray) -> None:
        save_array(self.block_path(rows, columns), values, self._place(rows, columns))

    def _place(self, rows: range, columns: range) -> str:
        """What a block's checksum holds beside its bytes."""
        return f"{self._job} {rows} {columns}"


class _Older(ValueError): ...


def write_manifest(folder: Path, settings: Mapping[str, Any], rank_error: float) -> None:
    manifest = sealed({"format": _FORMAT, "settings": settings, "rank_error": rank_error})
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False) + "\n")


def _read_manifest(folder: Path, text: str) -> dict[str, Any]:
    found = json.loads(text)
    if isinstance(found, dict) and "settings" in found and "format" not in found and "checksum" not in found:
        raise _Older(
            f"{folder} was written by a fastif that kept no checksums: nothing tells whether its scores are as they "
            "were; remove the folder and compute them anew"
        )
    return unsealed(text)


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
