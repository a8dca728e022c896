"""Small problems to index: a linear network, a convolutional one, a language model; and what an index's files hold."""

import torch
from torch import nn

from fastif import EKFAC, Influence
from tests.helpers.problems import clusters

N, BATCH = 60, 8


class Language(nn.Module):
    """A causal language model of one layer, with a table that is looked up."""

    def __init__(self):
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(13, 6), nn.Linear(6, 9), nn.Linear(9, 13)

    def forward(self, tokens):
        return self.head(self.inner(self.words(tokens).cumsum(1)).tanh())


def linear():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = clusters(N, seed=0)
    return model, (x, y), (x[:7] + 0.1, y[:7]), "cross_entropy"


def convolution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(36, 3))
    x, y = torch.randn(N + 7, 2, 6, 6), torch.arange(N + 7) % 3
    return model, (x[:N], y[:N]), (x[N:], y[N:]), "cross_entropy"


def language():
    torch.manual_seed(0)
    tokens = torch.randint(1, 13, (N + 7, 5))
    tokens[::2, 3:] = 0
    labels = tokens.masked_fill(tokens == 0, -100)
    return Language(), (tokens[:N], labels[:N]), (tokens[N:], labels[N:]), "causal_lm"


PROBLEMS = {"linear": linear, "convolution": convolution, "language": language}


def fitted(model, train, loss, curvature=None, **arguments):
    curvature = EKFAC(1e-2, fisher="empirical") if curvature is None else curvature
    settings = {"batch_size": BATCH, "progress": False, **arguments}
    return Influence(model, loss, curvature, **settings).fit(train)


def bits(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.*"))}
