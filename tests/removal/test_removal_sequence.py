"""Removal after removal: each goes on where the last one ended, and all of them together are one removal of all."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from fastif import Certificate, ExactBlock, Removal, extract, remove, samplers
from fastif.removal import optimal_head
from tests.helpers.problems import QUIET, REMOVED, WEIGHT_DECAY, small_images, trained

FIRST, BOTH = REMOVED[:2], REMOVED


def head_of(problem):
    """Features, labels, weight and bias, as `optimal_head` takes them."""
    return problem.model[:2](problem.x).detach(), problem.y, *(p.detach() for p in problem.model[2].parameters())


def test_single_removals_stay_at_the_optimum(monkeypatch):
    """Twenty examples one by one, one step each, from features that are extracted once."""
    problem = trained()
    data = problem.x, problem.y
    seen = extract(problem.model, data, progress=False)
    gone = torch.randperm(90, generator=torch.Generator().manual_seed(1))[:20]
    passes = []
    monkeypatch.setattr("fastif.removal.checks.extract", lambda *_, **how: passes.append(how) or extract(*_, **how))
    removal, steps = None, []
    for number in range(1, len(gone) + 1):
        removal = remove(problem.model, data, gone[:number], start=removal, extracted=seen, steps=1, **QUIET)
        steps.append(len(removal.history))
        best = optimal_head(*head_of(problem), gone[:number], weight_decay=WEIGHT_DECAY)
        assert removal.history[-1].objective - best.objective < 1e-4, number
    assert steps == [1] * 20
    assert len(passes) == 20, "each compares the first batch, and makes no pass of its own"
    assert torch.equal(removal.removed, gone)
    together = remove(problem.model, data, gone, extracted=seen, **QUIET)
    for key, value in together.moved[-1].items():
        assert torch.allclose(removal.moved[-1][key], value, atol=2e-2)
    assert removal.after(0).keys() == problem.model.state_dict().keys()
    for key, value in problem.model.state_dict().items():
        assert torch.equal(removal.after(0)[key], value), "after(0) undoes all of them"


def test_a_full_step_answers_the_gradient_at_the_trained_parameters():
    """θ₂ = θ₁ − (G + λI)⁻¹ (∇F(θ₁) − ∇F_all(θ̂)), not ∇F_all(θ₁), by autograd and a block fitted by hand."""
    problem = trained()
    model = copy.deepcopy(problem.model)
    with torch.no_grad():  # away from the optimum: there ∇F_all(θ̂) would be zero
        model[2].weight += 0.3
    features = model[:2](problem.x).detach()
    full = dict(line_search=False, steps=1, **QUIET)
    first = remove(model, (problem.x, problem.y), FIRST, **full)
    second = remove(model, (problem.x, problem.y), BOTH, start=first, **full)

    inputs = torch.cat([features, torch.ones(90, 1, dtype=torch.float64)], 1)
    kept = torch.ones(90, dtype=torch.bool)
    kept[BOTH] = False
    at = lambda state: torch.cat([state["2.weight"], state["2.bias"][:, None]], 1)  # noqa: E731

    def gradient(theta, rows):
        residuals = (inputs[rows] @ theta.T).softmax(1) - one_hot(problem.y[rows], 3)
        return residuals.T @ inputs[rows] / 90 + WEIGHT_DECAY * theta

    before = at(first.state_dict)
    weights = torch.full((int(kept.sum()),), 1 / 90, dtype=torch.float64)
    block = ExactBlock(WEIGHT_DECAY).fit(inputs[kept], inputs[kept] @ before.T, weights=weights)
    trained_at = gradient(at(model.state_dict()), torch.ones(90, dtype=torch.bool))
    want = before - block.solve(gradient(before, kept) - trained_at)
    assert torch.allclose(at(second.state_dict), want, atol=1e-12)


def test_layers_go_on_as_the_head_does():
    """The head by way of the whole network takes the steps that it takes on its features."""
    problem = trained()
    data = problem.x, problem.y
    settings = dict(line_search=False, steps=2, **QUIET)
    head = network = None
    for removed in (FIRST, BOTH):
        head = remove(problem.model, data, removed, start=head, **settings)
        network = remove(
            problem.model, data, removed, start=network, layers=["2"], curvature=ExactBlock(0.0), **settings
        )
    for key, value in head.moved[-1].items():
        assert torch.allclose(network.moved[-1][key], value, atol=1e-10)
    assert network.history[0].objective == pytest.approx(head.history[0].objective, abs=1e-12)


def test_layers_end_no_higher_than_where_they_began():
    model, x, y = small_images()
    how = dict(layers="*", steps=1, **QUIET)
    first = remove(model, (x, y), FIRST, **how)
    second = remove(model, (x, y), BOTH, start=first, **how)
    kept = torch.ones(60, dtype=torch.bool)
    kept[BOTH] = False

    def objective(state):
        own = copy.deepcopy(model)
        own.load_state_dict(state)
        decay = sum(p.square().sum() for p in own.parameters())  # all of its layers move, batch norm too
        return (cross_entropy(own(x[kept]), y[kept], reduction="sum") / 60 + WEIGHT_DECAY / 2 * decay).item()

    began, ended = objective(first.state_dict), objective(second.state_dict)
    assert second.history[0].objective == pytest.approx(ended, abs=1e-9)
    assert ended < began


def test_a_certificate_needs_fewer_steps_from_an_earlier_removal():
    problem = trained()
    data = problem.x, problem.y
    how = dict(certificate=Certificate(epsilon=1.0, delta=1e-5, noise=1e-3), **QUIET)
    draw = torch.Generator().manual_seed(0)
    first = remove(problem.model, data, torch.arange(20), generator=draw, **how)
    afresh = remove(problem.model, data, torch.arange(21), generator=draw, **how)
    again = remove(problem.model, data, torch.arange(21), start=first, generator=draw, **how)
    assert 0 < len(again.history) < len(afresh.history)
    assert again.certified.bound <= again.certified.distance
    best = optimal_head(*head_of(problem), torch.arange(21), weight_decay=WEIGHT_DECAY)
    apart = sum((again.moved[-2][f"2.{key}"] - value).square().sum() for key, value in best.parameters.items())
    assert float(apart) ** 0.5 <= again.certified.bound


def test_nothing_to_do_leaves_it_where_it_was():
    problem = trained()
    first = remove(problem.model, (problem.x, problem.y), BOTH, steps=50, **QUIET)
    again = remove(problem.model, (problem.x, problem.y), BOTH, start=first, steps=50, **QUIET)
    for key, value in first.state_dict.items():
        assert torch.allclose(again.state_dict[key], value, atol=1e-9)


class Tied(nn.Module):
    """Its head stands under two names in the state dict."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.again = self.head

    def forward(self, x):
        return self.head(self.body(x).tanh())


