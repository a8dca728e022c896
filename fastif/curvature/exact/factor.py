"""The Cholesky factor of a damped block, in one of two places: in float64 beside it, or in its own square."""

from __future__ import annotations

import math
from typing import Literal, Protocol

import torch
from torch import Tensor

from fastif.curvature import limits
from fastif.curvature.damping import IllConditioned
from fastif.curvature.exact import triangles
from fastif.curvature.exact.cholesky import diagnose, eigenvalue_range, factorize

# A downdate is kept beside the factor only while its pivots stay above this: below, half of the digits are gone.
_SMALLEST_PIVOT = 1e-8
_RESIDUAL = 1e-6  # A solve that leaves a larger relative residual than this is refused: its scores would be wrong.


class Factor(Protocol):
    """A factor of A = G + λI, or what a `TrainingDamping` makes of it, of a block G [P, P]; columns float64 [P, m]."""

    @property
    def damping(self) -> float:
        """λ; where it is not the same for all directions, that of flat ones."""
        ...

    @property
    def in_place(self) -> bool:
        """Whether it stands in the block, above the diagonal."""
        ...

    @property
    def corrected(self) -> bool:
        """Whether it is a factor of A only together with what was taken out since."""
        ...

    def solve(self, columns: Tensor) -> Tensor:
        """A⁻¹ columns."""
        ...

    def sq_norms(self, columns: Tensor) -> Tensor:
        """v ᵀA⁻¹ v of each column v, [m]."""
        ...

    def logdet(self) -> float: ...

    def lower(self) -> Tensor:
        """L with L Lᵀ = A, float64 [P, P]; not where it is corrected."""
        ...

    def inverse(self) -> Tensor:
        """A⁻¹, float64 [P, P]; not where it is corrected."""
        ...

    def take(self, inputs: Tensor, roots: Tensor) -> bool:
        """Corrects the factor for V Vᵀ that was taken out of A, the columns of V being roots[i, :, s] ⊗ inputs[i].

        False where it cannot: it is no longer one of A.
        """
        ...

    def release(self) -> None:
        """Makes the block whole again, which ends a factor that stood in it."""
        ...


