"""Functions of a matrix by products with it, held against its eigenvectors."""

import math

import pytest
import torch

from fastif.curvature.damping import TrainingDamping
from fastif.curvature.matrix_free.functions import NotSettled, apply_functions


def matrix(size, largest, dtype=torch.float64):
    """Eigenvalues from zero to `largest`, most of them small, as curvature has them."""
    g = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))
    values = largest * torch.logspace(0, -8, size, dtype=torch.float64)
    values[-3:] = 0
    return values, basis, ((basis * values) @ basis.T).to(dtype)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("largest", [1e-2, 1.0, 1e3])
def test_against_eigenvectors(dtype, close, largest):
    values, basis, a = matrix(40, largest, dtype)
    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows[2] = 0
    rows[3] = basis[:, 0]  # a space of one dimension
    rules = [TrainingDamping(7.0).filter, lambda x: (-7.0 * x).exp()]
    found = apply_functions(lambda x: x @ a, rows.to(dtype), rules, 400)
    for got, rule in zip(found, rules, strict=True):
        want = (rows @ basis * rule(values)) @ basis.T
        assert bool((got[2] == 0).all())
        away = (got.double() - want).norm(dim=1)
        rounding = torch.finfo(dtype).eps  # of A, by which the exponent of the flat directions is off
        allowed = (close + 4 * rounding * 7 * largest) * want.norm(dim=1) + 8 * rounding * rule(values).max()
        assert bool((away <= allowed).all())


def test_rows_do_not_depend_on_one_another_and_products_are_counted():
    _, _, a = matrix(30, 10.0)
    rows, counted = torch.eye(30, dtype=torch.float64)[:4], []
    together = apply_functions(lambda x: counted.append(len(x)) or x @ a, rows, [TrainingDamping(2.0).filter], 100)
    alone = torch.cat(
        [apply_functions(lambda x: x @ a, row[None], [TrainingDamping(2.0).filter], 100)[0] for row in rows]
    )
    torch.testing.assert_close(together[0], alone, rtol=1e-9, atol=1e-10)
    assert set(counted) == {4}
    assert len(counted) <= 200


def test_too_few_products_are_no_result():
    _, _, a = matrix(60, 1e6)
    with pytest.raises(NotSettled, match="after 12 products with the curvature the result still changes by"):
        apply_functions(lambda x: x @ a, torch.ones(1, 60, dtype=torch.float64), [TrainingDamping(50.0).filter], 12)


def test_a_function_that_is_not_a_number_is_no_result():
    _, _, a = matrix(30, 1.0)
    rows = torch.ones(1, 30, dtype=torch.float64)
    with pytest.raises(NotSettled, match="the result still changes by nan"):
        apply_functions(lambda x: x @ a, rows, [lambda x: x * math.nan, lambda x: x], 40)
