import copy
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastif import ExactBlock, Influence, build_info, extract, remove, samplers
from fastif.removal import head_steps, optimal_head
from tests.helpers.problems import WEIGHT_DECAY, converge, trained

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def problem():
    return trained()


@pytest.fixture(scope="module")
def head(problem):
    return dict(
        features=problem.model[:2](problem.x).detach(),
        labels=problem.y,
        weight=problem.model[2].weight.detach(),
        bias=problem.model[2].bias.detach(),
    )


REMOVED, ONE = torch.tensor([3, 7, 11, 40]), torch.tensor([1])


def class_0(problem):
    return (problem.y == 0).nonzero()[:, 0]


def objective(head_layer, features, labels, n):
    loss = cross_entropy(head_layer(features), labels, reduction="sum") / n
    return (loss + 0.5 * WEIGHT_DECAY * sum(p.square().sum() for p in head_layer.parameters())).item()


def test_one_exact_step_is_formula_3(problem, head):
    """θ̂ + (G_keep + λI)⁻¹ (1/n) Σ_removed ∇ℓ, by way of Influence's own gradients and a block fitted by hand."""
    kept = torch.ones(90, dtype=torch.bool)
    kept[REMOVED] = False
    (step,) = head_steps(**head, removed=REMOVED, steps=1, damping=0.02, weight_decay=WEIGHT_DECAY, line_search=False)
    inputs = torch.cat([head["features"], torch.ones(90, 1, dtype=torch.float64)], 1)
    logits = problem.model(problem.x).detach()
    block = ExactBlock(0.02 + WEIGHT_DECAY).fit(
        inputs[kept], logits[kept], weights=torch.full((int(kept.sum()),), 1 / 90, dtype=torch.float64)
    )
    residuals = logits.softmax(1) - torch.nn.functional.one_hot(problem.y, 3)
    removed_sum = residuals[REMOVED].T @ inputs[REMOVED] / 90
    want = torch.cat([head["weight"], head["bias"][:, None]], 1) + block.solve(removed_sum)
    assert torch.allclose(torch.cat([step.parameters["weight"], step.parameters["bias"][:, None]], 1), want, atol=1e-12)
    assert step.step_size == {"head": 1.0}


def test_one_exact_step_is_influence_with_the_downdated_block(problem, head):
    influence = Influence(problem.model, curvature=ExactBlock(WEIGHT_DECAY), progress=False)
    influence.fit((problem.x, problem.y))
    inputs = torch.cat([head["features"], torch.ones(90, 1, dtype=torch.float64)], 1)
    weights = torch.full((4,), 1 / 90, dtype=torch.float64)
    influence.curvature["2"].downdate(inputs[REMOVED], problem.model(problem.x[REMOVED]).detach(), weights=weights)
    change = influence.on_parameters((problem.x[REMOVED], problem.y[REMOVED]))
    (step,) = head_steps(**head, removed=REMOVED, steps=1, weight_decay=WEIGHT_DECAY, line_search=False)
    assert torch.allclose(step.parameters["weight"], head["weight"] - change["2.weight"] / 90, atol=1e-10)
    assert torch.allclose(step.parameters["bias"], head["bias"] - change["2.bias"] / 90, atol=1e-10)


@pytest.mark.parametrize("what", ["examples", "class"])
def test_full_curvature_reaches_the_retrained_heads_objective(problem, head, what):
    removed = REMOVED if what == "examples" else class_0(problem)
    kept = torch.ones(90, dtype=torch.bool)
    kept[removed] = False
    retrained = copy.deepcopy(problem.model[2])
    optimum = converge(retrained, head["features"][kept], problem.y[kept], n=90)
    last = list(head_steps(**head, removed=removed, steps=8, weight_decay=WEIGHT_DECAY))[-1]
    assert last.objective == pytest.approx(optimum, abs=1e-5)
    best = optimal_head(**head, removed=removed, weight_decay=WEIGHT_DECAY)
    assert best.objective == pytest.approx(optimum, abs=1e-10)
    assert best.gradient_norm <= 1e-8
    assert torch.allclose(best.parameters["weight"], retrained.weight, atol=1e-6)


@pytest.mark.parametrize("sampler", [samplers.random, samplers.logit, samplers.leverage, samplers.k_center])
def test_subsampled_steps_lower_the_objective_at_every_step(problem, head, sampler):
    steps = list(
        head_steps(
            **head,
            removed=class_0(problem),
            subset=partial(sampler, k=15),
            weight_decay=WEIGHT_DECAY,
            generator=torch.Generator().manual_seed(1),
        )
    )
    kept = problem.y != 0
    start = objective(problem.model[2], head["features"][kept], problem.y[kept], 90)
    values = [start] + [step.objective for step in steps]
    assert all(after < before for before, after in pairwise(values))
    assert all(step.subset_size == 15 for step in steps)
    optimum = optimal_head(**head, removed=class_0(problem), weight_decay=WEIGHT_DECAY).objective
    assert values[-1] - optimum < 0.05 * (start - optimum)


