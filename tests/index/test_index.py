"""Scores from an index against `Influence.scores`, and what its files hold."""

import pytest
import torch

import fastif
from fastif import (
    EKFAC,
    KFAC,
    Arnoldi,
    DataInf,
    Diagonal,
    ExactBlock,
    Identity,
    Index,
    Influence,
    RandomProjection,
    Shampoo,
    TrainingDamping,
    answer,
)
from fastif.index import building
from tests.helpers.indexed import BATCH, PROBLEMS, N, bits, fitted, linear

pytestmark = pytest.mark.usefixtures("one_thread")

CURVATURES = {
    "ekfac": lambda: EKFAC(1e-2, fisher="empirical"),
    "kfac": lambda: KFAC("auto", fisher="empirical"),
    "shampoo": lambda: Shampoo(1e-2, fisher="empirical"),
    "diagonal": lambda: Diagonal(1e-2, fisher="empirical"),
    "identity": lambda: Identity(),
    "exact": lambda: ExactBlock(1e-2, fisher="empirical"),
    "exact, joint": lambda: ExactBlock(1e-2, fisher="empirical", joint=True),
    "datainf": lambda: DataInf(0.1),
    "arnoldi": lambda: Arnoldi(4, 1e-2),
    "random projection": lambda: RandomProjection(20, damping=1e-2, fisher="empirical"),
    "training damping": lambda: EKFAC(TrainingDamping(20.0), fisher="empirical"),
}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(building, "BLOCK_BYTES", 1)  # a batch each


def close(found, wanted, rtol):
    assert float((found - wanted).abs().max()) <= rtol * float(wanted.abs().max())


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("curvature", CURVATURES)
def test_with_all_numbers_in_float32_scores_are_exact(tmp_path, name, curvature, small_blocks):
    model, train, query, loss = PROBLEMS[name]()
    influence = fitted(model, train, loss, CURVATURES[curvature]())
    index = Index.build(influence, train, tmp_path / "index", share=1, dtype="float32")
    found = index.scores(query)
    close(found, influence.scores(query, train), 1e-5)
    assert found.dtype == next(model.parameters()).dtype
    by_layer, wanted = index.scores(query, by="layer"), influence.scores(query, train, by="layer")
    assert by_layer.keys() == wanted.keys()
    for layer, values in by_layer.items():
        close(values, wanted[layer], 1e-5)
    close(index.self_influence(), influence.self_influence(train), 1e-5)
    groups = torch.tensor([0, 1, 0, 2, 2, 0, 1])
    close(index.scores(query, query_groups=groups), influence.scores(query, train, query_groups=groups), 1e-5)
    values, indices, ids = index.top(query, 4)
    exact = influence.top(query, train, 4)
    close(values, exact[0], 1e-5)
    assert ids is None
    assert torch.equal(indices, exact[1])
    assert index.measured.r > 1 - 1e-6


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_scores_that_do_not_fit_are_refused_and_those_that_do_are_right(tmp_path, dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.ReLU(), torch.nn.Linear(9, 2))
    x, y = torch.randn(N, 5), torch.randn(N, 2)
    influence = fitted(model, (x, y), "mse")
    index = Index.build(influence, (x, y), tmp_path / "index", share=1, dtype=dtype)
    large = torch.cat([x[:1], 1e18 * x[1:3]]), y[:3]  # gradients of squared errors grow by 1e36
    close(index.scores(large), influence.scores(large, (x, y)), 1e-2)
    for ask in (index.scores, lambda query: index.top(query, 2)):
        with pytest.raises(
            ValueError, match=r"scores of query 1 are not finite in block '0': .* too large for float32"
        ):
            ask((torch.cat([x[:1], 1e20 * x[1:3]]), y[:3]))


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_gradients_of_one_position_are_kept_but_for_the_rounding_of_vectors(tmp_path, dtype):
    model, train, query, loss = linear()
    influence = fitted(model, train, loss)
    index = Index.build(influence, train, tmp_path / "index", share=0.99, dtype=dtype)
    assert index.threshold == 0
    assert index.share() < 0.75  # one factor of each layer
    close(index.scores(query), influence.scores(query, train), {"int8": 2e-2, "float16": 1e-3}[dtype])


@pytest.mark.parametrize("name", ["convolution", "language"])
def test_the_share_that_is_asked_for_is_met_by_one_threshold(tmp_path, name):
    model, train, query, loss = PROBLEMS[name]()
    influence = fitted(model, train, loss)
    exact, before = influence.scores(query, train), 0.5
    for share in (0.2, 0.5):
        index = Index.build(influence, train, tmp_path / f"{share}", share=share, dtype="float32")
        assert index.threshold > 0
        assert abs(index.share() / share - 1) <= 0.05
        r = float(torch.corrcoef(torch.stack([index.scores(query).flatten(), exact.flatten()]))[0, 1])
        assert r > before
        before = r


