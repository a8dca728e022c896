"""What was asked for, and what a fit made of it: all that scores, plans, jobs and removals are computed from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastif.curvature.network import NetworkCurvature
from fastif.curvature.protocol import Estimator
from fastif.data.batches import Walked, walked
from fastif.influence.networks import Networks
from fastif.influence.origin import Buffers, buffers_of, changed_buffers, checksums_of, describe_fit
from fastif.model.capture import Capture
from fastif.model.losses import Measurement
from fastif.model.passes import Passes
from fastif.ranks import ALONE, Ranks
from fastif.samplers.subset import Subset

Checkpoint = Mapping[str, Tensor] | None  # a state dict, or None: the model as it is


class Setup(NamedTuple):
    """What an `Influence` was asked to do; nothing has been fitted yet."""

    passes: Passes
    given: Estimator | Mapping[str, Estimator]  # one for all blocks, or by patterns of their names
    of_head: bool  # whether the head alone is covered, by default
    estimators: NetworkCurvature  # that have learned nothing, of the blocks that are covered
    measurement: Measurement  # of queries
    checkpoints: Sequence[Mapping[str, Tensor]] | None
    memory: int  # bytes, as for `Influence`
    seed: int
    networks: Networks | None = None  # whose states the checkpoints are, where they were trained on parts of the data
    ranks: Ranks = ALONE  # among which passes over data are divided
    replicate: bool = False  # whether each of them keeps the whole curvature

    @property
    def model(self) -> nn.Module:
        return self.passes.model

    @property
    def capture(self) -> Capture:
        return self.passes.capture

    @property
    def device(self) -> torch.device:
        return self.passes.device

    @property
    def states(self) -> list[Checkpoint]:
        """The checkpoints over which influence is averaged."""
        return list(self.checkpoints) if self.checkpoints is not None else [None]

    @property
    def kept(self) -> Sequence[Tensor] | None:
        """By checkpoint, where these are networks: the examples that it was trained on."""
        return None if self.networks is None else self.networks.kept

    def describes(self, blocks: Tensor) -> bool:
        """Whether a state's blocks are those that are covered."""
        return torch.equal(blocks.cpu(), self.describe_blocks())

    def describe_blocks(self) -> Tensor:
        """Every block, its shape and its kind of estimator, as bytes of a text: what a state has to agree with."""
        kinds = {name: type(estimator).__name__ for name, estimator in self.estimators.by_block.items()}
        blocks = (f"{name} {list(block.shape)} {kinds[name]}" for name, block in self.capture.blocks.items())
        return torch.tensor(list("; ".join(blocks).encode()), dtype=torch.uint8)


class Fitted(NamedTuple):
    """What a fit made."""

    setup: Setup
    curvatures: tuple[NetworkCurvature, ...]  # by checkpoint
    n: int  # training examples
    subset: Subset | None = None  # that carried the curvature; None where a state was loaded, which does not hold it
    train: Walked | None = None  # the training data, as they were seen; likewise
    weights: Mapping[str, int] | None = None  # checksums of the model's state then, or of the checkpoints
    buffers: Buffers | None = None  # and of what its state leaves out
    loaded: str | None = None  # fingerprint of the state that was loaded, of several ranks, which load the same

    @property
    def passes(self) -> Passes:
        return self.setup.passes

    @property
    def capture(self) -> Capture:
        return self.setup.capture

    @property
    def memory(self) -> int:
        return self.setup.memory

    @property
    def alone(self) -> Fitted:
        """For work that this rank does without the others."""
        return self if self.setup.ranks.world == 1 else self._replace(setup=self.setup._replace(ranks=ALONE))

    def subset_of(self, number: int) -> Subset | None:
        """The examples that carried the curvature of a checkpoint."""
        kept = self.setup.kept
        return self.subset if kept is None or self.subset is None else restrict(self.subset, kept[number], self.n)

    def check_weights(self) -> None:
        """Raises ValueError where the model is no longer what it was at the fit: the curvature would be another's."""
        if self.weights is None:
            return
        now = checksums_of_state(self.setup)
        changed = [name for name in {**self.weights, **now} if now.get(name) != self.weights.get(name)]
        if not changed and self.buffers:
            buffers = changed_buffers(self.buffers, checksums_of_buffers(self.setup))
            if buffers:
                raise ValueError(
                    f"Influence: the model is not that of the fit: its buffer {buffers[0]!r}, which its state_dict "
                    "leaves out (persistent=False), has changed; put it back, or call fit(train) again"
                )
        if changed:
            raise ValueError(
                f"Influence: the model's weights are not those of the fit: {len(changed)} of {len(now)} tensors "
                f"changed, {changed[0]!r} first; call fit(train) again, or load the weights of the fit"
            )

    @property
    def divided(self) -> bool:
        """Whether ranks keep parts of the curvature for one another."""
        return any(curvature.owners for curvature in self.curvatures)

    def at_checkpoints(self) -> list[tuple[Checkpoint, NetworkCurvature]]:
        """Every checkpoint with what was fitted there."""
        return list(zip(self.setup.states, self.curvatures, strict=True))

    def walk(self, *given: Any) -> list[Any]:
        """Data whose passes are held against each other, and against the fit's where it is what was fitted."""
        known = [self.train] if self.train is not None else []
        for data in given:
            if not isinstance(data, Iterator) and not any(one is data or one.holds(data) for one in known):
                known.append(walked(data, self.passes.batch_size))
        return [next((one for one in known if one is data or one.holds(data)), data) for data in given]

    def describe(self) -> dict[str, Tensor]:
        """What a state says of the fit beside what was learned."""
        state = {"n": torch.tensor(self.n), "blocks": self.setup.describe_blocks()}
        state["fit"] = describe_fit(self.passes.loss, self.setup.estimators, self.buffers or {})
        if self.weights is not None:
            state["weights"] = torch.tensor([*self.weights.values()], dtype=torch.int64)
        return state

    def state_dict(self) -> dict[str, Tensor]:
        """All that was learned, as tensors. Raises ValueError for what other ranks keep."""
        state = self.describe()
        for number, curvature in enumerate(self.curvatures):
            state.update(curvature.state_dict(f"{number}/"))
        return state


def restrict(subset: Subset, kept: Tensor, n: int) -> Subset:
    """The part of a subset of n examples that a network was trained on, as a subset of those.

    Weights grow by n/k where the network was trained on k examples: as Σ w_i G_i estimates the mean over all, the part
    then estimates the mean over these.
    """
    inside = torch.isin(subset.indices, kept)
    if not inside.any():
        raise ValueError(
            f"fit: a network was trained on none of the subset's {len(inside):,} examples; take a larger subset"
        )
    return Subset(subset.indices[inside], subset.weights[inside] * (n / len(kept)))


def checksums_of_state(setup: Setup) -> dict[str, int]:
    """A number for every tensor of the model's state, or of the checkpoints."""
    if setup.checkpoints is None:
        return checksums_of(setup.model.state_dict())
    found: dict[str, int] = {}
    for number, state in enumerate(setup.checkpoints):
        found.update({f"{name} of checkpoint {number}": value for name, value in checksums_of(state).items()})
    return found


def checksums_of_buffers(setup: Setup) -> Buffers:
    """The same of buffers that the model's state leaves out and that its passes do not write."""
    return buffers_of(setup.model, setup.passes.written)
