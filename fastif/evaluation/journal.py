"""A job's finished parts on disk: one JSON line each, so that an interrupted job can go on where it stopped."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


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
        f"{name} was {found.get(name)!r}, is {wanted.get(name)!r}"
        for name in dict.fromkeys((*found, *wanted))
        if found.get(name) != wanted.get(name)
    ]
    if differing:
        raise ValueError(f"{path} holds a job with other settings and cannot be resumed: {'; '.join(differing)}")


def write_whole(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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
