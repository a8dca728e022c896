"""ExactBlock over any layers, held against dense matrices by torch.func; its downdates, solves and refusals."""

import copy
import math

import pytest
import torch
from torch import nn

from fastif import ExactBlock, Influence, samplers
from fastif.curvature import NotPositiveDefinite, limits
from fastif.curvature.exact.cholesky import extreme_eigenvalues
from fastif.curvature.exact.softmax import output_roots
from fastif.data import load
from fastif.model.gradients import Dense
from fastif.removal import head_steps
from tests.data.test_data import real_data
from tests.helpers.networks import build
from tests.helpers.problems import WEIGHT_DECAY, head_gradients, trained

G = torch.Generator().manual_seed(0)


def order_of(influence, names=None):
    """Where the parameters of an influence's blocks stand in the model's flat vector of parameters."""
    start, places = 0, {}
    for parameter in influence.capture.names:
        places[parameter] = torch.arange(start, start + parameter.numel()).view(parameter.shape)
        start += parameter.numel()
    blocks = influence.capture.blocks
    return torch.cat([blocks[name].matrix(places).flatten() for name in names or blocks])


def flat(tree, names, axes):
    return torch.cat([tree[name].flatten(axes) for name in names], -1)


def functional(model, x):
    model = copy.deepcopy(model)  # torch.func leaves a module that is used under two names with other parameters
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return parameters, lambda values: torch.func.functional_call(model, values, (x,))


def dense_hessian(model, x, value):
    """Of value(outputs), over all parameters, by torch.func forwards over backwards."""
    parameters, outputs = functional(model, x)
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        rows = torch.func.jacrev(torch.func.jacrev(lambda values: value(outputs(values))))(parameters)
    return torch.cat([flat(rows[a], parameters, parameters[a].dim()).flatten(0, -2) for a in parameters])


def dense_jacobian(model, x):
    parameters, outputs = functional(model, x)
    jacobians = torch.func.jacrev(lambda values: outputs(values).flatten(1))(parameters)
    return flat(jacobians, parameters, 2)  # [n, m, P]


def squares(outputs, _batch):
    return outputs.flatten(1).square().sum(1)


def close(got, want, tolerance=1e-10):
    return (got - want).norm() <= tolerance * want.norm() + 1e-300


# One of each kind, small: a Hessian takes a backward pass per parameter.
HESSIANS = (
    "linear",
    "linear [n, t, d]",
    "conv1d circular",
    "conv2d valid",
    "conv2d depthwise",
    "conv3d reflect",
    "conv_transpose3d",
    "embedding with padding",
    "layer_norm",
    "rms_norm, two axes",
    "group_norm",
    "batch_norm2d",
    "instance_norm1d",
    "tied linear with bias",
    "tied embedding",
    "three times",
    "in place",
    "frozen",
)
GRADIENTS = (*HESSIANS, "conv1d", "conv2d", "conv_transpose1d", "embedding, one token", "shared module", "encoder")


@pytest.mark.parametrize("name", HESSIANS)
def test_the_joint_hessian_of_every_kind_of_network(name):
    network = build(name)
    influence = Influence(
        network.model, network.loss, ExactBlock(1e4, "hessian", joint=True), layers="*", progress=False, batch_size=3
    )
    influence.fit((network.x, torch.zeros(len(network.x))))
    blocks = influence.curvature
    block = next(iter(blocks.values())).block
    want = dense_hessian(network.model, network.x, lambda outputs: network.loss(outputs, None).mean())
    order = order_of(influence)
    assert close(block.view(len(order), len(order)), want[order][:, order])


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher"])
def test_the_joint_and_the_single_blocks_of_every_kind_of_network(name, matrix):
    network = build(name)
    jacobian = dense_jacobian(network.model, network.x)
    if matrix == "ggn":
        want = 2 * torch.einsum("nmp,nmq->pq", jacobian, jacobian) / len(jacobian)
    else:
        gradients = torch.einsum("nm,nmp->np", 2 * network.model(network.x).flatten(1).detach(), jacobian)
        want = gradients.T @ gradients / len(gradients)
    for joint in (True, False):
        curvature = ExactBlock(1e-2, matrix, joint=joint)
        influence = Influence(network.model, squares, curvature, layers="*", progress=False, batch_size=3)
        influence.fit((network.x, torch.zeros(len(network.x))))
        for names in [list(influence.curvature)] if joint else [[one] for one in influence.curvature]:
            order = order_of(influence, names)
            block = influence.curvature[names[0]].block
            assert close(block.reshape(len(order), len(order)), want[order][:, order]), names


