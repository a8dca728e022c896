"""Results as rows that join with the user's own data: one for each query and training example."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastif.files import write_whole

Row = dict[str, Any]


def top_rows(
    values: Tensor,
    indices: Tensor,
    *,
    ids: Sequence[Any] | Tensor | None = None,
    query_ids: Sequence[Any] | Tensor | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> list[Row]:
    """What `top` found as rows: "query", "rank" (from 1), "train" and "score", query after query, best first.

    `values` and `indices` [q, k] are those of `Influence.top`, `ScoreFolder.top`, `Replay.top` or `Index.top`.

    >>> import torch
    >>> top_rows(torch.tensor([[0.5]]), torch.tensor([[2]]), ids=["a", "b", "c"], columns={"label": [7, 8, 9]})
    [{'query': 0, 'rank': 1, 'train': 'c', 'score': 0.5, 'label': 9}]

    Args:
        ids: of the n training examples, in the place of their indices as "train".
        query_ids: of the q queries, in the place of theirs as "query".
        columns: further columns by name, one entry for each training example: texts, labels, columns of a table.

    Raises ValueError for ids or columns of another length than what they are of.
    """
    if values.shape != indices.shape or values.dim() != 2:
        raise ValueError(
            f"top_rows: values and indices must be [q, k] both, got {list(values.shape)} and {list(indices.shape)}"
        )
    columns = dict(columns or {})
    taken = [name for name in columns if name in ("query", "rank", "train", "score")]
    if taken:
        raise ValueError(f"top_rows: columns must have names of their own, got {taken[0]!r}")
    last = int(indices.max()) if indices.numel() else -1
    for name, given in {"ids": ids, **columns}.items():
        if given is not None and len(given) <= last:
            raise ValueError(f"top_rows: {name} must be of all n > {last} training examples, got {len(given)}")
    if query_ids is not None and len(query_ids) != len(values):
        raise ValueError(f"top_rows: query_ids must be of the q={len(values)} queries, got {len(query_ids)}")
    rows: list[Row] = []
    for q, (scores, places) in enumerate(zip(values.tolist(), indices.tolist(), strict=True)):
        for rank, (score, place) in enumerate(zip(scores, places, strict=True), start=1):
            own = {name: _plain(column[place]) for name, column in columns.items()}
            query, train = (_plain(of[i]) if of is not None else i for of, i in ((query_ids, q), (ids, place)))
            rows.append({"query": query, "rank": rank, "train": train, "score": score, **own})
    return rows


def write_rows(rows: Sequence[Row], path: str | Path) -> Path:
    """Writes rows to a file, .csv (with a header) or .jsonl (an object a line), whole or not at all.

    Raises ValueError for a file of another kind and where there are no rows.
    """
    path = Path(path)
    if path.suffix not in (".csv", ".jsonl") or not rows:
        told = f"{len(rows)} rows" if not rows else repr(path.name)
        raise ValueError(f"write_rows: rows go to a .csv or a .jsonl file, at least one, got {told}")
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    else:
        held = io.StringIO()
        writer = csv.DictWriter(held, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text = held.getvalue()
    write_whole(path, text)
    return path


def frame_of(rows: Sequence[Row]) -> Any:
    """Rows as a pandas DataFrame. Raises ImportError, with what would do, where pandas is not installed."""
    try:
        import pandas  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("to_pandas needs pandas (pip install pandas); write_rows needs nothing") from error
    return pandas.DataFrame(list(rows))


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
