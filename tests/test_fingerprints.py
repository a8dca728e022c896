"""Descriptions: the same for what is the same, in any process; others for whatever changes a result; no guesses."""

import ctypes
import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict, deque
from enum import Enum
from functools import partial, wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastif.fingerprints import described, described_model, told_function

REPOSITORY = Path(__file__).parents[1]
SCALE = 2.0
TABLE = {"deep": [{"er": [{"down": [{"at": [0.5]}]}]}]}


def scaled(x):
    return helper(x) * SCALE


def helper(x):
    return nn.functional.relu(x) + TABLE["deep"][0]["er"][0]["down"][0]["at"][0]


class Weighted:
    def __init__(self, weight):
        self.weight = weight

    def of(self, outputs, batch):
        return self.weight * outputs


class Slots:
    __slots__ = ("__own", "a")

    def __init__(self, a):
        self.a, self.__own = a, a + 1


class Colour(Enum):
    RED = 1
    BLUE = 2


class Holder:
    def __init__(self, **held):
        vars(self).update(held)


def nested(depth, end):
    value = end
    for _ in range(depth):
        value = [value]
    return value


def closed(value):
    return lambda x: x + value


def decorated(scale):
    @wraps(helper)
    def wrapper(x):
        return helper(x) * scale

    return wrapper


def made(seed):
    return torch.Generator().manual_seed(seed)


DIFFERENT = {
    "int, float and bool": (1, 1.0, True, "1"),
    "zeros": (0.0, -0.0),
    "bound to another object": (Weighted(1.0).of, Weighted(3.0).of),
    "closures": (closed(1), closed(2), closed([1]), closed(torch.ones(1)), closed(closed(1))),
    "defaults": (partial(helper), lambda x, a=1: x, lambda x, a=2: x, lambda x, *, a=2: x),
    "code": (lambda x: x + 1, lambda x: x + 2, lambda x: x - 1, lambda x: x + SCALE),
    "names read": (lambda x: nn.functional.relu(x), lambda x: nn.functional.gelu(x)),
    "wrapped": (decorated(1), decorated(2)),
    "deep": (nested(50, 1), nested(50, 2), nested(49, 1)),
    "slots": (Slots(1), Slots(2)),
    "sets": ({1, 2}, {1, 3}, frozenset({(1, 2)})),
    "mappings": ({1: 2}, {"1": 2}, {1: 3}, OrderedDict([(1, 2), (2, 3)]), OrderedDict([(2, 3), (1, 2)])),
    "members": (Colour.RED, Colour.BLUE),
    "generators": (made(0), made(1), np.random.default_rng(0), np.random.default_rng(1)),
    "arrays": (np.ones(2), np.ones(2, "f4"), np.ones((2, 1)), np.array(["a"]), np.array([{}, 1], dtype=object)),
    "tensors": (torch.ones(2), torch.ones(2).half(), torch.ones(2).to_sparse() * 2, torch.ones(2) * 1j),
    "C": (torch.relu, torch.tanh, np.add, len, torch.ones(1).sum, torch.zeros(1).sum, torch.Tensor.sum, str.join),
    "models": (nn.Linear(2, 2), nn.Linear(2, 2)),
    "subclasses": (deque([1]), deque([2]), deque([1], 4), Path("a"), Path("b"), b"a", b"b", range(3), range(4)),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_told_apart(name):
    texts = [json.dumps(described(value), sort_keys=True, allow_nan=False) for value in DIFFERENT[name]]
    assert len(set(texts)) == len(texts)


EQUAL = """
import threading, logging, re
from fastif.samplers import random as random_sampler
from tests.test_fingerprints import *
lock = threading.Lock()
log = logging.getLogger("own")
torch.manual_seed(0)

def train(kept, seed):
    from tests.helpers.problems import clusters
    with lock:
        log.info("training")
        print({"a", "b"} & WORDS, re.sub("a", "b", "c"), PATTERN, clusters, file=STREAMS)
    return scaled(kept)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.words, self.lock = torch.tanh, {"x", "y", "z"}, threading.RLock()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    def forward(self, x):
        return self.act(self.inner(x))

WORDS, PATTERN, STREAMS = {f"word {n}" for n in range(20)}, re.compile("a"), None
holder = Holder(a={1, "a", (2,)}, lock=lock, own=None, generator=made(3), slots=Slots(4), colour=Colour.RED, log=log)
holder.own = holder
values = [train, holder, partial(train, seed=Slots(2)), Weighted(torch.ones(3)).of, Net, described_model(Net()),
          random_sampler, Colour, np.random.default_rng(0), nn.LSTM(2, 2), torch.compile(nn.Linear(2, 2)),
          closed(holder), threading.Condition(lock), DIFFERENT["C"], DIFFERENT["subclasses"],
          nn.TransformerEncoderLayer(4, 2).__class__, described_model(nn.TransformerEncoderLayer(4, 2))]
print(json.dumps(described(values), sort_keys=True, allow_nan=False))
"""


def test_descriptions_are_the_same_in_every_process():
    printed = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", EQUAL], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        printed.add(done.stdout)
    assert len(printed) == 1
    assert " at 0x" not in printed.pop()


def test_globals_count_as_deep_as_functions_read_them(monkeypatch):
    before = described(scaled)
    assert described(scaled) == before
    with monkeypatch.context() as patch:
        patch.setitem(TABLE["deep"][0]["er"][0]["down"][0], "at", [0.25])
        assert described(scaled) != before
    assert described(scaled) == before
    for name, value in (("SCALE", 3.0), ("helper", lambda x: x), ("nn", np)):
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[__name__], name, value)
            assert described(scaled) != before
    assert described(scaled)["reads"]["SCALE"] == 2.0