def wide(kind):
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Sequential(nn.Linear(20, 15), nn.Tanh(), nn.Linear(15, 4)), torch.randn(300, 20)
    if kind == "positions":
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Flatten(), nn.Linear(40, 4)), torch.randn(300, 5, 6)
    body = (nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(5 * 36, 4))
    return nn.Sequential(*body), torch.randn(300, 2, 6, 6)


@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize("kind", ["linear", "positions", "convolution"])
def test_float32_blocks_of_hidden_layers(kind, matrix):
    model, x = wide(kind)
    y = torch.arange(300) % 4
    block = Influence(model, curvature=ExactBlock(1e-2, matrix), layers="0", progress=False).fit((x, y)).curvature["0"]
    double = Influence(model.double(), curvature=ExactBlock(1e-2, matrix), layers="0", progress=False)
    want = double.fit((x.double(), y)).curvature["0"].block
    assert block.block.dtype == torch.float32
    assert close(block.block.double(), want, 1e-6)


@pytest.mark.parametrize("loss", ["bce", "mse", "function"])
@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
def test_losses(loss, matrix):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.rand(20, 2, dtype=torch.float64)
    if loss == "function":

        def value(outputs, targets):
            return (outputs - targets).exp().sum(1) + outputs.logsumexp(1)
    elif loss == "bce":

        def value(outputs, targets):
            return nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(1)
    else:

        def value(outputs, targets):
            return (outputs - targets).square().sum(1)

    given = value if loss == "function" else loss
    curvature = ExactBlock(1e3, matrix, joint=True)
    influence = Influence(model, given, curvature, progress=False, batch_size=7).fit((x, y))
    if matrix == "hessian":
        want = dense_hessian(model, x, lambda outputs: value(outputs, y).mean())
    else:
        single = torch.func.hessian(lambda o, t: value(o[None], t[None])[0])
        h = torch.func.vmap(single)(model(x).detach(), y)
        jacobian = dense_jacobian(model, x)
        want = torch.einsum("nmp,nmk,nkq->pq", jacobian, h, jacobian) / 20
    order = order_of(influence)
    assert close(influence.curvature["0"].block.view(len(order), -1), want[order][:, order])


@pytest.mark.parametrize("matrix", ["ggn", "hessian", "empirical_fisher"])
def test_weights_and_batches(matrix):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 2
    weights = torch.rand(20, dtype=torch.float64)
    weights[::4] = 0
    subset = torch.arange(20), weights
    blocks = []
    for size in (1, 7, 20):
        influence = Influence(model, curvature=ExactBlock(10.0, matrix), layers="*", batch_size=size, progress=False)
        influence.fit((x, y), subset=type("S", (), dict(indices=subset[0], weights=weights))())
        blocks.append(influence.curvature["0"].block)
    single = Influence(model, curvature=ExactBlock(10.0, matrix), layers="*", progress=False)
    total = 0
    for i in weights.nonzero().flatten().tolist():
        total = total + weights[i] * single.fit((x[i : i + 1], y[i : i + 1])).curvature["0"].block
    for block in blocks:
        assert close(block, total)


def test_an_indefinite_hessian_is_named_with_its_smallest_eigenvalue():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64) * 3
    influence = Influence(model, "mse", ExactBlock(1e-6, "hessian", joint=True), progress=False)
    with pytest.raises(NotPositiveDefinite, match="Cholesky needs definiteness") as caught:
        influence.fit((x, y))
    said = float(str(caught.value).split("smallest eigenvalue about ")[1].split(",")[0])
    want = torch.linalg.eigvalsh(dense_hessian(model, x, lambda outputs: (outputs - y).square().sum(1).mean()))[
        0
    ].item()
    assert said == pytest.approx(want, rel=1e-2)
    advised = float(str(caught.value).split("; damping ")[1].split()[0])
    assert advised > -want
    influence = Influence(model, "mse", ExactBlock(advised, "hessian", joint=True), progress=False)
    assert influence.fit((x, y)).curvature["0"].inverse().isfinite().all()


# ------------------------------------------------------------------------------------------------------------- solving


