"""The head's block and that of a whole network, held against laplace-torch."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastif import ExactBlock, Influence
from tests.curvature.test_exact_block import close, order_of
from tests.helpers.problems import trained

laplace = pytest.importorskip("laplace", reason="laplace-torch is not installed (make test installs it)")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def in_double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("part", ["last_layer", "all"])
def test_blocks_and_posterior_covariances(part):
    from laplace.curvature import CurvlinopsGGN

    problem = trained()
    n, prior = len(problem.x), 0.9
    judge = laplace.Laplace(
        problem.model,
        "classification",
        subset_of_weights=part,
        hessian_structure="full",
        prior_precision=prior,
        backend=CurvlinopsGGN,
    )
    judge.fit(DataLoader(TensorDataset(problem.x, problem.y), batch_size=n))
    influence = Influence(
        problem.model,
        curvature=ExactBlock(prior / n, joint=part == "all"),
        layers="*" if part == "all" else "2",
        progress=False,
    ).fit((problem.x, problem.y))
    order = order_of(influence)
    first = 0 if part == "all" else sum(p.numel() for p in problem.model[:2].parameters())
    order = order - first
    estimator = influence.curvature["2"]
    assert isinstance(problem.model[2], nn.Linear)
    assert close(n * estimator.block.reshape(len(order), -1), judge.H[order][:, order])
    covariance = judge.posterior_covariance[order][:, order]
    assert close(estimator.inverse() / n, covariance)
    logdet = torch.logdet(judge.posterior_precision).item()
    assert estimator.logdet() + len(order) * torch.tensor(float(n)).log().item() == pytest.approx(logdet, rel=1e-6)
