"""One way to walk through anything that holds examples.

An example's index is its place in the training data. Everything in fastif (subsets, scores, removals) speaks in such
indices, so `as_loader` accepts only data that comes in the same order each time.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, Subset

Batch = tuple[Any, Tensor | None]


def as_loader(data: Any, batch_size: int = 256) -> Iterable[Batch]:
    """Batches (x, y) of `data` in a fixed order; y is None where the data has no labels.

    `data` is a DataLoader that does not shuffle, a map-style Dataset, a pair (x, y) of tensors, a tensor x, or any
    other iterable of batches, which is taken as it is. `batch_size` counts where the data brings none of its own.

    >>> [(x.tolist(), y.tolist()) for x, y in as_loader((torch.arange(3), torch.tensor([0, 1, 1])), batch_size=2)]
    [([0, 1], [0, 1]), ([2], [1])]

    Raises ValueError for a loader whose order may change, for tensors of unequal length and for empty data, TypeError
    for anything that holds no batches.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(data, DataLoader):
        _check_order(data)
        return _Batches(data)
    if isinstance(data, Tensor):
        return _TensorBatches(data, None, batch_size)
    if isinstance(data, tuple):
        if len(data) != 2 or not all(isinstance(part, Tensor) for part in data):
            kinds = ", ".join(type(part).__name__ for part in data)
            raise TypeError(f"a tuple of data must be two tensors (x, y), got ({kinds})")
        return _TensorBatches(data[0], data[1], batch_size)
    if isinstance(data, Dataset):
        if not isinstance(data, IterableDataset) and len(data) == 0:  # pyright: ignore[reportArgumentType]
            raise ValueError("data holds no examples")
        return _Batches(DataLoader(data, batch_size=batch_size, shuffle=False))
    if isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping):
        return _Batches(data)
    raise TypeError(
        f"data must be a DataLoader, a Dataset, tensors or an iterable of batches, got {type(data).__name__}"
    )


def _check_order(loader: DataLoader) -> None:
    if isinstance(loader.dataset, IterableDataset):
        return
    batches: Any = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    sampler = batches.sampler if type(batches) is BatchSampler else batches
    if not isinstance(sampler, SequentialSampler):
        raise ValueError(
            f"the DataLoader draws its order with {type(sampler).__name__}: "
            "indices would not mean the same example twice; pass shuffle=False"
        )
    if type(batches) is BatchSampler and batches.drop_last and len(sampler) % batches.batch_size:
        raise ValueError("the DataLoader leaves out its last examples; pass drop_last=False")


class _TensorBatches:
    """Slices of x (and y), the same at every pass."""

    def __init__(self, x: Tensor, y: Tensor | None, batch_size: int):
        if y is not None and len(x) != len(y):
            raise ValueError(f"x and y must be of one length, got {len(x)} and {len(y)}")
        if len(x) == 0:
            raise ValueError("data holds no examples")
        self.x, self.y, self.batch_size = x, y, batch_size

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.x), self.batch_size):
            rows = slice(start, start + self.batch_size)
            yield self.x[rows], None if self.y is None else self.y[rows]


class _Batches:
    """The batches of an iterable as pairs (x, y); an iterator that can be walked only once says so the second time."""

    def __init__(self, batches: Iterable[Any]):
        self.batches, self.spent = batches, False

    def __len__(self) -> int:
        return len(self.batches)  # pyright: ignore[reportArgumentType]  # TypeError where there is none, as for any len

    def __iter__(self) -> Iterator[Batch]:
        if self.spent:
            raise ValueError("the data is an iterator, empty after one pass; pass a list, a Dataset or a DataLoader")
        self.spent = isinstance(self.batches, Iterator)
        for batch in self.batches:
            yield _pair(batch)


def _pair(batch: Any) -> Batch:
    if not isinstance(batch, tuple | list):
        return batch, None
    if len(batch) == 1:
        return batch[0], None
    if len(batch) == 2:
        return batch[0], batch[1]
    raise TypeError(f"a batch must be x, (x,) or (x, y), got {len(batch)} parts")


def batch_length(x: Any) -> int:
    """Examples in a batch: the first axis of its first tensor."""
    if isinstance(x, Tensor):
        return len(x)
    values = x.values() if isinstance(x, Mapping) else x if isinstance(x, list | tuple) else ()
    for value in values:
        if isinstance(value, Tensor):
            return len(value)
    raise TypeError(f"data: a batch must be a tensor, or a mapping or tuple of tensors, got {type(x).__name__}")


