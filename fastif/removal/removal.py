"""Removal: the network that a classifier would have been without some of its training examples.

A few subsampled Newton steps on the retained objective

    F(θ) = (1/n) Σ_{i retained} ℓ_i(θ) + ½ weight_decay ‖θ‖²        (docs/math.md (13)),

with its gradient over all retained data, its curvature from a sampler's weighted subset at the current parameters, and
a search on F itself. θ is the head or any layers. No held-out example takes part in any choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from fastif.data.batches import as_loader, count
from fastif.model.capture import Capture
from fastif.model.features import Extracted, extract, find_head
from fastif.model.forward import computable
from fastif.progress import tqdm
from fastif.removal.head import RetainedHead, check_settings
from fastif.removal.network import RetainedNetwork
from fastif.removal.newton import newton
from fastif.removal.steps import Removal, Step
from fastif.samplers.draw import Sampler


def remove(
    model: nn.Module,
    train: Any,
    indices: Tensor,
    *,
    layers: str | Sequence[str] | None = None,
    curvature: Any | Mapping[str, Any] | None = None,
    subset: Any | Sampler | None = None,
    steps: int = 6,
    damping: float = 0.0,
    weight_decay: float = 5e-4,
    line_search: bool = True,
    head: str | None = None,
    extracted: Extracted | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    generator: Generator | None = None,
    progress: bool = True,
) -> Removal:
    """The model without the training examples `indices`: Newton steps on some layers. The model itself is not changed.

    Args:
        model: a classifier trained with softmax cross-entropy whose last operation is an nn.Linear. One in 16 bits is
            computed with in float32, and what moved is rounded to its type.
        train: the data it was trained on with labels, as `fastif.data.as_loader` takes it.
        indices: int64 [r], the examples to remove, counted in the order of `train`.
        layers: names or patterns of the layers that may move, as `fastif.Influence` takes them ("*": all that are
            known, frozen ones too). Default the head, whose steps are computed on its features, in one pass through the
            model; others need some passes per step. Normalisation layers run in eval mode, and buffers stay as they
            are.
        curvature: an estimator or a mapping to them, as `fastif.Influence` takes them: layers that no pattern of a
            mapping matches stay. `weight_decay` and `damping` are added to the numbers that estimators are damped by;
            damping="auto" and damping by a rule (`TrainingDamping`, `RelativeDamping`) find their own, to which
            weight_decay is not added and beside which damping > 0 is refused.
            Default the exact block for the head and EKFAC(damping="auto") for the rest.
        subset: which retained examples carry the curvature: None for all; a sampler with its k bound, such as
            `functools.partial(samplers.logit, k=500)`, drawn afresh from the retained data in each step; or anything
            with `indices` (counted in `train`) and `weights`: its removed examples are left out, the other weights
            unchanged.
        steps: at most so many; fewer where F stops falling.
        damping: absolute λ >= 0, added to the diagonal of the curvature beside weight_decay, not to F.
        weight_decay: of the training; it also makes F's optimum finite where a whole class is removed.
        line_search: of the head, take the best of the steps ⅛, ¼, ½, 1, 2, 4 by F; where none lowers F (a small subset
            can underrate the curvature by far), halve ⅛ until one does. Of other layers, take the combination of the
            layers' steps (as without line search), of the head's step of F and of the last step that minimises the
            subset's quadratic model of F, damped until F falls (docs/math.md (13)). False: full steps along
            −(G + (weight_decay + damping) I)⁻¹ (∇F(θ) − ∇F_all(θ̂)), where F_all is the objective with all data and θ̂
            the trained parameters, taken as its optimum. The first step is then docs/math.md (3) exactly, since
            ∇F_all(θ̂) − ∇F(θ̂) = (1/n) Σ_{i removed} ∇ℓ_i.
        head, batch_size, device, progress: as in `fastif.extract`.
        extracted: what `fastif.extract(model, train)` returned, for the head's steps: the pass over the data is then
            not made again, but for its first batch, which is compared. Several removals from one model need one pass.
        generator: for samplers that draw; default torch's global one, so that runs differ unless it is seeded.

    Raises ValueError for indices out of range, repeated or all there are, for missing labels, for damping > 0 beside an
    "auto", for `extracted` of another number of examples, of a first batch that the model sees otherwise, or beside
    layers that it cannot serve, for parameters that moved out of the range of the model's 16 bits, and what `extract`,
    `Influence`, the sampler and the curvature raise.
    """
    check_settings(steps, damping)
    name, layer = find_head(model, head, op="remove")
    indices = torch.as_tensor(indices)
    settings: dict[str, Any] = {
        "subset": subset,
        "damping": damping,
        "weight_decay": weight_decay,
        "line_search": line_search,
        "generator": generator,
    }
    if curvature is None and (layers is None or list(Capture(model, layers).blocks) == [name or "model"]):
        seen: dict[str, Any] = {"head": head, "batch_size": batch_size, "device": device}
        if extracted is None:
            extracted = extract(model, train, **seen, progress=progress)
        else:
            _check_extracted(extracted, model, layer, train, **seen)
        problem = _head_problem(name, layer, extracted, indices, device, settings)
    else:
        if extracted is not None:
            raise ValueError(
                "remove: extracted serves the steps of the head alone with its exact block; leave it out where other "
                "layers move or curvature= is given"
            )
        problem = RetainedNetwork(
            model,
            train,
            indices,
            layers=(name or "*") if layers is None else layers,
            curvature=curvature,
            head=head,
            batch_size=batch_size,
            device=device,
            **settings,
        )
    before = problem.parameters
    history = list(tqdm(newton(problem, steps), "remove", total=steps, disable=not progress))
    return _removal(model, history, [before, *(step.parameters for step in history)])


def _head_problem(
    name: str,
    layer: nn.Linear,
    extracted: Extracted,
    removed: Tensor,
    device: torch.device | str | None,
    settings: dict[str, Any],
) -> RetainedHead:
    place = layer.weight.device if device is None else torch.device(device)
    if extracted.labels is None:
        raise ValueError("remove: the training data has no labels")
    prefix = f"{name}." if name else ""
    return RetainedHead(
        computable(extracted.features.to(place)),
        extracted.labels.to(place),
        computable(layer.weight.detach().to(place)),
        None if layer.bias is None else computable(layer.bias.detach().to(place)),
        removed.to(place),
        name=name or "model",
        keys=(f"{prefix}weight", f"{prefix}bias"),
        **settings,
    )


def _removal(model: nn.Module, history: list[Step], parameters: list[dict[str, Tensor]]) -> Removal:
    """What `remove` returns; a parameter that moved stands under each of its keys in state_dict: some have two."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    keys = {key: names.get(value) for key, value in model.state_dict(keep_vars=True).items()}
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    moved = [
        {key: values[name].to(state[key]) for key, name in keys.items() if name in values} for values in parameters
    ]
    for key, value in moved[-1].items():
        if not bool(value.isfinite().all()):
            largest = float(parameters[-1][keys[key] or key].abs().max())
            raise ValueError(
                f"remove: {key!r} moved out of the range of {value.dtype}, to {largest:.3g}; pass model.float()"
            )
    return Removal({**state, **{key: value.clone() for key, value in moved[-1].items()}}, history, moved)


