"""What a sample of the training examples says of all of them: where to cut off, and what is lost by it.

One walk through the sample finds the cut and the exact scores of its examples; what the index makes of these scores is
read from its own blocks in the end. Of n training examples the sample has n/16 (64 at least, 256 at most), and where
these leave the share uncertain as many more as it needs, up to n/8 (256 at least, 2,048 at most) in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from fastif.correlation import pearson, spearman
from fastif.curvature.directions import Directions
from fastif.data.batches import Walked
from fastif.data.dealing import Part, deal_picked
from fastif.index.encoder import Encoder, Sizes, by_loss, part_of
from fastif.index.folder import Folder
from fastif.index.reading import asked, products, sum_of
from fastif.influence.fitted import Fitted
from fastif.influence.queries import query_blocks
from fastif.influence.shared_folder import share_of_all
from fastif.model.gradients import Gradients
from fastif.ranks import Ranks

_CERTAIN = 0.025  # standard error of the share that is kept, relative, with which a sample suffices: half of 5 %


class Cut(NamedTuple):
    """Where gradients are cut off."""

    threshold: float  # σ² per number of a factor
    share: float  # of the numbers, that is kept of the sample
    bytes: float  # per example, expected
    numbers: int  # of a gradient that may differ from zero
    tables: dict[str, bool]  # by block: whether rows of a table are kept


class Measured(NamedTuple):
    """Scores from an index beside exact ones, of a random sample of pairs of training examples."""

    queries: int
    examples: int
    r: float  # Pearson's correlation over all pairs
    rho: float  # Spearman's per query, mean
    top: float  # of the min(10, examples) best of a query, the share that is among the index's, mean

    def __str__(self) -> str:
        return (
            f"r {self.r:.4f}, rho {self.rho:.4f}, of the best ten {self.top:.2f} "
            f"({self.queries} queries x {self.examples} examples)"
        )


def draw(n: int, seed: int) -> Tensor:
    """All examples in an order of their own, int64 [n]: any number of its first is a sample."""
    return torch.randperm(n, generator=Generator().manual_seed(seed))


class Pairs(NamedTuple):
    """Training examples whose scores are known exactly: some as queries, others as what they are asked of."""

    queries: Tensor  # int64 [q], increasing
    examples: Tensor  # int64 [m], likewise


def draw_pairs(n: int, seed: int) -> Pairs | None:
    """Those of n examples, the first that `draw` gives and its last; None where there are fewer than eight."""
    if n < 8:
        return None
    order, q = draw(n, seed), min(32, n // 4, max(16, n // 128))
    return Pairs(order[n - q :].sort().values, order[: _first(n, q)].sort().values)


def _first(n: int, q: int) -> int:
    return min(n - q, max(64, min(256, n // 16)))


def look(
    encoder: Encoder, train: Walked, share: float, seed: int, threshold: float | None = None
) -> tuple[Cut, Tensor | None]:
    """The one threshold on σ² per number at which `share` of the gradients' numbers is kept, on a sample that grows
    until its standard error is small; or what a threshold that is given keeps of such a sample. And the exact scores of
    `draw_pairs`, [q, m].

    Of several ranks each looks at some batches of the sample, and all see what it found. Raises ValueError for a share
    with which no factor at all would be kept.
    """
    n, pairs = train.n, draw_pairs(train.n, seed)
    order, most = draw(n, seed), min(n, max(256, min(2048, n // 8)))
    begin, end = 0, n if pairs is None else len(pairs.examples)
    seen: dict[str, list[Sizes]] = {}
    exact: Tensor | None = None
    while True:
        found, scores = _look_at(encoder, train, order[begin:end], None if begin else pairs)
        exact = exact if begin else scores
        for sizes in found:
            for name, part in sizes.items():
                seen.setdefault(name, []).append(part)
        cut, kept = _cut(seen, share, encoder.dtype.itemsize, threshold)
        spread = float(kept.std(correction=0)) / max(float(kept.mean()), 1e-30)
        # A sample of m examples, without replacement, errs by spread √(1/m - 1/n).
        needed = 1 / ((_CERTAIN / spread) ** 2 + 1 / n) if spread > 0 else 0
        if end >= most or cut.threshold == 0 or end >= needed:
            return cut, exact
        begin, end = end, min(most, max(int(1.05 * needed) + 1, end + 16))


def _look_at(
    encoder: Encoder, train: Walked, examples: Tensor, pairs: Pairs | None
) -> tuple[list[dict[str, Sizes]], Tensor | None]:
    """Sizes by batch and block, and with pairs the exact scores of the examples, [q, m]."""
    fitted, ranks = by_loss(encoder.fitted), encoder.fitted.setup.ranks
    part, own = own_part_of(train, examples, ranks), list[dict[str, Sizes]]()
    rows: list[Tensor] = []
    if part is not None:
        with fitted.passes.running(fitted.setup.states[0]):
            for first, held in _held_queries(fitted, train, pairs):
                columns: list[Tensor] = []
                for _, _, gradients in fitted.passes.gradients(part, "index, a sample"):
                    if first == 0:
                        own.append(encoder.look_at(gradients))
                    if held:
                        columns.append(exact_scores(fitted, held, gradients))
                    del gradients
                rows += [torch.cat(columns, 1)] if held else []
    exact = None
    if pairs is not None:
        mine = torch.cat(rows).to(ranks.device) if rows else None
        exact = ranks.join("exact scores of a sample", mine, ranks.device, dim=1).cpu()
    return _of_all_ranks(own, ranks), exact


def _held_queries(
    fitted: Fitted, train: Walked, pairs: Pairs | None
) -> Iterator[tuple[int, Mapping[str, list[Directions]]]]:
    """The query side of the pairs, as many at a time as memory holds."""
    if pairs is None:
        yield 0, {}
        return
    query = part_of(train, pairs.queries)
    yield from query_blocks(fitted, query, len(pairs.queries), fitted.curvatures[0], None, None, False)


def exact_scores(fitted: Fitted, held: Mapping[str, list[Directions]], gradients: Mapping[str, Gradients]) -> Tensor:
    """Scores of queries that are held with a batch, [q, n], on the CPU."""
    parts = [torch.cat([part.dots(g) for part in held[name]]).div_(fitted.n) for name, g in gradients.items()]
    return torch.stack(parts).sum(0).cpu()


def _of_all_ranks(own: list[dict[str, Sizes]], ranks: Ranks) -> list[dict[str, Sizes]]:
    """Sizes by batch and block, those of the first rank's batches first."""
    if ranks.world == 1:
        return own
    told = ranks.meet("what a sample could keep", [{name: sizes[1:] for name, sizes in one.items()} for one in own])
    squares = {(i, name): sizes.squares.to(ranks.device) for i, one in enumerate(own) for name, sizes in one.items()}
    gathered = ranks.gather("the squares of a sample", squares, ranks.device)
    return [
        {name: Sizes(theirs[i, name].cpu(), *rest) for name, rest in one.items()}
        for theirs, batches in zip(gathered, told, strict=True)
        for i, one in enumerate(batches)
    ]


