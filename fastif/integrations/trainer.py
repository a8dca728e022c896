"""Influence from a Trainer of transformers: its model, collator, data and loss as it has them.

Only methods that every Trainer has are called, so that nothing is imported here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from fastif.data.batches import batch_length, moved_to, rows_of
from fastif.influence import Influence
from fastif.integrations.trainer_loss import Matched, match
from fastif.model.losses import IGNORED, Loss

_LOOKED_AT = 8  # examples that are collated to see what a collator does
_COMPARED = 4  # of them, those whose loss is computed in both ways
_COLLATIONS = 3  # of the same examples: what draws gives the same twice rarely, three times more rarely


def influence_of(trainer: Any, curvature: Any = None, *, loss: Loss | None = None, **options: Any) -> Influence:
    """An Influence of what a Trainer trains: its model, in eval mode from now on, and its loss, example by example.

    The loss of an example is summed over its tokens, as everywhere in fastif, labels shifted, ignored and smoothed as
    the Trainer has it; its own loss, of a batch, is the mean of that over examples or over their tokens. That it is, is
    checked on the first examples, each alone and all together. Its data comes from `data_of`:

        influence = fastif.integrations.influence_of(trainer, fastif.EKFAC("auto", fisher="empirical"))
        train, query = fastif.integrations.data_of(trainer), fastif.integrations.data_of(trainer, trainer.eval_dataset)
        values, indices = influence.fit(train).top(query, train, k=10)

    Args:
        trainer: a `transformers.Trainer`, trained or not, of any subclass; of adapters (`peft`) what is trained counts.
        curvature, options: as for `fastif.Influence`; without a curvature the head alone is covered.
        loss: where the Trainer's is none of those that fastif knows: a name or a function of (outputs, batch) → [n].

    Raises ValueError where no loss gives the Trainer's, for a quantised model and whatever `data_of` refuses.
    """
    _check_model(trainer.model)
    matched = match_loss(trainer, loss)
    trainer.model.eval()
    return Influence(trainer.model, matched.loss, curvature, **options)


def loss_of(trainer: Any) -> Loss:
    """The loss of single examples that gives the Trainer's, for `fastif.Influence` or `fastif.Replay`.

    Raises ValueError where there is none, as `influence_of` does.
    """
    return match_loss(trainer).loss


def data_of(trainer: Any, dataset: Any = None, *, batch_size: int | None = None) -> DataLoader[Any]:
    """A Trainer's data in its own order: collated by its collator, columns that its model does not take left out.

    Args:
        trainer: a `transformers.Trainer`.
        dataset: default its training data.
        batch_size: default that of training. Examples are padded to the longest of their batch, as in training.

    Raises ValueError for what has no gradient example by example: a stream; data or a collator that draws (masks,
    augmentation); sequences packed into one row; a tokenizer without a token to pad with. Each says what would do.
    """
    dataset = trainer.train_dataset if dataset is None else dataset
    if dataset is None:
        raise ValueError("data_of: the Trainer has no training data: pass dataset=")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"data_of: a streaming data set ({type(dataset).__name__}) gives its examples no places: pass a map-style "
            "one, such as a list of the examples"
        )
    if len(dataset) == 0:
        raise ValueError("data_of: the data set holds no examples")
    theirs = trainer.get_test_dataloader(dataset)  # its order may be drawn, what it brings is as the model takes it
    size = trainer.args.per_device_train_batch_size if batch_size is None else batch_size
    _check_collator(trainer, theirs.dataset, theirs.collate_fn)
    return DataLoader(theirs.dataset, batch_size=size, shuffle=False, collate_fn=theirs.collate_fn)


def match_loss(trainer: Any, loss: Loss | None = None) -> Matched:
    """The loss of single examples that gives the Trainer's, held against it on a few examples."""
    model: nn.Module = trainer.model
    training = [module for module in model.modules() if module.training]
    loader = data_of(trainer, batch_size=_LOOKED_AT)
    with _drawing_as_before():  # a loader draws a seed for its workers, whether it has any or not
        batch = dict(moved_to(next(iter(loader)), next(model.parameters()).device))
    model.eval()
    try:
        return match(trainer, rows_of(batch, _told(batch)), loss)
    finally:
        for module in training:
            module.training = True


