"""CG and LiSSA with a damping of each layer's own, and LiSSA with a preconditioner: against dense solves."""

import copy

import pytest
import torch

from fastif import CG, EKFAC, KFAC, Diverged, ExactBlock, LiSSA, RelativeDamping, Subset, TrainingDamping
from fastif.curvature.matrix_free.cg import conjugate_gradients
from fastif.curvature.matrix_free.lissa import largest_preconditioned, neumann
from tests.helpers.matrix_free import influence_of, network
from tests.helpers.problems import residuals, rows, symmetric

SHARE = 0.3


def dense(model, data, subset=None):
    """The GGN [P, P] over all layers, its layers' places, and the training gradients [n, P]."""
    influence = influence_of(model, ExactBlock(1e-2, joint=True)).fit(data, subset)
    (block,) = {id(estimator): estimator for estimator in influence.curvature.values()}.values()
    size = block.block.shape[-1] * block.block.shape[0] if block.block.dim() == 4 else len(block.block)
    matrix = block.block.reshape(size, size).double()
    places, start = {}, 0
    for name, one in influence.capture.blocks.items():
        places[name] = slice(start, start + one.size)
        start += one.size
    with influence.passes.running(None):
        gradients = [
            torch.cat([g.formed().flatten(1) for g in part.values()], 1)
            for _, _, part in influence.passes.gradients(data, "gradients")
        ]
    return matrix, places, torch.cat(gradients)


def own_damping(matrix, places):
    """The diagonal that a `RelativeDamping` puts beside the GGN."""
    damping = torch.zeros(len(matrix), dtype=torch.float64)
    for place in places.values():
        damping[place] = SHARE * matrix[place, place].trace() / (place.stop - place.start)
    return damping


RELATIVE = RelativeDamping(SHARE)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("mlp", CG(RELATIVE, tolerance=1e-10)),
        ("words", CG(RELATIVE, tolerance=1e-10)),
        ("words", CG(RELATIVE, tolerance=1e-10, preconditioner=KFAC(RELATIVE))),
        ("mlp", LiSSA(RELATIVE, tolerance=1e-7, max_steps=20000, keep_graph=True)),
        ("mlp", LiSSA(RELATIVE, tolerance=1e-7, max_steps=9000, preconditioner=EKFAC(RELATIVE), keep_graph=True)),
    ],
)
def test_each_layer_is_damped_by_a_share_of_its_own_mean_eigenvalue(name, made):
    model, data = network(name)
    matrix, places, gradients = dense(model, data)
    damping = own_damping(matrix, places)
    want = gradients[:5] @ torch.linalg.solve(matrix + damping.diag(), gradients.T) / len(gradients)
    query = tuple(x[:5] for x in data)
    influence = influence_of(model, made).fit(data)
    scores = influence.scores(query, data)
    assert float((scores - want).norm()) <= 1e-5 * float(want.norm())
    used = next(iter(influence.curvature.values())).damping_used
    assert used == pytest.approx({layer: float(damping[place][0]) for layer, place in places.items()}, rel=1e-9)
    assert len(set(used.values())) == len(places)
    loaded = influence_of(model, copy.deepcopy(made)).load_state_dict(influence.state_dict())
    assert next(iter(loaded.curvature.values())).damping_used == used


def test_a_preconditioner_saves_steps_and_does_not_change_the_answer():
    model, data = network("mlp")
    query = tuple(x[:5] for x in data)
    exact = influence_of(model, ExactBlock(1e-2), layers="2").fit(data).scores(query, data)
    taken = {}
    for name, preconditioner in (("none", None), ("EK-FAC", EKFAC(1e-2))):
        made = LiSSA(1e-2, tolerance=1e-5, preconditioner=preconditioner, keep_graph=True)
        influence = influence_of(model, made, layers="2").fit(data)
        assert float((influence.scores(query, data) - exact).norm()) <= 1e-4 * float(exact.norm())
        taken[name] = influence.curvature["2"].steps_taken
    assert taken["EK-FAC"] < 0.5 * taken["none"]


