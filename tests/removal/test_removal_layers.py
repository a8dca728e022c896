"""Removal beyond the head, held against dense float64 computations by autograd on networks that are small enough."""

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.functional import cross_entropy

from fastif import EKFAC, KFAC, Diagonal, ExactBlock, Step, remove, samplers
from fastif.removal.network import RetainedNetwork, damped_minimum
from tests.helpers.problems import QUIET, REMOVED, WEIGHT_DECAY, flat, small_images, trained


@pytest.fixture(scope="module")
def problem():
    return trained()


@pytest.fixture(scope="module")
def images():
    return small_images()


def dense(model, x, y, names, kept):
    """θ, (1/n) Σ_removed ∇ℓ, ∇F and G_keep over the parameters `names`, from the definitions."""
    theta = {name: p.detach() for name, p in model.named_parameters() if name in names}
    n = len(x)

    def outputs(values):
        return functional_call(model, values, (x,))

    def losses(values):
        return cross_entropy(outputs(values), y, reduction="none")

    logits = outputs(theta)
    jacobian = torch.cat([j.flatten(2) for j in jacrev(outputs)(theta).values()], 2)  # [n, c, P]
    gradients = torch.cat([g.flatten(1) for g in jacrev(losses)(theta).values()], 1)  # [n, P]
    p = logits.softmax(1)
    output_hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    examples = torch.einsum("nap,nab,nbq->npq", jacobian, output_hessians, jacobian)
    removed = gradients[~kept].sum(0) / n
    gradient = gradients[kept].sum(0) / n + WEIGHT_DECAY * flat(theta)
    return flat(theta), removed, gradient, examples[kept].sum(0) / n


def objective(model, x, y, kept, names):
    loss = cross_entropy(model(x[kept]), y[kept], reduction="sum") / len(x)
    decay = sum(p.square().sum() for name, p in model.named_parameters() if name in names)
    return (loss + 0.5 * WEIGHT_DECAY * decay).item()


def kept_of(n, removed=REMOVED):
    kept = torch.ones(n, dtype=torch.bool)
    kept[removed] = False
    return kept


def loaded(model, removal):
    new = copy.deepcopy(model)
    new.load_state_dict(removal.state_dict)
    return new


# --------------------------------------------------------------------------------------------------------- definition


@pytest.mark.parametrize("layers", ["*", ["0", "2"], "0"])
def test_one_exact_step_is_formula_3(problem, layers):
    """θ̂ + (G_keep + (γ + λ)I)⁻¹ (1/n) Σ_removed ∇ℓ with the dense GGN over all the layers at once."""
    names = [name for name, _ in problem.model.named_parameters() if name[0] in ("0" if layers == "0" else "02")]
    theta, removed, _, curvature = dense(problem.model, problem.x, problem.y, names, kept_of(90))
    curvature.diagonal().add_(WEIGHT_DECAY + 0.02 + 0.01)
    want = theta + torch.linalg.solve(curvature, removed)
    removal = remove(
        *(problem.model, (problem.x, problem.y), REMOVED),
        layers=layers, curvature=ExactBlock(0.02, joint=True), damping=0.01, steps=1, line_search=False, **QUIET,
    )  # fmt: skip
    (step,) = removal.history
    assert list(step.parameters) == names
    assert torch.allclose(flat(step.parameters), want, atol=1e-12)
    assert torch.equal(flat({name: removal.state_dict[name] for name in names}), flat(step.parameters))


def test_one_exact_step_of_a_convolution_with_batch_norm_is_formula_3(images):
    model, x, y = images
    names = [name for name, _ in model.named_parameters()]
    theta, removed, _, curvature = dense(model, x, y, names, kept_of(60))
    curvature.diagonal().add_(WEIGHT_DECAY + 0.02)
    want = theta + torch.linalg.solve(curvature, removed)
    (step,) = remove(
        *(model, (x, y), REMOVED),
        layers="*", curvature=ExactBlock(0.02, joint=True), steps=1, line_search=False, batch_size=17, **QUIET,
    ).history  # fmt: skip
    assert torch.allclose(flat(step.parameters), want, atol=1e-12)
    assert set(step.step_size.values()) == {1.0}


