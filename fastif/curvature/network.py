"""The curvature of a whole network: every block with its own estimator, or several blocks with one that they share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastif.curvature.directions import Directions
from fastif.curvature.protocol import Curvature, FitData, JointCurvature, Shape
from fastif.model.gradients import Formed, Gradients


class Alone(JointCurvature):
    """One block's own estimator."""

    def __init__(self, name: str, estimator: Curvature):
        self.name, self.estimator = name, estimator
        self.passes, self.fisher = estimator.passes, estimator.fisher

    def begin(self, shapes: Mapping[str, Shape], data: FitData | None) -> None:
        del data
        self.estimator.begin(self.name, shapes[self.name])

    def observe(self, gradients: Mapping[str, Gradients], weights: Tensor, column: int, turn: int) -> None:
        self.estimator.observe(gradients[self.name], weights, column, turn)

    def end(self, turn: int) -> None:
        self.estimator.end(turn)

    def solve(self, rhs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.name: self.estimator.solve(rhs[self.name])}

    def sq_norms(self, gradients: Mapping[str, Gradients]) -> Tensor:
        return self.estimator.sq_norms(gradients[self.name])

    def directions(self, gradients: Mapping[str, Gradients]) -> dict[str, Directions]:
        return {self.name: self.estimator.directions(gradients[self.name])}

    def stand_in(self) -> None:
        self.estimator.stand_in()

    def state_dict(self) -> dict[str, Tensor]:
        return self.estimator.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.estimator.load_state_dict(state)

    def footprint(self, shapes: Mapping[str, Shape], tables: Mapping[str, bool], item: int) -> tuple[int, int]:
        return self.estimator.footprint(shapes[self.name], tables[self.name], item)


class Together(JointCurvature):
    """One estimator for several blocks as if they were one: their parameters one after another, [1, 1, P]."""

    def __init__(self, names: tuple[str, ...], estimator: Curvature):
        self.names, self.estimator = names, estimator
        self.passes, self.fisher = estimator.passes, estimator.fisher
        self._shapes: Mapping[str, Shape] = {}

    def begin(self, shapes: Mapping[str, Shape], data: FitData | None) -> None:
        del data
        self._shapes = shapes
        self.estimator.begin(", ".join(self.names), self._whole(shapes))

    def observe(self, gradients: Mapping[str, Gradients], weights: Tensor, column: int, turn: int) -> None:
        self.estimator.observe(self._joined(gradients), weights, column, turn)

    def end(self, turn: int) -> None:
        self.estimator.end(turn)

    def solve(self, rhs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        whole = torch.cat([rhs[name].flatten(-3) for name in self.names], -1)
        solved = self.estimator.solve(whole[..., None, None, :])[..., 0, 0, :]
        parts = solved.split([torch.Size(self._shapes[name]).numel() for name in self.names], -1)
        return {name: part.reshape(rhs[name].shape) for name, part in zip(self.names, parts, strict=True)}

    def sq_norms(self, gradients: Mapping[str, Gradients]) -> Tensor:
        return self.estimator.sq_norms(self._joined(gradients))

    def stand_in(self) -> None:
        self.estimator.stand_in()

    def state_dict(self) -> dict[str, Tensor]:
        return self.estimator.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.estimator.load_state_dict(state)

    def footprint(self, shapes: Mapping[str, Shape], tables: Mapping[str, bool], item: int) -> tuple[int, int]:
        del tables
        return self.estimator.footprint(self._whole(shapes), False, item)

    def _whole(self, shapes: Mapping[str, Shape]) -> Shape:
        return 1, 1, sum(torch.Size(shapes[name]).numel() for name in self.names)

    def _joined(self, gradients: Mapping[str, Gradients]) -> Gradients:
        return Formed(torch.cat([gradients[name].formed().flatten(1) for name in self.names], 1)[:, None, None])


class NetworkCurvature:
    """The estimators of a network's blocks: what `Influence` fits and solves with."""

    def __init__(self, parts: Mapping[tuple[str, ...], JointCurvature]):
        self.parts = dict(parts)

    @property
    def by_block(self) -> dict[str, Any]:
        """The estimator of every block: its own, or one that it shares with others."""
        found: dict[str, Any] = {}
        for names, part in self.parts.items():
            own = part.estimator if isinstance(part, Alone | Together) else part
            found.update(dict.fromkeys(names, own))
        return found

    @property
    def passes(self) -> int:
        return max(part.passes for part in self.parts.values())

    @property
    def needs_data(self) -> bool:
        """Whether a solve multiplies with the curvature of the fit's data, which no state holds."""
        return any(part.multiplied(1).solve for part in self.parts.values())

    def begin(self, shapes: Mapping[str, Shape], data: FitData | None) -> None:
        for names, part in self.parts.items():
            own = None if data is None else data._replace(blocks={name: data.blocks[name] for name in names})
            part.begin({name: shapes[name] for name in names}, own)

    def open(self, turn: int) -> NetworkCurvature:
        """The part of it that looks at the data in pass `turn`."""
        return NetworkCurvature({names: part for names, part in self.parts.items() if turn < part.passes})

    def observe(self, gradients: Mapping[str, Gradients], weights: Tensor, column: int, turn: int) -> None:
        for names, part in self.parts.items():
            part.observe({name: gradients[name] for name in names}, weights, column, turn)

    def end(self, turn: int) -> None:
        for part in self.parts.values():
            part.end(turn)

    def solve(self, rhs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(G + λI)⁻¹ rhs for rhs [..., g, o, d] by block."""
        solved: dict[str, Tensor] = {}
        for names, part in self.parts.items():
            solved.update(part.solve({name: rhs[name] for name in names}))
        return {name: solved[name] for name in rhs}

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
            f"{prefix}{'+'.join(names)}/{key}": value
            for names, part in self.parts.items()
            for key, value in part.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor], prefix: str = "") -> None:
        """Raises ValueError for a state that lacks something, or that has more."""
        left = set(state)
        for names, part in self.parts.items():
            start = f"{prefix}{'+'.join(names)}/"
            own = {key for key in left if key.startswith(start)}
            left -= own
            try:
                part.load_state_dict({key.removeprefix(start): state[key] for key in own})
            except KeyError as error:
                raise ValueError(f"load_state_dict: the state lacks {start}{error.args[0]}") from None
        if left:
            raise ValueError(f"load_state_dict: the state is another model's: {min(left)}")
