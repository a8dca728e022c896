"""Exact blocks of single layers and of whole networks, and their damped inverses, held against curvlinops."""

import pytest
import torch
from torch import nn

from fastif import ExactBlock, Influence
from tests.curvature.test_exact_block import close, order_of
from tests.oracles.test_curvlinops_layers import MODELS as LAYERED
from tests.oracles.test_curvlinops_layers import by_layer, problem

curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed (make test installs it)")
pytestmark = pytest.mark.filterwarnings("ignore")

N, DAMPING = 6, 1e-2
OPERATORS = {
    "ggn": curvlinops.GGNLinearOperator,
    "hessian": curvlinops.HessianLinearOperator,
    "empirical_fisher": curvlinops.EFLinearOperator,
}


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.MaxPool2d(2, 1),
            nn.Conv2d(4, 2, 2, bias=False, padding_mode="circular", padding=1),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(2, 3),
        ),
        (2, 6, 6),
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3, dilation=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
        (2, 8),
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.AdaptiveAvgPool3d(1), nn.Tanh(), nn.Flatten(), nn.Linear(2, 3)),
        (1, 3, 3, 3),
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 2, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)),
        (2, 2, 2),
    ),
    "transformer": (Transformer, (5, 4)),
}


def by_differences(model, x, y, step=1e-5):
    """The Hessian by central differences of gradients.

    What torch.func derives twice through nn.LayerNorm (torch 2.13), and curvlinops with it, is not symmetric.
    """
    parameters = list(model.parameters())
    start = nn.utils.parameters_to_vector(parameters).detach()

    def gradient(at):
        nn.utils.vector_to_parameters(at, parameters)
        return nn.utils.parameters_to_vector(torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters))

    offsets = step * torch.eye(len(start), dtype=start.dtype)
    rows = [(gradient(start + offset) - gradient(start - offset)) / (2 * step) for offset in offsets]
    nn.utils.vector_to_parameters(start, parameters)
    return torch.stack(rows)


@pytest.fixture(autouse=True)
def no_fast_path():
    """That of nn.TransformerEncoderLayer knows no forward-mode derivatives."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("matrix", list(OPERATORS))
@pytest.mark.parametrize("name", list(NETWORKS))
def test_whole_networks(name, matrix):
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    model, x, y = build().double().eval(), torch.randn(N, *shape, dtype=torch.float64), torch.arange(N) % 3
    parameters = list(model.parameters())
    size = sum(p.numel() for p in parameters)
    if (name, matrix) == ("transformer", "hessian"):
        dense, tolerance = by_differences(model, x, y), 1e-6
    else:
        operator = OPERATORS[matrix](model, nn.CrossEntropyLoss(), parameters, [(x, y)], check_deterministic=False)
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            dense, tolerance = operator @ torch.eye(size, dtype=torch.float64), 1e-10
    damping = DAMPING if matrix != "hessian" else 10.0
    influence = Influence(model, curvature=ExactBlock(damping, matrix, joint=True), progress=False, batch_size=4)
    influence.fit((x, y))
    order = order_of(influence)
    assert len(order) == size
    want = dense[order][:, order]
    estimator = next(iter(influence.curvature.values()))
    assert close(estimator.block.view(size, size), want, tolerance)
    damped = want + damping * torch.eye(size, dtype=torch.float64)
    assert close(estimator.inverse(), torch.linalg.inv(damped), tolerance)


@pytest.mark.parametrize("name", list(LAYERED))
def test_the_hessian_of_every_layer(name):
    model, x, y = problem(name)
    sizes = [len(list(module.parameters())) for module in model.modules() if list(module.parameters(recurse=False))]
    operator = curvlinops.HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)], block_sizes=sizes
    )
    size = sum(p.numel() for p in model.parameters())
    wanted = by_layer(operator @ torch.eye(size, dtype=torch.float64), model)
    influence = Influence(model, curvature=ExactBlock(10.0, "hessian"), layers="*", progress=False, batch_size=5)
    influence.fit((x, y))
    for layer, want in wanted.items():
        assert close(influence.curvature[layer].block.reshape_as(want), want), layer
