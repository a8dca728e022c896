"""K-FAC: the curvature of a layer as a Kronecker product."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastif.curvature.damping import (
    AUTO,
    Damping,
    NotPositiveDefinite,
    RelativeDamping,
    TrainingDamping,
    check_damping,
    invert,
)
from fastif.curvature.directions import Directions, Explicit, QueryFactors, Separable, products_of
from fastif.curvature.eigenbasis import Eigenbasis
from fastif.curvature.eigenvectors import find_eigenvectors
from fastif.curvature.protocol import BlockWork, Cost, Curvature, Exchanged, FitWork, check_fisher
from fastif.model.gradients import Gradients, Unfinished
from fastif.model.losses import Fisher
from fastif.renamed import warn_renamed


class KFAC(Curvature):
    """G ≈ A ⊗ B: the mean second moment of a layer's inputs times the summed one of its output gradients.

    A = Σ_i w_i Σ_t a_it a_itᵀ / Σ_i w_i t, B = Σ_i w_i Σ_t Σ_s u_it u_itᵀ over the columns s of `fisher` (Martens &
    Grosse 2015, arXiv 1503.05671; for positions the "expand" form of arXiv 2311.00636). The damped inverse
    (A ⊗ B + λI)⁻¹ is exact, by the eigenbases of both. docs/math.md (16).

    Args:
        damping: absolute λ >= 0, or "auto", the default: a tenth of the layer's mean eigenvalue (see `damping_used`);
            or `RelativeDamping`, another share of it; or `TrainingDamping`, which filters the eigenvalues instead.
            In the eigenbasis a λ > 0 suffices however small it is; `rounding` says what is left of it in the flattest
            direction.
        fisher: "exact": the GGN, by one backward pass per output; "monte_carlo": by one pass with labels drawn from the
            model's prediction; "empirical": the gradients of the data's own labels, another matrix; "auto":
            "monte_carlo" where an example has several labels, as texts have, and "exact" where it has one.
        separable: in pairwise scores of layers with one position per example, replace 1/(λ_od + damping) by a sum of
            products, as few as keep the relative error (in the Frobenius norm) of the scores of up to 64 queries with
            up to 64 training examples within this tolerance; where that would cost more than the exact form, the exact
            form is used. None: always exact, and so it is where ranks keep the factors for one another.
    """

    passes = 1
    has_owner = True
    keeps_query_factors = True

    def __init__(
        self,
        damping: Damping = "auto",
        fisher: Fisher = "exact",
        separable: float | None = None,
    ):
        check_damping(damping, RelativeDamping, TrainingDamping)
        check_fisher(type(self).__name__, fisher)
        if separable is not None and not 0 < separable < 1:
            raise ValueError(f"{type(self).__name__}: separable must be a tolerance in (0, 1) or None, got {separable}")
        self.damping: Damping = damping
        self.fisher: Fisher = fisher
        self.separable = separable
        self.name = "layer"
        self._moments: dict[str, Tensor | Unfinished] = {}
        self._positions = 0.0
        self.input_basis: Tensor | None = None  # [g, d, d], columns are eigenvectors
        self.output_basis: Tensor | None = None  # [g, o, o], None where the outputs are rows of a table
        self._eigenvalues: Tensor | None = None  # [g, o, d]
        self._inverse: Tensor | None = None
        self._products: tuple[Tensor, Tensor] | None = None  # of the inverse, for separable scores
        self.separable_rank: int | None = None  # of the last scores, None: exact

    def begin(self, name: str, shape: tuple[int, int, int]) -> None:
        """Forgets what was learned; the block has g matrices [o, d]."""
        self.name, self.shape = name, shape
        self._moments, self._positions, self._eigenvalues, self._inverse = {}, 0.0, None, None
        self._products = None

    def observe(self, gradients: Gradients, weights: Tensor, column: int, pass_index: int) -> None:
        """Takes in a batch: column `column` of its curvature (the activations only once), in pass `pass_index`."""
        del pass_index
        activations = gradients.activations
        for side in ("inputs", "outputs"):
            if column == 0 or side != activations:
                self._moments[side] = gradients.moment(side, weights, self._moments.get(side))
        if column == 0 or activations is None:
            counts = gradients.counts()  # padding is no position
            each = gradients.positions if counts is None else counts.to(weights)
            self._positions += float((weights.double() * each).sum())

    def end(self, pass_index: int) -> None:
        """Finds the eigenbases. Raises NotPositiveDefinite, naming the layer, if it cannot."""
        del pass_index
        self._decompose()
        _ = self.damping_used

    def sums(self, pass_index: int) -> dict[str, Tensor]:
        """The second moments and the positions that they are of."""
        del pass_index
        if not self._moments:
            return {}
        moments = {side: m if isinstance(m, Tensor) else m.matrix() for side, m in self._moments.items()}
        self._moments = {**moments}
        return {
            **moments,
            "positions": torch.tensor([self._positions], dtype=torch.float64).to(moments["inputs"].device),
        }

    def take_sums(self, pass_index: int, sums: dict[str, Tensor]) -> None:
        del pass_index
        self._positions = float(sums["positions"])
        self._moments = {side: moment for side, moment in sums.items() if side != "positions"}

    def let_go(self, pass_index: int) -> None:
        del pass_index
        self._moments = {}

    def ending(self, pass_index: int) -> float:
        """Of the eigenvectors of both moments."""
        del pass_index
        outputs = self._moments.get("outputs")
        if not isinstance(outputs, Tensor):
            return 0.0
        g, o, d = self.shape
        return _decomposing(g, o if outputs.dim() == 3 else 0, d)

    def made(self, pass_index: int) -> dict[str, Tensor]:
        del pass_index
        found = {"eigenvalues": self._eigenvalues, "input_basis": self.input_basis, "output_basis": self.output_basis}
        return {name: value for name, value in found.items() if value is not None}

    def take_made(self, pass_index: int, made: dict[str, Tensor]) -> None:
        del pass_index
        self._moments, self._eigenvalues = {}, made.get("eigenvalues")
        self.input_basis, self.output_basis = made["input_basis"], made.get("output_basis")

    def reports(self) -> dict[str, float]:
        return {"damping_used": self.damping_used, "rounding": self.rounding}

    def _decompose(self) -> None:
        input_values, self.input_basis = find_eigenvectors(self._moment("inputs"), f"the inputs of layer {self.name!r}")
        outputs = self._moment("outputs")
        if outputs.dim() == 3:
            output_values, self.output_basis = find_eigenvectors(outputs, f"the outputs of layer {self.name!r}")
        else:
            output_values, self.output_basis = outputs.double(), None
        output_values /= max(self._positions, 1e-300)
        values = output_values.clamp(min=0)[:, :, None] * input_values.clamp(min=0)[:, None, :]
        self._eigenvalues = values.to(self.input_basis)

    def _moment(self, side: str) -> Tensor:
        """The second moment of a side, which is not kept any longer."""
        moment = self._moments.pop(side)
        moment = moment if isinstance(moment, Tensor) else moment.matrix()
        if not bool(moment.isfinite().all()):
            raise NotPositiveDefinite(f"{self.name}: the second moment of its {side} holds NaN or Inf")
        return moment

    @property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues of the undamped curvature, in the eigenbases, [g, o, d]."""
        if self._eigenvalues is None:
            raise ValueError(f"{type(self).__name__}: not fitted; call Influence.fit first")
        return self._eigenvalues

    @property
    def damping_used(self) -> float:
        """λ: the number given, or what "auto" or a share found; of a `TrainingDamping` that of flat directions.

        Raises NotPositiveDefinite where it is 0 in a singular layer.
        """
        values = self.eigenvalues
        if not bool(values.isfinite().all()):
            raise NotPositiveDefinite(f"{type(self).__name__}: the eigenvalues of layer {self.name!r} overflow")
        if isinstance(self.damping, TrainingDamping):
            return self.damping.of_flat_directions
        damping = AUTO if self.damping == "auto" else self.damping
        if isinstance(damping, RelativeDamping):
            return damping.share * float(values.double().mean()) or 1e-12
        largest, lowest = float(values.max()), float(values.min())
        limits = torch.finfo(values.dtype)
        floor = limits.eps * largest if damping == 0 else limits.tiny  # so that no inverse overflows
        if not lowest + damping > floor:
            raise NotPositiveDefinite(
                f"{type(self).__name__}: layer {self.name!r} with damping {damping:g} is singular: its smallest "
                f"eigenvalue is {lowest:.3g}, its largest {largest:.3g}; damping "
                f"{10.0 ** math.ceil(math.log10(max(floor, 1e-12))):g} would do, or 'auto'"
            )
        return damping

    @property
    def rounding(self) -> float:
        """By how much rounding may change a solve in the flattest direction, relative: ε λ_max / (λ_min + damping).

        With a `TrainingDamping`, the filter of λ_min stands for 1 / (λ_min + damping).

        Above 1, what a solve says of that direction is noise: more damping drowns it.
        """
        values = self.eigenvalues
        flattest = invert(values.min().double(), self.damping, self.damping_used)
        return torch.finfo(values.dtype).eps * float(values.max()) * float(flattest)

    @property
    def inverse_eigenvalues(self) -> Tensor:
        """1 / (λ_od + damping), or what a `TrainingDamping` puts in its place, [g, o, d]."""
        if self._inverse is None:
            self._inverse = invert(self.eigenvalues, self.damping, self.damping_used)
        return self._inverse

    def eigenbasis(self) -> Eigenbasis:
        return Eigenbasis(self.eigenvalues, self.inverse_eigenvalues, self.output_basis, self.input_basis)

    def solve(self, rhs: Tensor) -> Tensor:
        """(G + λI)⁻¹ rhs for rhs [..., g, o, d]."""
        return self.unrotate(self._to_basis(rhs) * self.inverse_eigenvalues)

    def precondition(self, gradients: Gradients) -> Tensor:
        """(G + λI)⁻¹ g_i, [n, g, o, d]; factors are turned before they are multiplied where that is less work."""
        return self.unrotate(self.rotate(gradients).formed() * self.inverse_eigenvalues)

    def sq_norms(self, gradients: Gradients) -> Tensor:
        """g_iᵀ (G + λI)⁻¹ g_i, [n]."""
        return self.rotate(gradients).sq_norms(self.inverse_eigenvalues)

    def directions(self, gradients: Gradients) -> Directions:
        """The query side of pairwise scores."""
        if QueryFactors.size(gradients) is None:
            return Explicit(self.precondition(gradients))
        rotated = self.rotate(gradients)
        if self.separable is None or gradients.positions > 1:
            return QueryFactors(rotated, self)
        if self._products is None:
            self._products = products_of(self.inverse_eigenvalues[0], self.eigenvalues[0])
        return Separable(rotated, self, self._products, self.separable)

    def state_dict(self) -> dict[str, Tensor]:
        state = {"eigenvalues": self.eigenvalues, "input_basis": self.input_basis, "output_basis": self.output_basis}
        return {key: value for key, value in state.items() if value is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._eigenvalues, self.input_basis, self._inverse = state["eigenvalues"], state["input_basis"], None
        self._products = None
        self.output_basis = state.get("output_basis")

    def stand_in(self) -> None:
        """The moments in the place of their eigenvectors."""
        self.input_basis, outputs = self._moment("inputs"), self._moment("outputs")
        self.output_basis = outputs if outputs.dim() == 3 else None
        self._moments, self._eigenvalues = {}, self.input_basis.new_ones(self.shape)

    def cost(self, block: BlockWork, fit: FitWork) -> Cost:
        """Bases and eigenvalues are held; making them takes the largest basis in float64, and what LAPACK takes."""
        (g, o, d), item = block.shape, fit.item
        outputs = 0 if block.table else o  # rows of a table are a basis of their own
        largest = max(d, outputs) ** 2
        turned = d * d + outputs**2 + (o * d if self.passes > 1 else 0)  # operations of a position, in every pass
        return Cost(
            held=g * item * (d * d + (o if block.table else o * o) + o * d),
            learned=g * item * (d * d + (o if block.table else o * o)),
            observing=g * item * o * d if self.passes > 1 else 0,
            solving=g * item * o * d,
            beside=g * item * o * d,
            making=max(8 * (g + 2) * largest, 8 * g * o * d),
            operations=2 * self.passes * fit.n * fit.columns * g * block.positions * turned
            + _decomposing(g, outputs, d),
        )

    def exchanged(self, block: BlockWork, fit: FitWork) -> Exchanged:
        """Moments go to a layer's owner, and EK-FAC's eigenvalues, for which the owner lends the others its bases."""
        (g, o, d), item = block.shape, fit.item
        bases, outputs = g * item * (d * d + (0 if block.table else o * o)), 0 if block.table else o
        values, again = g * item * o * d, self.passes > 1
        return Exchanged(
            owned=g * item * (d * d + (o if block.table else o * o)) + 8 + (values if again else 0),
            lent=bases if again else 0,
            made=values + (0 if again else bases),
            ending=_decomposing(g, outputs, d),
        )

    def rotate(self, gradients: Gradients) -> Gradients:
        """Turns gradients into the eigenbases."""
        assert self.input_basis is not None
        return gradients.rotated(self.output_basis, self.input_basis)

    def unrotate(self, matrices: Tensor) -> Tensor:
        """Turns matrices [..., g, o, d] back out of the eigenbases."""
        assert self.input_basis is not None
        m = matrices @ self.input_basis.mT
        return m if self.output_basis is None else self.output_basis @ m

    def rotated(self, gradients: Gradients) -> Gradients:
        """The old name of `rotate`."""
        warn_renamed(f"{type(self).__name__}.rotated", f"{type(self).__name__}.rotate")
        return self.rotate(gradients)

    def unrotated(self, matrices: Tensor) -> Tensor:
        """The old name of `unrotate`."""
        warn_renamed(f"{type(self).__name__}.unrotated", f"{type(self).__name__}.unrotate")
        return self.unrotate(matrices)

    def _to_basis(self, m: Tensor) -> Tensor:
        assert self.input_basis is not None
        m = m.to(self.input_basis) @ self.input_basis
        return m if self.output_basis is None else self.output_basis.mT @ m


def _decomposing(g: int, o: int, d: int) -> float:
    """Operations of the eigenvectors of both moments, of the outputs' only where it is a matrix."""
    return 10.0 * g * (d**3 + o**3)