class SeparateFactor:
    """A Cholesky factor in float64 beside the block, and few examples' curvature that was taken out since.

    Relative residuals of solves stay below 1e-6 far beyond a condition of 1e6.
    """

    in_place = False

    def __init__(self, lower: Tensor, damping: float):
        self.damping = damping
        self._lower = lower
        self._taken: tuple[Tensor, Tensor] | None = None  # see take

    @classmethod
    def make(cls, block: Tensor, damping: float | Literal["auto"], name: str) -> SeparateFactor:
        return cls(*factorize(block, damping, name))

    @classmethod
    def stand_in(cls, block: Tensor, name: str) -> SeparateFactor:
        """The factor of a block of zeros, damped by 1."""
        del name
        return cls(torch.eye(len(block), dtype=torch.float64, device=block.device), 1.0)

    @staticmethod
    def footprint(size: int, item: int) -> tuple[int, int]:
        """Bytes held, of the block of `item` bytes an entry and of its factor, and taken in the making beside them."""
        return size**2 * (item + 8), 0

    @property
    def corrected(self) -> bool:
        return self._taken is not None

    def solve(self, columns: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(self._lower, columns, upper=False)  # cholesky_solve would copy the factor
        if self._taken is not None:
            w, k = self._taken
            half += w @ torch.cholesky_solve(w.T @ half, k)
        return torch.linalg.solve_triangular(self._lower.mT, half, upper=True)

    def sq_norms(self, columns: Tensor) -> Tensor:
        """Half the work of `solve`."""
        half = torch.linalg.solve_triangular(self._lower, columns, upper=False)
        norms = half.square().sum(0)
        if self._taken is not None:
            w, k = self._taken
            norms += torch.linalg.solve_triangular(k, w.T @ half, upper=False).square().sum(0)
        return norms

    def logdet(self) -> float:
        total = self._lower.diagonal().log().sum()
        if self._taken is not None:
            total += self._taken[1].diagonal().log().sum()
        return 2 * total.item()

    def lower(self) -> Tensor:
        return self._lower

    def inverse(self) -> Tensor:
        return torch.cholesky_inverse(self._lower)

    def take(self, inputs: Tensor, roots: Tensor) -> bool:
        """With L Lᵀ = A and W = L⁻¹V, (A − V Vᵀ)⁻¹ = L⁻ᵀ (I + W (I − WᵀW)⁻¹ Wᵀ) L⁻¹.

        W and the Cholesky factor of I − WᵀW are kept beside L, where V has few columns and little cancels.
        docs/math.md (14).
        """
        lower, taken, self._taken = self._lower, self._taken, None
        count = roots.shape[0] * roots.shape[2] + (0 if taken is None else taken[0].shape[1])
        if count > limits.DOWNDATE_SHARE * len(lower):
            return False
        v = torch.einsum("ncs,nd->cdns", roots.to(lower), inputs.to(lower)).reshape(len(lower), -1)
        w = torch.linalg.solve_triangular(lower, v, upper=False)
        w = w if taken is None else torch.cat([taken[0], w], 1)
        k, info = torch.linalg.cholesky_ex(torch.eye(count, dtype=w.dtype, device=w.device) - w.T @ w)
        if info.item() or k.diagonal().min().item() ** 2 < _SMALLEST_PIVOT:
            return False
        self._taken = w, k
        return True

    def release(self) -> None: ...


class InPlaceFactor:
    """A factor in the block's dtype above the diagonal of the block itself: see `fastif.curvature.exact.triangles`.

    Solves are refined with residuals in float64, and raise IllConditioned where that does not reach 1e-6.
    """

    in_place, corrected = True, False

    def __init__(self, square: Tensor, pivots: Tensor, damping: float, name: str):
        self.damping, self.name = damping, name
        self._square, self._pivots = square, pivots

    @classmethod
    def make(cls, block: Tensor, damping: float | Literal["auto"], name: str) -> InPlaceFactor:
        """Raises NotPositiveDefinite as `factorize`, and IllConditioned where a random right-hand side shows it."""

        def factor_with(damping: float) -> InPlaceFactor:
            return cls(block, triangles.factorize(block, damping), damping, name)

        def attempt(damping: float, floor: float) -> InPlaceFactor | None:
            factor = factor_with(damping)
            good = factor._pivots.min().item() > floor and factor._random_residual() <= _RESIDUAL / 10
            return factor if good else None

        def smallest_pivot(damping: float, floor: float) -> float:
            factor = factor_with(damping)
            pivot = factor._pivots.min().item()
            if pivot > floor:
                raise IllConditioned(factor._diagnosis(factor._random_residual()))
            return pivot

        try:
            return diagnose(block, damping, name, attempt, smallest_pivot)[0]
        except BaseException:
            triangles.restore(block)
            raise

    @classmethod
    def stand_in(cls, block: Tensor, name: str) -> InPlaceFactor:
        """The factor of a block of zeros, damped by 1."""
        return cls(block, torch.ones(len(block), dtype=torch.float64, device=block.device), 1.0, name)

    def move_to(self, block: Tensor) -> InPlaceFactor:
        """The same factor in a copy of its block."""
        return InPlaceFactor(block, self._pivots, self.damping, self.name)

    @staticmethod
    def footprint(size: int, item: int) -> tuple[int, int]:
        """Bytes held, of the block of `item` bytes an entry, and taken in the making beside them."""
        return size**2 * item, triangles.scratch_bytes(size, item)

    def solve(self, columns: Tensor) -> Tensor:
        solved = torch.empty_like(columns)
        for begin in range(0, columns.shape[1], limits.REFINED_COLUMNS):
            part = columns[:, begin : begin + limits.REFINED_COLUMNS]
            found, residuals = triangles.solve(self._square, self._pivots, self.damping, part)
            worst = residuals.max().item()
            if not worst <= _RESIDUAL:
                if not bool(part.isfinite().all()):
                    raise ValueError(f"{self.name}: right-hand sides must be finite, got NaN or Inf")
                raise IllConditioned(self._diagnosis(worst))
            solved[:, begin : begin + limits.REFINED_COLUMNS] = found
        return solved

    def sq_norms(self, columns: Tensor) -> Tensor:
        return (columns * self.solve(columns)).sum(0)

    def logdet(self) -> float:
        return self._pivots.log().sum().item()

    def lower(self) -> Tensor:
        lower = self._square.mT.to(torch.float64, copy=True).tril_(-1)
        lower.diagonal().fill_(1)
        return lower.mul_(self._pivots.sqrt())

    def inverse(self) -> Tensor:
        return self.solve(torch.eye(len(self._square), dtype=torch.float64, device=self._square.device))

    def take(self, inputs: Tensor, roots: Tensor) -> bool:
        del inputs, roots
        return False

    def release(self) -> None:
        triangles.restore(self._square)

    def _random_residual(self) -> float:
        """What the solve for a right-hand side leaves that has a part in every direction."""
        generator = torch.Generator().manual_seed(0)
        rhs = torch.randn(len(self._square), 1, generator=generator, dtype=torch.float64).to(self._square.device)
        return triangles.solve(self._square, self._pivots, self.damping, rhs)[1].item()

    def _diagnosis(self, residual: float) -> str:
        size = len(self._square)
        largest = eigenvalue_range(self._square)[1]
        enough = 10.0 ** math.ceil(math.log10(self.damping + 1e-5 * (largest + self.damping)))
        return (
            f"{self.name} [{size}, {size}] with damping {self.damping:g} is too ill-conditioned for a factor in place: "
            f"solves leave a relative residual of {residual:.2g}, more than {_RESIDUAL:g}; damping {enough:g} would do,"
            " or a float64 factor beside the block (in_place=False)"
        )
