"""What `remove` refuses: certificates that cannot be, heads that serve elsewhere, features of something else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastif.data.batches import as_loader, count, walked
from fastif.data.dealing import tell_data
from fastif.data.identity import Walked
from fastif.data.loaders import Sharded
from fastif.model.features import Extracted, extract
from fastif.ranks import Ranks
from fastif.removal.certificate import Certificate
from fastif.removal.losses import HeadLoss, output_loss


def check_certificate(certificate: Certificate, weight_decay: float, line_search: bool, loss: HeadLoss) -> None:
    if not isinstance(certificate, Certificate):
        raise TypeError(f"remove: certificate must be a fastif.Certificate, got {type(certificate).__name__}")
    if not weight_decay > 0:
        raise ValueError(
            f"remove: a certificate needs weight_decay > 0, got {weight_decay}: without it the objective is not "
            "strongly convex, and a small gradient says nothing of the distance to the retrained head"
        )
    if not line_search:
        raise ValueError(
            "remove: a certificate needs line_search=True: full steps lead to where the training left the objective, "
            "not to the retrained head"
        )
    if output_loss(loss).smoothness is None:
        raise ValueError(
            "remove: a certificate needs a loss that is known to be convex: cross_entropy, bce, mse or "
            "nn.CrossEntropyLoss with weights >= 0; of a function of your own nobody can tell"
        )


def check_own_weight(
    model: nn.Module, layer: nn.Linear, instead: str = 'pass layers="*", or layers= with both'
) -> None:
    """Where the head's weight is also an embedding's, features change with it: they cannot be computed once."""
    own = {id(parameter) for parameter in layer.parameters()}
    for name, module in model.named_modules():
        if module is not layer and any(id(parameter) in own for parameter in module.parameters(recurse=False)):
            raise ValueError(
                f"remove: the head's weight serves elsewhere in the model, in {name!r}, too, and steps on the head's "
                f"features cannot move that; {instead}"
            )


def check_extracted(
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


def check_refit(layers: Any, certificate: Any, line_search: bool, loss: Any, extracted: Any, start: Any) -> None:
    """What the call with refit_head=True cannot have beside it. Raises ValueError with the reason."""
    for refused, why in (
        (layers is None, "needs layers=, those that take the influence step; the head alone is refitted without it"),
        (certificate is not None, "beside certificate= would certify nothing: the layers below the head move"),
        (
            not line_search,
            "needs line_search=True: the head's steps are on the retained objective; the layers' has none",
        ),
        (loss != "cross_entropy", f"is for loss='cross_entropy' with one output per example, got {loss!r}"),
        (extracted is not None, "beside extracted= cannot be: features change with the layers that move"),
        (
            start is not None,
            "beside start= cannot be: it is one step from the trained parameters; name all indices at once",
        ),
    ):
        if refused:
            raise ValueError(f"remove: refit_head=True {why}")


def check_unseen(unseen: Any, refit_head: bool, batch_size: int, ranks: Ranks) -> Walked:
    """The data as walked. Raises ValueError where it cannot be, or is not the same on all ranks."""
    if not refit_head:
        raise ValueError("remove: unseen= is for steps behind which the head is refitted: it needs refit_head=True")
    if isinstance(unseen, Sharded):
        raise ValueError("remove: unseen= must be whole on every rank, without fastif.sharded")
    if isinstance(unseen, Iterator):
        raise ValueError(
            f"remove: unseen= is walked through more than once, got {type(unseen).__name__}; pass a list of batches"
        )
    found = walked(unseen, batch_size)
    if ranks.world > 1:
        ranks.compare("remove", {f"unseen: {name}": value for name, value in tell_data(found, ranks).items()})
    return found