def test_what_was_measured_is_what_a_user_would_find(tmp_path):
    model, train, query, loss = PROBLEMS["language"]()
    influence = fitted(model, train, loss)
    index = Index.build(influence, train, tmp_path / "index", share=0.1)
    exact, found = influence.scores(query, train), index.scores(query)
    own = float(torch.corrcoef(torch.stack([exact.flatten(), found.flatten()]))[0, 1])
    assert index.measured.queries == N // 4
    assert abs(index.measured.r - own) < 0.1
    assert 0 < index.measured.rho <= 1
    assert 0 < index.measured.top <= 1


@pytest.mark.parametrize("name", PROBLEMS)
def test_results_do_not_depend_on_batches_and_memory(tmp_path, name):
    model, train, query, loss = PROBLEMS[name]()
    found = []
    for number, settings in enumerate(
        ({}, {"batch_size": 17}, {"memory": 1 << 14}, {"batch_size": 30, "memory": 1 << 12})
    ):
        influence = fitted(
            model, train, loss, Diagonal(1e-2, fisher="empirical"), **settings
        )  # no eigenvectors, whose signs are free
        index = Index.build(influence, train, tmp_path / f"{number}", share=0.6, dtype="float32")
        found.append(index.scores(query))
    for other in found[1:]:
        close(other, found[0], 1e-4)


def test_an_index_is_opened_later_and_needs_a_model_for_queries_alone(tmp_path):
    model, train, query, loss = linear()
    names = [f"text {i}" for i in range(N)]
    built = Index.build(
        fitted(model, train, loss), train, tmp_path, share=0.5, dtype="float16", self_influence=True, ids=names
    )
    scores = built.scores(query)
    alone = Index(tmp_path)
    assert alone.n == len(alone) == N
    assert alone.finished
    assert alone.ids() == names
    close(alone.self_influence(), fitted(model, train, loss).self_influence(train), 1e-6)
    with pytest.raises(ValueError, match="queries need the model"):
        alone.scores(query)
    later = Index(tmp_path, Influence(model, loss, EKFAC(1e-2, fisher="empirical"), batch_size=BATCH, progress=False))
    assert torch.equal(later.scores(query), scores)
    _, indices, ids = later.top(query, 3, largest=False)
    assert ids == [[names[i] for i in row] for row in indices.tolist()]
    assert torch.equal(indices, scores.argsort(dim=1, stable=True)[:, :3])
    assert "n=60, float16" in repr(later)


def test_reranking_computes_the_best_exactly(tmp_path):
    model, train, query, loss = PROBLEMS["language"]()
    influence = fitted(model, train, loss)
    index = Index.build(influence, train, tmp_path, share=0.05)
    values, indices, _ = index.top(query, 5, rerank=20, train=train)
    exact = influence.scores(query, train)
    candidates = index.top(query, 20).indices
    for row in range(len(exact)):
        best = candidates[row][exact[row, candidates[row]].argsort(descending=True)][:5]
        assert torch.equal(indices[row], best)
    close(values, exact.gather(1, indices), 1e-5)
    with pytest.raises(ValueError, match="rerank= needs train="):
        index.top(query, 5, rerank=20)
    with pytest.raises(ValueError, match="not the training data of the index"):
        index.top(query, 5, rerank=20, train=tuple(x.flip(0) for x in train))


def test_examples_are_appended_and_removed(tmp_path, small_blocks):
    model, train, query, loss = PROBLEMS["convolution"]()
    influence = fitted(model, train, loss)
    at_once = Index.build(influence, train, tmp_path / "at once", share=1, dtype="float32", ids=torch.arange(N) * 3)
    first, second = (tuple(x[rows] for x in train) for rows in (slice(0, 24), slice(24, None)))
    index = Index.build(influence, first, tmp_path / "parts", share=1, dtype="float32", ids=torch.arange(24) * 3)
    index.append(second, ids=torch.arange(24, N) * 3)
    scores = index.scores(query)
    assert torch.equal(scores, at_once.scores(query))
    assert torch.equal(index.ids(), torch.arange(N) * 3)
    with pytest.raises(ValueError, match="0 is there twice"):
        index.append(second, ids=torch.arange(24, N) * 0)
    gone = torch.tensor([3, 30, 31])
    sizes = bits(tmp_path / "parts")
    index.remove(gone)
    kept = torch.tensor([i for i in range(N) if i not in gone.tolist()])
    assert torch.equal(index.examples, kept)
    close(Index(tmp_path / "parts", influence).scores(query), scores[:, kept], 1e-6)
    _, indices, ids = index.top(query, 57)
    assert {*indices[0].tolist()} == {*kept.tolist()}
    assert ids[0] == (3 * indices[0]).tolist()
    smaller = {name for name, data in bits(tmp_path / "parts").items() if len(data) < len(sizes[name])}
    assert {"block-000000000.safetensors", "block-000000024.safetensors"} <= smaller
    with pytest.raises(ValueError, match=r"distinct numbers in \[0, 60\), got 60"):
        index.remove(torch.tensor([60]))
    with pytest.raises(ValueError, match="would leave nothing"):
        index.remove(torch.arange(N))


