"""Anything that holds examples, as batches (x, y) in a fixed order."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fastif.data.batch import Batch, batch_length, read_batch, rows_of
from fastif.data.orders import check_order, is_pair, is_table

Held = dict[str, str]


class NoExamples(ValueError):
    """Data without examples."""


class Sharded:
    """Data of which this rank has a part of its own, as `fastif.sharded` says."""

    def __init__(self, data: Any, group: Any):
        self.data, self.group = data, group


def needs_all(op: str) -> str:
    """What is said where the data of all ranks are needed on every one."""
    return f"{op} needs all examples on every rank, and of this data each has a part of its own (fastif.sharded)"


def loader_of(data: Any, batch_size: int, held: Held | None = None) -> Iterable[Batch]:
    """As `fastif.data.as_loader`; `held` is what `read_batch` is told of the parts of batches before."""
    held = {} if held is None else held
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(data, Sharded):
        raise ValueError(needs_all("data: this"))
    if isinstance(data, DataLoader):
        check_order(data)
        return _Batches(data, held)
    if isinstance(data, Tensor | np.ndarray | Mapping) or is_pair(data):
        return _Rows(data, batch_size, held)
    if isinstance(data, tuple) and not all(isinstance(part, Mapping | tuple | list) for part in data):
        kinds = ", ".join(type(part).__name__ for part in data)
        raise TypeError(f"a tuple of data must be two tensors (x, y), got ({kinds})")
    if isinstance(data, Dataset) or is_table(data):
        if not isinstance(data, IterableDataset) and len(data) == 0:  # pyright: ignore[reportArgumentType]
            raise NoExamples("data holds no examples")
        return _Batches(DataLoader(as_tensors(data), batch_size=batch_size, shuffle=False), held)
    if isinstance(data, Iterable) and not isinstance(data, str | bytes):
        return _Batches(data, held)
    raise TypeError(
        f"data must be a DataLoader, a Dataset, tensors or an iterable of batches, got {type(data).__name__}"
    )


def as_tensors(data: Any) -> Any:
    """A table whose columns come as tensors: as lists, their collation would turn rows into columns."""
    plain = is_table(data) and getattr(data, "format", {"type": "torch"}).get("type") is None
    return data.with_format("torch") if plain else data


class _Rows:
    """Slices of tensors, the same at every pass."""

    def __init__(self, data: Any, batch_size: int, held: Held):
        if is_pair(data) and len(data[0]) != len(data[1]):
            raise ValueError(f"x and y must be of one length, got {len(data[0])} and {len(data[1])}")
        self.x, self.y = read_batch(data, 0, held)
        self.n, self.batch_size = batch_length(self.x), batch_size
        if self.n == 0:
            raise NoExamples("data holds no examples")

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self.n, self.batch_size):
            rows = slice(start, start + self.batch_size)
            yield rows_of(self.x, rows), rows_of(self.y, rows)


class _Batches:
    """The batches of an iterable; an iterator that can be walked only once says so the second time."""

    def __init__(self, batches: Iterable[Any], held: Held):
        self.batches, self.held, self.spent = batches, held, False

    def __len__(self) -> int:
        return len(self.batches)  # pyright: ignore[reportArgumentType]  # TypeError where there is none, as for any len

    def __iter__(self) -> Iterator[Batch]:
        if self.spent:
            raise ValueError("the data is an iterator, empty after one pass; pass a list, a Dataset or a DataLoader")
        self.spent = isinstance(self.batches, Iterator)
        for number, batch in enumerate(self.batches):
            x, y = read_batch(batch, number, self.held)
            if batch_length(x):
                yield x, y
