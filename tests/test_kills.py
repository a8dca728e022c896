"""Jobs of every kind, killed at random moments until they end: with the bits of one that ran through, and nothing else.

FASTIF_KILLS kills of each job; moments are drawn from the time that the job takes, so that all of it is hit.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_JOB = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)  # nothing runs in parallel before the process forks
from fastif import Index, Influence
from fastif.evaluation import retrain
from fastif.index import building
from fastif.influence import score_job
from tests.evaluation.test_class_removal import Retrain, run
from tests.helpers import indexed, stored
from tests.helpers.retrainings import NET, NET_QUERY, SETS

score_job.BLOCK_BYTES, building.BLOCK_BYTES = stored.BLOCK, 1
kind, folder, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])

def scores(out):
    model, query, train = stored.problem()
    stored.fitted(model, train).scores(query, train, out=out, resume=True)

def index(out):
    model, train, query, loss = indexed.language()
    Index.build(indexed.fitted(model, train, loss), train, out, share=0.3, resume=True)

def removal(out):
    run(retrain=Retrain(), out=out, resume=True)

def retraining(out):
    retrain(NET, SETS * 3, NET_QUERY, seeds=3, out=out, resume=True, progress=False)

job = dict(scores=scores, index=index, removal=removal, retraining=retraining)[kind]

def started(out):
    pid = os.fork()
    if pid == 0:
        job(out)
        os._exit(0)
    return pid

began = time.monotonic()
assert os.waitpid(started(folder / "whole"), 0)[1] == 0
whole = time.monotonic() - began
drawn, dead, number = random.Random(0), 0, 0
while dead < kills:
    out, ended = folder / f"killed-{number}", False
    while not ended:
        pid = started(out)
        if dead < kills:
            time.sleep(drawn.uniform(0, whole))
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                os.kill(pid, signal.SIGKILL)
            else:
                break
        status = os.waitpid(pid, 0)[1]
        assert status in (0, signal.SIGKILL), status
        ended, dead = status == 0, dead + (status == signal.SIGKILL)
    number += 1
print(json.dumps([dead, number]))
"""
REPOSITORY = Path(__file__).parents[1]


def contents(kind: str, folder: Path) -> dict[str, object]:
    """What a finished job left, but for seconds and bytes that it took."""

    def timeless(value):
        if isinstance(value, list):
            return [timeless(one) for one in value]
        if isinstance(value, dict):
            taken = ("seconds", "RTE", "bytes", "rows_kept_from_before", "date", "checksum")  # the last is of the file
            return {key: timeless(one) for key, one in value.items() if not any(word in key for word in taken)}
        return value

    files = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if kind in ("removal", "retraining"):
        return {name: timeless(json.loads(read)) for name, read in files.items()}
    return dict(files)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("kind", ["scores", "index", "removal", "retraining"])
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path, kind):
    kills = os.environ.get("FASTIF_KILLS", "4")
    done = subprocess.run(
        [sys.executable, "-c", _JOB, kind, str(tmp_path), kills], check=False, capture_output=True, text=True,
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    dead, number = json.loads(done.stdout.splitlines()[-1])
    assert dead == int(kills)
    want = contents(kind, tmp_path / "whole")
    assert want
    for each in range(number):
        assert contents(kind, tmp_path / f"killed-{each}") == want
