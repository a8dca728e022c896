"""K-FAC, EK-FAC, the diagonal and what Influence makes of them, held against matrices built by hand."""

import io
import warnings
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastif import EKFAC, KFAC, Diagonal, ExactBlock, Identity, Influence, NotPositiveDefinite
from fastif.capture import Capture
from fastif.curvature import LowRank
from fastif.losses import output_columns
from fastif.samplers import Subset
from tests import reference
from tests.networks import Apply
from tests.problems import wide

N, CLASSES, DAMPING = 24, 3, 3e-3


def _words(m, ids):
    h = m.words(ids)
    h = m.second(m.first(h).tanh()).tanh()
    return m.head(h.mean(1))


def _pixels(m, x):
    return m.head(m.conv(x).tanh().flatten(1))


class Problem(NamedTuple):
    model: nn.Module
    data: tuple[torch.Tensor, torch.Tensor]
    layers: tuple[str, ...]


@cache
def problem(name):
    """A model, data (x, y) and its layers: one position per example, words, or pixels."""
    torch.manual_seed(0)
    y = torch.arange(N) % CLASSES
    if name == "mlp":
        model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES)), torch.randn(N, 5)
    elif name == "words":
        layers = {"words": nn.Embedding(7, 4), "first": nn.Linear(4, 5), "second": nn.Linear(5, 4, bias=False)}
        model, x = Apply(_words, **layers, head=nn.Linear(4, CLASSES)), torch.randint(0, 7, (N, 6))
        x[:, 5] = x[:, 0]
    else:
        layers = {"conv": nn.Conv2d(2, 4, 3, stride=2, padding=1), "head": nn.Linear(16, CLASSES, bias=False)}
        model, x = Apply(_pixels, **layers), torch.randn(N, 2, 4, 4)
    model.double()
    names = tuple(n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding | nn.Conv2d))
    return Problem(model, (x if name == "words" else x.double(), y), names)


@cache
def by_hand(name):
    """For every layer: inputs [n, t, d], output gradients of the loss [1, n, t, o] and of the logits' curvature."""
    model, (x, y), layers = problem(name)
    seen = {}
    handles = [
        module.register_forward_hook(lambda _m, args, out, key=key: seen.update({key: (args[0].detach(), out)}))
        for key, module in model.named_modules()
        if key in layers
    ]
    logits = model(x)
    for handle in handles:
        handle.remove()
    probs = logits.detach().softmax(1)
    values, vectors = torch.linalg.eigh(torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :])
    roots = vectors * values.clamp(min=0).sqrt()[:, None, :]  # [n, c, s], another root than the library's
    outputs = [seen[key][1] for key in layers]
    loss = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), outputs, retain_graph=True)
    columns = [torch.autograd.grad(logits, outputs, roots[:, :, s], retain_graph=True) for s in range(CLASSES)]
    parts = {}
    for i, key in enumerate(layers):
        module, a = model.get_submodule(key), seen[key][0]
        if isinstance(module, nn.Embedding):
            a = F.one_hot(a, module.num_embeddings).double()
        elif isinstance(module, nn.Conv2d):
            a = F.unfold(a, module.kernel_size, padding=module.padding, stride=module.stride).mT
        a = a.reshape(N, -1, a.shape[-1])
        if getattr(module, "bias", None) is not None:
            a = torch.cat([a, torch.ones(*a.shape[:2], 1, dtype=torch.float64)], 2)

        def positions(u, module=module):
            return u.flatten(2).mT if isinstance(module, nn.Conv2d) else u.reshape(N, -1, u.shape[-1])

        empirical = positions(loss[i])[None]
        exact = torch.stack([positions(column[i]) for column in columns])
        if isinstance(module, nn.Embedding):  # as a matrix [rows, d]: the looked-up row is the output side
            parts[key] = _Table(a, empirical, exact)
        else:
            parts[key] = _Layer(a, empirical, exact)
    return parts


class _Layer(NamedTuple):
    a: torch.Tensor
    empirical: torch.Tensor
    exact: torch.Tensor

    def gradients(self):
        return torch.einsum("nto,ntd->nod", self.empirical[0], self.a)

    def matrix(self, of, fisher, weights):
        return of(self.a, getattr(self, fisher), weights)


