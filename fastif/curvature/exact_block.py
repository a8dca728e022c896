"""The exact curvature of a layer, or of several: a matrix over all pairs of their parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastif import ops
from fastif.curvature.called import Called
from fastif.curvature.cholesky import check_damping, extreme_eigenvalues, factorize
from fastif.curvature.directions import Directions, Explicit
from fastif.curvature.kfac import KFAC
from fastif.gradients import Dense, Gradients
from fastif.layers import Block
from fastif.losses import Fisher
from fastif.measure import available_bytes

Matrix = Literal["ggn", "hessian", "empirical_fisher"]
_ENTRIES = 1 << 22  # of gradients, or of outputs' Hessians, that are formed at a time where they have to be
_ROWS = 1024  # gradients per product where they have to be formed
_LOW_RANK = 1 / 8  # a downdate of fewer columns than this share of the block is kept beside the factor
_SMALLEST_PIVOT = 1e-8  # of such a downdate: what its subtraction may cancel


class ExactBlock(Called):
    """Curvature of a layer that is exact over all pairs of its parameters; Cholesky solves.

    For a linear layer whose outputs are the logits, G = Σ_i w_i H_i ⊗ a_i a_iᵀ of shape [c·d, c·d], with layer inputs
    a_i (and a trailing 1 where there is a bias) and H_i = diag(p_i) − p_i p_iᵀ for `matrix="ggn"`. Logits are linear in
    the layer's parameters, so `"hessian"` is the same matrix there. `"empirical_fisher"` is another one:
    H_i = (p_i − y_i)(p_i − y_i)ᵀ, y_i the one-hot label. `Influence` builds the same three matrices for any layers and
    losses: from gradients, and `"hessian"` by differentiating twice, which costs a backward pass per parameter and
    batch and may give a matrix that is not positive definite: damping has to exceed its most negative eigenvalue.
    docs/math.md (6), (14), (17).

    Batches stream in through `update`, examples are taken out through `downdate`; the factor is made on demand. It is
    float64 whatever the block is, twice the bytes of a float32 block: relative residuals of solves stay below 1e-6 far
    beyond a condition of 1e6 without refinement.

    Args:
        damping: absolute λ >= 0 added to the diagonal of the mean-loss curvature, or "auto": the smallest power of
            ten with which the block is positive definite (see `damping_used`). Softmax leaves d directions flat, so
            0 never suffices for "ggn".
        matrix: which curvature.
        name: of the layer, for messages.
        joint: in `Influence`, one block over all the layers that it is chosen for, with what they have in common.

    Raises MemoryError, with the bytes and the estimator that would do, before a block is allocated that does not fit.
    """

    def __init__(
        self,
        damping: float | Literal["auto"] = 1e-3,
        matrix: Matrix = "ggn",
        name: str = "head",
        joint: bool = False,
    ):
        check_damping(damping)
        if matrix not in ("ggn", "hessian", "empirical_fisher"):
            raise ValueError(f"ExactBlock: matrix must be 'ggn', 'hessian' or 'empirical_fisher', got {matrix!r}")
        self.damping: float | Literal["auto"] = damping
        self.matrix, self.name, self.joint = matrix, name, joint
        self._shape = 0, 0, 0  # g, o, d of a layer that is given by its gradients
        self._forget()

    passes = 1

    def _forget(self) -> None:
        self._block: Tensor | None = None  # [c, d, c, d]
        self._pending: tuple[Tensor, Tensor] | None = None  # inputs [n, d] and outputs' Hessians [n, o, o] of a batch
        self._factored(None)

    def _factored(self, factor: Tensor | None) -> None:
        self._factor = factor  # [c·d, c·d] float64, of the block as it was
        self._taken: tuple[Tensor, Tensor] | None = None  # what was taken out since: see _take

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
        self._factored(None)
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
            _add_rows(self._block.view(rows.shape[1], rows.shape[1]), rows, weights[begin : begin + _ROWS].to(rows))

    def observe_loss(self, total: Tensor, blocks: Sequence[Block]) -> None:
        """Adds the Hessian of `total`, a batch's part of the mean loss, over the parameters of `blocks`.

        The rows are derivatives of its gradient, entry by entry. docs/math.md (17).
        """
        self._factored(None)
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
        self._lower()

    def directions(self, gradients: Gradients) -> Directions:
        """The query side of pairwise scores."""
        return Explicit(self.solve(gradients.formed()))

    def state_dict(self) -> dict[str, Tensor]:
        return {"block": self.block}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._forget()
        self._block = state["block"]

    def stand_in(self) -> None:
        size = self.block.shape[0] * self.block.shape[1]
        self._factored(torch.eye(size, dtype=torch.float64, device=self.block.device))
        self._damping_used = 1.0

    @staticmethod
    def footprint(shape: tuple[int, int, int], table: bool, item: int) -> tuple[int, int]:
        """Bytes held: the block and its float64 factor; and taken beside them: nothing, it is factored in place."""
        del table
        return math.prod(shape) ** 2 * (item + 8), 0

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
        before, self._block = self._block, None
        try:
            return self.update(inputs, logits, labels, weights)
        except Exception:
            self._block = before
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

        Raises NotPositiveDefinite with a diagnosis.
        """
        columns, lower = self._columns("solve", rhs), self._lower()
        half = torch.linalg.solve_triangular(lower, columns, upper=False)  # cholesky_solve would copy the factor
        if self._taken is not None:
            w, k = self._taken
            half += w @ torch.cholesky_solve(w.T @ half, k)
        solved = torch.linalg.solve_triangular(lower.mT, half, upper=True)
        return solved.T.reshape(rhs.shape).to(rhs.dtype)

    def sq_norms(self, gradients: Gradients) -> Tensor:
        """g_iᵀ (G + λI)⁻¹ g_i, [n]: half the work of `solve`."""
        parts = []
        each = max(1, _ENTRIES // len(self._lower()))
        for begin in range(0, len(gradients), each):
            columns = self._columns("sq_norms", gradients.rows(begin, begin + each).formed())
            half = torch.linalg.solve_triangular(self._lower(), columns, upper=False)
            norms = half.square().sum(0)
            if self._taken is not None:
                w, k = self._taken
                norms += torch.linalg.solve_triangular(k, w.T @ half, upper=False).square().sum(0)
            parts.append(norms.to(self.block.dtype))
        return torch.cat(parts)

    def inverse(self) -> Tensor:
        """(G + λI)⁻¹ as a matrix [c·d, c·d], float64."""
        return torch.cholesky_inverse(self.factor)

    def logdet(self) -> float:
        """log det(G + λI)."""
        total = self._lower().diagonal().log().sum()
        if self._taken is not None:
            total += self._taken[1].diagonal().log().sum()
        return 2 * total.item()

    def condition(self) -> float:
        """An estimate, from below, of the largest over the smallest eigenvalue of G + λI, by Lanczos' method."""
        size, place = len(self._lower()), self.block.device
        flat, shape = self.block.view(size, size), self.block.shape[:2]
        largest = extreme_eigenvalues(lambda v: (flat @ v.to(flat)).double(), size, place)[1] + self.damping_used
        return largest * extreme_eigenvalues(lambda v: self.solve(v.view(shape)).flatten(), size, place)[1]

    @property
    def block(self) -> Tensor:
        """G without damping, [c, d, c, d]."""
        self._flush()
        if self._block is None:
            raise ValueError("ExactBlock: not fitted; call fit first")
        return self._block

    @property
    def factor(self) -> Tensor:
        """Lower Cholesky factor of G + λI, [c·d, c·d] float64."""
        if self._taken is not None:
            self._factored(None)
        return self._lower()

    @property
    def damping_used(self) -> float:
        """λ of the factor: the number given, or what "auto" found."""
        self._lower()
        return self._damping_used

    def _lower(self) -> Tensor:
        """The factor of G + λI, or of what it was before what `_taken` knows of was taken out."""
        if self._factor is None:
            c, d = self.block.shape[:2]
            self._factor, self._damping_used = factorize(self.block.view(c * d, c * d), self.damping, self.name)
        return self._factor

    def _columns(self, op: str, rhs: Tensor) -> Tensor:
        c, d = self.block.shape[:2]
        if rhs.dim() >= 3 and rhs.shape[-3:] == self._shape:
            rhs = rhs.flatten(-3, -2)
        if rhs.shape[-2:] != (c, d):
            raise ValueError(f"ExactBlock.{op}: rhs must be [..., c={c}, d={d}], got {list(rhs.shape)}")
        return rhs.reshape(-1, c * d).T.to(self.block.device, torch.float64)

    def _add(
        self, name: str, inputs: Tensor, logits: Tensor, labels: Tensor | None, weights: Tensor | None, sign: int
    ) -> ExactBlock:
        op = f"ExactBlock.{name}"
        check_layer(op, inputs, logits)
        (n, d), c = inputs.shape, logits.shape[1]
        if labels is not None:
            check_labels(op, labels, n, c)
        elif self.matrix == "empirical_fisher":
            raise ValueError(f"{op}: matrix='empirical_fisher' needs labels")
        if self._block is not None and self._block.shape != (c, d, c, d):
            held = list(self._block.shape[:2])
            raise ValueError(f"{op}: a batch must agree with the block's [c, d] = {held}, got [{c}, {d}]")
        weights = inputs.new_full((n,), 1 / n) if weights is None else weights.to(inputs)
        if weights.shape != (n,) or not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ValueError(f"{op}: weights must be [n={n}], finite and >= 0, got shape {list(weights.shape)}")
        finite = inputs.isfinite().all(1) & logits.isfinite().all(1)
        if not bool(finite.all()):
            raise ValueError(f"{op}: inputs and logits must be finite, row {int((~finite).nonzero()[0])} is not")
        probs = logits.to(inputs.dtype).softmax(1)
        # Nothing is changed before a batch has passed every check: a refused one leaves the block as it was.
        block = self._block_for(inputs, (c, d))
        if sign > 0 and self.matrix != "empirical_fisher":
            self._block = ops.ggn_block(inputs, probs, weights, out=block)
            self._factored(None)
            return self
        if self.matrix == "empirical_fisher":
            assert labels is not None
            roots = output_grads(probs, labels)[:, :, None]
        else:
            roots = output_roots(probs)
        roots = roots * weights.sqrt()[:, None, None]  # [n, c, s]
        each = max(1, _ENTRIES // (c * c))
        for part, x in zip(roots.split(each), inputs.split(each), strict=True):
            ops.kronecker_block(x, sign * part @ part.mT, out=block)
        self._block = block
        if sign > 0:
            self._factored(None)
        else:
            self._take(inputs, roots)
        return self

    def _take(self, inputs: Tensor, roots: Tensor) -> None:
        """Takes V Vᵀ out of what the factor stands for, the columns of V being roots[i, :, s] ⊗ inputs[i].

        With L Lᵀ = A and W = L⁻¹V, (A − V Vᵀ)⁻¹ = L⁻ᵀ (I + W (I − WᵀW)⁻¹ Wᵀ) L⁻¹: W and the Cholesky factor of I − WᵀW
        are kept beside L. docs/math.md (14).
        """
        lower, taken, self._taken = self._factor, self._taken, None
        count = roots.shape[0] * roots.shape[2] + (0 if taken is None else taken[0].shape[1])
        if lower is None or self.damping == "auto" or count > _LOW_RANK * len(lower):
            self._factor = None
            return
        v = torch.einsum("ncs,nd->cdns", roots.to(lower), inputs.to(lower)).reshape(len(lower), -1)
        w = torch.linalg.solve_triangular(lower, v, upper=False)
        w = w if taken is None else torch.cat([taken[0], w], 1)
        k, info = torch.linalg.cholesky_ex(torch.eye(count, dtype=w.dtype, device=w.device) - w.T @ w)
        if info.item() or k.diagonal().min().item() ** 2 < _SMALLEST_PIVOT:
            self._factor = None
        else:
            self._taken = w, k

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
        need, _ = self.footprint(whole, False, item)
        if room is None or need <= room:
            return
        size, gib = math.prod(whole), 2**30
        others = {"KFAC or EKFAC": sum(KFAC.footprint(whole, False, item)), "Diagonal": 2 * size * item}
        fits = [f"; {name} takes {taken / gib:.3g} GiB" for name, taken in others.items() if taken <= room]
        raise MemoryError(
            f"ExactBlock: {self.name!r} has {size:,} parameters, so that its block and factor take "
            f"{need / gib:.3g} GiB ({size:,} squared times {item + 8} bytes), of which {room / gib:.3g} GiB can be had"
            + "".join(fits[:1])
        )


def _add_rows(flat: Tensor, rows: Tensor, weights: Tensor) -> None:
    """Adds rowsᵀ diag(weights) rows to flat [P, P]: half of a matrix product where a kernel makes one triangle."""
    if rows.device.type == "cpu" and rows.dtype == torch.float32:
        size = rows.shape[1]
        ops.kronecker_block(rows, weights[:, None, None], out=flat.view(1, size, 1, size))
    else:
        flat.addmm_((rows * weights[:, None]).T, rows)


def check_layer(op: str, inputs: Tensor, logits: Tensor) -> None:
    if logits.dim() != 2 or inputs.dim() != 2 or logits.shape[0] != inputs.shape[0]:
        raise ValueError(
            f"{op}: inputs must be [n, d] and logits [n, c], got {list(inputs.shape)} and {list(logits.shape)}"
        )
    if inputs.shape[0] == 0:
        raise ValueError(f"{op}: inputs must hold at least one example, got 0")
    if inputs.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: inputs must be float32 or float64, got {inputs.dtype}")


def check_labels(op: str, labels: Tensor, n: int, c: int) -> None:
    if labels.dtype != torch.int64 or labels.shape != (n,):
        raise ValueError(f"{op}: labels must be int64 [n={n}], got {labels.dtype} {list(labels.shape)}")
    if n and not 0 <= int(labels.min()) <= int(labels.max()) < c:
        raise ValueError(f"{op}: labels must be in [0, c={c}), got {int(labels.min())} to {int(labels.max())}")


def output_grads(probs: Tensor, labels: Tensor) -> Tensor:
    """Gradients of softmax cross-entropy with respect to the logits, p_i − y_i, [n, c]."""
    residuals = probs.clone()
    residuals[torch.arange(len(labels), device=labels.device), labels] -= 1
    return residuals


def output_roots(probs: Tensor) -> Tensor:
    """Columns r_is with Σ_s r_is r_isᵀ = diag(p_i) − p_i p_iᵀ, [n, c, s]: √p_is (e_s − p_i), docs/math.md (15)."""
    scale = probs.sqrt()
    roots = -probs[:, :, None] * scale[:, None, :]
    others = probs @ (1 - torch.eye(probs.shape[1], dtype=probs.dtype, device=probs.device))  # 1 − p with its digits
    roots.diagonal(dim1=1, dim2=2).copy_(others * scale)
    return roots
