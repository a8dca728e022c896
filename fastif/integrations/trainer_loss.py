"""The loss of a Trainer, example by example: found by what it gives, not by what the model is called.

A Trainer's loss is one number for a batch. Each loss that could stand behind it is computed example by example and held
against the Trainer's own loss of each example alone, and of all of them together: that says which loss it is, and
whether the batch's is the mean over examples or over their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastif.data.batches import batch_length, rows_of
from fastif.model.calls import call
from fastif.model.losses import IGNORED, Loss, labels_of, logits_of, per_sample

Mean = Literal["examples", "tokens", "tokens after the first"]  # what the Trainer's loss of a batch is the mean over
_AGREE = 1e-3  # of losses computed in two ways, relative; another loss is no rounding error


class Matched(NamedTuple):
    """A loss that gives the Trainer's."""

    loss: Loss
    mean: Mean
    by_items: bool  # whether the Trainer divides by the number of items that it is given, over several batches


def smoothed(outputs: Any, batch: Any, *, epsilon: float, shift: bool) -> Tensor:
    """Label smoothing, [n]: Σ over an example's counted tokens of (1 − ε)(−log p_label) + ε mean_c(−log p_c).

    shift: whether the label of position t + 1 belongs to position t. Labels −100 do not count.
    """
    logits, labels = logits_of(outputs), labels_of(batch)
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    log_p = logits.log_softmax(-1)
    own = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    values = -(1 - epsilon) * own - epsilon * log_p.mean(-1)
    return values.masked_fill(labels == IGNORED, 0.0).reshape(len(labels), -1).sum(1)


def mean_over_outputs(outputs: Any, batch: Any, *, loss: Literal["bce", "mse"]) -> Tensor:
    """ "bce" or "mse" divided by the number of an example's outputs, [n]."""
    scores, targets = logits_of(outputs), labels_of(batch)
    targets = targets.to(scores).reshape(scores.shape)
    function = F.binary_cross_entropy_with_logits if loss == "bce" else F.mse_loss
    return function(scores, targets, reduction="none").reshape(len(scores), -1).mean(1)


def one_by_one(outputs: Any, batch: Any, *, function: Any) -> Tensor:
    """A compute_loss_func of the Trainer for each example alone, as one item, [n]."""
    logits, labels = logits_of(outputs), labels_of(batch)
    rows = [slice(i, i + 1) for i in range(len(labels))]
    return torch.stack([function(_Alone(logits[i]), labels[i], num_items_in_batch=1).reshape(()) for i in rows])


class _Alone(dict):
    """The logits of one example, as models of transformers return them."""

    def __init__(self, logits: Tensor):
        super().__init__(logits=logits)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__("logits" if key == 0 else key)

    @property
    def logits(self) -> Tensor:
        return self["logits"]


def items_of(batch: Mapping[str, Any], mean: Mean) -> Tensor:
    """What each example counts in the mean, float64 [n]."""
    labels = labels_of(batch)
    if mean == "examples":
        return torch.ones(len(labels), dtype=torch.float64)
    counted = (labels[:, 1:] if mean == "tokens after the first" else labels) != IGNORED
    return counted.reshape(len(labels), -1).sum(1).double().cpu()


def match(trainer: Any, batch: Mapping[str, Any], given: Any = None) -> Matched:
    """Which loss gives the Trainer's on a batch of a few examples; the model is in eval mode.

    Raises ValueError where none does, where the one that was given does not, and where several do.
    """
    n, asked, candidates = batch_length(batch), _Asked(trainer), _candidates(trainer, batch, given)
    each = torch.tensor([asked.loss(rows_of(batch, slice(i, i + 1))) for i in range(n)], dtype=torch.float64)
    whole, by_two, by_four = (asked.loss(batch, items) for items in (None, torch.tensor(2), torch.tensor(4)))
    by_items = by_two != by_four and abs(by_two - 2 * by_four) <= _AGREE * abs(by_two)
    with torch.no_grad():
        outputs = call(trainer.model, batch)
    found: list[Matched] = []
    tried: list[str] = []
    for loss, mean in candidates:
        items = items_of(batch, mean)
        try:
            with torch.no_grad():
                own = per_sample(loss, outputs, batch, n).double().cpu()
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            if given is not None:
                raise
            tried.append(f"{_name(loss)}: {error}")
            continue
        counted = items > 0
        alone = own[counted] / items[counted]
        far = float((alone - each[counted]).abs().max()) if bool(counted.any()) else float("inf")
        all_far = abs(float(own.sum() / items.sum()) - whole)
        if max(far, all_far) <= _AGREE * max(1e-3, float(alone.abs().max())):
            found.append(Matched(loss, mean, by_items))
        else:
            tried.append(f"{_name(loss)}, mean over {mean}: {float(own.sum() / items.sum()):.6g}")
    if not found:
        raise ValueError(
            f"integrations: the Trainer's loss of {n} examples is {whole:.6g}, and no loss of single examples gives it "
            f"({'; '.join(tried) or 'there are no labels'}): pass loss= as a function of (outputs, batch) that gives "
            "one value per example"
        )
    if len({match.loss if isinstance(match.loss, str) else id(match.loss) for match in found}) > 1 and given is None:
        names = " and ".join(dict.fromkeys(_name(match.loss) for match in found))
        raise ValueError(
            f"integrations: {names} give the Trainer's loss of the first {n} examples alike (a model that is not "
            "trained yet?): say which it is with loss="
        )
    return found[0]


class _Asked:
    """A Trainer that is asked for its loss: nothing of the batch or of it changes."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    @torch.no_grad()
    def loss(self, batch: Mapping[str, Any], items: Tensor | None = None) -> float:
        value = self.trainer.compute_loss(self.trainer.model, dict(batch), num_items_in_batch=items)
        return float(value.double())


def _candidates(trainer: Any, batch: Mapping[str, Any], given: Any) -> list[tuple[Any, Mean]]:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise ValueError(
            "integrations: the Trainer's batches hold no 'labels': pass a collator or data that brings them, or build "
            "fastif.Influence with a function of (outputs, batch) as loss"
        )
    whole = not labels.is_floating_point() and labels.dim() > 1
    means: list[Mean] = ["examples", "tokens", "tokens after the first"] if whole else ["examples"]
    if given is not None:
        return [(given, mean) for mean in means]
    function, smoother = getattr(trainer, "compute_loss_func", None), getattr(trainer, "label_smoother", None)
    if function is not None:
        alone = partial(one_by_one, function=function)
        return [(alone, mean) for mean in means]
    if smoother is not None:
        smooth: Callable[[bool], Any] = lambda shift: partial(smoothed, epsilon=float(smoother.epsilon), shift=shift)  # noqa: E731
        tokens: list[tuple[Any, Mean]] = [(smooth(True), "tokens after the first"), (smooth(False), "tokens")]
        return tokens if whole else [(smooth(False), "examples")]
    if whole:
        return [("causal_lm", "tokens after the first"), ("token_cross_entropy", "tokens")]
    if not labels.is_floating_point():
        return [("cross_entropy", "examples")]
    if labels.dim() == 1 or labels.shape[1] == 1:
        return [("mse", "examples"), ("bce", "examples")]
    return [(partial(mean_over_outputs, loss=loss), "examples") for loss in ("bce", "mse")]


def _name(loss: Any) -> str:
    if isinstance(loss, partial):
        settings = ", ".join(f"{k}={v!r}" for k, v in loss.keywords.items() if not callable(v))
        return f"{loss.func.__name__}({settings})"
    return loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