def test_reported_objective_is_that_of_the_returned_head(problem, head):
    step = next(head_steps(**head, removed=REMOVED, weight_decay=WEIGHT_DECAY))
    layer = nn.Linear(6, 3).double()
    layer.load_state_dict(step.parameters)
    kept = torch.ones(90, dtype=torch.bool)
    kept[REMOVED] = False
    assert objective(layer, head["features"][kept], problem.y[kept], 90) == pytest.approx(step.objective, rel=1e-12)


def test_same_generator_same_steps(problem, head):
    runs = [
        list(
            head_steps(
                **head,
                removed=REMOVED,
                subset=partial(samplers.logit, k=9),
                generator=torch.Generator().manual_seed(3),
            )
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a.parameters["weight"], b.parameters["weight"]) for a, b in zip(*runs, strict=True))


def test_fixed_subset_leaves_the_removed_out_and_keeps_the_other_weights(problem, head):
    everything = samplers.Subset(torch.arange(90), torch.full((90,), 1 / 90, dtype=torch.float64))
    arguments = dict(removed=REMOVED, steps=2, weight_decay=WEIGHT_DECAY)
    exact = list(head_steps(**head, **arguments))
    fixed = list(head_steps(**head, **arguments, subset=everything))
    assert [step.subset_size for step in fixed] == [86, 86]
    assert torch.allclose(exact[-1].parameters["weight"], fixed[-1].parameters["weight"], atol=1e-10)


def test_drawing_everything_is_exact(head):
    arguments = dict(removed=REMOVED, steps=2, weight_decay=WEIGHT_DECAY)
    exact = list(head_steps(**head, **arguments))
    drawn = list(head_steps(**head, **arguments, subset=partial(samplers.random, k=86)))
    assert torch.allclose(exact[-1].parameters["weight"], drawn[-1].parameters["weight"], atol=1e-10)


def test_stops_where_nothing_falls_any_more(head):
    steps = list(head_steps(**head, removed=REMOVED, steps=100, weight_decay=WEIGHT_DECAY))
    assert 1 <= len(steps) < 40
    assert steps[-1].objective == pytest.approx(
        optimal_head(**head, removed=REMOVED, weight_decay=WEIGHT_DECAY).objective, abs=1e-12
    )


def test_underrated_curvature_is_met_by_smaller_steps(problem, head):
    """A subset whose weights say a ten-thousandth of the curvature: the Newton step is ten thousand times too long."""
    subset = samplers.Subset(torch.arange(90), torch.full((90,), 1e-4 / 90, dtype=torch.float64))
    steps = list(head_steps(**head, removed=class_0(problem), subset=subset, weight_decay=1e-5, steps=2))
    assert len(steps) == 2
    assert 0 < steps[0].step_size["head"] < 0.125
    kept = problem.y != 0
    loss = cross_entropy(problem.model[2](head["features"][kept]), problem.y[kept], reduction="sum").item() / 90
    assert steps[1].objective < steps[0].objective < loss


def test_measures_time_and_memory(head):
    step = next(head_steps(**head, removed=REMOVED))
    assert step.seconds > 0
    if build_info()["compiled"]:
        assert step.peak_bytes >= 8 * 21 * 21  # the float64 factor at the least
    else:
        assert step.peak_bytes is None


