"""`torchrun -m fastif ...` writes what one process writes, says it once, and refuses what it does not divide."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastif import ScoreFolder
from fastif.ranks import find_ranks
from tests.ranks.test_commands import command

pytest.importorskip("typer", reason="the command line needs typer")
ROOT = Path(__file__).parents[2]
SCRIPT = """
import os
import torch

def problem():
    torch.manual_seed(0)
    if os.environ.get("RANK") == os.environ.get("FAILING", "none"):
        raise RuntimeError("only on this rank")
    x, y = torch.randn(61, 7, dtype=torch.float64), torch.randint(3, (61,))
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    return model, (x, y), (x[:4], y[:4])
"""


def run(folder, *arguments, **environment):
    started = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastif"]
    return subprocess.run(
        [sys.executable, *started, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "own.py").write_text(SCRIPT)
    return tmp_path


def test_two_ranks_write_what_one_process_writes(folder):
    asked = ("scores", "own.py:problem", "--batch-size", "10", "--self-influence", "--out")
    assert command(str(folder), *asked, "one")[0] == 0
    together = run(folder, *asked, "two")
    assert together.returncode == 0, together.stderr
    one, two = (ScoreFolder(folder / name).load() for name in ("one", "two"))
    assert torch.allclose(one, two, rtol=1e-9, atol=1e-9 * float(one.abs().max()))
    own = [torch.tensor(np.load(folder / name / "self_influence.npy")) for name in ("one", "two")]
    assert torch.allclose(*own, rtol=1e-9)
    assert sorted(file.name for file in (folder / "one").iterdir()) == sorted(
        file.name for file in (folder / "two").iterdir()
    )
    assert together.stdout.count("two: the scores, as fastif.ScoreFolder reads them") == 1
    assert command(str(folder), *asked, "two", "--resume")[0] == 0  # by another number of ranks
    assert torch.equal(ScoreFolder(folder / "two").load(), two)


def errors_of(folder, *arguments):
    """The exit code of a command and what it says of errors, run in a folder."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code, _ = command(folder, *arguments)
    return code, said.getvalue()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("sample", "logit", "--k", "3", "--out", "x.npz"),
            "fastif sample works in one process: run it without torchrun, which divides scores, index, query, remove, "
            "class-removal",
        ),
        (("scores", "own.py:absent", "--out", "x"), "error: own.py has no function absent"),
    ],
)
def test_an_error_is_said_by_the_first_rank_alone(two, folder, arguments, said):
    (code, errors), (other_code, silence) = two(errors_of, str(folder), *arguments)
    assert code != 0
    assert other_code != 0
    assert errors.count(said) == 1
    assert silence == ""
    assert not (folder / "x").exists()


def fail_on_the_second(folder):
    os.environ.update(RANK=str(find_ranks().rank), FAILING="1")  # as torchrun has it, and the script asks
    try:
        return errors_of(folder, "scores", "own.py:problem", "--out", "x")
    finally:
        del os.environ["RANK"], os.environ["FAILING"]


def test_an_error_of_one_rank_is_said_once(two, folder):
    (code, errors), (other_code, others) = two(fail_on_the_second, str(folder))
    assert code != 0
    assert other_code != 0
    assert errors == ""
    assert others.count("RuntimeError: only on this rank") == 1
    assert not (folder / "x").exists()


@pytest.mark.slow
def test_an_error_of_one_rank_ends_torchrun_and_is_said_once(folder):
    done = run(folder, "scores", "own.py:problem", "--out", "x", FAILING="1")
    assert done.returncode != 0
    assert done.stderr.count("RuntimeError: only on this rank") == 1, done.stderr
    assert "AssertionError" not in done.stderr
    assert not (folder / "x").exists()
