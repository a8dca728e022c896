"""Random projections, held against the same with the signs and the gradients formed."""

import pytest
import torch

from fastif import ExactBlock, Influence, RandomProjection
from fastif.curvature.projection import signs
from fastif.samplers import Subset
from tests.helpers.by_hand import N, answers, by_hand, influence_of, problem

DAMPING = 1e-2
CPU = torch.device("cpu")


def projection(name, k, seed=0):
    """S over all blocks, [k, P], in the order of the layers."""
    parts = []
    for key, layer in by_hand(name).items():
        size = layer.gradients()[0].numel()
        parts.append(signs(seed, key, size, 0, -(-k // 32), CPU)[:k].double() / k**0.5)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", ["mlp", "words", "pixels"])
@pytest.mark.parametrize("entries", [1 << 23, 1])
def test_it_is_the_curvature_of_projected_gradients(name, entries, monkeypatch):
    monkeypatch.setattr("fastif.curvature.limits.SIGNS_MADE", entries)
    monkeypatch.setattr("fastif.curvature.limits.SIGNS_KEPT", entries)
    x, y = problem(name).data
    subset = Subset(torch.tensor([17, 0, 5, 9, 2]), torch.tensor([0.3, 0.1, 0.2, 0.5, 0.0], dtype=torch.float64))
    influence = influence_of(name, RandomProjection(70, DAMPING), batch_size=7).fit((x, y), subset)
    g = torch.cat([layer.gradients().flatten(1) for layer in by_hand(name).values()], 1)
    s = projection(name, 70)
    rows = g @ s.T
    moment = rows[subset.indices].T @ (rows[subset.indices] * subset.weights[:, None])
    inverse = torch.linalg.inv(moment + DAMPING * torch.eye(70, dtype=torch.float64))
    want = rows @ inverse @ rows.T / N
    scores = influence.scores((x, y), (x, y))
    assert torch.allclose(scores, want, rtol=1e-9, atol=1e-11 * float(want.abs().max()))
    assert torch.allclose(sum(influence.scores((x, y), (x, y), by="layer").values()), want, rtol=1e-9, atol=1e-9)
    assert torch.allclose(influence.self_influence((x, y)), want.diagonal(), rtol=1e-9)
    change = influence.on_parameters((x[:3], y[:3]))
    moved = -(s.T @ inverse @ rows[:3].sum(0))
    assert float(sum(v.square().sum() for v in change.values())) == pytest.approx(float(moved.square().sum()))
    low = influence.scores((x, y), (x, y), low_rank=99)  # through `solve`
    assert torch.allclose(low, want, rtol=1e-8, atol=1e-9)


def test_signs_are_fair_and_independent():
    s = signs(3, "layer", 4096, 0, 8, CPU).double()
    assert s.shape == (256, 4096)
    assert s.abs().min() == 1
    assert abs(float(s.mean())) < 5 / (256 * 4096) ** 0.5
    rows = s @ s.T / 4096
    columns = s.T @ s / 256
    for products, n in ((rows, 4096), (columns, 256)):
        off = products[~torch.eye(len(products), dtype=torch.bool)]
        assert float(off.square().mean()) * n == pytest.approx(1, rel=0.05)  # the variance of independent signs
        assert float(off.abs().max()) < 6.5 / n**0.5
    triples = s[:-2] * s[1:-1] * s[2:]
    assert abs(float(triples.mean())) < 5 / triples.numel() ** 0.5


def test_signs_are_those_of_their_place():
    whole = signs(0, "a", 100, 0, 4, CPU)
    assert torch.equal(signs(0, "a", 100, 2, 1, CPU), whole[64:96])
    assert torch.equal(signs(0, "a", 60, 0, 4, CPU), whole[:, :60])
    for other in (signs(1, "a", 100, 0, 4, CPU), signs(0, "b", 100, 0, 4, CPU)):
        assert 0.4 < float((other == whole).double().mean()) < 0.6
    assert whole[:3, :8].tolist() == EXPECTED  # on every machine, in every version


EXPECTED = [[1, 1, -1, 1, -1, -1, -1, 1], [-1, -1, -1, -1, -1, -1, 1, 1], [-1, -1, -1, 1, -1, 1, 1, -1]]


def test_projected_scores_go_to_those_of_the_whole_matrix():
    data = problem("mlp").data
    made = ExactBlock(0.3, "empirical_fisher", joint=True)
    want = influence_of("mlp", made).fit(data).scores(data, data)
    errors = []
    for k in (64, 4096):
        got = influence_of("mlp", RandomProjection(k, 0.3)).fit(data).scores(data, data)
        errors.append(float((got - want).norm() / want.norm()))
    assert errors[1] < 0.15
    assert errors[1] < errors[0] / 4  # √64 = 8 in expectation


def test_exact_fisher_projects_the_ggn():
    data = problem("mlp").data
    want = influence_of("mlp", ExactBlock(0.3, joint=True)).fit(data).scores(data, data)
    got = influence_of("mlp", RandomProjection(4096, 0.3, "exact")).fit(data).scores(data, data)
    assert float((got - want).norm()) < 0.15 * float(want.norm())


@pytest.mark.parametrize("name", ["words", "pixels"])
def test_batches_memory_and_states(name):
    data = problem(name).data
    influence = influence_of(name, RandomProjection(40, DAMPING), batch_size=5, memory=4000).fit(data)
    want = answers(influence, data)
    assert torch.allclose(answers(influence_of(name, RandomProjection(40, DAMPING)).fit(data), data), want, rtol=1e-8)
    loaded = influence_of(name, RandomProjection(40, DAMPING), batch_size=5, memory=4000)
    assert torch.equal(answers(loaded.load_state_dict(influence.state_dict()), data), want)
    other = influence_of(name, RandomProjection(40, DAMPING, seed=1)).fit(data)
    assert not torch.allclose(answers(other, data), want, rtol=1e-2)
    size = sum(block.size for block in influence.capture.blocks.values())
    assert influence.plan(data).curvature_bytes == 2 * 8 * 40**2 + 40 * size * 8


def test_a_mapping_shares_a_projection_among_its_layers():
    data = problem("words").data
    mixed = influence_of("words", {"words": RandomProjection(40, DAMPING), "*": RandomProjection(50, DAMPING)}).fit(
        data
    )
    alone = Influence(problem("words").model, curvature=RandomProjection(40, DAMPING), layers="words", progress=False)
    layers = mixed.scores(data, data, by="layer")
    assert torch.allclose(layers["words"], alone.fit(data).scores(data, data), rtol=1e-9)
    assert mixed.curvature["first"] is mixed.curvature["head"] is not mixed.curvature["words"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RandomProjection(0), "RandomProjection: dimension must be an integer >= 1, got 0"),
        (lambda: RandomProjection(8, 0), "RandomProjection: damping must be a number > 0 or a TrainingDamping, got 0"),
        (lambda: RandomProjection(8, -1), "damping must be a finite number >= 0"),
        (
            lambda: RandomProjection(8, fisher="true"),
            "fisher must be 'auto', 'exact', 'monte_carlo' or 'empirical', got 'true'",
        ),
        (lambda: RandomProjection().factor, "RandomProjection: not fitted; call Influence.fit first"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
