"""Retraining: networks are those trained by hand; in parallel, killed and resumed it gives the serial bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastif.evaluation import retrain
from fastif.fingerprints import described
from fastif.journal import Journal
from tests.helpers.retrainings import HOW, NET, NET_QUERY, QUERIES, SETS, X, Y, few_steps


class Killed(Exception): ...


class DiesAfter:
    """A train_fn that fails at its call number `calls`, and is described as `NET` is."""

    def __init__(self, calls: int):
        self.calls = calls

    def __call__(self, kept: Tensor, seed: int) -> nn.Module:
        self.calls -= 1
        if self.calls < 0:
            raise Killed
        return NET(kept, seed)


def test_values_are_those_of_networks_trained_by_hand():
    found = retrain(NET, SETS, NET_QUERY, seeds=[5, 2], **HOW)
    assert found.values.shape == (4, 2, QUERIES)
    assert found.seeds == [5, 2]
    for number, kept in enumerate(SETS):
        for place, seed in enumerate((5, 2)):
            torch.manual_seed(seed)
            with torch.no_grad():
                logits = few_steps_with_grad(kept, seed)(NET_QUERY[0])
            want = nn.functional.cross_entropy(logits, NET_QUERY[1], reduction="none")
            torch.testing.assert_close(found.values[number, place], want.double(), rtol=1e-5, atol=1e-7)
    assert not torch.equal(found.values[:, 0], found.values[:, 1])


def few_steps_with_grad(kept: Tensor, seed: int) -> nn.Module:
    with torch.enable_grad():
        return NET(kept, seed)


def test_callers_generator_threads_and_grad_mode_are_as_they_were():
    torch.manual_seed(7)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    with torch.no_grad():  # training needs gradients all the same
        retrain(NET, SETS[:1], NET_QUERY, threads=1 if threads > 1 else 2, **HOW)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_two_processes_end_a_killed_job_with_the_bits_of_one(tmp_path):
    whole = retrain(NET, SETS, NET_QUERY, seeds=2, out=tmp_path / "whole", **HOW)
    stored = json.loads((tmp_path / "whole" / "retrained.json").read_text())
    # What a kill in the middle of a line leaves: three records and a part of the fourth.
    (tmp_path / "cut").mkdir()
    path = tmp_path / "cut" / "retrained.jsonl"
    journal = Journal(path, stored["settings"], resume=False)
    for record in stored["retrained"][:4]:
        journal.append("retrained", record, (record["set"], record["seed"]))
    *lines, last, _ = path.read_text().split("\n")
    path.write_text("\n".join([*lines, last[:20]]))
    resumed = retrain(NET, SETS, NET_QUERY, seeds=2, processes=2, out=tmp_path / "cut", resume=True, **HOW)
    assert torch.equal(whole.values, resumed.values)
    assert torch.equal(whole.seconds[:3, 0], resumed.seconds[:3, 0])  # these were not trained again
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["retrained.json"]


def test_a_killed_job_goes_on_where_it_stopped(tmp_path):
    whole = retrain(DiesAfter(99), SETS, NET_QUERY, **HOW)
    settings = dict(out=tmp_path, **HOW)
    dies = DiesAfter(2)
    with pytest.raises(Killed):
        retrain(dies, SETS, NET_QUERY, **settings)
    assert len((tmp_path / "retrained.jsonl").read_text().splitlines()) == 3
    with pytest.raises(ValueError, match="holds an unfinished job"):
        retrain(DiesAfter(2), SETS, NET_QUERY, **settings)
    resumed = retrain(again := DiesAfter(2), SETS, NET_QUERY, resume=True, **settings)
    assert again.calls == 0
    assert torch.equal(whole.values, resumed.values)
    with pytest.raises(ValueError, match=r"retrained\.json holds a finished job; resume it, or remove the file"):
        retrain(DiesAfter(2), SETS, NET_QUERY, **settings)
    again.calls = 2  # as it was when the job began
    finished = retrain(again, SETS, NET_QUERY, resume=True, **settings)
    assert again.calls == 2
    assert torch.equal(whole.values, finished.values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(kept=SETS[:3]), "sets was 4, is 3"),
        (dict(seeds=2), r"seeds was \[0\], is \[0, 1\]"),
        (dict(query=(NET_QUERY[0] + 1, NET_QUERY[1])), "query was"),
        (dict(measurement="margin"), "measurement was 'loss', is 'margin'"),
        (dict(train_fn=partial(NET, steps=4)), "train_fn: keywords: steps was absent, is 4"),
        (dict(train_fn=partial(few_steps, x=X.float() + 1, y=Y)), "train_fn: keywords: x was 'tensor"),
        (dict(threads=2), r"threads was 1, is 2 \(sums round differently .*set_num_threads\(1\) before"),
    ],
)
def test_another_job_is_not_taken_for_this_one(tmp_path, change, words):
    job = dict(train_fn=NET, kept=SETS, query=NET_QUERY, out=tmp_path, progress=False)
    retrain(**job)
    with pytest.raises(ValueError, match=words):
        retrain(**{**job, **change}, resume=True)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "retrained.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"retrained\.json is damaged: it has no checksum; remove it and resume the job"
    ):
        retrain(NET, SETS, NET_QUERY, out=tmp_path, resume=True, **HOW)


def no_module(kept: Tensor, seed: int) -> None: ...


def hidden(kept: Tensor, seed: int, steps: int) -> nn.Module:
    return few_steps(kept, seed, X, Y, steps)


hidden = partial(hidden, steps=1)  # the function cannot be found by its name any more


def broken(kept: Tensor, seed: int) -> nn.Module:
    model = NET(kept, seed)
    with torch.no_grad():
        model[2].bias[1] = torch.nan
    return model


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (dict(kept=[]), ValueError, "at least one set"),
        (dict(kept=[torch.arange(0)]), ValueError, "set 0 keeps no example"),
        (dict(kept=[*SETS, torch.tensor([3, 1, 3])]), ValueError, "set 4 has 3 twice"),
        (dict(kept=[torch.tensor([-1])]), ValueError, "must be >= 0, set 0 has -1"),
        (dict(kept=[torch.tensor([1.0])]), TypeError, "int64"),
        (dict(kept=[[1, 2]]), TypeError, "got list"),
        (dict(train_fn=no_module), TypeError, "must return an nn.Module, got NoneType"),
        (dict(train_fn=broken), ValueError, "set 0, seed 0 gives query 0 a measurement of nan"),
        (dict(train_fn=3), TypeError, "train_fn must be a function"),
        (dict(train_fn=lambda kept, seed: None, processes=2), TypeError, "picklable"),
        (
            dict(train_fn=hidden, processes=2),
            TypeError,
            r"`f = partial\(f, ...\)` hides f",
        ),
        (dict(query=iter([NET_QUERY])), ValueError, "query is an iterator"),
        (dict(processes=0), ValueError, "processes must be an integer >= 1, got 0"),
        (dict(threads=1.5), ValueError, "threads must be"),
        (dict(seeds=0), ValueError, "seeds must be"),
        (dict(measurement="probability"), ValueError, "measurement must be one of"),
        (dict(loss="hinge"), ValueError, "loss must be one of"),
    ],
)
def test_bad_retraining_is_refused(change, kind, words):
    job = dict(train_fn=NET, kept=SETS[:1], query=NET_QUERY, progress=False)
    with pytest.raises(kind, match=words):
        retrain(**{**job, **change})


_SLOW = """
import os
import time
import torch
from torch import nn
from fastif.evaluation import retrain

