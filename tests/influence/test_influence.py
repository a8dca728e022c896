import copy
import inspect
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastif import EKFAC, ExactBlock, Influence, evaluation, extract, find_head, remove, samplers
from fastif.cli.scores import scores_command
from tests.helpers.problems import WEIGHT_DECAY, converge, head_gradients, trained


@pytest.fixture(scope="module")
def problem():
    return trained()


@pytest.fixture(scope="module")
def influence(problem):
    # The optimum's own curvature has weight_decay on the diagonal: it goes in as damping.
    return Influence(problem.model, curvature=ExactBlock(WEIGHT_DECAY), progress=False).fit((problem.x, problem.y))


@pytest.fixture(scope="module")
def by_hand(problem):
    """Gradients [n, 21] by autograd and (G + λI)⁻¹ by torch's explicit inverse of autograd's Hessian."""
    features = problem.model[:2](problem.x).detach()
    inputs = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], 1)

    def mean_loss(theta):
        return cross_entropy(inputs @ theta.view(3, 7).T, problem.y)

    head = problem.model[2]
    theta = torch.cat([head.weight, head.bias[:, None]], 1).detach().flatten()
    hessian = torch.autograd.functional.hessian(mean_loss, theta)
    inverse = (hessian + WEIGHT_DECAY * torch.eye(21, dtype=torch.float64)).inverse()
    return head_gradients(problem).flatten(1), inverse


def test_scores_are_the_explicit_formula(problem, influence, by_hand):
    gradients, inverse = by_hand
    want = gradients[:7] @ inverse @ gradients.T / len(problem.x)
    got = influence.scores((problem.x[:7], problem.y[:7]), (problem.x, problem.y))
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-14)


def test_self_influence_is_the_diagonal_of_scores(problem, influence):
    data = problem.x, problem.y
    assert torch.allclose(influence.self_influence(data), influence.scores(data, data).diagonal(), rtol=1e-10)
    assert (influence.self_influence(data) > 0).all()


def test_on_parameters_is_the_explicit_formula(problem, influence, by_hand):
    gradients, inverse = by_hand
    change = influence.on_parameters((problem.x[3:5], problem.y[3:5]))
    want = -(inverse @ (gradients[3] + gradients[4])).view(3, 7)
    assert list(change) == ["2.weight", "2.bias"]
    assert torch.allclose(torch.cat([change["2.weight"], change["2.bias"][:, None]], 1), want, rtol=1e-9, atol=1e-12)


def test_predicts_leave_one_out_retraining_of_the_head():
    """The judge of all signs and scales: retrain the convex head without each of 50 examples."""
    model, x, y = trained(n=300)
    head = model[2]
    with torch.no_grad():
        features, queries = model[:2](x), model[:2](x[280:])
        before = cross_entropy(head(queries), y[280:], reduction="none")
    actual = []
    for left_out in range(50):
        kept = torch.arange(300) != left_out
        retrained = copy.deepcopy(head)
        converge(retrained, features[kept], y[kept], n=300)
        actual.append(cross_entropy(retrained(queries), y[280:], reduction="none").detach() - before)
    actual = torch.stack(actual, 1)  # [q, 50]: the rise of each query's loss
    influence = Influence(model, curvature=ExactBlock(WEIGHT_DECAY), progress=False).fit((x, y))
    predicted = influence.scores((x[280:], y[280:]), (x, y))[:, :50]
    assert torch.corrcoef(torch.stack([actual.flatten(), predicted.flatten()]))[0, 1] >= 0.99
    slope = (actual * predicted).sum() / predicted.square().sum()
    assert 0.95 < slope < 1.1  # units too, not only order


@pytest.mark.parametrize("k", [1, 5, 90])
@pytest.mark.parametrize("largest", [True, False])
def test_top_agrees_with_sorted_scores(problem, k, largest):
    influence = Influence(
        problem.model, curvature=ExactBlock(WEIGHT_DECAY), batch_size=13, memory=2 * 21 * 8, progress=False
    ).fit((problem.x, problem.y))  # two queries at a time
    query, data = (problem.x[:4], problem.y[:4]), (problem.x, problem.y)
    values, indices = influence.top(query, data, k, largest=largest)
    want = influence.scores(query, data).sort(dim=1, descending=largest, stable=True)
    assert torch.equal(values, want.values[:, :k])
    assert torch.equal(indices, want.indices[:, :k])


def test_weighted_subset_of_everything_is_everything(problem, influence):
    subset = samplers.random(90, 90)
    refitted = Influence(problem.model, curvature=ExactBlock(WEIGHT_DECAY), progress=False)
    refitted.fit((problem.x, problem.y), subset=subset)
    assert torch.allclose(refitted.curvature["2"].block, influence.curvature["2"].block, atol=1e-13)