def test_the_heads_step_is_the_same_in_feature_space_and_through_the_network(problem):
    settings = dict(steps=1, damping=0.02, line_search=False, **QUIET)
    data = (problem.x, problem.y)
    (feature,) = remove(problem.model, data, REMOVED, **settings).history
    (network,) = remove(problem.model, data, REMOVED, curvature=ExactBlock(0.0), **settings).history
    assert isinstance(feature, Step)
    assert isinstance(network, Step)
    assert feature.step_size == network.step_size == {"2": 1.0}
    for key in ("2.weight", "2.bias"):
        assert torch.allclose(feature.parameters[key], network.parameters[key], atol=1e-12)
    assert feature.objective == pytest.approx(network.objective, abs=1e-12)
    assert feature.gradient_norm == pytest.approx(network.gradient_norm, abs=1e-12)


def test_naming_the_head_is_naming_nothing(problem):
    data = (problem.x, problem.y)
    runs = [remove(problem.model, data, REMOVED, layers=layers, **QUIET) for layers in (None, "2", ["2"])]
    for run in runs[1:]:
        assert torch.equal(run.history[-1].parameters["2.weight"], runs[0].history[-1].parameters["2.weight"])
        assert all(torch.equal(run.state_dict[key], value) for key, value in runs[0].state_dict.items())


def test_gradient_and_the_model_along_directions_are_the_dense_ones(images):
    model, x, y = images
    names = [name for name, _ in model.named_parameters()]
    _, _, gradient, curvature = dense(model, x, y, names, kept_of(60))
    problem = RetainedNetwork(model, (x, y), REMOVED, layers="*", weight_decay=WEIGHT_DECAY, batch_size=13)
    assert problem.gradient() == pytest.approx(gradient.norm().item(), rel=1e-12)
    assert problem.curvature() == 56
    own = problem._newton_steps()
    everything = {name: matrix * (1 + i) for i, (name, matrix) in enumerate(own.items())}
    directions = [*({name: matrix} for name, matrix in own.items()), everything]
    slopes, hessian_along = problem._model_along(directions)

    def vector(direction):
        """The direction in the order of the parameters, read off what a move along it does."""
        before = flat(problem.parameters)
        problem._move(direction)
        moved = flat(problem.parameters) - before
        problem._move({name: -matrix for name, matrix in direction.items()})
        return moved

    d = torch.stack([vector(direction) for direction in directions])
    assert torch.allclose(slopes, -d @ gradient, atol=1e-12)
    curvature.diagonal().add_(WEIGHT_DECAY)
    assert torch.allclose(hessian_along, d @ curvature @ d.T, rtol=1e-9, atol=1e-15)


def test_layers_steps_are_those_of_formula_3_with_line_search_too(images):
    """What the search combines answers the removal alone, however far from its optimum the training ended."""
    model, x, y = images
    names = [name for name, _ in model.named_parameters()]
    _, removed, _, curvature = dense(model, x, y, names, kept_of(60))
    curvature.diagonal().add_(WEIGHT_DECAY + 0.02)
    problem = RetainedNetwork(
        model, (x, y), REMOVED, layers="*", curvature=ExactBlock(0.02, joint=True), weight_decay=WEIGHT_DECAY
    )
    problem.gradient()
    problem.curvature()
    before = flat(problem.parameters)
    problem._move(problem._newton_steps())
    assert torch.allclose(flat(problem.parameters) - before, torch.linalg.solve(curvature, removed), atol=1e-12)


