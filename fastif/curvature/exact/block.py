"""The exact curvature of a layer, or of several: a matrix over all pairs of their parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastif import ops
from fastif.curvature.called import Called
from fastif.curvature.damping import check_damping
from fastif.curvature.directions import Directions, Explicit
from fastif.curvature.exact import triangles
from fastif.curvature.exact.building import Rows
from fastif.curvature.exact.cholesky import eigenvalue_range, extreme_eigenvalues
from fastif.curvature.exact.factor import Beside, Factor, Within
from fastif.curvature.exact.softmax import check_labels, check_layer, check_values, output_grads, output_roots
from fastif.curvature.kfac import KFAC
from fastif.measure import available_bytes
from fastif.model.gradients import Dense, Gradients
from fastif.model.layers import Block
from fastif.model.losses import Fisher

Matrix = Literal["ggn", "hessian", "empirical_fisher"]
_ENTRIES = 1 << 22  # of gradients, or of outputs' Hessians, that are formed at a time where they have to be
_ROWS = 256  # gradients at a time where they have to be formed


class ExactBlock(Called):
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
            `damping_used`). Softmax leaves d directions flat, so 0 never suffices for "ggn".
        matrix: which curvature.
        name: of the layer, for messages.
        joint: in `Influence`, one block over all the layers that it is chosen for, with what they have in common.
        in_place: whether the factor stands in the block's own square, or "auto": where no other fits into memory when
            it is made (see `in_place_used`). Scores of the two agree to 1e-5 up to a condition of 1e6, not to the bit.

    Raises MemoryError, with the bytes and the estimator that would do, before a block is allocated that does not fit.
    """

    def __init__(
        self,
        damping: float | Literal["auto"] = 1e-3,
        matrix: Matrix = "ggn",
        name: str = "head",
        joint: bool = False,
        in_place: bool | Literal["auto"] = "auto",
    ):
        check_damping(damping)
        if matrix not in ("ggn", "hessian", "empirical_fisher"):
            raise ValueError(f"ExactBlock: matrix must be 'ggn', 'hessian' or 'empirical_fisher', got {matrix!r}")
        if in_place not in (True, False, "auto"):
            raise ValueError(f"ExactBlock: in_place must be True, False or 'auto', got {in_place!r}")
        self.damping: float | Literal["auto"] = damping
        self.matrix, self.name, self.joint, self.in_place = matrix, name, joint, in_place
        self._shape = 0, 0, 0  # g, o, d of a layer that is given by its gradients
        self._forget()

    passes = 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A factor in place stands in the block again, of which a pickle holds two."""
        self.__dict__.update(state)
        if isinstance(self._factor, Within):
            self._factor = self._factor.moved(self._flat(self._fitted))

    def _forget(self) -> None:
        self._block: Tensor | None = None  # [c, d, c, d]; its lower triangle alone where a factor stands in it
        self._lent = False  # whether others may hold the block: then no factor may stand in it
        self._rows = Rows()
        self._pending: tuple[Tensor, Tensor] | None = None  # inputs [n, d] and outputs' Hessians [n, o, o] of a batch
        self._factor: Factor | None = None  # of the block as it is

    @property
    def fisher(self) -> Fisher:
        """The gradients of which a block that is not a head is built."""
        return "empirical" if self.matrix == "empirical_fisher" else "exact"

    def begin(self, name: str, shape: tuple[int, int, int]) -> None:
        """Forgets what was learned; the block has g matrices [o, d], which are taken as one [g·o, d]."""
        self.name, self._shape = name, shape
        self._forget()

    def observe(self, gradients: Gradients, weights: Tensor, column: int, turn: int) -> None:
        """Adds Σ_i weights[i] vec(g_i) vec(g_i)ᵀ: a column of the curvature of a layer that is not the head."""
        del turn
        if self.matrix == "hessian":
            raise ValueError(f"ExactBlock: the Hessian of {self.name!r} is not made of gradients: see observe_loss")
        g, o, d = self._shape
        self._outdate()
        if column == 0:
            self._flush()
        if isinstance(gradients, Dense) and g == gradients.positions == 1 and gradients.activations == "inputs":
            a, u = gradients.inputs[0, :, 0], gradients.output_grads[0, :, 0]
            if len(a) * o * o <= max(_ENTRIES, (o * d) ** 2 // 10):
                # All columns have the inputs in common: their outer products are added up before the inputs' come in.
                if self._pending is None:
                    self._pending = a, u.new_zeros((len(u), o, o))
                self._pending[1].baddbmm_((u * weights.to(u)[:, None])[:, :, None], u[:, None, :])
                return
        for begin in range(0, len(gradients), _ROWS):
            rows = gradients.rows(begin, begin + _ROWS).formed().flatten(1)
            self._block = self._block_for(rows, (g * o, d))
            self._rows.add(rows, weights[begin : begin + _ROWS], self._block)

    def observe_loss(self, total: Tensor, blocks: Sequence[Block]) -> None:
        """Adds the Hessian of `total`, a batch's part of the mean loss, over the parameters of `blocks`.

        The rows are derivatives of its gradient, entry by entry. docs/math.md (17).
        """
        self._outdate()
        parameters = list({parameter: None for block in blocks for parameter in block.parameters})
        size = sum(block.size for block in blocks)
        g, o, d = self._shape
        self._block = self._block_for(parameters[0], (g * o, d))
        flat = self._block.view(size, size)

        def joined(of_parameters: Sequence[Tensor | None]) -> Tensor:
            pairs = zip(parameters, of_parameters, strict=True)
            values = {p: torch.zeros_like(p) if value is None else value for p, value in pairs}
            return torch.cat([block.matrix(values).flatten() for block in blocks])

        gradient = joined(torch.autograd.grad(total, parameters, create_graph=True, allow_unused=True))
        if not gradient.requires_grad:
            return  # linear in the parameters
        for k in range(size):
            row = torch.autograd.grad(gradient[k], parameters, retain_graph=True, allow_unused=True)
            flat[k] += joined(row).to(flat)

    def end(self, turn: int) -> None:
        """Makes the factor; raises NotPositiveDefinite with a diagnosis."""
        del turn
        self._factored()

    def directions(self, gradients: Gradients) -> Directions:
        """The query side of pairwise scores."""
        return Explicit(self.solve(gradients.formed()))

    def state_dict(self) -> dict[str, Tensor]:
        return {"block": self.block}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._forget()
        self._block, self._lent = state["block"], True

    def stand_in(self) -> None:
        flat = self._flat(self._fitted.zero_())
        self._factor = self._place(len(flat), flat.element_size()).stand_in(flat, self.name)

    def footprint(self, shape: tuple[int, int, int], table: bool, item: int) -> tuple[int, int]:
        """Bytes held, of the block and of what of its factor stands beside it, and taken beside them in the making."""
        del table
        size = math.prod(shape)
        return self._place(size, item).footprint(size, item)

    @staticmethod
    def operations(size: int, n: int, columns: int, one_position: tuple[int, int, int] | None) -> float:
        """For `Influence.plan`: of building a block over `size` parameters from n examples, and of factoring it.

        `one_position`: the shape [g, o, d] of a layer with one position, whose outputs' Hessians are summed first.
        """
        each = columns * size * (size + 1)
        if one_position is not None and one_position[0] == 1:
            _, o, d = one_position
            each = o * (o + 1) / 2 * d * (d + 1)
        return n * each + size**3 / 3

    def fit(
        self, inputs: Tensor, logits: Tensor, labels: Tensor | None = None, weights: Tensor | None = None
    ) -> ExactBlock:
        """Builds the curvature anew; arguments as in `update`."""
        before = self._block, self._lent
        self._block, self._lent = None, False
        try:
            return self.update(inputs, logits, labels, weights)
        except Exception:
            self._block, self._lent = before
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
        return self._add("update", inputs, logits, labels, weights, sign=1)

    def downdate(
        self, inputs: Tensor, logits: Tensor, labels: Tensor | None = None, weights: Tensor | None = None
    ) -> ExactBlock:
        """Takes examples out again; arguments as in `update`, weights as they were added.

        Few examples leave the factor as it is: solves then go by the low-rank identity of docs/math.md (14). Where
        there are more, or where it would cancel too much, the factor is made anew when it is needed.
        """
        if self._block is None:
            raise ValueError("ExactBlock: downdate needs a fitted block; call fit or update first")
        return self._add("downdate", inputs, logits, labels, weights, sign=-1)

    def solve(self, rhs: Tensor) -> Tensor:
        """(G + λI)⁻¹ rhs for rhs [..., c, d] or [..., g, o, d], in the dtype of rhs.

        Raises NotPositiveDefinite with a diagnosis, and IllConditioned where a factor in place does not do.
        """
        solved = self._factored().solve(self._columns("solve", rhs))
        return solved.T.reshape(rhs.shape).to(rhs.dtype)

    def sq_norms(self, gradients: Gradients) -> Tensor:
        """g_iᵀ (G + λI)⁻¹ g_i, [n]: half the work of `solve` where the factor stands beside the block."""
        factor, parts = self._factored(), []
        each = max(1, _ENTRIES // self._fitted.shape[:2].numel())
        for begin in range(0, len(gradients), each):
            columns = self._columns("sq_norms", gradients.rows(begin, begin + each).formed())
            parts.append(factor.sq_norms(columns).to(self._fitted.dtype))
        return torch.cat(parts)

    def inverse(self) -> Tensor:
        """(G + λI)⁻¹ as a matrix [c·d, c·d], float64."""
        return self._uncorrected().inverse()

    def logdet(self) -> float:
        """log det(G + λI)."""
        return self._factored().logdet()

    def condition(self) -> float:
        """An estimate, from below, of the largest over the smallest eigenvalue of G + λI, by Lanczos' method."""
        factor, flat = self._factored(), self._flat(self._fitted)
        largest = eigenvalue_range(flat)[1] + factor.damping
        return largest * extreme_eigenvalues(lambda v: factor.solve(v[:, None])[:, 0], len(flat), flat.device)[1]

    @property
    def block(self) -> Tensor:
        """G without damping, [c, d, c, d]; a copy where a factor stands in its square."""
        block = self._fitted
        if self._factor is not None and self._factor.in_place:
            block = block.clone()
            triangles.restore(self._flat(block))
        else:
            self._lent = True
        return block

    @property
    def factor(self) -> Tensor:
        """Lower Cholesky factor of G + λI, [c·d, c·d] float64; a copy of what stands in the block's own square."""
        return self._uncorrected().lower()

    @property
    def damping_used(self) -> float:
        """λ of the factor: the number given, or what "auto" found."""
        return self._factored().damping

    @property
    def in_place_used(self) -> bool:
        """Whether the factor stands in the block's own square: as given, or what "auto" came to."""
        return self._factored().in_place

    @property
    def _fitted(self) -> Tensor:
        """The block, which need not be whole: see `_forget`."""
        self._flush()
        self._rows.end(self._block)
        if self._block is None:
            raise ValueError("ExactBlock: not fitted; call fit first")
        return self._block

    @staticmethod
    def _flat(block: Tensor) -> Tensor:
        return block.view(math.isqrt(block.numel()), -1)

    def _factored(self) -> Factor:
        """The factor of G + λI."""
        if self._factor is None:
            block = self._fitted
            place = self._place(math.isqrt(block.numel()), block.element_size())
            if place.in_place and self._lent:
                self._block, self._lent = block.clone(memory_format=torch.contiguous_format), False
            self._factor = place.of(self._flat(self._fitted), self.damping, self.name)
        return self._factor

    def _uncorrected(self) -> Factor:
        if self._factored().corrected:
            self._outdate()
        return self._factored()

    def _outdate(self) -> None:
        """Before the block changes: it is made whole, and what factor it had is one of it no longer."""
        if self._factor is not None:
            self._factor.release()
        self._factor = None

    def _place(self, size: int, item: int) -> type[Beside] | type[Within]:
        """Where the factor of a block of `size` parameters stands, or will."""
        if self.in_place != "auto":
            return Within if self.in_place else Beside
        held = self._block if self._pending is None else self._pending[0]
        room = available_bytes(torch.device("cpu") if held is None else held.device)
        need = Beside.footprint(size, item)[0] - (0 if self._block is None else self._block.nbytes)
        return Beside if room is None or need <= room else Within

    def _columns(self, op: str, rhs: Tensor) -> Tensor:
        c, d = self._fitted.shape[:2]
        if rhs.dim() >= 3 and rhs.shape[-3:] == self._shape:
            rhs = rhs.flatten(-3, -2)
        if rhs.shape[-2:] != (c, d):
            raise ValueError(f"ExactBlock.{op}: rhs must be [..., c={c}, d={d}], got {list(rhs.shape)}")
        return rhs.reshape(-1, c * d).T.to(self._fitted.device, torch.float64)

    def _add(
        self, name: str, inputs: Tensor, logits: Tensor, labels: Tensor | None, weights: Tensor | None, sign: int
    ) -> ExactBlock:
        op = f"ExactBlock.{name}"
        check_layer(op, inputs, logits)
        d, c = inputs.shape[1], logits.shape[1]
        if labels is not None:
            check_labels(op, labels, len(inputs), c)
        elif self.matrix == "empirical_fisher":
            raise ValueError(f"{op}: matrix='empirical_fisher' needs labels")
        if self._block is not None and self._block.shape != (c, d, c, d):
            held = list(self._block.shape[:2])
            raise ValueError(f"{op}: a batch must agree with the block's [c, d] = {held}, got [{c}, {d}]")
        weights = check_values(op, inputs, logits, weights)
        probs = logits.to(inputs.dtype).softmax(1)
        # Nothing is changed before a batch has passed every check: a refused one leaves the block as it was.
        block = self._block_for(inputs, (c, d))
        if sign > 0 or (self._factor is not None and self._factor.in_place):
            self._outdate()
        if sign > 0 and self.matrix != "empirical_fisher":
            self._block = ops.ggn_block(inputs, probs, weights, out=block)
            return self
        empirical = labels if self.matrix == "empirical_fisher" else None
        roots = output_roots(probs) if empirical is None else output_grads(probs, empirical)[:, :, None]
        roots = roots * weights.sqrt()[:, None, None]  # [n, c, s]
        each = max(1, _ENTRIES // (c * c))
        for part, x in zip(roots.split(each), inputs.split(each), strict=True):
            ops.kronecker_block(x, sign * part @ part.mT, out=block)
        self._block = block
        if self._factor is not None and (self.damping == "auto" or not self._factor.take(inputs, roots)):
            self._factor = None
        return self

    def _flush(self) -> None:
        """Adds what is pending to the block."""
        if self._pending is not None:
            inputs, outer = self._pending
            self._block = self._block_for(inputs, (outer.shape[1], inputs.shape[1]))
            ops.kronecker_block(inputs, outer, out=self._block)
            self._pending = None

    def _block_for(self, like: Tensor, shape: tuple[int, int]) -> Tensor:
        """The block, or zeros of shape [c, d, c, d] where there is none yet and memory suffices."""
        if self._block is not None:
            return self._block
        self._check_room(shape, like)
        return torch.zeros((*shape, *shape), dtype=like.dtype, device=like.device)

    def _check_room(self, shape: tuple[int, int], like: Tensor) -> None:
        item, room = like.element_size(), available_bytes(like.device)
        whole = self._shape if math.prod(self._shape) == math.prod(shape) else (1, *shape)
        size, gib = math.prod(whole), 2**30
        place = Within if self.in_place else Beside  # "auto" asks for no more than it can do with
        need = sum(place.footprint(size, item))
        if room is None or need <= room:
            return
        others = {
            "in_place=True": sum(Within.footprint(size, item)),
            "KFAC or EKFAC": sum(KFAC.footprint(whole, False, item)),
            "Diagonal": 2 * size * item,
        }
        fits = [f"; {name} takes {taken / gib:.3g} GiB" for name, taken in others.items() if taken <= room]
        take, each = ("with its factor in place takes", item) if self.in_place else ("and factor take", item + 8)
        raise MemoryError(
            f"ExactBlock: {self.name!r} has {size:,} parameters, so that its block {take} "
            f"{need / gib:.3g} GiB ({size:,} squared times {each} bytes), of which {room / gib:.3g} GiB can be had"
            + "".join(fits[:1])
        )