class _Table(_Layer):
    """A linear map without bias of one-hot rows [n, t, rows] into [n, t, d]; its table is the transpose, [rows, d]."""

    def gradients(self):
        return super().gradients().mT

    def matrix(self, of, fisher, weights):
        rows, d = self.a.shape[2], self.empirical.shape[3]
        flipped = super().matrix(of, fisher, weights).view(d, rows, d, rows)
        return flipped.permute(1, 0, 3, 2).reshape(rows * d, rows * d)


def diagonal(inputs, columns, weights):
    return torch.diag(reference.ggn(inputs, columns, weights).diagonal())


MATRICES = {KFAC: reference.kfac, EKFAC: reference.ekfac, Diagonal: diagonal, ExactBlock: reference.ggn}


def influence_of(name, curvature, **options):
    model = problem(name).model
    return Influence(model, curvature=curvature, layers="*", progress=False, **options)


def exact_block(damping, fisher="exact"):
    return ExactBlock(damping, "ggn" if fisher == "exact" else "empirical_fisher")


@pytest.mark.parametrize("name", ["mlp", "words", "pixels"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("estimator", [KFAC, EKFAC, Diagonal, ExactBlock])
def test_everything_is_as_built_by_hand(name, fisher, estimator):
    data = problem(name).data
    made = exact_block(DAMPING, fisher) if estimator is ExactBlock else estimator(DAMPING, fisher)
    influence = influence_of(name, made, batch_size=10).fit(data)
    weights = torch.full((N,), 1 / N, dtype=torch.float64)
    layers = influence.scores_by_layer(data, data)
    change = influence.on_parameters(data)
    total = 0
    for key, layer in by_hand(name).items():
        matrix = layer.matrix(MATRICES[estimator], fisher, weights)
        inverse = torch.linalg.inv(matrix + DAMPING * torch.eye(len(matrix), dtype=torch.float64))
        gradients = layer.gradients().flatten(1)
        want = gradients @ inverse @ gradients.T / N
        assert torch.allclose(layers[key], want, rtol=1e-9, atol=1e-11 * float(want.abs().max())), key
        total = total + want
        shape = influence.capture.blocks[key].shape
        eye = torch.eye(len(matrix), dtype=torch.float64).view(-1, *shape)
        solved = influence.curvature[key].solve(eye).flatten(1)
        assert torch.allclose(solved, inverse, rtol=1e-8, atol=1e-10 * float(inverse.abs().max())), key
        moved = -(inverse @ gradients.sum(0)).view(shape[1:])
        d = change[f"{key}.weight"].flatten(1).shape[1]
        close = {"rtol": 1e-8, "atol": 1e-10 * float(moved.abs().max())}
        assert torch.allclose(change[f"{key}.weight"].flatten(1), moved[:, :d], **close), key
        if f"{key}.bias" in change:
            assert torch.allclose(change[f"{key}.bias"], moved[:, d], **close), key
    assert torch.allclose(influence.scores(data, data), total, rtol=1e-9, atol=1e-12 * float(total.abs().max()))
    assert torch.allclose(influence.self_influence(data), total.diagonal(), rtol=1e-9)


def test_identity_is_dot_products_of_gradients():
    data = problem("words").data
    gradients = torch.cat([layer.gradients().flatten(1) for layer in by_hand("words").values()], 1)
    got = influence_of("words", Identity()).fit(data).scores(data, data)
    assert torch.allclose(got, gradients @ gradients.T / N, rtol=1e-10, atol=1e-15)


ESTIMATORS = [
    *(kind(DAMPING, fisher) for kind in (KFAC, EKFAC, Diagonal) for fisher in ("exact", "empirical", "monte_carlo")),
    {"words": Diagonal(DAMPING), "head": exact_block(DAMPING), "*": EKFAC(DAMPING)},
]


def names_of(estimator):
    if isinstance(estimator, str):
        return None
    return "mapping" if isinstance(estimator, dict) else f"{type(estimator).__name__} {estimator.fisher}"


def answers(influence, data):
    query = data[0][:5], data[1][:5]
    change = influence.on_parameters(query)
    scores = influence.scores(query, data).flatten()
    return torch.cat([scores, influence.self_influence(data), *(t.flatten() for t in change.values())])


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=names_of)
def test_batch_size_memory_and_threads_do_not_matter(estimator):
    data, threads = problem("words").data, torch.get_num_threads()
    want = answers(influence_of("words", estimator).fit(data), data)
    try:
        for batch_size, number in ((1, 1), (7, 5), (64, 2)):
            torch.set_num_threads(number)
            influence = influence_of("words", estimator, batch_size=batch_size, memory=2000 * batch_size).fit(data)
            got = answers(influence, data)
            assert torch.allclose(got, want, rtol=1e-8, atol=1e-11 * float(want.abs().max())), (batch_size, number)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("estimator", [KFAC(DAMPING), EKFAC(DAMPING), Diagonal(DAMPING)], ids=names_of)
def test_weights_of_a_subset_are_repetitions(estimator):
    x, y = problem("words").data
    indices, repeats = torch.tensor([17, 0, 5, 9]), torch.tensor([3, 1, 2, 4])
    weighted = influence_of("words", estimator, batch_size=3).fit((x, y), Subset(indices, repeats.double() / 10))
    rows = indices.repeat_interleave(repeats)
    repeated = influence_of("words", estimator).fit((x[rows], y[rows]))
    plain = influence_of("words", estimator).fit((x[indices], y[indices]))
    for key, other in repeated.curvature.items():
        rhs = torch.randn(repeated.capture.blocks[key].shape, dtype=torch.float64)
        assert torch.allclose(weighted.curvature[key].solve(rhs), other.solve(rhs), rtol=1e-8, atol=1e-9), key
        assert not torch.allclose(plain.curvature[key].solve(rhs), other.solve(rhs), rtol=1e-3), key
    with_padding = influence_of("words", estimator, batch_size=3)
    with_padding.fit((x, y), Subset(torch.tensor([2, 17, 0, 5, 9]), torch.tensor([0, 3, 1, 2, 4]).double() / 10))
    for key, other in weighted.curvature.items():
        rhs = torch.randn(repeated.capture.blocks[key].shape, dtype=torch.float64)
        assert torch.allclose(with_padding.curvature[key].solve(rhs), other.solve(rhs), rtol=1e-8, atol=1e-9), key


@pytest.mark.parametrize("estimator", ESTIMATORS[::3], ids=names_of)
def test_state_dict_keeps_all_that_was_learned(estimator):
    data = problem("words").data
    influence = influence_of("words", estimator).fit(data)
    file = io.BytesIO()
    torch.save(influence.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    loaded = influence_of("words", estimator).load_state_dict(state)
    assert torch.equal(answers(loaded, data), answers(influence, data))
    with pytest.raises(ValueError, match="the state lacks 0/"):
        influence_of("words", estimator).load_state_dict({k: v for k, v in state.items() if "head" not in k})
    with pytest.raises(ValueError, match="the state is another model's: 0/other/x"):
        influence_of("words", estimator).load_state_dict({**state, "0/other/x": torch.ones(1)})


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
    layers = influence.scores_by_layer(query, data)
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
        influence.scores_by_token(query, data)


@pytest.mark.parametrize("estimator", [EKFAC(DAMPING), Diagonal(DAMPING)], ids=names_of)
def test_tokens_add_up_and_are_what_each_position_adds(estimator):
    model, data, _ = problem("words")
    layers = ["words", "first", "second"]
    influence = Influence(model, curvature=estimator, layers=layers, batch_size=7, progress=False).fit(data)
    query = data[0][:5], data[1][:5]
    tokens = influence.scores_by_token(query, data)
    assert tokens.shape == (5, N, 6)
    assert torch.allclose(tokens.sum(2), influence.scores(query, data), rtol=1e-10, atol=1e-15)
    want = 0
    for key in layers:
        layer, curvature = by_hand("words")[key], influence.curvature[key]
        rows = torch.einsum("nto,ntd->ntod", layer.empirical[0], layer.a)
        rows = rows.mT if isinstance(layer, _Table) else rows
        solved = curvature.solve(layer.gradients()[:5, None])[:, 0]
        want = want + torch.einsum("qod,ntod->qnt", solved, rows) / N
    assert torch.allclose(tokens, want, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ["words", "pixels"])
def test_rank_keeps_the_largest_singular_vectors_and_tells_its_error(name):
    data = problem(name).data
    influence = influence_of(name, EKFAC(DAMPING)).fit(data)
    query = data[0][:5], data[1][:5]
    scores = influence.scores(query, data)
    assert torch.allclose(influence.scores(query, data, rank=99), scores, rtol=1e-9, atol=1e-13)
    assert influence.rank_error < 1e-7
    low = influence.scores(query, data, rank=1)
    want, error = 0, 0.0
    for key, layer in by_hand(name).items():
        solved = influence.curvature[key].solve(layer.gradients()[:5, None])[:, 0]
        u, s, v = torch.linalg.svd(solved, full_matrices=False)
        nearest = s[:, :1, None] * u[:, :, :1] @ v[:, :1]
        want = want + torch.einsum("qod,nod->qn", nearest, layer.gradients()) / N
        error = max(error, float(((solved - nearest).flatten(1).norm(dim=1) / solved.flatten(1).norm(dim=1)).max()))
    assert torch.allclose(low, want, rtol=1e-8, atol=1e-13)
    assert influence.rank_error == pytest.approx(error, rel=1e-6)
    assert error > 1e-3
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        influence.scores(query, data, rank=0)


# ------------------------------------------------------------------------------------------------------------ separable


@pytest.mark.parametrize("estimator", [KFAC, EKFAC])
def test_separable_scores_keep_their_tolerance(estimator):
    model, data = wide()
    exact = Influence(model, curvature=estimator(1e-2), layers="0", progress=False).fit(data)
    scores, own = exact.scores(data, data), exact.self_influence(data)
    ranks = []
    for tolerance in (0.5, 1e-2):
        quick = Influence(model, curvature=estimator(1e-2, separable=tolerance), layers="0", progress=False).fit(data)
        error = (quick.scores(data, data) - scores).norm() / scores.norm()
        assert error <= tolerance
        ranks.append(quick.curvature["0"].separable_rank)
        assert torch.allclose(quick.self_influence(data), own, rtol=1e-12)  # always exact
        if ranks[-1] is not None:
            assert error > 0
    assert ranks[0] is not None
    assert ranks[1] is None or ranks[1] >= ranks[0]


def test_separable_falls_back_where_it_would_not_pay():
    model, data = wide()
    exact = Influence(model, curvature=EKFAC(1e-2), layers="*", progress=False).fit(data)
    quick = Influence(model, curvature=EKFAC(1e-2, separable=1e-13), layers="*", progress=False).fit(data)
    assert torch.allclose(quick.scores(data, data), exact.scores(data, data), rtol=1e-11, atol=1e-15)
    assert [block.separable_rank for block in quick.curvature.values()] == [None, None]
    data = problem("words").data
    exact, quick = (influence_of("words", EKFAC(DAMPING, separable=s)).fit(data) for s in (None, 0.5))
    assert quick.curvature["words"].separable_rank is None  # words have positions
    assert torch.allclose(quick.scores(data, data), exact.scores(data, data), rtol=1e-11, atol=1e-15)


# ------------------------------------------------------------------------------------------------- damping and refusals


@pytest.mark.parametrize("estimator", [KFAC, EKFAC])
def test_auto_damping_is_a_tenth_of_the_mean_eigenvalue(estimator):
    data = problem("mlp").data
    influence = influence_of("mlp", estimator("auto")).fit(data)
    for block in influence.curvature.values():
        assert block.damping_used == pytest.approx(float(block.eigenvalues.mean()) / 10)
    given = influence_of("mlp", {k: estimator(b.damping_used) for k, b in influence.curvature.items()}).fit(data)
    assert torch.allclose(given.scores(data, data), influence.scores(data, data), rtol=1e-10)


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (KFAC(0.0), r"KFAC: layer '0' with damping 0 is singular: its smallest eigenvalue is .*or 'auto'"),
        (EKFAC(0.0), r"EKFAC: layer '0' with damping 0 is singular"),
        (Diagonal(0.0), r"Diagonal: layer '0' with damping 0 is singular: its smallest entry is 0; a damping > 0"),
    ],
    ids=names_of,
)
def test_a_singular_layer_is_named_when_it_is_fitted(estimator, message):
    x, y = problem("mlp").data
    x = x.clone()
    x[:, 2] = 0  # an input that is always zero
    with pytest.raises(NotPositiveDefinite, match=message) as caught:
        influence_of("mlp", estimator).fit((x, y))
    if not isinstance(estimator, Diagonal):
        advised = float(str(caught.value).split("; damping ")[1].split()[0])
        assert influence_of("mlp", type(estimator)(advised)).fit((x, y)).self_influence((x, y)).isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KFAC(-1.0), "damping must be a finite number >= 0 or 'auto', got -1.0"),
        (lambda: EKFAC(1e-3, "true"), "EKFAC: fisher must be 'exact', 'monte_carlo' or 'empirical', got 'true'"),
        (lambda: KFAC(1e-3, separable=2), r"KFAC: separable must be a tolerance in \(0, 1\) or None, got 2"),
        (lambda: Diagonal("auto"), "Diagonal: damping must be a number, got 'auto'"),
        (lambda: Diagonal(1e-3, "true"), "Diagonal: fisher must be"),
        (lambda: KFAC().eigenvalues, "KFAC: not fitted; call Influence.fit first"),
        (lambda: Diagonal().diagonal, "Diagonal: not fitted"),
        (lambda: influence_of("mlp", {"x*": KFAC()}), r"no pattern of curvature= matches a layer, got x\*"),
        (
            lambda: influence_of("mlp", KFAC()).self_influence(problem("mlp").data),
            r"not fitted; call fit\(train\) first",
        ),
        (lambda: influence_of("mlp", KFAC(), checkpoints=[]), "checkpoints must not be empty"),
        (lambda: influence_of("mlp", KFAC(), memory=0), "memory must be at least 1 byte, got 0"),
        (
            lambda: influence_of("mlp", ExactBlock(1e-3, "hessian")).fit(problem("mlp").data),
            "its smallest eigenvalue about -.*, and Cholesky needs definiteness; damping 1 would do",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_mapping_leaves_out_what_no_pattern_matches():
    influence = influence_of("mlp", {"2": KFAC(DAMPING)}).fit(problem("mlp").data)
    assert set(influence.on_parameters(problem("mlp").data)) == {"2.weight", "2.bias"}
    reason = "no pattern of curvature= matches its layer"
    assert influence.capture.skipped == {"0.weight": reason, "0.bias": reason}
    with pytest.raises(TypeError, match="curvature must be an estimator or a mapping to them, got 'ekfac'"):
        influence_of("mlp", "ekfac")


@pytest.mark.parametrize("name", ["mlp", "words"])
def test_monte_carlo_goes_to_the_exact_curvature(name):
    x, y = problem(name).data
    many = x.repeat(400, *[1] * (x.dim() - 1)), y.repeat(400)
    for kind in (Diagonal, EKFAC):
        exact = influence_of(name, kind(DAMPING)).fit((x, y))
        drawn = influence_of(name, kind(DAMPING, "monte_carlo"), batch_size=9600).fit(many)
        fisher = influence_of(name, kind(DAMPING, "empirical")).fit((x, y))
        for key, block in exact.curvature.items():
            values = [
                b.diagonal if kind is Diagonal else b.eigenvalues
                for b in (block, drawn.curvature[key], fisher.curvature[key])
            ]
            want, got, other = (v.flatten().sort().values for v in values)
            assert (got - want).norm() < 0.05 * want.norm(), key
            assert (other - want).norm() > 0.06 * want.norm(), key  # the test can tell them apart


def test_seed_chooses_the_draws():
    data = problem("mlp").data
    one, again, two = (influence_of("mlp", KFAC(1e-3, "monte_carlo"), seed=s).fit(data) for s in (0, 0, 1))
    assert torch.equal(one.curvature["0"].eigenvalues, again.curvature["0"].eigenvalues)
    assert not torch.allclose(one.curvature["0"].eigenvalues, two.curvature["0"].eigenvalues, rtol=1e-3)


# ------------------------------------------------------------------------------------------- autocast, failures, ties


@pytest.mark.parametrize(
    "estimator", [KFAC(DAMPING), EKFAC(DAMPING), Diagonal(DAMPING), Identity(), ExactBlock(DAMPING)]
)
def test_autocast_rounds_the_passes_and_nothing_else(estimator):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3))
    data = torch.randn(40, 20), torch.arange(40) % 3
    scores = [
        Influence(model, curvature=estimator, layers="*", autocast=dtype, progress=False).fit(data).scores(data, data)
        for dtype in (None, torch.bfloat16)
    ]
    assert scores[1].dtype == torch.float32
    assert 0 < (scores[1] - scores[0]).norm() <= 0.1 * scores[0].norm()


