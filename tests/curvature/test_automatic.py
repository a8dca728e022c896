"""curvature="auto": exact blocks from the smallest on as far as the memory goes, EK-FAC for the rest."""

import pytest
import torch
from torch import nn

from fastif import EKFAC, Automatic, ExactBlock, Influence, RelativeDamping, TrainingDamping

SIZES = {"0": 8 * 10, "2": 20 * 9, "4": 6 * 21}  # parameters with biases


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 6)).double()
    return model, (torch.randn(30, 9, dtype=torch.float64), torch.arange(30) % 6)


@pytest.mark.parametrize(
    ("number", "exact"), [(0, ""), (80, "0"), (79, ""), (149, "0"), (150, "04"), (233, "04"), (234, "024")]
)
def test_the_smallest_blocks_are_exact_as_far_as_the_memory_goes(number, exact):
    """80² + 126² lies between 149² and 150², and with 180² between 233² and 234²; eight bytes a number."""
    model, data = network()
    influence = Influence(model, curvature=Automatic(share=0.25), memory=max(1, 4 * 8 * number**2), progress=False)
    kinds = {name: layer.curvature for name, layer in influence.plan(data).layers.items()}
    assert kinds == {name: "ExactBlock" if name in exact else "EKFAC" for name in SIZES}


@pytest.mark.parametrize("damping", [1e-2, RelativeDamping(0.3), TrainingDamping(3.0, 1e-2), "auto"])
def test_scores_are_those_of_the_estimators_it_stands_for(damping):
    model, data = network()
    memory = 2 * 8 * 150**2
    exact = ExactBlock(RelativeDamping(0.1) if damping == "auto" else damping)
    given = {"2": EKFAC(damping), "*": exact}
    want = Influence(model, curvature=given, layers="*", progress=False).fit(data).scores(data, data)
    influence = Influence(model, curvature=Automatic(damping), memory=memory, progress=False).fit(data)
    assert torch.allclose(influence.scores(data, data), want, rtol=1e-9, atol=1e-12)
    loaded = Influence(model, curvature=Automatic(damping), memory=memory, progress=False)
    assert torch.equal(loaded.load_state_dict(influence.state_dict()).scores(data, data), influence.scores(data, data))


def test_auto_and_patterns():
    model, data = network()
    want = Influence(model, curvature=Automatic(), progress=False).fit(data).scores(data, data)
    assert torch.equal(Influence(model, curvature="auto", progress=False).fit(data).scores(data, data), want)
    mapped = Influence(model, curvature={"4": ExactBlock(), "*": Automatic()}, progress=False)
    assert [type(one).__name__ for one in mapped.fit(data).curvature.values()] == ["ExactBlock"] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 0.0}, r"share must be a number in \(0, 1\]"),
        ({"share": 1.5}, "got 1.5"),
        ({"fisher": "true"}, "Automatic: fisher must be 'auto', 'exact', 'monte_carlo' or 'empirical', got 'true'"),
        ({"damping": -1.0}, "damping must be"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Automatic(**arguments)
