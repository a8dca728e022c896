"""Membership inference: can somebody who has the network tell what it was trained on? docs/math.md (29)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastif.evaluation.correlation import ranks


class Membership(NamedTuple):
    """How well a guess tells members from others. By chance both are 0.5."""

    auc: float  # probability that a member is more suspect than another, ties half
    balanced_accuracy: float  # mean of the shares of members and of others that are told rightly


class ULiRA(NamedTuple):
    """How well each example's membership is told from networks that had it removed and networks that never saw it."""

    auc: float  # over all examples and networks
    balanced_accuracy: float  # of the more likely of the two
    by_example: Tensor  # float64 [r]: AUC of each example over the networks
    by_pair: Tensor  # float64 [pairs]: AUC of each pair of networks over the examples


def membership(members: Tensor, others: Tensor) -> Membership:
    """Membership inference by the loss: the lower an example's loss, the likelier it was trained on.

    `balanced_accuracy` is that of a threshold which was chosen on one half of both (even places) for the other half,
    and the other way round, averaged: by chance it is 0.5, which a threshold chosen where it is judged would exceed.

    Args:
        members: losses [r] of the examples in question.
        others: losses [m] of examples of the same kind that nobody trained on.

    >>> membership(torch.tensor([0.1, 0.2, 0.3, 0.1]), torch.tensor([0.9, 0.8, 0.3, 0.7]))
    Membership(auc=0.96875, balanced_accuracy=0.75)

    Raises ValueError for fewer than two of either and for losses that are not finite.
    """
    members, others = _checked("members", members), _checked("others", others)
    found = []
    for part in (0, 1):
        threshold = _best_threshold(members[part::2], others[part::2])
        found.append(_balanced(members[1 - part :: 2] <= threshold, others[1 - part :: 2] <= threshold))
    return Membership(_auc(-members, -others), sum(found) / 2)


def u_lira(log_odds: Tensor, trained_on: Tensor) -> ULiRA:
    """U-LiRA: the likelihood ratio of "it was removed" against "it was never there", example by example.

    Networks come in pairs, 2j and 2j + 1, of which exactly one was trained on each example and had it removed. The
    log-odds φ of an example's label are taken as normal on either side, with means from the networks of all OTHER pairs
    and one variance for all, whose size then decides nothing: the log-likelihood ratio is, but for that factor,
    (μ_in − μ_out)(φ − (μ_in + μ_out)/2). docs/math.md (29); Carlini et al. 2022, Hayes et al. 2024.

    Args:
        log_odds: [K, r], log p/(1 − p) of each example's label under each network after the removal.
        trained_on: bool [K, r], whether the network was trained on the example before.

    Raises ValueError for fewer than two pairs, for an example that a pair saw on one side never or twice, with the
    example, and for log-odds that are not finite.
    """
    networks, r = log_odds.shape if log_odds.dim() == 2 else (0, 0)
    if trained_on.shape != log_odds.shape or trained_on.dtype != torch.bool or networks < 4 or networks % 2 or not r:
        raise ValueError(
            "u_lira: log_odds and bool trained_on must be [K, r] with K even, at least 4, and r >= 1, got "
            f"{list(log_odds.shape)} and {trained_on.dtype} {list(trained_on.shape)}"
        )
    if not log_odds.isfinite().all():
        raise ValueError("u_lira: log_odds must be finite")
    sides = trained_on.view(-1, 2, r)
    if not (one := sides.sum(1) == 1).all():
        pair, example = (~one).nonzero()[0].tolist()
        raise ValueError(f"u_lira: of pair {pair} exactly one network must be trained on example {example}")
    phi, pairs = log_odds.double().view(-1, 2, r), networks // 2
    saw, never = (phi * sides).sum(1), (phi * ~sides).sum(1)  # [pairs, r]
    mean_in, mean_out = ((side.sum(0) - side) / (pairs - 1) for side in (saw, never))  # of the other pairs
    slope, middle = mean_in - mean_out, (mean_in + mean_out) / 2
    ratio_in, ratio_out = slope * (saw - middle), slope * (never - middle)
    accuracy = ((ratio_in > 0).double() + (ratio_in == 0) / 2 + (ratio_out < 0) + (ratio_out == 0) / 2).mean() / 2
    return ULiRA(
        _auc(ratio_in.flatten(), ratio_out.flatten()),
        float(accuracy),
        torch.tensor([_auc(a, b) for a, b in zip(ratio_in.T, ratio_out.T, strict=True)], dtype=torch.float64),
        torch.tensor([_auc(a, b) for a, b in zip(ratio_in, ratio_out, strict=True)], dtype=torch.float64),
    )


def _checked(name: str, losses: Tensor) -> Tensor:
    losses = torch.as_tensor(losses).detach().double().cpu()
    if losses.dim() != 1 or len(losses) < 2:
        raise ValueError(f"membership: {name} must be losses [r] of at least two examples, got {list(losses.shape)}")
    if not losses.isfinite().all():
        raise ValueError(f"membership: {name} must be finite")
    return losses


def _auc(high: Tensor, low: Tensor) -> float:
    """P(high > low) + ½ P(high = low): Mann and Whitney's U over its largest value."""
    rank = ranks(torch.cat([high, low]))[: len(high)]
    return (float(rank.sum()) - len(high) * (len(high) + 1) / 2) / (len(high) * len(low))


def _best_threshold(members: Tensor, others: Tensor) -> float:
    """The loss up to which calling an example a member is best balanced; the lowest of several."""
    candidates = torch.cat([members, others]).unique()
    told = torch.searchsorted(members.sort().values, candidates, right=True) / len(members)
    wrongly = torch.searchsorted(others.sort().values, candidates, right=True) / len(others)
    return float(candidates[(told - wrongly).argmax()])


def _balanced(members: Tensor, others: Tensor) -> float:
    return float(members.double().mean() + (~others).double().mean()) / 2