@pytest.mark.parametrize("queries", [1, 3, 60])
def test_separable_scores_keep_their_tolerance_for_few_queries(queries):
    model, data = wide()
    query = tuple(x[:queries] for x in data)
    exact = Influence(model, curvature=EKFAC(1e-2), layers="*", progress=False).fit(data).scores(query, data)
    quick = Influence(model, curvature=EKFAC(1e-2, separable=1e-2), layers="*", progress=False).fit(data)
    assert (quick.scores(query, data) - exact).norm() <= 1e-2 * exact.norm()


def test_a_failure_in_the_middle_of_scores_releases_the_model():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
    influence = Influence(Mean(model), curvature=Identity(), progress=False)
    data = [(torch.zeros(2, 5).long(), torch.tensor([0, 1])), (torch.zeros(2, 4).long(), torch.tensor([0, 1]))]
    influence.fit(data)
    with pytest.raises(ValueError, match="one number of positions, got 5 and 4; pad") as held:
        influence.scores_by_token(data, data)
    assert held.value is not None  # the traceback keeps the frames alive
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Mean(nn.Module):
    def __init__(self, words):
        super().__init__()
        self.words = words

    def forward(self, x):
        return self.words(x).mean(1)


def test_ignored_labels_carry_no_curvature_in_the_head():
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, -100, 1, -100])
    blocks = []
    for rows in (torch.arange(6), y != -100):
        n = len(x[rows])
        influence = Influence(model, curvature=ExactBlock(DAMPING), progress=False).fit((x[rows], y[rows]))
        blocks.append(next(iter(influence.curvature.values())).block * n)
    assert torch.allclose(blocks[0], blocks[1], atol=1e-14)


