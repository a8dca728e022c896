"""A job that was cut off, wherever, goes on: nothing is computed twice, and the bits are those of one never cut off."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch.nn.modules.module import register_module_forward_pre_hook

from fastif import Influence
from tests.helpers.stored import BATCH, FORMS, PARTS, bits, fitted, problem

pytestmark = pytest.mark.usefixtures("one_thread", "small_blocks")

REPOSITORY = Path(__file__).parents[2]


def counted(model, seen):
    """The sizes of the batches that go through the model; a hook of its own would make it another model."""
    return register_module_forward_pre_hook(
        lambda module, inputs: seen.append(len(inputs[0])) if module is model else None
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("checkpoints", [1, 2])
def test_only_what_is_missing_goes_through_the_model(tmp_path, form, checkpoints):
    model, query, train = problem()
    influence = fitted(model, train, checkpoints=[model.state_dict()] * checkpoints)
    data = FORMS[form](train)
    influence.scores(query, data, out=tmp_path)
    before, paths = bits(tmp_path), sorted(tmp_path.glob("*.npy"))
    lost = [path for path in paths if "scores-000000005" in path.name][1:3]
    lengths = {path: np.load(path).shape[1] for path in lost}
    for path in lost:
        path.unlink()
    seen = []
    with counted(model, seen):
        influence.scores(query, data, out=tmp_path, resume=True)
    queries = 5 if checkpoints == 1 else 5 * len(lost) * checkpoints
    assert sum(seen) == BATCH + queries + checkpoints * sum(lengths.values())  # a batch tells what a query takes
    assert bits(tmp_path) == before
    seen.clear()
    with counted(model, seen):
        assert influence.scores(query, data, out=tmp_path, resume=True).finished
    assert seen == [BATCH]


_JOB = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
import torch
torch.set_num_threads(1)  # nothing runs in parallel before the process forks
from fastif import Influence, journal
from fastif.influence import queries, score_job
from tests.helpers.stored import BLOCK, PARTS, fitted, problem

score_job.BLOCK_BYTES = BLOCK
folder = Path(sys.argv[1])
make, call = PARTS.get(sys.argv[2], (problem, Influence.scores))
model, query, train = make()

def job():
    call(fitted(model, train), query, train, out=folder, resume=True)

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def nth(function, number, then):
    calls = 0
    def counted(*arguments, **keywords):
        nonlocal calls
        calls += 1
        return (then if calls == number else function)(*arguments, **keywords)
    return counted

def torn(file, values, **_):
    file.write(b"half a block")
    die()

def renamed_then_dead(self, target):
    os.rename(self, target)
    die()

def killed(prepare):
    pid = os.fork()
    if pid == 0:
        prepare()
        job()
        os._exit(0)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])

def patched(owner, name, number, then):
    return lambda: setattr(owner, name, nth(getattr(owner, name), number, then))

moments = [  # the first file of each process tells who holds the folder
    patched(Path, "write_bytes", 2, die),                        # before there is a manifest
    patched(Path, "replace", 2, die),                            # the manifest is written, not yet in its place
    patched(Path, "replace", 2, renamed_then_dead),              # a manifest and no block
    patched(np, "save", 2, torn),                                # in the middle of a block
    patched(os, "fsync", 2, die),                                # a block not yet on the disk
    patched(Path, "replace", 3, renamed_then_dead),              # a block just finished
    patched(queries, "_directions", 1, die),                     # among the queries
    patched(score_job.Part, "__iter__", 2, die),                # before the first training batch
]
if sys.argv[2] == "query groups":  # whose queries are all seen to at once
    moments[-2:] = [patched(queries, "_grouped_queries", 1, die), patched(score_job.Part, "__iter__", 1, die)]
for moment in moments:
    assert killed(moment) == signal.SIGKILL
    print(len(list(folder.glob("scores-*.npy"))) if folder.exists() else 0)
delay, done = 0.05, False
while not done:  # and at moments that nothing has chosen
    delay *= 1.5
    pid = os.fork()
    if pid == 0:
        job()
        os._exit(0)
    end = time.monotonic() + delay
    while time.monotonic() < end and not done:
        done = os.waitpid(pid, os.WNOHANG)[0] == pid
        time.sleep(0.001)
    if not done:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("parts", ["scores", *PARTS])
def test_killed_at_every_turn_it_ends_with_the_same_bits(tmp_path, parts):
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _JOB, str(folder), parts],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts = [int(line) for line in done.stdout.split()]
    assert counts[:4] == [0, 0, 0, 1]
    assert counts == sorted(counts)
    assert counts[-1] >= 3
    make, call = PARTS.get(parts, (problem, Influence.scores))
    model, query, train = make()
    call(fitted(model, train), query, train, out=whole)
    assert bits(folder) == bits(whole)  # the same files, no other ones


FULL = r"No space left on device: .*scores-.*npy needs \d+ bytes and finds [\d,]+ free; 4 of \d+ blocks are kept in"


def test_a_full_disk_says_what_is_kept(tmp_path, monkeypatch):
    model, query, train = problem()
    influence = fitted(model, train)
    whole = influence.scores(query, train, out=tmp_path / "whole")
    save, saved = np.save, 0

    def full(file, values, **how):
        nonlocal saved
        saved += 1
        if saved > 4:
            file.write(b"the part that had room")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(file, values, **how)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(OSError, match=FULL) as caught:
            influence.scores(query, train, out=tmp_path / "full")
    assert caught.value.errno == errno.ENOSPC
    assert len(list((tmp_path / "full").iterdir())) == 5  # four blocks, the manifest, nothing else
    influence.scores(query, train, out=tmp_path / "full", resume=True)
    assert bits(tmp_path / "full") == bits(whole.folder)


def test_what_the_dead_left_goes_and_what_the_living_write_stays(tmp_path):
    model, query, train = problem()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here, digits = socket.gethostname(), "0123456789abcdef"
    gone = f".{dead.pid}@{here}.{digits}-scores-a.npy", f".7@elsewhere.{digits}-scores-b.npy"
    stays = f".{os.getppid()}@{here}.{digits}-scores-c.npy", f".7@elsewhere.{digits}-d.npy", ".mine-a.npy", "notes.txt"
    for name in (*gone, *stays):
        (tmp_path / name).write_text("")
    os.utime(tmp_path / gone[1], (0, 0))
    fitted(model, train).scores(query, train, out=tmp_path)
    assert not any((tmp_path / name).exists() for name in gone)
    assert all((tmp_path / name).exists() for name in stays)
