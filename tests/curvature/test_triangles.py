"""A block and its factor in one square: against float64 definitions, and against a factor beside the block."""

import copy
import math
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastif import ExactBlock, IllConditioned, Influence
from fastif.curvature import NotPositiveDefinite
from fastif.curvature.exact import triangles
from fastif.curvature.exact.factor import InPlaceFactor
from fastif.measure import MEMORY_BY, Measure
from fastif.model.gradients import Dense
from tests.curvature.test_exact_block import close, conditioned, head_problem

G = torch.Generator().manual_seed(0)
PANEL = triangles.panel_of(1)  # the smallest


def positive(size, dtype=torch.float32, seed=0):
    """A symmetric matrix with a condition of a few dozens, to the bit."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(2 * size + 3, size, generator=g, dtype=torch.float64)
    matrix = (rows.T @ rows / len(rows)).to(dtype)
    return matrix.tril() + matrix.tril(-1).T


def damped(matrix, damping):
    whole = matrix.double().tril() + matrix.double().tril(-1).T
    return whole + damping * torch.eye(len(matrix), dtype=torch.float64)


def made(matrix, damping=0.0, **arguments):
    """An ExactBlock of a matrix that somebody else holds."""
    block = ExactBlock(damping, in_place=True, **arguments)
    block.load_state_dict({"block": matrix.view(1, len(matrix), 1, len(matrix))})
    return block


def residuals(solved, matrix, rhs, damping=0.0):
    """Relative, of each right-hand side [..., 1, P]."""
    solved, rhs = solved.double().flatten(0, -2), rhs.double().flatten(0, -2)
    return (solved @ damped(matrix, damping) - rhs).norm(dim=1) / rhs.norm(dim=1)


# ---------------------------------------------------------------------------------------------------------- the square


@given(
    size=st.integers(1, 3 * PANEL),
    panel=st.integers(1, 3 * PANEL),
    m=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    damping=st.sampled_from([0.0, 0.1, 30.0]),
)
def test_one_square_holds_the_matrix_and_its_factor(size, panel, m, dtype, damping):
    matrix, eps = positive(size, dtype), torch.finfo(dtype).eps
    square = matrix + torch.full_like(matrix, torch.nan).triu_(1)  # what stands above the diagonal is not read
    pivots = triangles.factorize(square, damping, panel)
    assert torch.equal(square.tril(), matrix.tril())
    assert len(pivots) == size
    assert pivots.min() > 0
    unit = square.double().triu(1) + torch.eye(size, dtype=torch.float64)
    assert close(unit.T * pivots @ unit, damped(matrix, damping), 20 * eps)
    rhs = torch.randn(size, m, generator=G, dtype=torch.float64)
    solved, left = triangles.solve(square, pivots, damping, rhs)
    assert left.shape == (m,)
    assert (left <= 1e-12).all()
    assert close(damped(matrix, damping) @ solved, rhs, 2e-12)
    assert close(triangles.times(square, rhs), damped(matrix, 0) @ rhs, 1e-14)
    triangles.restore(square)
    assert torch.equal(square, matrix)


@pytest.mark.parametrize("size", [1, PANEL - 1, PANEL, PANEL + 1, 3 * PANEL + 5])
def test_panels_matter_for_rounding_alone(size):
    matrix, factors = positive(size), []
    for panel in (1, 7, PANEL, size):
        square = matrix.clone()
        pivots = triangles.factorize(square, 1e-3, panel)
        factors.append(torch.cat([square.double().triu(1), pivots[None]]))
    for factor in factors[1:]:
        assert close(factor, factors[0], 1e-5)


def test_larger_squares_take_larger_panels():
    sizes = [1, 64, 3_000, 4_800, 10_000, 100_000]
    assert [triangles.panel_of(size) for size in sizes] == [64, 64, 64, 100, 208, 512]
    for size in sizes[2:]:
        assert triangles.scratch_bytes(size, 4) <= 0.05 * 4 * size**2


def test_pivots_end_where_one_is_not_positive():
    for size, at in ((3, 0), (3, 2), (2 * PANEL + 1, PANEL - 1), (2 * PANEL + 1, PANEL), (2 * PANEL + 1, 2 * PANEL)):
        matrix = torch.eye(size)
        matrix[at, at] = -2.0
        square = matrix.clone()
        pivots = triangles.factorize(square, 0.0)
        assert pivots[-1] == pivots.min() == -2
        assert torch.equal(square.tril(), matrix.tril())


def test_columns_of_any_length_are_solved_for():
    """Each is scaled to length one: float32 holds none of these."""
    square = positive(40)
    matrix, pivots = square.clone(), triangles.factorize(square, 0.0)
    rhs = torch.randn(40, 4, generator=G, dtype=torch.float64) * torch.tensor(
        [1e-60, 1.0, 1e60, 0.0], dtype=torch.float64
    )
    solved, left = triangles.solve(square, pivots, 0.0, rhs)
    assert (left <= 1e-12).all()
    for j in range(4):
        assert close(damped(matrix, 0.0) @ solved[:, j], rhs[:, j], 2e-12)
    assert (solved[:, 3] == 0).all()


# ----------------------------------------------------------------------------------------------------------- the block


@pytest.mark.parametrize("size", [60, PANEL + 1, 500])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_residuals_logdet_and_condition_of_a_float32_square(size, condition):
    matrix = conditioned(size, condition)
    block = made(matrix, 1e-8)
    rhs = torch.randn(70, 1, size, generator=G)
    assert residuals(block.solve(rhs.double()), matrix, rhs, 1e-8).max() <= 1e-9
    assert block.solve(rhs).dtype == torch.float32
    assert block.in_place_used
    values = torch.linalg.eigvalsh(damped(matrix, 1e-8))
    assert block.logdet() == pytest.approx(values.log().sum().item(), rel=1e-5)
    if size == 60:
        assert block.condition() == pytest.approx((values[-1] / values[0]).item(), rel=1e-3)
    else:
        assert 0.1 * values[-1] / values[0] <= block.condition() <= 1.001 * values[-1] / values[0]


@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_it_does_what_a_factor_beside_the_block_does(matrix, dtype, tolerance):
    inputs, logits, labels = head_problem(400, 30, 5, dtype)
    weights = torch.full((400,), 1 / 400, dtype=dtype)
    rhs = torch.randn(3, 5, 30, generator=G, dtype=torch.float64)
    gradients = Dense(inputs[None, :9, None], logits[None, :9, None])
    within, beside = (ExactBlock(1e-2, matrix, in_place=place) for place in (True, False))
    few, many, again = slice(0, 3), slice(3, 300), slice(100, 200)

    def same(tolerance):
        assert torch.equal(within.block, beside.block)
        assert close(within.solve(rhs), beside.solve(rhs), tolerance)
        assert close(within.sq_norms(gradients), beside.sq_norms(gradients), tolerance)
        assert within.logdet() == pytest.approx(beside.logdet(), rel=tolerance)
        assert within.condition() == pytest.approx(beside.condition(), rel=1e-3)
        assert (within.in_place_used, beside.in_place_used) == (True, False)

    for block in (within, beside):
        block.fit(inputs, logits, labels, weights)
    same(tolerance)
    assert close(within.inverse(), beside.inverse(), tolerance)
    assert close(within.factor, beside.factor, tolerance)
    for rows in (few, many):
        for block in (within, beside):
            block.downdate(inputs[rows], logits[rows], labels[rows], weights[rows])
        same(tolerance)
    for block in (within, beside):
        block.update(inputs[again], logits[again], labels[again], weights[again])
    same(tolerance)


@pytest.mark.parametrize("call", ["solve", "state_dict", "copy"])
def test_nobody_elses_block_is_written_to(call):
    """What was given out or taken in stays as it was when a factor is made; a factor stays when the block is read."""
    matrix = positive(PANEL + 9)
    theirs = matrix.clone()
    block = made(theirs, 0.1)
    rhs = torch.randn(2, 1, PANEL + 9, generator=G)
    before = block.solve(rhs)
    assert torch.equal(theirs, matrix)
    if call == "copy":
        copied = copy.deepcopy(block)
        copied._solver.release()
        copied.block.zero_()
        assert close(copied.solve(rhs), rhs / 0.1, 1e-6)
    elif call == "state_dict":
        theirs = block.state_dict()["block"]
        other = ExactBlock(0.2, in_place=True)
        other.load_state_dict({"block": theirs})
        assert not torch.equal(other.solve(rhs), before)
        assert torch.equal(theirs.view_as(matrix), matrix)
    factor = block._solver.factor
    assert torch.equal(block.block.view_as(matrix), matrix)
    assert block._solver.factor is factor
    assert torch.equal(block.solve(rhs), before)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_pickled_block_goes_on_as_it_was(in_place):
    """A pickle knows no views: the factor in place has to find its square again, or a downdate would leave it there."""
    inputs, logits, _ = head_problem(100, 20, 4, torch.float32)
    block, weights = ExactBlock(1e-2, in_place=in_place).fit(inputs, logits), torch.full((100,), 1 / 100)
    rhs = torch.randn(2, 4, 20, generator=G)
    before = block.solve(rhs)
    other = pickle.loads(pickle.dumps(block))
    assert torch.equal(other.solve(rhs), before)
    assert other.in_place_used == in_place
    rows = slice(0, 40)
    for one in (block, other):
        one.downdate(inputs[rows], logits[rows], weights=weights[rows])
    assert torch.equal(other.block, block.block)
    assert torch.equal(other.solve(rhs), block.solve(rhs))


def test_a_block_that_is_fitted_anew_is_nobody_elses():
    inputs, logits, _ = head_problem(100, 20, 4, torch.float32)
    block = ExactBlock(1e-2, in_place=True).fit(inputs, logits)
    given = block.block
    before = given.clone()
    with pytest.raises(ValueError, match="row 0 is not"):
        block.fit(inputs.log(), logits)
    block.solve(torch.ones(4, 20))  # with the factor of a copy
    assert torch.equal(given, before)
    given = block.fit(inputs, logits).block
    place = block.fit(inputs, logits)._sum.finish().data_ptr()
    block.solve(torch.ones(4, 20))
    assert block._sum.finish().data_ptr() == place  # factored where it stands
    assert torch.equal(given, before)


def test_a_block_is_changed_through_what_was_given_out_before_the_factor():
    inputs, logits, _ = head_problem(100, 20, 4, torch.float32)
    block = ExactBlock(1e-2, in_place=True).fit(inputs, logits)
    given = block.block.mul_(0.5)
    before = given.clone()
    rhs = torch.randn(1, 4, 20, generator=G)
    half = ExactBlock(1e-2, in_place=False).fit(inputs, logits, weights=torch.full((100,), 0.5 / 100))
    assert close(block.solve(rhs), half.solve(rhs), 1e-5)
    assert torch.equal(given, before)


# ------------------------------------------------------------------------------------------------------------ failures


def indefinite():
    matrix = positive(PANEL + 20)
    matrix[PANEL + 3, PANEL + 3] -= 30
    return matrix


FAILURES = {
    "indefinite": (indefinite(), 1e-3),
    "indefinite at once": (-torch.eye(3), 1e-3),
    "zero": (torch.zeros(70, 70), 0.0),
    "flat": (torch.ones(70, 70), 0.0),
    "NaN": (positive(9).masked_fill_(torch.eye(9) > 0, torch.nan), 1.0),
    "Inf": (positive(9).masked_fill_(torch.eye(9) > 0, torch.inf), 1.0),
    "overflow": (torch.full((3, 3), 3e38).fill_diagonal_(-3e38), 1.0),
}


def parts(message):
    """The pivot, what stands around it, and the damping that would do."""
    before, pivot, rest = re.match(r"(.*smallest pivot is )(\S+)(.*); damping ", message).groups()
    return float(pivot), (before, rest), float(message.split("; damping ")[1].split()[0])


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_says_what_a_factor_beside_the_block_says_and_leaves_the_block(name):
    matrix, damping = FAILURES[name]
    inplace = made(matrix.clone(), damping, name="conv")
    beside = ExactBlock(damping, name="conv", in_place=False)
    beside.load_state_dict({"block": matrix.view(1, len(matrix), 1, len(matrix))})
    messages = []
    for block in (inplace, beside):
        with pytest.raises(NotPositiveDefinite) as caught:
            block.end(0)
        messages.append(str(caught.value))
    assert torch.equal(inplace.block.nan_to_num().view_as(matrix), matrix.nan_to_num())
    if name == "overflow":  # float64 has the room for a damping of 1e39
        assert messages[0] == "no damping up to 1e300 makes the block positive definite"
        return
    if name in ("NaN", "Inf"):
        assert messages[0] == messages[1]
        return
    said, rest, advice = zip(*map(parts, messages), strict=True)
    assert said[0] == pytest.approx(said[1], rel=1e-2)
    assert rest[0] == rest[1]
    assert advice[1] <= advice[0] <= 10 * advice[1]  # one power of ten is near what float32 resolves
    advised = advice[0]
    rhs = torch.randn(4, 1, len(matrix), generator=G)
    assert residuals(made(matrix, advised).solve(rhs.double()), matrix, rhs, advised).max() <= 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_automatic_damping_gives_solves_that_hold(seed):
    """Of rank 20 in 90, and more and more ill-conditioned: what is found is never less than beside the block."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(20, 90, generator=g) * torch.logspace(0, -seed, 20)[:, None]
    matrix = rows.T @ rows
    matrix = matrix.tril() + matrix.tril(-1).T
    block, beside = made(matrix, "auto"), ExactBlock("auto", in_place=False)
    beside.load_state_dict({"block": matrix.view(1, 90, 1, 90)})
    rhs = torch.randn(5, 1, 90, generator=G)
    assert residuals(block.solve(rhs.double()), matrix, rhs, block.damping_used).max() <= 1e-6
    assert beside.damping_used <= block.damping_used <= 10 * beside.damping_used
    with pytest.raises((NotPositiveDefinite, IllConditioned)):
        made(matrix, block.damping_used / 10).end(0)