def test_a_transposed_convolution_used_twice_has_the_moments_of_its_positions():
    torch.manual_seed(0)
    layer = nn.ConvTranspose1d(2, 2, 3, padding=1, bias=False)
    once = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(10, 3)).double()
    twice = nn.Sequential(layer, nn.Tanh(), layer, nn.Flatten(), nn.Linear(10, 3)).double()
    for model in (once, twice):
        x, y = torch.randn(12, 2, 5, dtype=torch.float64), torch.arange(12) % 3
        influence = Influence(model, curvature=KFAC(DAMPING), layers="0", progress=False).fit((x, y))
        total = float(influence.curvature["0"].eigenvalues.sum())
        capture, moments = Capture(model, "0"), [0.0, 0.0, 0.0]
        with capture.attached():
            forward = capture.forward(x)
            for column, (scores, s) in enumerate(
                output_columns("cross_entropy", forward.outputs, y, 12, "exact", None)
            ):
                g = forward.gradients(scores, s, keep=True)["0"]
                weights = torch.full((12,), 1 / 12, dtype=torch.float64)
                if column == 0:
                    moments[0] = float(g.moment("outputs", weights)[0].trace())
                    moments[2] = float(weights.sum()) * g.positions
                moments[1] += float(g.moment("inputs", weights)[0].trace())
        assert total == pytest.approx(moments[0] * moments[1] / moments[2], rel=1e-10)