def test_subset_weights_reach_the_curvature(problem):
    subset = samplers.Subset(torch.tensor([4, 2]), torch.tensor([0.75, 0.5]))
    got = Influence(problem.model, curvature=ExactBlock(1e-2), progress=False).fit((problem.x, problem.y), subset)
    with torch.no_grad():
        inputs = torch.cat([problem.model[:2](problem.x), torch.ones(90, 1, dtype=torch.float64)], 1)[[4, 2]]
        want = ExactBlock().fit(inputs, problem.model(problem.x[[4, 2]]), weights=torch.tensor([0.75, 0.5]))
    assert torch.allclose(got.curvature["2"].block, want.block, atol=1e-14)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 90])
def test_batch_size_does_not_matter(problem, influence, batch_size):
    other = Influence(problem.model, curvature=ExactBlock(WEIGHT_DECAY), batch_size=batch_size, progress=False)
    data = problem.x, problem.y
    assert torch.allclose(other.fit(data).scores(data, data), influence.scores(data, data), rtol=1e-9, atol=1e-15)


def test_empirical_fisher_gives_other_scores(problem, influence):
    data = problem.x, problem.y
    other = Influence(problem.model, curvature=ExactBlock(WEIGHT_DECAY, "empirical_fisher"), progress=False).fit(data)
    assert not torch.allclose(other.self_influence(data), influence.self_influence(data), rtol=1e-2)


def test_head_without_bias():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2, bias=False))
    x, y = torch.randn(20, 4), torch.arange(20) % 2
    influence = Influence(model, progress=False).fit((x, y))
    assert list(influence.on_parameters((x[:1], y[:1]))) == ["2.weight"]
    assert influence.scores((x[:2], y[:2]), (x, y)).shape == (2, 20)


def test_plan_lists_every_parameter_once_and_counts_bytes(problem):
    influence = Influence(problem.model, curvature=ExactBlock(WEIGHT_DECAY), progress=False)
    plan = influence.plan((problem.x, problem.y))
    assert plan.covered == {"2.weight": (3, 6), "2.bias": (3,)}
    assert plan.skipped == {"0.weight": "layers= leaves '0' out", "0.bias": "layers= leaves '0' out"}
    assert plan.n == 90
    assert plan.curvature_bytes == 21 * 21 * (8 + 8)
    assert "0.weight: layers= leaves '0' out" in str(plan)
    assert "2.weight [3, 6]" in str(plan)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(problem.x, problem.y), batch_size=8)
    assert influence.plan(loader)._replace(fit_bytes=None) == plan._replace(fit_bytes=None)  # of smaller batches
    assert influence.plan([(problem.x[:50], problem.y[:50]), (problem.x[50:], problem.y[50:])]).n == 90


def test_model_is_left_as_it_was(problem):
    before = {key: value.clone() for key, value in problem.model.state_dict().items()}
    problem.model.train()
    Influence(problem.model, progress=False).fit((problem.x, problem.y)).self_influence((problem.x, problem.y))
    assert problem.model.training
    assert all(torch.equal(value, before[key]) for key, value in problem.model.state_dict().items())


def test_refused_fit_leaves_nothing_to_be_misused(problem):
    data = problem.x, problem.y
    influence = Influence(problem.model, progress=False).fit(data)
    before = influence.scores(data, data)
    with pytest.raises(ValueError, match="in \\[0, n=10"):
        influence.fit((problem.x[:10], problem.y[:10]), samplers.Subset(torch.tensor([10]), torch.ones(1)))
    assert torch.equal(influence.scores(data, data), before)
    singular = Influence(problem.model, curvature=ExactBlock(0), progress=False)
    with pytest.raises(ValueError, match="not positive definite"):
        singular.fit(data)
    with pytest.raises(ValueError, match="not fitted"):
        singular.scores(data, data)


def test_two_influences_do_not_share_one_block(problem):
    block, data = ExactBlock(WEIGHT_DECAY), (problem.x, problem.y)
    first = Influence(problem.model, curvature=block, progress=False).fit(data)
    before = first.self_influence(data)
    Influence(problem.model, curvature=block, progress=False).fit((problem.x[:9], problem.y[:9]))
    assert torch.equal(first.self_influence(data), before)


def test_autocast_around_it_costs_no_digits(problem):
    model, data = copy.deepcopy(problem.model).float(), (problem.x.float(), problem.y)
    plain = Influence(model, progress=False).fit(data).self_influence(data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = Influence(model, progress=False).fit(data).self_influence(data)
    assert torch.equal(plain, under)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i, d: Influence(i.model, loss="hinge"), "loss must be one of cross_entropy, .* got 'hinge'"),
        (lambda i, d: Influence(nn.Conv2d(1, 1, 1)), "no nn.Linear"),
        (lambda i, d: Influence(i.model).scores(d, d), r"not fitted; call fit\(train\) first"),
        (lambda i, d: i.scores(d[0], d), "the data has no labels"),
        (lambda i, d: i.top(d, d, 0), r"k must be an integer in \[1, n=90\], got k=0"),
        (lambda i, d: i.top(d, d, 91), r"k must be an integer in \[1, n=90\], got k=91"),
        (lambda i, d: i.fit(d, samplers.Subset(torch.tensor([90]), torch.ones(1))), r"in \[0, n=90\), got 90"),
        (lambda i, d: i.fit((d[0] * torch.nan, d[1])), "input of layer '2' holds NaN or Inf, example 0"),
        (lambda i, d: Influence(i.model, curvature=ExactBlock(0), progress=False).fit(d), "not positive definite"),
    ],
)
def test_bad_input(problem, influence, call, message):
    with pytest.raises(ValueError, match=message):
        call(influence, (problem.x, problem.y))


