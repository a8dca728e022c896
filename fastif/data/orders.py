"""In which order data brings its examples, where that can be told without loading them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

_DRAWN = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_SHORT = 20  # two draws of so few examples may be in one order by chance


class Order(NamedTuple):
    """The examples of data that can be had one by one."""

    lengths: list[int]  # of its batches
    indices: Tensor  # int64 [n], each example's index in the data set
    certain: bool  # no collate function of the user's makes batches: none can be shorter, and none depends on others


def order_of(data: Any, batch_size: int) -> Order | None:
    """The order of data, or None for what has to be walked through: streams, lists of batches, data sets of batches."""
    if isinstance(data, DataLoader):
        return _order_of_loader(data)
    if isinstance(data, Tensor | np.ndarray):
        return _in_turn(len(data), batch_size)
    if is_pair(data):
        return _in_turn(len(data[0]), batch_size)
    if is_columns(data):
        return _in_turn(len(next(iter(data.values()))), batch_size)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return _in_turn(len(data), batch_size)  # pyright: ignore[reportArgumentType]
    return _in_turn(_length(data), batch_size) if is_table(data) else None


def is_pair(data: Any) -> bool:
    """Whether data is (x, y) of tensors or arrays, and not batches."""
    return type(data) is tuple and len(data) == 2 and all(isinstance(part, Tensor | np.ndarray) for part in data)


def is_columns(data: Any) -> bool:
    """Whether data is a mapping of tensors or arrays of one length: a row per example in each, and nothing shared."""
    if not isinstance(data, Mapping) or not all(isinstance(part, Tensor | np.ndarray) for part in data.values()):
        return False
    return all(part.ndim for part in data.values()) and len({len(part) for part in data.values()}) == 1


def is_table(data: Any) -> bool:
    """Whether data is a table of examples, such as those of the library `datasets`: its items are no batches."""
    return not isinstance(data, Mapping) and all(hasattr(data, name) for name in ("column_names", "__getitem__"))


def check_order(loader: DataLoader) -> None:
    """Raises ValueError for a loader that may bring its examples in another order the next time, or not all."""
    if isinstance(loader.dataset, IterableDataset):
        return
    batches: Any = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    sampler = batches.sampler if type(batches) is BatchSampler else batches
    drawn = isinstance(sampler, _DRAWN) or (isinstance(sampler, DistributedSampler) and sampler.shuffle)
    if not isinstance(sampler, SequentialSampler) and (drawn or not _comes_again(sampler)):
        raise ValueError(
            f"the DataLoader draws its order with {type(sampler).__name__}: "
            "indices would not mean the same example twice; pass shuffle=False"
        )
    if type(batches) is BatchSampler and batches.drop_last and _length(sampler) % batches.batch_size:
        raise ValueError("the DataLoader leaves out its last examples; pass drop_last=False")


def _comes_again(sampler: Iterable[Any]) -> bool:
    first = _listed(sampler)
    return all(_listed(sampler) == first for _ in range(1 if len(first) > _SHORT else 9))


def _listed(sampler: Iterable[Any]) -> list[Any]:
    """Indices, or lists of them, as plain numbers."""

    def plain(item: Any) -> Any:
        if isinstance(item, Tensor | np.ndarray):
            return item.tolist()
        return [plain(part) for part in item] if isinstance(item, list | tuple) else item

    return [plain(item) for item in sampler]


def _length(sampler: Any) -> int:
    return len(sampler) if hasattr(sampler, "__len__") else len(list(sampler))


def _order_of_loader(loader: DataLoader) -> Order | None:
    batches = loader.batch_sampler
    if batches is None or isinstance(loader.dataset, IterableDataset):
        return None
    certain = loader.collate_fn is default_collate
    if type(batches) is BatchSampler and isinstance(batches.sampler, SequentialSampler):
        return _in_turn(_length(batches.sampler), batches.batch_size, certain)
    found = _listed(batches)
    flat = [index for batch in found for index in batch]
    if not all(isinstance(index, int | np.integer) for index in flat):
        return None
    return Order([len(batch) for batch in found if batch], torch.tensor(flat, dtype=torch.int64), certain)


def _in_turn(n: int, batch_size: int, certain: bool = True) -> Order:
    return Order(list(_run_lengths(n, batch_size)), torch.arange(n), certain)


def _run_lengths(n: int, batch_size: int) -> Iterator[int]:
    for start in range(0, n, batch_size):
        yield min(batch_size, n - start)
