"""What ranks, and a process alone, are asked of indexes: module-level functions, which processes can be sent."""

from __future__ import annotations

import os
from typing import Any

import torch

from fastif import CG, EKFAC, Index, Influence, answer
from fastif.index import building
from tests.helpers.by_hand import problem
from tests.helpers.indexed import BATCH, language

State = dict[str, Any] | None


def parts_of(n: int = 60) -> Any:
    """A causal language model of 60 texts in batches of 8: its data, queries and loss."""
    model, train, query, loss = language()
    return model, tuple(x[:n] for x in train), query, loss


def asked(state: State, batch_size: int = BATCH) -> tuple[Influence, Any, Any]:
    model, train, query, loss = parts_of()
    curvature = EKFAC(1e-2, fisher="empirical")
    influence = Influence(model, loss, curvature, layers="*", batch_size=batch_size, progress=False)
    return (influence.fit(train) if state is None else influence.load_state_dict(state)), train, query


def index_state() -> dict[str, Any]:
    return asked(None)[0].state_dict()


def build(folder: str, state: State, end_after: int | None = None, **options: Any) -> int:
    """An index in blocks of a batch each, and then some examples more; the blocks that this rank wrote.

    The last rank ends, as if it were killed, after some of them.
    """
    influence, train, _ = asked(state)
    first, second = (tuple(x[rows] for x in train) for rows in (slice(0, 40), slice(40, None)))
    written = []

    def write(*given: Any) -> None:
        if end_after is not None and influence.ranks.rank == influence.ranks.world - 1 and len(written) == end_after:
            os._exit(9)
        written.append(given)
        write_block(*given)

    write_block, before = building._write, building.BLOCK_BYTES
    building._write, building.BLOCK_BYTES = write, 1
    try:
        index = Index.build(influence, first, folder, share=0.3, resume=True, **options)
        index.append(second, resume=True)
    finally:
        building._write, building.BLOCK_BYTES = write_block, before
    return len(written)


def ask(folder: str, state: State) -> dict[str, Any]:
    """All that an index answers, opened by an Influence that takes its state or has it."""
    influence, train, query = asked(state)
    index = Index(folder, influence)
    top, best = index.top(query, 4), index.top(query, 3, largest=False, rerank=9, train=train)
    groups = torch.tensor([0, 1, 0, 2, 2, 0, 1])
    return {
        "scores": index.scores(query),
        "layers": torch.stack([*index.scores(query, by="layer").values()]),
        "groups": index.scores(query, query_groups=groups),
        "top": top.values,
        "indices": top.indices,
        "reranked": best.values,
        "reranked indices": best.indices,
        "self": index.self_influence(),
    }


def append_anew(folder: str, state: State) -> int:
    """The examples that `build` appends, without resume=True: how many the index then has."""
    influence, train, _ = asked(state)
    before, building.BLOCK_BYTES = building.BLOCK_BYTES, 1
    try:
        return Index(folder, influence).append(tuple(x[40:] for x in train)).n
    finally:
        building.BLOCK_BYTES = before


def take_out(folder: str, state: State, examples: Any) -> int:
    return Index(folder, asked(state)[0]).remove(examples).n


def merged(folders: list[str], out: str, state: State) -> int:
    return Index.merge(folders, out, asked(state)[0]).n


def answered(folder: str | None, state: State, **options: Any) -> dict[str, Any]:
    influence, train, query = asked(state)
    influence.setup = influence.setup._replace(memory=options.pop("memory", influence.setup.memory))
    if state is not None:
        influence.load_state_dict(state)
    found = answer(influence, train, query, scores=True, top=4, self_influence=True, out=folder, **options)
    assert found.scores is not None
    assert found.top is not None
    assert found.self_influence is not None
    values, indices = found.top
    return {"scores": found.scores, "top": values, "indices": indices, "self": found.self_influence}


def answered_by_products() -> dict[str, Any]:
    """The same of a curvature that is multiplied with, by all ranks at once."""
    model, (x, y), _ = problem("mlp")
    influence = Influence(model, curvature=CG(0.3, tolerance=1e-10), layers="*", progress=False, batch_size=5)
    data, query = (x[:7], y[:7]), (x[:2], y[:2])
    found = answer(influence.fit((x, y)), data, query, scores=True, self_influence=True)
    assert found.scores is not None
    assert found.self_influence is not None
    return {"scores": found.scores, "self": found.self_influence}


def different(folder: str, state: State, given: dict[str, Any]) -> None:
    """An index of other things on every rank."""
    influence, train, _ = asked(state)
    n = given.pop("n", 60)
    Index.build(influence, tuple(x[:n] for x in train), folder, **{"share": 0.3, **given})
