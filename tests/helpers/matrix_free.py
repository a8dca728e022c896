"""What the tests of estimators that only multiply share: two networks, and what is asked of an influence."""

import copy

import torch
from torch import nn

from fastif import Influence
from tests.helpers.networks import Apply
from tests.helpers.problems import trained

DAMPING = 1e-2


def _words(m, ids):
    return m.head(m.second(m.first(m.words(ids)).tanh()).tanh().mean(1))


def network(name):
    """A float64 model, data and the size of its blocks together."""
    torch.manual_seed(0)
    if name == "mlp":
        model, x, y = trained()
        return copy.deepcopy(model), (x, y)
    layers = {"words": nn.Embedding(7, 4), "first": nn.Linear(4, 5), "second": nn.Linear(5, 4, bias=False)}
    model = Apply(_words, **layers, head=nn.Linear(4, 3)).double()
    return model, (torch.randint(0, 7, (24, 6)), torch.arange(24) % 3)


def influence_of(model, curvature, **options):
    return Influence(model, curvature=curvature, progress=False, **options)


def answers(influence, data):
    query = tuple(x[:5] for x in data)
    change = influence.on_parameters(query)
    few = tuple(x[:7] for x in data)
    return [influence.scores(query, data), influence.self_influence(few), *change.values()]


def assert_close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        assert float((a - b).norm()) <= tolerance * float(b.norm())