def nearly_singular(n):
    """RᵀR with pivots of one and a condition that grows with 3ⁿ: no pivot shows it (Kahan 1966)."""
    root = torch.eye(n, dtype=torch.float64) - 0.77 * torch.ones(n, n, dtype=torch.float64).triu(1)
    return (root.T @ root).float()


def test_what_refinement_does_not_reach_is_refused_with_the_damping_that_would_do():
    matrix = nearly_singular(20)
    with pytest.raises(IllConditioned, match=r"conv \[20, 20\] with damping 0 is too ill-conditioned") as caught:
        made(matrix, name="conv").end(0)
    message = str(caught.value)
    assert 1e-6 < float(message.split("relative residual of ")[1].split(",")[0]) <= 1
    assert "a float64 factor beside the block (in_place=False)" in message
    advised = float(message.split("; damping ")[1].split()[0])
    assert torch.linalg.cond(damped(matrix, advised)) <= 1e5
    rhs = torch.randn(5, 1, 20, generator=G)
    assert residuals(made(matrix, advised).solve(rhs.double()), matrix, rhs, advised).max() <= 1e-6
    beside = ExactBlock(0.0, in_place=False)
    beside.load_state_dict({"block": matrix.view(1, 20, 1, 20)})
    assert residuals(beside.solve(rhs.double()), matrix, rhs).max() <= 1e-6


