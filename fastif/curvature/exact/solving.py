"""Solving with an exact block: its factor, which is made on demand and let go of when the block changes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastif.curvature import limits
from fastif.curvature.damping import Damping, NotPositiveDefinite, RelativeDamping
from fastif.curvature.exact.building import BlockSum, HeadBatch
from fastif.curvature.exact.cholesky import check_finite, eigenvalue_range, extreme_eigenvalues
from fastif.curvature.exact.factor import Factor, InPlaceFactor
from fastif.curvature.exact.room import Form, Place, choose_place
from fastif.curvature.exact.spectral import SpectralFactor
from fastif.curvature.protocol import Shape
from fastif.model.gradients import Gradients


class BlockSolver:
    """(G + λI)⁻¹ for a block G; see `fastif.curvature.exact.factor`."""

    def __init__(self) -> None:
        self.factor: Factor | None = None  # of the block as it is

    def make_factor(self, total: BlockSum, damping: Damping, form: Form, name: str) -> Factor:
        """The factor of G + λI, made where there is none of the block as it is."""
        if self.factor is None:
            flat = total.finish_flat()
            place = place_of(total, form, len(flat), flat.element_size(), flat.device)
            if isinstance(damping, RelativeDamping):
                damping = _share_of(flat, damping, name)
            if place.in_place:
                total.own()
            self.factor = place.make(total.finish_flat(), damping, name)  # pyright: ignore[reportArgumentType]
        return self.factor

    def release(self) -> None:
        """Makes the block whole again before it changes: what factor it had is one of it no longer."""
        if self.factor is not None:
            self.factor.release()
        self.factor = None

    def move_to(self, total: BlockSum) -> None:
        """Lets a factor in place stand in the block again: a pickle knows no views, and holds two of them."""
        if isinstance(self.factor, InPlaceFactor):
            self.factor = self.factor.move_to(total.finish_flat())

    def take_out(self, batch: HeadBatch, roots: Tensor, damping: Damping) -> None:
        """Corrects the factor for what was taken out of the block, or gives it up."""
        found = not isinstance(damping, float | int)  # of the block as it was
        if self.factor is not None and (found or not self.factor.take(batch.inputs, roots)):
            self.factor = None


def _share_of(flat: Tensor, damping: RelativeDamping, name: str) -> float:
    check_finite(flat, name)
    mean = float(flat.diagonal().double().mean())
    if mean <= 0:
        raise NotPositiveDefinite(
            f"{name} [{len(flat)}, {len(flat)}] has the mean eigenvalue {mean:.3g}, of which no share is a damping: "
            "give a number"
        )
    return damping.share * mean


def place_of(total: BlockSum, form: Form, size: int, item: int, device: torch.device) -> Place:
    """Where the factor of a block of `size` parameters stands, or will."""
    return choose_place(form, size, item, device, 0 if total.block is None else total.block.nbytes)


def columns_of(op: str, rhs: Tensor, block: Tensor, shape: Shape) -> Tensor:
    """Right-hand sides [..., c, d] or [..., g, o, d] as float64 [P, m]."""
    c, d = block.shape[:2]
    if rhs.dim() >= 3 and rhs.shape[-3:] == shape:
        rhs = rhs.flatten(-3, -2)
    if rhs.shape[-2:] != (c, d):
        raise ValueError(f"ExactBlock.{op}: rhs must be [..., c={c}, d={d}], got {list(rhs.shape)}")
    return rhs.reshape(-1, c * d).T.to(block.device, torch.float64)


def sq_norms(factor: Factor, gradients: Gradients, block: Tensor, shape: Shape) -> Tensor:
    """g_iᵀ (G + λI)⁻¹ g_i, [n], in the block's dtype; gradients are formed a few at a time."""
    parts, each = [], max(1, limits.EXACT_ENTRIES // block.shape[:2].numel())
    for begin in range(0, len(gradients), each):
        columns = columns_of("sq_norms", gradients.rows(begin, begin + each).formed(), block, shape)
        parts.append(factor.sq_norms(columns).to(block.dtype))
    return torch.cat(parts)


def estimate_condition(factor: Factor, flat: Tensor) -> float:
    """The largest over the smallest eigenvalue of G + λI, from below, by Lanczos' method; exact of eigenvectors."""
    if isinstance(factor, SpectralFactor):
        return factor.condition()
    largest = eigenvalue_range(flat)[1] + factor.damping
    return largest * extreme_eigenvalues(lambda v: factor.solve(v[:, None])[:, 0], len(flat), flat.device)[1]
