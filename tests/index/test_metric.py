"""Gradients are stored in the parameters' coordinates: queries come to them, or they to the queries."""

import pytest
import torch
from torch import nn

from fastif import EKFAC, Arnoldi, DataInf, ExactBlock, Index, Influence, answer
from fastif.curvature.eigenbasis import Eigenbasis
from fastif.index import building
from fastif.index import factors as index_factors
from fastif.index.encoder import FEW
from fastif.index.factors import Factors, runs_of
from fastif.index.metric import Metric
from fastif.index.sampling import draw
from fastif.index.thin import Thin
from fastif.index.truncation import truncate
from fastif.model.gradients import Dense, OneHot
from tests.helpers.indexed import N, convolution, fitted, linear

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def orthogonal(size):
    return torch.linalg.qr(torch.randn(1, size, size, dtype=torch.float64)).Q


def eigenbasis(o, d, table=False):
    torch.manual_seed(0)
    values = torch.rand(1, o, d, dtype=torch.float64).pow(4) * 10
    return Eigenbasis(values, 1 / (values + 0.1), None if table else orthogonal(o), orthogonal(d))


def dense(n, o, d):
    torch.manual_seed(1)
    return Dense(torch.randn(1, n, 2, d, dtype=torch.float64), torch.randn(1, n, 2, o, dtype=torch.float64))


def rows(n, o, d):
    torch.manual_seed(1)
    return OneHot(torch.randint(0, o, (n, 2)), torch.randn(n, 2, d, dtype=torch.float64), o)


def halves(matrices):
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    return u * s[:, None], v


def stored(gradients, metric):
    truncated = truncate(gradients, metric, 0.0)
    return Factors(truncated.ranks, truncated.left, truncated.right, None)


@pytest.mark.parametrize("table", [False, True])
def test_queries_meet_what_is_stored_as_in_the_basis(table):
    basis = eigenbasis(6, 9, table)
    metric = Metric.of(basis, CPU, torch.float64)
    gradients, queries = (rows(n, 6, 9) if table else dense(n, 6, 9) for n in (5, 3))
    factors, query = stored(gradients, metric), basis.rotate(queries).formed()
    wanted = (query * basis.inverse).flatten(1) @ basis.rotate(gradients).formed().flatten(1).T
    weighed = metric.weigh_query(query, torch.empty_like(query))
    torch.testing.assert_close(factors.dots(metric.to_meet(weighed)), wanted)
    torch.testing.assert_close(factors.gradients(metric.rows, metric.columns).formed(), gradients.formed())
    if not table:
        thin = metric.to_meet(Thin(*halves(weighed[:, 0])))
        torch.testing.assert_close(thin.left @ thin.right, metric.to_meet(weighed)[:, 0])
        torch.testing.assert_close(factors.turned(metric.turn, weighed).dots(weighed), wanted)


def test_its_squares_are_the_variances_that_a_querys_entries_have_outside_of_the_basis():
    basis = eigenbasis(4, 5)
    metric = Metric.of(basis, CPU, torch.float64)
    q = torch.kron(basis.output_basis[0], basis.input_basis[0])  # of uncorrelated entries with the variances x² y²
    x, y = (side[0].square() for side in metric.inside)
    covariance = q @ torch.diag((x[:, None] * y).flatten()) @ q.T
    found = (metric.rows[0].square()[:, None] * metric.columns[0].square()).flatten()
    torch.testing.assert_close(found, covariance.diagonal())


def test_factors_are_turned_where_that_is_less_work():
    metric = Metric.of(eigenbasis(6, 9), CPU, torch.float64)
    assert metric.turns_factors(1, 6)  # 6 (36 + 81) operations, and 54 (6 + 9)
    assert not metric.turns_factors(1, 7)
    assert metric.turns_factors(1, 4, gain=3)  # and 4 · 54 (1 - 1/3) more
    assert not metric.turns_factors(1, 6, gain=3)
    diagonal = Metric.of(Eigenbasis(torch.ones(1, 6, 9), torch.ones(1, 6, 9)), CPU, torch.float64)
    assert not diagonal.turns_factors(10, 1)


