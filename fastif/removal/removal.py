"""Removal: the network that a classifier would have been without some of its training examples.

A few subsampled Newton steps on the retained objective

    F(θ) = (1/n) Σ_{i retained} ℓ_i(θ) + ½ weight_decay ‖θ‖²        (docs/math.md (13)),

with its gradient over all retained data, its curvature from a sampler's weighted subset at the current parameters, and
a search on F itself. θ is the head or any layers. No held-out example takes part in any choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from fastif.data.batches import as_loader, walked
from fastif.data.dealing import tell_data
from fastif.data.loaders import Sharded, needs_all
from fastif.fingerprints import fingerprint, told_function
from fastif.model.capture import Capture
from fastif.model.features import Extracted, extract, find_head
from fastif.model.forward import computable
from fastif.progress import tqdm
from fastif.ranks import Ranks, find_ranks, on_all_ranks
from fastif.removal.certificate import Certificate, Certified
from fastif.removal.certifying import certify
from fastif.removal.checks import check_certificate, check_extracted, check_own_weight, check_refit, check_unseen
from fastif.removal.head import RetainedHead, check_settings
from fastif.removal.losses import HeadLoss, SoftmaxName
from fastif.removal.matching import MatchedNetwork
from fastif.removal.network import RetainedNetwork
from fastif.removal.newton import newton
from fastif.removal.refit import RefittedNetwork
from fastif.removal.retained import check_indices
from fastif.removal.steps import Removal, Step, check_moves, check_start
from fastif.samplers.draw import Sampler
from fastif.sharded import refuse_sharded


@contextmanager
def _digits_and_gradients() -> Iterator[None]:
    """Steps keep the digits that autocast around the call would take from their products, and the gradients that
    no_grad or inference_mode would."""
    off = partial(torch.autocast, enabled=False)
    with off("cpu"), off("cuda"), torch.inference_mode(False), torch.enable_grad():
        yield


@on_all_ranks
@_digits_and_gradients()
def remove(
    model: nn.Module,
    train: Any,
    indices: Tensor,
    *,
    layers: str | Sequence[str] | None = None,
    curvature: Any | Mapping[str, Any] | None = None,
    refit_head: bool = False,
    unseen: Any | None = None,
    subset: Any | Sampler | None = None,
    steps: int | None = None,
    damping: float = 0.0,
    weight_decay: float = 5e-4,
    line_search: bool = True,
    loss: HeadLoss | SoftmaxName = "cross_entropy",
    certificate: Certificate | None = None,
    head: str | None = None,
    extracted: Extracted | None = None,
    start: Removal | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    generator: Generator | None = None,
    progress: bool = True,
) -> Removal:
    """The model without the training examples `indices`: Newton steps on some layers. The model itself is not changed.

    Args:
        model: one whose last operation is an nn.Linear, trained with `loss`. One in 16 bits is
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
            Default the exact block for the head and EKFAC(damping="auto") for the rest; of a language model
            EKFAC(damping="auto", fisher="monte_carlo") for all.
        refit_head: one influence step of `layers` (docs/math.md (3)), without a search, then steps of the head on the
            retained objective, from what the moved layers say. It is for single examples, which the layers below the
            head know, too. The step has the longest of the lengths 0, ¼, ½, 1, 2, 4 up to which the mean loss of the
            removed examples, behind the refitted head, is at most what the whole step foretells to first order, and
            each lengthening raises it by more than twice as much as that of the retained (docs/math.md (33)): nothing
            is left to choose. `steps` are then the head's; the first entry of `history` is the layers', whose
            `step_size` is the length. Default curvature here the exact block for the head and EKFAC(0.0,
            fisher="monte_carlo") for the rest, damped by weight_decay alone. Softmax cross-entropy with one label per
            example; for no certificate, and not beside `start`, `extracted` or line_search=False.
        unseen: with refit_head=True labelled data that the network was not trained on, drawn like its training data, as
            `fastif.data.as_loader` takes it: other steps of the layers, after which the network is as sure of the
            removed examples as it is of unseen ones (docs/math.md (34)). It is for networks that know their examples by
            heart, whose losses have no slope left, and tells of all how far to go: each removed example is taken
            towards the log-odds of the unseen examples of its label that are as unusual, lowered where these, too, were
            near to removed ones; how unusual a label is say the neighbours among the retained, in what enters each
            linear and convolutional layer. The outputs of the retained change as little as they can. At most `steps`
            steps, each with the head's behind it, until the removed are no longer told apart by their mean; a warning
            where more than a nat is left. Do not judge the removal by the same data. Default curvature EKFAC(0.0,
            fisher="monte_carlo") for all layers, of the squared outputs, which fisher="empirical" does not estimate.
        subset: which retained examples carry the curvature: None for all; a sampler with its k bound, such as
            `functools.partial(samplers.logit, k=500)`, drawn afresh from the retained data in each step; or anything
            with `indices` (counted in `train`) and `weights`: its removed examples are left out, the other weights
            unchanged.
        steps: at most so many, default 6; fewer where F stops falling. With a certificate as many as it takes, default
            at most 100.
        damping: absolute λ >= 0, added to the diagonal of the curvature beside weight_decay, not to F.
        weight_decay: of the training; it also makes F's optimum finite where a whole class is removed.
        line_search: of the head, take the best of the steps ⅛, ¼, ½, 1, 2, 4 by F; where none lowers F (a small subset
            can underrate the curvature by far), halve ⅛ until one does. Of other layers, take the combination of the
            layers' steps (as without line search), of the head's step of F and of the last step that minimises the
            subset's quadratic model of F, damped until F falls (docs/math.md (13)). False: full steps along
            −(G + (weight_decay + damping) I)⁻¹ (∇F(θ) − ∇F_all(θ̂)), where F_all is the objective with all data and θ̂
            the trained parameters, taken as its optimum. The first step is then docs/math.md (3) exactly, since
            ∇F_all(θ̂) − ∇F(θ̂) = (1/n) Σ_{i removed} ∇ℓ_i.
        loss: that the model was trained with: softmax cross-entropy; "causal_lm" and "token_cross_entropy" (summed over
            the positions of an example, as for `fastif.Influence`), whose layers, the head too, move by EKFAC of drawn
            labels unless curvature= says otherwise; for the head alone also "bce" and "mse" (summed
            over the outputs of an example, as for `fastif.Influence`), `nn.CrossEntropyLoss(reduction="none")` with
            class weights or label smoothing, or a function (outputs [m, c], targets) → [m] of your own that is convex
            in the outputs. F sums the losses over n: where a mean was weighted, scale the weights to a mean of 1.
            docs/math.md (30).
        certificate: of the head, which is then computed in float64: steps go on until it is within the certificate's
            distance of the head retrained to convergence, and Gaussian noise of its σ is added. (ε, δ) then hold
            between the removed and the retrained head, both with noise, as `Removal.certified` says in words; of the
            features nothing is certified. The last of `Removal.moved` has the noise; the others must not be released.
            Of several removals one after another, each takes ALL indices removed so far, with noise of its own;
            `Certificate.delta_after` says what they cost together. docs/math.md (28).
        head, batch_size, device, progress: as in `fastif.extract`.
        extracted: what `fastif.extract(model, train)` returned, for the head's steps: the pass over the data is then
            not made again, but for its first batch, which is compared. Several removals from one model need one pass.
        start: an earlier removal from this model and this data; the model stays as it was trained: the steps begin
            where that one ended, so that removal after removal takes a step or two each. `indices` are ALL examples to
            be without, those of `start` too. Nothing else is taken from it: F has the loss and weight_decay given here,
            and steps without line search still answer ∇F_all at the trained parameters.
        generator: for samplers that draw, default torch's global one, so that runs differ unless it is seeded; and for
            the certificate's noise, default one that the operating system seeds. A seed that is known takes the noise
            away: keep it secret, or leave it out.

    On several ranks (`torchrun`) gradient, curvature and objective are summed over each rank's examples, and all get
    the same bits: every rank makes the same call, and what the first one draws counts.

    Raises ValueError for indices out of range, repeated or all there are, for missing labels, for a loss that is not
    convex or, beside other layers than the head, not softmax cross-entropy, for damping > 0 beside an "auto", for what
    cannot be beside refit_head, for unseen= that lacks a label of the removed examples or is mostly training data, for
    `extracted` of another number of examples, of a first batch that the model sees otherwise, or beside layers that it
    cannot serve, for a `start` from another model, with examples that `indices` lack or with parameters that do not
    move here, for parameters that moved out of the range of the model's 16 bits, and what `extract`, `Influence`, the
    sampler and the curvature raise; for a head alone whose weight serves elsewhere in the model; with a certificate,
    for more than the head, weight_decay = 0 or line_search=False, for a loss that is not known to be convex, and where
    the steps do not reach its distance, with how far they came.
    """
    refuse_sharded(model, "remove")
    if isinstance(train, Sharded):
        raise ValueError(needs_all("remove"))
    check_settings(6 if steps is None else steps, damping)
    name, layer = find_head(model, head, op="remove")
    indices = torch.as_tensor(indices)
    check_indices(indices)
    if start is not None:
        check_start(start, model, indices)
    ranks = find_ranks()
    settings: dict[str, Any] = {
        "subset": subset,
        "damping": damping,
        "weight_decay": weight_decay,
        "line_search": line_search,
        "generator": generator,
    }
    if ranks.world > 1:
        told = {**settings, "layers": layers, "steps": steps, "certificate": certificate, "head": head}
        told["refit_head"] = refit_head
        told["loss"] = told_function(loss)
        told["start"] = None if start is None else fingerprint([*start.moved[-1].values()])
        train = _compare(ranks, model, train, indices, told, batch_size)
        progress = progress and ranks.rank == 0
    if unseen is not None:
        unseen = check_unseen(unseen, refit_head, batch_size, ranks)
    if refit_head:
        check_refit(layers, certificate, line_search, loss, extracted, start)
        check_own_weight(model, layer, instead="leave out refit_head=True")
        del settings["line_search"]
        how: dict[str, Any] = {"layers": layers, "curvature": curvature, "head": head, "batch_size": batch_size}
        how |= {"device": device, **settings}
        if unseen is None:
            network = RefittedNetwork(model, train, indices, **how)
        else:
            network = MatchedNetwork(model, train, indices, unseen=unseen, **how)
        history = network.remove(6 if steps is None else steps, progress)
        return _removal(model, history, [network.trained, *(step.parameters for step in history)], indices)
    softmax = loss == "cross_entropy"
    words = loss in ("causal_lm", "token_cross_entropy")
    if not words and curvature is None and (layers is None or list(Capture(model, layers).blocks) == [name or "model"]):
        check_own_weight(model, layer)
        if certificate is not None:
            check_certificate(certificate, weight_decay, line_search, loss)
        seen: dict[str, Any] = {"head": head, "batch_size": batch_size, "device": device}
        if extracted is None:
            extracted = extract(model, train if softmax else _Inputs(train, batch_size), **seen, progress=progress)
        else:
            check_extracted(extracted, model, layer, train if softmax else _Inputs(train, batch_size), **seen)
        if not softmax:
            extracted = extracted._replace(labels=_targets(train, batch_size))
            settings["loss"] = loss
        if ranks.world > 1:
            rows = [x for x in (extracted.features, extracted.labels) if x is not None]
            ranks.compare("remove", {"features": fingerprint(rows)})
        settings["ranks"] = ranks
        problem = _head_problem(name, layer, extracted, indices, device, settings, exact=certificate is not None)
        if certificate is not None:
            before = _begin(problem, model, start)
            history, released, certified = certify(problem, certificate, steps, generator, progress)
            moved = [before, *(step.parameters for step in history), released]
            return _removal(model, history, moved, indices, certified)
    else:
        if certificate is not None:
            raise ValueError(
                "remove: certificate= is for the head alone with its exact block, whose objective is strongly convex; "
                "leave out layers= and curvature="
            )
        if not (softmax or words):
            raise ValueError(
                "remove: loss= is for the head alone with its exact block; other layers move by softmax cross-entropy, "
                f"of words with 'causal_lm' or 'token_cross_entropy', got {loss!r}"
            )
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
            loss=cast(SoftmaxName, loss),
            **settings,
        )
    before = _begin(problem, model, start)
    most = 6 if steps is None else steps
    history = list(tqdm(newton(problem, most), "remove", total=most, disable=not progress))
    moved = [before, *(step.parameters for step in history)]
    if start is not None and not history:  # no step lowers F: the state is that of `start`
        moved.append(problem.parameters)
    return _removal(model, history, moved, indices)


def _begin(problem: RetainedHead | RetainedNetwork, model: nn.Module, start: Removal | None) -> dict[str, Tensor]:
    """The trained parameters that move; the problem then stands where `start` ended."""
    trained = problem.parameters
    if start is not None:
        check_moves(start, {key for key, name in _names_of(model).items() if name in trained})
        problem.go_on_from(start.moved[-1])
    return trained


def _names_of(model: nn.Module) -> dict[str, str | None]:
    """By key of the state dict, the parameter's name: some have two keys; None for what is no parameter."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {key: names.get(value) for key, value in model.state_dict(keep_vars=True).items()}