def test_damped_minimum_is_the_minimum():
    g = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=g, dtype=torch.float64)
    matrix, slopes = root @ root.T, torch.randn(4, generator=g, dtype=torch.float64)
    damped = matrix + 0.3 * torch.diag(matrix.diagonal())
    sizes = damped_minimum(slopes, matrix, 0.3)
    assert torch.allclose(hessian(lambda c: 0.5 * c @ damped @ c)(sizes) @ sizes, slopes, atol=1e-12)
    lengths = torch.tensor([1.0, 10.0, 1e-3, 7.0], dtype=torch.float64)
    longer = damped_minimum(slopes * lengths, matrix * lengths[:, None] * lengths, 0.3)
    assert torch.allclose(longer * lengths, sizes, atol=1e-10)  # the same step, however long the directions are


# ------------------------------------------------------------------------------------------------------------- descent


@pytest.mark.parametrize(
    "curvature",
    [None, EKFAC(1e-3), {"2": ExactBlock(0.0), "*": KFAC(1e-3)}, Diagonal(1e-2), ExactBlock(1e-3, joint=True)],
    ids=["default", "EKFAC", "KFAC", "Diagonal", "joint"],
)
@pytest.mark.parametrize("subset", [None, partial(samplers.logit, k=20), partial(samplers.leverage, k=20)])
def test_every_step_lowers_the_objective_that_it_reports(problem, curvature, subset):
    removed = (problem.y == 0).nonzero()[:, 0]
    kept = kept_of(90, removed)
    names = [name for name, _ in problem.model.named_parameters()]
    removal = remove(
        *(problem.model, (problem.x, problem.y), removed),
        layers="*", curvature=curvature, subset=subset, generator=torch.Generator().manual_seed(1), **QUIET,
    )  # fmt: skip
    values = [objective(problem.model, problem.x, problem.y, kept, names)]
    for number, step in enumerate(removal.history, 1):
        model = copy.deepcopy(problem.model)
        model.load_state_dict(removal.after(number))
        assert objective(model, problem.x, problem.y, kept, names) == pytest.approx(step.objective, rel=1e-12)
        assert step.subset_size == (60 if subset is None else 20)
        values.append(step.objective)
    assert len(values) == 7
    assert all(after < before for before, after in pairwise(values))


def test_all_layers_fall_below_what_the_head_can_reach(problem):
    """More parameters, fewer steps: below the head's optimum, which no head can pass."""
    removed = (problem.y == 0).nonzero()[:, 0]
    kept = kept_of(90, removed)
    names = [name for name, _ in problem.model.named_parameters()]
    data = (problem.x, problem.y)
    head = loaded(problem.model, remove(problem.model, data, removed, steps=30, **QUIET))
    bound = objective(head, problem.x, problem.y, kept, names)
    steps = remove(problem.model, data, removed, layers="*", **QUIET).history
    assert steps[-1].objective < bound
    gone, stays = problem.y == 0, problem.y != 0
    new = loaded(problem.model, remove(problem.model, data, removed, layers="*", **QUIET))
    hits = new(problem.x).argmax(1) == problem.y
    assert hits[gone].sum() == 0
    assert hits[stays].sum() >= (problem.model(problem.x).argmax(1) == problem.y)[stays].sum()


def test_a_step_that_the_model_foretold_badly_is_taken_shorter(problem):
    """A subset whose weights say a ten-thousandth of the curvature: the first combination is far too long."""
    removed = (problem.y == 0).nonzero()[:, 0]
    subset = samplers.Subset(torch.arange(90), torch.full((90,), 1e-4 / 90, dtype=torch.float64))
    (step,) = remove(
        *(problem.model, (problem.x, problem.y), removed),
        layers="*", curvature=EKFAC(1e-6), subset=subset, steps=1, weight_decay=1e-6, progress=False,
    ).history  # fmt: skip
    kept = kept_of(90, removed)
    start = cross_entropy(problem.model(problem.x[kept]), problem.y[kept], reduction="sum").item() / 90
    assert 0 < step.objective < start


def test_momentum_comes_with_the_second_step(problem):
    first, second, *_ = remove(problem.model, (problem.x, problem.y), REMOVED, layers="*", **QUIET).history
    assert list(first.step_size) == ["0", "2", "2 to its optimum"]
    assert list(second.step_size) == ["0", "2", "2 to its optimum", "last step"]


