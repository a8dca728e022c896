"""Which examples these are: what one walk through data saw, and every later pass held against it.

Scores, subsets and removals speak of examples by their place. They mean the same examples only as long as each pass
brings the same ones in the same places, so each pass is compared with those before it, example by example, as it goes.
"""

from collections.abc import Iterator
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from fastif.data.batch import Batch, batch_length, rows_of
from fastif.data.checksums import checksums
from fastif.data.loaders import NoExamples, as_tensors, loader_of
from fastif.data.orders import is_columns, is_pair, order_of

_WHY = "random augmentation, another order, or something that was changed in place?"


class Identity(NamedTuple):
    """What one walk through data saw: its examples in order, and the batches that they came in."""

    lengths: list[int]  # of the batches
    rows: Tensor  # int64 [n], a checksum of every example
    shared: list[int]  # by batch: a checksum of what all its examples share

    @property
    def n(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """16 digits that tell it from that of other data, other batches and another order."""
        digest = sha256(repr((self.lengths, self.shared)).encode())
        digest.update(self.rows.contiguous().numpy().data)
        return digest.hexdigest()[:16]


class Walked:
    """Data of which every pass is held against what was seen of it before, at no extra pass.

    Takes what `as_loader` takes. Iterating gives batches (x, y); `picked` the examples asked for. What is seen for the
    first time is noted: a checksum of every example, 8 bytes each. n is what was walked; it is known without a walk
    where the order of the examples is, and no collate function could leave some out.

    Raises ValueError for the first batch that differs, with its number and the first example of it that does.

    >>> data = Walked((torch.arange(3.0), torch.tensor([0, 1, 1])), batch_size=2)
    >>> data.n, data.identity.lengths, len(data.identity.fingerprint)
    (3, [2, 1], 16)
    """

    def __init__(self, data: Any, batch_size: int = 256):
        self.data, self.batch_size = data, batch_size
        self._held: dict[str, str] = {}  # which parts of a batch have a row per example
        self._loader = loader_of(data, batch_size, self._held)
        self._order = order_of(data, batch_size)
        self._certain = self._order is not None and self._order.certain
        self._lengths = [*self._order.lengths] if self._order is not None and self._certain else []
        self._shared: list[int] = []
        self._rows = np.zeros(sum(self._lengths), np.int64)  # checksums, by example
        self._known = np.zeros(len(self._rows), bool)
        self._walked_to = 0  # all examples before this one are known
        self._picks: dict[bytes, Tensor] = {}  # checksums of what a collate function made of some examples
        self._all_lengths = self._certain  # whether `_lengths` has all batches
        self._looked = self._order is None or is_pair(data) or isinstance(data, Tensor | np.ndarray)

    def holds(self, data: Any) -> bool:
        """Whether this is the same object, or the same tensors."""
        if is_pair(self.data) and is_pair(data):
            return all(a is b for a, b in zip(self.data, data, strict=True))
        return self.data is not None and data is self.data

    def __getstate__(self) -> dict[str, Any]:
        """Without the data: what was seen of it."""
        return {**self.__dict__, "data": None, "_loader": None}

    @property
    def n(self) -> int:
        """Examples, as walked."""
        if not self._all_lengths:
            if isinstance(self.data, Iterator):
                kind = type(self.data).__name__
                raise TypeError(f"data can be walked through only once ({kind}); pass a list of batches")
            for _ in self:
                pass
        return sum(self._lengths)

    @property
    def lengths(self) -> list[int]:
        """Examples of every batch."""
        _ = self.n
        return self._lengths

    @property
    def identity(self) -> Identity:
        """Walks through what was not walked yet."""
        if len(self._known) < self.n or not self._known[: self.n].all() or len(self._shared) < len(self._lengths):
            for _ in self:
                pass
        return Identity([*self._lengths], torch.from_numpy(self._rows[: self.n].copy()), [*self._shared])

    def checksums(self, indices: Tensor) -> Tensor:
        """Of those of these examples that were seen, int64 [seen]: no pass is made."""
        places = indices.numpy()
        return torch.from_numpy(self._rows[places[self._known[places]]])

    def __len__(self) -> int:
        return len(self._loader)  # pyright: ignore[reportArgumentType]  # TypeError where there is none, as for any len

    def __iter__(self) -> Iterator[Batch]:
        number = start = 0
        for x, y in self._loader:
            rows, shared = checksums(x, y)
            self._hold(number, start, rows, shared)
            if number == 0 and not self._looked:
                self._look_again(len(rows))
            yield x, y
            number, start = number + 1, start + len(rows)
        if start == 0:
            raise NoExamples("data holds no examples")
        if self._all_lengths and number < len(self._lengths):
            raise ValueError(
                f"the data changed between passes: {start} examples in {number} batches, {sum(self._lengths)} in "
                f"{len(self._lengths)} before"
            )
        if not self._all_lengths:
            self._check_workers()
        self._all_lengths = True

    def picked(self, indices: Tensor) -> Iterator[tuple[Batch, Tensor]]:
        """Batches of the examples `indices` alone, each with their places in `indices`; others are not loaded where the
        data can be indexed."""
        # What a collate function makes of an example may depend on those beside it: all come as they always do.
        all_of_them = len(indices) == self.n and torch.equal(indices, torch.arange(self.n))
        if self.indexable and (self._certain or not all_of_them):
            yield from self._picked_at(indices)
            return
        place = {index: position for position, index in enumerate(indices.tolist())}
        start = 0
        for x, y in self:
            length = batch_length(x)
            rows = torch.tensor([i for i in range(length) if start + i in place], dtype=torch.int64)
            if len(rows):
                places = torch.tensor([place[start + i] for i in rows.tolist()])
                yield ((x, y) if len(rows) == length else (rows_of(x, rows), rows_of(y, rows))), places
            start += length

    @property
    def indexable(self) -> bool:
        """Whether an example can be had without those before it."""
        return self._order is not None and self.lengths == self._order.lengths

    @property
    def in_memory(self) -> bool:
        """Whether the data are tensors: to look at all of them takes no loading."""
        return is_pair(self.data) or isinstance(self.data, Tensor)

    @property
    def picked_size(self) -> int:
        """Examples in a batch of those that are picked, where data can be indexed."""
        return getattr(self.data, "batch_size", None) or (
            max(self.lengths) if isinstance(self.data, DataLoader) else self.batch_size
        )

    # ----------------------------------------------------------------------------------------------------------- checks

    def _hold(self, number: int, start: int, rows: Tensor, shared: int) -> None:
        """Holds a batch, whose first example is `start`, against the passes before."""
        stop = start + len(rows)
        if number < len(self._lengths) or self._all_lengths:
            length = self._lengths[number] if number < len(self._lengths) else 0
            if length != len(rows):
                raise ValueError(
                    f"the data changed between passes: batch {number} has {len(rows)} examples, {length} before"
                )
        else:
            self._lengths.append(len(rows))
        if stop > len(self._rows):
            more = max(stop, 2 * start) - len(self._rows)
            self._rows, self._known = np.pad(self._rows, (0, more)), np.pad(self._known, (0, more))
        if stop > self._walked_to or not np.array_equal(self._rows[start:stop], rows.numpy()):
            self._compare(np.arange(start, stop), rows, f"batch {number} (examples {start} to {stop - 1})")
        self._walked_to = max(self._walked_to, stop)
        if number == len(self._shared):
            self._shared.append(shared)
        elif number < len(self._shared) and self._shared[number] != shared:
            raise ValueError(
                f"the data changed between passes: what all examples of batch {number} share is not what it was"
            )

    def _compare(self, places: np.ndarray, found: Tensor, where: str) -> None:
        """Notes the checksums of examples that are seen for the first time, and compares those of the others."""
        rows = found.numpy()
        differ = np.flatnonzero(self._known[places] & (self._rows[places] != rows))
        if len(differ):
            first = differ[0]
            elsewhere = np.flatnonzero(self._known & (self._rows == rows[first]))
            moved = f"; in its place is what was example {elsewhere[0]}" if len(elsewhere) else ""
            raise ValueError(
                f"the data changed between passes: {where} differs from the pass before in {len(differ)} of "
                f"{len(rows)} examples, first in example {places[first]}{moved} ({_WHY})"
            )
        self._rows[places], self._known[places] = rows, True

    def _look_again(self, length: int) -> None:
        """A second look at the first batch: what is drawn anew each time shows before a number is made of it."""
        self._looked = True
        if self._order is None or self._order.lengths[0] != length:
            return  # a collate function leaves some out: a later pass will tell
        with torch.random.fork_rng(devices=[]):  # what it draws is not missed by who draws after it
            ((x, y),) = self._at(self._order.indices[:length], length)
        rows, _ = checksums(x, y)
        self._compare(np.arange(length), rows, "batch 0, loaded twice,")

    def _check_workers(self) -> None:
        """Refuses a stream that its loader's workers do not share: each brings all of it."""
        workers = getattr(self.data, "num_workers", 0)
        if workers < 2:
            return
        parts = np.split(self._rows[: sum(self._lengths)], np.cumsum(self._lengths)[:-1])
        seen = [np.sort(np.concatenate([self._rows[:0], *parts[worker::workers]])) for worker in range(workers)]
        for worker in range(1, workers):
            if np.array_equal(seen[0], seen[worker]):
                raise ValueError(
                    f"data: workers 0 and {worker} of the DataLoader bring the same {len(seen[0])} examples: the "
                    "stream is not shared between them (torch.utils.data.get_worker_info() tells a worker its share)"
                )

    # ---------------------------------------------------------------------------------------------------------- picking

    def _picked_at(self, indices: Tensor) -> Iterator[tuple[Batch, Tensor]]:
        assert self._order is not None
        size = self.picked_size
        places = torch.arange(len(indices)).split(size)
        for batch, where in zip(self._at(self._order.indices[indices], size), places, strict=True):
            rows, _ = checksums(*batch)
            mine = indices[where]
            what = f"the picked examples {int(mine[0])} to {int(mine[-1])}"
            if len(rows) != len(mine):
                raise ValueError(f"data: {len(rows)} examples came where {what} were asked for, {len(mine)}")
            if self._certain:
                self._compare(mine.numpy(), rows, what)
            elif not torch.equal(self._picks.setdefault(mine.numpy().tobytes(), rows), rows):
                raise ValueError(f"the data changed between passes: {what} are not what they were ({_WHY})")
            yield batch, where

    def _at(self, indices: Tensor, size: int) -> Iterator[Batch]:
        """Batches of the items `indices` of the data set, in their order."""
        data = self.data
        if isinstance(data, DataLoader):
            few = DataLoader(
                Subset(data.dataset, indices.tolist()),
                batch_size=size,
                collate_fn=data.collate_fn,
                num_workers=data.num_workers,
                worker_init_fn=data.worker_init_fn,
                multiprocessing_context=data.multiprocessing_context,
            )
        elif is_pair(data) or isinstance(data, Tensor | np.ndarray):
            parts = data if isinstance(data, tuple) else (data,)
            few = (tuple(part[rows] for part in parts) for rows in indices.split(size))
        elif is_columns(data):
            few = ({key: part[rows] for key, part in data.items()} for rows in indices.split(size))
        else:
            few = Subset(as_tensors(data), indices.tolist())
        return iter(loader_of(few, size, self._held))
