"""What a plan says before the work is what the work then takes."""

import pytest
import torch
from torch import nn

from fastif import EKFAC, KFAC, Diagonal, ExactBlock, Influence, build_info
from fastif.measure import Measure


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(500, 64), nn.Linear(64, 3)
        layer = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.head(self.encoder(self.words(x)).mean(1))


def mlp():
    sizes = (nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    return nn.Sequential(nn.Flatten(), *sizes), torch.randn(600, 1, 28, 28)


def cnn():
    body = (nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
    return nn.Sequential(*body, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 49, 10)), torch.randn(600, 1, 28, 28)


def transformer():
    return Transformer().eval(), torch.randint(0, 500, (600, 32))


@pytest.mark.skipif(not build_info()["compiled"], reason="memory is counted by the compiled extension")
@pytest.mark.parametrize("batch_size", [64, 256])
@pytest.mark.parametrize(
    "curvature",
    [EKFAC(1e-3, "empirical"), KFAC(1e-3), Diagonal(1e-3, "empirical"), ExactBlock(1e-3)],
    ids=lambda c: type(c).__name__,
)
@pytest.mark.parametrize("make", [mlp, cnn, transformer])
def test_peak_memory_of_fit_is_predicted_within_a_fifth(make, curvature, batch_size):
    torch.manual_seed(0)
    model, x = make()
    data = x, torch.arange(len(x)) % 3
    influence = Influence(model, curvature=curvature, batch_size=batch_size, progress=False)
    plan = influence.plan(data)
    with Measure() as work:
        influence.fit(data)
    assert 1 / 1.2 <= plan.fit_bytes / work.peak_bytes <= 1.2


def test_positions_bytes_and_operations_are_those_of_the_layers():
    model, x = cnn()
    plan = Influence(model, curvature=EKFAC(), layers=["0", "7"], progress=False).plan((x, torch.zeros(600).long()))
    assert {name: (layer.shape, layer.positions) for name, layer in plan.layers.items()} == {
        "0": ((1, 8, 10), 784),
        "7": ((1, 10, 785), 1),
    }
    assert plan.query_bytes == 4 * (80 + 7850)
    assert plan.curvature_bytes == 4 * (8 * 8 + 10 * 10 + 80 + 10 * 10 + 785 * 785 + 7850)
    assert plan.skipped == {"3.weight": "layers= leaves '3' out", "3.bias": "layers= leaves '3' out"}
    assert plan.fit_flops > 600 * 2 * 2 * 785 * 785
    assert "600 training examples" in str(plan)
