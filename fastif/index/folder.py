"""An index on disk.

    FOLDER/manifest.json                 what it is of, where gradients were cut off, its measured error, its blocks
    FOLDER/curvature.safetensors         the state of the curvature: what `Influence.state_dict` gave
    FOLDER/block-000000000.safetensors   one block of training examples, by its first
    FOLDER/exact.safetensors             until the error is measured: exact scores [q, m] of a sample

A block has, for the examples that it holds: `examples` int64 [n], their numbers; where they were asked for, `own` [n],
each one's score on itself; where they were given, `ids` int64 [n], or `id_bytes` uint8 and `id_ends` int64 [n] of
strings; and for the block of parameters that stands k-th in the manifest's `layers`, of the shape g × [o, d]:

    k/ranks int32 [n, g]     how many factors each example has, in each of the g matrices
    k/left  [F, o]           in their order, int8, float16 or float32; of a table int32 [F], its rows
    k/right [F, d]           likewise
    k/scale float32 [F]      what their product is multiplied by; not with float32

Σ_f scale_f left_f right_fᵀ is x yᵀ ∘ g, with x and y that the state of the curvature gives, docs/math.md (26).
Files appear whole or not at all, and have checksums of what they hold and of what it belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastif.data.tensor_files import load_tensors, save_tensors
from fastif.files import Damaged, canonical, checksum, sealed, unsealed
from fastif.index.factors import Factors
from fastif.influence.shared_folder import write_seen
from fastif.ranks import ALONE, Ranks

MANIFEST, CURVATURE, EXACT = "manifest.json", "curvature.safetensors", "exact.safetensors"
_FORMAT = 2
_REMEDY = "remove the folder and build the index anew"
Ids = Tensor | list[str] | None


class IndexBlock(NamedTuple):
    """Some training examples as they are stored."""

    examples: Tensor  # int64 [n], their numbers
    own: Tensor | None  # [n]
    factors: dict[str, Factors]  # by block of parameters
    ids: Ids = None

    def select(self, rows: Tensor) -> IndexBlock:
        """Some of them, by increasing places."""
        factors = {name: part.select(rows) for name, part in self.factors.items()}
        ids = [self.ids[i] for i in rows.tolist()] if isinstance(self.ids, list) else self.ids
        own = None if self.own is None else self.own[rows]
        return IndexBlock(self.examples[rows], own, factors, ids[rows] if isinstance(ids, Tensor) else ids)


class Folder:
    """The files of an index. `manifest` is what the manifest holds:

    settings: what all parts share; layers: [[name, [g, o, d], table]]; worth: `Metric.worth` of those whose estimators
    have no eigenbasis; threshold; numbers: of a gradient; measured; parts: of each build or append its settings and the
    borders of its blocks; removed: numbers of examples.

    Raises FileNotFoundError for a folder without an index, and `Damaged`.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._verified: dict[Path, tuple[int, ...]] = {}  # files whose checksum fits, and how they were then
        self.manifest: dict[str, Any] = {}
        self.read()

    def read(self) -> None:
        """The manifest, as it is now."""
        file = self.path / MANIFEST
        if not file.is_file():
            raise FileNotFoundError(f"{self.path} holds no index: it has no {MANIFEST}")
        try:
            manifest = unsealed(file.read_text(encoding="utf-8"))
            if "layers" not in manifest:
                raise ValueError("it is of something else than an index")
            if manifest["format"] != _FORMAT:
                raise ValueError(f"its format is {manifest['format']}, this fastif reads {_FORMAT}")
        except (ValueError, KeyError) as error:
            raise Damaged(file, str(error), _REMEDY) from error
        self.manifest = manifest

    @staticmethod
    def write_manifest(path: Path, manifest: dict[str, Any], ranks: Ranks = ALONE) -> None:
        """Of several ranks the first writes its own, and the others see it."""
        text = json.dumps(sealed({**manifest, "format": _FORMAT}), indent=1, allow_nan=False)
        write_seen(path / MANIFEST, text + "\n", ranks)

    def write(self, ranks: Ranks = ALONE, **changes: Any) -> None:
        """Changes entries of the manifest, on disk first."""
        manifest = {**self.manifest, **changes}
        self.write_manifest(self.path, manifest, ranks)
        self.manifest = manifest

    @property
    def job(self) -> str:
        """What a block's checksum holds beside its bytes: it belongs to this index alone."""
        settings = self.manifest["settings"]
        return checksum(canonical([settings, *(self.manifest[name] for name in ("threshold", "layers", "worth"))]))

    @property
    def runs(self) -> list[range]:
        """The examples of every block, those that were removed included."""
        return [range(*pair) for part in self.manifest["parts"] for pair in pairwise(part["borders"])]

    @property
    def total(self) -> int:
        """Examples that were ever walked through."""
        return self.runs[-1].stop

    @property
    def examples(self) -> Tensor:
        """The numbers of those that are held, int64 [n]."""
        keep = torch.ones(self.total, dtype=torch.bool)
        keep[torch.tensor(self.manifest["removed"], dtype=torch.int64)] = False
        return keep.nonzero()[:, 0]

    def path_of(self, run: range) -> Path:
        return self.path / f"block-{run.start:09d}.safetensors"

    def missing(self) -> list[range]:
        return [run for run in self.runs if not self.path_of(run).exists()]

    def check_finished(self) -> None:
        missing = self.missing()
        if missing:
            appended = missing[0].start >= self.manifest["parts"][0]["borders"][-1]
            raise ValueError(
                f"{self.path} is unfinished: {len(missing)} of {len(self.runs)} blocks are not there, examples "
                f"{missing[0].start} to {missing[0].stop - 1} first; the same call with resume=True goes on"
                + (", and an append without it takes their place" if appended else "")
            )

    @property
    def nbytes(self) -> int:
        """Of the blocks."""
        return sum(self.path_of(run).stat().st_size for run in self.runs if self.path_of(run).exists())

    def blocks(self) -> Iterator[IndexBlock]:
        """One after another, without what was removed."""
        for run in self.runs:
            yield self.read_block(run)

    def read_block(self, run: range) -> IndexBlock:
        path = self.path_of(run)
        if not path.exists():
            self.check_finished()
        status = path.stat()
        now = status.st_ino, status.st_size, status.st_mtime_ns
        about, tensors = load_tensors(path, verify=self._verified.get(path) != now)
        if about != self._about(run):
            raise Damaged(path, "it is a block of another index, or of another place", _REMEDY)
        self._verified[path] = now
        try:
            block = _read(tensors, [layer[0] for layer in self.manifest["layers"]])
        except KeyError as error:
            raise Damaged(path, f"it lacks {error.args[0]!r}", _REMEDY) from error
        return self._held(block)

    def write_block(self, run: range, block: IndexBlock) -> None:
        save_tensors(self.path_of(run), _tensors(self._held(block)), self._about(run))

    def _held(self, block: IndexBlock) -> IndexBlock:
        """What is left of a block without the examples that were removed."""
        removed = torch.tensor(self.manifest["removed"], dtype=torch.int64)
        keep = ~torch.isin(block.examples, removed)
        return block if bool(keep.all()) else block.select(keep.nonzero()[:, 0])

    def _about(self, run: range) -> Any:
        return {"index": self.job, "examples": [run.start, run.stop]}


def _tensors(block: IndexBlock) -> dict[str, Tensor]:
    tensors = {"examples": block.examples, **({} if block.own is None else {"own": block.own})}
    for number, factors in enumerate(block.factors.values()):
        tensors.update(factors.tensors(f"{number}/"))
    if isinstance(block.ids, Tensor):
        tensors["ids"] = block.ids
    elif block.ids is not None:
        texts = [one.encode() for one in block.ids]
        tensors["id_bytes"] = torch.tensor(list(b"".join(texts)), dtype=torch.uint8)
        tensors["id_ends"] = torch.tensor([len(text) for text in texts], dtype=torch.int64).cumsum(0)
    return tensors


def _read(tensors: dict[str, Tensor], layers: list[str]) -> IndexBlock:
    factors = {name: Factors.from_tensors(tensors, f"{number}/") for number, name in enumerate(layers)}
    ids: Ids = tensors.get("ids")
    if "id_ends" in tensors:
        text, ends = bytes(tensors["id_bytes"].numpy()), [0, *tensors["id_ends"].tolist()]
        ids = [text[begin:end].decode() for begin, end in pairwise(ends)]
    return IndexBlock(tensors["examples"], tensors.get("own"), factors, ids)
