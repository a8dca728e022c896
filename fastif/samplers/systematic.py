"""Systematic sampling with given inclusion probabilities (Madow 1949): exactly k picks, none twice."""

import operator

import torch
from torch import Generator, Tensor


def inclusion_probabilities(shares: Tensor, k: int) -> Tensor:
    """The probabilities pi_i = min(1, alpha s_i) that sum to k exactly: float64 [n], multiples of a power of two.

    shares [n] are > 0 and need not sum to 1. alpha is found by capping the largest shares at 1 and rescaling the rest
    until none exceeds 1. The result is rounded to units of 2^-b, b = min(48, 62 - bits of k), so that sums of it are
    exact in integers: systematic sampling with them returns exactly k picks, none twice. docs/math.md (9).

    >>> inclusion_probabilities(torch.tensor([8.0, 1.0, 1.0]), 2)
    tensor([1.0000, 0.5000, 0.5000], dtype=torch.float64)
    """
    units, one = _units(shares, k)
    return units.double() / one


def _units(shares: Tensor, k: int) -> tuple[Tensor, int]:
    """Inclusion probabilities as integers, units[i] / one, which sum to k * one exactly and lie in [1, one]."""
    name = "inclusion_probabilities"
    if shares.dim() != 1:
        raise ValueError(f"{name}: shares must be [n], got shape {list(shares.shape)}")
    shares = shares.detach().to("cpu", torch.float64)
    k = check_k(name, k, len(shares))
    broken = shares[~(shares.isfinite() & (shares > 0))]
    if len(broken):
        raise ValueError(f"{name}: shares must be finite and > 0, got {float(broken[0])}")
    one = 2 ** min(48, 62 - k.bit_length())
    if k == len(shares):
        return torch.full((k,), one), one
    largest_first = shares.sort(descending=True).values
    remaining = tails(largest_first)
    capped = int(((k - torch.arange(k)) * largest_first[:k] > remaining[:k]).long().cumprod(0).sum())
    units = (shares * ((k - capped) / float(remaining[capped]) * one)).clamp(1, one).floor().long()
    while (missing := k * one - int(units.sum())) != 0:  # what rounding left, in equal parts to those with room
        room = one - units if missing > 0 else units - 1
        movable = room.nonzero().flatten()[: abs(missing)]
        step = room[movable].clamp(max=abs(missing) // len(movable))
        units[movable] += step if missing > 0 else -step
    return units, one


def systematic_picks(shares: Tensor, classes: Tensor, k: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """Picks int64 [k], ascending, and their inclusion probabilities float64 [k].

    Lays the inclusion probabilities end to end, class after class (in random order within a class), and picks what lies
    under u, u + 1, u + 2, ... with one uniform u from `generator`. classes [n] are integers.
    """
    units, one = _units(shares, k)
    order = classes_in_turn(classes, generator)
    start = int(torch.randint(one, (), generator=generator))
    marks = start + one * torch.arange(k)
    indices = order[torch.searchsorted(units[order].cumsum(0), marks, right=True)].sort().values
    return indices, units[indices].double() / one


def classes_in_turn(classes: Tensor, generator: Generator | None) -> Tensor:
    """All examples [n], class after class, in random order within a class."""
    order = torch.randperm(len(classes), generator=generator)
    return order[classes[order].argsort(stable=True)]


def tails(values: Tensor) -> Tensor:
    """Sums of values[m:], smallest first, for every m [n]. A cumulative sum has one order, however many threads run."""
    return values.flip(0).cumsum(0).flip(0)


def check_k(name: str, k: int, n: int) -> int:
    if isinstance(k, bool) or not hasattr(k, "__index__"):
        raise TypeError(f"{name}: k must be an integer, got {type(k).__name__}")
    if n < 1:
        raise ValueError(f"{name}: n must be >= 1, got n={n}")
    if not 1 <= k <= n:
        raise ValueError(f"{name}: k must be in [1, n={n}], got k={k}")
    return operator.index(k)