def _check_extracted(
    extracted: Extracted,
    model: nn.Module,
    layer: nn.Linear,
    train: Any,
    head: str | None,
    batch_size: int,
    device: torch.device | str | None,
) -> None:
    """Raises ValueError unless there is a row for each example of `train`, its first batch's as the model makes them.

    Another order of the data, other labels and layers below the head that have changed show in a batch.
    """
    n, (c, d) = count(train, batch_size), layer.weight.shape
    if extracted.features.shape != (n, d) or extracted.logits.shape != (n, c):
        raise ValueError(
            f"remove: extracted must be of the n={n} training examples and this head, features [n, d={d}] and logits "
            f"[n, c={c}], got {list(extracted.features.shape)} and {list(extracted.logits.shape)}"
        )
    x, y = next(iter(as_loader(train, batch_size)))
    own = extract(model, [x if y is None else (x, y)], head=head, device=device, progress=False)
    what = f"of other data or another model: of the first {len(own.logits)} examples its"
    for name in ("features", "logits"):
        want, given = getattr(own, name), getattr(extracted, name)
        away = float((given[: len(want)].to(want) - want).abs().max())
        allowed = 4 * torch.finfo(given.dtype).eps ** 0.5 * float(want.abs().max())
        if not away <= allowed:
            raise ValueError(f"remove: extracted is {what} {name} are off by up to {away:.2g}, more than {allowed:.2g}")
    if own.labels is not None and extracted.labels is not None:
        wrong = int((extracted.labels[: len(own.labels)].to(own.labels) != own.labels).sum())
        if wrong:
            raise ValueError(f"remove: extracted is {what} labels differ in {wrong}")
