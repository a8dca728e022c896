"""Exact curvature blocks against the plain torch that computes the same, and against the libraries that do.

Each workload is verified, then raced; a peer that would take hours is given a known part of the work and drawn on.
FASTIF_BENCH=all takes whole sizes: n = 50,000, hundreds of classes' pairs in full.
"""

import importlib.util
import itertools
import os

import pytest
import torch
from torch import nn

from benchmarks.conftest import DEVICE
from benchmarks.ops import cifar10_features
from fastif import ExactBlock, Influence, samplers
from fastif.curvature.exact.cholesky import extreme_eigenvalues
from fastif.data import load
from fastif.influence.fitting import begun, observe
from fastif.measure import Measure
from fastif.ops import ggn_block, kronecker_block

ALL = os.environ.get("FASTIF_BENCH") == "all"
ON_GPU = DEVICE.type == "cuda"
TOLERANCE = 1e-6 if ON_GPU else 1e-5
TF32_PRODUCTS = 3  # of operands split in two, csrc/common/tensor_tile.cuh


def all_pairs(features, probs, weights, most):
    """The best plain formulation of diag(p) - p p^T: one product per class pair, c (c + 1) / 2 of them."""
    (_, d), c = features.shape, probs.shape[1]
    out = features.new_empty(c, d, c, d)
    for a, b in itertools.islice(itertools.combinations_with_replacement(range(c), 2), most):
        factor = weights * probs[:, a] * ((1 - probs[:, a]) if a == b else -probs[:, b])
        out[a, :, b] = out[b, :, a] = (features * factor[:, None]).T @ features
    return out


def off_diagonal_pairs(features, probs, weights, most):
    """The same with our observation that the diagonal blocks follow from the others: c (c - 1) / 2 products."""
    (_, d), c = features.shape, probs.shape[1]
    out = features.new_zeros(c, d, c, d)
    for a, b in itertools.islice(itertools.combinations(range(c), 2), most):
        gram = (features * (weights * probs[:, a] * probs[:, b])[:, None]).T @ features
        out[a, :, b] = out[b, :, a] = -gram
        out[a, :, a] += gram
        out[b, :, b] += gram
    return out


def bare_products(features, count):
    """cuBLAS alone, in float32: so many products of the features with themselves, neither weighted nor put in place."""
    for _ in range(count):
        features.T @ features


def without_tensor_cores(work):
    def run():
        os.environ["FASTIF_GGN"] = "cuda"
        try:
            return work()
        finally:
            del os.environ["FASTIF_GGN"]

    return run


def by_curvlinops(features, probs, weights, columns):
    """GGN times `columns` columns of the identity, of the linear layer alone."""
    import curvlinops

    del weights
    d, c = features.shape[1], probs.shape[1]
    layer = nn.Linear(d, c, bias=False, device=features.device)
    labels = torch.zeros(len(features), dtype=torch.int64, device=features.device)
    operator = curvlinops.GGNLinearOperator(
        layer, nn.CrossEntropyLoss(), list(layer.parameters()), [(features, labels)], check_deterministic=False
    )
    eye = torch.eye(c * d, columns, device=features.device)
    return lambda: operator @ eye


def by_jacobians(features, probs, weights, examples):
    """J^T H J from torch.func's Jacobians of `examples` examples."""
    c, d = probs.shape[1], features.shape[1]
    weight = torch.zeros(c, d, device=features.device)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda w, x: w @ x), (None, 0))
    hessian = probs[:examples].diag_embed() - probs[:examples, :, None] * probs[:examples, None, :]

    def work():
        j = jacobian(weight, features[:examples]).flatten(2)  # [n, c, P]
        return torch.einsum("n,ncp,nce,neq->pq", weights[:examples], j, hessian, j)

    return work


HEADS = {"c10-d513": (50_000, 513, 10), "c100-d129": (50_000 if ALL else 5_000, 129, 100)}
if ON_GPU:
    HEADS["c10-d512"] = (50_000, 512, 10)  # fills its tiles, of 128, which 513 do not; 129 are cut into tiles of 64


def head(name):
    n, d, c = HEADS[name]
    g = torch.Generator().manual_seed(0)
    features = torch.randn(n, d, generator=g).to(DEVICE)
    probs = (3 * torch.randn(n, c, generator=g)).softmax(1).to(DEVICE)
    return features, probs, torch.full((n,), 1 / n, device=DEVICE)


def verified(block, features, probs):
    """The largest relative error of four class pairs of the block against float64."""
    worst, c = 0.0, probs.shape[1]
    x, p = features.double(), probs.double()
    for a, b in ((0, 0), (0, 1), (c - 3, 3), (c - 1, c - 1)):
        factor = p[:, a] * (p.sum(1) - p[:, a]) if a == b else -p[:, a] * p[:, b]
        want = (x * factor[:, None]).T @ x / len(x)
        worst = max(worst, ((block[a, :, b].double() - want).norm() / want.norm()).item())
    assert worst <= TOLERANCE
    return worst


