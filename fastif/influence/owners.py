"""Which rank keeps which part of a fitted curvature, and how gradients travel to it.

A part with an owner (`Estimator.has_owner`: Kronecker factors, exact blocks) is kept by that rank alone. What is to be
solved for goes to the owner, and what it solved to all; the factors stay. Parts without an owner stand on every rank.
`fastif.influence.states` has what brings factors to one place where that is needed. docs/scale.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastif.curvature.directions import Directions, Explicit, LowRank
from fastif.curvature.network import NetworkCurvature
from fastif.curvature.protocol import BlockWork, Cost, FitData, FitWork, JointCurvature, Shape
from fastif.influence.fitted import Setup
from fastif.model.gradients import Gradients
from fastif.model.sliced_gradients import factors_of, gradients_of, smallest
from fastif.ranks import BUCKET, Ranks, divide

Names = tuple[str, ...]  # of the blocks of a part


# ---------------------------------------------------------------------------------------------------- what is elsewhere


class Reported:
    """In the place of an estimator that another rank keeps: what it reports; all else raises ValueError that says where
    it is and how to have it here."""

    def __init__(self, where: str, reports: Mapping[str, Any]):
        self._where, self._reports = where, dict(reports)

    def __repr__(self) -> str:
        return f"<{self._where}>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._reports:
            raise ValueError(
                f"{name}: {self._where}: call Influence.gather() on all ranks, or fit with Influence(replicate=True), "
                "to have it on each of them"
            )
        return self._reports[name]


class Elsewhere(JointCurvature):
    """In the place of a part that another rank keeps."""

    def __init__(self, part: JointCurvature, names: Names, owner: int, reports: Mapping[str, Any]):
        kind = type(part.given).__name__
        self._reported = Reported(f"the {kind} of {', '.join(map(repr, names))} is kept by rank {owner}", reports)
        self.fisher = part.fisher

    @property
    def given(self) -> Any:
        return self._reported

    def begin(self, shapes: Mapping[str, Shape], data: FitData | None) -> None:
        self._reported.begin(shapes, data)

    def solve(self, rhs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._reported.solve(rhs)

    def sq_norms(self, gradients: Mapping[str, Gradients]) -> Tensor:
        return self._reported.sq_norms(gradients)

    def state_dict(self) -> dict[str, Tensor]:
        return self._reported.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._reported.load_state_dict(state)

    def cost(self, blocks: Mapping[str, BlockWork], fit: FitWork) -> Cost:
        return self._reported.cost(blocks, fit)


# ---------------------------------------------------------------------------------------------------------------- fits


def end_pass(curvature: NetworkCurvature, pass_index: int, setup: Setup) -> None:
    """Ends a pass of estimators.

    What a part with an owner has added up travels there, some parts at a time, and is let go of elsewhere before the
    owner makes anything of it. The others are lent what the next pass needs of what the owner made; after its last pass
    the part is the owner's alone, unless all are to keep it. Everything else travels to all.
    """
    ranks, owners = setup.ranks, curvature.owners
    looked = curvature.open(pass_index).parts
    if ranks.world == 1:
        for part in looked.values() if pass_index else curvature.parts.values():
            part.end(pass_index)  # those that look at nothing end with pass 0 too
        return
    turns = _deal_sums(looked, pass_index, owners, ranks)
    for together in turns:
        sums = {(names, key): value for names in together for key, value in looked[names].sums(pass_index).items()}
        what = f"the sums of pass {pass_index + 1}"
        summed = ranks.sum_each(what, sums, lambda name: owners.get(name[0]), setup.device)
        del sums
        for names in together:
            if owners.get(names, ranks.rank) == ranks.rank:
                looked[names].take_sums(pass_index, _of(names, summed))
            else:
                looked[names].let_go(pass_index)
        del summed
    kept = {(names, key): value for names, part in looked.items() for key, value in part.kept(pass_index).items()}
    of_ranks = ranks.gather(f"what pass {pass_index + 1} kept", kept, setup.device)
    del kept
    for names, part in looked.items():
        part.take_kept(pass_index, [_of(names, theirs) for theirs in of_ranks])
    del of_ranks
    for names, part in curvature.parts.items():
        own = owners.get(names, ranks.rank) == ranks.rank
        if own and (names in looked or (names not in owners and pass_index == 0)):
            part.end(pass_index)
    for together in turns:
        wanted = [n for n in together if n in owners and (setup.replicate or looked[n].passes > pass_index + 1)]
        if wanted:
            _lend(looked, wanted, pass_index, owners, setup)
    done = [names for names in owners if names in looked and looked[names].passes == pass_index + 1]
    if setup.replicate:
        for names in done:
            del owners[names]
        return
    own = {names: looked[names].given.reports() for names in done if owners[names] == ranks.rank}
    told = ranks.meet("what owners report", own)
    leave_to_owners(curvature, ranks, {names: reports for theirs in told for names, reports in theirs.items()})


def _deal_sums(
    looked: Mapping[Names, JointCurvature], pass_index: int, owners: dict[Names, int], ranks: Ranks
) -> list[list[Names]]:
    """Parts whose sums travel together, the same on all ranks; after the first pass, owners are found for them."""
    sizes, endings = dict[Names, int](), dict[Names, float]()
    for names, part in looked.items():
        sizes[names] = sum(value.nbytes for value in part.sums(pass_index).values())
        endings[names] = part.ending(0) if part.has_owner and pass_index == 0 else 0.0
    told = ranks.meet("what a pass has added up", ([*sizes.values()], [*endings.values()]))
    sizes = dict(zip(looked, map(max, *(size for size, _ in told)), strict=True))  # 0 of a rank without examples
    if pass_index == 0:
        owners.update(divide(dict(zip(looked, map(max, *(cost for _, cost in told)), strict=True)), ranks.world))
    turns, room = list[list[Names]](), 0
    for names, size in sizes.items():
        if not turns or size > room:
            turns.append([])
            room = BUCKET
        turns[-1].append(names)
        room -= size
    return turns


def _lend(
    looked: Mapping[Names, JointCurvature],
    wanted: Sequence[Names],
    pass_index: int,
    owners: Mapping[Names, int],
    setup: Setup,
) -> None:
    """Gives all ranks what the owners of these parts have made."""
    ranks = setup.ranks
    own = [names for names in wanted if owners[names] == ranks.rank]
    made = {(names, key): value for names in own for key, value in looked[names].made(pass_index).items()}
    for rank, theirs in enumerate(ranks.gather(f"what was made of pass {pass_index + 1}", made, setup.device)):
        for names in {name for name, _ in theirs} if rank != ranks.rank else ():
            looked[names].take_made(pass_index, _of(names, theirs))


def leave_to_owners(curvature: NetworkCurvature, ranks: Ranks, reports: Mapping[Names, Mapping[str, Any]]) -> None:
    """Lets go of what other ranks keep, of the parts whose owners' reports are given."""
    for names, reported in reports.items():
        if curvature.owners[names] != ranks.rank:
            curvature.parts[names] = Elsewhere(curvature.parts[names], names, curvature.owners[names], reported)