def test_a_solve_that_is_worse_than_the_one_that_was_tried_is_refused_too():
    """The factor of another damping stands for one that was spoilt: refinement stagnates far from the solution."""
    square = positive(30)
    spoilt = InPlaceFactor(square, triangles.factorize(square, 0.0), 1e3, "conv")
    rhs = torch.randn(30, 2, generator=G, dtype=torch.float64)
    with pytest.raises(IllConditioned, match=r"conv \[30, 30\] with damping 1000 .* residual of"):
        spoilt.solve(rhs)
    solved, left = triangles.solve(square, spoilt._pivots, 1e3, rhs)  # no step makes it worse than it began
    assert (left <= 1).all()
    assert torch.allclose(left, (damped(square.tril(), 1e3) @ solved - rhs).norm(dim=0) / rhs.norm(dim=0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_right_hand_sides_must_be_finite(value):
    rhs = torch.ones(2, 1, 9)
    rhs[1, 0, 4] = value
    with pytest.raises(ValueError, match="head: right-hand sides must be finite, got NaN or Inf"):
        made(positive(9)).solve(rhs)


def test_in_place_is_one_of_three():
    with pytest.raises(ValueError, match="ExactBlock: in_place must be True, False or 'auto', got 'never'"):
        ExactBlock(in_place="never")


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.skipif(MEMORY_BY != "allocations", reason="memory is counted by fastif._memory")
def test_a_square_is_factored_and_solved_with_in_little_more_than_its_own_bytes():
    size = 2000
    block = ExactBlock(1e-3, in_place=True).fit(torch.randn(50, 200, generator=G), torch.randn(50, 10, generator=G))
    rhs = torch.randn(4, 10, 200, generator=G, dtype=torch.float64)
    with Measure() as work:
        block.end(0)
    assert 0.01 * 4 * size**2 <= work.peak_bytes <= triangles.scratch_bytes(size, 4)
    with Measure() as work:
        solved = block.solve(rhs)
    assert block.in_place_used
    assert 0.01 * 4 * size**2 <= work.peak_bytes <= 0.1 * 4 * size**2
    matrix = block.block.view(size, size)
    assert residuals(solved[:, None].flatten(2), matrix, rhs[:, None].flatten(2), 1e-3).max() <= 1e-6
    singular = ExactBlock(0.0, in_place=True).fit(torch.randn(9, 200, generator=G), torch.randn(9, 10, generator=G))
    with Measure() as work, pytest.raises(NotPositiveDefinite):
        singular.end(0)
    assert (
        work.peak_bytes <= 0.25 * 4 * size**2
    )  # with the vectors of Lanczos' method, where rounding makes it indefinite


def wide():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 4))
    return model, (torch.randn(50, 30), torch.arange(50) % 4)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher"])
