"""What a log keeps, what it refuses, and that it comes back from disk as it was."""

import json

import pytest
import torch
from torch import nn

from fastif.files import Damaged
from fastif.replay import Replay, TrainingLog
from tests.helpers.trainings import OPTIMIZERS, batches, data, network, recorded, train

ORDER = batches(torch.arange(24), 8, 3)


def stepped(model, optimizer, log, rows=(0, 1), weights=None):
    x, y = data(dtype=next(model.parameters()).dtype)
    optimizer.zero_grad()
    rows = torch.as_tensor(rows)
    nn.functional.cross_entropy(model(x[rows.clamp(min=0)]), y[rows.clamp(min=0)]).backward()
    log.step(optimizer, rows, weights)


def test_time_of_a_schedule():
    model, log = recorded(OPTIMIZERS["momentum"], data(), ORDER)
    rates = [0.1 * (1 + (1 - abs(2 * t / 9 - 1))) / 0.1 for t in range(9)]
    assert log.rates() == pytest.approx(rates)
    assert log.training_time == pytest.approx(sum(rates))
    assert log.weight_decay == 1e-2
    assert (log.damping.time, log.damping.weight_decay) == (log.training_time, 1e-2)
    assert log.starts == [0, 7]
    assert log.kept.tolist() == list(range(24))
    assert torch.equal(log.parameters()["2.bias"], model[2].bias)
    torch.testing.assert_close(log.parameters(0)["0.weight"], network()[0].weight.detach())


def test_time_that_is_none():
    _, log = recorded(OPTIMIZERS["Adam"], data(), ORDER)
    with pytest.raises(ValueError, match="no training time of Adam"):
        _ = log.training_time
    model = network()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.2}], lr=0.1
    )
    log = TrainingLog(model)
    stepped(model, optimizer, log)
    with pytest.raises(ValueError, match="groups differ in step 0: .* 0.1, 0.2"):
        _ = log.training_time


@pytest.mark.parametrize("optimizer", ["momentum", "Adam"])
def test_a_log_that_begins_in_the_middle_of_a_training(optimizer):
    """With an optimizer that has moved already: its state and its count of steps are found."""
    x, y = data()
    model = network()
    moving = OPTIMIZERS[optimizer](model.parameters())
    log = TrainingLog(model, every=2)
    for number, rows in enumerate(ORDER):
        moving.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        if number < 4:
            moving.step()
        else:
            log.step(moving, rows)
    assert len(log.steps) == 5
    assert float(log.point(0).state[0].abs().max()) > 0
    assert Replay(log, model, (x, y), progress=False).verify() == pytest.approx([0], abs=1e-12)


