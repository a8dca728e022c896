"""A job's finished parts on disk, so that an interrupted job can go on where it stopped: one JSON line each."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastif.files import Damaged, canonical, checksum, full_disk_named, sealed, unsealed, write_whole

Key = tuple[Any, ...]

NOTES = {  # what a difference means where its name does not say it
    "threads": "sums round differently with another number of threads: torch.set_num_threads({found}) before the job",
}


class Journal:
    """Records of a job under way, in the file `path` (None: nowhere); its first line is the job's settings.

    `append` returns when the record is on the disk: what was finished before a crash or Ctrl-C is not lost. The file
    exists from the first record until the job is finished. A record may have a key, by which it is found; of several
    with one key the first counts. Each line has a checksum of itself and of the settings, so that a line that was
    changed, or is another job's, is noticed. Whoever may meet another writer holds `fastif.folder_lock.locked`.

    Raises ValueError where `path` holds an unfinished job and `resume` is false, where it holds one with other
    settings (each difference named), and where a line other than a torn last one is damaged.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], resume: bool):
        self.path, self.settings = path, settings
        self._about = checksum(canonical(settings))
        self._kept: dict[tuple[str, str], tuple[Key, Any]] = {}  # by kind and key, of the job that is being resumed
        if path is None:
            return
        if path.exists():
            if not resume:
                raise ValueError(f"{path} holds an unfinished job; resume it, or remove the file")
            lines = self._read(path)
            write_whole(path, "".join([self._first_line(), *lines]))

    def of_kind(self, kind: str) -> Iterator[Any]:
        """What was kept under the name `kind`, in the order of writing."""
        return (value for (name, _), (_, value) in self._kept.items() if name == kind)

    def found(self, kind: str) -> dict[Key, Any]:
        """What was kept under the name `kind`, by key."""
        return {key: value for (name, _), (key, value) in self._kept.items() if name == kind}

    def append(self, kind: str, value: Any, key: Key | None = None) -> None:
        if self.path is None:
            return
        if not self.path.exists():
            write_whole(self.path, self._first_line())
        line = json.dumps(sealed({kind: value, **({} if key is None else {"key": list(key)})}, self._about)) + "\n"
        with full_disk_named(self.path, len(line)), self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _first_line(self) -> str:
        return json.dumps(sealed({"settings": self.settings})) + "\n"

    def _read(self, path: Path) -> list[str]:
        """Keeps the records of the file, and returns their lines, each once."""
        # After the last line end: nothing, or the line in whose middle the job was killed.
        *lines, _torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
        try:
            settings = unsealed(lines[0] if lines else "")["settings"]
        except (ValueError, KeyError) as error:
            raise Damaged(path, f"line 1, the settings: {error}", "remove it, and the job begins anew") from error
        refuse_differences(path, settings, self.settings)
        kept: list[str] = []
        for number, line in enumerate(lines[1:], 2):
            try:
                record = unsealed(line, self._about)
                key = record.pop("key", None)
                ((kind, value),) = record.items()
            except ValueError as error:
                raise Damaged(path, f"line {number}: {error}", "remove this line and resume the job") from error
            place = kind, canonical(value if key is None else {"key": key})
            if place not in self._kept:
                self._kept[place] = tuple(key or ()), value
                kept.append(line + "\n")
        return kept


def refuse_differences(path: Path, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """ValueError that names every setting in which the job on disk is not the job asked for."""
    differing = [
        f"{name} was {_short(was)}, is {_short(now)}" + (f" ({NOTES[name].format(found=was)})" if name in NOTES else "")
        for name in dict.fromkeys((*found, *settings))
        for name, was, now in _differences(name, found.get(name), json.loads(canonical(settings.get(name))))
    ]
    if differing:
        raise ValueError(f"{path} holds a job with other settings and cannot be resumed: {'; '.join(differing)}")


def _differences(name: str, was: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """What differs, as deep down as it can be named."""
    if canonical(was) == canonical(now):
        return
    if not (isinstance(was, dict) and isinstance(now, dict)):
        yield name, was, now
        return
    for entry in dict.fromkeys((*was, *now)):
        yield from _differences(f"{name}: {entry}", was.get(entry, _ABSENT), now.get(entry, _ABSENT))


class _Word(str):
    __repr__ = str.__str__


_ABSENT = _Word("absent")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:100]} ... {text[-50:]}"
