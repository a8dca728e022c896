"""Per-sample gradients and their norms, held against opacus on a layer with and without positions."""

import pytest
import torch
from torch import nn

from fastif.ops import per_sample_grad

opacus = pytest.importorskip("opacus.grad_sample", reason="opacus is not installed (make test installs it)")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("positions", [1, 6])
def test_gradients_norms_and_sums(positions):
    torch.manual_seed(0)
    layer = nn.Linear(5, 4, bias=False).double()
    inputs = torch.randn(9, positions, 5, dtype=torch.float64)
    module = opacus.GradSampleModule(layer, loss_reduction="sum")
    outputs = module(inputs)
    outputs.retain_grad()
    (outputs.square().sum((1, 2)) * torch.arange(1.0, 10)).sum().backward()
    gradients = layer.weight.grad_sample  # [9, 4, 5]

    u = outputs.grad
    assert torch.allclose(per_sample_grad.sq_norms(inputs, u), gradients.square().sum((1, 2)), rtol=1e-12)
    assert torch.allclose(per_sample_grad.accumulate(inputs, u)[0], gradients.sum(0), rtol=1e-12)
    directions = torch.randn(3, 4, 5, dtype=torch.float64)
    want = torch.einsum("qod,nod->qn", directions, gradients)
    assert torch.allclose(per_sample_grad.dots(inputs, u, directions), want, rtol=1e-11, atol=1e-12)