def test_works_under_the_profiler():
    code = (
        "import torch, fastif\n"
        "x, y = torch.randn(30, 4), torch.arange(30) % 3\n"
        "with torch.profiler.profile(profile_memory=True):\n"
        "    history = fastif.remove(torch.nn.Linear(4, 3), (x, y), torch.tensor([0]), progress=False).history\n"
        "print('taken', len(history) > 0, history[0].peak_bytes)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.stdout.startswith("taken True"), result.stderr
    assert result.stdout.split()[-1].isdigit() == build_info()["compiled"]  # both count


def test_remove_returns_a_loadable_model_and_leaves_the_old_one(problem):
    before = copy.deepcopy(problem.model.state_dict())
    removal = remove(
        problem.model, (problem.x, problem.y), class_0(problem), weight_decay=WEIGHT_DECAY, steps=4, progress=False
    )
    assert all(torch.equal(value, before[key]) for key, value in problem.model.state_dict().items())
    new = copy.deepcopy(problem.model)
    new.load_state_dict(removal.state_dict)
    assert torch.equal(new[0].weight, problem.model[0].weight)
    assert torch.equal(new[2].weight, removal.history[-1].parameters["2.weight"])
    gone, stays = problem.y == 0, problem.y != 0
    accuracy = lambda model, rows: (model(problem.x[rows]).argmax(1) == problem.y[rows]).double().mean()  # noqa: E731
    assert accuracy(new, gone) == 0 < accuracy(problem.model, gone)
    assert accuracy(new, stays) >= accuracy(problem.model, stays)


def test_remove_a_head_without_bias_as_the_whole_model():
    model = nn.Linear(4, 3, bias=False)
    x, y = torch.randn(30, 4), torch.arange(30) % 3
    removal = remove(model, (x, y), torch.tensor([0]), progress=False)
    assert list(removal.state_dict) == ["weight"]
    assert not torch.equal(removal.state_dict["weight"], model.weight)


def test_the_head_of_a_model_in_16_bits_is_computed_in_full(problem):
    model = copy.deepcopy(problem.model).bfloat16().float()  # of the same values
    short = copy.deepcopy(model).bfloat16()
    x = problem.x.to(torch.bfloat16)
    removed = class_0(problem)
    found = remove(short, (x, problem.y), removed, weight_decay=WEIGHT_DECAY, progress=False)
    want = remove(model, (x.float(), problem.y), removed, weight_decay=WEIGHT_DECAY, progress=False)
    assert {value.dtype for value in found.state_dict.values()} == {torch.bfloat16}
    for key, value in want.state_dict.items():
        assert (found.state_dict[key].float() - value).norm() < 3e-2 * value.norm()


@pytest.mark.parametrize("layers", [None, "*"])
def test_autocast_around_the_call_changes_nothing(problem, layers):
    def call():
        generator = torch.Generator().manual_seed(0)
        data = problem.x, problem.y
        return remove(problem.model, data, REMOVED, layers=layers, steps=2, generator=generator, progress=False)

    plain = call()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = call()
    assert all(torch.equal(under.state_dict[key], value) for key, value in plain.state_dict.items())


def test_several_removals_share_one_pass(problem):
    data = problem.x, problem.y
    seen = extract(problem.model, data, progress=False)
    settings = {"subset": partial(samplers.logit, k=30), "weight_decay": WEIGHT_DECAY, "progress": False}
    settings["batch_size"] = 16
    passed = []
    draws = (torch.Generator().manual_seed(1) for _ in range(4))
    alone = [remove(problem.model, data, gone, generator=next(draws), **settings) for gone in (REMOVED, ONE)]
    hook = problem.model.register_forward_hook(lambda module, inputs, outputs: passed.append(len(outputs)))
    for gone, want in zip((REMOVED, ONE), alone, strict=True):
        removal = remove(problem.model, data, gone, extracted=seen, generator=next(draws), **settings)
        assert all(torch.equal(value, want.state_dict[key]) for key, value in removal.state_dict.items())
        assert [step.objective for step in removal.history] == [step.objective for step in want.history]
    hook.remove()
    assert passed == [16, 16]  # the first batch is looked at, and no further one


def test_a_pass_over_other_data_or_another_network_is_refused(problem):
    x, y, model = problem.x, problem.y, copy.deepcopy(problem.model)
    seen = extract(model, (x, y), progress=False)
    settings = {"extracted": seen, "batch_size": 16, "progress": False}
    with pytest.raises(ValueError, match=r"first 16 examples its features are off by up to .*, more than"):
        remove(model, (x.flip(0), y.flip(0)), ONE, **settings)
    with pytest.raises(ValueError, match=r"first 16 examples its labels differ in 1$"):
        remove(model, (x, (y + (torch.arange(len(y)) == 3).long()) % 3), ONE, **settings)
    with torch.no_grad():
        model[0].weight.mul_(1.1)  # below the head: its logits are still those of its features
    with pytest.raises(ValueError, match="of other data or another model: .* its features are off"):
        remove(model, (x, y), ONE, **settings)


@pytest.mark.parametrize(
    ("change", "kwargs", "message"),
    [
        (lambda seen: seen._replace(features=seen.features[1:]), {}, r"n=90 .*features \[n, d=6\].*got \[89, 6\]"),
        (lambda seen: seen._replace(logits=seen.logits[:, 1:]), {}, r"logits \[n, c=3\], got .* and \[90, 2\]"),
        (lambda seen: seen._replace(features=1.01 * seen.features), {}, "another model: of .* its features are off"),
        (lambda seen: seen._replace(logits=seen.logits * float("nan")), {}, "off by up to nan"),
        (lambda seen: seen._replace(labels=None), {}, "the training data has no labels"),
        (lambda seen: seen, {"layers": "*"}, "extracted serves the steps of the head alone"),
        (lambda seen: seen, {"curvature": ExactBlock(0.0)}, "extracted serves the steps of the head alone"),
    ],
)
def test_a_pass_over_something_else_is_refused(problem, change, kwargs, message):
    seen = extract(problem.model, (problem.x, problem.y), progress=False)
    with pytest.raises(ValueError, match=message):
        remove(problem.model, (problem.x, problem.y), ONE, extracted=change(seen), progress=False, **kwargs)


X, Y = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    ("data", "indices", "kwargs", "message"),
    [
        ((X, Y), torch.tensor([6]), {}, r"indices must be in \[0, n=6\), got 6"),
        ((X, Y), torch.tensor([-1]), {}, "got -1"),
        ((X, Y), torch.tensor([1, 1]), {}, "indices must be distinct"),
        ((X, Y), torch.arange(6), {}, "all n=6 examples; none would be retained"),
        ((X, Y), torch.tensor([], dtype=torch.int64), {}, "must not be empty"),
        ((X, Y), torch.tensor([1.0]), {}, r"indices must be int64 \[r\], got torch.float32"),
        (X, ONE, {}, "the training data has no labels"),
        ((X, Y), torch.ones(6, dtype=torch.bool), {}, r"got a mask; pass mask.nonzero\(\)"),
        ((X, Y), ONE, {"damping": "auto"}, "damping must be a number, got 'auto'"),
        ((X, Y), ONE, {"damping": -1.0}, "damping must be a finite number >= 0"),
        ((X, Y), ONE, {"weight_decay": -1.0}, "weight_decay must be a finite number >= 0, got -1.0"),
        ((X, Y), ONE, {"weight_decay": 0.0}, "not positive definite: .* would do"),
        ((X, Y), ONE, {"steps": 0}, "steps must be at least 1, got 0"),
        ((X, Y), ONE, {"subset": samplers.Subset(ONE, torch.ones(1))}, "every example of the subset is removed"),
        ((X, Y), ONE, {"subset": partial(samplers.random, k=6)}, r"k must be in \[1, n=5\], got k=6"),
        ((X, Y + 1), ONE, {}, r"labels must be in \[0, c=3\)"),
        ((X, Y), ONE, {"head": "1"}, "must be an nn.Linear"),
    ],
)
def test_bad_input(problem, data, indices, kwargs, message):
    with pytest.raises(ValueError, match=message):
        remove(problem.model, data, indices, progress=False, **kwargs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(3, 9)}, r"features must be \[n, d\] and weight \[c, d\]"),
        ({"bias": torch.zeros(2)}, r"bias must be \[c=3\], got \[2\]"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"labels must be int64 \[n=90\]"),
        ({"labels": torch.full((90,), 3)}, r"labels must be in \[0, c=3\), got 3 to 3"),
    ],
)
def test_bad_head(head, change, message):
    with pytest.raises(ValueError, match=message):
        list(head_steps(**{**head, **change}, removed=REMOVED))


