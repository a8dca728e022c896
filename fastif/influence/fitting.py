"""Fitting: a network's curvature from the gradients of a weighted subset, pass by pass."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fastif.curvature.network import NetworkCurvature, prepare
from fastif.curvature.protocol import FitData, JointCurvature, SeenBatch
from fastif.data.batches import Walked, moved_to, picked, walked
from fastif.data.dealing import deal, deal_picked
from fastif.influence.coverage import cover_head, look_at
from fastif.influence.fitted import Fitted, Setup, checksums_of_buffers, checksums_of_state, restrict
from fastif.influence.owners import end_pass
from fastif.influence.sharing import Draws, compare_setups
from fastif.model.capture import LateLayer
from fastif.model.losses import IGNORED, Fisher, labels_in, labels_of, output_columns, per_sample, settle_fisher
from fastif.model.passes import Passes, counted_from
from fastif.progress import tqdm
from fastif.ranks import Ranks
from fastif.samplers.subset import Subset


def fit(setup: Setup, train: Any, subset: Subset | None) -> Fitted:
    """What the examples of a subset (default all, 1/n each) make of the estimators, at every checkpoint."""
    train = walked(train, setup.passes.batch_size)
    n = train.n
    if subset is None:
        subset = Subset(torch.arange(n), torch.full((n,), 1 / n, dtype=torch.float64))
    parts = [subset] * len(setup.states)
    if setup.kept is not None:
        for number, kept in enumerate(setup.kept):
            if int(kept.max()) >= n:
                raise ValueError(f"fit: network {number} was trained on example {int(kept.max())}, outside [0, n={n})")
        parts = [restrict(subset, kept, n) for kept in setup.kept]
    compare_setups(setup, "fit", {"train": train, "subset": (subset.indices, subset.weights)})
    setup = cover_head(setup, train, subset.indices)
    setup.capture.fixed = False
    curvatures: list[NetworkCurvature] = []
    while len(curvatures) < len(setup.states):
        try:
            part = parts[len(curvatures)]
            with setup.passes.running(setup.states[len(curvatures)]):
                setup = look_at(setup, train, part.indices)
                curvatures.append(_fit_here(setup, train, part))
        except LateLayer as late:  # such as an expert that the first examples were not sent to
            for one in setup.ranks.tell(late):
                if not isinstance(one, LateLayer):
                    raise one from None
                setup.capture.take_up(one.name)
            curvatures.clear()
    setup.capture.fixed = True
    weights, buffers = checksums_of_state(setup), checksums_of_buffers(setup)
    return Fitted(setup, tuple(curvatures), n, subset, train, weights, buffers)


def _fit_here(setup: Setup, train: Any, subset: Subset) -> NetworkCurvature:
    """The curvature at the model's parameters as they are; it is running."""
    passes, seed, ranks = setup.passes, setup.seed, setup.ranks

    def batches(subset: Subset) -> Iterator[tuple[Any, Any, Tensor]]:
        indices, weights = subset.indices, subset.weights
        if ranks.world > 1:
            mine = deal_picked(train, indices, ranks)
            if not len(mine):
                return
            indices, weights = indices[mine], weights[mine]
        for (x, y), places in picked(train, passes.batch_size, indices):
            yield moved_to(x, passes.device), moved_to(y, passes.device), weights[places].to(passes.device)

    data = FitData(
        passes.model, passes.loss, passes.capture.blocks, subset, batches, seed, passes.autocast, passes.progress, ranks
    )
    curvature = prepare(setup.estimators, passes.capture.blocks, data, setup.memory)
    for pass_index in range(max(1, curvature.passes)):
        looking = curvature.open(pass_index)
        generator = torch.Generator().manual_seed(seed)
        draws = Draws(passes.loss, generator, examples_before(train, subset, ranks)) if ranks.world > 1 else None
        size = getattr(train.data, "batch_size", None) or passes.batch_size  # a loader's own
        total = -(-len(subset.indices) // (size * ranks.world))
        with tqdm(batches(subset), f"fit, pass {pass_index + 1}", total, disable=not passes.progress) as bar:
            for number, (x, y, weights) in enumerate(bar):
                passes.capture.batch = number
                passes.check_later(x, y)
                for rows, part, labels in passes.slices(x, y):
                    with counted_from(rows.start):
                        observe(passes, looking, part, labels, weights[rows], pass_index, generator, draws=draws)
                if not looking.parts:
                    break  # nothing to learn: the first batch was looked at for what `Capture` refuses
        passes.go_along()
        if draws is not None:
            draws.end(ranks)
        del looking
        end_pass(curvature, pass_index, setup)
    return curvature


def examples_before(train: Walked, subset: Subset, ranks: Ranks) -> int:
    """Of the subset, those that the ranks before this one take."""
    mine = deal_picked(train, subset.indices, ranks)
    if not len(mine):
        return 0
    if train.indexable:
        return int(mine[0])
    return int((subset.indices < deal(train, ranks).start).sum())


def observe(
    passes: Passes,
    curvature: NetworkCurvature,
    x: Any,
    y: Any,
    weights: Tensor,
    pass_index: int,
    generator: torch.Generator,
    most_columns: int | None = None,
    draws: Draws | None = None,
) -> set[Fisher]:
    """Shows examples to the estimators; of their curvature no more columns than `most_columns`.

    Returns of which Fishers' columns gradients were taken, a backward pass for each.
    """
    forward = passes.forward(x)
    batch = labels_in(x, y)
    losses = per_sample(passes.loss, forward.outputs, batch, forward.n)
    softmax = passes.loss == "cross_entropy"
    counted = labels_of(batch) != IGNORED if softmax else None
    seen = SeenBatch(forward, losses, weights, passes.capture.blocks, softmax, counted)
    rest = {names: part for names, part in curvature.parts.items() if not part.observe_batch(seen)}
    del seen
    by_fisher: dict[Fisher, dict[tuple[str, ...], JointCurvature]] = {"empirical": {}}
    for names, part in rest.items():
        fisher = settle_fisher(part.fisher, passes.loss, forward.outputs, batch, forward.n)
        by_fisher.setdefault(fisher, {})[names] = part
    drawing = draws is not None and any(part.fisher in ("auto", "monte_carlo") for part in rest.values())
    if draws is not None and drawing:
        draws.begin(forward.outputs, batch, forward.n, "monte_carlo" if "monte_carlo" in by_fisher else "exact")
    empirical = NetworkCurvature(by_fisher.pop("empirical"))
    taken: set[Fisher] = {*by_fisher, "empirical"} if empirical.parts else {*by_fisher}
    for fisher, parts in by_fisher.items():
        columns = output_columns(passes.loss, forward.outputs, batch, forward.n, fisher, generator)
        for column, (scores, s) in enumerate(islice(columns, most_columns)):
            gradients = forward.gradients(scores, s, keep=True)
            NetworkCurvature(parts).observe(gradients, weights, column, pass_index)
            del gradients, scores, s  # before those of the next column come
    if empirical.parts:
        gradients = forward.gradients(losses)
        del forward, losses  # and the graph with them, before the estimators take their turn
        empirical.observe(gradients, weights, 0, pass_index)
    return taken
