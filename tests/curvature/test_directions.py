"""Queries of few positions stand in their factors until they are all there, then in the form that memory allows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastif.influence.queries
from fastif import EKFAC, KFAC, Diagonal, Influence
from fastif.curvature import Explicit
from fastif.curvature.directions import QueryFactors
from fastif.measure import MEMORY_BY, Measure
from fastif.model.gradients import Dense
from tests.helpers.captures import gradients_of
from tests.helpers.problems import wide


class Words(nn.Module):
    """Features by position; their mean is classified."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.first, self.last = nn.Linear(width, 40), nn.Linear(40, 3)

    def forward(self, x):
        return self.last(self.first(x).tanh().mean(1))


def convolutional() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 20, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(80, 3)).double()
    return model, (torch.randn(23, 8, 5, 5, generator=g).double(), torch.randint(3, (23,), generator=g))


def by_words(t: int = 3) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(t)
    torch.manual_seed(0)
    model = Words().double()
    return model, (torch.randn(23, t, 24, generator=g).double(), torch.randint(3, (23,), generator=g))


def defined(influence: Influence, query, train, layers: str = "*") -> torch.Tensor:
    """The scores by matrices: solved query gradients times training gradients, block by block."""
    formed = [
        {name: g.formed() for name, g in gradients_of(influence.model, layers, data).items()} for data in (query, train)
    ]
    parts = [
        torch.einsum("qsod,nsod->qn", influence.curvature[name].solve(formed[0][name]), formed[1][name])
        for name in formed[0]
    ]
    return torch.stack(parts).sum(0) / influence.n


@pytest.fixture
def forms(monkeypatch):
    """By name of a block the form that its queries were held in, in the order of the blocks of queries."""
    seen: list[dict[str, list[str]]] = []
    settle = fastif.influence.queries._Held.settle

    def told(self, room):
        parts = settle(self, room)
        seen.append({name: [type(part).__name__ for part in of_block] for name, of_block in parts.items()})
        return parts

    monkeypatch.setattr(fastif.influence.queries._Held, "settle", told)
    return seen


@pytest.mark.parametrize("estimator", [KFAC, EKFAC])
@pytest.mark.parametrize("make", [convolutional, by_words])
def test_whatever_the_form_the_scores_are_the_definitions(make, estimator, forms):
    model, data = make()
    name = next(name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear))
    size = sum(p.numel() for p in model.parameters()) * 8
    for memory, form in (
        (len(data[0]) * size, "Explicit"),
        (len(data[0]) * size // 2, "QueryFactors"),
        (1, "Explicit"),
    ):
        forms.clear()
        influence = Influence(model, curvature=estimator(1e-2), layers="*", memory=memory, progress=False).fit(data)
        scores = influence.scores(data, data)
        assert torch.allclose(scores, defined(influence, data, data), rtol=1e-9, atol=1e-12)
        if memory > 1:  # else a single query at a time, whose matrices are over the limit as its factors are
            assert forms == [{**forms[0], name: [form]}]


@pytest.mark.parametrize(("curvature", "passes"), [(KFAC(1e-2), 1), (Diagonal(1e-2), 4)])
def test_passes_over_the_training_data_are_as_many_as_planned(forms, capsys, curvature, passes):
    """Of factors all queries are there at once; of matrices six."""
    model, data = by_words()
    size = sum(p.numel() for p in model.parameters()) * 8
    influence = Influence(model, curvature=curvature, layers="*", memory=6 * size).fit(data)
    plan = influence.plan(data, data)
    assert plan.score_passes == passes
    assert f"in {passes} pass{'es' if passes > 1 else ''} over the training data" in str(plan)
    forms.clear()
    capsys.readouterr()
    influence.scores(data, data)
    assert len(forms) == passes
    assert ("scores, queries 7 to 12 of 23" if passes > 1 else "scores:") in capsys.readouterr().err


def test_queries_in_a_folder_are_as_many_at_a_time_as_their_factors_allow(tmp_path):
    model, data = by_words()
    size, numbers = sum(p.numel() for p in model.parameters()), 3 * (40 + 25) + (3 + 41)
    influence = Influence(model, curvature=KFAC(1e-2), layers="*", memory=8 * numbers * 10, progress=False).fit(data)
    assert 4 * numbers < size
    stored = influence.scores(data, data, out=tmp_path)
    assert [len(block.values) for block in stored.blocks()] == [10, 10, 3]
    assert torch.allclose(stored.load(), influence.scores(data, data), rtol=1e-9, atol=1e-12)


def test_queries_of_several_lengths_are_held_together(forms):
    model, _ = by_words()
    batches = [by_words(t)[1] for t in (1, 2, 3, 9)]  # nine positions are too many for factors to be smaller
    train = by_words(4)[1]
    for separable in (None, 1e-9):
        influence = Influence(
            model, curvature=EKFAC(1e-2, separable=separable), layers="*", memory=1 << 16, progress=False
        ).fit(train)
        want = torch.cat([defined(influence, batch, train) for batch in batches])
        assert torch.allclose(influence.scores(batches, train), want, rtol=1e-7, atol=1e-12)
    assert {"QueryFactors", "Explicit", "Separable"} <= {form for seen in forms for form in seen["first"]}


def test_factors_of_a_long_query_do_not_lengthen_those_of_short_ones_beyond_memory(monkeypatch):
    """All factors that are held together take as many positions as the longest."""
    torch.manual_seed(0)
    model, held = Words(width=96).double(), []
    settle = fastif.influence.queries._Held.settle

    def told(self, room):
        parts = settle(self, room)
        held.append(sum(part.nbytes for of_block in parts.values() for part in of_block))
        return parts

    monkeypatch.setattr(fastif.influence.queries._Held, "settle", told)
    g = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(n, t, 96, generator=g).double(), torch.arange(n) % 3) for n, t in ((60, 1), (2, 14), (5, 2))
    ]
    train, memory = batches[-1], 1 << 17
    influence = Influence(model, curvature=KFAC(1e-2), layers="first", memory=memory, progress=False).fit(train)
    scores = influence.scores(batches, train)
    assert max(held) <= memory
    assert len(held) == 2  # the first queries, and the others
    want = [defined(influence, batch, train, "first") for batch in batches]
    assert torch.allclose(scores, torch.cat(want), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["convolution", "linear"])
