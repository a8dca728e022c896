"""How blocks of an index are read and put to use: of several ranks each reads a run of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastif.index.encoder import Encoder
from fastif.index.factors import Factors
from fastif.index.folder import Folder, IndexBlock
from fastif.index.thin import Runs, singly, thinned
from fastif.influence.shared_folder import share_of_all
from fastif.ranks import Ranks


class Top(NamedTuple):
    """The best training examples of each query."""

    values: Tensor  # [q, k], scores
    indices: Tensor  # int64 [q, k], numbers of examples
    ids: list[list[str]] | list[list[int]] | None  # by query, where the index has ids


def own_blocks(folder: Folder, ranks: Ranks) -> Iterator[IndexBlock]:
    """The blocks that this rank reads."""
    return (folder.read_block(run) for run in share_of_all(folder.runs, ranks))


def own_columns(folder: Folder, ranks: Ranks) -> tuple[int, int]:
    """The first column of scores that comes from this rank's blocks, and how many do."""
    runs, examples = share_of_all(folder.runs, ranks), folder.examples
    begin, end = (int((examples < border).sum()) for border in ((runs[0].start, runs[-1].stop) if runs else (0, 0)))
    return begin, end - begin


def join_numbers(parts: list[Tensor], ranks: Ranks) -> Tensor:
    """Numbers of the examples of this rank's blocks, as those of all, [n]."""
    own = torch.cat(parts).to(ranks.device) if parts else None
    return ranks.join("what blocks hold", own, ranks.device).cpu()


class Asked(NamedTuple):
    """Weighed queries of one block of parameters."""

    queries: Tensor  # [q, g, o, d]
    runs: Runs | None  # the same for int8 factors, thin where that is less work


def asked(encoder: Encoder, folder: Folder, held: Mapping[str, Tensor], n: int, first: int = 0) -> dict[str, Asked]:
    """Queries from number `first` on, made ready to be asked of n examples of an index.

    Raises ValueError where their type does not hold one.
    """
    found: dict[str, Asked] = {}
    for name, (g, _, _), table in folder.manifest["layers"]:
        queries = held[name]
        _check_finite(queries, queries, name, first)
        # On a GPU, the op forms thin queries whole again.
        thin = encoder.dtype == torch.int8 and g == 1 and not table and queries.device.type == "cpu"
        found[name] = Asked(queries, thinned(queries[:, 0], n) if thin else None)
    return found


def products(factors: Mapping[str, Factors], held: Mapping[str, Asked], first: int = 0) -> dict[str, Tensor]:
    """Scores by block, [q, n], on the CPU. Raises ValueError where the queries' type does not hold one."""
    found: dict[str, Tensor] = {}
    for name, part in factors.items():
        try:
            found[name] = part.dots(*held[name]).cpu()
        except ValueError as error:
            number = _first_refused(part, held[name])
            if number is None:
                raise
            raise _too_large(first + number, name, held[name].queries) from error
        _check_finite(found[name], held[name].queries, name, first)
    return found


def _check_finite(values: Tensor, queries: Tensor, block: str, first: int) -> None:
    """Raises ValueError for numbers [q, ...] of queries, or of their scores, that their type does not hold."""
    if not bool(values.sum().isfinite()) and not bool(values.isfinite().all()):
        row = int((~values.isfinite()).flatten(1).any(1).nonzero()[0, 0])
        raise _too_large(first + row, block, queries)


def _first_refused(factors: Factors, held: Asked) -> int | None:
    """The first query whose products the op refuses by themselves, thin or whole as they were: it does not say which
    overflow. None: it is no single one's fault."""
    for number, one in enumerate(_one_by_one(held)):
        try:
            factors.dots(*one)
        except ValueError:
            return number
    return None


def _one_by_one(held: Asked) -> Iterator[Asked]:
    runs = None if held.runs is None else [one for part in held.runs for one in singly(part)]
    for number, query in enumerate(held.queries.split(1)):
        yield Asked(query, None if runs is None else [runs[number]])


def _too_large(query: int, block: str, queries: Tensor) -> ValueError:
    return ValueError(
        f"index: scores of query {query} are not finite in block {block!r}: its gradient there is too "
        f"large for {str(queries.dtype).removeprefix('torch.')}"
    )


def sum_of(parts: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([*parts.values()]).sum(0)
