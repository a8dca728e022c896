"""Second moments, block by block of their lower triangle, and their eigenvectors."""

import pytest
import torch

from fastif import NotPositiveDefinite
from fastif.curvature.eigenvectors import find_eigenvectors
from fastif.model.gradients import second_moment


def test_moments_are_taken_in_blocks_of_the_lower_triangle(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("fastif.model.gradients._SIDE", 3)
    weights = torch.rand(5, dtype=torch.float64)
    for t, d in ((1, 7), (4, 8), (9, 4)):
        x = torch.randn(2, 5, d, t, dtype=torch.float64).mT  # positions fastest
        want = torch.einsum("n,sntd,snte->sde", weights, x, x).tril()
        for layout in (x, x.contiguous()):
            got = second_moment(layout, weights)
            assert torch.allclose(got.tril(), want, rtol=1e-12)
            assert second_moment(layout, weights, got) is got
            assert torch.allclose(got.tril(), 2 * want, rtol=1e-12)


def test_eigenvectors_are_found_in_the_place_of_the_matrix():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 6)
    lower = (x @ x.mT).tril()
    given = lower.clone()
    values, vectors = find_eigenvectors(given + torch.ones(6, 6).triu(1), "x")  # what stands above does not count
    whole = (lower + lower.mT - torch.diag_embed(lower.diagonal(dim1=1, dim2=2))).double()
    assert (values.dtype, vectors.dtype) == (torch.float64, torch.float32)
    assert vectors.is_contiguous()
    assert torch.allclose(values, torch.linalg.eigvalsh(whole), rtol=1e-12, atol=1e-12)
    assert torch.allclose((vectors.double() * values[:, None]) @ vectors.double().mT, whole, atol=1e-5)


def decomposes(moments, values, vectors):
    want = moments.double().tril() + moments.double().tril(-1).mT
    rebuilt = vectors.double() * values[:, None] @ vectors.double().mT
    eye = torch.eye(moments.shape[-1], dtype=torch.float64)
    return torch.allclose(rebuilt, want, atol=1e-12) and torch.allclose(vectors.mT @ vectors, eye, atol=1e-12)


@pytest.mark.parametrize("rows", [[], [0], [3, 5], [0, 1, 2, 3, 4, 5]])
def test_rows_of_zeros_are_eigenvectors_by_themselves(rows, monkeypatch):
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    x[1, :, rows] = 0  # of one of two groups, the other is left as it is
    moments, solved = x.mT @ x, []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m, **options: solved.append(m.shape[-1]) or eigh(m, **options))
    values, vectors = find_eigenvectors(moments, "x")
    assert decomposes(moments, values, vectors)
    assert min(solved) == (6 - len(rows) if 0 < len(rows) < 6 else 6)
    assert find_eigenvectors(torch.zeros(1, 3, 3), "x")[0].tolist() == [[0.0, 0.0, 0.0]]


def test_another_algorithm_takes_over_where_one_does_not_converge(monkeypatch):
    x = torch.randn(1, 4, 6, dtype=torch.float64)

    def fails(*_, **__):
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    values, vectors = find_eigenvectors(x.mT @ x, "x")
    assert decomposes(x.mT @ x, values, vectors)
    assert vectors.is_contiguous()
    monkeypatch.setattr(torch.linalg, "svd", fails)
    with pytest.raises(NotPositiveDefinite, match="the inputs of '0' has no eigenvectors that LAPACK finds"):
        find_eigenvectors(x.mT @ x, "the inputs of '0'")