def test_separable_scores_of_training_gradients_that_come_in_slices(kind, monkeypatch):
    """The moments of a convolution are taken without its patches; a layer may see more than is to stand at once."""
    monkeypatch.setattr("fastif.model.forward.SLICE", 1 << 12)
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    first = nn.Conv2d(8, 40, 4) if kind == "convolution" else nn.Sequential(nn.Flatten(), nn.Linear(128, 40))
    model = nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(40, 3)).double()
    data = torch.randn(200, 8, 4, 4, generator=g).double(), torch.arange(200) % 3
    query = data[0][:30], data[1][:30]
    influence = Influence(model, curvature=EKFAC(1e-2, separable=1e-3), layers="*", progress=False).fit(data)
    scores, want = influence.scores(query, data), defined(influence, query, data)
    name = next(iter(influence.curvature))
    assert influence.curvature[name].separable_rank is not None
    assert 0 < (scores - want).norm() <= 2e-3 * want.norm()


@given(t=st.integers(1, 12), o=st.integers(1, 30), d=st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_factors_suit_where_they_take_half(t, o, d):
    gradients = Dense(torch.zeros(1, 2, t, d), torch.zeros(1, 2, t, o))
    assert QueryFactors.size(gradients) == (t * (o + d) if t == 1 or 2 * t * (o + d) <= o * d else None)
    assert QueryFactors.size(Dense(torch.zeros(2, 2, t, d), torch.zeros(2, 2, t, o))) is None  # of groups


@pytest.mark.skipif(MEMORY_BY != "allocations", reason="memory is counted by fastif._memory")
def test_factors_take_less_memory_than_matrices():
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 256, 3))
    data = torch.randn(40, 4, 256, generator=g), torch.randint(3, (40,), generator=g)
    peaks = []
    for memory in (1 << 27, 1 << 20):
        influence = Influence(model, curvature=KFAC(1e-2), layers="0", memory=memory, progress=False).fit(data)
        with Measure("cpu") as work:
            influence.scores(data, data)
        peaks.append(work.peak_bytes)
    matrices, factors = 40 * 256 * 257 * 4, 40 * 4 * (256 + 257) * 4
    assert peaks[0] > matrices
    assert peaks[1] < peaks[0] - matrices + factors + (1 << 24)  # 8 MiB of training gradients, 4 of queries


def test_matrices_are_turned_back_in_parts(monkeypatch):
    monkeypatch.setattr("fastif.curvature.limits.QUERY_MATRIX_ENTRIES", 3 * 40 * 25)
    monkeypatch.setattr("fastif.curvature.limits.TRAIN_MATRIX_ENTRIES", 4 * 40 * 25)
    model, data = by_words()
    influence = Influence(model, curvature=EKFAC(1e-2), layers="first", progress=False).fit(data)
    block, g = influence.curvature["first"], gradients_of(model, "first", data)["first"]
    want = torch.einsum("qsod,nsod->qn", block.solve(g.formed()), g.formed())
    held = block.directions(g)
    assert isinstance(held, QueryFactors)
    assert held.nbytes == 23 * 3 * (40 + 25) * 8
    explicit = held.settle(23 * 40 * 25 * 8)
    assert isinstance(explicit, Explicit)
    assert held.settle(23 * 40 * 25 * 8 - 1) is held
    for form in (held, explicit, QueryFactors.join([block.directions(g.rows(0, 5)), block.directions(g.rows(5, 23))])):
        assert torch.allclose(form.dots(g), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", [KFAC, EKFAC])
def test_queries_of_one_position_are_kept_in_their_factors(estimator):
    """Few of them are turned back into matrices, many are not; the scores are those of the definition."""
    model, data = wide()
    influence = Influence(model, curvature=estimator(1e-2), layers="0", progress=False).fit(data)
    block, g = influence.curvature["0"], gradients_of(model, "0", data)["0"]
    want = torch.einsum("qsod,nsod->qn", block.solve(g.formed()), g.formed()) / len(g)
    assert torch.allclose(influence.scores(data, data), want, rtol=1e-9, atol=1e-12)
    first = tuple(part[:1] for part in data)
    assert 30 * 30 + 41 * 41 > 30 * 41  # more work than the dot products of one query
    assert torch.allclose(influence.scores(first, data), want[:1], rtol=1e-9, atol=1e-12)
    directions = block.directions(g)
    assert directions.nbytes == len(g) * (30 + 41) * 8
    assert torch.allclose(directions.dots(g) / len(g), want, rtol=1e-9, atol=1e-12)
