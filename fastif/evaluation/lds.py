"""The linear datamodeling score: do scores, summed over a subset, order what retraining on it gives?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastif.evaluation.correlation import Interval, check_scores, interval, is_constant, spearman
from fastif.evaluation.retraining import Retrained


class LDS(NamedTuple):
    """What `linear_datamodeling_score` found."""

    score: Interval  # mean over the queries and its 95 % interval: the subsets and the retraining are taken as given
    by_query: list[float]
    constant: int  # queries whose predictions or outcomes are the same for every subset; their score counts as 0


def random_subsets(n: int, subsets: int = 100, share: float = 0.5, seed: int = 0) -> list[Tensor]:
    """So many subsets of round(share·n) of n examples, drawn uniformly, each independent of the others; ascending.

    >>> [subset.tolist() for subset in random_subsets(4, subsets=2, share=0.5)]
    [[0, 1], [0, 2]]
    """
    if type(subsets) is not int or subsets < 2:
        raise ValueError(f"random_subsets: subsets must be an integer >= 2, got {subsets!r}")
    if not 0 < share < 1 or not 1 <= round(share * n) < n:
        raise ValueError(f"random_subsets: share must leave 1 to n-1 of n={n} examples in, got {share!r}")
    draw = torch.Generator().manual_seed(seed)
    return [torch.randperm(n, generator=draw)[: round(share * n)].sort().values for _ in range(subsets)]


def linear_datamodeling_score(scores: Tensor, retrained: Retrained) -> LDS:
    """Spearman's correlation, query by query, of predicted and true measurements over the subsets (Park et al. 2023).

    scores [q, n] are predicted RISES of a query's measurement when an example is removed, as `fastif.Influence.scores`
    gives them. The prediction for a subset S is thus Σ_{t∉S} scores[q, t], up to a constant −Σ_{t∈S} scores[q, t]: the
    sum over what is removed, not over what stays. The truth is the measurement in `retrained`, its mean over the
    seeds. Perfect scores give 1, their negative −1. docs/math.md (21).

    >>> from fastif.evaluation import Retrained
    >>> kept = [torch.tensor([0, 1]), torch.tensor([0, 2]), torch.tensor([1, 2])]
    >>> truth = torch.tensor([0.1, 0.2, 0.3])[:, None, None]  # the loss of one query without 2, without 1, without 0
    >>> scores = torch.tensor([[3.0, 2.0, 1.0]])
    >>> linear_datamodeling_score(scores, Retrained(kept, [0], truth, torch.zeros(3, 1))).score.mean
    1.0
    """
    op = "linear_datamodeling_score"
    truth = retrained.values.mean(1).T  # [q, sets]
    if truth.shape[1] < 2:
        raise ValueError(f"{op}: at least two subsets are needed, got {truth.shape[1]}")
    scores = check_scores(op, scores, q=len(truth))
    most = max(int(kept.max()) for kept in retrained.kept)
    if most >= scores.shape[1]:
        raise ValueError(f"{op}: scores have n={scores.shape[1]} columns, a subset holds example {most}")
    removed = torch.ones(len(retrained.kept), scores.shape[1], dtype=torch.float64)
    for row, kept in zip(removed, retrained.kept, strict=True):
        row[kept] = 0
    predicted = scores @ removed.T
    correlations = spearman(predicted, truth)
    constant = int((is_constant(predicted) | is_constant(truth)).sum())
    return LDS(interval(correlations), correlations.tolist(), constant)


def ceiling(retrained: Retrained) -> float:
    """The LDS that a perfect prediction of the expected measurement would reach, from how far the seeds agree.

    r is the mean over queries and pairs of seeds of Spearman's correlation over the subsets. The mean over s seeds has
    the reliability s·r/(1 + (s − 1)·r) (Spearman and Brown), and correlates with what it estimates by its square root.
    docs/math.md (21).

    Raises ValueError for fewer than two seeds, and where the seeds do not agree at all.
    """
    seeds = len(retrained.seeds)
    if seeds < 2:
        raise ValueError(f"ceiling: at least two seeds are needed to see how far they agree, got {seeds}")
    by_seed = retrained.values.permute(1, 2, 0)  # [seeds, q, sets]
    pairs = [(a, b) for a in range(seeds) for b in range(a)]
    agreement = float(torch.stack([spearman(by_seed[a], by_seed[b]).mean() for a, b in pairs]).mean())
    if agreement <= 0:
        raise ValueError(f"ceiling: the seeds do not agree (mean correlation {agreement:.3f}): there is none")
    return (seeds * agreement / (1 + (seeds - 1) * agreement)) ** 0.5
