"""One writer for each folder: another is told who the first is, and takes over when that has died."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fastif.folder_lock import HOLDER, LOCK, FolderInUse, locked
from tests.helpers.stored import bits, fitted, problem

REPOSITORY = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}

HOLDS = """
import sys, time
from pathlib import Path
from fastif.folder_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def started(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def test_a_second_writer_is_told_and_a_dead_ones_lock_is_taken_over(tmp_path):
    holder = started(HOLDS, tmp_path)
    assert holder.stdout.readline() == "held\n", holder.stderr.read()
    words = f"is being written by process {holder.pid} on {socket.gethostname()} since"
    with pytest.raises(FolderInUse, match=words), locked(tmp_path):
        pytest.fail("two writers")
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    assert (tmp_path / HOLDER).exists()
    with locked(tmp_path):
        assert json.loads((tmp_path / HOLDER).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_the_thread_that_holds_a_folder_enters_again_and_no_other_does(tmp_path):
    found = []

    def enters():
        try:
            with locked(tmp_path):
                found.append("entered")
        except FolderInUse as error:
            found.append(str(error))

    with locked(tmp_path):
        with locked(tmp_path / "." / ""):
            other = threading.Thread(target=enters)
            other.start()
            other.join()
        assert (tmp_path / LOCK).exists()
    assert [f"process {os.getpid()} on" in text for text in found] == [True]
    with locked(tmp_path):
        pass


WRITES = """
import sys
import torch
torch.set_num_threads(1)
from fastif import Diagonal
from fastif.folder_lock import FolderInUse
from fastif.influence import score_job
from tests.helpers.stored import BLOCK, fitted, problem

score_job.BLOCK_BYTES = BLOCK
model, query, train = problem()
influence = fitted(model, train, Diagonal())
print("ready", flush=True)
for folder in sys.stdin:
    try:
        influence.scores(query, train, out=folder.strip(), resume=True)
        print("wrote", flush=True)
    except FolderInUse as error:
        print(error, flush=True)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "small_blocks")
def test_of_two_writers_at_once_one_wins_and_the_table_is_right(tmp_path):
    from fastif import Diagonal

    writers = [started(WRITES), started(WRITES)]
    try:
        for writer in writers:
            assert writer.stdout.readline() == "ready\n", writer.stderr.read()
        model, query, train = problem()
        fitted(model, train, Diagonal()).scores(query, train, out=tmp_path / "whole")
        want, told = bits(tmp_path / "whole"), 0
        for number in range(40):
            folder = tmp_path / str(number)
            for writer in writers:
                writer.stdin.write(f"{folder}\n")
                writer.stdin.flush()
            lines = [writer.stdout.readline() for writer in writers]
            assert "wrote\n" in lines, lines
            for line in lines:
                assert line == "wrote\n" or f"{folder} is being written by " in line
                told += line != "wrote\n"
            assert bits(folder) == want
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert told > 0
    assert torch.get_num_threads() == 1