def _compare(ranks: Ranks, model: nn.Module, train: Any, removed: Tensor, told: dict[str, Any], batch_size: int) -> Any:
    """Raises ValueError, on all ranks, where one was given something else than the first; the data, as walked."""
    if isinstance(train, Iterator):
        raise ValueError(
            f"remove: on {ranks.world} ranks the data is walked through more than once, got {type(train).__name__}; "
            "pass a list of batches"
        )
    train = walked(train, batch_size)
    subset = told.pop("subset")
    if subset is not None and not callable(subset):
        told["subset"] = fingerprint([torch.as_tensor(subset.indices), torch.as_tensor(subset.weights)])
    del told["generator"]  # what the first rank draws counts
    state = [value for value in model.state_dict().values() if isinstance(value, Tensor)]
    found = {"model": fingerprint(state), "indices": fingerprint([removed]), "batch_size": batch_size}
    ranks.compare("remove", {**tell_data(train, ranks), **found, **{name: repr(value) for name, value in told.items()}})
    return train


def _head_problem(
    name: str,
    layer: nn.Linear,
    extracted: Extracted,
    removed: Tensor,
    device: torch.device | str | None,
    settings: dict[str, Any],
    exact: bool,
) -> RetainedHead:
    """The head's problem, in float32 or the head's own type; `exact`: in float64."""
    place = layer.weight.device if device is None else torch.device(device)
    if extracted.labels is None:
        raise ValueError("remove: the training data has no labels")
    prefix = f"{name}." if name else ""

    def seen(values: Tensor) -> Tensor:
        values = computable(values.detach().to(place))
        return values.double() if exact else values

    return RetainedHead(
        seen(extracted.features),
        extracted.labels.to(place),
        seen(layer.weight),
        None if layer.bias is None else seen(layer.bias),
        removed.to(place),
        name=name or "model",
        keys=(f"{prefix}weight", f"{prefix}bias"),
        **settings,
    )


def _removal(
    model: nn.Module,
    history: list[Step],
    parameters: list[dict[str, Tensor]],
    indices: Tensor,
    certified: Certified | None = None,
) -> Removal:
    """What `remove` returns; a parameter that moved stands under each of its keys in state_dict: some have two."""
    keys = _names_of(model)
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
    last = {key: value.clone() for key, value in moved[-1].items()}
    return Removal({**state, **last}, history, moved, certified, indices.detach().cpu().clone())


class _Inputs:
    """Data without its targets, which need not be labels of classes."""

    def __init__(self, train: Any, batch_size: int):
        self._batches = as_loader(train, batch_size)

    def __iter__(self) -> Iterator[Any]:
        return (x for x, _ in self._batches)


def _targets(train: Any, batch_size: int) -> Tensor:
    found = [y for _, y in as_loader(train, batch_size)]
    if any(not isinstance(y, Tensor) for y in found):
        raise ValueError("remove: the training data has no targets")
    return torch.cat(found)