# ------------------------------------------------------------------------------------------------------------- solving


def owner_of_block(curvature: NetworkCurvature) -> dict[str, int]:
    return {name: owner for names, owner in curvature.owners.items() for name in names}


def solve(curvature: NetworkCurvature, rhs: Mapping[str, Tensor], setup: Setup) -> dict[str, Tensor]:
    """(G + λI)⁻¹ rhs on all ranks; rhs of a block with an owner is needed there alone."""
    if not curvature.owners:
        return curvature.solve(rhs)
    ranks, found, own = setup.ranks, dict[str, Tensor](), dict[str, Tensor]()
    for names, part in curvature.parts.items():
        owner = curvature.owners.get(names, ranks.rank)
        if owner == ranks.rank:
            (own if names in curvature.owners else found).update(part.solve({name: rhs[name] for name in names}))
    for theirs in ranks.gather("what owners solved", own, setup.device):
        found.update(theirs)
    return {name: found[name] for names in curvature.parts for name in names}


class Rows(NamedTuple):
    """Some preconditioned gradients and where they stand among the queries."""

    first: int
    directions: dict[str, Directions]

    def __len__(self) -> int:
        return len(next(iter(self.directions.values())))

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.directions.values())


def precondition(
    curvature: NetworkCurvature,
    pieces: Sequence[Mapping[str, Gradients]],
    firsts: Sequence[Sequence[int]],
    low_rank: int | None,
    setup: Setup,
    divided: bool,
) -> list[Rows]:
    """(G + λI)⁻¹ g of gradients that all ranks bring, on all of them, piece by piece as one process would solve.

    Args:
        pieces: of this rank: gradients that are solved for together.
        firsts: by rank, the number of each piece's first query.
        low_rank: keep so many singular vectors alone.
        divided: each rank brings its own; else all bring the same, of which `firsts` has one rank's.
    """
    ranks, owners, owned = setup.ranks, curvature.owners, owner_of_block(curvature)
    found: dict[tuple[int, int], dict[str, Directions]] = {
        (rank, i): {} for rank, own in enumerate(firsts) for i in range(len(own))
    }
    for together in _by_owner(curvature, setup):
        here: dict[tuple[int, int], dict[str, dict[str, Tensor]]] = {place: {} for place in found}
        blocks = {name: setup.capture.blocks[name].shape for names in together for name in names}
        own = {
            (i, name, key): value
            for i, piece in enumerate(pieces)
            for names in together
            if divided or owners.get(names, ranks.rank) == ranks.rank
            for name in names
            for key, value in factors_of(smallest(piece[name], math.prod(blocks[name]))).items()
        }
        if divided:
            sent = [{key: g for key, g in own.items() if owned.get(key[1]) == rank} for rank in range(ranks.world)]
            received = ranks.exchange("the gradients of queries", sent, setup.device)
            del sent
            received[ranks.rank].update({key: value for key, value in own.items() if key[1] not in owned})
        else:
            received = [own]
        del own
        for rank, theirs in enumerate(received):
            for (i, name, key), value in theirs.items():
                here[rank, i].setdefault(name, {})[key] = value
        solved: dict[Any, Tensor] = {}
        for names in together:
            if owners.get(names, ranks.rank) != ranks.rank:
                continue
            for place, rows in here.items():
                if names[0] in rows:
                    gradients = {name: gradients_of(rows[name], blocks[name][1]) for name in names}
                    kept = _kept(curvature.parts[names].precondition(gradients), low_rank)
                    solved.update({(place, *key): value for key, value in kept.items()})
        del here, received
        alone = {} if divided else {key: value for key, value in solved.items() if key[1] not in owned}
        sent = {key: value for key, value in solved.items() if key not in alone}
        del solved
        parts: dict[tuple[Any, str], dict[str, Tensor]] = {}
        for theirs in (alone, *ranks.gather("preconditioned queries", sent, setup.device)):
            for (place, name, key), value in theirs.items():
                parts.setdefault((place, name), {})[key] = value
        for (place, name), tensors in parts.items():
            found[place][name] = _directions(tensors)
    order = [name for names in curvature.parts for name in names]
    return [
        Rows(firsts[rank][i], {name: directions[name] for name in order}) for (rank, i), directions in found.items()
    ]


