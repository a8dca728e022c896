"""The step that lowers what is said of the removed examples, against its definition in float64, docs/math.md (34)."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from fastif import ExactBlock, remove, samplers
from fastif.samplers import Subset
from tests.helpers.problems import QUIET, REMOVED, WEIGHT_DECAY, flat, small_images, sure, trained
from tests.removal.test_removal_layers import kept_of
from tests.removal.test_removal_refit import NAMES, mean_loss

EXACT = ExactBlock(0.02, joint=True)


def lowered(problem, removed=REMOVED, **how):
    model, x, y = problem
    settings = {"layers": "*", "refit_head": True, "lower_odds": 3.0, **QUIET, **how}
    return remove(model, (x, y), removed, **settings)


def log_odds(logits, labels):
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    return (p / (1 - p)).log()


def odds_of(model, x, y, rows):
    return log_odds(model(x[rows]), y[rows])


def stepped(problem, removed, weights):
    """θ − s (Σ_i w_i J_iᵀJ_i + γI)⁻¹ m, m the mean gradient of the log-odds, with s m·(…)⁻¹m = 3."""
    model, x, y = problem
    theta = {name: p.detach() for name, p in model.named_parameters() if name in NAMES}
    jacobian = jacrev(lambda values: functional_call(model, values, (x,)))(theta)
    jacobian = torch.cat([j.flatten(2) for j in jacobian.values()], 2)
    curvature = torch.einsum("nap,naq,n->pq", jacobian, jacobian, weights)
    curvature.diagonal().add_(WEIGHT_DECAY + 0.02)
    slopes = jacrev(lambda values: log_odds(functional_call(model, values, (x[removed],)), y[removed]).mean())(theta)
    mean = torch.cat([slope.flatten() for slope in slopes.values()])
    direction = torch.linalg.solve(curvature, mean)
    return flat(theta) - 3.0 / (mean @ direction) * direction


@pytest.mark.parametrize("removed", [REMOVED, torch.tensor([5]), torch.arange(0, 90, 3)], ids=["some", "one", "class"])
def test_the_layers_take_the_step_of_the_definition(removed):
    model, *_ = problem = trained()
    removal = lowered(problem, removed, curvature=EXACT)
    want = stepped(problem, removed, kept_of(90, removed).double() / 90)
    assert torch.allclose(flat(removal.history[0].parameters), want, atol=1e-10)
    assert set(removal.history[0].step_size.values()) == {1.0}
    assert all(torch.equal(removal.after(0)[name], p) for name, p in model.named_parameters())


def test_a_subset_carries_the_curvature_by_its_weights_without_the_removed():
    problem, carriers = trained(), torch.tensor([0, 1, 3, 20, 31, 50, 80])
    weights = torch.tensor([0.1, 0.2, 0.3, 0.1, 0.05, 0.15, 0.1], dtype=torch.float64)
    removal = lowered(problem, curvature=EXACT, subset=Subset(carriers, weights))
    everyone = torch.zeros(90, dtype=torch.float64)
    everyone[carriers] = weights
    want = stepped(problem, REMOVED, everyone * kept_of(90))
    assert torch.allclose(flat(removal.history[0].parameters), want, atol=1e-10)


class Squeezing(nn.Sequential):
    def forward(self, x):
        return super().forward(x).squeeze(0)


def test_a_model_that_squeezes_a_batch_of_one():
    model, x, y = trained()
    one = torch.tensor([5])
    want = stepped((model, x, y), one, kept_of(90, one).double() / 90)
    for size in (256, 11):  # of the 89 retained the last batch is of one
        removal = lowered((Squeezing(*model), x, y), one, curvature=EXACT, batch_size=size)
        assert torch.allclose(flat(removal.history[0].parameters), want, atol=1e-10)


def test_to_first_order_the_log_odds_fall_by_as_much_as_is_asked_for():
    model, x, y = problem = trained()
    moved = copy.deepcopy(model)
    moved.load_state_dict(lowered(problem, lower_odds=1e-5).after(1))
    fall = odds_of(model, x, y, REMOVED).mean() - odds_of(moved, x, y, REMOVED).mean()
    assert fall.item() == pytest.approx(1e-5, rel=1e-3)


def test_a_network_that_knows_all_by_heart_lets_go_of_the_removed_alone():
    model, x, y = sure(seed=1)
    removed = torch.arange(4)  # labels that are wrong
    how = dict(layers="*", refit_head=True, weight_decay=1e-4, progress=False)
    moved = copy.deepcopy(model)
    moved.load_state_dict(remove(model, (x, y), removed, lower_odds=12.0, **how).state_dict)
    kept = kept_of(60, removed)
    rise = mean_loss(moved, x, y, kept) - mean_loss(model, x, y, kept)
    assert mean_loss(moved, x, y, removed) - mean_loss(model, x, y, removed) > 1.0
    assert rise < 0.1


@pytest.mark.parametrize("lower_odds", [1e3, 1e4], ids=["as much from the others", "no better than guessed"])
def test_a_step_that_does_harm_is_said(lower_odds):
    with pytest.warns(UserWarning, match=r"lower_odds=1.* takes the mean loss of the removed .* may do less harm"):
        lowered(trained(), lower_odds=lower_odds, curvature=EXACT)


def test_batches_samplers_and_a_head_that_takes_no_step():
    model, x, y = small_images()
    how = dict(layers=["0.0", "1"], refit_head=True, lower_odds=2.0, curvature=EXACT, **QUIET)
    found = [remove(model, (x, y), REMOVED, batch_size=size, **how) for size in (7, 60)]
    assert torch.allclose(*(flat(removal.history[-1].parameters) for removal in found), atol=1e-9)
    how |= {"layers": "0.0", "subset": partial(samplers.logit, k=28)}
    drawn = remove(model, (x, y), REMOVED, **how)
    assert drawn.history[0].subset_size == 28
    assert drawn.history[0].step_size.keys() == {"0.0"}
    assert not torch.equal(drawn.state_dict["1.weight"], model[1].weight)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("how", [{}, {"lower_odds": None}, {"lower_odds": None, "refit_head": False}])
def test_the_call_computes_gradients_where_none_are_asked_for_around_it(around, how):
    want = lowered(trained(), **how).state_dict
    with around():
        found = lowered(trained(), **how).state_dict
    assert all(torch.equal(found[name], value) for name, value in want.items())
    assert not any(value.is_inference() or value.requires_grad for value in found.values())


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"lower_odds": 0.0}, "lower_odds must be a positive number of nats, got 0.0"),
        ({"lower_odds": -1.0}, "lower_odds must be a positive number of nats, got -1.0"),
        ({"lower_odds": float("nan")}, "lower_odds must be a positive number of nats, got nan"),
        ({"lower_odds": True}, "lower_odds must be a positive number of nats, got True"),
        ({"lower_odds": "4"}, "lower_odds must be a positive number of nats, got '4'"),
        ({"refit_head": False}, "it needs refit_head=True"),
        ({"layers": None}, "refit_head=True needs layers="),
        ({"lower_odds": 1e200}, "lower_odds=1e.200 leads to a network behind which no head is found"),
        ({"weight_decay": 0.0}, "behind which no head is found: head .* with damping 0 is not positive definite"),
    ],
)
def test_what_is_refused(how, said):
    with pytest.raises(ValueError, match=said):
        lowered(trained(), **how)


def test_removed_examples_without_log_odds_are_refused():
    model, x, y = trained()
    ignored, unknown = y.clone(), x.clone()
    ignored[REMOVED[0]] = -100
    with pytest.raises(ValueError, match="'log_odds' needs one label per example and none that is -100"):
        lowered((model, x, ignored))
    unknown[REMOVED[0]] = torch.nan
    with pytest.raises(ValueError, match=r"needs finite log-odds .* add up to nan"):
        lowered((model, unknown, y))
    alone = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    with pytest.raises(ValueError, match=r"outputs of two classes or more; theirs add up to inf"):
        lowered((alone, x, torch.zeros_like(y)))
    dead = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    nn.init.constant_(dead[0].bias, -100.0)
    with pytest.raises(ValueError, match="no step of these layers lowers the removed examples' log-odds: slope"):
        lowered((dead, x, y), layers="0")