def conditioned(size, condition, seed=0):
    """A symmetric float32 matrix with eigenvalues from 1 / condition to 1."""
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))
    values = torch.logspace(-math.log10(condition), 0, size, dtype=torch.float64)
    return ((q * values) @ q.T).float()


@pytest.mark.parametrize("condition", [1e2, 1e4, 3e5])
def test_residuals_logdet_and_condition_of_a_float32_block(condition):
    block = ExactBlock(1e-7)
    block.load_state_dict({"block": conditioned(60, condition).view(4, 15, 4, 15)})
    damped = block.block.view(60, 60).double()
    damped = (damped.tril() + damped.tril(-1).T) + 1e-7 * torch.eye(60, dtype=torch.float64)
    rhs = torch.randn(5, 4, 15, generator=G)
    solved = block.solve(rhs.double())
    assert (solved.flatten(1) @ damped - rhs.flatten(1)).norm() <= 1e-9 * rhs.norm()
    in_single = block.solve(rhs).flatten(1)
    assert in_single.dtype == torch.float32
    values = torch.linalg.eigvalsh(damped)
    assert block.logdet() == pytest.approx(values.log().sum().item(), rel=1e-9)
    assert block.condition() == pytest.approx((values[-1] / values[0]).item(), rel=1e-3)


def test_extreme_eigenvalues_of_large_operators_are_bounds():
    values = torch.logspace(-3, 0, 2000, dtype=torch.float64)
    low, high = extreme_eigenvalues(lambda v: values * v, 2000, values.device)
    assert 0.99 <= high <= 1 + 1e-12
    assert 1e-3 - 1e-12 <= low <= 1e-2


# ----------------------------------------------------------------------------------------------------------- downdates


def head_problem(n, d, c, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, d, generator=g).to(dtype)
    logits = (2 * torch.randn(n, c, generator=g)).to(dtype)
    return inputs, logits, torch.randint(0, c, (n,), generator=g)


@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_few_examples_leave_the_factor_as_it_is(matrix, dtype, tolerance):
    inputs, logits, labels = head_problem(400, 30, 5, dtype)
    block = ExactBlock(1e-2, matrix).fit(inputs, logits, labels)
    weights = torch.full((400,), 1 / 400, dtype=dtype)
    factor = block._factored()
    kept = torch.ones(400, dtype=torch.bool)
    for removed in (torch.tensor([3, 17]), torch.tensor([250])):
        block.downdate(inputs[removed], logits[removed], labels[removed], weights[removed])
        kept[removed] = False
        assert block._solver.factor is factor
        assert factor.corrected
    refit = ExactBlock(1e-2, matrix).fit(inputs[kept], logits[kept], labels[kept], weights[kept])
    rhs = torch.randn(3, 5, 30, generator=G, dtype=torch.float64)
    assert close(block.block, refit.block, tolerance)
    assert close(block.solve(rhs), refit.solve(rhs), tolerance)
    gradients = Dense(inputs[None, :9, None], logits[None, :9, None])
    assert close(block.sq_norms(gradients), refit.sq_norms(gradients), tolerance)
    assert block.logdet() == pytest.approx(refit.logdet(), rel=tolerance)
    assert block.condition() == pytest.approx(refit.condition(), rel=1e-3)
    assert close(block.inverse(), refit.inverse(), tolerance)  # made from a new factor
    assert block._solver.factor is not factor


def test_confident_examples_can_be_taken_out():
    """Roots of outputs' Hessians keep the digits of 1 − p where p is near one."""
    probs = torch.tensor([[1.0, 1e-12, 1e-20]])
    roots = output_roots(probs)[0].double()
    want = torch.tensor([1e-12, 1e-12, 1e-20], dtype=torch.float64)
    assert torch.allclose((roots @ roots.T).diagonal(), want, rtol=1e-5, atol=0)


def test_many_examples_and_automatic_damping_make_a_new_factor():
    inputs, logits, _ = head_problem(400, 30, 5, torch.float64)
    weights = torch.full((400,), 1 / 400, dtype=torch.float64)
    for damping, count in ((1e-2, 200), ("auto", 2)):
        block = ExactBlock(damping).fit(inputs, logits)
        factor = block.factor
        block.downdate(inputs[:count], logits[:count], None, weights[:count])
        assert block._solver.factor is None
        refit = ExactBlock(block.damping_used).fit(inputs[count:], logits[count:], weights=weights[count:])
        assert block.factor is not factor
        assert close(block.factor @ block.factor.T, refit.factor @ refit.factor.T)


