"""Every op against its plain torch formulations; peak memory against storing every gradient."""

import pytest
import torch

from benchmarks.conftest import DEVICE
from fastif.measure import Measure
from fastif.ops import per_sample_grad

N, O, D, Q = 8192, 512, 512, 8  # noqa: E741
STORED = N * O * D * 4  # bytes of [n, o, d]


def problem():
    g = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, generator=g).to(DEVICE) for shape in ((N, D), (N, O), (Q, O, D)))


def peak_share(work) -> float:
    with Measure(DEVICE) as measured:
        work()
    assert measured.peak_bytes is not None
    return measured.peak_bytes / STORED


def test_dots(race):
    a, u, v = problem()
    want = torch.einsum("no,qod,nd->qn", u[:64].double(), v.double(), a[:64].double())
    got = per_sample_grad.dots(a, u, v)
    assert (got[:, :64] - want).abs().max() <= 1e-5 * want.abs().max()
    share = peak_share(lambda: per_sample_grad.dots(a, u, v))
    assert share < 0.02
    race(
        lambda: per_sample_grad.dots(a, u, v),
        {
            "torch.einsum, one expression": lambda: torch.einsum("no,qod,nd->qn", u, v, a),
            "torch, a product per query": lambda: torch.stack([((u @ w) * a).sum(1) for w in v]),
        },
        flops=2 * Q * N * O * D,
        peak_share_of_stored_gradients=share,
    )


def test_sq_norms(race):
    a, u, _ = problem()
    want = u.double().square().sum(1) * a.double().square().sum(1)
    assert (per_sample_grad.sq_norms(a, u) - want).abs().max() <= 1e-5 * want.max()
    share = peak_share(lambda: per_sample_grad.sq_norms(a, u))
    assert share < 0.02
    race(
        lambda: per_sample_grad.sq_norms(a, u),
        {
            "torch.einsum, factored": lambda: torch.einsum("no,no->n", u, u) * torch.einsum("nd,nd->n", a, a),
            "torch squares, factored": lambda: u.square().sum(1) * a.square().sum(1),
        },
        rounds=20,
        bytes_read=a.nbytes + u.nbytes,
        peak_share_of_stored_gradients=share,
    )


def test_sq_norms_with_positions(race):
    g = torch.Generator().manual_seed(0)
    a, u = (torch.randn(1024, 64, 128, generator=g).to(DEVICE) for _ in range(2))
    want = torch.einsum("nto,ntd->nod", u[:16].double(), a[:16].double()).square().sum((1, 2))
    assert (per_sample_grad.sq_norms(a, u)[:16] - want).abs().max() <= 1e-5 * want.max()
    race(
        lambda: per_sample_grad.sq_norms(a, u),
        {
            "torch, two Gram products": lambda: ((a @ a.mT) * (u @ u.mT)).sum((1, 2)),
            "torch, stored gradients": lambda: (u.mT @ a).square().sum((1, 2)),
        },
        flops=1024 * 2 * 64 * 65 / 2 * 256,
    )


def test_accumulate_by_class(race):
    a, u, _ = problem()
    groups = (torch.arange(N) % 10).to(DEVICE)
    one_hot = torch.nn.functional.one_hot(groups, 10).float()
    got = per_sample_grad.accumulate(a, u, groups=groups, num_groups=10)
    want = u[groups == 3].double().T @ a[groups == 3].double()
    assert (got[3] - want).abs().max() <= 1e-5 * want.abs().max()
    race(
        lambda: per_sample_grad.accumulate(a, u, groups=groups, num_groups=10),
        {
            "torch, a masked product per class": lambda: torch.stack([(u * m[:, None]).T @ a for m in one_hot.T]),
            "torch, an indexed product per class": lambda: torch.stack(
                [u[groups == s].T @ a[groups == s] for s in range(10)]
            ),
        },
        flops=2 * N * O * D,
    )


# n, t, o, d: a linear layer, two convolutions and a layer of a transformer, three of them with a bias.
LAYERS = {
    "linear": (N, 1, 512, 512),
    "conv 64 positions": (256, 64, 128, 577),
    "conv 256 positions": (128, 256, 64, 289),
    "transformer 32 positions": (256, 32, 512, 129),
}
layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


def layer_problem(layer):
    n, t, o, d = layer
    g = torch.Generator().manual_seed(0)
    a, u = (torch.randn(n, t, side, generator=g).to(DEVICE) for side in (d, o))
    return a, u, torch.rand(n, generator=g).to(DEVICE), torch.rand(o, d, generator=g).to(DEVICE)


def by_block(work, *tensors, stored: int = 8 << 20):
    """[work(block of each tensor)], whose gradients take `stored` bytes: the best size for plain torch on a CPU."""
    a, u = tensors[:2]
    size = max(1, stored // (4 * a.shape[2] * u.shape[2]))
    return [work(*block) for block in zip(*(x.split(size) for x in tensors), strict=True)]


@layers
def test_accumulate_squares(race, layer):
    a, u, w, _ = layer_problem(layer)
    n, t, o, d = layer
    want = torch.einsum("n,nod->od", w[:16].double(), (u[:16].double().mT @ a[:16].double()).square())
    got = per_sample_grad.accumulate_squares(a[:16], u[:16], w[:16])
    assert (got - want).abs().max() <= 1e-5 * want.max()
    peers = {
        "torch, gradients by block": lambda: sum(
            by_block(lambda a, u, w: (w @ (u.mT @ a).square_().flatten(1)).view(o, d), a, u, w)
        )
    }
    if t == 1:
        peers = {"torch, a product of squares": lambda: (u[:, 0].square() * w[:, None]).T @ a[:, 0].square()}
    race(lambda: per_sample_grad.accumulate_squares(a, u, w), peers, flops=2 * n * t * o * d)


@layers
def test_sq_norms_with_scale(race, layer):
    a, u, _, r = layer_problem(layer)
    n, t, o, d = layer
    want = ((u[:16].double().mT @ a[:16].double()).square() * r).sum((1, 2))
    assert (per_sample_grad.sq_norms(a, u, r)[:16] - want).abs().max() <= 1e-5 * want.max()
    peers = {
        "torch, gradients by block": lambda: torch.cat(
            by_block(lambda a, u: (u.mT @ a).square_().flatten(1) @ r.flatten(), a, u)
        )
    }
    if t == 1:
        peers = {"torch, a product of squares": lambda: ((u[:, 0].square() @ r) * a[:, 0].square()).sum(1)}
    race(lambda: per_sample_grad.sq_norms(a, u, r), peers, flops=2 * n * t * o * d)


@layers
def test_dots_by_layer(race, layer):
    a, u, _, _ = layer_problem(layer)
    n, t, o, d = layer
    v = torch.randn(16, o, d, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    want = torch.einsum("nod,qod->qn", u[:16].double().mT @ a[:16].double(), v.double())
    assert (per_sample_grad.dots(a, u, v)[:, :16] - want).abs().max() <= 1e-5 * want.abs().max()
    peers = {"torch, a product per query": lambda: torch.stack([((u @ w) * a).sum((1, 2)) for w in v])}
    if t > 1:  # for one position ten times slower
        peers["torch, gradients by block"] = lambda: torch.cat(
            by_block(lambda a, u: v.flatten(1) @ (u.mT @ a).flatten(1).T, a, u, stored=32 << 20), 1
        )
    race(lambda: per_sample_grad.dots(a, u, v), peers, flops=2 * n * o * d * (16 if t == 1 else t + 16))
