"""What CG and LiSSA learn of each layer in passes over the data: a preconditioner, and a damping of its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastif.curvature.damping import RelativeDamping, TrainingDamping, constant_damping
from fastif.curvature.matrix_free.operator import Layout
from fastif.curvature.protocol import (
    BlockWork,
    Cost,
    Curvature,
    Exchanged,
    FitWork,
    JointCurvature,
    Shape,
    check_estimator,
)
from fastif.model.gradients import Gradients
from fastif.model.losses import Fisher

_DAMPING = "damping"  # the entry of a state that holds the layers' own
_TRACE = "its trace"


class PerLayer:
    """Preconditioners of single blocks, and the mean eigenvalues that a `RelativeDamping` is a share of.

    A layer's mean eigenvalue is tr(G_l)/P_l, and its trace the sum of the weighted squared norms of the gradients that
    the curvature is made of: those of the output Hessian's columns, or those that the preconditioner asks for.
    """

    def __init__(self, op: str, damping: float | RelativeDamping | TrainingDamping, preconditioner: Curvature | None):
        if preconditioner is not None:
            check_estimator(f"{op}: preconditioner must be an estimator of single blocks", preconditioner)
            if preconditioner.joint:
                raise TypeError(
                    f"{op}: preconditioner must be an estimator of single blocks, got {type(preconditioner).__name__}, "
                    "which is one of all blocks together"
                )
        self.op, self.damping, self.preconditioner = op, damping, preconditioner
        self.relative = isinstance(damping, RelativeDamping)
        self.passes = max(int(self.relative), 0 if preconditioner is None else preconditioner.passes)
        self.fisher: Fisher = "auto" if self.relative else "empirical"
        if preconditioner is not None:
            self.fisher = preconditioner.fisher
        self._layout = Layout({})
        self._by_block: dict[str, Curvature] = {}
        self._traces: dict[str, Tensor] = {}
        self._used: dict[str, float] = {}

    def begin(self, shapes: Mapping[str, Shape]) -> None:
        self._layout, self._traces, self._used = Layout(shapes), {}, {}
        self._by_block = {}
        if self.preconditioner is not None:
            self._by_block = {name: copy.deepcopy(self.preconditioner) for name in shapes}
            for name, estimator in self._by_block.items():
                estimator.begin(name, shapes[name])

    def observe(self, gradients: Mapping[str, Gradients], weights: Tensor, column: int, pass_index: int) -> None:
        for name, estimator in self._by_block.items():
            if pass_index < estimator.passes:
                estimator.observe(gradients[name], weights, column, pass_index)
        if self.relative and pass_index == 0:
            for name, g in gradients.items():
                trace = (g.sq_norms().double() * weights).sum()
                self._traces[name] = self._traces[name] + trace if name in self._traces else trace

    def sums(self, pass_index: int) -> dict[str, Tensor]:
        """Those of the preconditioners, and the traces."""
        found = {
            f"{name}/{key}": value
            for name, estimator in self._open(pass_index)
            for key, value in estimator.sums(pass_index).items()
        }
        return found | {f"{_TRACE}/{name}": trace for name, trace in self._traces.items() if pass_index == 0}

    def take_sums(self, pass_index: int, sums: Mapping[str, Tensor]) -> None:
        for name, estimator in self._open(pass_index):
            estimator.take_sums(pass_index, _under(name, sums))
        if pass_index == 0:
            self._traces = {name: sums[f"{_TRACE}/{name}"] for name in self._layout.sizes if self.relative}

    def kept(self, pass_index: int) -> dict[str, Tensor]:
        return {
            f"{name}/{key}": value
            for name, estimator in self._open(pass_index)
            for key, value in estimator.kept(pass_index).items()
        }

    def take_kept(self, pass_index: int, kept: Sequence[Mapping[str, Tensor]]) -> None:
        for name, estimator in self._open(pass_index):
            estimator.take_kept(pass_index, [_under(name, theirs) for theirs in kept])

    def _open(self, pass_index: int) -> list[tuple[str, Curvature]]:
        return [(name, one) for name, one in self._by_block.items() if pass_index < one.passes]

    def end(self, pass_index: int) -> None:
        for estimator in self._by_block.values():
            if pass_index < estimator.passes:
                estimator.end(pass_index)
        if isinstance(self.damping, RelativeDamping) and pass_index == 0:
            for name, trace in self._traces.items():
                mean = float(trace) / self._layout.sizes[name]
                if not 0 < mean < math.inf:
                    raise ValueError(
                        f"{self.op}: the mean eigenvalue of layer {name!r} is {mean:.3g}, of which no share can be "
                        "taken; give damping as a number"
                    )
                self._used[name] = self.damping.share * mean

    @property
    def used(self) -> float | dict[str, float]:
        """λ, or that of each layer."""
        return dict(self._used) if isinstance(self.damping, RelativeDamping) else constant_damping(self.damping)

    @property
    def largest(self) -> float:
        used = self.used
        return max(used.values()) if isinstance(used, dict) else used

    def times(self, like: Tensor) -> float | Tensor:
        """What a flat vector [m, P] is multiplied with: λ, or [P] those of its entries' layers."""
        used = self.used
        if not isinstance(used, dict):
            return used
        sizes = torch.tensor(list(self._layout.sizes.values()))
        values = torch.tensor([used[name] for name in self._layout.sizes], dtype=torch.float64)
        return values.repeat_interleave(sizes).to(like)

    @property
    def preconditions(self) -> bool:
        return bool(self._by_block)

    def precondition(self, flat: Tensor) -> Tensor:
        parts = self._layout.by_block(flat)
        return self._layout.flat({name: self._by_block[name].solve(part) for name, part in parts.items()})

    def state_dict(self) -> dict[str, Tensor]:
        state = {
            f"{name}/{key}": value
            for name, estimator in self._by_block.items()
            for key, value in estimator.state_dict().items()
        }
        if self.relative:
            state[_DAMPING] = torch.tensor([self._used[name] for name in self._layout.sizes], dtype=torch.float64)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self.relative:
            self._used = dict(zip(self._layout.sizes, state[_DAMPING].tolist(), strict=True))
        for name, estimator in self._by_block.items():
            estimator.load_state_dict(_under(name, state))

    def cost(self, blocks: Mapping[str, BlockWork], fit: FitWork) -> Cost:
        total = Cost()
        if self.preconditioner is not None:
            by_block = dict.fromkeys(blocks, self.preconditioner) | self._by_block
            for name, block in blocks.items():
                total += by_block[name].cost(block, fit)
        return total

    def exchanged(self, blocks: Mapping[str, BlockWork], fit: FitWork) -> Exchanged:
        """The preconditioners' sums go to all ranks, each of which makes its own of them, and so do the traces."""
        total = Exchanged(summed=8 * len(blocks) if self.relative else 0)
        for block in blocks.values() if self.preconditioner is not None else ():
            own = self.preconditioner.exchanged(block, fit)  # pyright: ignore[reportOptionalMemberAccess]
            total += Exchanged(summed=own.owned + own.summed, kept=own.kept)
        return total


