"""The curvature of a whole network: every block with its own estimator, or several blocks with one that they share."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from fastif.curvature.directions import Directions
from fastif.curvature.protocol import Estimator, FitData, JointCurvature, Shape
from fastif.model.gradients import Gradients
from fastif.model.layers import Block


class NetworkCurvature:
    """The estimators of a network's blocks: what `Influence` fits and solves with."""

    def __init__(
        self, parts: Mapping[tuple[str, ...], JointCurvature], owners: dict[tuple[str, ...], int] | None = None
    ):
        self.parts = dict(parts)
        self.owners = {} if owners is None else owners  # of parts that one rank keeps for all; of the others none

    @property
    def by_block(self) -> dict[str, Estimator]:
        """The estimator of every block: its own, or one that it shares with others."""
        found: dict[str, Estimator] = {}
        for names, part in self.parts.items():
            found.update(dict.fromkeys(names, part.given))
        return found

    @property
    def passes(self) -> int:
        return max(part.passes for part in self.parts.values())

    @property
    def needs_data(self) -> bool:
        """Whether a solve multiplies with the curvature of the fit's data, which no state holds."""
        return any(part.products(1).solve for part in self.parts.values())

    @property
    def needs_whole(self) -> set[str]:
        """Estimators, by their names, that differentiate by parameters: ranks that hold these in parts cannot."""
        return {type(part.given).__name__ for part in self.parts.values() if part.needs_whole}

    def begin(self, shapes: Mapping[str, Shape], data: FitData | None) -> None:
        for names, part in self.parts.items():
            own = None if data is None else data._replace(blocks={name: data.blocks[name] for name in names})
            part.begin({name: shapes[name] for name in names}, own)

    def open(self, pass_index: int) -> NetworkCurvature:
        """The part of it that looks at the data in pass `pass_index`."""
        return NetworkCurvature(
            {names: part for names, part in self.parts.items() if pass_index < part.passes}, self.owners
        )

    def observe(self, gradients: Mapping[str, Gradients], weights: Tensor, column: int, pass_index: int) -> None:
        for names, part in self.parts.items():
            part.observe({name: gradients[name] for name in names}, weights, column, pass_index)

    def end(self, pass_index: int) -> None:
        for part in self.parts.values():
            part.end(pass_index)

    def solve(self, rhs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(G + λI)⁻¹ rhs for rhs [..., g, o, d] by block."""
        solved: dict[str, Tensor] = {}
        for names, part in self.parts.items():
            solved.update(part.solve({name: rhs[name] for name in names}))
        return {name: solved[name] for name in rhs}

    def precondition(self, gradients: Mapping[str, Gradients]) -> dict[str, Tensor]:
        """(G + λI)⁻¹ g_i as matrices [n, g, o, d] by block."""
        made: dict[str, Tensor] = {}
        for names, part in self.parts.items():
            made.update(part.precondition({name: gradients[name] for name in names}))
        return {name: made[name] for name in gradients}

    def sq_norms(self, gradients: Mapping[str, Gradients]) -> Tensor:
        parts = [part.sq_norms({name: gradients[name] for name in names}) for names, part in self.parts.items()]
        return torch.stack(parts).sum(0)

    def directions(self, gradients: Mapping[str, Gradients]) -> dict[str, Directions]:
        made: dict[str, Directions] = {}
        for names, part in self.parts.items():
            made.update(part.directions({name: gradients[name] for name in names}))
        return {name: made[name] for name in gradients}

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        return {
            start_of(prefix, names) + key: value
            for names, part in self.parts.items()
            for key, value in part.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor], prefix: str = "") -> None:
        """Raises ValueError for a state that lacks something, or that has more."""
        left = set(state)
        for names, part in self.parts.items():
            start = start_of(prefix, names)
            own = {key for key in left if key.startswith(start)}
            left -= own
            try:
                part.load_state_dict({key.removeprefix(start): state[key] for key in own})
            except KeyError as error:
                raise ValueError(f"load_state_dict: the state lacks {start}{error.args[0]}") from None
        if left:
            raise ValueError(f"load_state_dict: the state is another model's: {min(left)}")


def start_of(prefix: str, names: tuple[str, ...]) -> str:
    """Of the keys of a part in a network's state."""
    return f"{prefix}{'+'.join(names)}/"


def prepare(
    estimators: NetworkCurvature, blocks: Mapping[str, Block], data: FitData | None, memory: int
) -> NetworkCurvature:
    """A copy that has learned nothing yet, for a fit or, without data, for a state; `memory` as for `Influence`."""
    curvature = NetworkCurvature({names: copy.deepcopy(part) for names, part in estimators.parts.items()})
    for part in curvature.parts.values():
        part.memory = memory
    curvature.begin({name: block.shape for name, block in blocks.items()}, data)
    return curvature
