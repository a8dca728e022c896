"""What is removed, and how the network without it is judged: a class, a random twentieth, or wrong labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastif.data import Data, human_labels
from fastif.evaluation.metrics import METRICS as OF_A_CLASS
from fastif.evaluation.metrics import measure

TASKS = ("class", "random", "mislabelled")
OF_OTHERS = ("accuracy", "loss", "KL")
RANDOM_SHARE = 0.05
LABELS = "aggre"  # of CIFAR-10N: the majority of three people, 9 % of them wrong


class Task(NamedTuple):
    """The training data as the network learnt it, and the examples that each case takes out.

    `learnt` and `without(case)` name the networks, of all examples and of those that a case keeps.
    `judged(logits, case, retrained)` measures outputs [m, c] on the held-out data, beside the retrained network's.
    """

    images: Data
    learnt: str
    removed: dict[int, Tensor]
    without: Callable[[int], str]
    judged: Callable[[Tensor, int, Tensor], dict[str, float]]


def metrics(task: str) -> tuple[str, ...]:
    """What is measured; the last one decides: F1 of a class's removal, better high; KL of the others, better low."""
    return OF_A_CLASS if task == "class" else OF_OTHERS


def better_high(metric: str) -> bool:
    return metric in ("F1", "EA", "SL", "accuracy")


def prepared(task: str, images: Data, cases: list[int], root: str | Path | None, data: str) -> Task:
    """Raises ValueError for a case that there is not and for data that have no second set of labels."""
    n, classes = len(images.y_train), len(images.classes)
    if task == "class":
        if not set(cases) <= set(range(classes)):
            raise ValueError(f"--cases must be classes, 0 to {classes - 1}, got {cases}")
        members = {c: (images.y_train == c).nonzero()[:, 0] for c in cases}
        return Task(images, "all", members, "without-{}".format, lambda z, c, _: measure(z, images.y_test, c))

    def judged(logits: Tensor, case: int, retrained: Tensor) -> dict[str, float]:
        del case
        log_p, log_q = retrained.double().log_softmax(1), logits.double().log_softmax(1)
        return {
            "accuracy": float((logits.argmax(1) == images.y_test).double().mean()),
            "loss": float(F.cross_entropy(logits.double(), images.y_test)),
            "KL": float((log_p.exp() * (log_p - log_q)).sum(1).mean()),
        }

    if task == "random":
        draws = {case: torch.Generator().manual_seed(case) for case in cases}
        members = {c: torch.randperm(n, generator=draw)[: round(RANDOM_SHARE * n)] for c, draw in draws.items()}
        return Task(images, "all", members, "without-random-{}".format, judged)
    if data != "cifar10" or root is None:
        raise ValueError(f"--task mislabelled needs the people's labels of CIFAR-10N, got --data {data}, --root {root}")
    if cases != [0]:
        raise ValueError(f"--task mislabelled has the one case 0, got {cases}")
    labels = human_labels(LABELS, root)[:n]
    wrong = {0: (labels != images.y_train).nonzero()[:, 0]}
    return Task(images._replace(y_train=labels), LABELS, wrong, lambda _: f"{LABELS}-without-wrong", judged)
