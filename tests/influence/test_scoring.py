"""Scores: their parts add up, whatever is kept of queries, at a time, in which form; checkpoints are averaged."""

import pytest
import torch
from torch import nn

from fastif import EKFAC, KFAC, Diagonal, ExactBlock, Identity, Influence
from fastif.curvature import LowRank
from tests.helpers.by_hand import DAMPING, N, Table, answers, by_hand, influence_of, names_of, problem
from tests.helpers.problems import wide


@pytest.mark.parametrize("estimator", [EKFAC(DAMPING), Diagonal(DAMPING, "monte_carlo")], ids=names_of)
def test_checkpoints_are_averaged(estimator):
    model, data, _ = problem("words")
    g = torch.Generator().manual_seed(1)
    states = [
        {k: v + 0.3 * torch.randn(v.shape, generator=g, dtype=v.dtype) for k, v in model.state_dict().items()}
        for _ in range(3)
    ]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    averaged = influence_of("words", estimator, checkpoints=states).fit(data)
    got = answers(averaged, data)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    parts = []
    try:
        for state in states:
            model.load_state_dict(state)
            parts.append(answers(influence_of("words", estimator).fit(data), data))
    finally:
        model.load_state_dict(before)
    want = torch.stack(parts).mean(0)
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-12 * float(want.abs().max()))
    assert not torch.allclose(parts[0], parts[1], rtol=0.1)
    values, indices = averaged.top(data, data, 3)
    scores = averaged.scores(data, data)
    assert torch.equal(values, scores.sort(dim=1, descending=True, stable=True).values[:, :3])
    assert torch.equal(scores.gather(1, indices), values)
    loaded = influence_of("words", estimator, checkpoints=states).load_state_dict(averaged.state_dict())
    assert torch.equal(answers(loaded, data), got)


def test_layers_tokens_and_groups_add_up():
    data = problem("words").data
    influence = influence_of("words", EKFAC(DAMPING), batch_size=7).fit(data)
    query = data[0][:5], data[1][:5]
    scores = influence.scores(query, data)
    layers = influence.scores(query, data, by="layer")
    assert list(layers) == ["words", "first", "second", "head"]
    assert torch.allclose(sum(layers.values()), scores, rtol=1e-10, atol=1e-15)
    groups, query_groups = torch.arange(N) % 4, torch.tensor([1, 0, 2, 1, 1])
    by_group = torch.stack([scores[:, groups == group].sum(1) for group in range(4)], 1)
    assert torch.allclose(influence.scores(query, data, groups=groups), by_group, rtol=1e-10, atol=1e-14)
    by_query = torch.stack([scores[query_groups == group].sum(0) for group in range(3)])
    assert torch.allclose(influence.scores(query, data, query_groups=query_groups), by_query, rtol=1e-9, atol=1e-14)
    both = influence.scores(query, data, groups=groups, query_groups=query_groups)
    want = torch.stack([by_query[:, groups == group].sum(1) for group in range(4)], 1)
    assert torch.allclose(both, want, rtol=1e-9, atol=1e-14)
    for name in ("groups", "query_groups"):
        with pytest.raises(TypeError, match=rf"scores: {name} must be an int64 tensor \[\d+\], got list"):
            influence.scores(query, data, **{name: [0] * (N if name == "groups" else 5)})
    with pytest.raises(ValueError, match="layer 'head' has 1 positions where others have 6; leave it out"):
        influence.scores(query, data, by="token")


@pytest.mark.parametrize("estimator", [EKFAC(DAMPING), Diagonal(DAMPING)], ids=names_of)
def test_tokens_add_up_and_are_what_each_position_adds(estimator):
    model, data, _ = problem("words")
    layers = ["words", "first", "second"]
    influence = Influence(model, curvature=estimator, layers=layers, batch_size=7, progress=False).fit(data)
    query = data[0][:5], data[1][:5]
    tokens = influence.scores(query, data, by="token")
    assert tokens.shape == (5, N, 6)
    assert torch.allclose(tokens.sum(2), influence.scores(query, data), rtol=1e-10, atol=1e-15)
    want = 0
    for key in layers:
        layer, curvature = by_hand("words")[key], influence.curvature[key]
        rows = torch.einsum("nto,ntd->ntod", layer.empirical[0], layer.a)
        rows = rows.mT if isinstance(layer, Table) else rows
        solved = curvature.solve(layer.gradients()[:5, None])[:, 0]
        want = want + torch.einsum("qod,ntod->qnt", solved, rows) / N
    assert torch.allclose(tokens, want, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ["words", "pixels"])