@pytest.mark.parametrize("numbers", [1, 40, 10**6])
@pytest.mark.parametrize("table", [False, True])
def test_runs_of_examples_are_all_of_them(numbers, table, monkeypatch):
    monkeypatch.setattr(index_factors, "ENTRIES", numbers)
    metric = Metric.of(eigenbasis(6, 9, table), CPU, torch.float64)
    factors = stored(rows(7, 6, 9) if table else dense(7, 6, 9), metric)
    parts = [factors.rows(*run) for run in runs_of([factors])]
    assert len(parts) == {1: 7, 10**6: 1}.get(numbers, len(parts))
    for name, value in Factors.cat(parts).tensors("").items():
        assert torch.equal(value, factors.tensors("")[name]), name
    assert [*runs_of([factors.rows(0, 0)])] == [(0, 0)]


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
@pytest.mark.parametrize("q", [2, 7, 70])
def test_few_queries_and_many_have_the_scores(tmp_path, dtype, q):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 64), nn.Tanh(), nn.Linear(64, 10))
    x, y = torch.randn(1200, 100) @ torch.diag(torch.rand(100).pow(3)), torch.arange(1200) % 10
    train, query = (x, y), (x[:q] + 0.1, y[:q])
    influence = Influence(model, curvature=EKFAC("auto", fisher="empirical"), progress=False).fit(train)
    index = Index.build(influence, train, tmp_path, share=1, dtype=dtype)
    found, wanted = index.scores(query), influence.scores(query, train)
    rtol = {"int8": 2e-2, "float16": 1e-3, "float32": 1e-5}[dtype]
    assert float((found - wanted).abs().max()) <= rtol * float(wanted.abs().max())


def test_blocks_of_estimators_without_a_basis_are_cut_off_by_what_solving_makes_of_examples(tmp_path):
    model, train, query, loss = convolution()
    curvature = {"0": ExactBlock(1e-2, fisher="empirical"), "*": EKFAC(1e-2, fisher="empirical")}
    influence = fitted(model, train, loss, curvature)
    index = Index.build(influence, train, tmp_path, share=0.5)
    found = index._folder.manifest["worth"]
    assert found.keys() == {"0"}
    few = draw(N, influence.setup.seed)[:FEW].sort().values
    squares = []
    for i in few.tolist():
        model.zero_grad()
        nn.functional.cross_entropy(model(train[0][i : i + 1]), train[1][i : i + 1]).backward()
        g = torch.cat([model[0].weight.grad.flatten(1), model[0].bias.grad[:, None]], 1)
        squares.append(float(influence.curvature["0"].solve(g[None].to(torch.float64)).square().mean()))
    assert found["0"] == pytest.approx(sum(squares) / FEW, rel=1e-4)
    assert 0 < index.threshold
    assert index.measured.r > 0.9
    wanted = influence.scores(query, train)
    assert float(torch.corrcoef(torch.stack([index.scores(query).flatten(), wanted.flatten()]))[0, 1]) > 0.9


@pytest.mark.parametrize("curvature", [ExactBlock(1e-2), Arnoldi(4, 1e-2)], ids=["exact", "arnoldi"])
def test_parts_of_it_are_merged_and_appended_to(tmp_path, curvature):
    """What solving makes of examples differs from part to part; it only decides what is cut off."""
    model, train, query, loss = linear()
    influence = fitted(model, train, loss, curvature)
    half = N // 2
    parts = [tuple(x[:half] for x in train), tuple(x[half:] for x in train)]
    first = Index.build(influence, parts[0], tmp_path / "first", share=0.5)
    alone = Index.build(influence, parts[1], tmp_path / "alone", share=0.5, threshold=first.threshold)
    assert alone._folder.manifest["worth"] != first._folder.manifest["worth"]
    second = Index.build(influence, parts[1], tmp_path / "second", share=0.5, threshold=first)
    answered = answer(influence, parts[1], out=tmp_path / "answered", share=0.5, threshold=first).index
    assert torch.equal(answered.scores(query), second.scores(query))
    merged = Index.merge([tmp_path / "first", tmp_path / "second"], tmp_path / "merged", influence)
    torch.testing.assert_close(merged.scores(query), first.append(parts[1]).scores(query))
    wanted = influence.scores(query, train)
    assert float(torch.corrcoef(torch.stack([merged.scores(query).flatten(), wanted.flatten()]))[0, 1]) > 0.9


def test_an_index_that_loses_the_scores_says_so(tmp_path):
    model, train, _, loss = convolution()
    with pytest.warns(UserWarning, match=r"its scores have r 0\..* with exact ones; a larger share, dtype="):
        index = Index.build(fitted(model, train, loss), train, tmp_path, share=0.05)
    assert index.measured.r < 0.9


