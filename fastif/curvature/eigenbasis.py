"""What estimators with eigenvalues say of one block: the basis in which they are diagonal, and what stands there."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastif.model.gradients import Gradients


class Eigenbasis(NamedTuple):
    """A block's curvature Q diag(Λ) Qᵀ, and the damped inverse Q diag(f(Λ)) Qᵀ that its estimator solves with.

    Q is the product of a basis of the outputs and one of the inputs; None: the parameters' own coordinates.
    """

    eigenvalues: Tensor  # Λ >= 0, [g, o, d], undamped
    inverse: Tensor  # f(Λ), [g, o, d]: 1/(Λ + λ), or what a `TrainingDamping` puts in its place
    output_basis: Tensor | None = None  # [g, o, o]
    input_basis: Tensor | None = None  # [g, d, d]; None only where the other is, too

    def rotate(self, gradients: Gradients) -> Gradients:
        """Qᵀ g."""
        return gradients if self.input_basis is None else gradients.rotated(self.output_basis, self.input_basis)

    def left_back(self, left: Tensor) -> Tensor:
        """Columns left [..., g, o, r] in the basis of the outputs, out of it. Q m is `right_back(left_back(m))`."""
        return left if self.output_basis is None else self.output_basis.to(left) @ left

    def right_back(self, right: Tensor) -> Tensor:
        """Rows right [..., g, r, d] in the basis of the inputs, out of it."""
        return right if self.input_basis is None else right @ self.input_basis.mT.to(right)
