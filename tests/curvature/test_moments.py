"""Second moments, block by block of their lower triangle, and their eigenvectors."""

import torch

from fastif.curvature.kfac import _eigenvectors
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
    values, vectors = _eigenvectors(given + torch.ones(6, 6).triu(1))  # what stands above does not count
    whole = (lower + lower.mT - torch.diag_embed(lower.diagonal(dim1=1, dim2=2))).double()
    assert (values.dtype, vectors.dtype) == (torch.float64, torch.float32)
    assert torch.allclose(values, torch.linalg.eigvalsh(whole), rtol=1e-12, atol=1e-12)
    assert torch.allclose((vectors.double() * values[:, None]) @ vectors.double().mT, whole, atol=1e-5)
