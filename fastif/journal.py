"""A job's finished parts on disk, so that an interrupted job can go on where it stopped: one JSON line each, or files
that appear whole or not at all."""

import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Journal:
    """Records of a job under way, in the file `path` (None: nowhere); its first line is the job's settings.

    `append` returns when the record is on the disk: what was finished before a crash or Ctrl-C is not lost. The file
    exists from the first record until the job is finished.

    Raises ValueError where `path` holds an unfinished job and `resume` is false, where it holds one with other
    settings (each difference named), and where a line other than a torn last one cannot be read.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], resume: bool):
        self.path, self.settings = path, settings
        self.kept: list[dict[str, Any]] = []  # records of the job that is being resumed
        if path is None:
            return
        if path.exists():
            if not resume:
                raise ValueError(f"{path} holds an unfinished job; resume it, or remove the file")
            found, *self.kept = _read_lines(path) or [{"settings": {}}]
            refuse_differences(path, found.get("settings", {}), settings)
            write_whole(path, "".join(_line(record) for record in ({"settings": settings}, *self.kept)))

    def of_kind(self, kind: str) -> Iterator[Any]:
        """What was kept under the name `kind`, in the order of writing."""
        return (record[kind] for record in self.kept if kind in record)

    def append(self, kind: str, value: Any) -> None:
        if self.path is None:
            return
        if not self.path.exists():
            write_whole(self.path, _line({"settings": self.settings}))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line({kind: value}))
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def refuse_differences(path: Path, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """ValueError that names every setting in which the job on disk is not the job asked for."""
    wanted = json.loads(_line(settings))
    differing = [
        f"{name} was {_short(found.get(name))}, is {_short(wanted.get(name))}"
        for name in dict.fromkeys((*found, *wanted))
        if found.get(name) != wanted.get(name)
    ]
    if differing:
        raise ValueError(f"{path} holds a job with other settings and cannot be resumed: {'; '.join(differing)}")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file that shall appear at `path` whole or not at all: it is moved there when the block ends."""
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def remove_partial(folder: Path, pattern: str) -> None:
    """Removes what a process that was killed left of files that match the pattern."""
    for unfinished in folder.glob(f".*-{pattern}"):
        if unfinished.name[1:].partition("-")[0].isdecimal():
            unfinished.unlink(missing_ok=True)


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Of the tensors' types, shapes and bits: 16 digits of their SHA-256."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def described(value: Any, depth: int = 4) -> Any:
    """Words, numbers and fingerprints that tell one function, by its source and what it holds, from another; JSON.

    >>> described(partial(sorted, reverse=True))
    ['builtins.sorted (no source)', [], {'reverse': True}]
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Tensor | np.ndarray):
        return fingerprint([torch.as_tensor(value)])
    if isinstance(value, nn.Module):
        return [repr(value), fingerprint(value.state_dict().values())]
    if depth == 0:
        return _sourced(type(value))
    below = partial(described, depth=depth - 1)
    if isinstance(value, partial):
        return [below(value.func), [below(v) for v in value.args], {k: below(v) for k, v in value.keywords.items()}]
    if isinstance(value, Mapping):
        return {str(k): below(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [below(v) for v in value]
    if hasattr(value, "__qualname__"):
        held = [below(cell.cell_contents) for cell in getattr(value, "__closure__", None) or ()]
        return [_sourced(value), held] if held else _sourced(value)
    if hasattr(value, "__dict__"):
        return [_sourced(type(value)), {k: below(v) for k, v in vars(value).items()}]
    return repr(value)


def _sourced(kind: Any) -> str:
    """The name of a function or a class, and a hash of its source."""
    try:
        source = hashlib.sha256(inspect.getsource(kind).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        source = "no source"
    return f"{kind.__module__}.{kind.__qualname__} ({source})"


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of nested mappings, lists and tuples, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:100]} ... {text[-50:]}"


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    *lines, torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    del torn  # empty, or the line in whose middle the job was killed
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is damaged in line {number}: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path} is damaged in line {number}: no record")
        records.append(record)
    return records
