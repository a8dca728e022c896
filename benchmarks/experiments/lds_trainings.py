"""The trainings that the table of rank correlations explains: logistic regression, an MLP and a small CNN."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastif
from fastif import evaluation
from fastif.evaluation.halves import draw_halves
from fastif.evaluation.training import train

WEIGHT_DECAY = 1e-3  # of all trainings
HALVES = 10  # networks on halves, at most
FULL = 5  # networks on all data, at most


class Work(NamedTuple):
    train_fn: Callable[[Tensor, int], nn.Module]
    train: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]
    seeds: int  # retrainings of each subset
    epochs: int | None  # of SGD; None: trained to the optimum


def converged(kept: Tensor, seed: int, x: Tensor, y: Tensor) -> nn.Module:
    """Logistic regression at its optimum."""
    del seed
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 10))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        norm = sum(parameter.square().sum() for parameter in model.parameters())
        value = F.cross_entropy(model(x[kept]), y[kept]) + WEIGHT_DECAY / 2 * norm
        value.backward()
        return value

    optimizer.step(objective)
    return model


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)),
    )


LR, BATCH = 0.05, 64
EVERY = 4  # steps from one checkpoint of a log to the next


def descended(kept: Tensor, seed: int, x: Tensor, y: Tensor, build: Callable[[], nn.Module], epochs: int) -> nn.Module:
    """A network trained by SGD; torch's generator, from which `build` draws, is at `seed`."""
    how = dict(epochs=epochs, lr=LR, weight_decay=WEIGHT_DECAY, batch_size=BATCH, seed=seed, progress=False)
    return train(build(), x[kept], y[kept], **how)


def logged(work: Work, kept: Tensor, seed: int) -> tuple[nn.Module, fastif.TrainingLog]:
    """The network that `train_fn` trains, with a record of its training."""
    torch.manual_seed(seed)
    build = work.train_fn.keywords["build"]  # pyright: ignore[reportFunctionMemberAccess]
    model, (x, y) = build(), work.train
    log = fastif.TrainingLog(model, every=EVERY)
    how = dict(epochs=work.epochs, lr=LR, weight_decay=WEIGHT_DECAY, batch_size=BATCH, seed=seed, progress=False)
    train(model, x[kept], y[kept], **how, step=lambda optimizer, rows: log.step(optimizer, kept[rows]))
    return model, log


def explained(work: Work, n: int) -> tuple[list[nn.Module], fastif.Networks, list[fastif.TrainingLog]]:
    """The networks on all data, those on halves, and the logs of the first and of the halves."""
    models: list[nn.Module] = []
    for seed in range(FULL):
        torch.manual_seed(seed)
        models.append(work.train_fn(torch.arange(n), seed).eval())
    if work.epochs is None:
        return models, evaluation.train_halves(work.train_fn, n, HALVES // 2, progress=False), []
    model, first = logged(work, torch.arange(n), 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), models[0].parameters(), strict=True))
    logs = [logged(work, task.kept, task.seed)[1] for task in draw_halves(n, HALVES // 2, 0)]
    networks = fastif.Networks([log.parameters() for log in logs], [log.kept for log in logs], logs[0].training_time)
    return models, networks, [first, *logs]


def works(root: str, n: int, q: int) -> dict[str, Work]:
    digits, fashion = fastif.data.load("digits"), fastif.data.load("fashion-mnist", root)
    draw = torch.Generator().manual_seed(0)

    def parts(data: fastif.data.Data) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        some, asked = (torch.randperm(len(y), generator=draw)[:k] for y, k in ((data.y_train, n), (data.y_test, q)))
        return (data.x_train[some], data.y_train[some]), (data.x_test[asked], data.y_test[asked])

    a, b = parts(digits), parts(fashion)
    return {
        "logistic regression, digits": Work(partial(converged, x=a[0][0], y=a[0][1]), *a, 1, None),
        "MLP, Fashion-MNIST": Work(partial(descended, x=b[0][0], y=b[0][1], build=mlp, epochs=20), *b, 3, 20),
        "CNN, digits": Work(partial(descended, x=a[0][0], y=a[0][1], build=cnn, epochs=12), *a, 2, 12),
    }
