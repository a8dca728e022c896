"""K-FAC and the curvature of single layers, held against curvlinops on small networks with and without positions."""

import pytest
import torch
from torch import nn

from fastif import KFAC, Diagonal, ExactBlock, Influence

curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed (make test installs it)")
pytestmark = pytest.mark.filterwarnings("ignore")

N = 12


class Sequence(nn.Module):
    """Linear layers over positions, then a head over them all."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 3), nn.Linear(3, 2, bias=False), nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()).tanh().flatten(1))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Linear(4, 3)), (4,)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Conv2d(3, 2, 2, bias=False),
            nn.Flatten(),
            nn.Linear(2, 3),
        ),
        (2, 4, 4),
    ),
    "positions": (Sequence, (5, 4)),
}


def problem(name):
    torch.manual_seed(0)
    build, shape = MODELS[name]
    return build().double(), torch.randn(N, *shape, dtype=torch.float64), torch.arange(N) % 3


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def arranged(dense, module):
    """A matrix over (weight, bias) as one over [o, d + 1], where the bias is the last column."""
    o = module.weight.shape[0]
    places = torch.arange(module.weight.numel()).view(o, -1)
    if module.bias is not None:
        places = torch.cat([places, module.weight.numel() + torch.arange(o)[:, None]], 1)
    order = places.flatten()
    return dense[order][:, order]


def by_layer(dense, model):
    """The diagonal blocks of a matrix over all parameters, by layer."""
    blocks, start = {}, 0
    for name, module in layers_of(model).items():
        size = sum(p.numel() for p in module.parameters())
        blocks[name] = arranged(dense[start : start + size, start : start + size], module)
        start += size
    return blocks


def close(got, want):
    return (got - want).norm() <= 1e-9 * want.norm()


def fitted(model, curvature, x, y):
    return Influence(model, curvature=curvature, layers="*", progress=False, batch_size=5).fit((x, y))


def identity_of(influence, name):
    shape = influence.capture.blocks[name].shape
    size = influence.capture.blocks[name].size
    return torch.eye(size, dtype=torch.float64).view(size, *shape)


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize(("fisher", "type_of_fisher"), [("exact", "type-2"), ("empirical", "empirical")])
def test_kfac_and_its_exactly_damped_inverse(name, fisher, type_of_fisher):
    model, x, y = problem(name)
    parameters = list(model.parameters())
    operator = curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        parameters,
        [(x, y)],
        fisher_type=type_of_fisher,
        separate_weight_and_bias=False,
        kfac_approx="expand",
        check_deterministic=False,
    )
    size = sum(p.numel() for p in parameters)
    eye = torch.eye(size, dtype=torch.float64)
    inverse = curvlinops.KFACInverseLinearOperator(operator, damping=1e-2, use_exact_damping=True) @ eye
    influence = fitted(model, KFAC(1e-2, fisher), x, y)
    matrices, inverses = by_layer(operator @ eye, model), by_layer(inverse, model)
    assert set(matrices) == set(influence.capture.blocks)
    for layer, estimator in influence.curvature.items():
        e = identity_of(influence, layer)
        made = estimator.unrotate(estimator._to_basis(e) * estimator.eigenvalues).flatten(1)
        assert close(made, matrices[layer]), layer
        assert close(estimator.solve(e).flatten(1), inverses[layer]), layer


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher"])
def test_exact_blocks_and_the_diagonal_of_every_layer(name, matrix):
    model, x, y = problem(name)
    kind = curvlinops.GGNLinearOperator if matrix == "ggn" else curvlinops.EFLinearOperator
    operator = kind(model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)])
    size = sum(p.numel() for p in model.parameters())
    wanted = by_layer(operator @ torch.eye(size, dtype=torch.float64), model)
    blocks = fitted(model, ExactBlock(1e-2, matrix), x, y)
    diagonals = fitted(model, Diagonal(1e-2, "exact" if matrix == "ggn" else "empirical"), x, y)
    for layer, want in wanted.items():
        side = len(want)
        assert close(blocks.curvature[layer].block.reshape(side, side), want), layer
        assert close(diagonals.curvature[layer].diagonal.flatten(), want.diagonal()), layer