def test_a_network_that_is_sure_of_itself_lets_go_as_its_head_alone_does():
    """Where every loss is small, F is mostly what training left: along the removal's own steps it hardly falls."""
    torch.manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randn(60, 5, dtype=torch.float64) + 4 * torch.randn(3, 5, dtype=torch.float64)[y]
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    for _ in range(200):  # no decay: far from the optimum of F
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    names, removed = [name for name, _ in model.named_parameters()], (y == 1).nonzero()[:, 0]
    kept = kept_of(60, removed)
    head, network = (
        loaded(model, remove(model, (x, y), removed, layers=layers, steps=4, **QUIET)) for layers in (None, "*")
    )
    reached = [objective(found, x, y, kept, names) for found in (head, network)]
    assert reached[1] <= reached[0]
    assert (network(x).argmax(1) == y)[~kept].sum() == 0


def test_one_example_and_several_classes(problem):
    data = (problem.x, problem.y)
    single = remove(problem.model, data, torch.tensor([5]), layers="*", steps=2, **QUIET)
    assert single.history
    gone, stays = problem.y != 1, problem.y == 1
    two = loaded(problem.model, remove(problem.model, data, gone.nonzero()[:, 0], layers="*", **QUIET))
    hits = two(problem.x).argmax(1) == problem.y
    assert bool(hits[stays].all())
    assert hits[gone].sum() < 0.6 * (problem.model(problem.x).argmax(1) == problem.y)[gone].sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits_is_computed_in_float32_and_keeps_its_type(problem, dtype):
    short = copy.deepcopy(problem.model).to(dtype)
    full, x = copy.deepcopy(short).float(), problem.x.to(dtype)
    before = {key: value.clone() for key, value in short.state_dict().items()}
    found = remove(short, (x, problem.y), REMOVED, layers="*", **QUIET)
    want = remove(full, (x.float(), problem.y), REMOVED, layers="*", **QUIET)
    assert [step.objective for step in found.history] == [step.objective for step in want.history]
    assert {key: value.dtype for key, value in found.state_dict.items()} == dict.fromkeys(before, dtype)
    assert all(torch.equal(found.state_dict[key], value.to(dtype)) for key, value in want.state_dict.items())
    assert all(torch.equal(value, before[key]) for key, value in short.state_dict().items())
    assert not torch.equal(found.state_dict["0.weight"], before["0.weight"])
    assert torch.equal(found.after(0)["0.weight"], before["0.weight"])