def test_a_head_with_two_names_goes_on():
    x, y = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    model = Tied()
    first = remove(model, (x, y), FIRST[:1], head="head", **QUIET)
    second = remove(model, (x, y), FIRST, head="head", start=first, **QUIET)
    assert torch.equal(second.state_dict["again.weight"], second.state_dict["head.weight"])


def test_what_cannot_be_gone_on_from_is_refused():
    problem = trained()
    data = problem.x, problem.y
    first = remove(problem.model, data, FIRST, **QUIET)
    with pytest.raises(ValueError, match="indices must name all examples that are removed.* 2 of them, such as 3"):
        remove(problem.model, data, BOTH[2:], start=first, **QUIET)
    changed = copy.deepcopy(problem.model)
    changed.load_state_dict(first.state_dict)
    with pytest.raises(ValueError, match=r"this one has changed since: '2\.bias' differs; hand over the model as it"):
        remove(changed, data, BOTH, start=first, **QUIET)
    other = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with pytest.raises(ValueError, match="start is a removal from another model"):
        remove(other, data, BOTH, start=first, **QUIET)
    with pytest.raises(TypeError, match="start must be what remove returned, got dict"):
        remove(problem.model, data, BOTH, start=first.state_dict, **QUIET)
    with pytest.raises(ValueError, match="start does not say what it has removed"):
        remove(problem.model, data, BOTH, start=Removal(*first[:4]), **QUIET)
    whole = remove(problem.model, data, FIRST, layers="*", steps=1, **QUIET)
    with pytest.raises(ValueError, match=r"start has moved 0\.bias, 0\.weight, which do not move here"):
        remove(problem.model, data, BOTH, start=whole, **QUIET)


