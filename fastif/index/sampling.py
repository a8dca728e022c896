"""What a sample of the training examples says before the walk through all of them: where to cut off, what is lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from fastif.correlation import pearson, spearman
from fastif.data.batches import Walked
from fastif.data.dealing import Part, deal_picked
from fastif.index.encoder import Encoder, Sizes
from fastif.influence.scoring import compute_scores
from fastif.ranks import Ranks

_FIRST, _FEW, _MOST = 256, 512, 2048  # examples of a sample
_CERTAIN = 0.02  # standard error of the share that is kept, relative, with which a sample suffices
_QUERIES, _EXAMPLES = 32, 256  # whose scores are computed both ways


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


def find_cut(encoder: Encoder, train: Walked, share: float, seed: int, threshold: float | None = None) -> Cut:
    """The one threshold on σ² per number at which `share` of the gradients' numbers is kept, on a sample that grows
    until its standard error is small; or what a threshold that is given keeps of such a sample.

    Of several ranks each looks at some batches of the sample, and all see what it found. Raises ValueError for a share
    with which no factor at all would be kept.
    """
    order, most = draw(train.n, seed), min(train.n, max(_FEW, min(_MOST, train.n // 4)))
    seen: dict[str, list[Sizes]] = {}
    begin, end = 0, min(_FIRST, most)
    while True:
        for name, sizes in _look_at(encoder, train, order[begin:end]):
            seen.setdefault(name, []).append(sizes)
        cut, kept = _cut(seen, share, encoder.dtype.itemsize, threshold)
        left = (1 - len(kept) / train.n) / len(kept)  # of a sample without replacement
        uncertain = float(kept.std(correction=0)) / max(float(kept.mean()), 1e-30) * left**0.5
        if end == most or cut.threshold == 0 or uncertain <= _CERTAIN:
            return cut
        begin, end = end, min(2 * end, most)


def _look_at(encoder: Encoder, train: Walked, examples: Tensor) -> Iterator[tuple[str, Sizes]]:
    passes, ranks = encoder.fitted.passes, encoder.fitted.setup.ranks
    part, own = own_part_of(train, examples, ranks), list[dict[str, Sizes]]()
    if part is not None:
        with passes.running(encoder.fitted.setup.states[0]):
            for _, _, gradients in passes.gradients(part, "index, a sample"):
                own.append(encoder.look_at(gradients))
                del gradients
    for found in _of_all_ranks(own, ranks):
        yield from found.items()


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


def part_of(train: Walked, examples: Tensor) -> Part:
    """Some examples, in the order of the data."""
    return Part(train, train.batch_size, [range(i, i + 1) for i in examples.sort().values.tolist()])


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
                f"index: share={share:g} keeps no factor of {n} examples, whose gradients have {numbers:,} numbers "
                f"each; one of {least:,} for each of them would be share={least / numbers:.2g}"
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


def measure(encoder: Encoder, train: Walked, seed: int) -> Measured | None:
    """Scores both ways, between examples that are drawn at random; None where there are fewer than eight."""
    if train.n < 8:
        return None
    chosen = draw(train.n, seed + 1)
    q = min(_QUERIES, train.n // 4)
    query, ranks = part_of(train, chosen[:q]), encoder.fitted.setup.ranks
    examples = own_part_of(train, chosen[q : q + _EXAMPLES], ranks)
    own = None if examples is None else _score_both_ways(encoder, query, q, examples).to(ranks.device)
    exact, approximate = ranks.join("scores both ways", own, ranks.device, dim=2).cpu()
    return compare(exact, approximate)


def _score_both_ways(encoder: Encoder, query: Part, q: int, examples: Part) -> Tensor:
    """Exact scores and those from what is kept, [2, q, n]."""
    fitted = encoder.fitted.alone
    fitted = fitted._replace(setup=fitted.setup._replace(measurement="loss"))
    exact = compute_scores(fitted, query, examples).values[""]
    approximate = torch.zeros_like(exact)
    own = Encoder(fitted, encoder.metrics, encoder.dtype, encoder.threshold)
    with closing(own.queries(query, q, None, fitted.memory)) as blocks:
        for first, held in blocks:
            rows = slice(first, first + len(next(iter(held.values()))))
            start = 0
            for _, n, gradients in fitted.passes.gradients(examples, "index, its error"):
                for name, factors in own.encode(gradients).factors.items():
                    approximate[rows, start : start + n] += factors.dots(held[name]).cpu()
                start += n
                del gradients
    return torch.stack([exact, approximate])


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
