"""The part of a plan that says what each of several ranks will do, hold and send. docs/scale.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fastif.curvature.protocol import Cost, Exchanged, Products
from fastif.data.batches import Walked
from fastif.data.dealing import deal
from fastif.ranks import BUCKET, Ranks, divide


class RankPlan(NamedTuple):
    """What one rank does. Bytes are of tensors; what ranks tell one another beside them is a few KiB."""

    examples: int  # of the training data that it takes, in each pass
    passes: int  # of a fit, over them
    owns: tuple[str, ...]  # layers whose eigenvectors it makes for all
    curvature_bytes: int  # held after fit: all of it, on every rank
    fit_bytes: int | None  # peak of fit, exchanges included; None as for `Plan`
    fit_flops: float
    fit_sent: int  # bytes
    fit_received: int
    score_sent: int = 0  # of scores in memory; 0 without queries
    score_received: int = 0

    def __str__(self) -> str:
        peak = "unknown" if self.fit_bytes is None else _mib(self.fit_bytes)
        owns = f"; eigenvectors of {', '.join(self.owns)}" if self.owns else ""
        scores = f"; scores send {_mib(self.score_sent)}" if self.score_sent or self.score_received else ""
        return (
            f"{self.examples:,} examples in {self.passes} passes, {self.fit_flops / 1e9:.1f} GFLOP, peak {peak}, sends "
            f"{_mib(self.fit_sent)} and receives {_mib(self.fit_received)}{scores}{owns}"
        )


class PartWork(NamedTuple):
    """An estimator's part in a fit on ranks."""

    blocks: tuple[str, ...]
    cost: Cost
    products: Products
    exchanged: Exchanged
    vector: int  # bytes of a vector of its parameters


def plan_ranks(
    world: int, train: Walked, parts: Mapping[tuple[str, ...], PartWork], passes: int, states: int, flops: float
) -> list[RankPlan]:
    """By rank; flops: of the passes through the model and of products with the curvature, of all examples."""
    owners = divide({names: part.exchanged.ending for names, part in parts.items()}, world)
    total = sum((part.exchanged for part in parts.values()), start=Exchanged())
    multiplied = sum(int(part.products.fit) * part.products.together * part.vector for part in parts.values())
    everywhere = 2 * (world - 1) * (total.summed + multiplied) // world
    largest = max(max(part.exchanged.owned, part.exchanged.summed) for part in parts.values())
    buffers = 3 * max(largest, min(BUCKET, total.owned + total.summed)) if world > 1 else 0
    held = states * sum(part.cost.held for part in parts.values())
    observing = sum(part.cost.operations - part.exchanged.ending for part in parts.values())
    planned: list[RankPlan] = []
    for rank in range(world):
        examples = len(deal(train, Ranks.of(rank, world)))
        share = examples / train.n
        mine = [parts[names].exchanged for names, owner in owners.items() if owner == rank]
        owned, made = sum(one.owned for one in mine), sum(one.made for one in mine)
        kept = round(total.kept * share)
        others = total.owned - owned
        ending = sum(one.ending for one in mine)
        sent = others + (world - 1) * (made + kept) + everywhere
        received = (world - 1) * owned + total.made - made + total.kept - kept + everywhere
        planned.append(
            RankPlan(
                examples,
                passes,
                tuple(name for names, owner in owners.items() if owner == rank for name in names),
                held,
                buffers,
                states * ((flops + observing) * share + ending),
                states * sent,
                states * received,
            )
        )
    return planned


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
