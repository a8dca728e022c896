"""The folder of a training log: safetensors files, and one JSON file with the checksum of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastif.files import Damaged, sealed, unsealed, whole, write_whole

_INDEX = "log.json"
_FORMAT = "fastif.TrainingLog 1"
_REMEDY = "record the training again"


class Folder:
    """A folder that is being written, or one that was finished."""

    def __init__(self, path: Path, digests: dict[str, str]):
        self.path, self.digests = path, digests

    @classmethod
    def new(cls, path: Path) -> Folder:
        """A folder to write to. Raises FileExistsError where there is something in it."""
        path.mkdir(parents=True, exist_ok=True)
        found = next(path.iterdir(), None)
        if found is not None:
            raise FileExistsError(f"TrainingLog: {path} must be a new or empty folder, it holds {found.name}")
        return cls(path, {})

    @classmethod
    def open(cls, path: Path) -> tuple[Folder, dict[str, Any]]:
        """A finished folder, and what it says of the log."""
        index = path / _INDEX
        if not index.is_file():
            raise FileNotFoundError(f"TrainingLog: {path} holds no finished log: there is no {_INDEX}")
        try:
            facts = unsealed(index.read_text())
            if facts.get("format") != _FORMAT:
                raise ValueError(f"its format must be {_FORMAT!r}, got {facts.get('format')!r}")
            return cls(path, dict(facts["files"])), facts
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Damaged(index, str(error), _REMEDY) from error

    def damaged(self, why: str) -> Damaged:
        return Damaged(self.path / _INDEX, why, _REMEDY)

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save  # an optional dependency: logs in memory do without

        data = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
        with whole(self.path / f"{name}.safetensors", len(data)) as unfinished:
            unfinished.write_bytes(data)
        self.digests[name] = _digest(data)

    def read(self, name: str) -> dict[str, Tensor]:
        """What was written. Raises `Damaged`."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self.path / f"{name}.safetensors"
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise Damaged(path, "it is missing", _REMEDY) from error
        if _digest(data) != self.digests.get(name):
            raise Damaged(path, "its checksum is not the one in log.json", _REMEDY)
        try:
            return load(data)
        except SafetensorError as error:
            raise Damaged(path, str(error), _REMEDY) from error

    def write_point(self, number: int, at: Tensor, state: Mapping[str, Tensor]) -> None:
        self.write(f"checkpoint-{number:06d}", {"parameters": at, **state})

    def read_point(
        self, number: int, size: int, dtype: torch.dtype, state: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        name = f"checkpoint-{number:06d}"
        found = self.read(name)
        for key in ("parameters", *state):
            if key not in found or found[key].shape != (size,) or found[key].dtype != dtype:
                path = self.path / f"{name}.safetensors"
                raise Damaged(path, f"{key!r} must be {dtype} [{size}]", _REMEDY)
        return found.pop("parameters"), found

    def finish(self, facts: Mapping[str, Any]) -> None:
        entries = {"format": _FORMAT, **facts, "files": self.digests}
        write_whole(self.path / _INDEX, json.dumps(sealed(entries), indent=1))


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
