"""Removal from language models, whose texts have several labels, held against autograd and the dense matrix."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from fastif import EKFAC, Identity, remove
from fastif.model.losses import per_sample
from fastif.removal.network import RetainedNetwork
from tests.helpers.problems import flat

N, REMOVED = 24, torch.tensor([3, 4, 11])
KEPT = torch.tensor([i for i in range(N) if i not in REMOVED])
HOW = dict(layers="*", loss="causal_lm", weight_decay=1e-3, progress=False, batch_size=5)


class Language(nn.Module):
    """A causal language model: each position sees the mean of the words so far."""

    def __init__(self):
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(7, 4), nn.Linear(4, 5), nn.Linear(5, 7)

    def forward(self, tokens):
        places = torch.arange(1, tokens.shape[1] + 1)[:, None]
        return self.head(torch.tanh(self.inner(self.words(tokens).cumsum(1) / places)))


@pytest.fixture(scope="module")
def language():
    torch.manual_seed(0)
    model, tokens = Language().double(), torch.randint(7, (N, 4))
    labels = tokens.clone()
    labels[:, 0] = -100
    labels[::3, 3] = -100
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(60):
        optimizer.zero_grad()
        losses(model, (tokens, labels)).mean().backward()
        optimizer.step()
    return model, (tokens, labels)


def losses(model, data, rows=slice(None)):
    return per_sample("causal_lm", model(data[0][rows]), data[1][rows], len(data[0][rows]))


def objective(model, data):
    decay = sum(float(p.detach().square().sum()) for p in model.parameters())
    return float(losses(model, data, KEPT).detach().sum()) / N + 0.5 * HOW["weight_decay"] * decay


def test_the_first_step_without_search_climbs_the_removed_texts_losses(language):
    """Formula (3) with the identity for curvature: (1/n) Σ ∇ℓ over the removed."""
    model, data = language
    removal = remove(model, data, REMOVED, curvature=Identity(), steps=1, line_search=False, **HOW)
    parameters = dict(model.named_parameters())
    want = torch.autograd.grad(losses(model, data, REMOVED).sum() / N, [*parameters.values()])
    for (name, before), gradient in zip(parameters.items(), want, strict=True):
        torch.testing.assert_close(removal.state_dict[name], (before + gradient).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("curvature", [None, EKFAC(0.1, fisher="empirical")])
def test_steps_lower_the_retained_objective_and_say_where_it_is(language, curvature):
    model, data = language
    removal = remove(model, data, REMOVED, curvature=curvature, steps=3, **HOW)
    values = [objective(model, data), *(step.objective for step in removal.history)]
    assert len(values) > 1
    assert values == sorted(values, reverse=True)
    moved = Language().double()
    moved.load_state_dict(removal.state_dict)
    assert values[-1] == pytest.approx(objective(moved, data), abs=1e-12)
    rise = [(losses(moved, data, rows) - losses(model, data, rows)).mean().item() for rows in (REMOVED, KEPT)]
    assert rise[0] > max(0.0, rise[1])
    other_batches = remove(model, data, REMOVED, curvature=curvature, steps=3, **{**HOW, "batch_size": 24})
    for name, value in removal.state_dict.items():
        torch.testing.assert_close(other_batches.state_dict[name], value, rtol=0, atol=1e-8)


def test_the_head_alone_moves_where_no_layers_are_named(language):
    model, data = language
    removal = remove(model, data, REMOVED, steps=1, **{**HOW, "layers": None})
    assert removal.moved[0].keys() == {"head.weight", "head.bias"}


def test_the_model_along_the_steps_has_the_ggn_on_average_over_drawn_labels(language):
    model, data = language
    how = {key: value for key, value in HOW.items() if key != "progress"}
    problem = RetainedNetwork(model, data, REMOVED, curvature=Identity(), **how)
    problem.gradient()
    problem.curvature()
    own = problem._newton_steps()
    directions = [{name: matrix} for name, matrix in own.items()]
    names = dict(problem.model.named_parameters())
    columns = []
    for direction in directions:
        problem._move(direction)
        after = {name: p.detach().clone() for name, p in names.items()}
        problem._move({name: -matrix for name, matrix in direction.items()})
        columns.append(flat({name: after[name] - p.detach() for name, p in names.items()}))
    along = torch.stack(columns, 1)  # [P, m]
    theta = {name: p.detach() for name, p in names.items()}
    jacobian = jacrev(lambda values: functional_call(model, values, (data[0][KEPT],))[:, :-1])(theta)
    jacobian = torch.cat([part.flatten(3) for part in jacobian.values()], 3)  # [n, t, v, P]
    p = model(data[0][KEPT])[:, :-1].softmax(2).detach()
    counted = (data[1][KEPT][:, 1:] != -100).double()
    spread = torch.diag_embed(p) - p[..., None] * p[..., None, :]
    seen = jacobian @ along
    want = torch.einsum("ntai,ntab,ntbj,nt->ij", seen, spread, seen, counted) / N
    want += HOW["weight_decay"] * along.T @ along
    drawn = []
    for seed in range(400):
        problem._influence.setup = problem._influence.setup._replace(seed=seed)
        drawn.append(problem._model_along(directions)[1])
    drawn = torch.stack(drawn)
    error = drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - want).abs() <= 4.5 * error + 1e-12).all()
    assert (error < 0.2 * want.diagonal().sqrt().outer(want.diagonal().sqrt())).all()


def test_a_head_without_positions_is_told_from_a_language_model():
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(6, 3)
    with pytest.raises(ValueError, match="'causal_lm' needs logits"):
        remove(model, (x, torch.zeros(6, dtype=torch.int64)), torch.tensor([0]), loss="causal_lm", progress=False)
    with pytest.raises(ValueError, match="words with 'causal_lm' or 'token_cross_entropy', got 'bce'"):
        remove(model, (x, x[:, :2]), torch.tensor([0]), loss="bce", layers="*", curvature=EKFAC(0.1), progress=False)


def test_a_language_model_without_its_loss_is_told_how_to_say_it():
    texts = torch.randint(9, (12, 5), generator=torch.Generator().manual_seed(0))
    bigrams = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9))
    with pytest.raises(ValueError, match=r"one label per example, got outputs \[1, 5, 9\]; of words say 'causal_lm'"):
        remove(bigrams, (texts, texts), torch.arange(3), layers="*", progress=False)
    with pytest.raises(ValueError, match="output for every position say loss='causal_lm'"):
        remove(bigrams, (texts, texts), torch.arange(3), progress=False)