def test_what_cancels_too_much_makes_a_new_factor():
    """One example carries nearly all of a nearly undamped block: without it, what a low rank leaves is rounding."""
    inputs, logits, _ = head_problem(1, 60, 2, torch.float64)
    block = ExactBlock(1.0).fit(1e6 * inputs, logits)
    _ = block.factor
    block.downdate(1e6 * inputs, logits)
    assert block._solver.factor is None


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_block_that_does_not_fit_is_refused_with_numbers(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 4))
    data = torch.randn(50, 30), torch.arange(50) % 4
    monkeypatch.setattr("fastif.curvature.exact.room.available_bytes", lambda device: 4_000_000)
    message = (
        r"ExactBlock: '0' has 620 parameters, so that its block and factor take 0.0043 GiB \(620 squared times 12 "
        r"bytes\), of which 0.00373 GiB can be had; in_place=True takes 0.00[0-9]+ GiB"
    )
    influence = Influence(model, curvature=ExactBlock(1e-3, in_place=False), layers="0", progress=False)
    for call in (influence.fit, influence.plan):
        with pytest.raises(MemoryError, match=message):
            call(data)
    for room, other in ((100_000, "KFAC or EKFAC"), (10_000, "Diagonal")):
        monkeypatch.setattr("fastif.curvature.exact.room.available_bytes", lambda device, room=room: room)
        with pytest.raises(MemoryError, match=f"can be had; {other} takes"):
            influence.fit(data)
    with pytest.raises(MemoryError, match=r"'head' has 310 parameters"):
        ExactBlock().fit(torch.randn(9, 31), torch.randn(9, 10))
    monkeypatch.setattr("fastif.curvature.exact.room.available_bytes", lambda device: None)
    influence.fit(data)


def test_available_memory_is_some_of_the_machine():
    from fastif.measure import available_bytes

    room = available_bytes(torch.device("cpu"))
    assert room is None or 1 << 20 < room < 1 << 50


def test_the_plan_counts_the_operations_of_exact_blocks():
    model, x = wide("positions")
    data = x, torch.arange(300) % 4

    def operations(layers, joint=False):
        return Influence(model, curvature=ExactBlock(joint=joint), layers=layers, progress=False).plan(data).fit_flops

    head, hidden = 300 * 10 * 41 * 42 + 164**3 / 3, 300 * 4 * 56 * 57 + 56**3 / 3
    both, passes = 300 * 4 * 220 * 221 + 220**3 / 3, 300 * 2 * 3 * 5 * (5 * 6 * 8 + 40 * 4)
    assert head <= operations("3") <= head + passes
    assert hidden <= operations("0") <= hidden + passes
    assert both <= operations("*", joint=True) <= both + passes


@pytest.mark.parametrize("row", [0, 4])
def test_rows_that_are_not_finite_are_named(row):
    inputs, logits, labels = head_problem(6, 3, 2, torch.float32)
    logits[row, 1] = torch.inf
    for matrix in ("ggn", "empirical_fisher"):
        with pytest.raises(ValueError, match=f"inputs and logits must be finite, row {row} is not"):
            ExactBlock(0.1, matrix).fit(inputs, logits, labels)


def test_an_empty_subset_is_refused():
    model, x = wide("linear")
    empty = type("S", (), dict(indices=torch.zeros(0, dtype=torch.int64), weights=torch.zeros(0)))()
    with pytest.raises(ValueError, match="subset"):
        Influence(model, curvature=ExactBlock(), progress=False).fit((x, torch.arange(300) % 4), subset=empty)


# ---------------------------------------------------------------------------------------- certified subsets and removal


