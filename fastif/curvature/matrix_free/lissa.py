"""LiSSA: the damped inverse of the curvature as a Neumann series, over the whole data or over batches drawn from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Generator, Tensor

from fastif.curvature.damping import (
    NotPositiveDefinite,
    RelativeDamping,
    TrainingDamping,
    check_positive,
    sufficient,
)
from fastif.curvature.matrix_free.iterations import NotConverged, check_iterations, iterating, silent
from fastif.curvature.matrix_free.krylov import Product, dots, krylov, normalise, norms_of
from fastif.curvature.matrix_free.operator import Layout, Matrix, Operator, check_matrix, operator_of
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
from fastif.renamed import rename_arguments, warn_outside, warn_renamed
from fastif.samplers.subset import Subset

_MARGIN = 1.25  # Power iteration finds the largest eigenvalue from below: the scale stands so far above what it found.
_POWER_STEPS = 30
_CLOSER = 0.99  # The series aims closer than the tolerance: the residual is computed once more, with other rounding.
_GROWN = 1.7  # A product longer than so many scales (√3, less rounding) shows an eigenvalue of 2 scales: see `_refuse`.
_AWAY = 100.0  # With batches changes go up and down; one so many times the first one means that the series diverges.


class Diverged(ValueError):
    """LiSSA's series does not converge, or the derivative of a replay explodes; the message tells what would help."""


