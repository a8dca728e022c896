"""A training by Lightning is in its log: computed again from it, step by step, it gives the same parameters."""

import importlib
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastif
from fastif import integrations

NAMES = ("lightning.pytorch", "pytorch_lightning")


@pytest.fixture(params=NAMES, scope="module")
def lightning(request):
    """Lightning by one of its names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(request.param.partition(".")[0], reason=f"needs {request.param}")
        return importlib.import_module(request.param)


def net(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3))


def data(n=22):
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, torch.arange(n) % 3)


def module_of(lightning, optimizer="sgd", dropout=0.0, weigh=None):
    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = net(dropout)

        def forward(self, x):
            return self.network(x)

        def training_step(self, batch, batch_idx):
            losses = nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none")
            return losses.mean() if weigh is None else (losses * weigh(batch)).mean()

        def validation_step(self, batch, batch_idx):
            self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self):
            if optimizer == "adamw":
                return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
            made = torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-3)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(made, 10)
            return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Classifier()


def trainer_of(lightning, folder, recorder, **extra):
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, logger=False)
    where = dict(accelerator="cpu", devices=1, default_root_dir=folder)
    return lightning.Trainer(callbacks=[recorder], **{"max_epochs": 2, **quiet, **where, **extra})


def trained(lightning, folder, recorder, module, loader, validation=None, ckpt_path=None, **extra):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="(lightning|pytorch_lightning)")
        warnings.filterwarnings("ignore", message=".*num_workers.*|.*LeafSpec.*")
        trainer = trainer_of(lightning, folder, recorder, **extra)
        trainer.fit(module, loader, validation, ckpt_path=ckpt_path)
    return trainer


def weigh(batch):
    return 1 + batch[1].double()


@pytest.mark.parametrize(
    ("extra", "how"),
    [
        ({}, {}),
        ({"gradient_clip_val": 0.2}, {"optimizer": "adamw"}),
        ({"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, {}),
        ({"limit_train_batches": 3, "max_epochs": 3}, {"workers": 2}),
        ({"num_sanity_val_steps": 1}, {"weigh": weigh, "validated": True}),
    ],
    ids=["sgd, schedule", "adamw, clipped", "accumulated, clipped", "workers, epochs cut short", "weighed, validated"],
)
def test_a_training_is_computed_again_from_its_log(lightning, extra, how, tmp_path):
    """The judge is `Replay.verify`: norms of all gradients, parameters at checkpoints and at the end."""
    how = dict(how)
    examples, workers, validated = data(), how.pop("workers", 0), how.pop("validated", False)
    loader = DataLoader(examples, batch_size=4, shuffle=True, num_workers=workers)
    validation = DataLoader(data(6), batch_size=3) if validated else None
    module = module_of(lightning, **how)
    recorder = integrations.LightningLog(every=3, weights=how.get("weigh"))
    with pytest.raises(ValueError, match="nothing was recorded yet"):
        _ = recorder.training_log
    sampler = loader.batch_sampler.sampler
    trainer = trained(lightning, tmp_path, recorder, module, loader, validation, **extra)
    assert len(recorder.training_log.steps) == trainer.global_step
    replay = fastif.Replay(recorder.training_log, module, examples.tensors, "cross_entropy", progress=False)
    replay.verify()
    for name, value in recorder.training_log.parameters().items():
        torch.testing.assert_close(value, module.state_dict()[name])
    assert loader.batch_sampler.sampler is sampler
    assert "configure_gradient_clipping" not in vars(module)
    assert "process_dataloader" not in vars(trainer.strategy)
    if not extra:
        assert recorder.training_log.training_time > 0
        assert {len(step.rows) for step in recorder.training_log.steps} == {4, 2}
        assert torch.cat([step.rows for step in recorder.training_log.steps[:6]]).sort().values.tolist() == list(
            range(22)
        )
    if "gradient_clip_val" in extra:
        assert all(float(step.norm) <= extra["gradient_clip_val"] * 1.0001 for step in recorder.training_log.steps)


def test_a_module_that_clips_in_its_own_way_is_seen(lightning, tmp_path):
    """Lightning knows of no clipping; without it, gradients' norms are not looked at twice."""
    examples, module = data(), module_of(lightning)

    class Clipping(type(module)):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            nn.utils.clip_grad_norm_(self.parameters(), 0.1)

    module.__class__ = Clipping
    recorder = integrations.LightningLog(every=3)
    trained(lightning, tmp_path, recorder, module, DataLoader(examples, batch_size=4, shuffle=True))
    assert all(float(step.norm) <= 0.1001 for step in recorder.training_log.steps)
    fastif.Replay(recorder.training_log, module, examples.tensors, "cross_entropy", progress=False).verify()


