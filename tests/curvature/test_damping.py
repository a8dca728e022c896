"""Damping from the training time and by shares, held against dense eigen-decompositions and against descent itself."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

import fastif
from fastif import (
    CG,
    EKFAC,
    KFAC,
    Arnoldi,
    DataInf,
    Diagonal,
    ExactBlock,
    Influence,
    LiSSA,
    NotPositiveDefinite,
    RandomProjection,
    RelativeDamping,
    Shampoo,
    TrainingDamping,
    remove,
    training_time,
)
from fastif.measure import MEMORY_BY, Measure
from fastif.model.gradients import Formed
from tests import reference
from tests.helpers.by_hand import MATRICES, N, by_hand, influence_of, problem
from tests.helpers.matrix_free import answers, assert_close, network
from tests.helpers.matrix_free import influence_of as joint_of
from tests.helpers.problems import symmetric

RULE = TrainingDamping(40.0, 2e-3)
WEIGHTS = torch.full((N,), 1 / N, dtype=torch.float64)


def close(got, want, relative=1e-9):
    return float((got - want).norm()) <= relative * float(want.norm())


def filtered(matrix):
    return reference.training_filter(matrix, RULE.time, RULE.weight_decay)


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------- what f is


@pytest.mark.parametrize(("time", "decay"), [(0.3, 0.0), (7.0, 0.05), (60.0, 0.0)])
def test_the_filter_is_the_integral_of_descent(time, decay):
    """f(G) = ∫₀^τ e^{−s(G + γI)} ds, a corner of one matrix exponential."""
    matrix = symmetric([3.0, 1.0, 0.2, 1e-3, 0.0, 0.0])
    size = len(matrix)
    block = torch.zeros(2 * size, 2 * size, dtype=torch.float64)
    eye = torch.eye(size, dtype=torch.float64)
    block[:size, :size] = -(matrix + decay * eye)
    block[:size, size:] = eye
    want = torch.linalg.matrix_exp(block * time)[:size, size:]
    assert close(reference.training_filter(matrix, time, decay), want, 1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_descent_on_a_quadratic_answers_a_constant_gradient_with_the_filter(momentum):
    """Exact descent, with small steps, from any start: what g does to its end is −f(G) g."""
    torch.manual_seed(0)
    x, y, decay, steps = rows(30, 4), rows(30, 2), 0.02, 20000
    rate = 12.0 / steps * (1 - momentum)

    def loss(outputs, targets):
        return (outputs - targets).square().sum(1) / 2

    model = nn.Linear(4, 2).double()
    change = {"weight": rows(2, 4), "bias": rows(2)}
    ends = []
    for disturbed in (False, True):
        theta = torch.cat([model.weight.detach(), model.bias.detach()[:, None]], 1)
        inputs, velocity = torch.cat([x, torch.ones(30, 1).double()], 1), torch.zeros_like(theta)
        constant = torch.cat([change["weight"], change["bias"][:, None]], 1) * disturbed
        moment, cross = inputs.T @ inputs / 30, y.T @ inputs / 30
        for _ in range(steps):
            velocity = momentum * velocity + theta @ moment - cross + decay * theta + constant
            theta = theta - rate * velocity
        ends.append(theta)
    rule = TrainingDamping(training_time([rate] * steps, momentum), decay)
    assert rule.time == pytest.approx(12.0)
    influence = Influence(model, loss, ExactBlock(rule), layers="*", progress=False).fit((x, y))
    (curvature,) = influence.curvature.values()
    want = -curvature.solve(torch.cat([change["weight"], change["bias"][:, None]], 1)[None])[0]
    assert close(ends[1] - ends[0], want, 1e-3 if momentum == 0 else 3e-3)


def test_flat_and_steep_directions_meet_the_two_limits():
    flat, steep = TrainingDamping(5.0, 0.1).at(0.0), TrainingDamping(5.0, 0.1).at(1e6)
    assert flat == pytest.approx((1 - math.exp(-0.5)) / 0.1)
    assert steep == pytest.approx(1 / (1e6 + 0.1))
    assert TrainingDamping(5.0).at(0.0) == pytest.approx(5.0, rel=1e-15)
    assert TrainingDamping(5.0, 0.1).constant == pytest.approx(0.3)
    for x in (0.0, 1e-3, 0.1, 1.0, 50.0):  # a damping between γ and γ + 1/τ
        assert 0.1 <= 1 / TrainingDamping(5.0, 0.1).at(x) - x + 1e-12 <= 0.3
    assert TrainingDamping(5.0, 0.1).at(-3.0) == pytest.approx(5.0, rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("time", [1e-30, 1e-6, 1.0, 1e5, 1e30])
def test_the_filter_keeps_its_digits_from_the_flattest_to_the_steepest(dtype, time):
    values = torch.cat([torch.zeros(1), torch.logspace(-37, 37, 150)]).to(dtype)
    got = TrainingDamping(time).filter(values)
    for x, f in zip(values.tolist(), got.tolist(), strict=True):
        want = -math.expm1(-time * x) / x if time * x > 1e-17 else time
        assert f == pytest.approx(want, rel=20 * torch.finfo(dtype).eps), x


# ------------------------------------------------------------------------------------- estimators that know eigenvalues


@pytest.mark.parametrize("name", ["mlp", "words", "pixels"])
@pytest.mark.parametrize("kind", [KFAC, EKFAC, Shampoo, Diagonal, ExactBlock])
def test_everything_is_as_built_by_hand(name, kind):
    data = problem(name).data
    influence = influence_of(name, kind(RULE), batch_size=10).fit(data)
    layers, total = influence.scores(data, data, by="layer"), 0
    for key, layer in by_hand(name).items():
        inverse = filtered(layer.matrix(MATRICES[kind], "exact", WEIGHTS))
        gradients = layer.gradients().flatten(1)
        want = gradients @ inverse @ gradients.T / N
        assert torch.allclose(layers[key], want, rtol=1e-9, atol=1e-11 * float(want.abs().max())), key
        total = total + want
        shape = influence.capture.blocks[key].shape
        eye = torch.eye(len(inverse), dtype=torch.float64).view(-1, *shape)
        solved = influence.curvature[key].solve(eye).flatten(1)
        assert torch.allclose(solved, inverse, rtol=1e-8, atol=1e-10 * float(inverse.abs().max())), key
        assert influence.curvature[key].damping_used == pytest.approx(2e-3 / -math.expm1(-40 * 2e-3))
    assert torch.allclose(influence.scores(data, data), total, rtol=1e-9, atol=1e-12 * float(total.abs().max()))
    assert torch.allclose(influence.self_influence(data), total.diagonal(), rtol=1e-9)


@pytest.mark.parametrize("kind", [KFAC, EKFAC, Shampoo, Diagonal, ExactBlock])
def test_long_training_is_weight_decay_and_short_training_is_no_curvature(kind):
    data = problem("words").data
    long, damped = (influence_of("words", kind(d)).fit(data) for d in (TrainingDamping(1e6, 0.01), 0.01))
    assert close(long.scores(data, data), damped.scores(data, data))
    assert close(long.self_influence(data), damped.self_influence(data))
    short = influence_of("words", kind(TrainingDamping(1e-9, 0.01))).fit(data)
    assert close(short.scores(data, data), 1e-9 * influence_of("words", fastif.Identity()).fit(data).scores(data, data))


def test_separable_scores_are_within_their_tolerance_of_the_filters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3)).double()
    data = rows(60, 30), torch.arange(60) % 3
    exact, separable = (
        Influence(model, curvature=EKFAC(RULE, separable=tolerance), layers="0", progress=False).fit(data)
        for tolerance in (None, 1e-3)
    )
    assert close(separable.scores(data, data), exact.scores(data, data), 2e-3)
    assert separable.curvature["0"].separable_rank


def test_states_pickles_and_copies_filter_alike():
    data = problem("mlp").data
    mapping = {"0": EKFAC(RULE), "*": ExactBlock(RULE)}
    fitted = influence_of("mlp", mapping).fit(data)
    file = io.BytesIO()
    torch.save(fitted.state_dict(), file)
    file.seek(0)
    loaded = influence_of("mlp", mapping).load_state_dict(torch.load(file))
    assert torch.equal(loaded.scores(data, data), fitted.scores(data, data))
    copied = copy.deepcopy(fitted.curvature["2"])
    rhs = rows(3, *fitted.capture.blocks["2"].shape)
    assert torch.equal(copied.solve(rhs), fitted.curvature["2"].solve(rhs))
    again = pickle.loads(pickle.dumps(fitted.curvature["2"]))
    assert torch.equal(again.solve(rhs), copied.solve(rhs))
    assert again.damping == RULE


def test_rounding_of_a_filter_is_that_of_its_flattest_direction():
    data = problem("mlp").data
    long, damped = (influence_of("mlp", EKFAC(d)).fit(data).curvature["0"] for d in (TrainingDamping(1e7, 0.01), 0.01))
    assert long.rounding == pytest.approx(damped.rounding)


# -------------------------------------------------------------------------------------------------------- exact blocks


def head(n=40, d=6, c=3, dead=()):
    x = rows(n, d)
    x[:, list(dead)] = 0
    return x, rows(n, c)


@pytest.mark.parametrize("dead", [(), (1, 4)])
def test_an_exact_block_knows_all_of_its_filter(dead):
    inputs, logits = head(dead=dead)
    block = ExactBlock(RULE).fit(inputs, logits)
    weights = torch.full((40,), 1 / 40, dtype=torch.float64)
    want = filtered(reference.ggn_block(inputs, logits.softmax(1), weights).reshape(18, 18))
    assert close(block.inverse(), want)
    values = torch.linalg.eigvalsh(want)
    assert block.logdet() == pytest.approx(-float(values.log().sum()))
    assert block.condition() == pytest.approx(float(values[-1] / values[0]))
    some = rows(5, 3, 6)
    assert close(block.solve(some).flatten(1), some.flatten(1) @ want)
    norms = torch.einsum("np,pq,nq->n", some.flatten(1), want, some.flatten(1))
    assert close(block.sq_norms(Formed(some[:, None])), norms)
    assert not block.in_place_used
    with pytest.raises(ValueError, match=r"ExactBlock.factor: .* there is no Cholesky factor; inverse\(\)"):
        _ = block.factor


def test_a_block_of_zeros_is_flat():
    block = ExactBlock(TrainingDamping(3.0)).fit(torch.zeros(4, 2).double(), torch.zeros(4, 3).double())
    assert torch.equal(block.inverse(), 3 * torch.eye(6, dtype=torch.float64))


def test_downdates_make_the_filter_anew():
    inputs, logits = head()
    weights = torch.full((40,), 1 / 40, dtype=torch.float64)
    block = ExactBlock(RULE).fit(inputs, logits)
    _ = block.inverse()
    block.downdate(inputs[:2], logits[:2], weights=weights[:2])
    want = ExactBlock(RULE).fit(inputs[2:], logits[2:], weights=weights[2:])
    assert close(block.inverse(), want.inverse(), 1e-7)
    share = ExactBlock(RelativeDamping(0.1)).fit(inputs, logits)
    before = share.damping_used
    share.downdate(inputs[:2], logits[:2], weights=weights[:2])
    assert share.damping_used == pytest.approx(0.1 * float(share.block.view(18, 18).trace()) / 18)
    assert share.damping_used != before


def test_rounding_below_zero_is_flat_in_single_precision():
    inputs, logits = head(d=40)
    block = ExactBlock(TrainingDamping(1e4)).fit(inputs.float(), logits.float())
    double = ExactBlock(TrainingDamping(1e4)).fit(inputs.float().double(), logits.float().double())
    assert close(block.inverse(), double.inverse(), 1e-2)


@pytest.mark.parametrize("kind", [ExactBlock, Arnoldi])
def test_a_negative_eigenvalue_is_refused_by_name_and_weight_decay_mends_it(kind):
    model, data = network("mlp")

    def fitted(rule):
        made = ExactBlock(rule, "hessian", joint=True) if kind is ExactBlock else Arnoldi(75, rule, "hessian")
        return joint_of(model, made, layers="*").fit(data)

    with pytest.raises(NotPositiveDefinite, match=r"damping TrainingDamping\(time=9, weight_decay=0.0\) has the nega"):
        fitted(TrainingDamping(9))
    try:
        fitted(TrainingDamping(9))
    except NotPositiveDefinite as error:
        decay = float(str(error).partition("weight_decay ")[2].split()[0])
    assert fitted(TrainingDamping(9, decay)).scores(data, data).isfinite().all()


def test_nan_is_counted():
    block = ExactBlock(RULE)
    block.load_state_dict({"block": torch.full((2, 3, 2, 3), torch.nan)})
    with pytest.raises(NotPositiveDefinite, match="holds 36 NaN and 0 Inf"):
        _ = block.damping_used


def test_room_is_asked_for_eigenvectors(monkeypatch):
    monkeypatch.setattr("fastif.curvature.exact.room.available_bytes", lambda _: 120**2 * 20)
    inputs, logits = head(d=40)
    ExactBlock(1e-3).fit(inputs.float(), logits.float())
    message = "and the making of its eigenvectors take .*in_place=True and a number as damping takes"
    with pytest.raises(MemoryError, match=message):
        ExactBlock(RULE).fit(inputs.float(), logits.float())


@pytest.mark.skipif(MEMORY_BY != "allocations", reason="memory is counted by fastif._memory")
def test_a_plan_tells_the_bytes_of_eigenvectors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 20), nn.Tanh(), nn.Linear(20, 4))
    data = torch.randn(50, 60), torch.arange(50) % 4
    influence = Influence(model, curvature=ExactBlock(RULE), layers="0", progress=False)
    plan = influence.plan(data, data)
    with Measure() as work:
        influence.fit(data)
    assert 1 / 1.2 <= plan.fit_bytes / work.peak_bytes <= 1.2
    with Measure() as work:
        influence.scores(data, data)
    assert 1 / 1.3 <= plan.score_bytes / work.peak_bytes <= 1.3
    influence.fit(data)
    with Measure() as work:
        influence.self_influence(data)
    assert 1 / 1.3 <= plan.self_bytes / work.peak_bytes <= 1.3


@pytest.mark.skipif(MEMORY_BY != "allocations", reason="memory is counted by fastif._memory")
@pytest.mark.parametrize("kind", [EKFAC, Diagonal])
def test_filtered_eigenvalues_take_no_more_than_damped_ones(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 4))
    data, peaks = (torch.randn(50, 300), torch.arange(50) % 4), []
    for damping in (1e-3, RULE):
        influence = Influence(model, curvature=kind(damping, "empirical"), layers="0", progress=False).fit(data)
        with Measure() as work:
            influence.scores(data, data)
        peaks.append(work.peak_bytes)
    assert peaks[1] <= 1.02 * peaks[0]


# --------------------------------------------------------------------------------------------- the whole network's


@pytest.mark.parametrize("name", ["mlp", "words"])
def test_arnoldi_filters_what_it_keeps_and_takes_the_rest_for_flat(name):
    model, data = network(name)
    want = answers(joint_of(model, ExactBlock(RULE, joint=True)).fit(data), data)
    all_of_it = joint_of(model, Arnoldi(200, RULE, tolerance=1e-9, block=16)).fit(data)
    assert_close(answers(all_of_it, data), want, 1e-8)
    few = joint_of(model, Arnoldi(5, RULE, tolerance=1e-9, block=8)).fit(data)
    curvature = few.curvature[next(iter(few.curvature))]
    values, size = curvature.eigenvalues, sum(math.prod(b.shape) for b in few.capture.blocks.values())
    whole = joint_of(model, ExactBlock(RULE, joint=True)).fit(data)
    found, vectors = torch.linalg.eigh(next(iter(whole.curvature.values())).block.view(size, size))
    assert torch.allclose(values, found[-5:].flip(0), rtol=1e-6)
    kept = torch.where(torch.arange(size) >= size - 5, found, 0)
    low_rank = filtered(vectors * kept @ vectors.T)
    rhs = {key: rows(2, *block.shape) for key, block in few.capture.blocks.items()}
    flat = torch.cat([value.flatten(1) for value in rhs.values()], 1)
    got = torch.cat([value.flatten(1) for value in curvature.solve(rhs).values()], 1)
    assert close(got, flat @ low_rank, 1e-6)
    assert curvature.damping_used == pytest.approx(1 / RULE.at(0.0))
    lost = float(found[-6])
    assert curvature.error == pytest.approx(1 - RULE.at(lost) / RULE.at(0.0), rel=1e-2)


@pytest.mark.parametrize(
    "make",
    [
        lambda damping: CG(damping, tolerance=1e-10),
        lambda damping: CG(damping, tolerance=1e-10, preconditioner=KFAC(RULE)),
        lambda damping: LiSSA(damping, tolerance=1e-7),
        DataInf,
        lambda damping: RandomProjection(16, damping),
    ],
    ids=["cg", "cg, kfac", "lissa", "data-inf", "projection"],
)
def test_estimators_without_eigenvalues_are_damped_by_the_number(make):
    model, data = network("mlp")
    rule, number = TrainingDamping(2.0, 0.25), 0.75
    influence = joint_of(model, make(rule)).fit(data)
    assert influence.curvature["0"].damping_used == number
    assert_close(answers(influence, data), answers(joint_of(model, make(number)).fit(data), data), 1e-6)
    assert joint_of(model, make(number)).fit(data).curvature["0"].damping_used == number


# -------------------------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("name", ["mlp", "words"])
@pytest.mark.parametrize("kind", [KFAC, EKFAC, Shampoo, Diagonal, ExactBlock])
def test_a_share_is_that_of_the_layers_mean_eigenvalue(name, kind):
    data = problem(name).data
    influence = influence_of(name, kind(RelativeDamping(0.3))).fit(data)
    for key, layer in by_hand(name).items():
        matrix = layer.matrix(MATRICES[kind], "exact", WEIGHTS)
        damping = 0.3 * float(matrix.trace()) / len(matrix)
        assert influence.curvature[key].damping_used == pytest.approx(damping, rel=1e-9)
        eye = torch.eye(len(matrix), dtype=torch.float64)
        solved = influence.curvature[key].solve(eye.view(-1, *influence.capture.blocks[key].shape)).flatten(1)
        assert close(solved, torch.linalg.inv(matrix + damping * eye), 1e-8)


@pytest.mark.parametrize("kind", [KFAC, EKFAC, Shampoo, DataInf])
def test_auto_is_a_tenth(kind):
    data = problem("mlp").data
    auto, tenth = (influence_of("mlp", kind(damping)).fit(data) for damping in ("auto", RelativeDamping(0.1)))
    assert torch.equal(auto.scores(data, data), tenth.scores(data, data))
    assert auto.curvature["0"].damping_used == tenth.curvature["0"].damping_used


def test_a_share_of_nothing_is_refused_where_it_would_divide_by_it():
    inputs, logits = torch.zeros(4, 2).double(), torch.zeros(4, 3).double()
    with pytest.raises(NotPositiveDefinite, match=r"head \[6, 6\] has the mean eigenvalue 0, of which no share"):
        _ = ExactBlock(RelativeDamping(0.1)).fit(inputs, logits).damping_used
    model = nn.Linear(2, 3, bias=False).double()
    with pytest.raises(NotPositiveDefinite, match="Diagonal: layer 'model' with damping 0 is singular"):
        Influence(model, curvature=Diagonal(RelativeDamping(0.1)), progress=False, layers="*").fit(
            (inputs, torch.zeros(4).long())
        )


# ------------------------------------------------------------------------------------------------------- what is asked


def removal():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    return model, (rows(8, 2), torch.arange(8) % 2)


def test_the_time_of_a_training():
    assert training_time([0.1, 0.2, 0.3]) == pytest.approx(0.6)
    assert training_time((0.1 * 0.5**t for t in range(3)), momentum=0.9) == pytest.approx(1.75)
    assert training_time(torch.full((4,), 0.25), 0.5) == 2.0
    assert training_time([0.1, 0.2], [0.5, 0.9]) == pytest.approx(0.2 + 2.0)
    with pytest.raises(ValueError, match="2 learning rates and 1 momenta"):
        training_time([0.1, 0.2], [0.5])
    with pytest.raises(ValueError, match="got 1 in step 1"):
        training_time([0.1, 0.2], [0.5, 1.0])


def test_rules_show_themselves_as_they_were_called():
    assert repr(EKFAC(TrainingDamping(40.0, weight_decay=5e-4))) == (
        "EKFAC(damping=TrainingDamping(time=40.0, weight_decay=0.0005), fisher='exact', separable=None)"
    )
    assert repr(Diagonal(RelativeDamping(0.1))) == "Diagonal(damping=RelativeDamping(share=0.1), fisher='exact')"
    assert pickle.loads(pickle.dumps(RULE)) == RULE
    with pytest.raises(AttributeError):
        RULE.time = 3.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TrainingDamping(0.0), r"TrainingDamping: time must be a number in \[1e-30, 1e\+30\], got 0.0"),
        (lambda: TrainingDamping(math.inf), "TrainingDamping: time must be a number in .*, got inf"),
        (lambda: TrainingDamping(math.nan), "TrainingDamping: time must be a number in .*, got nan"),
        (lambda: TrainingDamping("long"), "TrainingDamping: time must be a number in .*, got 'long'"),
        (lambda: TrainingDamping(1.0, -0.1), "TrainingDamping: weight_decay must be a finite number >= 0, got -0.1"),
        (lambda: RelativeDamping(0), "RelativeDamping: share must be a finite number > 0, got 0"),
        (lambda: RelativeDamping(True), "RelativeDamping: share must be a finite number > 0, got True"),
        (lambda: training_time([0.1], 1.0), r"training_time: momentum must be a number in \[0, 1\), got 1 in step 0"),
        (
            lambda: training_time([0.1, -0.2]),
            "learning_rates must be finite and >= 0, got -0.2 in step 1",
        ),
        (lambda: training_time([]), "training_time: learning_rates must have one > 0, got 0 steps without"),
        (
            lambda: EKFAC("training"),
            "number >= 0, a RelativeDamping, a TrainingDamping or 'auto', got 'training'",
        ),
        (lambda: EKFAC(TrainingDamping), "damping must be a finite number >= 0, .* got <class"),
        (
            lambda: Arnoldi(damping=RelativeDamping(0.1)),
            "damping must be a finite number >= 0, a TrainingDamping or 'auto', got R",
        ),
        (lambda: Arnoldi(damping=0.0), "Arnoldi: damping must be a number > 0 or a TrainingDamping, got 0.0: outside"),
        (lambda: ExactBlock(RULE, in_place=True), "ExactBlock: in_place=True is of a Cholesky factor"),
        (
            lambda: remove(nn.Linear(2, 2), (torch.ones(4, 2), torch.arange(4) % 2), [0], damping=RULE),
            "damping must be a finite number >= 0 or 'auto', got TrainingDamping",
        ),
        (
            lambda: remove(*removal(), [0], damping=0.1, curvature=KFAC(RULE), layers="*", progress=False),
            r"remove: damping is added to numbers, got damping=0.1 beside KFAC\(damping=TrainingDamping\(",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
