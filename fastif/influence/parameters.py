"""Influence on the parameters, and solves with the curvature: what comes back is keyed like the model's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastif.fingerprints import fingerprint, tensors_in
from fastif.influence import owners
from fastif.influence.fitted import Fitted
from fastif.influence.scoring import share_of
from fastif.ranks import ALONE


def move_parameters(fitted: Fitted, batch: Any) -> dict[str, Tensor]:
    """−(G + λI)⁻¹ Σ_z ∇ℓ(z) over the examples of `batch`; see `Influence.on_parameters`."""
    _refuse_networks(fitted, "on_parameters")
    total: dict[str, Tensor] = {}
    ranks, mine = fitted.setup.ranks, batch
    seen: list[str] = []
    if isinstance(batch, Iterator):  # every rank has its own to walk through, of the same batches
        ranks, mine = ALONE, batch if ranks.world == 1 else _noted(batch, seen)
    else:
        mine, _ = share_of(fitted, batch)
    for checkpoint, curvature in fitted.at_checkpoints():
        sums: dict[str, Tensor] = {}
        with fitted.passes.running(checkpoint):
            for _, _, gradients in fitted.passes.gradients(mine, "on_parameters"):
                for name, g in gradients.items():
                    part = g.sum(torch.ones(len(g), device=fitted.setup.device))
                    sums[name] = sums[name].add_(part) if name in sums else part
            if seen:  # each owner would solve for its own rank's batches
                fitted.setup.ranks.compare("on_parameters", {"batch=": seen})
            sums = ranks.sum_each("gradients", sums, owners.owner_of_block(curvature).get, fitted.passes.device)
            for name, moved in owners.solve(curvature, sums, fitted.setup).items():
                moved = moved.div_(-len(fitted.curvatures))
                total[name] = total[name].add_(moved) if name in total else moved
    return _by_parameter(fitted, total)


def _noted(batches: Iterator[Any], seen: list[str]) -> Iterator[Any]:
    """The batches, of each of which `seen` gets the fingerprint."""
    for batch in batches:
        seen.append(fingerprint(tensors_in(batch)))
        yield batch


def solve(fitted: Fitted, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """(G + λI)⁻¹ v; see `Influence.solve`."""
    _refuse_networks(fitted, "solve")
    capture = fitted.capture
    values: dict[Tensor, Tensor] = {}
    for name, shape in capture.covered.items():
        if name not in vectors or vectors[name].shape != shape:
            found = list(vectors[name].shape) if name in vectors else "nothing"
            raise ValueError(f"solve: {name!r} must be {list(shape)}, got {found}")
    for parameter, name in capture.names.items():
        if name in capture.covered:
            values[parameter] = vectors[name].to(fitted.setup.device)
    total: dict[str, Tensor] = {}
    for checkpoint, curvature in fitted.at_checkpoints():
        with fitted.passes.running(checkpoint):
            matrices = {name: block.matrix(values) for name, block in capture.blocks.items()}
            for name, solved in owners.solve(curvature, matrices, fitted.setup).items():
                solved = solved / len(fitted.curvatures)
                total[name] = total[name].add_(solved) if name in total else solved
    return _by_parameter(fitted, total)


def _refuse_networks(fitted: Fitted, op: str) -> None:
    if fitted.setup.kept is not None:
        raise ValueError(
            f"{op}: networks that were trained apart have no parameters in common whose mean would mean anything; ask "
            "one of them: Influence(..., checkpoints=networks.states[:1])"
        )


def _by_parameter(fitted: Fitted, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters' part of every block's matrix."""
    found: dict[Tensor, Tensor] = {}
    for name, matrix in matrices.items():
        for parameter, rows, value in fitted.capture.blocks[name].split(matrix):
            if parameter not in found:
                found[parameter] = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            found[parameter][rows] += value
    return {name: found[p].detach() for p, name in fitted.capture.names.items() if p in found}