@pytest.mark.parametrize("name", ["random", "logit", "k_center"])
def test_a_sampler_is_drawn_as_remove_draws_it(problem, name):
    """Once, from what `extract` brings, with the generator that is given or one of the influence's own seed."""
    data = problem.x, problem.y
    seen = extract(problem.model, data, progress=False)
    sampler = partial(getattr(samplers, name), k=20)
    influence = Influence(problem.model, progress=False, seed=5)
    for generator, seed in ((None, 5), (torch.Generator().manual_seed(7), 7)):
        want = samplers.draw(sampler, **seen._asdict(), generator=torch.Generator().manual_seed(seed))
        got = influence.fit(data, subset=sampler, generator=generator).subset
        assert torch.equal(got.indices, want.indices)
        assert torch.equal(got.weights, want.weights)


def test_a_sampler_that_needs_no_pass_takes_none(problem, monkeypatch):
    monkeypatch.setattr("fastif.influence.influence.extract", None)
    influence = Influence(problem.model, progress=False).fit((problem.x, problem.y), partial(samplers.prefix, k=7))
    assert influence.subset.indices.tolist() == list(range(7))
    with pytest.raises(ValueError, match=r"^fit: random needs k, which is none of n, .*bind it with functools.partial"):
        influence.fit((problem.x, problem.y), subset=samplers.random)


def test_the_bound_of_a_sampler_that_has_one_stays(problem):
    data, seen = (problem.x, problem.y), extract(problem.model, (problem.x, problem.y), progress=False)
    sampler = partial(samplers.certified, k=30)
    influence = Influence(problem.model, progress=False).fit(data, subset=sampler)
    assert influence.bound == sampler(seen.features, seen.logits).bound > 0


def test_errors_name_what_was_called():
    conv, data = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), (torch.zeros(4, 1, 3, 3), torch.tensor([0, 1, 0, 1]))
    for op, call in (
        ("Influence", lambda: Influence(conv)),
        ("remove", lambda: remove(conv, data, torch.tensor([0]))),
        ("extract", lambda: extract(conv, data)),
        ("find_head", lambda: find_head(conv)),
        ("class_removal", lambda: evaluation.class_removal(conv, data, data)),
    ):
        with pytest.raises(ValueError, match=f"^{op}: the model has no nn.Linear"):
            call()


def test_parts_of_scores_stand_alone(problem):
    data = problem.x, problem.y
    influence = Influence(problem.model, progress=False).fit(data)
    with pytest.raises(ValueError, match="scores: by must be one of 'all', 'layer', 'token', got 'head'"):
        influence.scores(data, data, by="head")
    groups = torch.zeros(len(problem.x), dtype=torch.int64)
    for by in ("layer", "token"):
        for name, given in (("groups", groups), ("query_groups", groups), ("low_rank", 1)):
            with pytest.raises(ValueError, match=f"scores: {name}= goes with by='all' alone, got by='{by}'"):
                influence.scores(data, data, by=by, **{name: given})


def test_python_and_the_shell_have_one_default_of_memory(problem):
    shell = inspect.signature(scores_command).parameters["memory"].default
    assert shell << 20 == Influence(problem.model, progress=False).setup.memory == 1 << 27


def test_weights_that_changed_since_the_fit_are_refused(tmp_path):
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), (torch.randn(8, 4), torch.arange(8) % 2)
    influence = Influence(model, curvature=EKFAC(0.1), progress=False).fit(data)
    before, state = influence.scores(data, data), influence.state_dict()
    with torch.no_grad():
        model[2].bias[1] += 1e-3
    calls = {
        "scores": lambda: influence.scores(data, data),
        "top": lambda: influence.top(data, data, 2),
        "self_influence": lambda: influence.self_influence(data),
        "on_parameters": lambda: influence.on_parameters(data),
        "solve": lambda: influence.solve(dict(model.named_parameters())),
        "out": lambda: influence.scores(data, data, out=tmp_path / "scores"),
        "load_state_dict": lambda: Influence(model, curvature=EKFAC(0.1), progress=False).load_state_dict(state),
    }
    for call in calls.values():
        with pytest.raises(
            ValueError, match=r"not those of the fit: 1 of 4 tensors changed, '2\.bias' first; call fit"
        ):
            call()
    assert not torch.equal(influence.fit(data).scores(data, data), before)