def _told(batch: Mapping[str, Any]) -> Tensor:
    """A few examples of a batch, those with a label that counts where there are any."""
    labels = batch.get("labels")
    rows = torch.arange(batch_length(batch))
    if isinstance(labels, Tensor) and labels.dim() and not labels.is_floating_point():
        counted = (labels != IGNORED).reshape(len(labels), -1)
        counted = (counted[:, 1:] if counted.shape[1] > 1 else counted).any(1).cpu()
        rows = rows[counted] if bool(counted.any()) else rows
    return rows[:_COMPARED]


def _check_model(model: nn.Module) -> None:
    quantised = getattr(model, "quantization_method", None) or getattr(model, "is_quantized", False)
    whole = [name for name, p in model.named_parameters() if not p.is_floating_point() and not p.is_complex()]
    if quantised or whole:
        what = getattr(quantised, "value", quantised)
        raise ValueError(
            f"influence_of: the model is quantised ({whole[0] + ' holds integers' if whole else what}), and what it "
            "computes is not what its gradients are of: load its base in float32 or bfloat16, with the same adapters"
        )


def _check_collator(trainer: Any, dataset: Any, collate: Callable[[Any], Any]) -> None:
    """Raises ValueError for a collator, or data, that draws, packs or cannot pad."""
    indices = range(min(_LOOKED_AT, len(dataset)))
    with _drawing_as_before():
        found = [_collated(trainer, collate, [dataset[i] for i in indices]) for _ in range(_COLLATIONS)]
    first = found[0]
    if not isinstance(first, Mapping):
        raise ValueError(
            f"data_of: the collator must bring mappings of tensors, as a Trainer's does, got {type(first)}"
        )
    collator = getattr(trainer, "data_collator", collate)
    drawn = [
        key
        for key, value in first.items()
        if isinstance(value, Tensor) and not all(_same(value, other.get(key)) for other in found[1:])
    ]
    if drawn or getattr(collator, "mlm", False):
        what = f"{drawn[0]!r} differs between two readings of the same examples" if drawn else "mlm=True"
        raise ValueError(
            f"data_of: the collator ({type(collator).__name__}) or the data set draws ({what}), and a loss that is "
            "drawn anew each time has no gradient: draw masks or augmentation once, and keep the result as the data set"
        )
    n, rows = len(indices), batch_length(first)
    positions = first.get("position_ids")
    begins = isinstance(positions, Tensor) and positions.dim() == 2 and bool((positions[:, 1:] == 0).any())
    if rows != n or begins:
        what = f"{n} examples into {rows} rows" if rows != n else "several sequences into one row"
        raise ValueError(
            f"data_of: the collator or the data set packs {what}, so that no row is an example: use a collator that "
            "pads, and data with one sequence for each example (packing=False)"
        )


def _collated(trainer: Any, collate: Callable[[Any], Any], examples: list[Any]) -> Any:
    try:
        return collate(examples)
    except (ValueError, TypeError) as error:
        tokenizer = getattr(trainer, "processing_class", None) or getattr(trainer.data_collator, "tokenizer", None)
        if tokenizer is not None and getattr(tokenizer, "pad_token", "") is None:
            raise ValueError(
                f"data_of: {type(tokenizer).__name__} has no padding token, and texts of several lengths make no batch "
                "without: tokenizer.pad_token = tokenizer.eos_token will do, with an attention mask and labels of -100 "
                "where there is padding"
            ) from error
        raise


def _same(value: Tensor, other: Any) -> bool:
    return isinstance(other, Tensor) and value.shape == other.shape and torch.equal(value, other)


@contextmanager
def _drawing_as_before() -> Iterator[None]:
    """Leaves the states of the global generators as they were."""
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002  what collators draw from
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)  # noqa: NPY002
