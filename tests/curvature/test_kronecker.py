"""K-FAC, EK-FAC and the diagonal, held against matrices built by hand."""

import copy
import io

import pytest
import torch
from torch import nn

from fastif import EKFAC, KFAC, Diagonal, ExactBlock, Identity, Influence, NotPositiveDefinite, Shampoo
from fastif.model.capture import Capture
from fastif.model.losses import output_columns
from fastif.samplers import Subset
from tests.helpers.by_hand import (
    DAMPING,
    ESTIMATORS,
    MATRICES,
    N,
    answers,
    by_hand,
    exact_block,
    influence_of,
    names_of,
    problem,
)
from tests.helpers.problems import wide


@pytest.mark.parametrize("name", ["mlp", "words", "pixels"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("estimator", [KFAC, EKFAC, Shampoo, Diagonal, ExactBlock])
def test_everything_is_as_built_by_hand(name, fisher, estimator):
    data = problem(name).data
    made = exact_block(DAMPING, fisher) if estimator is ExactBlock else estimator(DAMPING, fisher)
    influence = influence_of(name, made, batch_size=10).fit(data)
    weights = torch.full((N,), 1 / N, dtype=torch.float64)
    layers = influence.scores(data, data, by="layer")
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


@pytest.mark.parametrize(
    "estimator", [KFAC(DAMPING), EKFAC(DAMPING), Diagonal(DAMPING), Shampoo(DAMPING)], ids=names_of
)
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
    for key, value in influence.state_dict().items():  # as files hold them: products of other layouts have other bits
        assert value.is_contiguous(), key
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


@pytest.mark.parametrize("queries", [1, 3, 60])
def test_separable_scores_keep_their_tolerance_for_few_queries(queries):
    model, data = wide()
    query = tuple(x[:queries] for x in data)
    exact = Influence(model, curvature=EKFAC(1e-2), layers="*", progress=False).fit(data).scores(query, data)
    quick = Influence(model, curvature=EKFAC(1e-2, separable=1e-2), layers="*", progress=False).fit(data)
    assert (quick.scores(query, data) - exact).norm() <= 1e-2 * exact.norm()


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
        (lambda: KFAC(-1.0), "damping must be a finite number >= 0, .* or 'auto', got -1.0"),
        (
            lambda: EKFAC(1e-3, "true"),
            "EKFAC: fisher must be 'auto', 'exact', 'monte_carlo' or 'empirical', got 'true'",
        ),
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


# ------------------------------------------------------------------------------------------------ autocast, positions


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


@pytest.mark.parametrize("kind", [KFAC, EKFAC, Shampoo])
def test_a_small_damping_is_taken_and_what_rounding_leaves_of_it_is_said(kind):
    """In the eigenbasis a damped inverse exists for every damping > 0; in float32 the flat directions are noise."""
    x, y = problem("mlp").data
    model = copy.deepcopy(problem("mlp").model).float()
    settings = {"layers": "*", "progress": False}
    influence = Influence(model, curvature=kind(1e-12, "empirical"), **settings).fit((x.float(), y))
    assert influence.scores((x.float(), y), (x.float(), y)).isfinite().all()
    assert max(estimator.rounding for estimator in influence.curvature.values()) > 1
    relative = Influence(model, curvature=kind(fisher="empirical"), **settings).fit((x.float(), y))  # the default
    for estimator in relative.curvature.values():
        assert estimator.damping_used == pytest.approx(0.1 * float(estimator.eigenvalues.mean()))
        assert estimator.rounding < 1e-3
    if kind is KFAC:  # whose eigenvalues are products, some of them 0: the inverse would overflow
        with pytest.raises(NotPositiveDefinite, match=r"with damping 1e-40 is singular"):
            Influence(model, curvature=kind(1e-40, "empirical"), **settings).fit((x.float(), y))