def test_scores_on_itself_are_kept_or_made_of_what_is_kept(tmp_path):
    model, train, _, loss = convolution()
    curvature = {"0": ExactBlock(1e-2, fisher="empirical"), "*": EKFAC(1e-2, fisher="empirical")}
    influence = fitted(model, train, loss, curvature)
    wanted = influence.self_influence(train)
    kept = Index.build(influence, train, tmp_path / "kept", share=0.2, self_influence=True)
    torch.testing.assert_close(kept.self_influence(), wanted)
    made = Index.build(influence, train, tmp_path / "made", share=1, dtype="float32")
    torch.testing.assert_close(made.self_influence(), wanted, rtol=1e-4, atol=1e-7)


class Gated(nn.Module):
    """Two layers, of which the second has a gradient for the examples alone that begin with a large number."""

    def __init__(self):
        super().__init__()
        self.always, self.rarely = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x):
        return self.always(x) + self.rarely(x) * (x[:, :1] > 5)


@pytest.mark.parametrize("chosen", [[40], []], ids=["one", "none"])
@pytest.mark.parametrize("share", [0.5, 1])
def test_a_block_without_a_gradient_in_the_few_examples_is_kept_by_those_that_have_one(tmp_path, chosen, share):
    torch.manual_seed(0)
    x, y = torch.randn(N, 5), torch.arange(N) % 4
    x[chosen, 0] = 6
    query = torch.cat([x[chosen], x[:2]]), torch.cat([y[chosen], y[:2]])
    influence = fitted(Gated(), (x, y), "cross_entropy", DataInf(0.1))
    assert not set(chosen) & {*draw(N, influence.setup.seed)[:FEW].tolist()}
    index = Index.build(influence, (x, y), tmp_path, share=share, dtype="float32")
    assert (index._folder.manifest["worth"]["rarely"] == 1) == (not chosen)
    found, wanted = index.scores(query, by="layer")["rarely"], influence.scores(query, (x, y), by="layer")["rarely"]
    assert bool(wanted.any()) == bool(chosen)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kept", [True, False])
def test_a_block_of_which_all_examples_were_removed_is_passed_over(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(building, "BLOCK_BYTES", 1)  # a batch each
    model, train, query, loss = convolution()
    curvature = {"0": ExactBlock(1e-2, fisher="empirical"), "*": EKFAC(1e-2, fisher="empirical")}
    influence = fitted(model, train, loss, curvature)
    index = Index.build(influence, train, tmp_path, share=1, dtype="float32", self_influence=kept)
    before, own = index.scores(query), index.self_influence()
    gone = [*range(8), *range(56, N)]
    index.remove(torch.tensor(gone))
    left = torch.arange(8, 56)
    assert torch.equal(index.scores(query), before[:, left])
    assert torch.equal(index.self_influence(), own[left])
    assert torch.equal(index.top(query, 3).indices, left[before[:, left].topk(3).indices])


def test_one_example_of_many_factors_does_not_make_all_as_wide(monkeypatch):
    monkeypatch.setattr(index_factors, "ENTRIES", 1000)
    ranks = torch.ones((100, 1), dtype=torch.int32)
    ranks[37], ranks[38] = 60, 0
    left, right = torch.randn(158, 6), torch.randn(158, 9)
    factors = Factors(ranks, left, right, None)
    runs = [*runs_of([factors, factors])]
    assert [i for run in runs for i in range(*run)] == [*range(100)]
    for begin, end in runs:
        assert end - begin == 1 or (end - begin) * int(ranks[begin:end].max()) * 2 * (6 + 9) <= 1000
    assert len(runs) < 20
    x, y = torch.ones(1, 6), torch.ones(1, 9)
    found = torch.cat([factors.rows(*run).gradients(x, y).formed() for run in runs])
    torch.testing.assert_close(found, factors.gradients(x, y).formed())


class Averaged(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.inner(x).tanh()).mean(1)


@pytest.mark.parametrize("entries", [1 << 21, 50])
@pytest.mark.parametrize("q", [2, 60])
def test_examples_of_one_position_and_of_many_have_their_scores(tmp_path, monkeypatch, q, entries):
    monkeypatch.setattr(index_factors, "ENTRIES", entries)
    torch.manual_seed(0)
    influence = Influence(Averaged(), curvature=EKFAC(1e-2, fisher="empirical"), batch_size=1, progress=False)
    train = [(torch.randn(1, 1 if i < 40 else 1 + i % 7, 6), torch.tensor([i % 3])) for i in range(N)]
    query = [(torch.randn(1, 1 + i % 4, 6), torch.tensor([i % 3])) for i in range(q)]
    index = Index.build(influence.fit(train), train, tmp_path, share=1, dtype="float32")
    torch.testing.assert_close(index.scores(query), influence.scores(query, train), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(index.self_influence(), influence.self_influence(train), rtol=1e-4, atol=1e-5)