def test_circles_end():
    a, b = [], {}
    a.append(b)
    b["a"] = a
    assert described(a) == described(a)
    own = Holder()
    own.itself = own
    assert described(own) == described(own)


class Net(nn.Module):
    def __init__(self, act=torch.tanh, power=1):
        super().__init__()
        self.linear, self.act, self.power = nn.Linear(3, 3), act, power

    def forward(self, x):
        return self.act(self.linear(x)) ** self.power


class Other(Net):
    def forward(self, x):
        return self.act(self.linear(x)) ** self.power + 0.0


def test_the_code_of_a_model_is_told_apart():
    hooked = Net()
    hooked.linear.register_forward_hook(lambda module, inputs, out: out * 2)
    models = [
        *(nn.Sequential(nn.Linear(3, 3), act) for act in (nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.LeakyReLU(0.2))),
        *(Net(), Net(torch.relu), Net(power=2), Other(), hooked, Net().eval(), nn.Sequential(Net())),
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
        torch.jit.trace(Net(), torch.ones(1, 3)),
        torch.jit.trace(Net(torch.relu), torch.ones(1, 3)),
    ]
    texts = [json.dumps(described_model(model)) for model in models]
    assert len(set(texts)) == len(texts)
    for make in (Net, lambda: nn.LSTM(2, 2)):
        assert described_model(make()) == described_model(make())  # whose weights differ
    assert described_model(models[0])["1"].startswith("torch.nn.modules.activation.ReLU (")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (ctypes.CDLL(None).abs, "ctypes.CDLL.__init__.<locals>._FuncPtr|_FuncPtr"),
        (ctypes.pointer(ctypes.c_int(1)), "LP_c_int"),
        (np.frompyfunc(lambda x: x, 1, 1), "numpy.ufunc"),
        ((n for n in range(3)), "builtins.generator"),
        (memoryview(b"a"), "builtins.memoryview"),
    ],
)
def test_what_is_not_stable_is_named_and_asks_for_a_key(value, words):
    with pytest.raises(ValueError, match=f"train_fn.held\\[0\\].a is a .*({words}).*needs key=, a name of your own"):
        described(Holder(held=[Holder(a=value)]), "train_fn")
    found = described(Holder(held=[Holder(a=value)], b=1), "train_fn", key="mine")
    assert found != described(Holder(held=[Holder(a=value)], b=2), "train_fn", key="mine")  # the rest counts still


def test_an_open_file_is_named(tmp_path):
    with (tmp_path / "a").open("w") as file, pytest.raises(ValueError, match="loss.file is a _io.TextIOWrapper"):
        described(lambda_of(file), "loss")


def lambda_of(file):
    return lambda x: file.write(x)


def test_locks_are_locks():
    assert described(threading.Lock()) == described(threading.Lock()) == "a lock"
    assert described(threading.Event()) == described(threading.Event())


def test_ranks_tell_functions_by_what_they_do():
    def scaled(by):
        return lambda outputs, labels: by * outputs.sum(1)

    assert told_function(scaled(1.0)) == told_function(scaled(1.0))
    assert told_function(scaled(1.0)) != told_function(scaled(2.0))
    weighted = [nn.CrossEntropyLoss(weight=torch.tensor([1.0, w])) for w in (1.0, 1.0, 2.0)]
    assert told_function(weighted[0]) == told_function(weighted[1]) != told_function(weighted[2])
    assert told_function("mse") == ("mse", "")
