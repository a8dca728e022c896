"""DataInf: the inverse of a layer's empirical Fisher, the inverse and the mean over examples exchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastif.curvature import limits
from fastif.curvature.damping import (
    AUTO,
    Damping,
    NotPositiveDefinite,
    RelativeDamping,
    TrainingDamping,
    check_damping,
    constant_damping,
)
from fastif.curvature.protocol import BlockWork, Cost, Curvature, Exchanged, FitWork
from fastif.model.gradients import Dense, Formed, Gradients, OneHot
from fastif.model.losses import Fisher
from fastif.model.sliced_gradients import Sliced, factors_of, gradients_of


class DataInf(Curvature):
    """(G + λI)⁻¹ ≈ Σ_i (w_i/W)(W g_i g_iᵀ + λI)⁻¹ for G = Σ_i w_i g_i g_iᵀ, W = Σ_i w_i: in closed form

        solve(v) = (v − Σ_i w_i ⟨g_i, v⟩ / (λ + W|g_i|²) g_i) / λ,

    where the inverse of a mean has become a mean of inverses (Kwon et al. 2024, arXiv 2310.00902). It is exact for one
    example, and off by more the more the gradients have in common. The gradients g_i of the subset's own labels are
    kept, as the factors of (8) where these are smaller. docs/math.md (20).

    Args:
        damping: absolute λ > 0, or "auto": a tenth of the mean squared entry of the layer's gradients, as the paper has
            it (see `damping_used`); or `RelativeDamping`, another share of it; or `TrainingDamping`, its γ + 1/τ.
    """

    passes = 1
    fisher: Fisher = "empirical"

    def __init__(self, damping: Damping = "auto"):
        check_damping(damping, RelativeDamping, TrainingDamping)
        if damping == 0:
            raise ValueError("DataInf: damping must be a number > 0 or 'auto', got 0: it divides by it")
        self.damping: Damping = damping
        self.name = "layer"
        self._parts: list[tuple[Gradients, Tensor]] = []  # batches of the subset, and their weights
        self._gains: list[Tensor] = []  # w_i / (λ + W|g_i|²)
        self.damping_used = 0.0

    def begin(self, name: str, shape: tuple[int, int, int]) -> None:
        self.name, self.shape, self._parts, self._gains = name, shape, [], []

    def observe(self, gradients: Gradients, weights: Tensor, column: int, pass_index: int) -> None:
        del column, pass_index
        # Copies: a view would keep the memory of the whole batch, with all layers, alive.
        self._parts += [(part, weights[rows].clone()) for part, rows in _copy_smallest(gradients)]

    def sums(self, pass_index: int) -> dict[str, Tensor]:
        del pass_index
        return {}

    def kept(self, pass_index: int) -> dict[str, Tensor]:
        del pass_index
        return {
            f"{number}.{name}": value
            for number, (gradients, weights) in enumerate(self._parts)
            for name, value in {**factors_of(gradients), "weights": weights}.items()
        }

    def take_kept(self, pass_index: int, kept: Sequence[Mapping[str, Tensor]]) -> None:
        del pass_index
        self._parts = [
            (gradients_of(part, self.shape[1]), part["weights"]) for theirs in kept for part in _parts_of(theirs)
        ]

    def end(self, pass_index: int) -> None:
        """Finds λ and each example's gain. Raises NotPositiveDefinite where "auto" finds 0."""
        del pass_index
        norms = [gradients.sq_norms().double() for gradients, _ in self._parts]
        weights = [w.to(n) for (_, w), n in zip(self._parts, norms, strict=True)]
        total = torch.cat(weights).sum()
        damping = AUTO if self.damping == "auto" else self.damping
        if isinstance(damping, RelativeDamping):
            size = self.shape[0] * self.shape[1] * self.shape[2]
            self.damping_used = damping.share * float(torch.cat(weights) @ torch.cat(norms) / total) / size
        else:
            self.damping_used = constant_damping(damping)
        if not self.damping_used > 0:
            raise NotPositiveDefinite(
                f"DataInf: all gradients of layer {self.name!r} are zero: damping={self.damping!r} is 0; give a number"
            )
        self._gains = [w / (self.damping_used + total * n) for w, n in zip(weights, norms, strict=True)]

    def solve(self, rhs: Tensor) -> Tensor:
        """(v − Σ_i gain_i ⟨g_i, v⟩ g_i) / λ for v [..., g, o, d], in float64: with a small λ hardly anything is left.

        Returned in the dtype of v.
        """
        parts, flat = self._fitted(), rhs.reshape(-1, *rhs.shape[-3:]).double()
        out = flat.clone()
        for (gradients, _), gains in zip(parts, self._gains, strict=True):
            mine = _double(gradients)
            shares = mine.dots(flat) * gains  # [m, n]
            for row, share in enumerate(shares):
                out[row] -= mine.sum(share)
        return (out / self.damping_used).reshape(rhs.shape).to(rhs)

    def sq_norms(self, gradients: Gradients) -> Tensor:
        """Σ_i (w_i/W) (|g|² − W⟨g_i, g⟩² / (λ + W|g_i|²)) / λ, never negative.

        With p = ⟨g_i, g⟩²/|g_i|² a term is (|g|² − p)/λ + p/(λ + W|g_i|²): what stands across g_i, and along it. In
        float64, which resolves the difference of the gradients' float32 entries; its rounding alone is below zero.
        """
        size = self.shape[0] * self.shape[1] * self.shape[2]
        parts, total = [], sum(float(weights.double().sum()) for _, weights in self._fitted())
        for begin in range(0, len(gradients), max(1, limits.DATA_INF_ENTRIES // size)):
            some = gradients.rows(begin, begin + max(1, limits.DATA_INF_ENTRIES // size))
            entries = some.formed()
            formed = entries.double()
            norms = formed.square().flatten(1).sum(1)
            value = torch.zeros_like(norms)
            for part, weights in self._fitted():
                mine = _double(part)
                own, shares = mine.sq_norms(), weights.to(norms) / total
                along = mine.dots(formed).square() / torch.where(own > 0, own, 1.0)  # [m, n]
                across = (norms[:, None] - along).clamp(min=0)  # not below zero but for rounding, by Cauchy and Schwarz
                value += (across / self.damping_used + along / (self.damping_used + total * own)) @ shares
            parts.append(value.to(entries))
        return torch.cat(parts)

    def _fitted(self) -> list[tuple[Gradients, Tensor]]:
        if not self._gains:
            raise ValueError("DataInf: not fitted; call Influence.fit first")
        return self._parts

    def state_dict(self) -> dict[str, Tensor]:
        state = {"damping": torch.tensor(self.damping_used, dtype=torch.float64)}
        for number, ((gradients, weights), gains) in enumerate(zip(self._fitted(), self._gains, strict=True)):
            factors = factors_of(gradients)
            state.update({f"{number}.{name}": value for name, value in factors.items()})
            state.update({f"{number}.weights": weights, f"{number}.gains": gains})
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.damping_used = float(state["damping"])
        parts = _parts_of({key: value for key, value in state.items() if key != "damping"})
        self._parts = [(gradients_of(part, self.shape[1]), part["weights"]) for part in parts]
        self._gains = [part["gains"] for part in parts]

    def stand_in(self) -> None:
        self.damping_used, self._gains = 1.0, [weights.double() for _, weights in self._parts]

    def cost(self, block: BlockWork, fit: FitWork) -> Cost:
        """All examples' gradients are held, in their smaller form."""
        (g, o, d), t = block.shape, block.positions
        numbers = g * min(o * d, t * (d + (0 if block.table else o)))
        held = fit.n * fit.item * numbers
        return Cost(held, operations=2 * fit.n * t * block.size, learned=held)

    def exchanged(self, block: BlockWork, fit: FitWork) -> Exchanged:
        """All examples' gradients, and their weights in float64."""
        return Exchanged(kept=self.cost(block, fit).held + 8 * fit.n)


def _copy_smallest(gradients: Gradients) -> list[tuple[Gradients, slice]]:
    """The gradients in their smallest form, with copies of their own: what they were made of is let go."""
    parts = gradients.parts() if isinstance(gradients, Sliced) else [(gradients, slice(0, len(gradients)))]
    out: list[tuple[Gradients, slice]] = []
    for part, rows in parts:
        each = part.rows(0, 1).formed().numel()
        if isinstance(part, OneHot) and part.entries < each * len(part):
            out.append((OneHot(part.places.clone(), part.inputs.clone(), part.table_rows), rows))
        elif isinstance(part, Dense) and part.entries < each * len(part):
            out.append((Dense(part.inputs.clone(), part.output_grads.clone(), part.activations), rows))
        else:
            out.append((Formed(part.formed().clone()), rows))
    return out


def _double(gradients: Gradients) -> Gradients:
    """Those that `_copy_smallest` made, in float64."""
    if isinstance(gradients, OneHot):
        return OneHot(gradients.places, gradients.inputs.double(), gradients.table_rows)
    if isinstance(gradients, Dense):
        return Dense(gradients.inputs.double(), gradients.output_grads.double(), gradients.activations)
    return Formed(gradients.formed().double())


def _parts_of(named: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """What stands under "number.name", by number."""
    numbers = sorted({int(key.partition(".")[0]) for key in named})
    return [{key.partition(".")[2]: v for key, v in named.items() if key.startswith(f"{i}.")} for i in numbers]