def own_part_of(train: Walked, examples: Tensor, ranks: Ranks) -> Part | None:
    """Those of some examples that this rank takes, whole batches of what one process would take; None: none."""
    ordered = examples.sort().values
    mine = ordered[deal_picked(train, ordered, ranks)]
    return part_of(train, mine) if len(mine) else None


def _cut(seen: Mapping[str, list[Sizes]], share: float, item: int, given: float | None) -> tuple[Cut, Tensor]:
    """The cut on a sample, and the numbers that it keeps of each example, [n]."""
    numbers = sum(max(part.numbers for part in parts) for parts in seen.values())
    tables = {name: parts[0].table for name, parts in seen.items()}
    n = sum(len(part.squares) for part in next(iter(seen.values())))
    values, costs = list[Tensor](), list[Tensor]()
    for parts in seen.values():
        each = torch.cat([part.squares[part.squares > _noise(part)].flatten() for part in parts])
        values.append(each / parts[0].each)
        costs.append(torch.full_like(each, parts[0].each, dtype=torch.int64))
    worth, cost = torch.cat(values).double(), torch.cat(costs)
    order = worth.argsort(descending=True)
    sums = cost[order].cumsum(0)
    budget = share * numbers * n
    threshold = 0.0 if given is None else given
    if given is None and share < 1 and len(sums) and float(sums[-1]) > budget:
        fits = int((sums <= budget).sum())
        if fits == 0:
            least = min(parts[0].each for parts in seen.values())
            raise ValueError(
                f"index: share={share:g} keeps no factor of a sample of {n} examples, whose gradients have "
                f"{numbers:,} numbers each; one of {least:,} for each of them would be share={least / numbers:.2g}"
            )
        # Between the last that is kept and the first that is not, so that rounding decides in no case.
        threshold = float((worth[order[fits - 1]] * worth[order[fits]]).sqrt())
    kept = torch.zeros(n, dtype=torch.float64)
    taken = torch.zeros(n, dtype=torch.float64)
    for parts in seen.values():
        first = 0
        for part in parts:
            count = ((part.squares > _noise(part)) & (part.squares / part.each > threshold)).sum(1)
            own = slice(first, first + len(count))
            kept[own] += count * part.each
            taken[own] += count * (part.each * item + (4 if item < 4 else 0) + (4 - item if part.table else 0)) + 4
            first += len(count)
    return Cut(threshold, float(kept.mean()) / numbers, float(taken.mean()), numbers, tables), kept


