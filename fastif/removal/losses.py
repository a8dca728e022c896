"""The loss that a head was trained with: what removal needs of it, as functions of the logits. docs/math.md (30).

For a linear head, a loss that is convex in the outputs is convex in the parameters, and its Gauss–Newton block is its
Hessian.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from fastif import ops
from fastif.curvature import ExactBlock
from fastif.curvature.exact.softmax import check_labels, output_grads
from fastif.model.losses import per_sample
from fastif.ranks import ALONE, Ranks

SoftmaxName = Literal["cross_entropy", "token_cross_entropy", "causal_lm"]  # what all layers can move by
HeadLoss = Literal["cross_entropy", "bce", "mse"] | Callable[[Tensor, Tensor], Tensor]

_CHUNK = 4096  # examples whose output Hessians are held at a time


class Solver(Protocol):
    def solve(self, rhs: Tensor) -> Tensor:
        """(H + damping I)⁻¹ rhs, [c, d]."""
        ...


class OutputLoss(Protocol):
    """A loss of the outputs [m, c] and the targets [m, ...] of m examples."""

    smoothness: float | None  # the largest eigenvalue that its Hessian in the outputs can have; None: not known

    def check(self, targets: Tensor, n: int, c: int) -> None:
        """Raises ValueError for targets that cannot be."""
        ...

    def values(self, logits: Tensor, targets: Tensor, first: int = 0) -> Tensor:
        """[m]; of retained examples from the number `first` on, for messages."""
        ...

    def residuals(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Gradients in the outputs, [m, c]."""
        ...

    def curvature(
        self,
        inputs: Tensor,
        logits: Tensor,
        targets: Tensor,
        weights: Tensor,
        damping: float,
        name: str,
        numbers: Tensor,
        ranks: Ranks = ALONE,
    ) -> Solver:
        """Of Σ weights_i ℓ_i in the parameters, inputs [m, d] with a column of ones for a bias.

        numbers: int64 [m], which these are of all that carry the curvature, for messages. Of several ranks each brings
        its own examples; the first has the sum over all, and alone can solve.
        """
        ...


def output_loss(loss: HeadLoss) -> OutputLoss:
    """By its name, or of the user's own. Raises ValueError for another name."""
    if loss == "cross_entropy":
        return SoftmaxLoss()
    if loss in ("token_cross_entropy", "causal_lm"):
        raise ValueError(f"remove: a head alone has one output per example, got loss={loss!r}; pass layers=")
    if loss not in ("bce", "mse") and not callable(loss):
        raise ValueError(
            f"remove: loss must be cross_entropy, bce, mse or a function of (outputs, targets) that is convex in the "
            f"outputs, got {loss!r}"
        )
    return AnyLoss(loss)


class SoftmaxLoss:
    """Softmax cross-entropy of integer labels."""

    smoothness: float | None = 0.5

    def check(self, targets: Tensor, n: int, c: int) -> None:
        check_labels("remove", targets, n, c)

    def values(self, logits: Tensor, targets: Tensor, first: int = 0) -> Tensor:
        del first
        return logits.logsumexp(1) - logits.gather(1, targets[:, None])[:, 0]

    def residuals(self, logits: Tensor, targets: Tensor) -> Tensor:
        return output_grads(logits.softmax(1), targets)

    def curvature(
        self,
        inputs: Tensor,
        logits: Tensor,
        targets: Tensor,
        weights: Tensor,
        damping: float,
        name: str,
        numbers: Tensor,
        ranks: Ranks = ALONE,
    ) -> Solver:
        del targets, numbers
        block = ExactBlock(damping, name=name)
        if len(inputs):
            block.fit(inputs, logits, weights=weights)
        if ranks.world > 1:
            summed = ranks.sum_each(f"the curvature of {name}", block.sums(0), _of_the_first, inputs.device)
            if summed:
                block.take_sums(0, summed)
        return block


