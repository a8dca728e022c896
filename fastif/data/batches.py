"""One way to walk through anything that holds examples.

An example's index is its place in the training data. Everything in fastif (subsets, scores, removals) speaks in such
indices, so only data that comes in the same order each time is taken, and a second pass is held against the first.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from fastif.data.batch import Arguments, Batch, Shared, batch_length, moved_to, rebuilt, rows_of, whole
from fastif.data.identity import Identity, Walked
from fastif.data.loaders import Sharded, loader_of
from fastif.data.parts import Parts, sharded

__all__ = [
    "Arguments",
    "Batch",
    "Identity",
    "Shared",
    "Walked",
    "as_loader",
    "batch_length",
    "batch_lengths",
    "count",
    "indexable",
    "moved_to",
    "picked",
    "rebuilt",
    "rows_of",
    "sharded",
    "walked",
    "whole",
]


def as_loader(data: Any, batch_size: int = 256) -> Iterable[Batch]:
    """Batches (x, y) of `data` in a fixed order; y is None where the data has no labels.

    `data` is a DataLoader that brings one order each time, a map-style Dataset or a table of the library `datasets`, a
    pair (x, y) of tensors or arrays, a tensor x, a mapping of them, or any other iterable of batches. A batch is x,
    (x,), (x, y), (x1, x2, ..., y) with several inputs, or a mapping of arguments with "labels". `batch_size` counts
    where the data brings none of its own. Empty batches are passed over.

    >>> import torch
    >>> [(x.tolist(), y.tolist()) for x, y in as_loader((torch.arange(3), torch.tensor([0, 1, 1])), batch_size=2)]
    [([0, 1], [0, 1]), ([2], [1])]

    Raises ValueError for a loader whose order may change, for tensors of unequal length and for empty data, TypeError
    for anything that holds no batches.
    """
    return data if isinstance(data, Walked) else loader_of(data, batch_size)


def walked(data: Any, batch_size: int = 256) -> Walked:
    """Data that remembers what was seen of it; it is taken as it is where it does already."""
    if isinstance(data, Sharded):
        return Parts(data, batch_size)
    return data if isinstance(data, Walked) else Walked(data, batch_size)


def count(data: Any, batch_size: int = 256) -> int:
    """Examples of whatever `as_loader` takes, as walked: data is walked through where its order does not tell.

    Raises TypeError for an iterator: walked through once, it would be empty afterwards.
    """
    return walked(data, batch_size).n


def batch_lengths(data: Any, batch_size: int = 256) -> list[int]:
    """How many examples each batch of `as_loader` holds; walks through data whose order does not tell."""
    return walked(data, batch_size).lengths


def picked(data: Any, batch_size: int, indices: Tensor) -> Iterator[tuple[Batch, Tensor]]:
    """Batches of the examples `indices` alone, each with their places in `indices`; others are not loaded where the
    data can be indexed."""
    return walked(data, batch_size).picked(indices)


def indexable(data: Any, batch_size: int = 256) -> bool:
    """Whether an example can be had without those before it."""
    return walked(data, batch_size).indexable
