"""The example says the same on one process and on two that torchrun starts."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastif import ScoreFolder

pytest.importorskip("sklearn", reason="the example's digits come with scikit-learn")
ROOT = Path(__file__).parents[2]


def said(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def found_in(text):
    return re.findall(r"test digit \d+: rests most on training digits (\[.*?\])", text)


SCRIPT = [str(ROOT / "examples" / "many_ranks.py"), "--epochs", "1", "--examples", "512"]
RUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *SCRIPT]


def said_here(monkeypatch, capsys, *arguments):
    """What the example says when it runs in this process, which has imported everything."""
    monkeypatch.setattr(sys, "argv", [*arguments])
    runpy.run_path(arguments[0], run_name="__main__")
    return capsys.readouterr().out


def test_many_ranks(tmp_path, monkeypatch, capsys, one_thread):
    alone = said_here(monkeypatch, capsys, *SCRIPT, "--out", str(tmp_path / "one"))
    together = said(*RUN, "--out", str(tmp_path / "two"))
    digits = found_in(alone), found_in(together)
    assert len(digits[0]) == 20
    assert sum(a == b for a, b in zip(*digits, strict=True)) >= 18  # float32: near ties may change places
    assert alone.startswith("1 ranks; the first took 512 of 512 examples\nsent 0 bytes")
    assert re.match(r"2 ranks; the first took \d+ of 512 examples\nsent [\d,]+ bytes", together)
    one, two = (ScoreFolder(tmp_path / name).load() for name in ("one", "two"))
    assert float((one - two).norm() / one.norm()) < 1e-3
    assert torch.isfinite(two).all()


@pytest.mark.slow
def test_many_ranks_of_a_sharded_network():
    digits = found_in(said(*SCRIPT)), found_in(said(*RUN, "--sharded"))
    assert sum(a == b for a, b in zip(*digits, strict=True)) >= 18
