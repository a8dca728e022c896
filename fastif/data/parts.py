"""Data of which each rank brings a part of its own, such as a loader with a `DistributedSampler`.

An example's index counts through the ranks: all examples of rank 0 in its order, then those of rank 1, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from fastif.data.batch import Batch, rows_of
from fastif.data.identity import Identity, Walked
from fastif.data.loaders import NoExamples, Sharded, needs_all
from fastif.ranks import Ranks, find_ranks


def sharded(data: Any, *, group: Any = None) -> Any:
    """Says of training data that every rank brings a part of its own, for all calls of fastif that take `train`.

    `data` is whatever `fastif.data.as_loader` takes, with this rank's examples alone: a DataLoader with a
    DistributedSampler, an IterableDataset that gives each rank its share, tensors or a data set of the rank's own. A
    rank may have none. `group` is as for `Influence`. Without several ranks the data come back as they are.

    Indices of results count through the ranks: all examples of rank 0 in its order, then those of rank 1, and so on.
    Of N rows of a data set that a DistributedSampler deals out to W ranks, example i of the results is row
    `torch.cat([torch.arange(N)[r::W] for r in range(W)])[i]`.

    Raises ValueError for a DistributedSampler that shuffles, that is another rank's, or that repeats examples to give
    each rank as many.
    """
    ranks = find_ranks(group)
    sampler = sampler_of(data)
    if sampler is not None:
        rows: Any = sampler.dataset
        n, own = len(rows), (sampler.rank, sampler.num_replicas)
        if own != (ranks.rank, ranks.world):
            raise ValueError(
                f"sharded: the DistributedSampler is that of rank {own[0]} of {own[1]}, and this is rank {ranks.rank} "
                f"of {ranks.world}"
            )
        if sampler.shuffle:
            raise ValueError(
                "sharded: the DistributedSampler shuffles, so that indices would not mean the same example twice: pass "
                "shuffle=False"
            )
        if not sampler.drop_last and n % ranks.world:
            raise ValueError(
                f"sharded: the DistributedSampler repeats {-n % ranks.world} of {n} examples so that each of "
                f"{ranks.world} ranks has as many, and they would count twice: pass drop_last=True to it, which leaves "
                f"out the last {n % ranks.world}, or a sampler of your own, such as range({ranks.rank}, {n}, "
                f"{ranks.world})"
            )
    return data if ranks.world == 1 else Sharded(data, group)


def sampler_of(data: Any) -> DistributedSampler | None:
    """The DistributedSampler of a loader, None where it has none."""
    if not isinstance(data, DataLoader):
        return None
    found = (data.sampler, getattr(data.batch_sampler, "sampler", None))
    return next((sampler for sampler in found if isinstance(sampler, DistributedSampler)), None)


class Parts(Walked):
    """The parts of all ranks as one data set, of which this rank can bring its own examples alone."""

    def __init__(self, given: Sharded, batch_size: int):
        self.data, self.batch_size = given, batch_size
        self.ranks: Ranks = find_ranks(given.group)
        self._by_rank: list[list[int]] | None = None
        try:
            self._own: Walked | None = Walked(given.data, batch_size)
        except NoExamples:
            self._own = None

    @property
    def indexable(self) -> bool:
        """Examples of other ranks cannot be had."""
        return False

    @property
    def by_rank(self) -> list[list[int]]:
        """Lengths of the batches of each rank; the first time all ranks ask for them at once."""
        if self._by_rank is None:
            try:
                own = [] if self._own is None else [*self._own.lengths]
            except NoExamples:
                self._own, own = None, []
            self._by_rank = self.ranks.meet("the examples of each rank's part", own)
            if not any(self._by_rank):
                raise ValueError("data holds no examples, on any rank")
        return self._by_rank

    @property
    def n(self) -> int:
        """Examples of all ranks."""
        return sum(map(sum, self.by_rank))

    @property
    def lengths(self) -> list[int]:
        """Examples of every batch of all ranks."""
        return [length for lengths in self.by_rank for length in lengths]

    def part_of(self, rank: int) -> range:
        """The indices of a rank's examples."""
        borders = [0, *accumulate(map(sum, self.by_rank))]
        return range(borders[rank], borders[rank + 1])

    @property
    def identity(self) -> Identity:
        """Of all ranks' examples; each walks through what it did not walk through yet."""
        none = Identity([], torch.zeros(0, dtype=torch.int64), [])
        own = none if self._own is None else self._own.identity
        device = self.ranks.device
        rows = [part["rows"].cpu() for part in self.ranks.gather("checksums", {"rows": own.rows.to(device)}, device)]
        said = self.ranks.meet("what examples share", own.shared)
        return Identity(self.lengths, torch.cat(rows), [number for shared in said for number in shared])

    def __len__(self) -> int:
        raise TypeError(needs_all("data: a walk"))

    def __iter__(self) -> Iterator[Batch]:
        raise ValueError(needs_all("data: a walk"))

    def picked(self, indices: Tensor) -> Iterator[tuple[Batch, Tensor]]:
        """As for any data; the examples have to be this rank's."""
        mine = self.part_of(self.ranks.rank)
        if self._own is not None and len(indices):
            assert mine.start <= int(indices.min()) <= int(indices.max()) < mine.stop
            yield from self._own.picked(indices - mine.start)

    def first(self, indices: Tensor, choose: Callable[[Any, Any], Tensor]) -> Batch:
        """Some of the first batch of the examples `indices`, of the rank that has it; all ranks get the same."""
        mine, found = self.part_of(self.ranks.rank), None
        if int(indices[0]) in mine:
            ((x, y), _) = next(self.picked(indices[(indices >= mine.start) & (indices < mine.stop)]))
            rows = choose(x, y)
            found = rows_of(x, rows), None if y is None else rows_of(y, rows)
        return next(batch for batch in self.ranks.meet("the first examples", found) if batch is not None)

    def tell(self) -> dict[str, Any]:
        """What ranks compare. Raises ValueError where two ranks bring the same part."""
        found = {"number of examples": self.n, "parts": self.by_rank}
        own = None
        if self._own is not None and (not self._own.indexable or self._own.in_memory):
            own = self._own.identity.fingerprint
        said = self.ranks.meet("whose part is whose", own)
        for rank, fingerprint in enumerate(said):
            if fingerprint is not None and fingerprint in said[:rank]:
                raise ValueError(
                    f"data: ranks {said.index(fingerprint)} and {rank} bring the same {len(self.part_of(rank))} "
                    "examples: the data are not divided among them (torch.distributed.get_rank() tells a data set "
                    "which part is its own)"
                )
        return found
