import gc
import signal
import sys
from contextlib import ExitStack

import pytest
import torch
from hypothesis import HealthCheck, settings

from fastif import cli
from fastif.curvature import FitData
from fastif.data import count, picked
from fastif.influence import score_job
from fastif.model.capture import Capture
from fastif.samplers.subset import Subset
from tests.helpers.stored import BLOCK
from tests.helpers.user_script import SCRIPT

# Reproducible everywhere; more examples with `pytest --hypothesis-profile=thorough`.
settings.register_profile("default", deadline=None, derandomize=True, max_examples=60)
settings.register_profile("thorough", deadline=None, max_examples=2000, suppress_health_check=list(HealthCheck))
settings.load_profile("default")

# A job in the background of a shell ignores Ctrl-C, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Which lines run is noted in the first and the last case of each test: to note it takes long, and the cases
    between seldom reach further."""
    cases = {}
    for item in items:
        cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    for found in cases.values():
        for item in found[1:-1]:
            item.add_marker(pytest.mark.no_cover)


def pytest_collection_finish():
    """What was imported stays: collections of garbage, which some libraries ask for at each step, can pass it by."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def one_thread():
    """For little work: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small_blocks():
    """Folders of scores in blocks of `tests.helpers.stored.BLOCK` bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_job, "BLOCK_BYTES", BLOCK)
        yield


@pytest.fixture
def fit_data():
    """What `Influence` gives an estimator that multiplies with the curvature; the model stands ready for the test."""
    with ExitStack() as stack:

        def make(model, loss, data, subset=None, *, layers=None, batch_size=256, autocast=None, seed=0):
            def batches(subset):
                for (x, y), places in picked(data, batch_size, subset.indices):
                    yield x, y, subset.weights[places]

            if subset is None:
                n = count(data)
                subset = Subset(torch.arange(n), torch.full((n,), 1 / n, dtype=torch.float64))
            capture = Capture(model, layers)
            stack.enter_context(capture.attached())
            return FitData(model, loss, capture.blocks, subset, batches, seed, autocast)

        yield make


@pytest.fixture
def run(capfd):
    """Runs the command line in this process: exit code, stdout, stderr."""

    def run(*arguments):
        capfd.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The folder with the user's script as the working directory."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "ownscript.py").write_text(SCRIPT)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "ownscript", raising=False)
    return folder