def trained_head(name, examples):
    """Real inputs in [0, 1], and a linear classifier that was trained on them."""
    data = load(name, None if name == "digits" else real_data(name.replace("-", "_")))
    x, y = data.x_train[:examples].double(), data.y_train[:examples]
    x = x if name == "digits" else nn.functional.avg_pool2d(x, 2)
    x = x.flatten(1)
    head = nn.Linear(x.shape[1], 10).double()
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(head(x), y)
        value.backward()
        return value

    optimizer.step(objective)
    return head, x, y


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_the_bound_of_a_certified_subset_holds_on_real_data(name):
    torch.manual_seed(0)
    head, x, y = trained_head(name, 600)
    whole = Influence(head, curvature=ExactBlock(1e-3), progress=False).fit((x, y))
    assert whole.bound is None
    size = sum(parameter.numel() for parameter in head.parameters())
    block = whole.curvature["model"].block.view(size, size)
    before = None
    for tolerance in (0.3, 0.03, 0.001):
        subset = samplers.certified(x, head(x).detach(), tolerance)
        part = Influence(head, curvature=ExactBlock(1e-3), progress=False).fit((x, y), subset=subset)
        missing = block - part.curvature["model"].block.view(size, size)
        low, high = extreme_eigenvalues(lambda v, m=missing: m @ v, size, missing.device)  # of a positive matrix
        assert low >= -1e-9 * high
        assert 0 < high <= part.bound == subset.bound
        assert len(subset.indices) < 600
        assert before is None or part.bound < before
        before = part.bound


def test_one_step_of_removal_by_a_downdate_is_that_of_a_refit(monkeypatch):
    problem = trained()
    head = problem.model[2]
    features = problem.model[:2](problem.x).detach()
    removed = torch.arange(0, 90, 45)
    inputs = torch.cat([features, torch.ones(90, 1, dtype=torch.float64)], 1)
    logits, weights = head(features).detach(), torch.full((90,), 1 / 90, dtype=torch.float64)
    block = ExactBlock(WEIGHT_DECAY).fit(inputs, logits, weights=weights)
    monkeypatch.setattr(limits, "DOWNDATE_SHARE", 0.5)  # the head is small
    made = block._factored()
    block.downdate(inputs[removed], logits[removed], weights=weights[removed])
    assert block._solver.factor is made
    gradients = head_gradients(problem)[removed].sum(0) / 90
    step = block.solve(gradients)
    (history,) = head_steps(
        features,
        problem.y,
        head.weight.detach(),
        head.bias.detach(),
        removed,
        steps=1,
        line_search=False,
        weight_decay=WEIGHT_DECAY,
    )
    moved = torch.cat(
        [history.parameters["weight"] - head.weight, (history.parameters["bias"] - head.bias)[:, None]], 1
    )
    assert close(step, moved.detach(), 1e-5)


def test_fisher_is_the_word_that_other_estimators_have():
    assert repr(ExactBlock(fisher="empirical")) == repr(ExactBlock(matrix="empirical_fisher"))
    assert ExactBlock(fisher="empirical").fisher == ExactBlock(matrix="empirical_fisher", fisher="empirical").fisher
    assert repr(ExactBlock(fisher="exact")) == repr(ExactBlock())
    assert ExactBlock(matrix="hessian", fisher="exact").matrix == "hessian"
    assert "fisher='monte_carlo'" in repr(ExactBlock(fisher="monte_carlo"))
    with pytest.raises(
        ValueError, match="ExactBlock: fisher must be 'auto', 'exact', 'monte_carlo' or 'empirical', got"
    ):
        ExactBlock(fisher="drawn")
    for fisher, matrix in (("empirical", "hessian"), ("exact", "empirical_fisher"), ("auto", "empirical_fisher")):
        with pytest.raises(ValueError, match=f"fisher='{fisher}' and matrix='{matrix}' are two matrices"):
            ExactBlock(matrix=matrix, fisher=fisher)
    for fisher in ("monte_carlo", "auto"):
        with pytest.raises(ValueError, match=f"fisher='{fisher}' goes with matrix='ggn', got 'hessian'"):
            ExactBlock(matrix="hessian", fisher=fisher)


def test_drawn_labels_are_told_apart_in_a_state():
    model = nn.Linear(3, 2).double()
    data = torch.randn(9, 3, dtype=torch.float64, generator=G), torch.arange(9) % 2
    exact, drawn = (
        Influence(model, curvature=ExactBlock(1e-2, fisher=fisher), progress=False).fit(data)
        for fisher in ("exact", "monte_carlo")
    )
    with pytest.raises(ValueError, match=r"fitted by ExactBlock\(matrix='ggn', fisher='monte_carlo'\), not by"):
        exact.load_state_dict(drawn.state_dict())
    again = Influence(model, curvature=ExactBlock(1e-2, fisher="monte_carlo"), progress=False)
    assert torch.equal(again.load_state_dict(drawn.state_dict()).scores(data, data), drawn.scores(data, data))
