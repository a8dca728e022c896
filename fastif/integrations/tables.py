"""Rows of a file, JSONL or CSV, by column."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def read_columns(path: str | Path, names: Iterable[str]) -> dict[str, list[Any]]:
    """The named columns of a .jsonl file (an object a line) or a .csv file (with a header), each a list of n values.

    Values of a CSV file are strings. Empty lines hold no row.

    Raises ValueError, naming the file and the row (counted from 0) or line, for a column that is not there, a value
    that is missing or null, what is no JSON object or no row of the header's length, and where there are no rows.
    """
    path, names = Path(path), list(dict.fromkeys(names))
    if path.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"{path}: examples come from a .jsonl or a .csv file, got {path.suffix or 'no ending'}")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    found: dict[str, list[Any]] = {name: [] for name in names}
    for number, row in enumerate(_jsonl(path) if path.suffix == ".jsonl" else _csv(path)):
        for name in names:
            if row.get(name) is None:
                there = ", ".join(map(repr, row)) or "none"
                what = "is null" if name in row else f"is not there: its columns are {there}"
                raise ValueError(f"{path}, row {number}: column {name!r} {what}")
            found[name].append(row[name])
    if not all(found.values()):
        raise ValueError(f"{path} holds no rows")
    return found


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(io.StringIO(_text(path)), 1):  # ends lines at \n alone: texts may hold U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} must be a JSON object, got {type(row).__name__}")
        yield row


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise ValueError(f"{path}, line {reader.line_num} has more values than the header has columns")
            yield row
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV after line {reader.line_num}: {error}") from None


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8: {error}") from None
