"""What several ranks share of a fit: what each was given, and where drawn numbers begin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from fastif.curvature.called import as_called
from fastif.data.batches import Walked
from fastif.data.dealing import tell_data
from fastif.data.loaders import needs_all
from fastif.data.parts import Parts
from fastif.fingerprints import VERSIONS, fingerprint, tensors_in, told_function
from fastif.influence.fitted import Setup, checksums_of_state
from fastif.model.losses import Fisher, count_draws, skip_draws
from fastif.ranks import Ranks


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
            "loss": told_function(passes.loss),
            "measurement": told_function(setup.measurement),
            "curvature": {name: as_called(one) for name, one in setup.estimators.by_block.items()},
            "batch_size": passes.batch_size,
            "memory": setup.memory,
            "replicate": setup.replicate,
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
                f"{found[1]}, so that a rank cannot know where its own begin: pad the examples to one length, choose "
                "fisher='empirical', or fit on one process and load its state_dict() on all ranks"
            )
