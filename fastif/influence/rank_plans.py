"""The part of a plan that says what each of several ranks will do, hold and send. docs/scale.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fastif.curvature.protocol import Cost, Exchanged, Products
from fastif.data.batches import Walked
from fastif.data.dealing import deal
from fastif.measure import in_mib
from fastif.ranks import BUCKET, Ranks, divide, stretch


class RankPlan(NamedTuple):
    """What one rank does. Bytes are of tensors; what ranks tell one another beside them is a few KiB."""

    examples: int  # of the training data that it takes, in each pass
    passes: int  # of a fit, over them
    owns: tuple[str, ...]  # layers whose factors it makes, and keeps for all
    curvature_bytes: int  # held after fit: of what it owns, and of what has no owner; all with replicate=True
    fit_bytes: int | None  # peak of fit, exchanges included; None as for `Plan`
    fit_flops: float
    fit_sent: int  # bytes
    fit_received: int
    score_sent: int = 0  # of scores in memory: queries and what they come to; 0 without queries
    score_received: int = 0
    score_passes: int | None = None  # of scores over its training examples; None as for `Plan`
    self_passes: int = 1  # of self_influence over them, with the factors that `memory` holds at a time
    model_received: int = 0  # bytes of a sharded model that torch brings in a fit, beside `fit_received`

    def __str__(self) -> str:
        peak = in_mib(self.fit_bytes)
        owns = f"; owns {', '.join(self.owns)}" if self.owns else ""
        scores = f"; scores send {in_mib(self.score_sent)}" if self.score_sent or self.score_received else ""
        more = [(self.score_passes or 1, "scores"), (self.self_passes, "self-influence")]
        model = f", and {in_mib(self.model_received)} of the model" if self.model_received else ""
        again = "".join(f"; {number:,} passes of {what}" for number, what in more if number > 1)
        return (
            f"{self.examples:,} examples in {self.passes} passes, {self.fit_flops / 1e9:.1f} GFLOP, peak {peak}, "
            f"of which {in_mib(self.curvature_bytes)} stay, sends {in_mib(self.fit_sent)} and receives "
            f"{in_mib(self.fit_received)}{model}{scores}{again}{owns}"
        )


class PartWork(NamedTuple):
    """An estimator's part in a fit on ranks, and in solving for queries."""

    blocks: tuple[str, ...]
    cost: Cost
    products: Products
    exchanged: Exchanged
    vector: int  # bytes of a vector of its parameters
    gradient: int  # bytes of a query's gradient, as it travels to an owner
    solved: int  # bytes of it once it was solved for, as it travels from there and is kept
    product_bytes: int  # peak of a product with the curvature


class Asked(NamedTuple):
    """What a plan for ranks is asked about, beside its parts."""

    world: int
    passes: int  # of a fit
    states: int  # checkpoints or networks
    flops: float  # of the passes through the model and of products with the curvature, of all examples
    streamed: int | None  # peak bytes of the passes of a fit
    q: int  # queries
    item: int  # bytes of a score
    memory: int
    replicate: bool
    model: int = 0  # bytes of a sharded model that every rank receives in a fit


Parts = Mapping[tuple[str, ...], PartWork]


def plan_ranks(train: Walked, parts: Parts, asked: Asked) -> list[RankPlan]:
    """By rank."""
    world, states = asked.world, asked.states
    owners = divide({names: part.exchanged.ending for names, part in parts.items()}, world)
    total = sum((part.exchanged for part in parts.values()), start=Exchanged())
    multiplied = sum(int(part.products.fit) * part.products.together * part.vector for part in parts.values())
    everywhere = 2 * (world - 1) * (total.summed + multiplied) // world
    largest = max(max(part.exchanged.owned, part.exchanged.summed) for part in parts.values())
    buffers = 0
    if world > 1:  # what goes, what comes, the sum in float64 and rounded, and what torch has not let go of yet
        buffers = 6 * min(BUCKET, total.owned + total.summed) + (largest if largest > BUCKET else 0)
    learned = sum(part.cost.learned for part in parts.values())
    everything = sum(part.cost.held for part in parts.values())
    observing = sum(part.cost.operations - part.exchanged.ending for part in parts.values())
    travels = world > 1 and not asked.replicate and bool(owners)
    score_passes, self_passes = _passes(parts, asked) if travels else (None, 1)
    planned: list[RankPlan] = []
    for rank in range(world):
        examples = len(deal(train, Ranks.of(rank, world)))
        share = examples / train.n
        mine = [parts[names].exchanged for names, owner in owners.items() if owner == rank]
        owned, ending = sum(one.owned for one in mine), sum(one.ending for one in mine)
        sent_back = [one.lent + (one.made if asked.replicate else 0) for one in (*mine, total)]
        made, made_of_all = sum(sent_back[:-1]), sent_back[-1]
        kept = round(total.kept * share)
        here = [part for names, part in parts.items() if asked.replicate or owners.get(names, rank) == rank]
        held = sum(part.cost.held for part in here)
        making = max((part.cost.making + part.product_bytes for part in here), default=0)
        peak = None
        if asked.streamed is not None:
            exchanging = max(learned, everything if asked.passes > 1 else 0) + buffers
            peak = int(max(asked.streamed, exchanging, held + making)) + (states - 1) * held
        sent, received = (world - 1) * asked.q * examples, asked.q * (train.n - examples)
        queries = _queries(rank, owners, parts, asked) if travels else (0, 0)
        planned.append(
            RankPlan(
                examples,
                asked.passes,
                tuple(name for names, owner in owners.items() if owner == rank for name in names),
                states * held,
                peak,
                states * ((asked.flops + observing) * share + ending),
                states * (total.owned - owned + (world - 1) * (made + kept) + everywhere),
                states * ((world - 1) * owned + made_of_all - made + total.kept - kept + everywhere),
                sent * asked.item + states * queries[0],
                received * asked.item + states * queries[1],
                score_passes,
                self_passes,
                states * asked.model,
            )
        )
    return planned


def _queries(rank: int, owners: Mapping[tuple[str, ...], int], parts: Parts, asked: Asked) -> tuple[int, int]:
    """Bytes that a rank sends and receives of queries: gradients to owners, and to all what came of them."""
    divided = not any(part.products.solve for part in parts.values())
    mine = len(stretch(asked.q, rank, asked.world)) if divided else 0
    sent = received = 0
    for names, part in parts.items():
        owner = owners.get(names)
        if owner == rank:
            sent += (asked.world - 1) * asked.q * part.solved
            received += (asked.q - mine) * part.gradient if divided else 0
        elif owner is not None:
            sent += mine * part.gradient
            received += asked.q * part.solved
        elif divided:
            sent += (asked.world - 1) * mine * part.solved
            received += (asked.q - mine) * part.solved
    return sent, received


def _passes(parts: Parts, asked: Asked) -> tuple[int | None, int]:
    """Over the training data: of scores, None without queries or where products are made, and of self-influence."""
    each = sum(part.solved for part in parts.values())
    multiplies = any(part.products.solve for part in parts.values())
    held = max(asked.world, asked.memory // each)
    turns = room = 0
    for part in parts.values():
        if part.exchanged.ending and (not turns or part.exchanged.made + part.exchanged.lent > room):
            turns, room = turns + 1, asked.memory
        room -= part.exchanged.made + part.exchanged.lent
    states = asked.states
    return None if multiplies or not asked.q else states * -(-asked.q // held), states * max(1, turns)
