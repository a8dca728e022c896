"""Factors, solves and downdates of an exact block against the plain torch that a user would write."""

import copy

import pytest
import torch

from benchmarks.conftest import DEVICE
from fastif import ExactBlock
from fastif.measure import Measure

SIZES = {"c10-d129": (10, 129), "c10-d300": (10, 300)}
N, DAMPING = 5_000, 1e-3


def problem(c, d):
    g = torch.Generator().manual_seed(0)
    return torch.randn(N, d, generator=g).to(DEVICE), (3 * torch.randn(N, c, generator=g)).to(DEVICE)


@pytest.mark.parametrize("name", list(SIZES))
def test_factor_and_solve(race, name):
    c, d = SIZES[name]
    block, size, count = ExactBlock(DAMPING, in_place=False).fit(*problem(c, d)), c * d, 64
    flat = block.block.view(size, size)
    rhs = torch.randn(count, c, d, device=DEVICE)
    damped = flat.double() + DAMPING * torch.eye(size, dtype=torch.float64, device=DEVICE)

    def ours():
        block._solver.release()
        return block.solve(rhs.double()).flatten(1)

    def single():
        damped = flat + DAMPING * torch.eye(size, device=DEVICE)
        return torch.cholesky_solve(rhs.flatten(1).T, torch.linalg.cholesky(damped)).T

    def by_inverse():
        return rhs.flatten(1).double() @ torch.linalg.inv(damped)

    def residual(solved):
        return ((solved.double() @ damped - rhs.flatten(1)).norm() / rhs.norm()).item()

    with Measure(DEVICE) as work:
        worst = residual(ours())
    assert worst <= 1e-6
    peers = {"torch, float32 Cholesky": single, "torch, float64 inverse": by_inverse}
    race(
        ours,
        peers,
        rounds=3,
        residual=worst,
        residual_of_float32=residual(single()),
        condition=block.condition(),
        peak_share_of_block=None if work.peak_bytes is None else work.peak_bytes / flat.nbytes,
    )


@pytest.mark.parametrize("name", list(SIZES))
def test_factor_and_solve_in_place(race, name):
    """The block and its factor in one square: the solves of a float64 factor, refined, in a third of its memory."""
    c, d = SIZES[name]
    data, size, count = problem(c, d), c * d, 64
    within, beside = (ExactBlock(DAMPING, in_place=place).fit(*data) for place in (True, False))
    damped = beside.block.view(size, size).double() + DAMPING * torch.eye(size, dtype=torch.float64, device=DEVICE)
    rhs = torch.randn(count, c, d, dtype=torch.float64, device=DEVICE)

    def solve(block, count=count):
        block._solver.release()
        return block.solve(rhs[:count]).flatten(1)

    def single():
        damped = beside.block.view(size, size) + DAMPING * torch.eye(size, device=DEVICE)
        return torch.cholesky_solve(rhs.float().flatten(1).T, torch.linalg.cholesky(damped)).T

    def residual(solved):
        return ((solved.double() @ damped - rhs.flatten(1)).norm() / rhs.norm()).item()

    worst, beside_the_block = residual(solve(within)), residual(solve(beside))
    assert worst <= 1e-6
    with Measure(DEVICE) as work:
        solve(within, 4)
    race(
        lambda: solve(within),
        {"a float64 factor beside the block": lambda: solve(beside), "torch, float32 Cholesky": single},
        rounds=3,
        residual=worst,
        residual_beside_the_block=beside_the_block,
        residual_of_float32=residual(single()),
        condition=within.condition(),
        peak_share_of_block=None if work.peak_bytes is None else 1 + work.peak_bytes / (4 * size**2),
    )


@pytest.mark.parametrize("removed", [1, 8, 32])
def test_downdate_and_solve(race, removed):
    """Examples are taken out and one right-hand side is solved: beside the factor, or with a new one."""
    c, d = SIZES["c10-d300"]
    inputs, logits = problem(c, d)
    weights = torch.full((N,), 1 / N, device=DEVICE)
    block = ExactBlock(DAMPING, in_place=False).fit(inputs, logits)
    rhs, rows = torch.randn(c, d, device=DEVICE, dtype=torch.float64), slice(0, removed)
    factor = copy.copy(block._factored())

    def ours():
        block._solver.factor = copy.copy(factor)
        block.downdate(inputs[rows], logits[rows], weights=weights[rows])
        assert block._factored().corrected
        solved = block.solve(rhs)
        block.update(inputs[rows], logits[rows], weights=weights[rows])
        return solved

    def anew():
        block._solver.release()
        block.downdate(inputs[rows], logits[rows], weights=weights[rows])
        solved = block.solve(rhs)
        block.update(inputs[rows], logits[rows], weights=weights[rows])
        return solved

    want = anew()
    worst = ((ours() - want).norm() / want.norm()).item()
    assert worst <= 1e-5
    race(ours, {"a new factor": anew}, rounds=3, relative_error=worst, columns=removed * c, size=c * d)