def test_rank_error_is_true_down_to_rounding_and_for_zero_gradients():
    matrices = torch.zeros(2, 1, 4, 4, dtype=torch.float32)
    matrices[0, 0] = torch.diag(torch.tensor([1.0, 1e-2, 1e-5, 0.0]))
    assert LowRank.of(matrices, 2).error == pytest.approx(1e-5, rel=1e-3)
    assert LowRank.of(matrices, 3).error == 0


def test_margin_of_an_ignored_label_is_refused():
    model, data = wide()
    influence = Influence(model, measurement="margin", curvature=Identity(), layers="*", progress=False).fit(data)
    with pytest.raises(ValueError, match="'margin' needs one label per example and none that is -100"):
        influence.scores((data[0][:2], torch.tensor([0, -100])), data)


def test_layers_that_cannot_be_covered_are_listed_and_blocks_can_be_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = nn.utils.weight_norm(nn.Linear(3, 3))
    norms = [nn.LayerNorm(3), nn.LayerNorm(3)]
    norms[1].weight = norms[0].weight
    model = nn.Sequential(old, *norms, nn.MultiheadAttention(3, 1), nn.Linear(3, 2))
    capture = Capture(model)
    assert set(capture.covered) | set(capture.skipped) == {name for name, _ in model.named_parameters()}
    assert "weight norm" in capture.skipped["0.weight_v"]
    assert {"1.weight", "2.bias"} <= set(capture.skipped)
    assert list(Capture(model, ["3.out_proj", "3.q_proj"]).blocks) == ["3.q_proj", "3.out_proj"]


