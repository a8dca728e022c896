"""Conjugate gradients: the damped inverse of the curvature of a whole network, by products alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastif.curvature.damping import (
    NotPositiveDefinite,
    RelativeDamping,
    TrainingDamping,
    check_damping,
    sufficient,
)
from fastif.curvature.matrix_free.iterations import NotConverged, check_iterations, iterating, silent
from fastif.curvature.matrix_free.krylov import Product, dots, krylov, normalise, norms_of
from fastif.curvature.matrix_free.operator import Layout, Matrix, check_matrix, operator_of
from fastif.curvature.matrix_free.per_layer import LearnsPerLayer, PerLayer
from fastif.curvature.protocol import (
    BlockWork,
    Cost,
    Curvature,
    FitData,
    FitWork,
    Products,
    Shape,
)
from fastif.renamed import warn_outside

_LOOKED = 30  # So many products may a failure cost, to find the damping that it advises.


class CG(LearnsPerLayer):
    """(G + λI)⁻¹ by conjugate gradients, G the GGN or the Hessian over all blocks, with what they have in common.

    Several right-hand sides share their passes through the model; each has its own step lengths and stands still once
    |b − (G + λI)x| <= tolerance·|b|. The recursion's word for that is checked: `residual` is computed from x, and
    where rounding made the two part, the recursion begins anew. Nothing is kept of the curvature: the data of the fit
    must be at hand whenever something is solved, and so must the model at the weights of the fit, which `Influence`
    sees to. docs/math.md (18).

    Args:
        damping: absolute λ >= 0; a `TrainingDamping`, its γ + 1/τ; or a `RelativeDamping`, for each layer a share of
            its mean eigenvalue, which takes a pass over the data (see `damping_used`), of drawn labels where an
            example has several, as texts have.
        matrix: "ggn" or "hessian"; a Hessian that λ does not make positive definite is refused when a direction shows
            it.
        tolerance: of the residual, relative to the right-hand side.
        max_steps: of the recursion, a product each; where they do not suffice, `NotConverged` is warned of.
        preconditioner: an estimator of single blocks (`Diagonal`, `KFAC`, `EKFAC`), with a damping of its own; it is
            fitted on the same subset.
        keep_graph: see `Operator`: fewer passes, more memory; `graph_bytes` tells how much.
    """

    def __init__(
        self,
        damping: float | RelativeDamping | TrainingDamping = 1e-3,
        matrix: Matrix = "ggn",
        *,
        tolerance: float = 1e-4,
        max_steps: int = 200,
        preconditioner: Curvature | None = None,
        keep_graph: bool = False,
    ):
        check_damping(damping, RelativeDamping, TrainingDamping)
        if damping == "auto":
            raise ValueError("CG: damping must be a number, got 'auto'")
        check_matrix("CG", matrix)
        check_iterations("CG", tolerance, max_steps=max_steps)
        self.damping, self.tolerance, self.max_steps = damping, tolerance, max_steps
        self.matrix: Matrix = matrix
        self.preconditioner, self.keep_graph = preconditioner, keep_graph
        self._per_layer = PerLayer("CG", damping, preconditioner)
        self.passes, self.fisher = self._per_layer.passes, self._per_layer.fisher
        self._data: FitData | None = None
        self.residual: float | None = None  # of the last solve, relative, the largest of its right-hand sides
        self.steps_taken: int | None = None  # of the last solve
        self.graph_bytes = 0

    def begin(self, shapes: Mapping[str, Shape], data: FitData | None) -> None:
        self._layout, self._data = Layout(shapes), data
        self._per_layer.begin(shapes)

    def solve(self, rhs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(G + λI)⁻¹ rhs. Raises NotPositiveDefinite for a direction of no or negative curvature."""
        operator = operator_of("CG", self._data, self.matrix, self.keep_graph)
        self.graph_bytes = operator.graph_bytes
        flat = self._layout.flat(rhs)
        with iterating("CG", self.max_steps, operator.data) as stepped:
            found = conjugate_gradients(
                operator,
                flat,
                self._per_layer.times(flat),
                tolerance=self.tolerance,
                max_steps=self.max_steps,
                precondition=self._per_layer.precondition if self._per_layer.preconditions else None,
                name=self.matrix,
                stepped=stepped,
            )
        self.residual, self.steps_taken = float(found.residuals.max()), found.steps
        if self.residual > self.tolerance:
            warn_outside(
                f"CG: after {self.steps_taken} of {self.max_steps} steps the residual is {self.residual:.2g} of the "
                f"right-hand side, above the tolerance {self.tolerance:g}"
                + (
                    ": more steps (max_steps), more damping or a preconditioner would help"
                    if self.steps_taken >= self.max_steps
                    else f": it falls no longer, {operator.coarsest} does not resolve less"
                ),
                NotConverged,
            )
        return self._layout.by_block(found.x, rhs)

    def state_dict(self) -> dict[str, Tensor]:
        """The preconditioner's state, and the layers' own damping: the curvature itself is never there."""
        return self._per_layer.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._per_layer.load_state_dict(state)

    def cost(self, blocks: Mapping[str, BlockWork], fit: FitWork) -> Cost:
        """Of the preconditioner; a solve takes some vectors of its right-hand sides' size besides, and the graph."""
        return self._per_layer.cost(blocks, fit)

    def products(self, n: int) -> Products:
        """One in a step, and one when the recursion ends, which begins anew only where it has halved the residual."""
        del n
        ends = 1 + math.ceil(-math.log2(self.tolerance))
        return Products(
            solve=self.max_steps + min(ends, self.max_steps), matrix=self.matrix, keep_graph=self.keep_graph
        )