def _kept(solved: Mapping[str, Tensor], low_rank: int | None) -> dict[tuple[str, str], Tensor]:
    """What travels of preconditioned gradients, by block and kind."""
    found: dict[tuple[str, str], Tensor] = {}
    for name, matrices in solved.items():
        if low_rank is None:
            found[name, "matrices"] = matrices
            continue
        near = LowRank.approximate(matrices, low_rank)
        error = torch.tensor([near.error], dtype=torch.float64, device=matrices.device)
        found.update({(name, "left"): near.left, (name, "right"): near.right, (name, "error"): error})
    return found


def _directions(kept: Mapping[str, Tensor]) -> Directions:
    if "matrices" in kept:
        return Explicit(kept["matrices"])
    return LowRank(kept["left"], kept["right"], float(kept["error"]))


def _by_owner(curvature: NetworkCurvature, setup: Setup) -> Iterator[list[Names]]:
    """Parts that travel together: of every owner about as many bytes, so that all of them are at work at once."""
    queues: dict[int | None, list[Names]] = {}
    for names in curvature.parts:
        queues.setdefault(curvature.owners.get(names), []).append(names)
    while any(queues.values()):
        together: list[Names] = []
        for queue in queues.values():
            nbytes = 0
            while queue and nbytes < BUCKET:
                nbytes += 8 * sum(setup.capture.blocks[name].size for name in queue[0])
                together.append(queue.pop(0))
        yield together


def _of(names: Names, named: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    return {key: value for (own, key), value in named.items() if own == names}
