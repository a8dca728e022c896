"""A callback of transformers' Trainer that keeps a TrainingLog."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback  # pyright: ignore[reportMissingImports]

from fastif.integrations.trainer import data_of, match_loss
from fastif.integrations.trainer_loss import items_of
from fastif.integrations.watching import SAME, Order, watch
from fastif.model.losses import Loss, loss_name
from fastif.replay import TrainingLog


class TrainerLog(TrainerCallback):
    """Records what a Trainer does as a `TrainingLog`: learning rates, order, weights of examples, checkpoints.

    It adds itself to the Trainer's callbacks; `log` is there once training has begun, and `loss` and `data_of(trainer)`
    are what `Replay` takes beside it:

        recorder = fastif.integrations.TrainerLog(trainer, every=100)
        trainer.train()
        replay = fastif.Replay(recorder.log, trainer.model, fastif.integrations.data_of(trainer), recorder.loss)

    A step's gradient is that of (1/b) Σ_i w_i ℓ_i over its b examples. The weights w say what the Trainer does with
    the losses of single examples: its mean over tokens, the accumulation over several batches, and clipping, which
    multiplies all of them by min(1, max_grad_norm/(norm + 1e-6)). Replay takes that factor as a constant.

    Args:
        trainer: a `transformers.Trainer` that has not begun to train.
        every, out: as for `TrainingLog`.
        loss: as for `influence_of`.

    Raises ValueError, one sentence each, for what could not be run again: training in 16 bits, over several processes
    or GPUs, from a checkpoint, with noise on the embeddings, and `load_best_model_at_end`; and for whatever `data_of`,
    `influence_of` and `TrainingLog` refuse: a collator that draws, dropout that is not zero, another optimizer than
    SGD, Adam or AdamW of torch.
    """

    def __init__(self, trainer: Any, every: int = 100, out: str | Path | None = None, *, loss: Loss | None = None):
        _check_arguments(trainer)
        self._trainer, self._every, self._out = trainer, every, out
        self._matched = match_loss(trainer, loss)
        self.loss: Loss = self._matched.loss
        self._log: TrainingLog | None = None
        self._order: Order | None = None
        self._parts: list[tuple[Tensor, Tensor]] = []  # of the batches since the last step: rows, weights over b
        self._clipped = 1.0
        self._undo: list[Callable[[], None]] = []
        data_of(trainer)  # refuses what it refuses now, not after the training
        trainer.add_callback(self)

    def __repr__(self) -> str:
        recorded = "nothing recorded yet" if self._log is None else repr(self._log)
        return f"TrainerLog({recorded}, loss={loss_name(self.loss)!r})"

    @property
    def log(self) -> TrainingLog:
        """What was recorded. Raises ValueError before the training."""
        if self._log is None:
            raise ValueError("TrainerLog: nothing was recorded yet; call trainer.train() first")
        return self._log

    # ------------------------------------------------------------------------------------------------ events of Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins a log."""
        del args, control
        if state.global_step:
            raise ValueError(
                f"TrainerLog: training goes on from step {state.global_step} of a checkpoint, and what came before was "
                "not recorded: train from the beginning"
            )
        self._log = TrainingLog(self._trainer.model, self._every, self._out)
        self._order = Order.of(
            kwargs["train_dataloader"], "TrainerLog", "train_sampling_strategy='random' or 'sequential' will do"
        )
        self._parts = []
        self._undo = [
            watch(self._trainer, "training_step", self._training_step),
            watch(self._trainer.accelerator, "clip_grad_norm_", self._clip),
        ]

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An epoch's order begins anew; what the one before left out is forgotten."""
        del args, state, control, kwargs
        assert self._order is not None
        self._order.drawn.clear()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Notes the step."""
        del args, state, control
        rows = torch.cat([rows for rows, _ in self._parts])
        weights = torch.cat([weights for _, weights in self._parts]) * len(rows) * self._clipped
        self._parts, self._clipped = [], 1.0
        optimizer = kwargs["optimizer"]
        same = float((weights - 1).abs().max()) < SAME
        self.log.note(getattr(optimizer, "optimizer", optimizer), rows, None if same else weights)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps where the training ended."""
        del args, state, kwargs
        if control.should_training_stop:
            _ = self.log.final

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves the Trainer as it was."""
        del args, state, control, kwargs
        _ = self.log.final
        while self._undo:
            self._undo.pop()()

    # --------------------------------------------------------------------------------------------------------- watching

    def _training_step(self, own: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        assert self._order is not None
        trainer, (_, mean, by_items) = self._trainer, self._matched
        items = items_of(inputs, mean)
        rows = self._order.take(len(items))
        if by_items and num_items_in_batch is not None:
            whole = float(num_items_in_batch)
        else:
            whole = float(items.sum())
            scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
            if scaled is None:
                scaled = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
                scaled = scaled or trainer.compute_loss_func is not None
            whole *= 1 if scaled else trainer.current_gradient_accumulation_steps
        self._parts.append((rows, torch.full((len(rows),), 1 / whole, dtype=torch.float64)))
        return own(model, inputs, num_items_in_batch)

    def _clip(self, own: Any, parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
        norm = own(parameters, max_norm, *args, **kwargs)
        if max_norm < float("inf"):
            self._clipped = min(1.0, max_norm / (float(norm) + 1e-6))
        return norm


def _check_arguments(trainer: Any) -> None:
    args = trainer.args
    refused = {
        "bf16=True": (args.bf16 or getattr(args, "bf16_full_eval", False), "16 bits round as no second run does"),
        "fp16=True": (args.fp16, "16 bits round as no second run does"),
        "load_best_model_at_end=True": (args.load_best_model_at_end, "the log's end would not be the training's"),
        "neftune_noise_alpha": (getattr(trainer, "neftune_noise_alpha", None), "the noise is drawn"),
        "several processes": (args.world_size > 1, "one log sees one process"),
        "several GPUs": (args.n_gpu > 1, "each would have a part of the batch"),
        "DeepSpeed": (getattr(trainer, "is_deepspeed_enabled", False), "it keeps the optimizer's state to itself"),
        "FSDP": (getattr(trainer, "is_fsdp_enabled", False), "it keeps the parameters in parts"),
        "torch_compile=True": (getattr(args, "torch_compile", False), "compiled gradients round in another way"),
    }
    for name, (there, why) in refused.items():
        if there:
            raise ValueError(f"TrainerLog: a training with {name} cannot be run again ({why}): record one without")
