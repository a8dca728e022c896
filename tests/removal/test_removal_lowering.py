"""The step that lowers what is said of the removed examples, against its definition in float64, docs/math.md (34)."""

import copy
from functools import partial

import pytest
import torch
from torch.func import functional_call, jacrev

from fastif import ExactBlock, remove, samplers
from fastif.removal.lowering import log_odds
from tests.helpers.problems import QUIET, REMOVED, WEIGHT_DECAY, flat, small_images, sure, trained
from tests.removal.test_removal_layers import kept_of
from tests.removal.test_removal_refit import NAMES, mean_loss

EXACT = ExactBlock(0.02, joint=True)


def lowered(problem, removed=REMOVED, **how):
    model, x, y = problem
    settings = {"layers": "*", "refit_head": True, "lower_odds": 3.0, **QUIET, **how}
    return remove(model, (x, y), removed, **settings)


def odds_of(model, x, y, rows):
    p = model(x[rows]).softmax(1).gather(1, y[rows][:, None])[:, 0]
    return (p / (1 - p)).log()


def test_log_odds():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 2, 2])
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(log_odds(logits, labels), (p / (1 - p)).log())
    assert log_odds(torch.tensor([[300.0, 0.0]]), torch.tensor([0])) == 300, "where 1 − p is 0 in its type"


def test_the_layers_take_the_step_of_the_definition():
    """−s (Σ_kept JᵀJ / n + γI)⁻¹ m, m the mean gradient of the log-odds, with s m·(…)⁻¹m = lower_odds."""
    model, x, y = problem = trained()
    theta = {name: p.detach() for name, p in model.named_parameters() if name in NAMES}
    jacobian = jacrev(lambda values: functional_call(model, values, (x,)))(theta)
    jacobian = torch.cat([j.flatten(2) for j in jacobian.values()], 2)[kept_of(90)]
    curvature = torch.einsum("nap,naq->pq", jacobian, jacobian) / 90
    curvature.diagonal().add_(WEIGHT_DECAY + 0.02)
    slopes = jacrev(lambda values: log_odds(functional_call(model, values, (x[REMOVED],)), y[REMOVED]).mean())(theta)
    mean = torch.cat([slope.flatten() for slope in slopes.values()])
    direction = torch.linalg.solve(curvature, mean)
    removal = lowered(problem, curvature=EXACT)
    found = flat(removal.history[0].parameters)
    assert torch.allclose(found, flat(theta) - 3.0 / (mean @ direction) * direction, atol=1e-10)
    assert set(removal.history[0].step_size.values()) == {1.0}
    assert all(torch.equal(removal.after(0)[name], p) for name, p in model.named_parameters())


def test_to_first_order_the_log_odds_fall_by_as_much_as_is_asked_for():
    model, x, y = problem = trained()
    moved = copy.deepcopy(model)
    moved.load_state_dict(lowered(problem, lower_odds=1e-5).after(1))
    fall = odds_of(model, x, y, REMOVED).mean() - odds_of(moved, x, y, REMOVED).mean()
    assert float(fall) == pytest.approx(1e-5, rel=1e-3)


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


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"lower_odds": 0.0}, "lower_odds must be a positive number of nats, got 0.0"),
        ({"lower_odds": -1.0}, "lower_odds must be a positive number of nats, got -1.0"),
        ({"lower_odds": float("nan")}, "lower_odds must be a positive number of nats, got nan"),
        ({"lower_odds": True}, "lower_odds must be a positive number of nats, got True"),
        ({"refit_head": False}, "it needs refit_head=True"),
        ({"layers": None}, "refit_head=True needs layers="),
        ({"lower_odds": 1e200}, "lower_odds=1e.200 leads to a network behind which no head is found"),
    ],
)
def test_what_is_refused(how, said):
    with pytest.raises(ValueError, match=said):
        lowered(trained(), **how)
