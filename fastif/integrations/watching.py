"""What recorders of others' trainings share: the order of examples, and methods that are seen as they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

SAME = 1e-12  # so near to 1, weights are not written down


class Order:
    """The places that a DataLoader's sampler gives, noted as they are drawn: since the sampler last began anew."""

    def __init__(self, sampler: Any, recorder: str):
        self.sampler, self.recorder, self.drawn = sampler, recorder, []

    def __iter__(self) -> Iterator[Any]:
        self.drawn.clear()  # what was drawn ahead for an epoch that was cut short
        for place in self.sampler:
            self.drawn.append(int(place))
            yield place

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        if name in ("sampler", "drawn"):
            raise AttributeError(name)
        return getattr(self.sampler, name)

    def take(self, n: int) -> Tensor:
        """The next n places: workers load batches ahead, and they come in the order in which they were drawn."""
        taken, self.drawn[:n] = self.drawn[:n], []
        if len(taken) < n:
            raise ValueError(
                f"{self.recorder}: a batch of {n} examples came of which the sampler gave {len(taken)}: a loader that "
                "makes its own batches cannot be recorded"
            )
        return torch.tensor(taken)

    @classmethod
    def of(cls, loader: Any, recorder: str, advice: str) -> Order:
        """Puts itself between a loader's sampler and its batches. Raises ValueError, with the advice, for others."""
        batches = getattr(loader, "batch_sampler", None)
        sampler = getattr(batches, "sampler", None)
        if sampler is None or type(batches) is not torch.utils.data.BatchSampler:
            raise ValueError(
                f"{recorder}: the loader draws batches with {type(batches).__name__}, and which examples are in one is "
                f"not seen: {advice}"
            )
        order = cls(sampler.sampler if isinstance(sampler, cls) else sampler, recorder)
        batches.sampler = order
        return order


def watch(owner: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Has `around`, which gets the method first, stand in the place of one object's method; returns what undoes it."""
    own, before = getattr(owner, name), vars(owner).get(name)
    setattr(owner, name, lambda *args, **kwargs: around(own, *args, **kwargs))

    def undo() -> None:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    return undo