def test_indices_are_looked_at_before_the_earlier_removal_is():
    problem = trained()
    data = problem.x, problem.y
    first = remove(problem.model, data, FIRST, **QUIET)
    mask = torch.zeros(90, dtype=torch.bool)
    mask[BOTH] = True
    for wrong, rule in (
        (mask, r"got a mask; pass mask\.nonzero"),
        (torch.cat([BOTH, FIRST]), "indices must be distinct"),
        (BOTH.double(), "indices must be int64"),
        (BOTH[:0], "indices must not be empty"),
    ):
        with pytest.raises(ValueError, match=rule):
            remove(problem.model, data, wrong, start=first, **QUIET)


def test_loss_and_weight_decay_are_those_of_the_call_and_not_of_the_earlier_removal():
    problem = trained()
    data = problem.x, problem.y
    first = remove(problem.model, data, FIRST, **QUIET)
    again = remove(problem.model, data, BOTH, start=first, weight_decay=0.1, steps=50, progress=False)
    best = optimal_head(*head_of(problem), BOTH, weight_decay=0.1)
    for key, value in best.parameters.items():
        assert torch.allclose(again.moved[-1][f"2.{key}"], value, atol=1e-6)


def minimum_by_lbfgs(head, features, loss, n):
    """`head` at the minimum of F, found without anything of ours."""
    search = torch.optim.LBFGS(
        head.parameters(), max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective():
        search.zero_grad()
        decay = sum(p.square().sum() for p in head.parameters())
        value = loss(head(features)).sum() / n + WEIGHT_DECAY / 2 * decay
        value.backward()
        return value

    search.step(objective)
    return head


def test_a_class_weighted_head_over_texts_follows_the_minimum_that_lbfgs_finds():
    """Texts of word numbers, class weights with a mean of 1, one example more with each removal."""
    draw = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    texts = torch.randint(30, (90, 7), generator=draw)
    labels = (texts[:, 0] % 3 > 0).long() + (texts[:, 0] % 7 == 0).long()
    model = nn.Sequential(nn.EmbeddingBag(30, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    weights = 90 / (3 * labels.bincount(minlength=3).double())
    assert float(weights[labels].mean()) == pytest.approx(1)
    features = model[:2](texts).detach()
    loss = nn.CrossEntropyLoss(weights, reduction="none")
    removal = None
    for number in range(1, 7):
        gone = torch.arange(number) * 11
        removal = remove(model, (texts, labels), gone, start=removal, loss=loss, steps=20, **QUIET)
        kept = torch.ones(90, dtype=torch.bool)
        kept[gone] = False
        best = minimum_by_lbfgs(copy.deepcopy(model[2]), features[kept], lambda z, own=labels[kept]: loss(z, own), 90)
        for key, value in best.named_parameters():
            assert torch.allclose(removal.state_dict[f"2.{key}"], value, atol=1e-6), (number, key)


@pytest.mark.slow
def test_fifty_digits_one_by_one_stay_within_a_thousandth():
    """A network trained by SGD, whose head is not at its optimum; a tenth of the examples carries the curvature."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    from fastif.data import load
    from fastif.evaluation.models import build
    from fastif.evaluation.training import train

    images = load("digits")
    data = images.x_train, images.y_train
    model = train(build("cnn", (1, 8, 8), 10, width=0.5), *data, epochs=4, lr=0.15, batch_size=64, progress=False)
    seen = extract(model, data, progress=False)
    gone = torch.randperm(len(data[1]), generator=torch.Generator().manual_seed(0))[:50]
    subset, draw = partial(samplers.logit, k=144), torch.Generator().manual_seed(0)
    removal, away = None, []
    for number in range(1, 51):
        removal = remove(
            model, data, gone[:number], start=removal, extracted=seen, steps=1, subset=subset, generator=draw,
            progress=False,
        )  # fmt: skip
        head = model.head.weight.detach(), model.head.bias.detach()
        best = optimal_head(seen.features, seen.labels, *head, gone[:number], weight_decay=5e-4)
        away.append(removal.history[-1].objective - best.objective)
    assert max(away[2:]) < 1e-3, "the first steps still make up for what training left"
    assert away[-1] < 1e-4