@pytest.mark.parametrize("which", ["mlp", "words", "pixels"])
@pytest.mark.parametrize("make", [KFAC, EKFAC, Diagonal, ExactBlock])
def test_slices_of_a_batch_give_what_the_whole_gives(which, make, monkeypatch):
    data = problem(which).data
    results = []
    for entries in (1 << 21, 1):  # all examples at once, and one at a time
        for limit in ("capture.SLICE", "passes._TOGETHER", "gradients._TOGETHER", "gradients._ROWS", "gradients._SIDE"):
            monkeypatch.setattr(f"fastif.{limit}", entries)
        monkeypatch.setattr("fastif.scoring._MADE", entries)
        influence = influence_of(which, make(DAMPING)).fit(data)
        by_layer = influence.scores_by_layer(data, data)
        results.append([influence.scores(data, data), influence.self_influence(data), *by_layer.values()])
    for whole, sliced in zip(*results, strict=True):
        assert torch.allclose(whole, sliced, rtol=1e-9, atol=1e-12 * float(whole.abs().max()))


@pytest.mark.parametrize("estimator", [KFAC, EKFAC])
def test_queries_of_one_position_are_kept_in_their_factors(estimator):
    """Few of them are turned back into matrices, many are not; the scores are those of the definition."""
    model, data = wide()
    influence = Influence(model, curvature=estimator(1e-2), layers="0", progress=False).fit(data)
    block, capture = influence.curvature["0"], Capture(model, "0")
    with capture.attached():
        forward = capture.forward(data[0])
        g = forward.gradients(F.cross_entropy(forward.outputs, data[1], reduction="none"))["0"]
    want = torch.einsum("qsod,nsod->qn", block.solve(g.formed()), g.formed()) / len(g)
    assert torch.allclose(influence.scores(data, data), want, rtol=1e-9, atol=1e-12)
    first = tuple(part[:1] for part in data)
    assert 30 * 30 + 41 * 41 > 30 * 41  # more work than the dot products of one query
    assert torch.allclose(influence.scores(first, data), want[:1], rtol=1e-9, atol=1e-12)
    directions = block.directions(g)
    assert directions.nbytes == len(g) * (30 + 41) * 8
    assert torch.allclose(directions.dots(g) / len(g), want, rtol=1e-9, atol=1e-12)