def test_with_batches_and_ek_fac_few_steps_come_closer():
    """What Wang et al. (2025) call ASTRA."""
    model, data = network("mlp")
    query = tuple(x[:5] for x in data)
    exact = influence_of(model, ExactBlock(3e-3, joint=True)).fit(data).scores(query, data)
    errors = []
    for preconditioner in (None, EKFAC(3e-3)):
        made = LiSSA(3e-3, batch=30, max_steps=60, tolerance=0.999, preconditioner=preconditioner)
        scores = influence_of(model, made).fit(data).scores(query, data)
        errors.append(float((scores - exact).norm() / exact.norm()))
    assert errors[1] < 0.6 * errors[0]


def test_a_subset_carries_the_damping_too():
    model, data = network("mlp")
    subset = Subset(torch.tensor([17, 0, 5, 9]), torch.tensor([0.3, 0.1, 0.2, 0.5]))
    matrix, places, gradients = dense(model, data, subset)
    damping = torch.cat(
        [(SHARE * matrix[p, p].trace() / (p.stop - p.start)).repeat(p.stop - p.start) for p in places.values()]
    )
    want = gradients[:5] @ torch.linalg.solve(matrix + damping.diag(), gradients.T) / len(gradients)
    influence = influence_of(model, CG(RelativeDamping(SHARE), tolerance=1e-10), batch_size=3).fit(data, subset)
    scores = influence.scores(tuple(x[:5] for x in data), data)
    assert float((scores - want).norm()) <= 1e-6 * float(want.norm())


def test_diagonals_in_the_place_of_a_number():
    a, b = symmetric(torch.logspace(-3, 0, 20)), rows(3, 20)
    b /= b.norm(dim=1, keepdim=True)
    damping = torch.logspace(-2, 0, 20, dtype=torch.float64)
    damped = a + damping.diag()
    found = conjugate_gradients(lambda v: v @ a, b, damping, tolerance=1e-10, max_steps=200)
    assert (residuals(damped, found.x, b) <= 1e-9).all()
    near = damped * (1 + 0.1 * torch.eye(20, dtype=torch.float64))  # of the preconditioner
    inverse = torch.linalg.inv(near)
    top = float(torch.linalg.eigvals(inverse @ damped).real.max())

    def products():
        while True:
            yield lambda v: v @ a

    largest = largest_preconditioned(products(), b[:1], damping, lambda v: v @ inverse)
    assert 0.9 * top <= largest <= top * (1 + 1e-12)
    how = dict(steps=400, tolerance=1e-9, full=lambda v: v @ a, name="ggn", precondition=lambda v: v @ inverse)
    x, taken = neumann(products(), b, damping, largest, **how)
    assert (residuals(damped, x, b) <= 1e-8).all()
    assert taken < 100
    with pytest.raises(Diverged, match="with scale 0.3 the preconditioned series diverges in step"):
        neumann(products(), b, damping, 0.3, **how)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: LiSSA(preconditioner=CG()), TypeError, "LiSSA: preconditioner must be an estimator of single blocks"),
        (lambda: LiSSA(preconditioner=EKFAC), TypeError, "call it: EKFAC"),
        (lambda: CG("auto"), ValueError, "CG: damping must be a number, got 'auto'"),
        (lambda: LiSSA("auto"), ValueError, "LiSSA: damping must be a number > 0"),
    ],
)
def test_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_a_layer_without_curvature_has_no_share():
    model, (x, y) = network("mlp")
    with torch.no_grad():
        model[2].weight.zero_()  # nothing reaches the first layer
    with pytest.raises(ValueError, match="CG: the mean eigenvalue of layer '0' is 0, of which no share can be taken"):
        influence_of(model, CG(RelativeDamping(SHARE))).fit((x, y))


def test_the_training_damps_all_layers_alike():
    assert CG(TrainingDamping(5.0, 0.1)).damping_used == pytest.approx(0.3)
    assert LiSSA(TrainingDamping(5.0, 0.1)).damping_used == pytest.approx(0.3)