def test_a_step_is_the_optimizers():
    logged, _ = recorded(OPTIMIZERS["AdamW"], data(), ORDER)
    plain = train(network(), OPTIMIZERS["AdamW"], data(), ORDER)
    for a, b in zip(logged.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_mixes_or_draws_is_refused_by_name():
    for module, words in (
        (nn.BatchNorm1d(5), r"'1' \(BatchNorm1d\) is in train mode: a batch's examples"),
        (nn.Dropout(0.2), r"'1' \(Dropout, p=0.2\) is in train mode and draws"),
    ):
        model = nn.Sequential(nn.Linear(3, 5), module, nn.Linear(5, 3)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=words):
            stepped(model, optimizer, TrainingLog(model))
        if isinstance(module, nn.Dropout):
            module.p = 0
        else:
            module.eval()
        stepped(model, optimizer, TrainingLog(model))


def test_steps_that_do_not_fit_are_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    log = TrainingLog(model, every=1)
    with pytest.raises(ValueError, match="no parameter of the optimizer has a gradient"):
        log.step(optimizer, [0])
    for rows, words in (([], "at least one"), ([[0]], "int64"), ([0.5], "float32"), ([-1, 0], ">= 0, got -1")):
        with pytest.raises(ValueError, match=f"rows must be.*{words}"):
            log.step(optimizer, rows)
    with pytest.raises(ValueError, match=r"weights must be finite, \[b=2\]"):
        log.step(optimizer, [0, 1], [1.0])
    stepped(model, optimizer, log)
    with pytest.raises(ValueError, match="step 1 is of another optimizer than step 0"):
        stepped(model, torch.optim.SGD(model.parameters(), lr=0.1), log)
    model[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"step 1 has gradients of other parameters than step 0 \('0.bias'\)"):
        stepped(model, optimizer, log)
    model[0].bias.requires_grad_()
    model[1].eval()
    with pytest.raises(ValueError, match="'1' is not in the mode"):
        stepped(model, optimizer, log)
    model[1].train()
    _ = log.final
    with torch.no_grad():
        model[0].bias.add_(1)
    with pytest.raises(ValueError, match="parameters changed between steps 0 and this one"):
        stepped(model, optimizer, log)
    with pytest.raises(ValueError, match="every must be an integer >= 1, got 0"):
        TrainingLog(model, every=0)


def test_parameters_that_do_not_fit_are_refused():
    model, other = network(), nn.Linear(3, 3).double()
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    x, y = data()
    nn.functional.cross_entropy(model(x) + other(x), y).backward()
    with pytest.raises(
        ValueError, match=r"moves a parameter of shape \[3, 3\] \(number 4\) that the model does not have"
    ):
        TrainingLog(model).step(optimizer, [0])
    model[0].float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(
        ValueError, match="float32 or float64 on one device, got torch.float32 on cpu, torch.float64 on"
    ):
        TrainingLog(model).step(optimizer, [0])


def test_a_buffer_that_changes_is_refused():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = Counting().double()
    log = TrainingLog(model)
    for _ in range(2):
        stepped(model, torch.optim.SGD(model.parameters(), lr=0.1) if not log.steps else log._optimizer, log)
    with pytest.raises(ValueError, match="'calls' changed during training"):
        _ = log.final


def test_a_log_comes_back_from_disk(tmp_path):
    examples, query = data(), data(4, seed=1)
    weights = torch.linspace(0.5, 1.5, 24, dtype=torch.float64)
    model, log = recorded(OPTIMIZERS["Adam"], examples, ORDER, weights=weights, given=True)
    log.save(tmp_path / "log")
    wanted = Replay(log, model, examples, matrix="hessian", progress=False).scores(query)
    loaded = TrainingLog.load(tmp_path / "log")
    assert torch.equal(Replay(loaded, model, examples, matrix="hessian", progress=False).scores(query), wanted)
    with pytest.raises(ValueError, match="a log that was loaded is complete"):
        loaded.step(torch.optim.SGD(model.parameters(), lr=0.1), [0])
    loaded.save(tmp_path / "again")
    assert TrainingLog.load(tmp_path / "again").steps[3].numbers == log.steps[3].numbers


def test_checkpoints_go_to_the_folder_as_they_are_made(tmp_path):
    model = network()
    log = TrainingLog(model, every=4, out=tmp_path / "log")
    train(model, OPTIMIZERS["momentum"], data(), ORDER, log=log)
    assert len(list((tmp_path / "log").glob("checkpoint-*"))) == 3
    with pytest.raises(FileNotFoundError, match="holds no finished log: there is no log.json"):
        TrainingLog.load(tmp_path / "log")
    log.save()
    same, kept = recorded(OPTIMIZERS["momentum"], data(), ORDER, every=4)
    query = data(4, seed=1)
    wanted = Replay(kept, same, data(), progress=False).scores(query)
    for one in (log, TrainingLog.load(tmp_path / "log")):
        assert torch.equal(Replay(one, model, data(), progress=False).scores(query), wanted)
    with pytest.raises(FileExistsError, match="must be a new or empty folder"):
        TrainingLog(model, out=tmp_path / "log")
    with pytest.raises(ValueError, match="save needs a folder"):
        kept.save()


@pytest.mark.parametrize("name", ["checkpoint-000001", "constants", "final", "steps"])
def test_a_damaged_file_is_refused_by_name(tmp_path, name):
    model, log = recorded(OPTIMIZERS["momentum"], data(), ORDER)
    log.save(tmp_path / "log")
    path = tmp_path / "log" / f"{name}.safetensors"
    data_of = bytearray(path.read_bytes())
    data_of[-1] ^= 1
    path.write_bytes(bytes(data_of))
    with pytest.raises(Damaged, match=rf"{name}.safetensors is damaged: its checksum"):
        Replay(TrainingLog.load(tmp_path / "log"), model, data(), progress=False).verify()
    path.unlink()
    with pytest.raises(Damaged, match="it is missing"):
        Replay(TrainingLog.load(tmp_path / "log"), model, data(), progress=False).verify()


def test_a_changed_index_is_refused(tmp_path):
    _, log = recorded(OPTIMIZERS["momentum"], data(), ORDER)
    log.save(tmp_path / "log")
    path = tmp_path / "log" / "log.json"
    text = path.read_text()
    path.write_text(text.replace('"every": 7', '"every": 8'))
    with pytest.raises(Damaged, match="its checksum does not fit"):
        TrainingLog.load(tmp_path / "log")
    path.write_text(json.dumps({"checksum": ""}))
    with pytest.raises(Damaged, match=r"log.json is damaged"):
        TrainingLog.load(tmp_path / "log")
