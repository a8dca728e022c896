"""A script of a user, for `fastif scores`."""

import torch

SCRIPT = """
import time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def problem():  # the weights are from torch's own generator: --seed decides
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 5, generator=draw), torch.arange(40) % 3
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    return model, (x, y), (x[:6], y[:6])

class Gelu(nn.Tanh):
    def forward(self, x):
        return nn.functional.gelu(x)

def other_code():
    model, train, query = problem()
    return nn.Sequential(model[0], Gelu(), model[2]), train, query

def loaders():
    model, train, query = problem()
    return model, DataLoader(TensorDataset(*train), batch_size=8), [query]

def slow():
    class Slow(nn.Linear):
        def forward(self, x):
            time.sleep(0.05)
            return super().forward(x)
    _, train, query = problem()
    return Slow(5, 3), train, query

def takes(one): ...
def nothing(): ...

class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)

def tokens(*tail):
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 4, 5, generator=draw), torch.arange(40) % 3
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), *(tail or (nn.Linear(4, 3), Mean())))
    return model, (x, y), (x[:6], y[:6])

def pooled(): return tokens(Mean(), nn.Linear(4, 3))
def two(): return problem()[:2]
def shuffled():
    model, train, query = problem()
    return model, DataLoader(TensorDataset(*train), shuffle=True), query
def no_model(): return "model", *problem()[1:]
def no_data(): return problem()[0], 3, problem()[2]
def training(): return nn.Sequential(nn.Dropout(), nn.Linear(5, 3)), *problem()[1:]
def raises(): raise ValueError("the user's own words\\nin two lines")
number = 3
"""


def returned(name="problem", seed=0):
    """What the script returns after torch.manual_seed(seed), as the command calls it."""
    torch.manual_seed(seed)
    spaces = {}
    exec(SCRIPT, spaces)
    return spaces[name]()


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if "__pycache__" not in path.parts)
