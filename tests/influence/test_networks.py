"""Networks trained on halves: scores of each are brought to one scale and averaged, with an error bar."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

from fastif import CG, EKFAC, Arnoldi, Diagonal, ExactBlock, Influence, Networks, ScoreFolder, Subset
from tests.helpers.problems import clusters

N, Q = 40, 7
X, Y = clusters(N, 0)
TRAIN, QUERY = (X, Y), (X[:Q] + 0.1, Y[:Q])
ESTIMATORS = [EKFAC(1e-2), Diagonal(1e-2), ExactBlock(1e-2), CG(1e-2, tolerance=1e-9), Arnoldi(30, 1e-2)]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def halves(pairs):
    draw = torch.Generator().manual_seed(1)
    orders = [torch.randperm(N, generator=draw) for _ in range(pairs)]
    kept = [half for order in orders for half in (order[: N // 2], order[N // 2 :])]
    return Networks([net(seed).state_dict() for seed in range(2 * pairs)], kept)


def influence_of(networks, curvature=None, **arguments):
    model = net(99)
    arguments = {"layers": "*", "progress": False, **arguments}
    return Influence(model, curvature=curvature or EKFAC(1e-2), networks=networks, **arguments)


def one_by_one(networks, curvature, of, subset=None):
    """What each network gives alone, with the curvature of what it was trained on."""
    found = []
    for state, kept in zip(networks.states, networks.kept, strict=True):
        model = net()
        model.load_state_dict(state)
        own = Subset(kept, torch.full((len(kept),), 1 / len(kept), dtype=torch.float64))
        if subset is not None:
            inside = torch.isin(subset.indices, kept)
            own = Subset(subset.indices[inside], subset.weights[inside] * N / len(kept))
        influence = Influence(model, curvature=curvature, layers="*", progress=False).fit(TRAIN, subset=own)
        found.append(of(influence))
    return torch.stack(found)


def averaged(parts, rows):
    """By the definition, docs/math.md (23): parts [networks, q, n, ...], of rows [networks, q, n]."""
    sigma = rows.std(dim=2, correction=0)
    scale = sigma.quantile(0.5, dim=0)
    extra = [1] * (parts.dim() - 2)
    units = (parts / sigma.view(*sigma.shape, *extra)) * scale.view(-1, *extra)
    pairs = units.view(-1, 2, *units.shape[1:]).mean(1)
    return units.mean(0), pairs.std(dim=0) / len(pairs) ** 0.5


@pytest.mark.parametrize("curvature", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_rows_are_averaged_at_one_scale(curvature):
    networks = halves(3)
    rows = one_by_one(networks, curvature, lambda influence: influence.scores(QUERY, TRAIN))
    want, error = averaged(rows, rows)
    influence = influence_of(networks, curvature).fit(TRAIN)
    scores, errors = influence.scores(QUERY, TRAIN, spread=True)
    assert torch.allclose(scores, want, rtol=1e-7, atol=1e-9 * float(want.abs().max()))
    assert torch.allclose(errors, error, rtol=1e-6, atol=1e-9 * float(want.abs().max()))
    assert torch.equal(influence.scores(QUERY, TRAIN), scores)


def test_parts_groups_self_influence_and_subsets():
    networks = halves(2)
    subset = Subset(torch.arange(0, N, 2), torch.linspace(0.02, 0.08, N // 2, dtype=torch.float64))
    rows = one_by_one(networks, EKFAC(1e-2), lambda influence: influence.scores(QUERY, TRAIN), subset)
    influence = influence_of(networks).fit(TRAIN, subset=subset)
    scores = influence.scores(QUERY, TRAIN)
    assert torch.allclose(scores, averaged(rows, rows)[0], rtol=1e-9, atol=1e-12)

    first = one_by_one(networks, EKFAC(1e-2), lambda i: i.scores(QUERY, TRAIN, by="layer")["0"], subset)
    layers, errors = influence.scores(QUERY, TRAIN, by="layer", spread=True)
    want, error = averaged(first, rows)
    assert torch.allclose(layers["0"], want, rtol=1e-9, atol=1e-12)
    assert torch.allclose(errors["0"], error, rtol=1e-7, atol=1e-12)
    assert torch.allclose(sum(layers.values()), scores, rtol=1e-9, atol=1e-12)

    groups = torch.arange(N) % 4
    sums = torch.stack([scores[:, groups == group].sum(1) for group in range(4)], 1)
    assert torch.allclose(influence.scores(QUERY, TRAIN, groups=groups), sums, rtol=1e-9, atol=1e-12)
    query_groups = torch.tensor([0, 1, 0, 1, 2, 2, 2])
    summed = torch.stack([rows[:, query_groups == group].sum(1) for group in range(3)], 1)
    by_query = influence.scores(QUERY, TRAIN, query_groups=query_groups)
    assert torch.allclose(by_query, averaged(summed, summed)[0], rtol=1e-9, atol=1e-12)

    own = one_by_one(networks, EKFAC(1e-2), lambda i: i.self_influence(TRAIN)[None], subset)
    want, error = averaged(own, own)
    got, errors = influence.self_influence(TRAIN, spread=True)
    assert torch.allclose(got, want[0], rtol=1e-9)
    assert torch.allclose(errors, error[0], rtol=1e-7)
    assert torch.equal(influence.self_influence(TRAIN), got)

    loaded = influence_of(networks).load_state_dict(influence.state_dict())
    assert torch.equal(loaded.scores(QUERY, TRAIN), scores)


def test_top_ranks_by_the_score_or_by_what_is_certain():
    influence = influence_of(halves(3)).fit(TRAIN)
    scores, errors = influence.scores(QUERY, TRAIN, spread=True)
    values, indices = influence.top(QUERY, TRAIN, 5)
    assert torch.equal(values, scores.sort(dim=1, descending=True, stable=True).values[:, :5])
    assert torch.equal(scores.gather(1, indices), values)
    for largest in (True, False):
        bound = scores - 2 * errors if largest else scores + 2 * errors
        values, indices = influence.top(QUERY, TRAIN, 5, largest=largest, certainty=2)
        assert torch.equal(values, bound.sort(dim=1, descending=largest, stable=True).values[:, :5])
        assert torch.equal(bound.gather(1, indices), values)


@pytest.mark.parametrize("by", ["all", "layer"])
def test_a_folder_holds_the_mean_and_each_network(tmp_path, by):
    networks = halves(2)
    influence = influence_of(networks, batch_size=16).fit(TRAIN)
    scores, errors = influence.scores(QUERY, TRAIN, by=by, spread=True)
    if by == "layer":
        scores, errors = (torch.stack([*parts.values()], 2) for parts in (scores, errors))
    folder, error_folder = influence.scores(QUERY, TRAIN, by=by, spread=True, out=tmp_path / "scores")
    assert torch.allclose(folder.load(), scores, rtol=1e-12, atol=1e-15)
    assert torch.allclose(error_folder.load(), errors, rtol=1e-9, atol=1e-15)
    one = ScoreFolder(tmp_path / "scores" / "network-01").load()
    alone = Influence(net(), curvature=EKFAC(1e-2), layers="*", checkpoints=[networks.states[1]], progress=False)
    alone.fit(TRAIN, subset=Subset(networks.kept[1], torch.full((N // 2,), 2 / N, dtype=torch.float64)))
    want = alone.scores(QUERY, TRAIN, by=by)
    want = torch.stack([*want.values()], 2) if by == "layer" else want
    assert torch.allclose(one, want, rtol=1e-12, atol=1e-15)

    for block in (tmp_path / "scores").glob("scores-*.npy"):
        block.unlink()
    again = influence.scores(QUERY, TRAIN, by=by, out=tmp_path / "scores", resume=True)
    assert torch.equal(again.load(), folder.load())
    with pytest.raises(ValueError, match="holds scores already"):
        influence.scores(QUERY, TRAIN, by=by, out=tmp_path / "scores")
    others = networks._replace(kept=[networks.kept[1], networks.kept[0], *networks.kept[2:]])
    with pytest.raises(ValueError, match="networks was"):
        influence_of(others, batch_size=16).fit(TRAIN).scores(QUERY, TRAIN, by=by, out=tmp_path / "scores", resume=True)
    settings = json.loads((tmp_path / "scores" / "manifest.json").read_text())["settings"]
    assert settings["what"] == "scores"


@pytest.mark.parametrize("again", [copy.deepcopy, lambda influence: pickle.loads(pickle.dumps(influence))])
def test_a_copy_is_of_the_networks_too(again):
    influence = influence_of(halves(2)).fit(TRAIN)
    scores, errors = influence.scores(QUERY, TRAIN, spread=True)
    copied = again(influence).scores(QUERY, TRAIN, spread=True)
    assert torch.equal(copied[0], scores)
    assert torch.equal(copied[1], errors)


def test_plans_count_every_network():
    one, three = (influence_of(halves(3).first(number)).plan(TRAIN, QUERY) for number in (2, 6))
    assert three.curvature_bytes == 3 * one.curvature_bytes
    assert three.fit_flops == pytest.approx(3 * one.fit_flops)
    assert three.score_passes == 3 * one.score_passes


def test_a_query_without_gradients_has_scores_of_zero():
    def loss(outputs, batch):
        return nn.functional.cross_entropy(outputs, batch, reduction="none") * (batch >= 0)

    query = QUERY[0], QUERY[1].clone()

    def measurement(outputs, batch):
        return nn.functional.cross_entropy(outputs, batch, reduction="none") * (torch.arange(len(batch)) > 0)

    influence = influence_of(halves(2), loss=loss, measurement=measurement, batch_size=64).fit(TRAIN)
    scores, errors = influence.scores(query, TRAIN, spread=True)
    assert (scores[0] == 0).all()
    assert (errors[0] == 0).all()
    assert (scores[1:] != 0).all()


REFUSED = [
    (lambda: influence_of([net().state_dict()]), TypeError, r"networks must be fastif\.Networks, got list"),
    (lambda: influence_of(Networks([], [])), ValueError, "at least one, got 0 states and 0 tensors"),
    (lambda: influence_of(Networks([net().state_dict()], [])), ValueError, "got 1 states and 0 tensors"),
    (lambda: influence_of(Networks([{}], [torch.tensor([1.0])])), TypeError, r"kept\[0\] must be an int64 tensor"),
    (lambda: influence_of(Networks([{}], [torch.tensor([1, 1])])), ValueError, r"kept\[0\] must hold distinct indices"),
    (lambda: influence_of(halves(1), checkpoints=[net().state_dict()]), ValueError, "exclude each other"),
    (
        lambda: influence_of(Networks([net().state_dict()], [torch.tensor([3, N])])).fit(TRAIN),
        ValueError,
        rf"network 0 was trained on example {N}, outside \[0, n={N}\)",
    ),
    (
        lambda: influence_of(halves(1)).fit(TRAIN, subset=Subset(halves(1).kept[0][:3], torch.full((3,), 1 / 3))),
        ValueError,
        "a network was trained on none of the subset's 3 examples",
    ),
    (
        lambda: influence_of(halves(1)).fit(TRAIN).scores(QUERY, TRAIN, spread=True),
        ValueError,
        "needs at least two pairs of halves to tell how far they differ, got 1",
    ),
    (lambda: influence_of(halves(1)).fit(TRAIN).on_parameters(QUERY), ValueError, "no parameters in common"),
    (lambda: influence_of(halves(1)).fit(TRAIN).solve({}), ValueError, "no parameters in common"),
    (lambda: influence_of(halves(1)).fit(TRAIN).top(QUERY, TRAIN, N + 1), ValueError, "k must be an integer in"),
    (lambda: influence_of(halves(2)).fit(TRAIN).top(QUERY, TRAIN, 2, certainty=-1), ValueError, "certainty must be"),
    (lambda: influence_of(halves(2)).fit(TRAIN).top(QUERY, TRAIN, 2, certainty="2"), ValueError, "certainty must be"),
    (
        lambda: influence_of(halves(1)).fit(TRAIN).scores(QUERY, (X[:1], Y[:1])),
        ValueError,
        "query 0 has the same score, .* for all training examples under network 0",
    ),
    (lambda: halves(1).first(3), ValueError, r"number must be in \[1, 2\]"),
]


@pytest.mark.parametrize(("do", "kind", "message"), REFUSED)
def test_refused(do, kind, message):
    with pytest.raises(kind, match=message):
        do()


@pytest.mark.parametrize(
    ("name", "ask"),
    [
        ("scores", lambda influence: influence.scores(QUERY, TRAIN, spread=True)),
        ("self_influence", lambda influence: influence.self_influence(TRAIN, spread=True)),
        ("top", lambda influence: influence.top(QUERY, TRAIN, 2, certainty=1.0)),
    ],
)
def test_one_network_has_no_spread(name, ask):
    influence = Influence(net(), curvature=EKFAC(1e-2), layers="*", progress=False).fit(TRAIN)
    with pytest.raises(ValueError, match=f"{name}: .* needs networks="):
        ask(influence)
