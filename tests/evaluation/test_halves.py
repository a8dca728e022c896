"""Networks on halves: complementary, seeded, kept file by file, the same bits in processes and after a kill."""

import pytest
import torch
from torch import nn

from fastif import Networks
from fastif.evaluation import train_halves
from fastif.evaluation.halves import draw_halves
from fastif.evaluation.trainings import Trainings
from fastif.files import Damaged
from tests.helpers.retrainings import NET

N = 12
HOW = dict(seed=3, progress=False)


def same(a: Networks, b: Networks) -> bool:
    states = all(
        torch.equal(one[name], other[name]) for one, other in zip(a.states, b.states, strict=True) for name in one
    )
    return states and all(torch.equal(one, other) for one, other in zip(a.kept, b.kept, strict=True))


def test_networks_are_those_trained_by_hand_on_complementary_halves():
    networks = train_halves(NET, 11, 3, training_time=2.5, **HOW)
    assert networks.training_time == 2.5
    for first, second in zip(networks.kept[::2], networks.kept[1::2], strict=True):
        assert torch.equal(torch.cat([first, second]).sort().values, torch.arange(11))
        assert (len(first), len(second)) == (5, 6)
    tasks = draw_halves(11, 3, 3)
    assert len({task.seed for task in tasks}) == 6
    assert min(task.seed for task in tasks) >= 1 << 30
    for task, state in zip(tasks, networks.states, strict=True):
        torch.manual_seed(task.seed)
        want = NET(task.kept, task.seed).state_dict()
        assert all(torch.equal(state[name], want[name]) for name in want)
    assert same(train_halves(NET, 11, 2, **HOW), networks.first(4)._replace(training_time=None))
    assert not torch.equal(train_halves(NET, 11, 1, seed=4, progress=False).kept[0], networks.kept[0])


def test_a_folder_is_resumed_network_by_network(tmp_path, monkeypatch):
    whole = train_halves(NET, N, 2, **HOW)
    trained: list[int] = []
    train = Trainings.train

    def dies_at_the_second(self, task):
        trained.append(task.number)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(self, task)

    monkeypatch.setattr(Trainings, "train", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        train_halves(NET, N, 2, out=tmp_path, **HOW)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert same(train_halves(NET, N, 2, out=tmp_path, resume=True, **HOW), whole)
    assert trained == [0, 1, 1, 2, 3]
    assert same(train_halves(NET, N, 3, out=tmp_path, resume=True, **HOW).first(4), whole)
    assert trained == [0, 1, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="holds networks already"):
        train_halves(NET, N, 2, out=tmp_path, **HOW)
    with pytest.raises(ValueError, match="n was 12, is 13"):
        train_halves(NET, 13, 2, out=tmp_path, resume=True, **HOW)
    with pytest.raises(ValueError, match="train_fn: .* was"):
        train_halves(diverged, N, 2, out=tmp_path, resume=True, **HOW)


@pytest.mark.parametrize("place", [-3, 60])
def test_a_changed_or_swapped_file_is_damaged(tmp_path, place):
    train_halves(NET, N, 1, out=tmp_path, **HOW)
    first, second = (tmp_path / f"network-00{number}.safetensors" for number in (0, 1))
    data = bytearray(second.read_bytes())
    data[place] ^= 4
    second.write_bytes(data)
    with pytest.raises(Damaged, match=second.name):
        train_halves(NET, N, 1, out=tmp_path, resume=True, **HOW)
    second.write_bytes(first.read_bytes())
    with pytest.raises(Damaged, match=r"network-001.safetensors is damaged: it is network 0's"):
        train_halves(NET, N, 1, out=tmp_path, resume=True, **HOW)


@pytest.mark.slow
def test_processes_give_the_same_bits():
    assert same(train_halves(NET, N, 1, processes=2, **HOW), train_halves(NET, N, 1, **HOW))


def diverged(kept, seed):
    model = NET(kept, seed)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.inf)
    return model


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"n": 1}, ValueError, "n must be an integer >= 2, got 1"),
        ({"pairs": 0}, ValueError, "pairs must be an integer >= 1"),
        ({"seed": -1}, ValueError, "seed must be an integer >= 0"),
        ({"training_time": 0.0}, ValueError, "training_time must be a number > 0"),
        ({"key": "a"}, ValueError, "key='a' needs out="),
        ({"processes": 0}, ValueError, "train_halves: processes must be an integer >= 1"),
        ({"train_fn": nn.Linear(2, 2)}, TypeError, "takes|positional"),
        ({"train_fn": lambda kept, seed: 3}, TypeError, "train_halves: train_fn must return an nn.Module, got int"),
        ({"train_fn": 3}, TypeError, "train_fn must be a function"),
        ({"train_fn": diverged}, ValueError, r"train_halves: .* of network 0 \(seed \d+\) is not finite"),
    ],
)
def test_refused(change, kind, message):
    arguments = {"train_fn": NET, "n": N, "pairs": 1, "progress": False, **change}
    with pytest.raises(kind, match=message):
        train_halves(**arguments)
