"""Coverage: which blocks of a model take part, and with which estimators, as its first examples decide it.

What was covered without a look at data is not always what can be: see `fastif.model.check`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fastif.curvature.network import NetworkCurvature
from fastif.curvature.protocol import Estimator, JointCurvature, check_estimator
from fastif.data.batches import batch_length, moved_to, rows_of
from fastif.data.dealing import first_batch
from fastif.influence.fitted import Setup
from fastif.model.capture import Capture
from fastif.model.features import called_head
from fastif.model.passes import choose_rows
from fastif.renamed import warn_outside
from fastif.sharded import WAY_TO_WHOLE


def assign(capture: Capture, curvature: Estimator | Mapping[str, Estimator], memory: int) -> NetworkCurvature:
    """An estimator for every block, by the first pattern that matches it; blocks that none matches are left out."""
    rules = dict(curvature) if isinstance(curvature, Mapping) else {"*": curvature}
    for estimator in rules.values():
        check_estimator("Influence: curvature must be an estimator or a mapping to them", estimator)
    members: dict[str, list[str]] = {pattern: [] for pattern in rules}
    for name, block in list(capture.blocks.items()):
        known = (name, name.rpartition(".")[0]) if block.loose else (name,)  # a loose parameter by its module too
        pattern = next((pattern for pattern in rules if any(fnmatchcase(one, pattern) for one in known)), None)
        if pattern is None:
            capture.leave_out(block, "no pattern of curvature= matches its layer")
        else:
            members[pattern].append(name)
    parts: dict[tuple[str, ...], JointCurvature] = {}
    for pattern, names in members.items():
        parts.update(rules[pattern].assign({name: capture.blocks[name].shape for name in names}, memory))
    if not parts:
        raise ValueError(f"Influence: no pattern of curvature= matches a layer, got {', '.join(rules)}")
    made = NetworkCurvature(parts)
    if capture.sharding is not None and made.needs_whole:
        raise ValueError(
            f"Influence: {', '.join(sorted(made.needs_whole))} differentiates by parameters, of which each rank holds "
            "a part (fully_shard): take an estimator that is made of gradients, such as EKFAC, KFAC, Diagonal, DataInf "
            f"or ExactBlock with matrix='ggn', or a whole model: {WAY_TO_WHOLE}"
        )
    return made


def cover_head(setup: Setup, train: Any, indices: Tensor) -> Setup:
    """Where the head is covered by default: the layer that a first batch shows to be the head."""
    if not setup.of_head or setup.capture.checked:
        return setup
    with setup.passes.running(None):
        x = _first_batch(setup, train, indices)[0]
        name = called_head(setup.model, rows_of(x, torch.arange(min(2, batch_length(x)))))
    if name is None or (name or "model") in setup.capture.blocks:
        return setup
    setup.passes.capture = Capture(setup.model, name or "*", setup.passes.sharding)
    return setup._replace(estimators=assign(setup.capture, setup.given, setup.memory))


def look_at(setup: Setup, train: Any, indices: Tensor) -> Setup:
    """Has the first of the examples `indices` decide what is covered and how it is read; the model is running."""
    x, y = _first_batch(setup, train, indices)
    if not setup.passes.needs_check(x):
        return setup
    setup.capture.batch = 0
    setup.passes.check(x, y)
    return setup._replace(estimators=assign(setup.capture, setup.given, setup.memory))


def look_together(setup: Setup, *given: Any) -> None:
    """Where ranks hold parts of the model: has all of them look at the same first examples, before each passes those of
    its own, if nothing was looked at since the curvature was fitted (or loaded)."""
    for data in given:
        seen = setup.passes.sharding is None or setup.capture.checked > 1
        if not seen and not isinstance(data, Iterator):
            with setup.passes.running(setup.states[0]):
                look_at(setup, data, torch.arange(data.n))


def restore_coverage(setup: Setup, described: Tensor) -> Setup:
    """The blocks of a state that was fitted elsewhere, as `Setup.describe_blocks` has them."""
    text = bytes(described.tolist()).decode()
    names = [block.rpartition(" [")[0] for block in text.split("; ")]
    if setup.of_head and set(names) <= dict(setup.model.named_modules()).keys():
        setup.passes.capture = Capture(setup.model, names, setup.passes.sharding)
    setup.capture.restore(names)
    return setup._replace(estimators=assign(setup.capture, setup.given, setup.memory))


def check_default_head(model: nn.Module, head: str) -> None:
    """Raises ValueError where the head, which alone is covered where nothing was said, is not what was trained."""
    modules = dict(model.named_modules())
    if head not in modules or not any(p.requires_grad for p in model.parameters()):
        return
    own = {*modules[head].parameters(recurse=False)}
    tied = [name for name, module in modules.items() if name != head and own & {*module.parameters(recurse=False)}]
    why = f"shares its weight with {tied[0]!r}" if tied else "is not trained"
    if tied or not any(p.requires_grad for p in own):
        raise ValueError(
            f"Influence: without curvature= the head alone is covered, and the head {head!r} {why}: say one for what "
            "is trained, such as curvature=fastif.EKFAC('auto')"
        )


def warn_of_lost(capture: Capture) -> bool:
    """Warns where parameters that were trained are not covered though nobody left them out; whether it did."""
    if not capture.lost:
        return False
    names = {name: parameter for parameter, name in capture.names.items()}
    trained = sum(parameter.numel() for parameter in capture.selection.trained)
    left = sum(names[name].numel() for name in capture.lost)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in capture.lost.items())
    warn_outside(
        f"Influence: {trained - left:,} of {trained:,} trained parameters are covered ({1 - left / trained:.1%}); "
        f"the rest is taken as fixed: {reasons}. Leave them out with layers= to say that this is meant",
        UserWarning,
    )
    return True


def _first_batch(setup: Setup, train: Any, indices: Tensor) -> tuple[Any, Any]:
    x, y = first_batch(train, setup.passes.batch_size, indices, choose_rows)
    return moved_to(x, setup.device), moved_to(y, setup.device)
