"""Scores to store, in small blocks, and the forms of data that they are of."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastif import EKFAC, KFAC, Influence
from tests.helpers.problems import clusters

Q, N, BATCH = 11, 90, 8
BLOCK = 2 * BATCH * 5 * 8  # bytes: runs of two batches; fewer queries at a time by memory=


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = clusters(N, seed=0)
    return model, (x[:Q] + 0.1, y[:Q]), (x, y)


def fitted(model, train, curvature=None, **arguments):
    """Five queries at a time fit the memory: three rows of blocks, the last of one query."""
    curvature = EKFAC() if curvature is None else curvature
    factored = isinstance(curvature, KFAC) and not isinstance(model[-1], Mean)  # o + d numbers of each layer
    numbers = (6 + 6) + (3 + 7) if factored else sum(p.numel() for p in model.parameters())
    memory = 5 * numbers * 8
    settings = {"batch_size": BATCH, "memory": memory, "progress": False, **arguments}
    return Influence(model, curvature=curvature, **settings).fit(train)


def bits(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def walked(train):
    """Batches of uneven lengths that can only be walked."""
    x, y = train
    sizes = [8, 3, 16, 15, 1, 9, 16, 2, 11, 9]
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


class Mean(nn.Module):
    """Over positions."""

    def forward(self, x):
        return x.mean(1)


def tokens():
    """As `problem`, with four positions per example."""
    model, _, _ = problem()
    x, y = clusters(4 * N, seed=0)
    x, y = x.view(N, 4, 5), y[::4]
    return model.append(Mean()), (x[:Q] + 0.1, y[:Q]), (x, y)


QUERY_GROUPS = torch.arange(Q) * 5 % 3
PARTS = {  # what a folder can hold beside scores: problem, call
    "layers": (problem, lambda influence, query, train, **out: influence.scores(query, train, **out, by="layer")),
    "tokens": (tokens, lambda influence, query, train, **out: influence.scores(query, train, **out, by="token")),
    "query groups": (
        problem,
        lambda influence, query, train, **out: influence.scores(query, train, query_groups=QUERY_GROUPS, **out),
    ),
}
FORMS = {
    "tensors": lambda train: train,
    "dataset": lambda train: TensorDataset(*train),
    "loader": lambda train: DataLoader(TensorDataset(*train), batch_size=7),
    "batches": walked,
}