def test_optimum_needs_weight_decay(head):
    with pytest.raises(ValueError, match="weight_decay must be > 0 for a finite optimum, got 0"):
        optimal_head(**head, removed=REMOVED, weight_decay=0.0)
    with pytest.raises(ValueError, match="not converged after 1 steps"):
        optimal_head(**head, removed=torch.arange(60), weight_decay=1e-6, max_steps=1)


def test_a_head_whose_weight_is_also_an_embeddings_is_refused_alone():
    """On its features alone nothing would move: the weight stands under the embedding's name."""
    torch.manual_seed(0)
    words, labels = torch.randint(4, (30, 1)), torch.arange(30) % 4
    table, head = nn.Embedding(4, 5), nn.Linear(5, 4, bias=False)
    head.weight = table.weight
    model = nn.Sequential(table, nn.Flatten(), nn.Tanh(), head)
    with pytest.raises(ValueError, match=r"weight serves elsewhere in the model, in '0', too.*layers=\"\*\""):
        remove(model, (words, labels), torch.arange(3), progress=False)
    moved = remove(model, (words, labels), torch.arange(3), layers="*", steps=1, progress=False)
    assert not torch.equal(moved.state_dict["3.weight"], head.weight)
    assert torch.equal(moved.state_dict["3.weight"], moved.state_dict["0.weight"])
