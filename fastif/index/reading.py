"""How blocks of an index are read and put to use: of several ranks each reads a run of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fastif.index.encoder import Encoder
from fastif.index.factors import GAIN, HALF, Factors, runs_of
from fastif.index.folder import Folder, IndexBlock
from fastif.index.metric import Metric
from fastif.index.thin import Runs, singly, thinned
from fastif.influence.shared_folder import share_of_all
from fastif.ranks import Ranks


class Top(NamedTuple):
    """The best training examples of each query."""

    values: Tensor  # [q, k], scores
    indices: Tensor  # int64 [q, k], numbers of examples
    ids: list[list[str]] | list[list[int]] | None  # by query, where the index has ids


def own_blocks(folder: Folder, ranks: Ranks) -> Iterator[IndexBlock]:
    """The blocks that this rank reads, but for those of which all examples were removed."""
    blocks = (folder.read_block(run) for run in share_of_all(folder.runs, ranks))
    return (block for block in blocks if len(block.examples))


def own_columns(folder: Folder, ranks: Ranks) -> tuple[int, int]:
    """The first column of scores that comes from this rank's blocks, and how many do."""
    runs, examples = share_of_all(folder.runs, ranks), folder.examples
    begin, end = (int((examples < border).sum()) for border in ((runs[0].start, runs[-1].stop) if runs else (0, 0)))
    return begin, end - begin


def join_numbers(parts: list[Tensor], ranks: Ranks) -> Tensor:
    """Numbers of the examples of this rank's blocks, as those of all, [n]."""
    own = torch.cat(parts).to(ranks.device) if parts else None
    return ranks.join("what blocks hold", own, ranks.device).cpu()


@dataclass(frozen=True)
class Asked:
    """Weighed queries of one block of parameters."""

    weighed: Tensor  # [q, g, o, d]
    metric: Metric
    runs: Runs | None = None  # as they meet int8 factors, thin where that is less work
    turns_factors: bool = False  # whether factors are turned to meet them

    @cached_property
    def queries(self) -> Tensor:
        """As they meet factors, [q, g, o, d]."""
        return self.metric.to_meet(self.weighed)

    def products(self, factors: Factors) -> Tensor:
        """[q, n]."""
        if self.turns_factors:
            queries = self.weighed.float() if self.weighed.dtype in HALF else self.weighed
            parts = (factors.rows(*run) for run in runs_of([factors]))
            return torch.cat([part.turned(self.metric.turn, queries).dots(queries) for part in parts], 1)
        found = None if self.runs is None else factors.dots_of_few(self.runs)
        return factors.dots(self.queries) if found is None else found

    def singly(self) -> Iterator[Asked]:
        """The same queries, each asked on its own."""
        runs = None if self.runs is None else [one for part in self.runs for one in singly(part)]
        for number, query in enumerate(self.weighed.split(1)):
            yield Asked(query, self.metric, None if runs is None else [runs[number]], self.turns_factors)


def asked(encoder: Encoder, folder: Folder, held: Mapping[str, Tensor], n: int, first: int = 0) -> dict[str, Asked]:
    """Queries from number `first` on, made ready to be asked of n examples of an index.

    Raises ValueError where their type does not hold one.
    """
    found: dict[str, Asked] = {}
    one = encoder.dtype.itemsize * sum(g * (o + d) for _, (g, o, d), _ in folder.manifest["layers"])
    factors = n * max(1.0, folder.manifest["parts"][0]["bytes"] / one)  # of a block, about
    for name, (g, _, _), table in folder.manifest["layers"]:
        weighed, metric = held[name], encoder.metrics[name]
        _check_finite(weighed, weighed, name, first)
        # On a GPU, the op forms thin queries whole again.
        integers = encoder.dtype == torch.int8 and g == 1 and not table and weighed.device.type == "cpu"
        runs = thinned(weighed[:, 0], n) if integers else None
        whole = len(weighed) if runs is None else sum(len(part) for part in runs if isinstance(part, Tensor))
        if metric.turns_factors(whole, factors, GAIN if integers else 1.0):
            found[name] = Asked(weighed, metric, turns_factors=True)
        elif runs is None:
            found[name] = Asked(weighed, metric)
        else:
            found[name] = Asked(weighed, metric, [metric.to_meet(part) for part in runs])
    return found


def products(factors: Mapping[str, Factors], held: Mapping[str, Asked], first: int = 0) -> dict[str, Tensor]:
    """Scores by block, [q, n], on the CPU. Raises ValueError where the queries' type does not hold one."""
    found: dict[str, Tensor] = {}
    for name, part in factors.items():
        try:
            found[name] = held[name].products(part).cpu()
        except ValueError as error:
            number = _first_refused(part, held[name])
            if number is None:
                raise
            raise _too_large(first + number, name, held[name].weighed) from error
        _check_finite(found[name], held[name].weighed, name, first)
    return found


def _check_finite(values: Tensor, queries: Tensor, block: str, first: int) -> None:
    """Raises ValueError for numbers [q, ...] of queries, or of their scores, that their type does not hold."""
    if not bool(values.sum().isfinite()) and not bool(values.isfinite().all()):
        row = int((~values.isfinite()).flatten(1).any(1).nonzero()[0, 0])
        raise _too_large(first + row, block, queries)


def _first_refused(factors: Factors, held: Asked) -> int | None:
    """The first query whose products the op refuses by themselves, thin or whole as they were: it does not say which
    overflow. None: it is no single one's fault."""
    for number, one in enumerate(held.singly()):
        try:
            one.products(factors)
        except ValueError:
            return number
    return None


def _too_large(query: int, block: str, queries: Tensor) -> ValueError:
    return ValueError(
        f"index: scores of query {query} are not finite in block {block!r}: its gradient there is too "
        f"large for {str(queries.dtype).removeprefix('torch.')}"
    )


def sum_of(parts: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([*parts.values()]).sum(0)
