"""What estimators say of the basis in which they are diagonal, against what they solve."""

import pytest
import torch

from fastif import CG, EKFAC, KFAC, DataInf, Diagonal, ExactBlock, Identity, Influence, Shampoo, TrainingDamping
from fastif.model.gradients import Formed
from tests.helpers.problems import trained

DIAGONAL = {
    "kfac": KFAC(1e-2),
    "ekfac": EKFAC("auto"),
    "shampoo": Shampoo(1e-2, fisher="empirical"),
    "filtered": EKFAC(TrainingDamping(10.0, 1e-2)),
    "diagonal": Diagonal(1e-2),
    "identity": Identity(),
}


def fitted(curvature):
    model, x, y = trained()
    return Influence(model, curvature=curvature, layers=["0", "2"], progress=False).fit((x, y))


@pytest.mark.parametrize("name", DIAGONAL)
def test_solves_are_products_in_the_basis(name):
    for estimator in fitted(DIAGONAL[name]).curvature.values():
        basis = estimator.eigenbasis()
        g = torch.randn(4, *estimator.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        rotated = basis.rotate(Formed(g)).formed()
        torch.testing.assert_close(rotated.flatten(1) @ rotated.flatten(1).T, g.flatten(1) @ g.flatten(1).T)
        products = (rotated * basis.inverse).flatten(1) @ rotated.flatten(1).T
        torch.testing.assert_close(products, estimator.solve(g).flatten(1) @ g.flatten(1).T)
        assert bool((basis.eigenvalues >= 0).all())
        if name in ("kfac", "diagonal"):
            torch.testing.assert_close(basis.inverse, 1 / (basis.eigenvalues + 1e-2))


@pytest.mark.parametrize("curvature", [ExactBlock(1e-2), DataInf(0.1), CG(1e-2)], ids=str)
def test_others_have_none(curvature):
    assert all(estimator.eigenbasis() is None for estimator in fitted(curvature).curvature.values())
