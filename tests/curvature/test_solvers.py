"""What CG, LiSSA and Arnoldi are made of, on dense matrices: conjugate gradients, the series, Krylov spaces."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastif import (
    Diverged,
)
from fastif import NotPositiveDefinite as Indefinite
from fastif.curvature.matrix_free.cg import conjugate_gradients
from fastif.curvature.matrix_free.krylov import krylov
from fastif.curvature.matrix_free.lissa import draw_batch, largest, neumann
from fastif.samplers import Subset
from tests.helpers.problems import residuals, rows, symmetric


def cg(a, b, damping=0.0, tolerance=1e-10, max_steps=500, **options):
    return conjugate_gradients(lambda v: v @ a.to(v), b, damping, tolerance=tolerance, max_steps=max_steps, **options)


# ------------------------------------------------------------------------------------------------------------------- CG


@given(
    size=st.integers(1, 40),
    m=st.integers(1, 5),
    spread=st.floats(0, 6),
    damping=st.sampled_from([0.0, 1e-3, 1.0]),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
    seed=st.integers(0, 99),
)
def test_cg_keeps_its_tolerance_and_tells_the_residual(size, m, spread, damping, scale, seed):
    a = symmetric(torch.logspace(-spread, 0, size), seed)
    b = rows(m, size, seed) * scale
    found = cg(a, b, damping, 1e-8, max_steps=40 * size + 40)
    true = residuals(a, found.x, b, damping)
    assert (true <= 1e-8 * 1.01).all()
    assert torch.allclose(found.residuals, true, rtol=1e-2, atol=1e-10)


def test_cg_takes_as_many_steps_as_there_are_different_eigenvalues():
    a, b = symmetric([1.0] * 10 + [2.0] * 10 + [5.0] * 10), rows(3, 30)
    assert cg(a, b).steps == 3
    assert torch.allclose(cg(a, b, 0.5).x, torch.linalg.solve(a + 0.5 * torch.eye(30, dtype=torch.float64), b.T).T)


def test_cg_rows_do_not_see_one_another():
    a, b = symmetric(torch.logspace(-4, 0, 30)), rows(4, 30)
    b[1] = 0
    eigenvector = torch.linalg.eigh(a)[1][:, 0]
    b[2] = eigenvector  # there after one step, and still from then on
    together = cg(a, b)
    assert not together.x[1].any()
    assert together.residuals[1] == 0
    for row in range(4):
        alone = cg(a, b[row : row + 1])
        assert torch.allclose(together.x[row], alone.x[0], rtol=1e-6, atol=1e-9 * float(alone.x.abs().max() + 1e-300))
    assert cg(a, b[2:3]).steps == 1
    assert cg(a, torch.zeros(2, 30, dtype=torch.float64)).steps == 0


def test_a_preconditioner_saves_steps_and_changes_nothing():
    scales = torch.logspace(0, 4, 50, dtype=torch.float64)
    a = torch.diag(scales) + symmetric(torch.rand(50))
    b = rows(3, 50)
    plain, helped = cg(a, b), cg(a, b, precondition=lambda r: r / a.diagonal())
    assert helped.steps < plain.steps / 3
    assert torch.allclose(helped.x, plain.x, rtol=1e-6, atol=1e-10)


def test_cg_in_float32_begins_anew_where_the_recursion_lies_and_says_where_it_ends():
    a, b = symmetric(torch.logspace(-2, 0, 60)), rows(2, 60)
    good = cg(a, b.float(), tolerance=1e-4, max_steps=2000)
    assert (residuals(a, good.x.double(), b.float().double()) <= 1.1e-4).all()
    least = cg(a, b.float(), tolerance=1e-14, max_steps=2000)
    assert least.steps < 2000  # it stops where it comes no further
    true = residuals(a.float().double(), least.x.double(), b.float().double())
    assert (least.residuals > 1e-14).all()
    assert (true < 1e-3).all()


@pytest.mark.parametrize("lowest", [-1e-3, -0.3, -50.0])
def test_cg_refuses_an_indefinite_matrix_with_the_damping_that_would_do(lowest):
    a, b = symmetric([lowest, *torch.linspace(0.5, 2, 19).tolist()]), rows(3, 20)
    with pytest.raises(Indefinite, match=r"the hessian with damping 1e-05 is not positive .* or matrix='ggn'") as error:
        cg(a, b, 1e-5, name="hessian")
    advised = float(str(error.value).split("; damping ")[1].split()[0])
    assert -lowest < advised <= -12 * lowest
    assert (cg(a, b, advised).residuals <= 1e-10).all()


def test_cg_refuses_nan():
    with pytest.raises(ValueError, match="in step 1 the product of the matrix with a direction holds NaN"):
        conjugate_gradients(lambda v: v * torch.nan, rows(2, 3), 1.0, tolerance=0.1, max_steps=3)
    with pytest.raises(ValueError, match="right-hand side 1 holds NaN or Inf"):
        cg(symmetric([1.0, 2.0]), torch.tensor([[1.0, 2.0], [1.0, torch.inf]], dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------- LiSSA


def repeated(a):
    while True:
        yield lambda v: v @ a


def series(a, b, damping, scale, steps=20000, tolerance=1e-9, name="matrix"):
    return neumann(repeated(a), b, damping, scale, steps=steps, tolerance=tolerance, full=lambda v: v @ a, name=name)


@pytest.mark.parametrize("scale", [1.2, 2.0, 10.0])  # half of the largest eigenvalue suffices: 2.1 / 2
def test_the_series_converges_to_the_inverse(scale):
    a, b = symmetric(torch.linspace(0, 2, 30)), rows(3, 30)
    b /= b.norm(dim=1, keepdim=True)
    b[1] = 0
    x, steps = series(a, b, 0.1, scale)
    assert not x[1].any()
    assert (residuals(a, x, b, 0.1)[[0, 2]] <= 1e-9).all()
    assert steps <= 40 * scale / 0.1
    alone, _ = series(a, b[2:], 0.1, scale)
    assert torch.allclose(x[2:], alone, rtol=1e-8, atol=1e-12)


def test_power_iteration_comes_close_from_below():
    a = symmetric([*torch.rand(40).tolist(), 1.3])
    assert 0.95 * 1.3 < largest(repeated(a), rows(1, 41)) <= 1.3 + 1e-12
    assert largest(repeated(-a), rows(1, 41)) == pytest.approx(largest(repeated(a), rows(1, 41)))
    assert largest(repeated(0 * a), rows(1, 41)) == 0


@pytest.mark.parametrize("scale", [1e-3, 0.4, 0.9])
def test_a_divergent_series_is_stopped_with_the_scale_that_would_do(scale):
    a, b = symmetric(torch.linspace(0, 2, 30)), rows(2, 30)
    b /= b.norm(dim=1, keepdim=True)
    with pytest.raises(Diverged, match=rf"scale {scale:g} the series diverges .* would do, or 'auto'") as error:
        series(a, b, 0.1, scale)
    advised = float(str(error.value).split(": scale ")[1].split()[0])
    assert 1.05 < advised < 4
    x, _ = series(a, b, 0.1, advised)
    assert (residuals(a, x, b, 0.1) <= 1e-9).all()


def test_an_indefinite_matrix_is_told_from_a_small_scale():
    a, b = symmetric([-0.5, *torch.linspace(0.1, 2, 30).tolist()]), rows(2, 31)
    with pytest.raises(Indefinite, match=r"the hessian with damping 0.1 is not positive definite.*eigenvalue") as error:
        series(a, b / b.norm(dim=1, keepdim=True), 0.1, 3.0, name="hessian")
    advised = float(str(error.value).split("; damping ")[1].split()[0])
    assert advised == 1.0


def test_draws_are_in_proportion_to_the_weights_and_carry_their_sum():
    subset = Subset(torch.tensor([7, 3, 9]), torch.tensor([0.2, 0.0, 0.6], dtype=torch.float64))
    g = torch.Generator().manual_seed(0)
    total = torch.zeros(10, dtype=torch.float64)
    for _ in range(500):
        picked = draw_batch(subset, 4, g)
        assert float(picked.weights.sum()) == pytest.approx(0.8)
        total[picked.indices] += picked.weights
    assert torch.allclose(total[[7, 3, 9]] / 500, subset.weights, atol=0.02)
    assert total[3] == 0


# -------------------------------------------------------------------------------------------------------------- Krylov


@pytest.mark.parametrize("block", [1, 3, 8])
def test_ritz_pairs_are_eigenpairs(block):
    values = [*(10 * 0.7**k for k in range(10)), *([1e-3] * 40)]
    a = symmetric(values)
    found = krylov(lambda v: v @ a, rows(block, 50), 60, 6, 1e-9)
    assert torch.allclose(found.values[:6], torch.tensor(values[:6], dtype=torch.float64), rtol=1e-8)
    errors = (found.vectors @ a - found.values[:6, None] * found.vectors).norm(dim=1)
    assert torch.allclose(errors, found.residuals[:6], atol=1e-12)
    assert (found.residuals[:6] <= 1e-8).all()
    assert torch.allclose(found.vectors @ found.vectors.T, torch.eye(6, dtype=torch.float64), atol=1e-12)


def test_residuals_of_pairs_that_are_not_there_yet_are_true():
    a = symmetric(torch.linspace(0, 1, 50))
    found = krylov(lambda v: v @ a, rows(2, 50), 5, 4, 1e-9)
    errors = (found.vectors @ a - found.values[:4, None] * found.vectors).norm(dim=1)
    assert (errors > 1e-3).any()
    assert torch.allclose(errors, found.residuals[:4], rtol=1e-9)


def test_repeated_eigenvalues_are_found_as_often_as_the_block_is_wide():
    a = symmetric([3.0] * 4 + [1.0] * 26)
    found = krylov(lambda v: v @ a, rows(4, 30), 30, 6, 1e-9)
    assert torch.allclose(found.values[:6], torch.tensor([3.0] * 4 + [1.0] * 2, dtype=torch.float64))
    assert len(krylov(lambda v: v @ a, rows(1, 30), 30, 6, 1e-9).values) == 2  # the space of one vector is that small


def test_a_space_that_products_do_not_leave_ends_the_search():
    a = symmetric([2.0, 1.0] + [0.0] * 18)
    found = krylov(lambda v: v @ a, rows(4, 20), 99, 10, 1e-9)
    assert len(found.values) <= 8
    assert torch.allclose(found.values[:3], torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64), atol=1e-12)
    assert (found.residuals < 1e-12).all()
    zero = krylov(lambda v: 0 * v, rows(2, 5), 9, 1, 1e-9)
    assert not zero.values.any()
