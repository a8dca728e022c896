"""What a segment of a training makes of vectors: f(G) of them, and e^{−τ(G + γ)} of them. docs/math.md (25)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastif.curvature.damping import TrainingDamping
from fastif.curvature.matrix_free.functions import NotSettled, apply_functions
from fastif.curvature.network import NetworkCurvature

_PRODUCTS = 1000  # with a layer's curvature for each query, at most
_STANDING = 8  # vectors that a query takes while its products are made
KNOWS_NO_EIGENVALUES = (
    "Source: several segments, and logs of Adam, need a curvature that knows its eigenvalues (KFAC, EKFAC, Shampoo, "
    "Diagonal, ExactBlock, Arnoldi) and takes the damping that curvature= is called with"
)


class Decay(TrainingDamping):
    """e^{−τ(x + γ)} in the place of f(x): what becomes of a difference in the parameters over the time τ."""

    def filter(self, eigenvalues: Tensor) -> Tensor:
        return (eigenvalues + self.weight_decay).clamp_(min=0).mul_(-self.time).exp_()

    @property
    def of_flat_directions(self) -> float:
        return 1 / max(self.at(0.0), 1e-300)

    @property
    def constant(self) -> float:
        raise ValueError(KNOWS_NO_EIGENVALUES)


class Undamped(Decay):
    """x in the place of f(x): solves are then products with the curvature."""

    def filter(self, eigenvalues: Tensor) -> Tensor:
        return eigenvalues.clamp(min=0)


class Unrolled(NamedTuple):
    """By block, of as many vectors as were given."""

    response: dict[str, Tensor]
    decayed: dict[str, Tensor] | None  # None where no segment comes before


class Unrolling(Protocol):
    """How a segment answers."""

    def __call__(self, vectors: Mapping[str, Tensor]) -> Unrolled: ...


class Filtered:
    """Of SGD: by estimators that have both functions in the place of their inverse."""

    def __init__(self, response: NetworkCurvature, decay: NetworkCurvature | None):
        self.response, self.decay = response, decay

    def __call__(self, vectors: Mapping[str, Tensor]) -> Unrolled:
        return Unrolled(self.response.solve(vectors), None if self.decay is None else self.decay.solve(vectors))


class Scaled:
    """Of Adam: P^½ f(A) P^½ v and P^−½ e^{−τA} P^½ v, with A = P^½ G P^½ + S, by products with G.

    Args:
        curvature: whose solves are products with G.
        scales: P^½ by block, [g, o, d]; where it is 0 a parameter stands still but for its weight decay.
        shifts: the diagonal S by block, what weight decay adds to P^½ G P^½.
        time: τ.
        first: whether no segment comes before, so that nothing has to decay.
        memory: bytes that the vectors of those queries may take that are answered side by side.
    """

    def __init__(
        self,
        curvature: NetworkCurvature,
        scales: Mapping[str, Tensor],
        shifts: Mapping[str, Tensor],
        time: float,
        first: bool,
        memory: int,
    ):
        self.curvature, self.scales, self.shifts, self.memory = curvature, scales, shifts, memory
        self.rules = [TrainingDamping(time)] if first else [TrainingDamping(time), Decay(time)]

    def __call__(self, vectors: Mapping[str, Tensor]) -> Unrolled:
        made: list[dict[str, Tensor]] = [{} for _ in self.rules]
        for names in self.curvature.parts:
            rows = torch.cat([vectors[name].flatten(1) for name in names], 1)
            each = max(1, self.memory // (_STANDING * rows.shape[1] * rows.element_size()))
            parts = [self._part(names, some, vectors) for some in rows.split(each)]
            for into, found in zip(made, zip(*parts, strict=True), strict=True):
                into.update(_by_block(torch.cat(found), names, vectors))
        ordered = [{name: one[name] for name in vectors} for one in made]
        return Unrolled(ordered[0], ordered[1] if len(ordered) > 1 else None)

    def _part(self, names: tuple[str, ...], rows: Tensor, like: Mapping[str, Tensor]) -> list[Tensor]:
        """Of some queries, and the blocks of one estimator."""
        part, time = self.curvature.parts[names], self.rules[0].time
        scale, shift = (
            torch.cat([by_block[name].flatten() for name in names]).to(rows) for by_block in (self.scales, self.shifts)
        )

        def product(x: Tensor) -> Tensor:
            solved = part.solve(_by_block(x * scale, names, like))
            curved = torch.cat([solved[name].flatten(1) for name in names], 1).to(x)
            return curved * scale + x * shift

        try:
            found = apply_functions(product, rows * scale, [rule.filter for rule in self.rules], _PRODUCTS)
        except NotSettled as error:
            raise NotSettled(
                f"Source: {' and '.join(map(repr, names))}, training time {time:.3g}: {error}; take more "
                "segments, each of which is shorter"
            ) from error
        found[0] *= scale
        if len(found) > 1:
            found[1] = torch.where(scale > 0, found[1] / scale, rows * (shift * -time).exp())
        return found


def _by_block(rows: Tensor, names: tuple[str, ...], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows [m, P] of several blocks as their matrices, [m, g, o, d] each."""
    parts = rows.split([like[name][0].numel() for name in names], 1)
    return {name: part.unflatten(1, like[name].shape[1:]) for name, part in zip(names, parts, strict=True)}
