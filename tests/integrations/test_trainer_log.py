"""A Trainer's training is in its log: computed again from it, step by step, it gives the same parameters."""

import pytest
import torch

import fastif
from fastif.integrations import data_of

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="a Trainer needs accelerate")

from fastif.integrations import TrainerLog
from tests.helpers.trainers import classifier, labelled, language_model, language_trainer, settings, texts


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"max_grad_norm": 0.0, "optim": "sgd", "lr_scheduler_type": "cosine"},
        {"max_grad_norm": 0.05, "gradient_accumulation_steps": 2, "weight_decay": 0.1},
        {"label_smoothing_factor": 0.1, "dataloader_drop_last": True},
    ],
    ids=["defaults", "sgd, not clipped", "accumulated, clipped", "smoothed, last batch left out"],
)
def test_a_training_is_computed_again_from_its_log(extra, tmp_path):
    """The judge is `Replay.verify`: norms of all gradients, parameters at checkpoints and at the end."""
    trainer = language_trainer(tmp_path, num_train_epochs=2, **extra)
    recorder = TrainerLog(trainer, every=3)
    with pytest.raises(ValueError, match="nothing was recorded yet"):
        _ = recorder.log
    trainer.train()
    assert len(recorder.log.steps) == trainer.state.global_step
    assert recorder.log.steps[0].numbers[0][0] == 1e-2  # the rate of the schedule
    replay = fastif.Replay(recorder.log, trainer.model, data_of(trainer), recorder.loss, progress=False)
    replay.verify()
    assert replay.deviations is not None
    assert max(replay.deviations) < 2e-3
    for name, value in recorder.log.parameters().items():
        torch.testing.assert_close(value, dict(trainer.model.state_dict())[name])
    assert "training_step" not in vars(trainer)
    assert "clip_grad_norm_" not in vars(trainer.accelerator)


def test_a_regression_accumulated_over_batches(tmp_path):
    """Its loss does not take the Trainer's count of items, and gradients of batches are added without being divided."""
    from transformers import Trainer

    data = labelled(torch.randn(10, generator=torch.Generator().manual_seed(2)))
    arguments = settings(tmp_path, gradient_accumulation_steps=3, optim="sgd", max_grad_norm=0.0)
    trainer = Trainer(classifier(num_labels=1), arguments, train_dataset=data)
    recorder = TrainerLog(trainer, every=2)
    trainer.train()
    replay = fastif.Replay(recorder.log, trainer.model, data_of(trainer), recorder.loss, progress=False)
    replay.verify()
    assert recorder.loss == "mse"


def test_another_order_in_the_log_is_found(tmp_path):
    """The test above can fail: with the rows of two steps exchanged, the norms of gradients tell."""
    trainer = language_trainer(tmp_path)
    recorder = TrainerLog(trainer)
    trainer.train()
    steps = recorder.log.steps
    steps[0], steps[1] = (a._replace(rows=b.rows) for a, b in ((steps[0], steps[1]), (steps[1], steps[0])))
    with pytest.raises(fastif.NotReproduced, match="step 0"):
        fastif.Replay(recorder.log, trainer.model, data_of(trainer), recorder.loss, progress=False).verify()


def test_scores_of_a_recorded_training(tmp_path):
    trainer = language_trainer(tmp_path)
    recorder = TrainerLog(trainer, out=tmp_path / "log")
    trainer.train()
    recorder.log.save()
    log = fastif.TrainingLog.load(tmp_path / "log")
    train = data_of(trainer)
    replay = fastif.Replay(log, trainer.model, train, recorder.loss, progress=False)
    scores = replay.scores(data_of(trainer, texts(2)), train)
    assert scores.shape == (2, 18)
    assert bool(scores.isfinite().all())
    assert float(scores.abs().max()) > 0


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"bf16": True}, "bf16=True cannot be run again"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
            "load_best_model_at_end",
        ),
    ],
)
def test_what_cannot_be_run_again_is_refused_before_the_training(extra, told, tmp_path):
    from transformers import Trainer

    trainer = Trainer(language_model(), settings(tmp_path, **extra), train_dataset=texts(), eval_dataset=texts(2))
    with pytest.raises(ValueError, match=told):
        TrainerLog(trainer)


def test_dropout_is_refused_in_the_first_step(tmp_path):
    trainer = language_trainer(tmp_path, language_model(dropout=0.1))
    TrainerLog(trainer)
    with pytest.raises(ValueError, match="Dropout, p=0.1.* set p=0"):
        trainer.train()


def test_batches_that_are_not_seen_are_refused(tmp_path):
    trainer = language_trainer(tmp_path, train_sampling_strategy="batch_rebalance")
    TrainerLog(trainer)
    with pytest.raises(ValueError, match="train_sampling_strategy='random' or 'sequential' will do"):
        trainer.train()
