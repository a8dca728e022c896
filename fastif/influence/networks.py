"""Networks trained on parts of the data, over which scores are averaged. docs/math.md (23)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Networks(NamedTuple):
    """Networks of one architecture and recipe, each trained on a part of the training data.

    `fastif.evaluation.train_halves` makes them; any others of one architecture will do.
    """

    states: Sequence[Mapping[str, Tensor]]  # state dicts
    kept: Sequence[Tensor]  # int64 [k] each: the training examples that each network was trained on
    training_time: float | None = None  # τ of each training, for `TrainingDamping`; None where nobody said

    def __repr__(self) -> str:
        sizes = sorted({len(kept) for kept in self.kept})
        trained = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}" if sizes else "no"
        time = "unknown" if self.training_time is None else f"{self.training_time:g}"
        return f"Networks({len(self.states)}, trained on {trained} examples each, training_time={time})"

    def first(self, number: int) -> Networks:
        """The first so many of them."""
        if not 1 <= number <= len(self.states):
            raise ValueError(f"Networks.first: number must be in [1, {len(self.states)}], got {number}")
        return self._replace(states=self.states[:number], kept=self.kept[:number])


def check_networks(networks: Networks) -> None:
    """Raises TypeError and ValueError for what are no networks; whether indices lie in the data, a fit sees."""
    if not isinstance(networks, Networks):
        raise TypeError(f"Influence: networks must be fastif.Networks, got {type(networks).__name__}")
    if len(networks.states) != len(networks.kept) or not len(networks.states):
        raise ValueError(
            "Influence: networks must have one state and one tensor of kept examples each, at least one, got "
            f"{len(networks.states)} states and {len(networks.kept)} tensors"
        )
    for number, kept in enumerate(networks.kept):
        if not isinstance(kept, Tensor) or kept.dtype != torch.int64 or kept.dim() != 1 or not len(kept):
            raise TypeError(f"Influence: networks.kept[{number}] must be an int64 tensor [k] with k >= 1")
        if int(kept.min()) < 0 or len(kept.unique()) < len(kept):
            raise ValueError(f"Influence: networks.kept[{number}] must hold distinct indices >= 0")


def are_halves(kept: Sequence[Tensor], n: int) -> bool:
    """Whether the networks come in pairs, each trained on what the other was not."""
    pairs = zip(kept[::2], kept[1::2], strict=False)
    return len(kept) % 2 == 0 and all(torch.equal(torch.cat(pair).sort().values, torch.arange(n)) for pair in pairs)