class AnyLoss:
    """A loss by autograd: gradients and Hessians in the outputs of each example, from c backward passes."""

    def __init__(self, loss: Any):
        self.loss = copy.deepcopy(loss) if isinstance(loss, nn.Module) else loss
        self.smoothness = _smoothness(loss)

    def check(self, targets: Tensor, n: int, c: int) -> None:
        del c
        if not isinstance(targets, Tensor) or len(targets) != n:
            got = list(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise ValueError(f"remove: targets must be a tensor of n={n} examples, got {got}")

    def values(self, logits: Tensor, targets: Tensor, first: int = 0) -> Tensor:
        values = self._of_each(logits, targets).detach()
        if not values.isfinite().all():
            row = int((~values.isfinite()).nonzero()[0])
            raise ValueError(
                f"remove: the loss of retained example {first + row} is {float(values[row])}; it must be finite"
            )
        return values

    def residuals(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self._gradients(logits, targets)[1].detach()

    def curvature(
        self,
        inputs: Tensor,
        logits: Tensor,
        targets: Tensor,
        weights: Tensor,
        damping: float,
        name: str,
        numbers: Tensor,
        ranks: Ranks = ALONE,
    ) -> Solver:
        block: Tensor | None = None
        for start in range(0, len(inputs), _CHUNK):
            rows = slice(start, start + _CHUNK)
            hessians = self._hessians(logits[rows], targets[rows], numbers[rows]) * weights[rows, None, None]
            block = ops.kronecker_block(inputs[rows], hessians.to(inputs), out=block)
        if ranks.world > 1:
            own = {} if block is None else {"block": block}
            block = ranks.sum_each(f"the curvature of {name}", own, _of_the_first, inputs.device).get("block")
        return _Factored(block, damping, name) if block is not None else _Elsewhere()

    def _of_each(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if isinstance(self.loss, nn.Module):
            self.loss.to(outputs)  # class weights, in the outputs' type
        return per_sample(self.loss, outputs, targets, len(outputs))

    def _gradients(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs that they depend on, and the gradients."""
        with torch.enable_grad():
            outputs = logits.detach().requires_grad_()
            losses = self._of_each(outputs, targets)
            (found,) = torch.autograd.grad(losses.sum(), outputs, create_graph=True)
        return outputs, found

    def _hessians(self, logits: Tensor, targets: Tensor, numbers: Tensor) -> Tensor:
        """[m, c, c]. Raises ValueError where one of a function of the user's is not positive semidefinite."""
        outputs, gradients = self._gradients(logits, targets)
        rows = []
        for column in gradients.unbind(1):
            grad = None
            if column.requires_grad:
                (grad,) = torch.autograd.grad(column.sum(), outputs, retain_graph=True, allow_unused=True)
            rows.append(torch.zeros_like(outputs) if grad is None else grad)
        found = torch.stack(rows, 1)
        found = (found + found.mT) / 2
        if self.smoothness is None:
            self._check_convex(found.double(), gradients.detach(), numbers)
        return found

    def _check_convex(self, hessians: Tensor, gradients: Tensor, numbers: Tensor) -> None:
        """Of a function that is not known to be: eigenvalues below 0 by more than rounding are refused."""
        rounding = 10 * torch.finfo(gradients.dtype).eps * float(gradients.abs().max())
        smallest = torch.linalg.eigvalsh(hessians)[:, 0]
        broken = (smallest < -1e-5 * float(hessians.abs().max()) - rounding).nonzero()[:, 0]
        if len(broken):
            row = int(broken[0])
            raise ValueError(
                f"remove: the loss is not convex in the outputs: at example {int(numbers[row])} of those that carry "
                f"the curvature its Hessian has the eigenvalue {float(smallest[row]):.3g}"
            )


class _Factored:
    def __init__(self, block: Tensor, damping: float, name: str):
        size = block.shape[0] * block.shape[1]
        matrix = block.view(size, size).double()
        matrix.diagonal().add_(damping)
        self._factor, wrong = torch.linalg.cholesky_ex(matrix)
        if wrong:
            raise ValueError(
                f"remove: the curvature of {name} is not positive definite with {damping:g} on its diagonal; a larger "
                "weight_decay or damping would do"
            )

    def solve(self, rhs: Tensor) -> Tensor:
        solved = torch.cholesky_solve(rhs.double().reshape(-1, 1), self._factor)
        return solved.view(rhs.shape).to(rhs.dtype)


class _Elsewhere:
    """The curvature that another rank has."""

    def solve(self, rhs: Tensor) -> Tensor:
        raise RuntimeError("remove: the first rank solves")  # and sends what it found


def _of_the_first(name: Any) -> int:
    """Who owns a sum: the first rank, which solves."""
    del name
    return 0


def _smoothness(loss: Any) -> float | None:
    """Known of losses whose convexity is; a function of the user's own is taken at its word, and is not certified."""
    if loss == "bce":
        return 0.25
    if loss == "mse":
        return 2.0
    if type(loss) is nn.CrossEntropyLoss:
        heaviest = 1.0 if loss.weight is None else float(loss.weight.max())
        lightest = 0.0 if loss.weight is None else float(loss.weight.min())
        return 0.5 * heaviest if lightest >= 0 and 0 <= loss.label_smoothing <= 1 else None
    return None