def slow(kept, seed):
    os.write(1, b"working\\n")  # at once: the other process writes, too
    time.sleep(600)

if __name__ == "__main__":
    retrain(slow, [torch.arange(3)] * 2, (torch.zeros(2, 3), torch.arange(2)), processes=2, progress=False, **{how})
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks into /proc")
def test_processes_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_SLOW.replace("{how}", repr({"out": str(tmp_path / "out")})))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True)
    assert [parent.stdout.readline() for _ in range(2)] == ["working\n"] * 2
    below = [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
    assert len(below) >= 2
    parent.kill()
    parent.wait()
    end = time.monotonic() + 20
    while (left := [pid for pid in below if _runs(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    assert left == []
    retrain(NET, SETS[:1], NET_QUERY, out=tmp_path / "out", **HOW)  # nothing was finished, and nobody holds it
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["retrained.json"]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_folder_that_is_written_to_is_refused(tmp_path):
    tried = []

    def second(kept: Tensor, seed: int) -> nn.Module:
        thread = threading.Thread(
            target=lambda: tried.append(_error(lambda: retrain(NET, SETS, NET_QUERY, out=tmp_path)))
        )
        thread.start()
        thread.join()
        return NET(kept, seed)

    retrain(second, SETS[:1], NET_QUERY, out=tmp_path, key="a", **HOW)
    assert [f"is being written by process {os.getpid()}" in words for words in tried] == [True]


def _error(work) -> str:
    try:
        work()
    except OSError as error:
        return str(error)
    return ""


def test_a_damaged_result_is_not_taken(tmp_path):
    retrain(NET, SETS, NET_QUERY, out=tmp_path, **HOW)
    path = tmp_path / "retrained.json"
    path.write_text(path.read_text().replace('"seconds": 0', '"seconds": 1', 1))
    with pytest.raises(
        ValueError, match=r"retrained\.json is damaged: its checksum does not fit.*; remove it and resume"
    ):
        retrain(NET, SETS, NET_QUERY, out=tmp_path, resume=True, **HOW)
    path.unlink()
    retrain(NET, SETS, NET_QUERY, out=tmp_path, resume=True, **HOW)


def test_a_key_needs_a_folder():
    with pytest.raises(ValueError, match="key='a' needs out="):
        retrain(NET, SETS, NET_QUERY, key="a", **HOW)


@pytest.mark.slow
def test_an_error_in_a_process_is_the_callers():
    with pytest.raises(TypeError, match="must return an nn.Module, got NoneType"):
        retrain(no_module, SETS[:1], NET_QUERY, processes=2, **HOW)


def test_query_may_come_in_batches_of_any_size():
    batches = list(zip(NET_QUERY[0].split([3, 1, 4]), NET_QUERY[1].split([3, 1, 4]), strict=True))
    whole, parts = (retrain(NET, SETS[:1], query, **HOW).values for query in (NET_QUERY, batches))
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-7)


def test_one_example_is_enough_to_train_on():
    assert retrain(NET, [torch.tensor([3])], NET_QUERY, **HOW).values.isfinite().all()


def test_described_tells_what_a_function_holds():
    def closed(x):
        return lambda kept, seed: x

    assert described(closed(X)) != described(closed(X + 1))
    assert described(closed(X)) == described(closed(X.clone()))
    assert described(nn.Linear(2, 2)) != described(nn.Linear(2, 2))
    assert described(partial(few_steps, steps=1)) != described(partial(few_steps, steps=2))
    assert described(no_module) != described(few_steps)
    json.dumps(
        described(
            {
                "ufunc": np.add,
                "method": X.sum,
                "a": [1, 2.5, (None, NET)],
                "b": DiesAfter(1),
                "c": nn.ReLU,
                "d": X.numpy(),
            }
        )
    )
