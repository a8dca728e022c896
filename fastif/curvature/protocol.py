"""What an estimator must be able to do: for one block of parameters, or for several blocks at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastif.curvature.called import Called
from fastif.curvature.directions import Directions, Explicit
from fastif.model.gradients import Gradients
from fastif.model.layers import Block
from fastif.model.losses import Fisher, Loss
from fastif.samplers.subset import Subset

Shape = tuple[int, int, int]  # g, o, d of a block
STANDING = 8  # vectors that a solve takes beside each of its right-hand sides, and these themselves


class Curvature(Protocol):
    """What an estimator of one block, g matrices [o, d] of parameters, must be able to do."""

    @property
    def passes(self) -> int:
        """How often it must see the data."""
        ...

    @property
    def fisher(self) -> Fisher:
        """Of which gradients it is made."""
        ...

    def begin(self, name: str, shape: tuple[int, int, int]) -> None:
        """Forgets what was learned; name and shape [g, o, d] of the block."""
        ...

    def observe(self, gradients: Gradients, weights: Tensor, column: int, turn: int) -> None:
        """Takes in Σ_i weights[i] vec(g_i) vec(g_i)ᵀ of a batch, column `column` of its curvature, in pass `turn`."""
        ...

    def end(self, turn: int) -> None:
        """Ends a pass; raises NotPositiveDefinite with a diagnosis."""
        ...

    def solve(self, rhs: Tensor) -> Tensor:
        """(G + λI)⁻¹ rhs for rhs [..., g, o, d]."""
        ...

    def sq_norms(self, gradients: Gradients) -> Tensor:
        """g_iᵀ (G + λI)⁻¹ g_i, [n]."""
        ...

    def directions(self, gradients: Gradients) -> Directions:
        """(G + λI)⁻¹ g_q for every q."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...

    def stand_in(self) -> None:
        """For `Influence.plan`: has the sizes of what is fitted, once pass 0 was observed, and not its values."""
        ...

    def footprint(self, shape: tuple[int, int, int], table: bool, item: int) -> tuple[int, int]:
        """For `Influence.plan`: bytes held once fitted, and what making it takes beside them, for `item` bytes each."""
        ...


class FitData(NamedTuple):
    """What a fit looks at, for estimators that multiply with the curvature instead of keeping it."""

    model: nn.Module  # at the parameters in question, on the device, its covered parameters requiring gradients
    loss: Loss
    blocks: Mapping[str, Block]  # the estimator's own
    subset: Subset
    batches: Callable[[Subset], Iterator[tuple[Any, Any, Tensor]]]  # x, y, weights of those examples, on the device
    seed: int = 0
    autocast: torch.dtype | None = None  # of forward passes
    progress: bool = False  # whether iterations show a bar


class Multiplied(NamedTuple):
    """How often an estimator multiplies with the curvature of the fit's data, at most."""

    fit: float = 0.0  # with `together` vectors at once
    solve: float = 0.0  # for a right-hand side on its own; then the data are needed at every solve, a state does not do
    together: int = 1


class JointCurvature(Called, ABC):
    """An estimator that sees several blocks at once. Dictionaries are keyed by block.

    The protocol is that of one block (`Curvature`), with all blocks in every call. One that only multiplies with the
    curvature has no `passes`; its `end(0)` is called all the same.
    """

    passes: int = 0
    fisher: Fisher = "empirical"
    memory: int = 1 << 27  # bytes that right-hand sides, and what solving takes beside them, may take at a time

    @abstractmethod
    def begin(self, shapes: Mapping[str, Shape], data: FitData | None) -> None:
        """Forgets what was learned; `data` is None where a state will be loaded."""

    def observe(self, gradients: Mapping[str, Gradients], weights: Tensor, column: int, turn: int) -> None:
        """Takes in a batch, as `Curvature.observe`."""
        del gradients, weights, column, turn

    def end(self, turn: int) -> None:
        """Ends a pass."""
        del turn

    @abstractmethod
    def solve(self, rhs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(G + λI)⁻¹ rhs for rhs [..., g, o, d] by block, the same leading axes in all."""

    def sq_norms(self, gradients: Mapping[str, Gradients]) -> Tensor:
        """g_iᵀ (G + λI)⁻¹ g_i, [n]."""
        n = len(next(iter(gradients.values())))
        each = max(1, self.memory // (STANDING * sum(g.rows(0, 1).formed().nbytes for g in gradients.values())))
        parts = []
        for begin in range(0, n, each):
            formed = {name: g.rows(begin, begin + each).formed() for name, g in gradients.items()}
            solved = self.solve(formed)
            parts.append(torch.stack([(formed[name] * solved[name]).flatten(1).sum(1) for name in formed]).sum(0))
        return torch.cat(parts)

    def directions(self, gradients: Mapping[str, Gradients]) -> dict[str, Directions]:
        """The query side of pairwise scores."""
        solved = self.solve({name: g.formed() for name, g in gradients.items()})
        return {name: Explicit(matrices) for name, matrices in solved.items()}

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]: ...

    @abstractmethod
    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...

    def stand_in(self) -> None:
        """As `Curvature.stand_in`; not asked of one that multiplies."""
        self.end(0)

    @abstractmethod
    def footprint(self, shapes: Mapping[str, Shape], tables: Mapping[str, bool], item: int) -> tuple[int, int]:
        """As `Curvature.footprint`, for all its blocks."""

    def multiplied(self, n: int) -> Multiplied:
        """For `Influence.plan`: products with the curvature of n examples; with that of fewer, as much less of one."""
        del n
        return Multiplied()


def check_estimator(rule: str, estimator: Any) -> None:
    """Raises TypeError for what is no estimator, and for the class of one."""
    if isinstance(estimator, type) and hasattr(estimator, "observe"):
        raise TypeError(f"{rule}, got the class {estimator.__name__}; call it: {estimator.__name__}()")
    if not hasattr(estimator, "observe"):
        raise TypeError(f"{rule}, got {estimator!r}")
