"""CG, LiSSA and Arnoldi as estimators of a whole network; test_solvers.py has them on dense matrices."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from tqdm import tqdm

from fastif import (
    CG,
    EKFAC,
    KFAC,
    Arnoldi,
    Diagonal,
    Diverged,
    ExactBlock,
    Influence,
    LiSSA,
    NotConverged,
)
from fastif import NotPositiveDefinite as Indefinite
from fastif.curvature.matrix_free.lissa import neumann
from fastif.measure import MEMORY_BY, Measure
from fastif.samplers import Subset
from tests.helpers.matrix_free import DAMPING, answers, assert_close, influence_of, network
from tests.helpers.problems import residuals, rows, symmetric


@pytest.mark.parametrize("name", ["mlp", "words"])
@pytest.mark.parametrize(
    ("made", "tolerance"),
    [
        (CG(DAMPING, tolerance=1e-11), 1e-8),
        (CG(DAMPING, tolerance=1e-11, keep_graph=True), 1e-8),
        (CG(DAMPING, tolerance=1e-11, preconditioner=Diagonal(DAMPING)), 1e-8),
        (CG(DAMPING, tolerance=1e-11, preconditioner=KFAC(DAMPING)), 1e-8),
        (CG(DAMPING, tolerance=1e-11, preconditioner=EKFAC("auto", "monte_carlo")), 1e-8),
        (LiSSA(0.5, tolerance=1e-5), 1e-4),
        (LiSSA(0.5, tolerance=1e-7, keep_graph=True, scale=2.0), 1e-6),
        (Arnoldi(200, DAMPING, tolerance=1e-9, block=16), 1e-8),
    ],
    ids=["cg", "cg, graph", "cg, diagonal", "cg, kfac", "cg, ekfac", "lissa", "lissa, graph", "arnoldi"],
)
def test_all_of_them_give_the_inverse_of_the_whole_matrix(name, made, tolerance):
    model, data = network(name)
    want = answers(influence_of(model, ExactBlock(made.damping, joint=True)).fit(data), data)
    influence = influence_of(model, made, batch_size=50).fit(data)
    assert_close(answers(influence, data), want, tolerance)
    part = answers(influence_of(model, ExactBlock(made.damping), layers="*").fit(data), data)
    assert (part[0] - want[0]).norm() > 0.01 * want[0].norm()  # what layers have in common counts


@pytest.mark.parametrize("made", [CG(DAMPING, tolerance=1e-10), Arnoldi(40, DAMPING, tolerance=1e-9, max_steps=15)])
def test_weights_batches_and_memory_are_as_they_should_be(made):
    model, data = network("words")
    subset = Subset(torch.tensor([17, 0, 5, 9]), torch.tensor([0.3, 0.1, 0.2, 0.5]))
    want = answers(influence_of(model, ExactBlock(DAMPING, joint=True)).fit(data, subset), data)
    for batch_size, memory in ((3, 10000), (64, 1 << 20)):
        influence = influence_of(model, made, batch_size=batch_size, memory=memory).fit(data, subset)
        assert_close(answers(influence, data), want, 1e-7)


def test_a_subset_of_one_example():
    model, data = network("mlp")
    subset = Subset(torch.tensor([3]), torch.tensor([1.0]))
    want = influence_of(model, ExactBlock(0.3, joint=True)).fit(data, subset).scores(data, data)
    for made in (
        CG(0.3, tolerance=1e-10),
        LiSSA(0.3, tolerance=1e-6, keep_graph=True),
        Arnoldi(5, 0.3, tolerance=1e-9),
    ):
        got = influence_of(model, made).fit(data, subset).scores(data, data)
        assert float((got - want).norm()) <= 1e-5 * float(want.norm())


def test_the_mean_over_drawn_matrices_goes_to_the_inverse():
    points = rows(60, 6)
    whole = points.T @ points / 60
    b = rows(2, 6, seed=2)
    b /= b.norm(dim=1, keepdim=True)
    want = b @ torch.linalg.inv(whole + 0.3 * torch.eye(6, dtype=torch.float64))
    errors = []
    for steps in (30, 3000):
        g = torch.Generator().manual_seed(0)

        def matrices(g=g):
            while True:
                some = points[torch.randint(60, (10,), generator=g)]
                yield lambda v, some=some: v @ some.T @ some / 10

        x, taken = neumann(matrices(), b, 0.3, 4.0, steps=steps, tolerance=None, full=lambda v: v @ whole, name="ggn")
        assert taken == steps
        errors.append(float((x - want).norm() / want.norm()))
    assert errors[1] < 0.02 < errors[0]


def test_stochastic_lissa_draws_by_seed_whatever_the_batches_and_the_memory():
    model, data = network("mlp")
    few = tuple(x[:3] for x in data)
    made = LiSSA(0.5, max_steps=15, batch=12, repeats=2, tolerance=0.999)
    first = influence_of(model, made).fit(data)
    scores = first.scores(few, few)
    assert first.curvature["0"].steps_taken == 30
    again = influence_of(model, made, batch_size=5, memory=9000).fit(data)
    assert torch.allclose(again.scores(few, few), scores, rtol=1e-8)
    assert again.curvature["0"].scale_used == pytest.approx(first.curvature["0"].scale_used)
    other = influence_of(model, made, seed=1).fit(data).scores(few, few)
    assert not torch.allclose(other, scores, rtol=1e-4)
    exact = influence_of(model, ExactBlock(0.5, joint=True)).fit(data).scores(few, few)
    assert 1e-3 < float((scores - exact).norm() / exact.norm()) < 0.5


def test_the_hessian_is_solved_with_or_refused():
    model, data = network("words")
    few = tuple(x[:3] for x in data)
    with pytest.raises(Indefinite, match="damping 0.0001 is not positive definite.*matrix='ggn'") as error:
        influence_of(model, CG(1e-4, "hessian")).fit(data).scores(few, few)
    advised = float(str(error.value).split("; damping ")[1].split(",")[0].split()[0])
    cg_scores = influence_of(model, CG(advised, "hessian", tolerance=1e-10)).fit(data).scores(few, few)
    lissa = (
        influence_of(model, LiSSA(advised, "hessian", tolerance=1e-6, max_steps=5000, keep_graph=True))
        .fit(data)
        .scores(few, few)
    )
    assert torch.allclose(lissa, cg_scores, rtol=1e-3, atol=1e-7)
    whole = Arnoldi(200, advised, "hessian", block=16, tolerance=1e-9)
    assert torch.allclose(influence_of(model, whole).fit(data).scores(few, few), cg_scores, rtol=1e-5, atol=1e-9)
    with pytest.raises(Indefinite, match="Arnoldi: the hessian with damping 0.0001 has the negative eigenvalue -"):
        influence_of(model, Arnoldi(200, 1e-4, "hessian", block=16)).fit(data)
    with pytest.raises(Indefinite, match="LiSSA: the hessian with damping 0.0001 is not positive definite"):
        influence_of(model, LiSSA(1e-4, "hessian", max_steps=3000, keep_graph=True)).fit(data).scores(few, few)


@pytest.mark.parametrize(
    "made",
    [
        CG(DAMPING, preconditioner=Diagonal(DAMPING)),
        LiSSA(0.5),
        Arnoldi(10, DAMPING),
    ],
    ids=lambda made: type(made).__name__,
)
def test_checkpoints_and_states(made):
    model, data = network("mlp")
    g = torch.Generator().manual_seed(1)
    states = [
        {k: v + 0.1 * torch.randn(v.shape, generator=g, dtype=v.dtype) for k, v in model.state_dict().items()}
        for _ in range(2)
    ]
    influence = influence_of(model, made, checkpoints=states).fit(data)
    parts = []
    for state in states:
        other = copy.deepcopy(model)
        other.load_state_dict(state)
        parts.append(influence_of(other, made).fit(data).scores(data, data))
    assert torch.allclose(influence.scores(data, data), (parts[0] + parts[1]) / 2, rtol=1e-8, atol=1e-12)
    loaded = influence_of(model, made, checkpoints=states).load_state_dict(influence.state_dict())
    if isinstance(made, Arnoldi):
        assert torch.equal(loaded.scores(data, data), influence.scores(data, data))
    else:
        with pytest.raises(ValueError, match=r"multiplies with the data's curvature, .* call fit\(train\)"):
            loaded.scores(data, data)


@pytest.mark.parametrize("made", [CG(DAMPING, preconditioner=KFAC(DAMPING)), LiSSA(0.5), Arnoldi(10, DAMPING)])
def test_stored_scores_resume_and_plans_are_made(made, tmp_path, monkeypatch):
    model, data = network("mlp")
    monkeypatch.setattr("fastif.influence.score_job.BLOCK_BYTES", 8 * 90 * 20)
    influence = influence_of(model, made, batch_size=30).fit(data)
    folder = tmp_path / "scores"
    query = tuple(x[:40] for x in data)
    stored = influence.scores(query, data, out=folder)
    whole = stored.load()
    assert torch.allclose(whole, influence.scores(query, data), rtol=1e-2, atol=1e-3 * float(whole.abs().max()))
    removed = sorted(folder.glob("scores-*.npy"))[1]
    removed.unlink()
    again = influence_of(model, copy.deepcopy(made), batch_size=30).fit(data)
    again = again.scores(query, data, out=folder, resume=True)
    assert torch.equal(again.load(), whole)
    assert "object at" not in again.settings["curvature"]
    plan = influence.plan(data)
    assert plan.layers["0"].curvature == type(made).__name__
    assert plan.curvature_bytes == sum(v.nbytes for v in influence.state_dict().values() if v.dim() > 1)


def test_low_rank_leaves_out_the_smallest_and_tells_how_much():
    model, data = network("mlp")
    exact = influence_of(model, ExactBlock(DAMPING, joint=True)).fit(data)
    block = exact.curvature["0"].block.reshape(57, 57)
    values, vectors = torch.linalg.eigh(block)
    influence = influence_of(model, Arnoldi(6, DAMPING, tolerance=1e-9, max_steps=40)).fit(data)
    found = influence.curvature["0"]
    assert torch.allclose(found.eigenvalues, values.flip(0)[:6], rtol=1e-8)
    assert found.left_out == pytest.approx(float(values[-7]), rel=1e-6)
    assert (found.residuals <= 1e-8).all()
    kept = vectors[:, -6:]
    inverse = torch.linalg.inv(kept @ torch.diag(values[-6:]) @ kept.T + DAMPING * torch.eye(57, dtype=torch.float64))
    eye = torch.eye(57, dtype=torch.float64)
    shapes = {name: block.shape for name, block in influence.capture.blocks.items()}
    split = dict(zip(shapes, eye.split([36, 21], 1), strict=True))
    solved = found.solve({name: part.reshape(57, *shapes[name]) for name, part in split.items()})
    got = torch.cat([solved[name].flatten(1) for name in shapes], 1)
    assert torch.allclose(got, inverse, rtol=1e-6, atol=1e-7)
    true = torch.linalg.inv(block + DAMPING * eye)
    worst = float(torch.linalg.matrix_norm(got - true, 2) * DAMPING)
    assert worst <= found.error * (1 + 1e-6)  # 1 / λ is the norm of what stands outside of the span
    assert worst > 0.9 * found.error


def test_too_small_a_space_is_warned_of_and_not_taken_for_the_whole():
    model, data = network("mlp")
    with pytest.warns(NotConverged, match=r"Arnoldi: after 2 steps 2 of rank=6 pairs .* residual is 0\.\d+ of"):
        influence = influence_of(model, Arnoldi(6, DAMPING, block=1, max_steps=2)).fit(data)
    found = influence.curvature["0"]
    assert found.left_out == float("inf")
    assert found.error == 1
    with pytest.warns(NotConverged, match="Arnoldi: after 3 steps 2 of rank=2 pairs are there"):
        influence = influence_of(model, Arnoldi(2, DAMPING, block=1, max_steps=3, tolerance=1e-9)).fit(data)
    assert 0 < influence.curvature["0"].error < 1
    whole = influence_of(model, Arnoldi(200, DAMPING, block=16)).fit(data).curvature["0"]  # all of it: none is left
    assert whole.error == whole.left_out == 0
    assert whole.state_dict()["left_out"].dtype == torch.float64


def test_repeated_eigenvalues_of_a_regression_are_kept():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(20, 4, dtype=torch.float64)
    data = x, torch.randn(20, 3, dtype=torch.float64)  # G = 2 I ⊗ A: every eigenvalue three times
    want = Influence(model, "mse", ExactBlock(DAMPING, joint=True), progress=False).fit(data).scores(data, data)
    made = Arnoldi(15, DAMPING, tolerance=1e-9)
    got = Influence(model, "mse", made, progress=False).fit(data).scores(data, data)
    assert torch.allclose(got, want, rtol=1e-7, atol=1e-10)


def test_too_few_steps_are_warned_of_with_the_residual():
    model, data = network("mlp")
    few = tuple(x[:2] for x in data)
    influence = influence_of(model, CG(DAMPING, tolerance=1e-9, max_steps=3)).fit(data)
    with pytest.warns(NotConverged, match=r"CG: after 3 of 3 steps the residual is .* above the tolerance 1e-09"):
        influence.scores(few, few)
    assert influence.curvature["0"].steps_taken == 3
    assert 1e-9 < influence.curvature["0"].residual < 1
    with pytest.warns(NotConverged, match="LiSSA: after 5 steps the residual is .* more damping or CG would help"):
        influence_of(model, LiSSA(DAMPING, max_steps=5)).fit(data).scores(few, few)
    model.float()
    single = tuple(x.float() if x.is_floating_point() else x for x in data)
    with pytest.warns(NotConverged, match="it falls no longer, torch.float32 does not resolve less"):
        influence_of(model, CG(DAMPING, tolerance=1e-12)).fit(single).scores(tuple(x[:9] for x in single), single)


def test_warnings_point_at_the_line_that_asked():
    model, data = network("mlp")
    few = tuple(x[:2] for x in data)
    influence = influence_of(model, CG(1e-6, max_steps=1, tolerance=1e-9)).fit(data)
    for ask in (
        lambda: influence.scores(few, data),
        lambda: influence.self_influence(few),
        lambda: influence.on_parameters(few),
        lambda: influence_of(model, Arnoldi(6, DAMPING, block=1, max_steps=2)).fit(data),
    ):
        with pytest.warns(NotConverged) as found:
            ask()
        assert {warning.filename for warning in found} == {__file__}


def test_the_true_residual_is_told_and_the_tolerance_obeyed():
    model, data = network("words")
    exact = influence_of(model, ExactBlock(DAMPING, joint=True)).fit(data).curvature["words"].block
    exact = exact.reshape(len(exact) * exact.shape[1], -1)
    for made in (CG(DAMPING, tolerance=1e-5), LiSSA(0.5, tolerance=1e-4)):
        influence = influence_of(model, made).fit(data)
        estimator = influence.curvature["words"]
        shapes = {name: block.shape for name, block in influence.capture.blocks.items()}
        rhs = {name: torch.randn(3, *shape, dtype=torch.float64) for name, shape in shapes.items()}
        rhs["words"][1] = 0
        solved = estimator.solve(rhs)
        b, x = (torch.cat([v[name].flatten(1) for name in shapes], 1) for v in (rhs, solved))
        true = residuals(exact, x, b, made.damping)
        assert estimator.residual == pytest.approx(float(true.max()), rel=1e-6)
        assert estimator.residual <= made.tolerance


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_coarse_products_stagnate_and_do_not_diverge(autocast):
    model, (x, y) = network("mlp")
    model = model.float() if autocast else model.bfloat16()
    x = x.to(next(model.parameters()).dtype)
    influence = influence_of(model, LiSSA(DAMPING, tolerance=1e-5), autocast=autocast).fit((x, y))
    with pytest.warns(NotConverged, match="LiSSA: after .* the residual is"):
        scores = influence.scores((x[:3], y[:3]), (x, y))
    assert scores.isfinite().all()
    assert influence.curvature["0"].residual < 1


def test_rounding_is_told_from_divergence():
    a, b = symmetric(torch.linspace(0, 1, 30)), rows(2, 30)
    b /= b.norm(dim=1, keepdim=True)
    g = torch.Generator().manual_seed(0)

    def noisy(v):
        image = v @ a
        return image + 0.05 * image.norm(dim=1, keepdim=True) * torch.randn(v.shape, generator=g, dtype=v.dtype)

    def matrices():
        while True:
            yield noisy

    options = {"steps": 2000, "tolerance": 1e-9, "full": lambda v: v @ a, "name": "matrix"}
    x, steps = neumann(matrices(), b, 0.1, 1.4, eps=1e-2, **options)
    assert steps < 2000
    assert x.isfinite().all()
    assert 1e-9 < float(residuals(a, x, b, 0.1).max()) < 10
    with pytest.raises(Diverged, match="would do, or 'auto'"):
        neumann(matrices(), b, 0.1, 0.4, eps=1e-2, **options)


@pytest.mark.skipif(MEMORY_BY != "allocations", reason="memory is counted by fastif._memory")
@pytest.mark.parametrize("made", [CG(0.5, tolerance=0.5), Arnoldi(2, 0.5, tolerance=0.5)])
def test_self_influence_keeps_to_its_memory(made):
    torch.manual_seed(0)
    model, data = nn.Linear(500, 20), (torch.randn(200, 500), torch.arange(200) % 20)
    peaks, values = [], []
    for memory in (1 << 20, 1 << 27):
        influence = influence_of(model, made, memory=memory).fit(data)
        with Measure() as work:
            values.append(influence.self_influence(data))
        peaks.append(work.peak_bytes)
    assert peaks[0] < peaks[1] / 3
    assert torch.allclose(*values, rtol=1e-3)


@pytest.mark.parametrize("made", [CG(DAMPING), LiSSA(0.5)])
def test_solves_show_their_progress_where_that_is_wanted(made, capsys, monkeypatch):
    monkeypatch.setattr("fastif.curvature.matrix_free.iterations.tqdm", partial(tqdm, mininterval=0))
    model, data = network("mlp")
    few = tuple(x[:2] for x in data)
    shown = []
    for progress in (False, True):
        Influence(model, curvature=made, progress=progress).fit(data).scores(few, few)
        shown.append(capsys.readouterr().err)
    assert shown[0] == ""
    assert f"{type(made).__name__}: " in shown[1]
    assert "residual=" in shown[1]


def test_plans_tell_what_products_take_at_most():
    model, data = network("mlp")
    plans = {made: influence_of(model, made).plan(data) for made in (CG(), Arnoldi(3), CG(preconditioner=KFAC()))}
    for made, plan in plans.items():
        assert plan.multiplying == (type(made).__name__,)
        assert f"products with the curvature: {type(made).__name__}" in str(plan)
        assert f"fit: at most {plan.fit_flops / 1e9:.1f} GFLOP" in str(plan)
        assert ("solved for with at most" in str(plan)) == isinstance(made, CG)
    flops = [plan.fit_flops for plan in plans.values()]
    assert flops[0] == 0 < flops[1]
    assert flops[2] == influence_of(model, KFAC()).plan(data).fit_flops > 0
    solves = [plan.solve_flops for plan in plans.values()]
    assert solves[0] == solves[2] > solves[1] == 0
    held = influence_of(model, KFAC()).plan(data)
    assert (held.multiplying, held.solve_flops, held.solve_bytes) == ((), 0, 0)
    assert "at most" not in str(held)


def test_kept_graphs_tell_their_bytes():
    model, data = network("mlp")
    few = tuple(x[:2] for x in data)
    for made in (CG(DAMPING, keep_graph=True), LiSSA(0.5, keep_graph=True)):
        influence = influence_of(model, made).fit(data)
        influence.scores(few, few)
        assert influence.curvature["0"].graph_bytes > data[0].nbytes


def test_zero_gradients_stay_zero():
    model, (x, y) = network("mlp")
    y = y.clone()
    y[0] = -100  # does not count: its gradient is zero
    for made in (CG(DAMPING), LiSSA(0.5), Arnoldi(8, DAMPING)):
        influence = influence_of(model, made).fit((x, y))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scores = influence.scores((x[:1], y[:1]), (x, y))
        assert scores.shape == (1, 90)
        assert not scores.any()


def test_a_mapping_may_give_some_layers_to_cg():
    model, data = network("words")
    made = {"words": Diagonal(DAMPING), "*": CG(DAMPING, tolerance=1e-10)}
    got = influence_of(model, made).fit(data).scores(data, data, by="layer")
    whole = {"words": Diagonal(DAMPING), "*": ExactBlock(DAMPING, joint=True)}
    want = influence_of(model, whole).fit(data).scores(data, data, by="layer")
    for name, scores in want.items():
        assert torch.allclose(got[name], scores, rtol=1e-6, atol=1e-9), name