def test_several_answers_come_from_one_walk(tmp_path):
    model, train, query, loss = PROBLEMS["language"]()
    influence = fitted(model, train, loss, memory=1 << 14)  # not all queries at a time
    seen = []
    hook = model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    influence = fitted(model, train, loss, memory=1 << 14)
    seen.clear()
    found = answer(influence, train, query, scores=True, top=4, self_influence=True)
    close(found.scores, influence.scores(query, train), 1e-6)
    values, indices = influence.top(query, train, 4)
    close(found.top[0], values, 1e-6)
    assert torch.equal(found.top[1], indices)
    close(found.self_influence, influence.self_influence(train), 1e-6)
    assert found.index is None
    hook.remove()
    influence = fitted(model, train, loss)
    found = answer(influence, train, query, scores=True, self_influence=True, out=tmp_path / "a", share=0.3)
    close(found.scores, influence.scores(query, train), 1e-6)
    close(found.self_influence, influence.self_influence(train), 1e-6)
    Index.build(influence, train, tmp_path / "b", share=0.3, self_influence=True)
    assert bits(tmp_path / "a") == bits(tmp_path / "b")


def test_one_walk_is_one_walk():
    model, train, query, loss = linear()
    influence = fitted(model, train, loss)
    seen = []
    hook = model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    answer(influence, train, query, scores=True, top=4, self_influence=True)
    hook.remove()
    assert sum(seen) == N + len(query[0])


BAD = {
    "share": (lambda i, t, f: Index.build(i, t, f, share=0), r"share must be a number in \(0, 1\], got 0"),
    "share too small": (
        lambda i, t, f: Index.build(i, t, f, share=1e-6),
        "share=1e-06 keeps no factor of a sample of 45",
    ),
    "dtype": (lambda i, t, f: Index.build(i, t, f, dtype="int4"), "dtype must be one of 'int8', .* got 'int4'"),
    "few ids": (lambda i, t, f: Index.build(i, t, f, ids=["a"]), "one for each of 60 examples, got 1"),
    "same ids": (lambda i, t, f: Index.build(i, t, f, ids=["a", *"b" * (N - 1)]), "distinct, 'b' is there twice"),
    "iterator": (lambda i, t, f: Index.build(i, iter([t]), f), "walked through more than once"),
    "no index": (lambda i, t, f: Index(f), "holds no index"),
    "k": (lambda i, t, f: Index.build(i, t, f).top(t, 61), r"k must be an integer in \[1, n=60\], got k=61"),
    "rerank": (lambda i, t, f: Index.build(i, t, f).top(t, 3, rerank=2, train=t), r"in \[k=3, n=60\], got 2"),
    "by": (lambda i, t, f: Index.build(i, t, f).scores(t, by="token"), "by must be one of 'all', 'layer'"),
    "nothing asked": (lambda i, t, f: answer(i, t), "ask for one of"),
    "no queries": (lambda i, t, f: answer(i, t, scores=True), "query goes with scores"),
    "options": (lambda i, t, f: answer(i, t, self_influence=True, share=1), "go with out="),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(tmp_path, name):
    model, train, _, loss = linear()
    call, message = BAD[name]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(fitted(model, train, loss), train, tmp_path / "index")
    if name.startswith(("share", "dtype", "few", "same")):
        assert not (tmp_path / "index" / "manifest.json").exists()


@pytest.mark.parametrize("curvature", [fastif.CG(1e-2), fastif.LiSSA(1e-2, scale=20.0)], ids=["cg", "lissa"])
def test_estimators_that_need_the_data_for_each_query_are_refused_with_what_would_do(tmp_path, curvature):
    model, train, _, loss = linear()
    influence = fitted(model, train, loss, curvature)
    with pytest.raises(ValueError, match=r"of which no state is kept.*EKFAC, KFAC, Shampoo, Diagonal, Identity, Exact"):
        Index.build(influence, train, tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_several_checkpoints_are_refused(tmp_path):
    model, train, _, loss = linear()
    influence = fitted(model, train, loss, checkpoints=[model.state_dict()] * 2)
    with pytest.raises(ValueError, match="one model alone, got 2 checkpoints"):
        Index.build(influence, train, tmp_path)
