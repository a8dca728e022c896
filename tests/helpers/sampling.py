"""What the tests of samplers share: outputs of a model, the samplers that weigh what they pick."""

from functools import partial
from typing import NamedTuple

import pytest
import torch

from fastif.samplers import (
    Subset,
    certified,
    draw,
    intermediate_distance,
    k_center,
    k_center_by_class,
    leverage,
    logit,
    prefix,
    random,
    stratified,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Problem(NamedTuple):
    features: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor

    def draw(self, sampler, seed: int = 0) -> Subset:
        return draw(sampler, **self._asdict(), generator=seeded(seed))


def problem(n: int = 60, d: int = 5, c: int = 4, seed: int = 0, confidence: float = 2.0) -> Problem:
    g = seeded(seed)
    features = torch.randn(n, d, generator=g)
    logits = confidence * torch.randn(n, c, generator=g)
    labels = torch.randint(c, (n,), generator=g)
    return Problem(features, logits, labels)


WEIGHTED = {
    "random": random,
    "prefix": prefix,
    "stratified": stratified,
    "intermediate_distance": intermediate_distance,
    "k_center": k_center,
    "k_center-cosine": partial(k_center, metric="cosine"),
    "k_center_by_class": k_center_by_class,
    "logit": logit,
    "leverage-trace": partial(leverage, kind="trace"),
    "leverage-ridge": partial(leverage, kind="ridge", damping=1e-2),
    "certified": certified,
}


IMPORTANCE = {key: WEIGHTED[key] for key in ("logit", "leverage-trace", "leverage-ridge")}


weighted = pytest.mark.parametrize("sampler", WEIGHTED.values(), ids=WEIGHTED)


importance = pytest.mark.parametrize("sampler", IMPORTANCE.values(), ids=IMPORTANCE)