def test_what_leaves_the_range_of_16_bits_is_refused():
    model = nn.Linear(5, 3).half()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([65000.0, 64000.0, 63000.0])[:, None].expand(3, 5))
        model.bias.zero_()
    x = torch.full((12, 5), 1e-4, dtype=torch.float16)
    removed = (torch.arange(12) % 3).nonzero()[:, 0]  # all of class 0 stays, and nothing else
    with pytest.raises(ValueError, match=r"'weight' moved out of the range of torch.float16, to .*; pass model"):
        remove(
            *(model, (x, torch.arange(12) % 3), removed),
            layers="*", curvature=Diagonal(1e-9), line_search=False, weight_decay=0.0, steps=1, progress=False,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ bad input

X, Y = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
ONE = torch.tensor([1])


@pytest.mark.parametrize(
    ("data", "indices", "change", "message"),
    [
        ((X, Y), torch.tensor([6]), {}, r"indices must be in \[0, n=6\), got 6"),
        ((X, Y), torch.tensor([1, 1]), {}, "indices must be distinct"),
        ((X, Y), torch.arange(6), {}, "all n=6 examples; none would be retained"),
        ((X, Y), (Y == 7).nonzero()[:, 0], {}, "must not be empty"),  # a class that has no examples
        (X, ONE, {}, "the training data has no labels"),
        ((X, Y + 1), ONE, {}, r"labels must be in \[0, c=3\)"),
        ((X * torch.nan, Y), ONE, {}, "the input of layer .* holds NaN or Inf, example 0"),
        ((X, Y), ONE, {"layers": "body"}, "'body' names no layer"),
        ((X, Y), ONE, {"layers": ["2", "1"]}, "'1' names no layer"),
        ((X, Y), ONE, {"steps": 0}, "steps must be at least 1, got 0"),
        ((X, Y), ONE, {"damping": "auto"}, "damping must be a number, got 'auto'"),
        ((X, Y), ONE, {"damping": 0.1}, r"got damping=0.1 beside EKFAC\(damping='auto'\)"),
        ((X, Y), ONE, {"damping": 0.1, "curvature": KFAC("auto")}, r"got damping=0.1 beside KFAC\(damping='auto'\)"),
        ((X, Y), ONE, {"damping": -1.0}, "damping must be a finite number >= 0"),
        ((X, Y), ONE, {"weight_decay": -1.0}, "weight_decay must be a finite number >= 0, got -1.0"),
        ((X, Y), ONE, {"weight_decay": 0.0, "curvature": EKFAC(0.0)}, "singular: .* would do"),
        ((X, Y), ONE, {"curvature": {"9": EKFAC()}}, "no pattern of curvature= matches a layer, got 9"),
        ((X, Y), ONE, {"subset": samplers.Subset(ONE, torch.ones(1))}, "every example of the subset is removed"),
        ((X, Y), ONE, {"subset": partial(samplers.random, k=6)}, r"k must be in \[1, n=5\], got k=6"),
    ],
)
def test_bad_input(problem, data, indices, change, message):
    with pytest.raises(ValueError, match=message):
        remove(problem.model, data, indices, progress=False, **{"layers": "*", **change})


class Scaled(nn.Module):
    """A head that is not the last operation, and a layer that is never called."""

    def __init__(self, body, scale=1.0, unused=None):
        super().__init__()
        self.unused, self.body, self.scale = unused, body, scale

    def forward(self, x):
        return self.body(x).mul_(self.scale)


@pytest.mark.parametrize("layers", [None, "*", "body.0"])
def test_a_head_that_is_not_the_last_operation_is_refused(problem, layers):
    with pytest.raises(ValueError, match=r"the head 'body.2' is not the last operation of the model"):
        remove(Scaled(problem.model, 0.5), (problem.x, problem.y), REMOVED, layers=layers, **QUIET)
    assert remove(Scaled(problem.model), (problem.x, problem.y), REMOVED, layers=layers, steps=1, **QUIET).history


def test_a_layer_that_is_not_called_stays_and_is_refused_where_it_is_named(problem):
    model = Scaled(problem.model, unused=nn.Linear(2, 2).double())
    after = remove(model, (problem.x, problem.y), REMOVED, layers="*", steps=1, **QUIET)
    assert torch.equal(after.state_dict["unused.weight"], model.unused.weight)
    assert not torch.equal(after.state_dict["body.2.weight"], problem.model[2].weight)
    with pytest.raises(ValueError, match=r"capture: layer 'unused' was not called in the forward pass; leave it out"):
        remove(model, (problem.x, problem.y), REMOVED, layers=("unused", "body.2"), **QUIET)


def test_dropout_does_not_act(problem):
    """The copy runs in eval mode: two runs of a model in train mode agree."""
    model = nn.Sequential(problem.model[0], nn.Dropout(0.5), problem.model[1], problem.model[2]).train()
    data = (problem.x, problem.y)
    first, second = (remove(model, data, REMOVED, layers="*", steps=2, **QUIET).history for _ in range(2))
    assert torch.equal(flat(first[-1].parameters), flat(second[-1].parameters))


def test_examples_without_any_gradient_leave_the_model_as_it_is():
    """Every loss is exactly zero in float32: no step descends, and a step is never measured against a gain of zero."""
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([1e4, 0.0, 0.0]))
    after = remove(model, (x, torch.zeros(60, dtype=torch.long)), torch.arange(3), layers="*", progress=False)
    assert after.history == []
    assert all(torch.equal(value, after.state_dict[name]) for name, value in model.state_dict().items())
