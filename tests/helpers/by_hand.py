"""Small models whose gradients and curvature are built by hand, layer by layer, for the tests of Influence."""

from functools import cache
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from fastif import EKFAC, KFAC, Diagonal, ExactBlock, Influence
from tests import reference
from tests.helpers.networks import Apply

N, CLASSES, DAMPING = 24, 3, 3e-3


def _words(m, ids):
    h = m.words(ids)
    h = m.second(m.first(h).tanh()).tanh()
    return m.head(h.mean(1))


def _pixels(m, x):
    return m.head(m.conv(x).tanh().flatten(1))


class Problem(NamedTuple):
    model: nn.Module
    data: tuple[torch.Tensor, torch.Tensor]
    layers: tuple[str, ...]


@cache
def problem(name):
    """A model, data (x, y) and its layers: one position per example, words, or pixels."""
    torch.manual_seed(0)
    y = torch.arange(N) % CLASSES
    if name == "mlp":
        model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES)), torch.randn(N, 5)
    elif name == "words":
        layers = {"words": nn.Embedding(7, 4), "first": nn.Linear(4, 5), "second": nn.Linear(5, 4, bias=False)}
        model, x = Apply(_words, **layers, head=nn.Linear(4, CLASSES)), torch.randint(0, 7, (N, 6))
        x[:, 5] = x[:, 0]
    else:
        layers = {"conv": nn.Conv2d(2, 4, 3, stride=2, padding=1), "head": nn.Linear(16, CLASSES, bias=False)}
        model, x = Apply(_pixels, **layers), torch.randn(N, 2, 4, 4)
    model.double()
    names = tuple(n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding | nn.Conv2d))
    return Problem(model, (x if name == "words" else x.double(), y), names)


@cache
def by_hand(name):
    """For every layer: inputs [n, t, d], output gradients of the loss [1, n, t, o] and of the logits' curvature."""
    model, (x, y), layers = problem(name)
    seen = {}
    handles = [
        module.register_forward_hook(lambda _m, args, out, key=key: seen.update({key: (args[0].detach(), out)}))
        for key, module in model.named_modules()
        if key in layers
    ]
    logits = model(x)
    for handle in handles:
        handle.remove()
    probs = logits.detach().softmax(1)
    values, vectors = torch.linalg.eigh(torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :])
    roots = vectors * values.clamp(min=0).sqrt()[:, None, :]  # [n, c, s], another root than the library's
    outputs = [seen[key][1] for key in layers]
    loss = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), outputs, retain_graph=True)
    columns = [torch.autograd.grad(logits, outputs, roots[:, :, s], retain_graph=True) for s in range(CLASSES)]
    parts = {}
    for i, key in enumerate(layers):
        module, a = model.get_submodule(key), seen[key][0]
        if isinstance(module, nn.Embedding):
            a = F.one_hot(a, module.num_embeddings).double()
        elif isinstance(module, nn.Conv2d):
            a = F.unfold(a, module.kernel_size, padding=module.padding, stride=module.stride).mT
        a = a.reshape(N, -1, a.shape[-1])
        if getattr(module, "bias", None) is not None:
            a = torch.cat([a, torch.ones(*a.shape[:2], 1, dtype=torch.float64)], 2)

        def positions(u, module=module):
            return u.flatten(2).mT if isinstance(module, nn.Conv2d) else u.reshape(N, -1, u.shape[-1])

        empirical = positions(loss[i])[None]
        exact = torch.stack([positions(column[i]) for column in columns])
        if isinstance(module, nn.Embedding):  # as a matrix [rows, d]: the looked-up row is the output side
            parts[key] = Table(a, empirical, exact)
        else:
            parts[key] = Layer(a, empirical, exact)
    return parts


class Layer(NamedTuple):
    a: torch.Tensor
    empirical: torch.Tensor
    exact: torch.Tensor

    def gradients(self):
        return torch.einsum("nto,ntd->nod", self.empirical[0], self.a)

    def matrix(self, of, fisher, weights):
        return of(self.a, getattr(self, fisher), weights)


class Table(Layer):
    """A linear map without bias of one-hot rows [n, t, rows] into [n, t, d]; its table is the transpose, [rows, d]."""

    def gradients(self):
        return super().gradients().mT

    def matrix(self, of, fisher, weights):
        rows, d = self.a.shape[2], self.empirical.shape[3]
        flipped = super().matrix(of, fisher, weights).view(d, rows, d, rows)
        return flipped.permute(1, 0, 3, 2).reshape(rows * d, rows * d)


def diagonal(inputs, columns, weights):
    return torch.diag(reference.ggn(inputs, columns, weights).diagonal())


MATRICES = {KFAC: reference.kfac, EKFAC: reference.ekfac, Diagonal: diagonal, ExactBlock: reference.ggn}


def influence_of(name, curvature, **options):
    model = problem(name).model
    return Influence(model, curvature=curvature, layers="*", progress=False, **options)


def exact_block(damping, fisher="exact"):
    return ExactBlock(damping, "ggn" if fisher == "exact" else "empirical_fisher")


ESTIMATORS = [
    *(kind(DAMPING, fisher) for kind in (KFAC, EKFAC, Diagonal) for fisher in ("exact", "empirical", "monte_carlo")),
    {"words": Diagonal(DAMPING), "head": exact_block(DAMPING), "*": EKFAC(DAMPING)},
]


def names_of(estimator):
    if isinstance(estimator, str):
        return None
    return "mapping" if isinstance(estimator, dict) else f"{type(estimator).__name__} {estimator.fisher}"


def answers(influence, data):
    query = data[0][:5], data[1][:5]
    change = influence.on_parameters(query)
    scores = influence.scores(query, data).flatten()
    return torch.cat([scores, influence.self_influence(data), *(t.flatten() for t in change.values())])
