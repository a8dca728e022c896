"""DataInf, held against its formula with the gradients formed."""

import pytest
import torch

from fastif import DataInf, ExactBlock, Influence, NotPositiveDefinite
from fastif.samplers import Subset
from tests.helpers.by_hand import N, answers, by_hand, influence_of, problem

DAMPING = 3e-2


def inverse(gradients, weights, damping):
    """Σ_i (w_i / W) (W g_i g_iᵀ + λI)⁻¹ for gradients [n, P]."""
    total, eye = weights.sum(), torch.eye(gradients.shape[1], dtype=torch.float64)
    parts = [
        w / total * torch.linalg.inv(total * torch.outer(g, g) + damping * eye)
        for w, g in zip(weights, gradients, strict=True)
    ]
    return torch.stack(parts).sum(0)


@pytest.mark.parametrize("name", ["mlp", "words", "pixels"])
@pytest.mark.parametrize("slice_entries", [1 << 21, 1])
def test_it_is_the_mean_of_inverses(name, slice_entries, monkeypatch):
    monkeypatch.setattr("fastif.model.forward.SLICE", slice_entries)
    x, y = problem(name).data
    subset = Subset(torch.tensor([17, 0, 5, 9, 2]), torch.tensor([0.3, 0.1, 0.2, 0.5, 0.0], dtype=torch.float64))
    influence = influence_of(name, DataInf(DAMPING), batch_size=2).fit((x, y), subset)
    layers = influence.scores((x, y), (x, y), by="layer")
    total = 0
    for key, layer in by_hand(name).items():
        gradients = layer.gradients().flatten(1)
        want = gradients @ inverse(gradients[subset.indices], subset.weights, DAMPING) @ gradients.T / N
        assert torch.allclose(layers[key], want, rtol=1e-9, atol=1e-11 * float(want.abs().max())), key
        total = total + want
    assert torch.allclose(influence.self_influence((x, y)), total.diagonal(), rtol=1e-9)


def test_one_example_is_exact():
    x, y = problem("mlp").data
    subset = Subset(torch.tensor([4]), torch.tensor([0.7]))
    got = influence_of("mlp", DataInf(DAMPING)).fit((x, y), subset)
    want = influence_of("mlp", ExactBlock(DAMPING, "empirical_fisher")).fit((x, y), subset)
    assert torch.allclose(got.scores((x, y), (x, y)), want.scores((x, y), (x, y)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("damping", [1e-2, 1e-7])
def test_float32_does_not_cancel(damping):
    torch.manual_seed(0)
    x, y = torch.randn(6, 5), torch.arange(6) % 3
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    subset = Subset(torch.tensor([2]), torch.tensor([1.0]))
    made, values = DataInf(damping), []
    for dtype in (torch.float32, torch.float64):
        influence = Influence(model.to(dtype), curvature=made, progress=False).fit((x.to(dtype), y), subset)
        values.append((influence.self_influence((x.to(dtype), y)), influence.scores(*[(x.to(dtype), y)] * 2)))
    (single, scores), (double, _) = values
    assert torch.allclose(single.double(), double, rtol=1e-3)
    assert float(single[2]) == pytest.approx(2 / 6, rel=2e-2)  # |g|²/(λ + |g|²) of each layer
    assert (scores.diagonal() > 0).all()


def test_auto_damping_is_a_tenth_of_the_mean_square():
    data = problem("mlp").data
    influence = influence_of("mlp", DataInf()).fit(data)
    for key, layer in by_hand("mlp").items():
        assert influence.curvature[key].damping_used == pytest.approx(0.1 * float(layer.gradients().square().mean()))
    with pytest.raises(NotPositiveDefinite, match="all gradients of layer '0' are zero: damping='auto' is 0"):
        influence_of("mlp", DataInf()).fit((data[0], torch.full_like(data[1], -100)))


@pytest.mark.parametrize("name", ["words", "pixels"])
def test_states_batches_and_plans(name):
    data = problem(name).data
    influence = influence_of(name, DataInf(DAMPING), batch_size=7).fit(data)
    want = answers(influence, data)
    loaded = influence_of(name, DataInf(DAMPING), batch_size=7).load_state_dict(influence.state_dict())
    assert torch.equal(answers(loaded, data), want)
    assert torch.allclose(answers(influence_of(name, DataInf(DAMPING)).fit(data), data), want, rtol=1e-9, atol=1e-13)
    state = influence.state_dict()
    held = sum(v.nbytes for key, v in state.items() if key.rpartition(".")[2] in ("inputs", "output_grads", "matrices"))
    places = sum(v.nbytes for key, v in state.items() if key.endswith("places"))
    assert held <= influence.plan(data).curvature_bytes <= 1.2 * (held + places)


def test_bad_input():
    with pytest.raises(ValueError, match="DataInf: damping must be a number > 0 or 'auto', got 0"):
        DataInf(0)
    with pytest.raises(ValueError, match="damping must be a finite number >= 0, .* or 'auto', got -1"):
        DataInf(-1)
    with pytest.raises(ValueError, match="DataInf: not fitted; call Influence.fit first"):
        DataInf().solve(torch.zeros(1, 1, 1))
