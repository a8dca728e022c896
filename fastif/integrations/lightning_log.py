"""A callback of Lightning that keeps a TrainingLog."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastif.data.batches import batch_length
from fastif.integrations.watching import SAME, Order, watch
from fastif.replay import TrainingLog

_NAMES = ("lightning.pytorch", "pytorch_lightning")  # of one package: the one that is in use, else one that is there


def _callback() -> Any:
    there = [name for name in _NAMES if find_spec(name.partition(".")[0]) is not None]
    if not there:
        raise ImportError("LightningLog needs Lightning: pip install lightning")
    return importlib.import_module(min(there, key=lambda name: name not in sys.modules)).Callback


class LightningLog(_callback()):
    """Records what a Trainer of Lightning does as a `TrainingLog`: learning rates, order, checkpoints.

        recorder = fastif.integrations.LightningLog(every=100)
        lightning.pytorch.Trainer(max_epochs=3, callbacks=[recorder]).fit(module, loader)
        replay = fastif.Replay(recorder.training_log, module, dataset, "cross_entropy")

    Rows are places in the loader's data set. A step's gradient is that of (1/b) Σ_i w_i ℓ_i over its b examples: the
    weights w say what Lightning makes of the losses, which is to accumulate several batches and to clip, by
    min(1, gradient_clip_val/norm). Replay takes that factor as a constant. What `training_step` returns is taken for
    the mean over a batch's examples of what `loss=` of `Replay` gives, and where it is not, `Replay` says so.

    Args:
        every, out: as for `TrainingLog`.
        model: of the LightningModule what data are called with, such as `module.network`, where that is another module
            than itself: it is what `Replay` is given. All that the optimizer moves must be in it.
        weights: a function of a batch, where `training_step` returns (1/b) Σ_i w_i ℓ_i: its w, [b].

    Raises ValueError, one sentence each, for what could not be run again: manual optimization, 16 bits, several
    processes, gradients clipped by their values, a training that goes on from a checkpoint, more than one loader, and
    one that draws its batches with something else than a sampler; and for whatever `TrainingLog` refuses: BatchNorm in
    train mode, dropout that is not zero, another optimizer than SGD, Adam or AdamW of torch. ImportError without
    Lightning, whose two names, lightning.pytorch and pytorch_lightning, both serve.
    """

    def __init__(
        self,
        every: int = 100,
        out: str | Path | None = None,
        *,
        model: nn.Module | None = None,
        weights: Callable[[Any], Any] | None = None,
    ):
        super().__init__()
        self._every, self._out, self._model, self._weights = every, out, model, weights
        self._log: TrainingLog | None = None
        self._orders: dict[int, tuple[Any, Order]] = {}  # of loaders, which are held, so that no other has their id
        self._parts: list[tuple[Tensor, Tensor]] = []  # of the batches since the last step: rows, weights over b
        self._undo: list[Callable[[], None]] = []
        self._never_clips = False

    def __repr__(self) -> str:
        return f"LightningLog({'nothing recorded yet' if self._log is None else repr(self._log)})"

    @property
    def training_log(self) -> TrainingLog:
        """What was recorded: `log` is the name of a method that Lightning puts there. ValueError before a training."""
        if self._log is None:
            raise ValueError("LightningLog: nothing was recorded yet; call trainer.fit(...) first")
        return self._log

    # --------------------------------------------------------------------------------------------- events of Lightning

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what cannot be recorded, and looks on from now on: loaders draw ahead before the training starts."""
        if stage != "fit":
            return
        _check_trainer(trainer, pl_module)
        self._orders, self._parts = {}, []
        theirs = type(pl_module).configure_gradient_clipping.__module__.startswith(_NAMES)  # not the user's own
        self._never_clips = theirs and not trainer.gradient_clip_val
        self._undo = [
            watch(trainer.strategy, "process_dataloader", lambda own, loader: self._see(trainer, own(loader))),
            watch(pl_module, "configure_gradient_clipping", self._clip),
        ]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins a log."""
        if trainer.global_step:
            raise ValueError(
                f"LightningLog: training goes on from step {trainer.global_step} of a checkpoint, and what came before "
                "was not recorded: train from the beginning"
            )
        self._log = TrainingLog(pl_module if self._model is None else self._model, self._every, self._out)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Notes which examples a batch holds."""
        del pl_module, batch_idx
        _, order = self._orders.get(id(trainer.train_dataloader), (None, None))
        if order is None:
            raise ValueError(
                f"LightningLog: the training data are {type(trainer.train_dataloader).__name__}, and which examples "
                "are in a batch is not seen: pass one DataLoader"
            )
        n = batch_length(batch[0] if isinstance(batch, list | tuple) else batch)
        given = torch.ones(n) if self._weights is None else torch.as_tensor(self._weights(batch)).detach().cpu()
        if given.shape != (n,):
            raise ValueError(f"LightningLog: weights must give [b={n}] for a batch, got {list(given.shape)}")
        self._parts.append((order.take(n), given.double() / (n * trainer.accumulate_grad_batches)))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Keeps where the training ended."""
        del trainer, pl_module
        _ = self.training_log.final

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leaves Lightning and the loaders as they were."""
        del trainer, pl_module, stage
        while self._undo:
            self._undo.pop()()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Does the same where the training fails."""
        del exception
        self.teardown(trainer, pl_module, "fit")

    # --------------------------------------------------------------------------------------------------------- watching

    def _see(self, trainer: Any, loader: Any) -> Any:
        """Has the order noted in which a loader of training data draws."""
        if trainer.training:
            order = Order.of(loader, "LightningLog", "a DataLoader with batch_size= and a sampler or shuffle= will do")
            self._orders[id(loader)] = loader, order
            self._undo.append(lambda: setattr(loader.batch_sampler, "sampler", order.sampler))
        return loader

    def _clip(self, own: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Notes the step: Lightning clips last, and in any case asks its module to."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        before = None if self._never_clips else _norm_of(optimizer)
        own(optimizer, *args, **kwargs)
        after = None if self._never_clips else _norm_of(optimizer)
        clipped = 1.0 if before is None or after is None or after == before else after / before
        rows = torch.cat([rows for rows, _ in self._parts])
        weights = torch.cat([weights for _, weights in self._parts]) * len(rows) * clipped
        self._parts = []
        same = float((weights - 1).abs().max()) < SAME
        self.training_log.note(optimizer, rows, None if same else weights)


def _norm_of(optimizer: Any) -> float:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return float(nn.utils.get_total_norm(gradients))


def _check_trainer(trainer: Any, module: Any) -> None:
    refused = {
        "manual optimization": (
            not module.automatic_optimization,
            "it steps where nobody sees it: call fastif.TrainingLog.step in training_step",
        ),
        f"precision={trainer.precision!r}": (
            trainer.precision not in ("32-true", "64-true"),
            "16 bits round as no second run does",
        ),
        "several processes": (trainer.world_size > 1, "one log sees one process"),
        "gradients clipped by their values": (
            trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value",
            "that is no weight of examples: clip them by their norm",
        ),
    }
    for name, (there, why) in refused.items():
        if there:
            raise ValueError(f"LightningLog: a training with {name} cannot be run again ({why})")