@pytest.mark.parametrize("name", list(HEADS))
def test_ggn_block(race, name):
    features, probs, weights = head(name)
    (n, d), c = features.shape, probs.shape[1]
    with Measure(DEVICE) as work:
        block = ggn_block(features, probs, weights)
    share = None if work.peak_bytes is None else work.peak_bytes / block.nbytes
    assert share is None or share <= 1.1
    worst = verified(block, features, probs)
    pairs, most = c * (c - 1) // 2, 200
    columns, examples = 4, 4
    peers = {
        f"torch, {pairs + c} class pairs": lambda: all_pairs(features, probs, weights, most),
        f"torch, {pairs} class pairs and their sums": lambda: off_diagonal_pairs(features, probs, weights, most),
        "torch.func Jacobians": by_jacobians(features, probs, weights, examples),
    }
    scale = {
        f"torch, {pairs + c} class pairs": max(1, (pairs + c) / most),
        f"torch, {pairs} class pairs and their sums": max(1, pairs / most),
        "torch.func Jacobians": n / examples,
    }
    if importlib.util.find_spec("curvlinops"):
        peers["curvlinops, GGN @ I"] = by_curvlinops(features, probs, weights, columns)
        scale["curvlinops, GGN @ I"] = c * d / columns
    out = features.new_empty(c, d, c, d)

    def ours():
        return ggn_block(features, probs, weights, out=out.zero_())

    if ON_GPU:
        bare = f"cuBLAS, {pairs} bare float32 products"
        peers[bare], scale[bare] = lambda: bare_products(features, min(pairs, most)), max(1, pairs / most)
        peers["fastif without tensor cores"] = without_tensor_cores(ours)
        assert (without_tensor_cores(ours)() - block).norm() <= TOLERANCE * block.norm()
    del block
    race(
        ours,
        peers,
        rounds=2,
        flops=n * pairs * d * (d + 1),
        tf32_products=TF32_PRODUCTS,
        scale=scale,
        relative_error=worst,
        peak_share_of_block=share,
        drawn_on=[peer for peer, factor in scale.items() if factor > 1],
    )


def weighted_pairs(features, outer):
    """kronecker_block in plain torch: one product per class pair, c (c + 1) / 2 of them."""
    (_, d), c = features.shape, outer.shape[1]
    out = features.new_empty(c, d, c, d)
    for a, b in itertools.combinations_with_replacement(range(c), 2):
        out[a, :, b] = out[b, :, a] = (features * outer[:, b, a, None]).T @ features
    return out


def weighted_rows(features, outer, rows=4096):
    """The same with one product per row of blocks, on parts of the examples: fewer and larger products."""
    (_, d), c = features.shape, outer.shape[1]
    out = features.new_zeros(c, d, c, d)
    for x, h in zip(features.split(rows), outer.split(rows), strict=True):
        for a in range(c):
            out[a].view(d, -1)[:, : (a + 1) * d].addmm_(x.T, (h[:, a, : a + 1, None] * x[:, None]).flatten(1))
    for a in range(c):
        for b in range(a):
            out[b, :, a] = out[a, :, b]
    return out


@pytest.mark.parametrize("d", [513 if ALL else 129])
def test_kronecker_block(race, d):
    """Of the empirical Fisher of a softmax head: H_i = (p_i - e_y) (p_i - e_y)^T / n."""
    features, probs, weights = head("c10-d513")
    features, (n, c) = features[:, :d].contiguous(), probs.shape
    roots = probs - torch.eye(c, device=DEVICE)[torch.arange(n, device=DEVICE) % c]
    outer = roots[:, :, None] * (weights[:, None] * roots)[:, None, :]
    block, worst = kronecker_block(features, outer), 0.0
    x, h = features.double(), outer.double()
    for a, b in ((0, 0), (0, 1), (c - 3, 3), (c - 1, c - 1)):
        want = (x * h[:, a, b, None]).T @ x
        worst = max(worst, ((block[a, :, b].double() - want).norm() / want.norm()).item())
    assert worst <= TOLERANCE
    del x, h
    for peer in (weighted_pairs, weighted_rows):
        assert (peer(features, outer) - block).norm() <= 1e-5 * block.norm()
    out, pairs = torch.empty_like(block), c * (c + 1) // 2

    def ours():
        return kronecker_block(features, outer, out=out.zero_())

    peers = {
        f"torch, {pairs} class pairs": lambda: weighted_pairs(features, outer),
        f"torch, {c} rows of class pairs": lambda: weighted_rows(features, outer),
    }
    if ON_GPU:
        peers["fastif without tensor cores"] = without_tensor_cores(ours)
        assert (without_tensor_cores(ours)() - block).norm() <= TOLERANCE * block.norm()
    del block
    race(
        ours,
        peers,
        rounds=2,
        flops=n * pairs * d * (d + 1),
        tf32_products=TF32_PRODUCTS,
        relative_error=worst,
    )


