"""The float64 definition of every op, in plain torch, written for reading: no speed, no blocks, no shared code."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sq_distances(points: Tensor, centre: Tensor) -> Tensor:
    """Squared distances [n] in the order of summation of csrc/farthest_first/farthest_first.h, docs/math.md (7)."""
    lanes = points.new_zeros((len(points), 32), dtype=torch.float64)
    for j in range(points.shape[1]):
        lanes[:, j % 32] += (points[:, j].double() - centre[j].double()).square()
    for half in (16, 8, 4, 2, 1):
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def farthest_first(
    points: Tensor, k: int, start: int | list[int], mask: Tensor | None = None, until_radius: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One cloud [n, d]; k its number of picks. What comes after the last pick is filled up."""
    start = [start] if isinstance(start, int) else start
    cloud = [i for i in range(len(points)) if mask is None or mask[i]]
    picks, radii = [], []
    dists = points.new_empty((len(points), 0), dtype=torch.float64)  # to the picks so far
    while len(picks) < k:
        if len(picks) < len(start):
            picks.append(start[len(picks)])
        elif until_radius is not None and radii[-1] <= until_radius * until_radius:
            break
        else:
            free = [i for i in cloud if i not in picks]
            picks.append(max(free, key=lambda i: (least[i], -i)))
        dists = torch.cat([dists, sq_distances(points, points[picks[-1]])[:, None]], 1)
        least = dists.min(1).values.tolist()
        radii.append(max(least[i] for i in cloud))
    missing = k - len(picks)
    sq_dists, nearest = [0.0] * len(points), [-1] * len(points)
    for i in cloud:
        sq_dists[i], nearest[i] = least[i], dists[i].tolist().index(least[i])
    return (
        torch.tensor(picks + [-1] * missing),
        torch.tensor(radii + radii[-1:] * missing, dtype=torch.float64),
        torch.tensor(sq_dists, dtype=torch.float64),
        torch.tensor(nearest),
    )


def ggn_block(features: Tensor, probs: Tensor, weights: Tensor) -> Tensor:
    """Σ_i w_i H_i ⊗ a_i a_iᵀ as [c, d, c, d], docs/math.md (6)."""
    a, p, w = features.double(), probs.double(), weights.double()
    output_hessian = -p[:, :, None] * p[:, None, :]  # [n, c, c]
    output_hessian.diagonal(dim1=1, dim2=2).zero_()
    output_hessian.diagonal(dim1=1, dim2=2).copy_(-output_hessian.sum(2))
    return torch.einsum("i,iab,ij,ik->ajbk", w, output_hessian, a, a)


def kronecker_block(features: Tensor, outer: Tensor) -> Tensor:
    """Σ_i H_i ⊗ a_i a_iᵀ as [c, d, c, d], docs/math.md (17)."""
    return torch.einsum("iab,ij,ik->ajbk", outer.double(), features.double(), features.double())


def per_sample_grads(inputs: Tensor, output_grads: Tensor) -> Tensor:
    """g_i = Σ_t u_it a_itᵀ, [n, o, d], docs/math.md (8)."""
    return torch.einsum("nto,ntd->nod", output_grads.double(), inputs.double())


def accumulate(inputs: Tensor, output_grads: Tensor, weights: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    members = torch.nn.functional.one_hot(groups, num_groups).double() * weights.double()[:, None]  # [n, g]
    return torch.einsum("ns,nod->sod", members, per_sample_grads(inputs, output_grads))


def accumulate_squares(inputs: Tensor, output_grads: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("n,nod->od", weights.double(), per_sample_grads(inputs, output_grads).square())


def sq_norms(inputs: Tensor, output_grads: Tensor, scale: Tensor | None = None) -> Tensor:
    squares = per_sample_grads(inputs, output_grads).square()
    return (squares if scale is None else squares * scale.double()).sum((1, 2))


def dots(inputs: Tensor, output_grads: Tensor, directions: Tensor) -> Tensor:
    return torch.einsum("qod,nod->qn", directions.double(), per_sample_grads(inputs, output_grads))


def factor_dots(
    left: Tensor,
    right: Tensor,
    ranks: Tensor,
    queries: Tensor,
    scale: Tensor | None = None,
    along: Tensor | None = None,
) -> Tensor:
    """⟨Q_q, Σ_f scale_f left_f right_fᵀ⟩ of every example, [q, n], docs/math.md (26)."""
    scale = torch.ones(len(left)) if scale is None else scale
    queries = queries if along is None else queries.double() @ along.double()
    products = torch.einsum("fo,qod,fd,f->qf", left.double(), queries.double(), right.double(), scale.double())
    owners = torch.arange(len(ranks)).repeat_interleave(ranks.long())
    return products.new_zeros(len(queries), len(ranks)).index_add_(1, owners, products)


def kfac_factors(inputs: Tensor, columns: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """A [d, d] and B [o, o] of a layer with inputs [n, t, d] and output gradients columns [s, n, t, o]."""
    share = weights.sum() * inputs.shape[1]
    a = torch.einsum("n,ntd,nte->de", weights, inputs, inputs) / share
    b = torch.einsum("n,snto,sntp->op", weights, columns, columns)
    return a.contiguous(), b.contiguous()


def kfac(inputs: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
    """A ⊗ B as a matrix [o·d, o·d] over the entries of a gradient [o, d], row by row."""
    a, b = kfac_factors(inputs, columns, weights)
    return torch.kron(b, a)


def ekfac(inputs: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
    """Q diag(λ) Qᵀ, Q = Q_B ⊗ Q_A, λ = Σ_i w_i Σ_s (Qᵀ g_is)²."""
    a, b = kfac_factors(inputs, columns, weights)
    basis = torch.kron(torch.linalg.eigh(b).eigenvectors, torch.linalg.eigh(a).eigenvectors)
    gradients = torch.einsum("snto,ntd->snod", columns, inputs).flatten(2)
    eigenvalues = torch.einsum("n,snp->p", weights, (gradients @ basis).square())
    return basis * eigenvalues @ basis.T


def shampoo(inputs: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
    """Q diag(λ) Qᵀ as `ekfac`, Q of the square roots of Σ_i w_i Σ_s g_is g_isᵀ and Σ_i w_i Σ_s g_isᵀ g_is."""
    gradients = torch.einsum("snto,ntd->snod", columns, inputs)
    left = torch.einsum("n,snod,snpd->op", weights, gradients, gradients)
    right = torch.einsum("n,snod,snoe->de", weights, gradients, gradients)

    def root(moment: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(moment)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T

    basis = torch.kron(torch.linalg.eigh(root(left)).eigenvectors, torch.linalg.eigh(root(right)).eigenvectors)
    eigenvalues = torch.einsum("n,snp->p", weights, (gradients.flatten(2) @ basis).square())
    return basis * eigenvalues @ basis.T


def training_filter(matrix: Tensor, time: float, weight_decay: float = 0.0) -> Tensor:
    """f(G), f(x) = (1 − e^{−τ(x + γ)})/(x + γ), and τ where x + γ is 0; docs/math.md (22)."""
    values, vectors = torch.linalg.eigh(matrix.double())
    filtered = []
    for x in (values + weight_decay).tolist():
        filtered.append(-math.expm1(-time * x) / x if abs(time * x) > 1e-14 else time)
    return vectors * torch.tensor(filtered, dtype=torch.float64) @ vectors.T


def ggn(inputs: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
    """Σ_i w_i Σ_s g_is g_isᵀ."""
    gradients = torch.einsum("snto,ntd->snod", columns, inputs).flatten(2)
    return torch.einsum("n,snp,snq->pq", weights, gradients, gradients)
