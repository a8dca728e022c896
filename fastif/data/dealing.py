"""Parts of data: some runs of its examples, as data, and the run that each of several ranks takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from fastif.data.batches import Batch, batch_lengths, indexable, picked
from fastif.data.checksums import checksums
from fastif.data.identity import Walked
from fastif.data.parts import Parts, sampler_of
from fastif.ranks import Ranks, stretch

_LOOKED_AT = 256  # examples, spread over data that are not in memory, by which ranks tell whether theirs are the same


class Part:
    """Some runs of the examples of data, as data: no batch of it crosses a border."""

    def __init__(self, data: Any, batch_size: int, runs: Sequence[range]):
        self.data, self.batch_size = data, batch_size
        self.indices = torch.cat([torch.arange(run.start, run.stop) for run in runs])

    def __len__(self) -> int:
        """Batches, for the progress bar."""
        if not indexable(self.data):
            raise TypeError("data that can only be walked does not know")
        return -(-len(self.indices) // batch_lengths(self.data, self.batch_size)[0])

    def __iter__(self) -> Iterator[Batch]:
        for batch, _ in picked(self.data, self.batch_size, self.indices):
            yield batch


def first_batch(data: Any, batch_size: int, indices: Tensor, choose: Callable[[Any, Any], Tensor]) -> Batch:
    """The first batch of the examples `indices`. Of data that ranks bring in parts all get the same, and of its rows
    those alone that `choose(x, y)` takes."""
    if isinstance(data, Parts):
        return data.first(indices, choose)
    return next(iter(picked(data, batch_size, indices)))[0]


def deal(data: Walked, ranks: Ranks) -> range:
    """The examples of this rank: a run of whole batches, so that what the ranks make of theirs stands in order when it
    is put one after another; batches are as they are on one process. Of data that ranks bring in parts, its own."""
    if isinstance(data, Parts):
        return data.part_of(ranks.rank)
    borders = [0, *accumulate(data.lengths)]
    mine = stretch(len(data.lengths), ranks.rank, ranks.world)
    return range(borders[mine.start], borders[mine.stop])


def deal_picked(data: Walked, indices: Tensor, ranks: Ranks) -> Tensor:
    """The places in `indices` of the examples of this rank, int64.

    They come in the batches that one process would make of all of them: where data can be indexed these are runs of
    `indices`, else what is picked of a batch of the data.
    """
    k = len(indices)
    if ranks.world == 1:
        return torch.arange(k)
    if data.indexable:
        size = data.picked_size
        mine = stretch(-(-k // size), ranks.rank, ranks.world)
        return torch.arange(min(k, mine.start * size), min(k, mine.stop * size))
    mine = deal(data, ranks)
    return ((indices >= mine.start) & (indices < mine.stop)).nonzero()[:, 0]


def tell_data(data: Walked, ranks: Ranks) -> dict[str, Any]:
    """What ranks compare to see that theirs are the same data, before any work.

    All examples of tensors in memory; of what is loaded one by one, some that are spread over it; streams and lists of
    batches are walked through once. Raises ValueError for a stream that every rank would read from end to end.
    """
    if isinstance(data, Parts):
        if data.ranks is not ranks:
            raise ValueError("data: fastif.sharded was given another group= than the call")
        return data.tell()
    sampler = sampler_of(data.data)
    if ranks.world > 1 and sampler is not None and sampler.num_replicas > 1:
        raise ValueError(
            f"data: the DataLoader's DistributedSampler brings the examples of rank {sampler.rank} alone: say so with "
            "fastif.sharded(loader)"
        )
    source = getattr(data.data, "dataset", data.data)
    if ranks.world > 1 and isinstance(source, IterableDataset):
        raise ValueError(
            f"data: {type(source).__name__} is a stream, which each of {ranks.world} ranks would read from end to end: "
            "pass a map-style Dataset, of which a rank loads its own examples, or a list of batches; say so with "
            "fastif.sharded(loader) where it gives each rank a part of its own"
        )
    found: dict[str, Any] = {"number of examples": data.n, "batches": (len(data.lengths), max(data.lengths))}
    if data.in_memory or not data.indexable:
        return {**found, "data": data.identity.fingerprint}
    places = torch.linspace(0, data.n - 1, min(_LOOKED_AT, data.n), dtype=torch.float64).round().long()
    rows = [checksums(*batch)[0] for batch, _ in data.picked(places)]
    return {**found, "data": torch.cat(rows).tolist()}
