"""The exact curvature of a layer, or of several: a matrix over all pairs of their parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastif.curvature import limits
from fastif.curvature.damping import Damping, RelativeDamping, TrainingDamping, check_damping
from fastif.curvature.exact import triangles
from fastif.curvature.exact.building import BlockSum, Matrix
from fastif.curvature.exact.factor import Factor
from fastif.curvature.exact.room import Form, InPlace, Place
from fastif.curvature.exact.solving import BlockSolver, columns_of, estimate_condition, place_of, sq_norms
from fastif.curvature.protocol import BlockWork, Cost, Curvature, Exchanged, FitWork, SeenBatch, check_fisher
from fastif.model.gradients import Gradients
from fastif.model.layers import Block
from fastif.model.losses import Fisher


class ExactBlock(Curvature):
    """Curvature of a layer that is exact over all pairs of its parameters; Cholesky solves.

    For a linear layer whose outputs are the logits, G = Σ_i w_i H_i ⊗ a_i a_iᵀ of shape [c·d, c·d], with layer inputs
    a_i (and a trailing 1 where there is a bias) and H_i = diag(p_i) − p_i p_iᵀ for `matrix="ggn"`. Logits are linear in
    the layer's parameters, so `"hessian"` is the same matrix there. `"empirical_fisher"` is another one:
    H_i = (p_i − y_i)(p_i − y_i)ᵀ, y_i the one-hot label. `Influence` builds the same three matrices for any layers and
    losses: from gradients, and `"hessian"` by differentiating twice, which costs a backward pass per parameter and
    batch and may give a matrix that is not positive definite: damping has to exceed its most negative eigenvalue.
    docs/math.md (6), (14), (17).

    Batches stream in through `update`, examples are taken out through `downdate`; the factor is made on demand. It
    stands beside the block, float64 whatever the block is: 12 bytes an entry where that is float32. Where memory is
    short it stands in the block's own square, above the diagonal and in the block's dtype: 4 bytes an entry. Solves are
    then refined until their relative residual is at most 1e-6; where it is not, IllConditioned is raised.

    Args:
        damping: absolute λ >= 0 added to the diagonal of the mean-loss curvature, or "auto": the smallest power of
            ten with which the block is positive definite and, factored in place, well enough conditioned (see
            `damping_used`). Softmax leaves d directions flat, so 0 never suffices for "ggn". Or `RelativeDamping`, a
            share of the mean eigenvalue; or `TrainingDamping`, which filters the eigenvalues: their eigenvectors, in
            float64 beside the block, are then what the factor is elsewhere, and making them takes 16 bytes an entry.
        matrix: which curvature.
        name: of the layer, for messages.
        joint: in `Influence`, one block over all the layers that it is chosen for, with what they have in common.
        in_place: whether the factor stands in the block's own square, or "auto": where no other fits into memory when
            it is made (see `in_place_used`). Scores of the two agree to 1e-5 up to a condition of 1e6, not to the bit.
        fisher: "empirical" is another way to ask for `matrix="empirical_fisher"`, and "exact", the default, for what
            other estimators call so: "ggn" or "hessian". "monte_carlo" is an estimate of "ggn" by one backward pass:
            Σ_i w_i vec(g_i) vec(g_i)ᵀ, g_i the gradient at labels drawn from the model's prediction; G is its
            expectation. "auto": "monte_carlo" where an example has several labels, as texts have, else "exact".

    Raises MemoryError, with the bytes and the estimator that would do, before a block is allocated that does not fit.
    """

    def __init__(
        self,
        damping: Damping = 1e-3,
        matrix: Matrix = "ggn",
        name: str = "head",
        joint: bool = False,
        in_place: InPlace = "auto",
        fisher: Fisher | None = None,
    ):
        check_damping(damping, RelativeDamping, TrainingDamping)
        if matrix not in ("ggn", "hessian", "empirical_fisher"):
            raise ValueError(f"ExactBlock: matrix must be 'ggn', 'hessian' or 'empirical_fisher', got {matrix!r}")
        if in_place not in (True, False, "auto"):
            raise ValueError(f"ExactBlock: in_place must be True, False or 'auto', got {in_place!r}")
        if in_place is True and isinstance(damping, TrainingDamping):
            raise ValueError(
                "ExactBlock: in_place=True is of a Cholesky factor, and a TrainingDamping needs eigenvectors beside "
                "the block"
            )
        if fisher is not None:
            check_fisher("ExactBlock", fisher)
        if fisher == "empirical" and matrix == "ggn":
            matrix = "empirical_fisher"
        if fisher is not None and (fisher == "empirical") != (matrix == "empirical_fisher"):
            raise ValueError(f"ExactBlock: fisher={fisher!r} and matrix={matrix!r} are two matrices; give one of them")
        sampled = fisher in ("auto", "monte_carlo")
        if sampled and matrix != "ggn":
            raise ValueError(f"ExactBlock: fisher={fisher!r} goes with matrix='ggn', got {matrix!r}")
        self.damping: Damping = damping
        self.matrix: Matrix = matrix
        self.in_place: InPlace = in_place
        self.name, self.joint = name, joint
        self.fisher: Fisher = "empirical" if matrix == "empirical_fisher" else "exact" if fisher is None else fisher
        self.synonyms = () if sampled else ("fisher",)
        self.learned_by = ("matrix", "fisher") if sampled else ("matrix",)  # as older states have it
        self._shape = 0, 0, 0  # g, o, d of a layer that is given by its gradients
        self._forget()

    passes = 1
    has_owner = True
    prefers_head = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A factor in place stands in the block again, of which a pickle holds two."""
        vars(self).update(state)
        self._solver.move_to(self._sum)

    def _forget(self) -> None:
        self._sum, self._solver = self._empty_sum(), BlockSolver()

    def _empty_sum(self) -> BlockSum:
        return BlockSum(self.matrix, self.name, self._shape, self._form)

    @property
    def _form(self) -> Form:
        return "eigenvectors" if isinstance(self.damping, TrainingDamping) else self.in_place

    @property
    def needs_whole(self) -> bool:
        return self.matrix == "hessian"

    def begin(self, name: str, shape: tuple[int, int, int]) -> None:
        """Forgets what was learned; the block has g matrices [o, d], which are taken as one [g·o, d]."""
        self.name, self._shape = name, shape
        self._forget()

    def observe_batch(self, seen: SeenBatch, names: Sequence[str]) -> bool:
        """The closed form of a layer whose outputs are the logits of a softmax; and a Hessian, by differentiation."""
        if self.fisher not in ("exact", "auto"):
            return False
        head = seen.forward.head(names[0]) if seen.softmax else None
        if head is not None:
            assert seen.counted is not None
            self.update(*head, weights=seen.weights * seen.counted)
        elif self.matrix == "hessian":
            self.observe_loss((seen.losses * seen.weights.to(seen.losses)).sum(), [seen.blocks[name] for name in names])
        return head is not None or self.matrix == "hessian"

    def observe(self, gradients: Gradients, weights: Tensor, column: int, pass_index: int) -> None:
        """Adds Σ_i weights[i] vec(g_i) vec(g_i)ᵀ: a column of the curvature of a layer that is not the head."""
        del pass_index
        if self.matrix == "hessian":
            raise ValueError(f"ExactBlock: the Hessian of {self.name!r} is not made of gradients: see observe_loss")
        self._solver.release()
        self._sum.add_gradients(gradients, weights, column)

    def observe_loss(self, total: Tensor, blocks: Sequence[Block]) -> None:
        """Adds the Hessian of `total`, a batch's part of the mean loss, over the parameters of `blocks`.

        The rows are derivatives of its gradient, entry by entry. docs/math.md (17).
        """
        self._solver.release()
        self._sum.add_hessian(total, blocks)

    def sums(self, pass_index: int) -> dict[str, Tensor]:
        """The block; nothing where no example was shown."""
        del pass_index
        return {"block": self._sum.finish()} if self._sum.begun else {}

    def take_sums(self, pass_index: int, sums: dict[str, Tensor]) -> None:
        del pass_index
        self._sum.block = sums["block"]

    def let_go(self, pass_index: int) -> None:
        del pass_index
        self._forget()

    def ending(self, pass_index: int) -> float:
        """Of the factor."""
        del pass_index
        return self._factoring(math.prod(self._shape)) if self._sum.begun else 0.0

    def _factoring(self, size: int) -> float:
        return 10.0 * size**3 if self._form == "eigenvectors" else size**3 / 3

    def end(self, pass_index: int) -> None:
        """Makes the factor; raises NotPositiveDefinite with a diagnosis."""
        del pass_index
        self._factored()

    def state_dict(self) -> dict[str, Tensor]:
        return {"block": self.block}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._forget()
        self._sum.block, self._sum.lent = state["block"], True

    def stand_in(self) -> None:
        self._sum.finish().zero_()
        flat = self._sum.finish_flat()
        self._solver.factor = self._place(len(flat), flat.element_size(), flat.device).stand_in(flat, self.name)

    def choices(self) -> dict[str, Any]:
        """A factor in the block's own square is as near, but not the same to the bit."""
        return {"factor in place": True} if self.in_place_used else {}

    def reports(self) -> dict[str, Any]:
        """Once there is a factor."""
        if self._solver.factor is None:
            return {}
        return {"damping_used": self.damping_used, "in_place_used": self.in_place_used}

    def cost(self, block: BlockWork, fit: FitWork) -> Cost:
        """The block is held, and of its factor what stands beside it."""
        size, (g, o, d) = block.size, block.shape
        held, making = self._place(size, fit.item, fit.device).footprint(size, fit.item)
        factoring = self._factoring(size)
        column = 24 if self._form == "eigenvectors" else 16  # float64 columns, twice, and once more in the eigenvectors
        learned, beside = size**2 * fit.item, column * max(size, min(limits.EXACT_ENTRIES, fit.n * size))
        if self.matrix == "hessian" and not fit.head:
            return Cost(held, making, factoring, hessian_rows=size, learned=learned, beside=beside)
        each = fit.columns * size * (size + 1)
        if g == block.positions == 1:  # the outputs' Hessians are summed before the inputs come in
            each = o * (o + 1) / 2 * d * (d + 1)
            return Cost(held, making, fit.n * each + factoring, learned=learned, beside=beside)
        observing = limits.GATHERED_ROWS * size * fit.item
        return Cost(held, making, fit.n * each + factoring, learned=learned, observing=observing, beside=beside)

    def exchanged(self, block: BlockWork, fit: FitWork) -> Exchanged:
        """The block goes to its owner, which makes the factor."""
        size = block.size**2 * fit.item
        return Exchanged(owned=size, made=size, ending=self._factoring(block.size))

    def fit(
        self, inputs: Tensor, logits: Tensor, labels: Tensor | None = None, weights: Tensor | None = None
    ) -> ExactBlock:
        """Builds the curvature anew; arguments as in `update`."""
        before, self._sum = self._sum, self._empty_sum()
        try:
            return self.update(inputs, logits, labels, weights)
        except Exception:
            self._sum = before
            raise

    def update(
        self, inputs: Tensor, logits: Tensor, labels: Tensor | None = None, weights: Tensor | None = None
    ) -> ExactBlock:
        """Adds a batch.

        Args:
            inputs: [n, d] float32 or float64, the layer's inputs.
            logits: [n, c], its outputs.
            labels: [n] int64, needed for "empirical_fisher".
            weights: [n] >= 0; default 1/n each. Over all batches they should sum to 1 for the curvature of a mean loss.
        """
        batch = self._sum.check_batch("ExactBlock.update", inputs, logits, labels, weights)
        self._solver.release()
        self._sum.add_batch(batch)
        return self

    def downdate(
        self, inputs: Tensor, logits: Tensor, labels: Tensor | None = None, weights: Tensor | None = None
    ) -> ExactBlock:
        """Takes examples out again; arguments as in `update`, weights as they were added.

        Few examples leave the factor as it is: solves then go by the low-rank identity of docs/math.md (14). Where
        there are more, or where it would cancel too much, the factor is made anew when it is needed.
        """
        if self._sum.block is None:
            raise ValueError("ExactBlock: downdate needs a fitted block; call fit or update first")
        batch = self._sum.check_batch("ExactBlock.downdate", inputs, logits, labels, weights)
        if self._solver.factor is not None and self._solver.factor.in_place:
            self._solver.release()
        roots = batch.roots
        self._sum.add_roots(batch, roots, sign=-1)
        self._solver.take_out(batch, roots, self.damping)
        return self

    def solve(self, rhs: Tensor) -> Tensor:
        """(G + λI)⁻¹ rhs for rhs [..., c, d] or [..., g, o, d], in the dtype of rhs.

        Raises NotPositiveDefinite with a diagnosis, and IllConditioned where a factor in place does not do.
        """
        solved = self._factored().solve(columns_of("solve", rhs, self._sum.finish(), self._shape))
        return solved.T.reshape(rhs.shape).to(rhs.dtype)

    def sq_norms(self, gradients: Gradients) -> Tensor:
        """g_iᵀ (G + λI)⁻¹ g_i, [n]: half the work of `solve` where the factor stands beside the block."""
        return sq_norms(self._factored(), gradients, self._sum.finish(), self._shape)

    def inverse(self) -> Tensor:
        """(G + λI)⁻¹, or what a `TrainingDamping` puts in its place, as a matrix [c·d, c·d], float64."""
        return self._uncorrected().inverse()

    def logdet(self) -> float:
        """log det(G + λI); of a `TrainingDamping` that of its filter's inverse, which with time goes to it."""
        return self._factored().logdet()

    def condition(self) -> float:
        """An estimate, from below, of the largest over the smallest eigenvalue of G + λI, by Lanczos' method.

        Of a `TrainingDamping` it is that of its filter, and exact.
        """
        return estimate_condition(self._factored(), self._sum.finish_flat())

    @property
    def block(self) -> Tensor:
        """G without damping, [c, d, c, d]; a copy where a factor stands in its square."""
        block = self._sum.finish()
        if self._solver.factor is not None and self._solver.factor.in_place:
            block = block.clone()
            triangles.restore(block.view(self._sum.finish_flat().shape))
        else:
            self._sum.lent = True
        return block

    @property
    def factor(self) -> Tensor:
        """Lower Cholesky factor of G + λI, [c·d, c·d] float64; a copy of what stands in the block's own square.

        Raises ValueError for a `TrainingDamping`, which has none.
        """
        return self._uncorrected().lower()

    @property
    def damping_used(self) -> float:
        """λ of the factor: the number given, or what "auto" or a share found; of a `TrainingDamping` 1/f(0)."""
        return self._factored().damping

    @property
    def in_place_used(self) -> bool:
        """Whether the factor stands in the block's own square: as given, or what "auto" came to."""
        return self._factored().in_place

    def _factored(self) -> Factor:
        """The factor of G + λI."""
        return self._solver.make_factor(self._sum, self.damping, self._form, self.name)

    def _uncorrected(self) -> Factor:
        if self._factored().corrected:
            self._solver.release()
        return self._factored()

    def _place(self, size: int, item: int, device: torch.device) -> Place:
        """Where the factor of a block of `size` parameters stands, or will."""
        return place_of(self._sum, self._form, size, item, device)
