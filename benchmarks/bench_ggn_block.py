"""ggn_block against the matrix products that compute the same block in plain torch."""

import torch

from benchmarks.conftest import DEVICE
from fastif.ops import ggn_block

N, D, C = 50_000, 513, 10


def all_pairs(features, probs, weights):
    """The best plain formulation of diag(p) - p p^T: one product per class pair, c (c + 1) / 2 of them."""
    out = features.new_empty(C, D, C, D)
    for a in range(C):
        for b in range(a + 1):
            factor = weights * probs[:, a] * ((1 - probs[:, a]) if a == b else -probs[:, b])
            out[a, :, b] = out[b, :, a] = (features * factor[:, None]).T @ features
    return out


def off_diagonal_pairs(features, probs, weights):
    """The same with our observation that the diagonal blocks follow from the others: c (c - 1) / 2 products."""
    out = features.new_zeros(C, D, C, D)
    for a in range(C):
        for b in range(a):
            gram = (features * (weights * probs[:, a] * probs[:, b])[:, None]).T @ features
            out[a, :, b] = out[b, :, a] = -gram
            out[a, :, a] += gram
            out[b, :, b] += gram
    return out


def test_ggn_block(race):
    g = torch.Generator().manual_seed(0)
    features = torch.randn(N, D, generator=g).to(DEVICE)
    probs = (3 * torch.randn(N, C, generator=g)).softmax(1).to(DEVICE)
    weights = torch.full((N,), 1 / N, device=DEVICE)
    block = ggn_block(features, probs, weights)
    worst = 0.0
    x, p = features.double(), probs.double()
    for a, b in ((0, 0), (0, 1), (7, 3), (9, 9)):
        factor = p[:, a] * (p.sum(1) - p[:, a]) if a == b else -p[:, a] * p[:, b]
        want = (x * factor[:, None]).T @ x / N
        worst = max(worst, ((block[a, :, b].double() - want).norm() / want.norm()).item())
    assert worst <= 1e-5
    del x, p, block
    race(
        lambda: ggn_block(features, probs, weights),
        {
            "torch, 55 class pairs": lambda: all_pairs(features, probs, weights),
            "torch, 45 class pairs and their sums": lambda: off_diagonal_pairs(features, probs, weights),
        },
        rounds=2,
        flops=N * C * (C - 1) / 2 * D * (D + 1),
        relative_error=worst,
    )
