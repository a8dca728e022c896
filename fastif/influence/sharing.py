"""What several ranks share of a fit: what each was given, what a pass has added up, and where drawn numbers begin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from fastif.curvature.called import as_called
from fastif.curvature.network import NetworkCurvature
from fastif.data.batches import Walked
from fastif.data.dealing import tell_data
from fastif.data.loaders import needs_all
from fastif.data.parts import Parts
from fastif.fingerprints import VERSIONS, fingerprint, tensors_in
from fastif.influence.fitted import Setup, checksums_of_state
from fastif.model.losses import Fisher, count_draws, skip_draws
from fastif.ranks import Ranks, divide


def compare_setups(setup: Setup, op: str, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError, on all ranks, where one of them has another model, data or arguments than the first.

    arguments: of the call; data as `Walked`, tensors anywhere in the others.
    """
    ranks, passes = setup.ranks, setup.passes
    if ranks.world == 1:
        return
    ranks.check_device(setup.device)
    told: dict[str, Any] = {f"version of {name}": version for name, version in VERSIONS.items()}
    told.update(
        {
            "kind of device": setup.device.type,
            "number of threads": torch.get_num_threads(),
            "loss": getattr(passes.loss, "__qualname__", passes.loss),
            "measurement": getattr(setup.measurement, "__qualname__", setup.measurement),
            "curvature": {name: as_called(one) for name, one in setup.estimators.by_block.items()},
            "batch_size": passes.batch_size,
            "memory": setup.memory,
            "autocast": str(passes.autocast),
            "seed": setup.seed,
            "layers": list(setup.capture.blocks),
            "model": fingerprint([torch.tensor([*checksums_of_state(setup).values()], dtype=torch.int64)]),
            "checkpoints": None if setup.checkpoints is None else fingerprint(tensors_in(setup.checkpoints)),
            "networks": None if setup.kept is None else fingerprint(setup.kept),
        }
    )
    for name, value in arguments.items():
        if isinstance(value, Parts) and name == "query":
            raise ValueError(needs_all(f"{op}: query="))
        if isinstance(value, Walked):
            told.update({f"{part} of {name}=": what for part, what in tell_data(value, ranks).items()})
        else:
            tensors = fingerprint(tensors_in(value))
            told[f"{name}="] = tensors if isinstance(value, Tensor | tuple | Mapping) else (repr(value), tensors)
    ranks.compare(op, told)


def end_pass(ended: NetworkCurvature, pass_index: int, ranks: Ranks, device: torch.device) -> None:
    """Ends a pass of estimators.

    What an estimator has added up travels to one rank where ending the pass is worth it, which sends the others what it
    made; those that take the most operations are dealt out first. Everything else travels to all ranks.
    """
    if ranks.world == 1:
        ended.end(pass_index)
        return
    looked = {names: part for names, part in ended.parts.items() if pass_index < part.passes}
    sums = {(names, key): value for names, part in looked.items() for key, value in part.sums(pass_index).items()}
    endings = ranks.meet("who ends what", [part.ending(pass_index) for part in looked.values()])
    owners = divide(dict(zip(looked, map(max, *endings), strict=True)), ranks.world)
    summed = ranks.sum_each(f"the sums of pass {pass_index + 1}", sums, lambda name: owners.get(name[0]), device)
    del sums
    kept = {(names, key): value for names, part in looked.items() for key, value in part.kept(pass_index).items()}
    of_ranks = ranks.gather(f"what pass {pass_index + 1} kept", kept, device)
    del kept
    for names, part in looked.items():
        if owners.get(names, ranks.rank) == ranks.rank:
            part.take_sums(pass_index, _of(names, summed))
        part.take_kept(pass_index, [_of(names, theirs) for theirs in of_ranks])
    del summed, of_ranks
    made: dict[Any, Tensor] = {}
    for names, owner in owners.items():
        if owner == ranks.rank:
            looked[names].end(pass_index)
            made.update({(names, key): value for key, value in looked[names].made(pass_index).items()})
    for rank, theirs in enumerate(ranks.gather(f"what was made of pass {pass_index + 1}", made, device)):
        for names, owner in owners.items():
            if owner == rank != ranks.rank:
                looked[names].take_made(pass_index, _of(names, theirs))
    for names, part in ended.parts.items():
        if names not in owners:
            part.end(pass_index)


def _of(names: tuple[str, ...], named: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    return {key: value for (own, key), value in named.items() if own == names}


class Draws:
    """Numbers drawn for the examples of a rank, as if those of the ranks before it had been drawn, too.

    A generator has one stream, of which every example takes as many numbers as its outputs ask for. Where that is not
    the same for all, no rank knows where its own begin.
    """

    def __init__(self, loss: Any, generator: Generator, before: int):
        self.loss, self.generator, self.before = loss, generator, before
        self.each: int | None = None  # numbers that an example takes

    def begin(self, outputs: Any, batch: Any, n: int, fisher: Fisher) -> None:
        """Before the numbers of a batch are drawn. Raises ValueError where its examples take other numbers."""
        each = count_draws(self.loss, outputs, batch, n) if fisher == "monte_carlo" else 0
        if self.each is None:
            skip_draws(self.loss, self.before * each, self.generator)
        self._check({self.each, each})
        self.each = each

    def end(self, ranks: Ranks) -> None:
        self._check(set(ranks.meet("the numbers that were drawn", self.each)))

    def _check(self, counts: set[int | None]) -> None:
        found = sorted(counts - {None})  # pyright: ignore[reportArgumentType]
        if len(found) > 1:
            raise ValueError(
                f"fisher='monte_carlo' on several ranks: some examples take {found[0]} drawn numbers and others "
                f"{found[1]}, so that a rank cannot know where its own begin: pad the examples to one length"
            )
