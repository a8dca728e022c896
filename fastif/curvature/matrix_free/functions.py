"""Functions of a symmetric matrix, applied to vectors by products with it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastif.curvature.matrix_free.krylov import Product, norms_of
from fastif.curvature.matrix_free.krylov import dots as dots_of

Function = Callable[[Tensor], Tensor]  # of eigenvalues, float64

_FIRST, _GROWTH = 8, 1.5  # products before the first look, and how many times as many before the next
_SETTLED = {torch.float32: 1e-5, torch.float64: 1e-11}  # relative change from look to look that is enough


class NotSettled(ValueError):
    """Products did not suffice; the message says by how much the result still changes."""


def apply_functions(product: Product, vectors: Tensor, functions: Sequence[Function], most: int) -> list[Tensor]:
    """f(A) v for each function f and each row v of `vectors` [m, P], from products with A alone: [m, P] each.

    Lanczos: with T_k the tridiagonal form of A in the space of v, A v, ..., A^{k−1} v and Q_k its basis,
    f(A) v ≈ |v| Q_k f(T_k) e₁. Steps go on until no result changes by more than 1e-11 (float32: 1e-5) of its length
    from one look to the next, beside rounding. Every row has a space of its own. Bases are not kept but made a second
    time once their shares are known: beside the results four vectors of each row are held, however many steps there
    are. They lose their orthogonality to rounding, which delays the result and does not spoil it (Musco, Musco &
    Sidford 2018).

    Args:
        product: [m, P] → [m, P], symmetric; the same rows give the same products.
        most: products with each row, at most; twice as many with the second time. Raises NotSettled beyond them.
    """
    norms = norms_of(vectors)
    start = _scaled(vectors, norms)
    diagonal, beside = list[Tensor](), list[Tensor]()
    shares: list[Tensor] | None = None
    look = min(_FIRST, most)
    for _, on, off in _walk(product, start):
        diagonal.append(on)
        beside.append(off)
        if len(diagonal) < look:
            continue
        before, (shares, largest) = shares, _shares(diagonal, beside, functions)
        away = _change(shares, before, largest, vectors.dtype)
        if away <= 1:
            break
        if look == most:
            settled = _SETTLED.get(vectors.dtype, 1e-5)
            raise NotSettled(
                f"after {most} products with the curvature the result still changes by {away * settled:.1g}"
            )
        look = min(most, int(_GROWTH * look))
    assert shares is not None
    found = [torch.zeros_like(vectors) for _ in functions]
    for number, (vector, _, _) in zip(range(len(diagonal)), _walk(product, start), strict=False):
        for total, share in zip(found, shares, strict=True):
            total += vector * (share[:, number] * norms)[:, None].to(vector)
    return found


def _walk(product: Product, start: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The basis vectors [m, P], and what stands in T on the diagonal and beside it, float64 [m]."""
    before, vector, off = torch.zeros_like(start), start, norms_of(start) * 0
    while True:
        rest = product(vector)
        on = dots_of(vector, rest)
        rest = rest - vector * on[:, None].to(vector) - before * off[:, None].to(vector)
        off = norms_of(rest)
        yield vector, on, off
        before, vector = vector, _scaled(rest, off)


def _scaled(rows: Tensor, norms: Tensor) -> Tensor:
    return rows * torch.where(norms > 0, 1 / norms, 0.0)[:, None].to(rows)


def _shares(
    diagonal: list[Tensor], beside: list[Tensor], functions: Sequence[Function]
) -> tuple[list[Tensor], list[Tensor]]:
    """f(T) e₁ of every function, float64 [m, k], and f's largest value on each T, [m]."""
    on, off = torch.stack(diagonal, 1), torch.stack(beside[:-1], 1) if len(beside) > 1 else None
    matrix = on.diag_embed()
    if off is not None:
        matrix = matrix + off.diag_embed(1) + off.diag_embed(-1)
    values, vectors = torch.linalg.eigh(matrix)
    made = [function(values) for function in functions]
    return [(vectors * (f * vectors[:, 0])[:, None]).sum(2) for f in made], [f.abs().amax(1) for f in made]


def _change(shares: list[Tensor], before: list[Tensor] | None, largest: list[Tensor], dtype: torch.dtype) -> float:
    """How far the results have moved, in units of what is allowed."""
    if before is None:
        return float("inf")
    settled, rounding, ratios = _SETTLED.get(dtype, 1e-5), 8 * torch.finfo(dtype).eps, list[Tensor]()
    for now, then, most in zip(shares, before, largest, strict=True):
        moved = now.clone()
        moved[:, : then.shape[1]] -= then
        allowed = settled * now.norm(dim=1) + rounding * most
        ratios.append(moved.norm(dim=1) / allowed.clamp(min=1e-300))
    return float(torch.stack(ratios).max())  # NaN where one of them is: that is not settled