class LearnsPerLayer(JointCurvature):
    """An estimator of all blocks together whose passes over the data are those of its `PerLayer`."""

    _per_layer: PerLayer

    def observe(self, gradients: Mapping[str, Gradients], weights: Tensor, column: int, pass_index: int) -> None:
        self._per_layer.observe(gradients, weights, column, pass_index)

    def sums(self, pass_index: int) -> dict[str, Tensor]:
        return self._per_layer.sums(pass_index)

    def take_sums(self, pass_index: int, sums: dict[str, Tensor]) -> None:
        self._per_layer.take_sums(pass_index, sums)

    def kept(self, pass_index: int) -> dict[str, Tensor]:
        return self._per_layer.kept(pass_index)

    def take_kept(self, pass_index: int, kept: Sequence[Mapping[str, Tensor]]) -> None:
        self._per_layer.take_kept(pass_index, kept)

    def end(self, pass_index: int) -> None:
        """Ends a pass of the preconditioner, and of what a `RelativeDamping` is a share of."""
        self._per_layer.end(pass_index)

    @property
    def damping_used(self) -> float | dict[str, float]:
        """λ: the number given, or that of a `TrainingDamping`; of a `RelativeDamping` that of each layer."""
        return self._per_layer.used

    def exchanged(self, blocks: Mapping[str, BlockWork], fit: FitWork) -> Exchanged:
        return self._per_layer.exchanged(blocks, fit)


def _under(name: str, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What belongs to a block, by its own names."""
    start = f"{name}/"
    return {key.removeprefix(start): value for key, value in named.items() if key.startswith(start)}