def rows_by_addmm(model, x, loss_columns, layer, each):
    """What a hidden layer's block takes in plain torch: formed gradients of every column, one product for `each`."""
    influence = Influence(model, curvature=ExactBlock(), layers=layer, progress=False)

    def work():
        total = None
        with influence.passes.running(None):
            for part in x.split(each):
                forward = influence.capture.forward(part)
                for column in loss_columns(forward.outputs):
                    g = forward.gradients(forward.outputs, column, keep=True)[layer].formed().flatten(1)
                    total = g.new_zeros(g.shape[1], g.shape[1]) if total is None else total
                    total.addmm_(g.T, g, alpha=1 / len(x))
        return total

    return work


def softmax_columns(outputs):
    probs = outputs.detach().softmax(1)
    for k in range(probs.shape[1]):
        column = -probs[:, k : k + 1].sqrt() * probs
        column[:, k] += probs[:, k].sqrt()
        yield column


HIDDEN = {
    # Linear 512 -> 512 has 262,656 parameters, a block of 257 GiB: this is the largest of its kind that fits at ease.
    "linear-64-64": (lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), (64,), 1024, "0"),
    "vgg-conv-3-64": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 10)
        ),
        (3, 32, 32),
        256,
        "0",
    ),
}


@pytest.mark.parametrize("name", list(HIDDEN))
def test_hidden_block(race, name):
    build, shape, n, layer = HIDDEN[name]
    torch.manual_seed(0)
    model, x, y = build().to(DEVICE), torch.randn(n, *shape, device=DEVICE), (torch.arange(n) % 10).to(DEVICE)
    influence = Influence(model, curvature=ExactBlock(1e-1), layers=layer, progress=False, batch_size=n)

    def build_block():
        with influence.passes.running(None):
            curvature = begun(influence.parts, influence.capture, None)
            influence.passes.check(x, y)
            for rows, part, labels in influence.passes.slices(x, y):
                weights = torch.full((rows.stop - rows.start,), 1 / n)
                observe(influence.passes, curvature, part, labels, weights, 0, torch.Generator())
        return curvature.by_block[layer].block

    plain, in_parts = (rows_by_addmm(model, x, softmax_columns, layer, each) for each in (n, 32))
    block, want = build_block(), plain()
    worst = ((block.reshape_as(want) - want).norm() / want.norm()).item()
    assert worst <= 1e-5
    assert (in_parts() - want).norm() <= 1e-5 * want.norm()
    size = len(want)
    del block, want
    peers = {"torch, addmm of formed gradients": plain, "the same, 32 examples at a time": in_parts}
    race(build_block, peers, rounds=2, relative_error=worst, parameters=size)


def trained_head(features, labels):
    """Logits of a linear classifier that a few dozen steps of L-BFGS have trained."""
    layer = nn.Linear(features.shape[1], 10)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=80, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(layer(features), labels)
        value.backward()
        return value

    optimizer.step(objective)
    return layer(features).detach()


@pytest.mark.parametrize("epochs", [2, 12] if ALL else [2])
def test_certified_subset(race, epochs):
    """Features of a CNN on CIFAR-10 after so many epochs where FASTIF_DATA has it, else the digits."""
    found = cifar10_features.features(epochs)
    if found is None or "FASTIF_DATA" not in os.environ:
        data = load("digits")
        features = data.x_train.flatten(1)
    else:
        data, features = load("cifar10", os.environ["FASTIF_DATA"]), found.penultimate
    n = len(features) if ALL else min(len(features), 10_000)
    features = features[:n]
    logits = trained_head(features, data.y_train[:n])
    inputs = torch.cat([features, features.new_ones(n, 1)], 1)

    def whole():
        return ggn_block(inputs, logits.softmax(1))

    def part():
        subset = samplers.certified(features, logits, 1e-3)
        rows = subset.indices
        return ggn_block(inputs[rows], logits[rows].softmax(1), subset.weights.float()), subset

    block, (certified, subset) = whole(), part()
    missing = (block - certified).view(len(block) * block.shape[1], -1)
    _, error = extreme_eigenvalues(lambda v: (missing @ v.float()).double(), len(missing), missing.device)
    assert 0 < error <= subset.bound
    del block, certified
    extra = dict(examples=f"{len(subset.indices):,} of {n:,}", bound=subset.bound, error=error)
    race(part, {"all examples": whole}, rounds=2, **extra)
