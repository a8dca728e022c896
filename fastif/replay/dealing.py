"""Which rank replays what: whole networks as long as each rank gets one, and parts of those that remain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastif.ranks import Ranks, stretch


class Share(NamedTuple):
    """What one rank does of a network."""

    network: int
    parts: range  # queries, or segments of its training


def cut(lengths: Sequence[int], rank: int, world: int) -> list[Share]:
    """A rank's run of the parts of all networks, network after network; runs differ by one part in length at most.

    >>> cut([3, 3], 1, 3)
    [Share(network=0, parts=range(2, 3)), Share(network=1, parts=range(0, 1))]
    """
    line, begun, shares = stretch(sum(lengths), rank, world), 0, list[Share]()
    for network, length in enumerate(lengths):
        parts = range(max(line.start - begun, 0), min(line.stop - begun, length))
        if parts:
            shares.append(Share(network, parts))
        begun += length
    return shares


def deal(networks: int, queries: int, rank: int, world: int) -> list[Share]:
    """The queries that a rank carries back through each of its networks.

    Every network costs a rank its way there and back, whatever the number of queries, so that networks are dealt whole,
    as many to each rank; what remains is fewer than ranks, and is cut.

    >>> deal(3, 4, 1, 2)
    [Share(network=1, parts=range(0, 4)), Share(network=2, parts=range(2, 4))]
    """
    whole = networks // world * world
    rest = cut([queries] * (networks - whole), rank, world)
    return [
        *(Share(network, range(queries)) for network in range(rank, whole, world)),
        *(Share(whole + network, parts) for network, parts in rest),
    ]


def bring_together(
    ranks: Ranks, own: Mapping[int, tuple[int, Tensor]], networks: int, begin: int, stop: int
) -> list[Tensor]:
    """Every network's scores of queries [begin, stop), [stop − begin, n], from all ranks.

    Args:
        own: what this rank has, by network: the number of a query and the rows [r, n] from it on.
    """
    mine: dict[tuple[int, int], Tensor] = {}
    for network, (first, rows) in own.items():
        part = rows[max(0, begin - first) : max(0, stop - first)]
        if len(part):
            mine[network, max(begin, first)] = part.to(ranks.device)
    parts: list[dict[int, Tensor]] = [{} for _ in range(networks)]
    for theirs in ranks.gather("scores of networks", mine, ranks.device):
        for (network, first), rows in theirs.items():
            parts[network][first] = rows.cpu()
    return [of[begin] if len(of) == 1 else torch.cat([of[first] for first in sorted(of)]) for of in parts]