def _noise(part: Sizes) -> Tensor:
    """What is taken for 0, as `truncate` does where sums are float64: here they may be float32."""
    return part.squares.amax(1, keepdim=True) * 1e-12


def measure(encoder: Encoder, folder: Folder, train: Walked, exact: Tensor) -> Measured | None:
    """Exact scores of `draw_pairs` beside those that the finished index gives; of several ranks each reads its blocks.

    Examples that were taken out since are left out; None where that leaves fewer than two.
    """
    fitted, ranks = by_loss(encoder.fitted), encoder.fitted.setup.ranks
    pairs = draw_pairs(train.n, fitted.setup.seed)
    assert pairs is not None
    q, there = len(pairs.queries), torch.isin(pairs.examples, folder.examples)
    query, examples = part_of(train, pairs.queries), pairs.examples[there]
    if len(examples) < 2:
        return None
    mine = [run for run in share_of_all(folder.runs, ranks) if _any_of(examples, run)]
    rows: list[Tensor] = []
    if mine:
        own = Encoder(fitted, encoder.metrics, encoder.dtype)
        with closing(own.queries(query, q, None, fitted.memory // 2)) as blocks:
            for _, held in blocks:
                # Few examples: no query is made thin for them, which costs what it saves.
                queries, columns = asked(own, folder, held, len(examples)), list[Tensor]()
                for run in mine:
                    block = folder.read_block(run)
                    some = block.select(torch.isin(block.examples, examples).nonzero()[:, 0])
                    columns.append(sum_of(products(some.factors, queries)))
                rows.append(torch.cat(columns, 1))
    found = torch.cat(rows).to(ranks.device) if rows else None
    return compare(exact[:, there], ranks.join("scores of a sample", found, ranks.device, dim=1).cpu())


def _any_of(examples: Tensor, run: range) -> bool:
    return bool(((examples >= run.start) & (examples < run.stop)).any())


def compare(exact: Tensor, approximate: Tensor) -> Measured:
    """Of scores [q, n] both ways."""
    k = min(10, exact.shape[1])
    best, found = (scores.topk(k, 1).indices for scores in (exact, approximate))
    shared = (best[:, :, None] == found[:, None]).any(2).double().mean()
    return Measured(
        len(exact),
        exact.shape[1],
        float(pearson(exact.flatten(), approximate.flatten())),
        float(spearman(exact, approximate).mean()),
        float(shared),
    )