def test_scores_through_influence_are_those_of_a_float64_factor(matrix, joint):
    model, data = wide()
    answers = []
    for place in (True, False):
        curvature = ExactBlock(1e-3, matrix, joint=joint, in_place=place)
        influence = Influence(model, curvature=curvature, layers="*", progress=False).fit(data)
        loaded = Influence(model, curvature=curvature, layers="*", progress=False).load_state_dict(
            influence.state_dict()
        )
        assert torch.equal(loaded.scores(data, data), influence.scores(data, data))
        assert all(block.in_place_used == place for block in influence.curvature.values())
        answers.append((influence.scores(data, data), influence.self_influence(data)))
    for within, beside in zip(*answers, strict=True):
        assert close(within, beside, 1e-5)


def test_memory_decides_where_the_factor_stands(monkeypatch):
    model, data = wide()
    size = 620

    def place():
        return ExactBlock(1e-3).fit(data[0][:, :20].repeat(1, 31)[:, :155], data[0][:, :4]).in_place_used

    def have(room):
        monkeypatch.setattr("fastif.curvature.exact.room.available_bytes", lambda device: room)

    for room, within in ((8 * size**2, False), (8 * size**2 - 1, True), (None, False)):  # beside a block that is there
        have(room)
        assert place() == within
        influence = Influence(model, curvature=ExactBlock(1e-3), layers="0", progress=False)
        have(None if room is None else room + 4 * size**2)  # a plan allocates no block
        plan = influence.plan(data, data)
        have(room)
        assert plan.curvature_bytes == (4 if within else 12) * size**2
        assert influence.fit(data).curvature["0"].in_place_used == within
    least = 4 * size**2 + triangles.scratch_bytes(size, 4)
    have(least)
    assert place()
    have(least - 1)
    message = (
        r"ExactBlock: '0' has 620 parameters, so that its block with its factor in place takes [0-9.]+ GiB "
        r"\(620 squared times 4 bytes\), of which [0-9.]+ GiB can be had; KFAC or EKFAC takes"
    )
    for arguments in ({}, {"in_place": True}):
        influence = Influence(model, curvature=ExactBlock(1e-3, **arguments), layers="0", progress=False)
        for call in (influence.fit, influence.plan):
            with pytest.raises(MemoryError, match=message):
                call(data)


@pytest.mark.skipif(MEMORY_BY != "allocations", reason="memory is counted by fastif._memory")
@pytest.mark.parametrize("place", [True, False])
def test_a_plan_tells_the_bytes_of_both(place):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 20), nn.Tanh(), nn.Linear(20, 4))
    data = torch.randn(50, 60), torch.arange(50) % 4
    influence = Influence(model, curvature=ExactBlock(1e-3, in_place=place), layers="0", progress=False)
    plan = influence.plan(data, data)
    with Measure() as work:
        influence.fit(data)
    assert 1 / 1.2 <= plan.fit_bytes / work.peak_bytes <= 1.2
    with Measure() as work:
        influence.scores(data, data)
    assert 1 / 1.3 <= plan.score_bytes / work.peak_bytes <= 1.3
