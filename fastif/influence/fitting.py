"""Fitting: a network's curvature from the gradients of a weighted subset, pass by pass."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastif.curvature import Curvature, ExactBlock
from fastif.curvature.network import Alone, NetworkCurvature, Together
from fastif.curvature.protocol import FitData, JointCurvature, check_estimator
from fastif.data.batches import moved_to, picked
from fastif.model.capture import Capture, Forward
from fastif.model.losses import IGNORED, labels_in, labels_of, output_columns, per_sample
from fastif.model.passes import Passes, counted_from
from fastif.samplers.subset import Subset

Estimator = Curvature | JointCurvature


def assigned(capture: Capture, curvature: Estimator | Mapping[str, Estimator]) -> NetworkCurvature:
    """An estimator for every block: a copy of its own, or one for all that match its pattern.

    Blocks that no pattern matches are no longer covered.
    """
    rules = dict(curvature) if isinstance(curvature, Mapping) else {"*": curvature}
    for estimator in rules.values():
        check_estimator("Influence: curvature must be an estimator or a mapping to them", estimator)
    members: dict[str, list[str]] = {pattern: [] for pattern in rules}
    for name, block in list(capture.blocks.items()):
        pattern = next((pattern for pattern in rules if fnmatchcase(name, pattern)), None)
        if pattern is None:
            capture.leave_out(block, "no pattern of curvature= matches its layer")
        else:
            members[pattern].append(name)
    parts: dict[tuple[str, ...], JointCurvature] = {}
    for pattern, names in members.items():
        estimator = rules[pattern]
        if isinstance(estimator, JointCurvature):
            parts.update({tuple(names): estimator} if names else {})
        elif getattr(estimator, "joint", False):
            parts.update({tuple(names): Together(tuple(names), estimator)} if names else {})
        else:
            parts.update({(name,): Alone(name, estimator) for name in names})
    if not parts:
        raise ValueError(f"Influence: no pattern of curvature= matches a layer, got {', '.join(rules)}")
    return NetworkCurvature(parts)


def begun(
    assigned: NetworkCurvature, capture: Capture, data: FitData | None, memory: int = JointCurvature.memory
) -> NetworkCurvature:
    """A copy that has learned nothing yet; `memory` as for `Influence`."""
    curvature = NetworkCurvature({names: copy.deepcopy(part) for names, part in assigned.parts.items()})
    for part in curvature.parts.values():
        part.memory = memory
    curvature.begin({name: block.shape for name, block in capture.blocks.items()}, data)
    return curvature


def fit(
    passes: Passes, assigned: NetworkCurvature, train: Any, subset: Subset, seed: int, memory: int
) -> NetworkCurvature:
    """The curvature of the examples of a subset, at the model's parameters as they are; it is running."""

    def batches(subset: Subset) -> Iterator[tuple[Any, Any, Tensor]]:
        for (x, y), places in picked(train, passes.batch_size, subset.indices):
            yield moved_to(x, passes.device), moved_to(y, passes.device), subset.weights[places].to(passes.device)

    data = FitData(
        passes.model, passes.loss, passes.capture.blocks, subset, batches, seed, passes.autocast, passes.progress
    )
    curvature = begun(assigned, passes.capture, data, memory)
    for turn in range(max(1, curvature.passes)):
        looking = curvature.open(turn)
        generator = torch.Generator().manual_seed(seed)
        total = -(-len(subset.indices) // passes.batch_size)
        with tqdm(batches(subset), f"fit, pass {turn + 1}", total, disable=not passes.progress) as bar:
            for number, (x, y, weights) in enumerate(bar):
                passes.capture.batch = number
                if not passes.capture.checked:
                    passes.check(x, y)
                for rows, part, labels in passes.slices(x, y):
                    with counted_from(rows.start):
                        observe(passes, looking, part, labels, weights[rows], turn, generator)
                if not looking.parts:
                    break  # nothing to learn: the first batch was looked at for what `Capture` refuses
        (looking if turn else curvature).end(turn)  # those that look at nothing end with pass 0 too
    return curvature


def observe(
    passes: Passes,
    curvature: NetworkCurvature,
    x: Any,
    y: Any,
    weights: Tensor,
    turn: int,
    generator: torch.Generator,
) -> None:
    """Shows examples to the estimators."""
    forward = passes.forward(x)
    batch = labels_in(x, y)
    losses = per_sample(passes.loss, forward.outputs, batch, forward.n)
    rest = dict(curvature.parts)
    for names, part in curvature.parts.items():
        estimator = part.estimator if isinstance(part, Alone | Together) else None
        if not isinstance(estimator, ExactBlock) or estimator.fisher != "exact":
            continue
        head = head_of(passes, forward, names, part)
        if head is not None:
            counted = labels_of(batch) != IGNORED
            estimator.update(*head, weights=weights * counted)
            del rest[names]
        elif estimator.matrix == "hessian":
            blocks = [passes.capture.blocks[name] for name in names]
            estimator.observe_loss((losses * weights.to(losses)).sum(), blocks)
            del rest[names]
    by_fisher: dict[str, dict[tuple[str, ...], JointCurvature]] = {"empirical": {}}
    for names, part in rest.items():
        by_fisher.setdefault(part.fisher, {})[names] = part
    empirical = NetworkCurvature(by_fisher.pop("empirical"))
    for fisher, parts in by_fisher.items():
        columns = output_columns(passes.loss, forward.outputs, batch, forward.n, fisher, generator)
        for column, (scores, s) in enumerate(columns):
            gradients = forward.gradients(scores, s, keep=True)
            NetworkCurvature(parts).observe(gradients, weights, column, turn)
            del gradients, scores, s  # before those of the next column come
    if empirical.parts:
        gradients = forward.gradients(losses)
        del forward, losses  # and the graph with them, before the estimators take their turn
        empirical.observe(gradients, weights, 0, turn)


def head_of(
    passes: Passes, forward: Forward, names: tuple[str, ...], part: JointCurvature
) -> tuple[Tensor, Tensor] | None:
    """Inputs and outputs of a layer whose outputs are the logits, which an ExactBlock is made of in closed form."""
    softmax = isinstance(part, Alone) and passes.loss == "cross_entropy"
    return forward.head(names[0]) if softmax else None