def test_rank_keeps_the_largest_singular_vectors_and_tells_its_error(name):
    data = problem(name).data
    influence = influence_of(name, EKFAC(DAMPING)).fit(data)
    query = data[0][:5], data[1][:5]
    scores = influence.scores(query, data)
    assert torch.allclose(influence.scores(query, data, low_rank=99), scores, rtol=1e-9, atol=1e-13)
    assert influence.low_rank_error < 1e-7
    low = influence.scores(query, data, low_rank=1)
    want, error = 0, 0.0
    for key, layer in by_hand(name).items():
        solved = influence.curvature[key].solve(layer.gradients()[:5, None])[:, 0]
        u, s, v = torch.linalg.svd(solved, full_matrices=False)
        nearest = s[:, :1, None] * u[:, :, :1] @ v[:, :1]
        want = want + torch.einsum("qod,nod->qn", nearest, layer.gradients()) / N
        error = max(error, float(((solved - nearest).flatten(1).norm(dim=1) / solved.flatten(1).norm(dim=1)).max()))
    assert torch.allclose(low, want, rtol=1e-8, atol=1e-13)
    assert influence.low_rank_error == pytest.approx(error, rel=1e-6)
    assert error > 1e-3
    alone = influence.scores(query, data, low_rank=1, query_groups=torch.arange(5))  # groups of one query
    assert torch.allclose(alone, low, rtol=1e-8, atol=1e-13)
    assert influence.low_rank_error == pytest.approx(error, rel=1e-6)
    with pytest.raises(ValueError, match="scores: low_rank must be at least 1, got 0"):
        influence.scores(query, data, low_rank=0)


def test_a_failure_in_the_middle_of_scores_releases_the_model():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
    influence = Influence(Mean(model), curvature=Identity(), progress=False)
    data = [(torch.zeros(2, 5).long(), torch.tensor([0, 1])), (torch.zeros(2, 4).long(), torch.tensor([0, 1]))]
    influence.fit(data)
    with pytest.raises(ValueError, match="one number of positions, got 5 and 4; pad") as held:
        influence.scores(data, data, by="token")
    assert held.value is not None  # the traceback keeps the frames alive
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Mean(nn.Module):
    def __init__(self, words):
        super().__init__()
        self.words = words

    def forward(self, x):
        return self.words(x).mean(1)


def test_rank_error_is_true_down_to_rounding_and_for_zero_gradients():
    matrices = torch.zeros(2, 1, 4, 4, dtype=torch.float32)
    matrices[0, 0] = torch.diag(torch.tensor([1.0, 1e-2, 1e-5, 0.0]))
    assert LowRank.approximate(matrices, 2).error == pytest.approx(1e-5, rel=1e-3)
    assert LowRank.approximate(matrices, 3).error == 0


def test_margin_of_an_ignored_label_is_refused():
    model, data = wide()
    influence = Influence(model, measurement="margin", curvature=Identity(), layers="*", progress=False).fit(data)
    with pytest.raises(ValueError, match="'margin' needs one label per example and none that is -100"):
        influence.scores((data[0][:2], torch.tensor([0, -100])), data)


@pytest.mark.parametrize("which", ["mlp", "words", "pixels"])
@pytest.mark.parametrize("make", [KFAC, EKFAC, Diagonal, ExactBlock])
def test_slices_of_a_batch_give_what_the_whole_gives(which, make, monkeypatch):
    data = problem(which).data
    results = []
    for entries in (1 << 21, 1):  # all examples at once, and one at a time
        for limit in (
            "forward.SLICE",
            "passes._TOGETHER",
            "sliced_gradients._TOGETHER",
            "gradients._ROWS",
            "gradients._SIDE",
        ):
            monkeypatch.setattr(f"fastif.model.{limit}", entries)
        monkeypatch.setattr("fastif.influence.queries.MADE", entries)
        influence = influence_of(which, make(DAMPING)).fit(data)
        by_layer = influence.scores(data, data, by="layer")
        results.append([influence.scores(data, data), influence.self_influence(data), *by_layer.values()])
    for whole, sliced in zip(*results, strict=True):
        assert torch.allclose(whole, sliced, rtol=1e-9, atol=1e-12 * float(whole.abs().max()))


def test_low_rank_holds_its_own_numbers_alone():
    """Views would keep all singular vectors in memory, and round otherwise than what ranks send."""
    near = LowRank.approximate(torch.randn(3, 1, 20, 30, generator=torch.Generator().manual_seed(0)), 2)
    assert near.left.shape == (3, 1, 20, 2)
    assert near.right.shape == (3, 1, 2, 30)
    for factor in (near.left, near.right):
        assert factor.is_contiguous()
        assert factor.untyped_storage().nbytes() == factor.nbytes