class Solved(NamedTuple):
    x: Tensor  # [m, P]
    residuals: Tensor  # float64 [m]: |b − (A + λI) x| / |b|, computed from x; 0 where b is 0
    steps: int


def conjugate_gradients(
    product: Product,
    rhs: Tensor,
    damping: float | Tensor,
    *,
    tolerance: float,
    max_steps: int,
    precondition: Callable[[Tensor], Tensor] | None = None,
    name: str = "matrix",
    stepped: Callable[[float], None] = silent,
) -> Solved:
    """Solves (A + λI) x = b for the rows b of rhs [m, P], all at once; λ may be the diagonal [P] of another matrix.

    `name` of A is for messages; `stepped` is told the largest residual of every step.

    Raises NotPositiveDefinite for pᵀ(A + λI)p <= 0, with the damping that would do.
    """
    sizes = norms_of(rhs)
    b = normalise(rhs, sizes)
    x = torch.zeros_like(b)
    r = b.clone()
    residuals = norms_of(r)  # 1 each, or 0
    steps = 0
    while steps < max_steps:
        rows = (residuals > tolerance).nonzero()[:, 0]
        if len(rows) == 0:
            break
        change, taken = _run(product, r[rows], damping, tolerance, max_steps - steps, precondition, name, stepped)
        steps += taken
        moved = x[rows] + change
        left = b[rows] - (product(moved) + damping * moved)
        after = norms_of(left)
        better = after < residuals[rows]
        x[rows[better]], r[rows[better]] = moved[better], left[better]
        stalled = not bool((after < 0.5 * residuals[rows]).any())
        residuals[rows[better]] = after[better]
        if stalled:  # The recursion began anew and came no further: rounding lets it come no closer.
            break
    return Solved(x * sizes[:, None].to(x), residuals.cpu(), steps)


def _run(
    product: Product,
    r: Tensor,
    damping: float | Tensor,
    goal: float,
    max_steps: int,
    precondition: Callable[[Tensor], Tensor] | None,
    name: str,
    stepped: Callable[[float], None],
) -> tuple[Tensor, int]:
    """The recursion from x = 0 with residuals r [m, P] until each is of norm goal; returns x and the steps taken."""
    x = torch.zeros_like(r)
    moving = torch.arange(len(r), device=r.device)  # the rows of x that r, p, … belong to
    z = r if precondition is None else precondition(r)
    p, rz = z.clone(), dots(r, z)
    for step in range(1, max_steps + 1):
        q = product(p) + damping * p
        bend = dots(p, q)
        if not bool((bend > 0).all()):
            _refuse(product, p, bend, damping, step, name)
        length = rz / bend
        x[moving] += length[:, None].to(p) * p
        r = r - length[:, None].to(p) * q
        norms = norms_of(r)
        stepped(float(norms.max()))
        open_rows = (norms > goal).nonzero()[:, 0]
        if len(open_rows) == 0 or step == max_steps:
            return x, step
        if len(open_rows) < len(r):
            moving, r, p, rz = moving[open_rows], r[open_rows], p[open_rows], rz[open_rows]
        z = r if precondition is None else precondition(r)
        before, rz = rz, dots(r, z)
        p = z + (rz / before)[:, None].to(p) * p
    return x, max_steps


def _refuse(product: Product, p: Tensor, bend: Tensor, damping: float | Tensor, step: int, name: str) -> None:
    if not bool(bend.isfinite().all()):
        raise ValueError(f"CG: in step {step} the product of the {name} with a direction holds NaN or Inf")
    row = int(bend.argmin())
    one = p[row : row + 1]
    own = float(dots(one, damping * one)[0] / dots(one, one)[0])  # λ in this direction
    slope = float(bend[row] / dots(one, one)[0]) - own
    lowest = min(slope, krylov(product, one, _LOOKED, 1, 1e-2).lowest)
    raise NotPositiveDefinite(
        f"CG: the {name} with damping {own:g} is not positive definite: in step {step} a direction has the "
        f"curvature {slope + own:.3g}, and the lowest eigenvalue found without damping is {lowest:.3g}; damping "
        f"{sufficient(min(lowest, 0.0)):g} would do" + ("" if name == "ggn" else ", or matrix='ggn'")
    )