class LiSSA(LearnsPerLayer):
    """(G + λI)⁻¹ b as the limit of x ← x + (b − (G + λI)x)/scale, G the GGN or the Hessian over all blocks.

    The estimator of Koh & Liang (2017) after Agarwal et al. (2017), and of the reference paper. With `batch=None` every
    step multiplies with the curvature of the whole weighted subset; the change in a step times the scale is then the
    residual, and a right-hand side stands still once it is at most tolerance·|b|. With a number, each step takes the
    curvature of that many examples, drawn in proportion to the weights; x is the mean over the second half of the
    steps and over `repeats` draws. Convergence takes about (λ_max + λ)/λ · ln(1/tolerance) steps: where `CG` is
    possible it is faster. As in `CG`, nothing is kept of the curvature.
    docs/math.md (19).

    Args:
        damping: absolute λ > 0; a `TrainingDamping`, its γ + 1/τ; or a `RelativeDamping`, for each layer a share of
            its mean eigenvalue, which takes a pass over the data (see `damping_used`).
        matrix: "ggn" or "hessian".
        scale: the series converges if it is more than half of the largest eigenvalue of G + λI. "auto": a quarter
            above the largest eigenvalue that power iteration finds, or that of the batches drawn (see `scale_used`).
        max_steps: of the series. Where they do not suffice, `NotConverged` is warned of.
        tolerance: of the residual, relative to the right-hand side.
        batch: examples per step, or None for all.
        repeats: of the whole series, for batches.
        preconditioner: an estimator P of single blocks (`Diagonal`, `KFAC`, `EKFAC`) with a damping of its own, fitted
            on the same subset: steps are P⁻¹(b − (G_j + λI)x)/scale, few where P is near G + λI, and `scale` is that
            of P⁻¹(G + λI). With batches and EK-FAC this is ASTRA (Wang et al. 2025).
        keep_graph: see `Operator`; for batch=None.

    Of the last solve, `residual` (computed from x) and `steps_taken` are kept.
    """

    learned_by = ("matrix",)

    @rename_arguments(steps="max_steps")
    def __init__(
        self,
        damping: float | RelativeDamping | TrainingDamping = 1e-2,
        matrix: Matrix = "ggn",
        *,
        scale: float | Literal["auto"] = "auto",
        max_steps: int = 1000,
        tolerance: float = 1e-3,
        batch: int | None = None,
        repeats: int = 1,
        preconditioner: Curvature | None = None,
        keep_graph: bool = False,
    ):
        check_positive("LiSSA", damping, (RelativeDamping, TrainingDamping), ": it has to converge")
        check_matrix("LiSSA", matrix)
        check_iterations("LiSSA", tolerance, max_steps=max_steps, repeats=repeats, batch=1 if batch is None else batch)
        if scale != "auto" and not (isinstance(scale, int | float) and 0 < scale < math.inf):
            raise ValueError(f"LiSSA: scale must be a finite number > 0 or 'auto', got {scale!r}")
        if batch is None and repeats > 1:
            raise ValueError(f"LiSSA: repeats={repeats} would do the same thing again without batch=")
        if batch is not None and keep_graph:
            raise ValueError("LiSSA: keep_graph=True keeps the graph of all examples: it goes with batch=None")
        self.damping, self.tolerance, self.batch, self.repeats = damping, tolerance, batch, repeats
        self.matrix: Matrix = matrix
        self.scale: float | Literal["auto"] = scale
        self.max_steps, self.keep_graph = max_steps, keep_graph
        self.preconditioner = preconditioner
        self._per_layer = PerLayer("LiSSA", damping, preconditioner)
        self.passes, self.fisher = self._per_layer.passes, self._per_layer.fisher
        self._data: FitData | None = None
        self._scale: Tensor | None = None
        self.residual: float | None = None  # of the last solve, relative, the largest of its right-hand sides
        self.steps_taken: int | None = None  # of the last solve
        self.graph_bytes = 0

    def begin(self, shapes: Mapping[str, Shape], data: FitData | None) -> None:
        self._layout, self._data, self._scale = Layout(shapes), data, None
        self._per_layer.begin(shapes)
        if self.scale != "auto":
            self._scale = torch.tensor(float(self.scale), dtype=torch.float64)
        k = math.inf if data is None else len(data.subset.indices)
        if self.batch is not None and self.batch > k:
            raise ValueError(f"LiSSA: batch must be at most the subset's k={k} examples, got {self.batch}")

    def end(self, pass_index: int) -> None:
        """Ends a pass of the preconditioner; after the last one, finds the scale."""
        self._per_layer.end(pass_index)
        if self._scale is not None or pass_index + 1 < self.passes:
            return
        operator = self._operator()
        start, products = self._start(operator), self._products(operator, repeat=-1)
        if self._per_layer.preconditions:
            found = largest_preconditioned(products, start, self._per_layer.times(start), self._per_layer.precondition)
            self._scale = torch.tensor(_MARGIN * found, dtype=torch.float64)
        else:
            found = largest(products, start)
            self._scale = torch.tensor(_MARGIN * found + self._per_layer.largest, dtype=torch.float64)

    @property
    def steps(self) -> int:
        """The old name of `max_steps`."""
        warn_renamed("LiSSA.steps", "LiSSA.max_steps")
        return self.max_steps

    @property
    def scale_used(self) -> float:
        """The number given, or what "auto" found."""
        if self._scale is None:
            raise ValueError("LiSSA: not fitted; call Influence.fit first")
        return float(self._scale)

    def solve(self, rhs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(G + λI)⁻¹ rhs. Raises Diverged with the scale that would do, NotPositiveDefinite with the damping."""
        operator, flat = self._operator(), self._layout.flat(rhs)
        self.graph_bytes = operator.graph_bytes
        sizes = norms_of(flat)
        b, x, self.steps_taken = normalise(flat, sizes), torch.zeros_like(flat), 0
        damping = self._per_layer.times(flat)
        with iterating("LiSSA", self.max_steps * self.repeats, operator.data) as stepped:
            for repeat in range(self.repeats):
                products = self._products(operator, repeat)
                found, taken = neumann(
                    products,
                    b,
                    damping,
                    self.scale_used,
                    steps=self.max_steps,
                    tolerance=_CLOSER * self.tolerance if self.batch is None else None,
                    full=operator,
                    precondition=self._per_layer.precondition if self._per_layer.preconditions else None,
                    name=self.matrix,
                    eps=torch.finfo(operator.coarsest).eps,
                    stepped=stepped,
                )
                x += found / self.repeats
                self.steps_taken += taken
        self.residual = float(norms_of(b - (operator(x) + damping * x)).max())
        if not self.residual <= self.tolerance:
            warn_outside(
                f"LiSSA: after {self.steps_taken} steps the residual is {self.residual:.2g} of the right-hand side, "
                f"above the tolerance {self.tolerance:g}: "
                + (
                    f"it falls no longer, {operator.coarsest} does not resolve less"
                    if self.batch is None and self.steps_taken < self.max_steps
                    else "more steps, more damping"
                    + (" or CG" if self.batch is None else ", larger batches or more repeats")
                    + " would help"
                ),
                NotConverged,
            )
        return self._layout.by_block(x * sizes[:, None].to(x), rhs)

    def _operator(self) -> Operator:
        return operator_of("LiSSA", self._data, self.matrix, self.keep_graph)

    def _start(self, operator: Operator) -> Tensor:
        generator = Generator().manual_seed(operator.data.seed)
        start = torch.randn(1, self._layout.size, generator=generator, dtype=torch.float64)
        return start.to(operator.device, operator.dtype)

    def _products(self, operator: Operator, repeat: int) -> Iterator[Product]:
        """The matrix of each step: the same for every right-hand side, however many are solved for at a time."""
        data, batch = operator.data, self.batch
        generator = Generator().manual_seed(data.seed + 1 + repeat)
        while True:
            yield operator if batch is None else partial(operator, subset=draw_batch(data.subset, batch, generator))

    def state_dict(self) -> dict[str, Tensor]:
        """The scale and what was learned of each layer: the curvature itself is never there."""
        _ = self.scale_used
        return {**self._per_layer.state_dict(), **({} if self._scale is None else {"scale": self._scale})}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._scale = state["scale"]
        self._per_layer.load_state_dict(state)

    def cost(self, blocks: Mapping[str, BlockWork], fit: FitWork) -> Cost:
        """Of the preconditioner; the scale takes a few vectors, a solve some of its right-hand sides' size besides."""
        size = sum(block.size for block in blocks.values())
        making = 4 * size * fit.item if self.scale == "auto" else 0
        return self._per_layer.cost(blocks, fit) + Cost(making=making)

    def products(self, n: int) -> Products:
        """Power iteration for the scale; one in a step, and two of all examples that look at where it has come to."""
        share = 1.0 if self.batch is None else min(1.0, self.batch / n)
        finding = _POWER_STEPS if self.scale == "auto" else 0
        return Products(
            share * finding, share * self.max_steps * self.repeats + 2, matrix=self.matrix, keep_graph=self.keep_graph
        )


def draw_batch(subset: Subset, batch: int, generator: Generator) -> Subset:
    """`batch` examples drawn in proportion to their weights, with repetition; they carry the subset's whole weight."""
    total = subset.weights.sum()
    u = torch.rand(batch, generator=generator, dtype=torch.float64) * total
    places = torch.searchsorted(subset.weights.cumsum(0), u, right=True).clamp(max=len(subset.weights) - 1)
    places, times = places.unique(return_counts=True)
    return Subset(subset.indices[places], times * (total / batch))


def largest(products: Iterator[Product], start: Tensor) -> float:
    """The largest |A v| of power iteration over the matrices A: towards the largest eigenvalue, from below."""
    v, found = normalise(start, norms_of(start)), 0.0
    for _ in range(_POWER_STEPS):
        image = next(products)(v)
        size = float(norms_of(image))
        found = max(found, size)
        if size == 0:
            break
        v = normalise(image, norms_of(image))
    return found


def largest_preconditioned(
    products: Iterator[Product], start: Tensor, damping: float | Tensor, precondition: Product
) -> float:
    """The largest eigenvalue of P⁻¹(A + λI), for a preconditioner P, from below.

    vᵀ B P⁻¹ B v / vᵀ B v with B = A + λI is a Rayleigh quotient of P⁻¹B, whichever v.
    """
    v, found = normalise(start, norms_of(start)), 0.0
    for _ in range(_POWER_STEPS):
        image = next(products)(v) + damping * v
        moved = precondition(image)
        bend = float(dots(v, image)[0])
        if bend <= 0:
            break
        found = max(found, float(dots(image, moved)[0]) / bend)
        v = normalise(moved, norms_of(moved))
    return found


def neumann(
    products: Iterator[Product],
    b: Tensor,
    damping: float | Tensor,
    scale: float,
    *,
    steps: int,
    tolerance: float | None,
    full: Product,
    name: str,
    precondition: Product | None = None,
    eps: float = 0.0,
    stepped: Callable[[float], None] = silent,
) -> tuple[Tensor, int]:
    """x ← x + P⁻¹(b − (A + λI)x)/scale from x = 0, for rows b [m, P] of norm 1 or 0; returns x and the steps taken.

    λ may be the diagonal [P] of another matrix; P is the identity without a preconditioner. What is left of b shrinks
    in every step in the norm of P⁻¹, in which divergence is looked for.

    tolerance: of the norm of what is added times the scale, where A is always the same; a row that is there stands
    still, and all do where A's rounding, eps relative to it, lets them come no further. None where A varies: x is then
    the mean over the second half of the steps. `full`, the product with all examples, is for the diagnosis;
    `stepped` is told the largest residual.
    """
    x, mean = torch.zeros_like(b), torch.zeros_like(b)
    moving = torch.arange(len(b), device=b.device)
    unit = torch.ones(len(b), dtype=torch.float64, device=b.device)
    lowest, eps = math.inf, max(eps, torch.finfo(b.dtype).eps)
    for step in range(steps):
        here = x[moving]
        rest = b[moving] - (next(products)(here) + damping * here)
        size, moved = norms_of(rest), rest
        own = size  # in the norm that shrinks
        if precondition is not None:
            moved = precondition(rest)
            own = dots(rest, moved).clamp(min=0).sqrt()
            if step == 0:
                unit = torch.where(own > 0, own, 1.0)
            own = own / unit[moving]
        worst = float(own.max())
        lowest = min(lowest, worst)
        stepped(float(size.max()))
        # With one matrix the rest shrinks in every step, if it does at all.
        if not worst <= (_AWAY if tolerance is None else 2 * max(lowest, eps**0.5)):
            if precondition is not None:
                raise Diverged(
                    f"LiSSA: with scale {scale:g} the preconditioned series diverges in step {step + 1}: a larger "
                    "scale or 'auto', larger batches, or more damping of the preconditioner would help"
                )
            direction = rest[int(size.nan_to_num(math.inf).argmax())][None]
            _refuse(full, direction, damping, scale, step + 1, name, 0.0 if tolerance is None else eps)
            return x, step
        if tolerance is not None:
            moving, moved = moving[size > tolerance], moved[size > tolerance]
            if len(moving) == 0:
                return x, step
        x[moving] += moved / scale
        if tolerance is None and step >= steps // 2:
            mean += (x - mean) / (step - steps // 2 + 1)
    return (x if tolerance is not None else mean), steps


def _refuse(
    product: Product, direction: Tensor, damping: float | Tensor, scale: float, step: int, name: str, eps: float
) -> None:
    """Why the series diverges in a direction, which is by then that of an eigenvalue outside of (0, 2 scale).

    With eps > 0 it returns where the direction is none of these but the rounding of products. One that has grown
    twofold makes up √¾ of what is left, so that its eigenvalue shows as more than 1.7 scale.
    """
    if not bool(direction.isfinite().all()):
        raise Diverged(
            f"LiSSA: in step {step} the product of the {name} with a vector holds NaN or Inf; with scale {scale:g} the "
            "series diverges: scale='auto' finds one"
        )
    v = normalise(direction, norms_of(direction))
    image = product(v) + damping * v
    own = float(dots(v, damping * v)[0])  # λ in this direction
    curvature, size = float(dots(v, image)[0]), float(norms_of(image)[0])
    if eps and curvature > -eps * scale and size <= _GROWN * scale:
        return
    if curvature > 0:
        raise Diverged(
            f"LiSSA: with scale {scale:g} the series diverges in step {step}, in a direction of the curvature "
            f"{curvature:.3g}: scale {_upwards(_MARGIN * max(size, curvature)):g} would do, or 'auto'"
        )
    lowest = min(curvature - own, krylov(product, v, _POWER_STEPS, 1, 1e-2).lowest)
    raise NotPositiveDefinite(
        f"LiSSA: the {name} with damping {own:g} is not positive definite, so that the series diverges: in step "
        f"{step} a direction has the curvature {curvature:.3g}, and the lowest eigenvalue found without damping is "
        f"{lowest:.3g}; damping {sufficient(lowest):g} would do" + ("" if name == "ggn" else ", or matrix='ggn'")
    )


def _upwards(value: float) -> float:
    """Two digits of it, rounded up."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(value / unit) * unit