def rebuilt(x: Any, values: list[Any]) -> Any:
    """A list, tuple or named tuple like x."""
    return x._make(values) if hasattr(x, "_make") else type(x)(values)


def rows_of(x: Any, rows: Tensor) -> Any:
    """The examples `rows` of a batch."""
    if isinstance(x, Tensor):
        return x[rows.to(x.device)]
    if isinstance(x, Mapping):
        return {key: rows_of(value, rows) for key, value in x.items()}
    return rebuilt(x, [rows_of(value, rows) for value in x]) if isinstance(x, list | tuple) else x


def count(data: Any, batch_size: int = 256) -> int:
    """Examples of whatever `as_loader` takes; walks through data that does not know its length.

    Raises TypeError for an iterator: walked through once, it would be empty afterwards.
    """
    if isinstance(data, Iterator):
        raise TypeError(f"data can be walked through only once ({type(data).__name__}); pass a list of batches")
    loader = as_loader(data, batch_size)  # refuses what has no fixed order
    dataset = getattr(data, "dataset", data)
    if isinstance(dataset, Dataset) and hasattr(dataset, "__len__"):
        return len(dataset)  # pyright: ignore[reportArgumentType]
    return sum(batch_length(x) for x, _ in loader)


def batch_lengths(data: Any, batch_size: int = 256) -> list[int]:
    """How many examples each batch of `as_loader` holds; walks through data that cannot be indexed."""
    loader = as_loader(data, batch_size)  # refuses what has no fixed order
    if not indexable(data):
        return [batch_length(x) for x, _ in loader]
    n, size = count(data, batch_size), _size(data, batch_size)
    return [min(size, n - start) for start in range(0, n, size)]


def picked(data: Any, batch_size: int, indices: Tensor) -> Iterator[tuple[Batch, Tensor]]:
    """Batches of the examples `indices` alone, each with their places in `indices`; others are not loaded where the
    data can be indexed."""
    if indexable(data):
        places = torch.arange(len(indices)).split(_size(data, batch_size))
        yield from zip(_at(data, batch_size, indices), places, strict=True)
        return
    place = {index: position for position, index in enumerate(indices.tolist())}
    start = 0
    for x, y in as_loader(data, batch_size):
        n = batch_length(x)
        rows = torch.tensor([i for i in range(n) if start + i in place], dtype=torch.int64)
        if len(rows):
            places = torch.tensor([place[start + i] for i in rows.tolist()])
            yield (rows_of(x, rows), None if y is None else rows_of(y, rows)), places
        start += n


def indexable(data: Any) -> bool:
    """Whether an example can be had without those before it."""
    if isinstance(data, DataLoader):
        own = type(data.batch_sampler) is BatchSampler  # else it draws, or its dataset holds batches
        return own and not isinstance(data.dataset, IterableDataset)
    return isinstance(data, Tensor | tuple) or (isinstance(data, Dataset) and not isinstance(data, IterableDataset))


def moved_to(x: Any, device: torch.device) -> Any:
    """x on the device, where x is a tensor or a dict, list or tuple of them."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, Mapping):
        return {key: moved_to(value, device) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return rebuilt(x, [moved_to(value, device) for value in x])
    return x


def _size(data: Any, batch_size: int) -> int:
    return data.batch_size if isinstance(data, DataLoader) and data.batch_size is not None else batch_size


def _at(data: Any, batch_size: int, indices: Tensor) -> Iterator[Batch]:
    """The examples `indices` of data that can be indexed, in batches."""
    as_loader(data, batch_size)  # refuses what has no fixed order
    if isinstance(data, DataLoader):
        loader = DataLoader(
            Subset(data.dataset, indices.tolist()),
            batch_size=data.batch_size,
            collate_fn=data.collate_fn,
            num_workers=data.num_workers,
            worker_init_fn=data.worker_init_fn,
            multiprocessing_context=data.multiprocessing_context,
        )
        yield from as_loader(loader)
    elif isinstance(data, Dataset):
        yield from as_loader(Subset(data, indices.tolist()), batch_size)
    else:
        for rows in indices.split(batch_size):
            (batch,) = as_loader(tuple(x[rows] for x in data) if isinstance(data, tuple) else data[rows], len(rows))
            yield batch
