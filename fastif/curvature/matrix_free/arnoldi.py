"""Low-rank curvature from a Krylov space: the largest eigenpairs, found by products alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Generator, Tensor

from fastif.curvature.damping import NotPositiveDefinite, TrainingDamping, check_positive, invert, sufficient
from fastif.curvature.matrix_free.iterations import NotConverged, check_iterations
from fastif.curvature.matrix_free.krylov import Krylov, krylov
from fastif.curvature.matrix_free.operator import Layout, Matrix, check_matrix, operator_of
from fastif.curvature.protocol import BlockWork, Cost, FitData, FitWork, JointCurvature, Products, Shape
from fastif.renamed import warn_outside


class Arnoldi(JointCurvature):
    """(G_r + λI)⁻¹ with the `rank` largest eigenpairs of G = GGN or Hessian over all blocks: G_r = Q diag(θ) Qᵀ.

    Arnoldi's method (Schioppa et al. 2022, arXiv 2112.03052), which for a symmetric matrix is Lanczos's: Rayleigh–Ritz
    on the space that products span from `block` random vectors; so many that an eigenvalue may be that often repeated.
    Within the span of Q a solve divides by θ + λ, outside of it by λ: what is left out counts as flat. Once fitted it
    holds rank vectors and needs the data no longer. docs/math.md (20).

    `eigenvalues`, `residuals`, `left_out` and `error` tell how good it is.

    Args:
        rank: pairs to keep.
        damping: absolute λ > 0; or a `TrainingDamping`, which filters the eigenvalues instead, outside of the span
            that of 0 (see `damping_used`).
        matrix: "ggn" or "hessian"; of the latter the pairs of largest magnitude would do harm where they are negative
            beyond λ, which is refused.
        tolerance: of the residuals, relative to the largest eigenvalue; the space grows until they are that small.
        block: random vectors to start from.
        max_steps: products with `block` vectors at most; default as many as span 4 rank + 4 block directions. Where
            they do not suffice, `NotConverged` is warned of.
        keep_graph: see `Operator`.
    """

    passes = 0

    learned_by = ("matrix", "rank")

    def __init__(
        self,
        rank: int = 32,
        damping: float | TrainingDamping = 1e-3,
        matrix: Matrix = "ggn",
        *,
        tolerance: float = 1e-3,
        block: int = 4,
        max_steps: int | None = None,
        keep_graph: bool = False,
    ):
        check_positive("Arnoldi", damping, (TrainingDamping,), ": outside of the span it is all")
        check_matrix("Arnoldi", matrix)
        check_iterations("Arnoldi", tolerance, rank=rank, block=block, max_steps=1 if max_steps is None else max_steps)
        self.rank, self.damping, self.tolerance, self.block = rank, damping, tolerance, block
        self.matrix: Matrix = matrix
        self.max_steps, self.keep_graph = max_steps, keep_graph
        self._data: FitData | None = None
        self._values: Tensor | None = None  # float64 [r]
        self._vectors: Tensor | None = None  # [r, P]
        self._residuals: Tensor | None = None  # float64 [r]
        self._left_out: Tensor | None = None  # float64 []

    def begin(self, shapes: Mapping[str, Shape], data: FitData | None) -> None:
        self._layout, self._data = Layout(shapes), data
        self._values = self._vectors = self._residuals = self._left_out = None

    def end(self, pass_index: int) -> None:
        """Finds the eigenpairs. Raises NotPositiveDefinite where one is at most −λ, with a filter surely below −γ."""
        del pass_index
        operator = operator_of("Arnoldi", self._data, self.matrix, self.keep_graph)
        size = self._layout.size
        generator = Generator().manual_seed(operator.data.seed)
        start = torch.randn(min(self.block, size), size, generator=generator, dtype=torch.float64)
        steps = self._steps
        found = krylov(operator, start.to(operator.device, operator.dtype), steps, self.rank, self.tolerance)
        self._data = None
        self._check_signs(found)
        self._values, self._residuals = found.values[: self.rank], found.residuals[: self.rank]
        if len(found.values) > self.rank:
            self._left_out = found.values[self.rank :].abs().amax()
        else:  # outside of an invariant space there is nothing, outside of another one nobody looked
            self._left_out = torch.tensor(0.0 if found.invariant else math.inf, dtype=torch.float64)
        self._vectors = found.vectors
        residual, largest = float(self._residuals.max()), float(self._values.abs().max())
        if not found.invariant and (residual > self.tolerance * largest or self.error == 1):
            warn_outside(
                f"Arnoldi: after {steps} steps {len(self._values)} of rank={self.rank} pairs are there and the largest "
                f"residual is {residual / largest:.2g} of the largest eigenvalue, at a tolerance of "
                f"{self.tolerance:g}: more steps (max_steps) or a smaller rank would help",
                NotConverged,
            )

    def _check_signs(self, found: Krylov) -> None:
        values = found.values[: self.rank]
        if isinstance(self.damping, TrainingDamping):
            # An eigenvalue is as far from θ as the residual, or as rounding; what may be 0 is taken for 0.
            rounding = torch.finfo(found.vectors.dtype).eps * self._layout.size**0.5 * float(values.abs().max())
            known = found.residuals[: self.rank].clamp(min=rounding)
            negative, name = values[values + known < -self.damping.weight_decay], "weight_decay"
        else:
            negative, name = values[values <= -self.damping], "damping"
        if len(negative):
            shown = f"{self.damping:g}" if isinstance(self.damping, float | int) else repr(self.damping)
            lowest = float(negative.min())
            raise NotPositiveDefinite(
                f"Arnoldi: the {self.matrix} with damping {shown} has the negative eigenvalue {lowest:.3g}; {name} "
                f"{sufficient(lowest):g} would do, or matrix='ggn'"
            )

    @property
    def damping_used(self) -> float:
        """λ: the number given; of a `TrainingDamping` that of directions outside of the span."""
        return self.damping.of_flat_directions if isinstance(self.damping, TrainingDamping) else self.damping

    def _invert(self, values: Tensor) -> Tensor:
        """1 / (θ + λ), or what a `TrainingDamping` puts in its place."""
        return invert(values, self.damping, self.damping_used)

    @property
    def eigenvalues(self) -> Tensor:
        """θ of the pairs that are kept, float64 [r], largest in magnitude first."""
        return self._fitted(self._values)

    @property
    def residuals(self) -> Tensor:
        """|G q − θ q| of each pair, float64 [r]."""
        return self._fitted(self._residuals)

    @property
    def left_out(self) -> float:
        """The largest Ritz value, in magnitude, of which no pair is kept: an estimate, from below, of the largest
        eigenvalue left out; inf where the space that was searched holds none and there is more beside it.
        """
        return float(self._fitted(self._left_out))

    @property
    def error(self) -> float:
        """The relative error of a solve in the directions that are left out: left_out / (left_out + λ), of a filter f
        1 − f(left_out) / f(0); as good an estimate as `left_out` is, 1 where that is inf.
        """
        if math.isinf(self.left_out):
            return 1.0
        return 1 - float(self._invert(self._fitted(self._left_out))) * self.damping_used

    def _fitted(self, value: Tensor | None) -> Tensor:
        if value is None:
            raise ValueError("Arnoldi: not fitted; call Influence.fit first")
        return value

    def solve(self, rhs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(G_r + λI)⁻¹ rhs = rhs / λ + Q (1 / (θ + λ) − 1 / λ) Qᵀ rhs; with a filter, f(0) and f(θ) for fractions."""
        flat, vectors = self._layout.flat(rhs), self._fitted(self._vectors)
        inside = flat @ vectors.T
        gain = (self._invert(self.eigenvalues) - 1 / self.damping_used).to(flat)
        return self._layout.by_block(flat / self.damping_used + (inside * gain) @ vectors, rhs)

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "values": self.eigenvalues,
            "vectors": self._fitted(self._vectors),
            "residuals": self.residuals,
            "left_out": self._fitted(self._left_out),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._values, self._vectors, self._residuals = state["values"], state["vectors"], state["residuals"]
        self._left_out = state["left_out"]

    def cost(self, blocks: Mapping[str, BlockWork], fit: FitWork) -> Cost:
        size = sum(block.size for block in blocks.values())
        longest = min((self._steps + 1) * self.block, size)  # basis, which is copied when it grows
        return Cost(min(self.rank, size) * size * fit.item, (2 * longest + 4 * self.block) * size * fit.item)

    def products(self, n: int) -> Products:
        del n
        return Products(fit=self._steps, together=self.block, matrix=self.matrix, keep_graph=self.keep_graph)

    @property
    def _steps(self) -> int:
        return self.max_steps or -(-4 * (self.rank + self.block) // self.block)
