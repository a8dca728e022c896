"""The states of fitted curvatures: kept, loaded, and brought to where the ranks that own their parts are not enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fastif.curvature.network import NetworkCurvature, prepare, start_of
from fastif.curvature.protocol import JointCurvature
from fastif.fingerprints import fingerprint
from fastif.influence.fitted import Fitted, Setup, checksums_of_state
from fastif.influence.origin import check_fit, checksums_of
from fastif.influence.owners import Names, leave_to_owners
from fastif.ranks import Ranks, divide


def states(
    curvature: NetworkCurvature, ranks: Ranks, device: torch.device, to: int | None = None
) -> Iterator[tuple[Names, dict[str, Tensor]]]:
    """The state of every part, one after another, as it comes from its owner: to all ranks, or to one of them; the
    others get nothing of parts that they do not keep. All ranks walk through it together."""
    for names, part in curvature.parts.items():
        owner = curvature.owners.get(names)
        if owner is None:
            yield names, part.state_dict()
            continue
        state = part.state_dict() if owner == ranks.rank else {}
        what = f"the curvature of {', '.join(names)}"
        if to is None:
            yield names, ranks.gather(what, state, device)[owner]
        else:
            sent = [state if rank == to else {} for rank in range(ranks.world)]
            yield names, ranks.exchange(what, sent, device)[owner]


def state_of(fitted: Fitted, to: int | None = None) -> dict[str, Tensor]:
    """`Fitted.state_dict` on all ranks, or on one of them; {} on the others."""
    ranks, found = fitted.setup.ranks, fitted.describe()
    for number, curvature in enumerate(fitted.curvatures):
        for names, state in states(curvature, ranks, fitted.setup.device, to):
            if to in (None, ranks.rank):
                found.update({start_of(f"{number}/", names) + key: value for key, value in state.items()})
    return found if to in (None, ranks.rank) else {}


def values_of_state(fitted: Fitted) -> Iterator[Tensor]:
    """The tensors of `state_of` in its order, of one part at a time; all ranks walk through them together."""
    yield from fitted.describe().values()
    for curvature in fitted.curvatures:
        for _, state in states(curvature, fitted.setup.ranks, fitted.setup.device):
            yield from state.values()


def gather(fitted: Fitted) -> Fitted:
    """The same with every part on every rank."""
    return fitted._replace(curvatures=tuple(_bring(curvature, fitted.setup) for curvature in fitted.curvatures))


def _bring(curvature: NetworkCurvature, setup: Setup) -> NetworkCurvature:
    if not curvature.owners:
        return curvature
    parts = curvature.parts | _copies(curvature, [*curvature.owners], setup)
    return NetworkCurvature({names: parts[names] for names in curvature.parts})


def _copies(curvature: NetworkCurvature, wanted: Sequence[Names], setup: Setup) -> dict[Names, JointCurvature]:
    """Parts with owners, here: what this rank keeps itself, and what the others send."""
    ranks, found = setup.ranks, dict[Names, JointCurvature]()
    chosen = NetworkCurvature(
        {names: curvature.parts[names] for names in wanted}, {names: curvature.owners[names] for names in wanted}
    )
    for names, state in states(chosen, ranks, setup.device):
        found[names] = curvature.parts[names]
        if curvature.owners[names] != ranks.rank:
            blocks = {name: setup.capture.blocks[name] for name in names}
            empty = NetworkCurvature({names: setup.estimators.parts[names]})
            found[names] = prepare(empty, blocks, None, setup.memory).parts[names]
            found[names].load_state_dict(state)
    return found


def in_turn(curvature: NetworkCurvature, setup: Setup) -> Iterator[NetworkCurvature]:
    """All parts here: of those with owners as many at a time as `memory` holds, or one; the rest with the first."""
    if not curvature.owners:
        yield curvature
        return
    own = {
        names: sum(value.nbytes for value in curvature.parts[names].state_dict().values())
        for names, owner in curvature.owners.items()
        if owner == setup.ranks.rank
    }
    sizes = {names: size for told in setup.ranks.meet("bytes of factors", own) for names, size in told.items()}
    turns, room = list[list[Names]](), 0
    for names in (names for names in curvature.parts if names in sizes):
        if not turns or sizes[names] > room:
            turns.append([])
            room = setup.memory
        turns[-1].append(names)
        room -= sizes[names]
    everywhere = {names: part for names, part in curvature.parts.items() if names not in curvature.owners}
    for wanted in turns:
        yield NetworkCurvature(everywhere | _copies(curvature, wanted, setup))
        everywhere = {}


def load_fitted(setup: Setup, state: Mapping[str, Tensor]) -> Fitted:
    """What `Fitted.state_dict` gave for the same setup. Raises ValueError for a state that does not fit.

    One without an entry "fit" is not asked which loss it was fitted with.
    """
    if "n" not in state or "blocks" not in state:
        raise ValueError("load_state_dict: the state is another model's: no n and blocks")
    if not setup.describes(state["blocks"]):
        theirs, ours = (bytes(blocks.tolist()).decode() for blocks in (state["blocks"], setup.describe_blocks()))
        raise ValueError(f"load_state_dict: the state is of other blocks: of {theirs}, not of {ours}")
    buffers = check_fit(state["fit"], setup.passes.loss, setup.estimators) if "fit" in state else None
    left = set(state) - {"n", "blocks", "fit", "weights"}
    curvatures: list[NetworkCurvature] = []
    for number in range(len(setup.states)):
        own = {key: state[key] for key in left if key.startswith(f"{number}/")}
        left -= own.keys()
        curvatures.append(prepare(setup.estimators, setup.capture.blocks, None, setup.memory))
        _load_parts(curvatures[-1], own, f"{number}/", setup)
    if left:
        raise ValueError(f"load_state_dict: the state is another model's: {min(left)}")
    weights = None
    if "weights" in state:
        names = list(checksums_of_state(setup))
        if len(names) != len(state["weights"]):
            raise ValueError(
                f"load_state_dict: the state is another model's, of {len(state['weights'])} tensors in the place of "
                f"{len(names)}"
            )
        weights = dict(zip(names, state["weights"].tolist(), strict=True))
    loaded = None
    if setup.ranks.world > 1:
        loaded = fingerprint([torch.tensor([*checksums_of(dict(sorted(state.items()))).values()])])
    fitted = Fitted(setup, tuple(curvatures), int(state["n"]), weights=weights, buffers=buffers, loaded=loaded)
    fitted.check_weights()
    return fitted


def _load_parts(curvature: NetworkCurvature, state: Mapping[str, Tensor], prefix: str, setup: Setup) -> None:
    """`NetworkCurvature.load_state_dict`; of several ranks each keeps what it owns, by the bytes that it takes."""
    ranks = setup.ranks
    if ranks.world > 1 and not setup.replicate:
        sizes = {
            names: float(sum(value.nbytes for key, value in state.items() if key.startswith(start_of(prefix, names))))
            for names, part in curvature.parts.items()
            if part.has_owner
        }
        curvature.owners.update(divide(sizes, ranks.world))
    left = tuple(start_of(prefix, names) for names, owner in curvature.owners.items() if owner != ranks.rank)
    curvature.load_state_dict(
        {key: value if key.startswith(left) else value.to(setup.device) for key, value in state.items()}, prefix
    )
    leave_to_owners(curvature, ranks, {names: curvature.parts[names].given.reports() for names in curvature.owners})