def test_scores_of_the_network_inside_a_module(lightning, tmp_path):
    examples, module = data(), module_of(lightning)
    recorder = integrations.LightningLog(out=tmp_path / "log", model=module.network)
    trained(lightning, tmp_path, recorder, module, DataLoader(examples, batch_size=4, shuffle=True))
    recorder.training_log.save()
    log = fastif.TrainingLog.load(tmp_path / "log")
    replay = fastif.Replay(log, module.network, examples.tensors, "cross_entropy", progress=False)
    scores = replay.scores(data(2).tensors, examples.tensors)
    assert scores.shape == (2, 22)
    assert float(scores.abs().max()) > 0


@pytest.mark.parametrize("wrong", ["rows", "weights"])
def test_a_log_of_something_else_is_found(lightning, wrong, tmp_path):
    """The first test can fail: with the rows of two steps exchanged, or weights that nobody told of."""
    examples, module = data(), module_of(lightning, weigh=weigh if wrong == "weights" else None)
    recorder = integrations.LightningLog()
    trained(lightning, tmp_path, recorder, module, DataLoader(examples, batch_size=4, shuffle=True))
    steps = recorder.training_log.steps
    if wrong == "rows":
        steps[0], steps[1] = (a._replace(rows=b.rows) for a, b in ((steps[0], steps[1]), (steps[1], steps[0])))
    with pytest.raises(fastif.NotReproduced, match="step 0"):
        fastif.Replay(recorder.training_log, module, examples.tensors, "cross_entropy", progress=False).verify()


def test_a_second_training_is_another_log(lightning, tmp_path):
    examples, module = data(), module_of(lightning)
    loader, recorder = DataLoader(examples, batch_size=4, shuffle=True), integrations.LightningLog()
    trained(lightning, tmp_path, recorder, module, loader)
    first = recorder.training_log
    trained(lightning, tmp_path, recorder, module, loader)
    assert recorder.training_log is not first
    fastif.Replay(recorder.training_log, module, examples.tensors, "cross_entropy", progress=False).verify()


class Pairs(torch.utils.data.Sampler):
    """Batches of a sampler's own."""

    def __init__(self):
        super().__init__()

    def __iter__(self):
        yield from ([0, 1], [2, 3])

    def __len__(self):
        return 2


@pytest.mark.parametrize(
    ("extra", "how", "told"),
    [
        ({"precision": "bf16-mixed"}, {}, "precision='bf16-mixed' cannot be run again"),
        ({"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, {}, "clip them by their norm"),
        ({}, {"dropout": 0.1}, "Dropout, p=0.1.* set p=0"),
        ({}, {"loader": DataLoader(data(), batch_sampler=Pairs())}, "draws batches with Pairs.* will do"),
        ({}, {"loader": [DataLoader(data(), 4), DataLoader(data(), 4)]}, "the training data are list.* one DataLoader"),
        ({}, {"weigh": weigh, "weights": lambda _: torch.ones(3)}, r"weights must give \[b=4\] for a batch, got \[3\]"),
    ],
)
def test_what_cannot_be_run_again_is_refused(lightning, extra, how, told, tmp_path):
    how = dict(how)
    loader = how.pop("loader", None) or DataLoader(data(), batch_size=4)
    recorder = integrations.LightningLog(weights=how.pop("weights", None))
    module = module_of(lightning, **how)
    with pytest.raises(ValueError, match=told):
        trained(lightning, tmp_path, recorder, module, loader, **extra)
    assert "configure_gradient_clipping" not in vars(module)


def test_manual_optimization_and_checkpoints_are_refused(lightning, tmp_path):
    module, loader = module_of(lightning), DataLoader(data(), batch_size=4)
    trainer = trained(lightning, tmp_path, integrations.LightningLog(), module, loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    recorder = integrations.LightningLog()
    with pytest.raises(ValueError, match="goes on from step 12 of a checkpoint"):
        trained(lightning, tmp_path, recorder, module, loader, max_epochs=4, ckpt_path=tmp_path / "last.ckpt")
    module.automatic_optimization = False
    with pytest.raises(ValueError, match=r"manual optimization .* call fastif.TrainingLog.step in training_step"):
        trained(lightning, tmp_path, recorder, module, loader)
