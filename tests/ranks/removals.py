"""What ranks, and a process alone, are asked of removals: module-level functions, which processes can be sent."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from fastif import CG, Certificate, ExactBlock, Identity, remove, samplers
from fastif.ranks import find_ranks
from tests.helpers.problems import Problem, clusters

REMOVED = torch.arange(9) * 3
SAMPLER = partial(samplers.logit, k=30)
FIXED = samplers.Subset(torch.tensor([0, 1, 4, 40, 44, 5]), torch.full((6,), 1 / 6, dtype=torch.float64))
WEIGHTED = nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), reduction="none")
X, Y = clusters(150, 0)
UNSEEN = X[90:], (Y[90:] + 1) % 3  # other labels than the network gives them: the layers move
WAYS: dict[str, dict[str, Any]] = {
    "head": {},
    "head, sampler": {"subset": SAMPLER},
    "head, subset of one rank's": {"subset": FIXED},
    "head, full steps": {"line_search": False, "steps": 1},
    "head, weighted classes": {"loss": WEIGHTED, "subset": FIXED},
    "head, squared errors": {"loss": "mse", "steps": 1},
    "head, after another": {"start": {}},
    "all layers": {"layers": "*"},
    "all layers, after another": {"layers": "*", "start": {"layers": "*"}, "steps": 1},
    "all layers, sampler": {"layers": "*", "subset": SAMPLER},
    "all layers, full steps": {"layers": "*", "line_search": False, "curvature": Identity(), "steps": 1},
    "all layers, the head refitted": {"layers": "*", "refit_head": True, "subset": SAMPLER},
    "all layers, as unseen": {"layers": "*", "refit_head": True, "unseen": UNSEEN, "subset": SAMPLER},
    "all layers, by products": {"layers": "*", "curvature": CG(0.3, tolerance=1e-10), "steps": 1},
}


def removal(problem: Problem, name: str, batches: bool = False) -> dict[str, Any]:
    """What is left of the parameters, and every objective and norm on the way; in batches or of tensors."""
    how = dict(WAYS[name])
    model, x, y = problem  # one that was trained in one place: the bits of a training need not be another's
    torch.manual_seed(find_ranks().rank)  # what the first rank draws counts
    generator = torch.Generator().manual_seed(5 * find_ranks().rank) if "subset" in how else None
    target = nn.functional.one_hot(y, 3).double() if how.get("loss") == "mse" else y
    data: Any = (x, target) if not batches else [(a, b) for a, b in zip(x.split(13), target.split(13), strict=True)]
    settings: dict[str, Any] = {"steps": 3, "weight_decay": 5e-3, "batch_size": 20, **how}
    if "start" in how:
        first = dict(weight_decay=5e-3, batch_size=20, progress=False, **how["start"])
        settings["start"] = remove(model, data, REMOVED[:2], steps=1, **first)
    found = remove(model, data, REMOVED, generator=generator, progress=False, **settings)
    steps = [x for step in found.history for x in (step.objective, step.gradient_norm, *step.step_size.values())]
    return {
        "state": torch.cat([value.flatten() for value in found.state_dict.values()]),
        "history": torch.tensor(steps, dtype=torch.float64),
        "carried": [step.subset_size for step in found.history],
    }


def shortened(problem: Problem) -> Any:
    """The head behind the step in float32: the first rank finds that its block cannot be factored."""
    model, data = copy.deepcopy(problem.model).float(), (problem.x.float(), problem.y)
    how: dict[str, Any] = dict(layers="*", refit_head=True, weight_decay=1e-6, progress=False)
    found = remove(model, data, torch.arange(4), curvature=ExactBlock(0.0, joint=True), **how)
    return found.history[0].step_size, torch.cat([value.flatten() for value in found.state_dict.values()])


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(7, 4), nn.Linear(4, 5), nn.Linear(5, 7)

    def forward(self, tokens: Any) -> Any:
        return self.head(torch.tanh(self.inner(self.words(tokens).cumsum(1))))


def removal_of_texts() -> Any:
    """Of a language model, whose curvature and model of the objective are made of drawn labels."""
    torch.manual_seed(0)
    model, tokens = Language().double(), torch.randint(7, (24, 4))
    how: dict[str, Any] = dict(layers="*", loss="causal_lm", weight_decay=1e-3, progress=False, batch_size=5, steps=2)
    found = remove(model, (tokens, tokens), torch.tensor([3, 4, 11]), **how)
    return torch.cat([value.flatten() for value in found.state_dict.values()])


def certified(problem: Problem, seed: int | None) -> Any:
    """The head under a certificate, with noise of a seed or, by default, of each process's own."""
    generator = None if seed is None else torch.Generator().manual_seed(seed + find_ranks().rank)
    model, x, y = problem
    loose = Certificate(1.0, 1e-5, 0.1)
    found = remove(model, (x, y), REMOVED, certificate=loose, weight_decay=0.02, generator=generator, progress=False)
    assert found.certified is not None
    return torch.cat([v.flatten() for v in found.state_dict.values()]), found.certified.bound, len(found.history)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([(torch.zeros(5).double(), torch.tensor(0))] * 90)


def bad_removal(problem: Problem, given: dict[str, Any]) -> Any:
    model, x, y = problem
    data = {"stream": DataLoader(Stream(), batch_size=5), "iterator": iter([(x, y)])}.get(given.get("data", ""), (x, y))
    settings = {name: value for name, value in given.items() if name in ("layers", "steps", "weight_decay")}
    settings = {"weight_decay": 5e-3, **settings}
    return remove(model, data, given.get("removed", REMOVED), progress=False, **settings)
