"""`fastif scores` on a user's own script: what it writes is what Python gives; it resumes, and says what is wrong."""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastif import (
    CG,
    EKFAC,
    KFAC,
    Arnoldi,
    DataInf,
    Diagonal,
    ExactBlock,
    Identity,
    Influence,
    LiSSA,
    RandomProjection,
    ScoreFolder,
    cli,
    extract,
    samplers,
    store,
)

REPOSITORY = Path(__file__).parents[1]
SCRIPT = """
import time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def problem():  # the weights are from torch's own generator: --seed decides
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 5, generator=draw), torch.arange(40) % 3
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    return model, (x, y), (x[:6], y[:6])

def loaders():
    model, train, query = problem()
    return model, DataLoader(TensorDataset(*train), batch_size=8), [query]

def slow():
    class Slow(nn.Linear):
        def forward(self, x):
            time.sleep(0.05)
            return super().forward(x)
    _, train, query = problem()
    return Slow(5, 3), train, query

def takes(one): ...
def nothing(): ...
def two(): return problem()[:2]
def shuffled():
    model, train, query = problem()
    return model, DataLoader(TensorDataset(*train), shuffle=True), query
def no_model(): return "model", *problem()[1:]
def no_data(): return problem()[0], 3, problem()[2]
def training(): return nn.Sequential(nn.Dropout(), nn.Linear(5, 3)), *problem()[1:]
def raises(): raise ValueError("the user's own words\\nin two lines")
number = 3
"""


@pytest.fixture
def run(capfd):
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


def returned(name="problem", seed=0):
    """What the script returns after torch.manual_seed(seed), as the command calls it."""
    torch.manual_seed(seed)
    spaces = {}
    exec(SCRIPT, spaces)
    return spaces[name]()


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if "__pycache__" not in path.parts)


WRITTEN = ["curvature.safetensors", "manifest.json", "scores-000000000-000000000.npy", "top.csv"]


def test_it_writes_the_scores_of_the_script(run, script):
    code, printed, _ = run("scores", "ownscript:problem", "--out", "out", "--top", "4", "--self-influence")
    assert code == 0
    model, train, query = returned()
    influence = Influence(model, curvature=EKFAC(), progress=False).fit(train)
    scores = ScoreFolder("out")
    assert torch.allclose(scores.load(), influence.scores(query, train), rtol=1e-4, atol=1e-7)
    values, indices = influence.top(query, train, 4)
    with open("out/top.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["query"]), int(row["rank"])) for row in rows] == [(q, r) for q in range(6) for r in range(1, 5)]
    assert [int(row["train"]) for row in rows] == indices.flatten().tolist()
    assert [float(row["score"]) for row in rows] == pytest.approx(values.flatten().tolist(), rel=1e-4)
    own = torch.from_numpy(np.load("out/self_influence.npy"))
    assert torch.allclose(own, influence.self_influence(train), rtol=1e-4)
    assert files(script / "out") == sorted([*WRITTEN, "self_influence.npy"])
    for words in (
        "0.weight [4, 5]",
        "40 training examples",
        "6 queries; scores take",
        "query",
        f"{int(indices[0, 0])}  ",
    ):
        assert words in printed
    assert printed.index("covered:") < printed.index("query ")


@pytest.mark.parametrize(
    ("arguments", "curvature"),
    [
        (["--curvature", "diagonal", "--damping", "0.1", "--fisher", "empirical"], Diagonal(0.1, "empirical")),
        (["--curvature", "identity"], Identity()),
        (["--curvature", "exact", "--damping", "auto"], ExactBlock("auto")),
        (["--curvature", "exact", "--fisher", "empirical"], ExactBlock(matrix="empirical_fisher")),
        (["--curvature", "ekfac", "--damping", "auto", "--fisher", "monte_carlo"], EKFAC("auto", "monte_carlo")),
        (["--curvature", "kfac"], KFAC()),
        (["--curvature", "cg", "--damping", "0.1"], CG(0.1)),
        (["--curvature", "lissa", "--fisher", "exact"], LiSSA()),
        (["--curvature", "arnoldi", "--damping", "0.1"], Arnoldi(damping=0.1)),
        (["--curvature", "data-inf"], DataInf()),
        (["--curvature", "data-inf", "--damping", "0.1", "--fisher", "empirical"], DataInf(0.1)),
        (["--curvature", "random-projection"], RandomProjection()),
        (
            ["--curvature", "random-projection", "--fisher", "exact", "--seed", "3"],
            RandomProjection(512, 1e-3, "exact", 3),
        ),
    ],
    ids=lambda value: "-".join(value[1:]).replace("--", "") if isinstance(value, list) else "",
)
def test_curvatures(run, script, arguments, curvature):
    assert run("scores", "ownscript.py:problem", "--out", "out", "--quiet", *arguments) == (0, "", "")
    seed = 3 if "--seed" in arguments else 0
    model, train, query = returned(seed=seed)
    want = Influence(model, curvature=curvature, seed=seed, progress=False).fit(train).scores(query, train)
    assert torch.allclose(ScoreFolder("out").load(), want, rtol=1e-3, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("name", ["random", "logit", "k-center"])
def test_a_sampler_chooses_the_examples_of_the_curvature(run, script, name):
    options = ["--sampler", name, "--k", "25%", "--seed", "3", "--layers", "2", "--measurement", "margin"]
    assert run("scores", "ownscript:loaders", "--out", "out", "--quiet", *options) == (0, "", "")
    model, train, query = returned("loaders", seed=3)
    draw = torch.Generator().manual_seed(3)
    seen = extract(model, train, progress=False)
    subset = {
        "random": lambda: samplers.random(40, 10, generator=draw),
        "logit": lambda: samplers.logit(seen.logits, seen.labels, 10, generator=draw),
        "k-center": lambda: samplers.k_center(seen.features, 10, generator=draw),
    }[name]()
    influence = Influence(model, curvature=EKFAC(), layers="2", measurement="margin", progress=False)
    want = influence.fit(train, subset=subset).scores(query, train)
    assert torch.allclose(ScoreFolder("out").load(), want, rtol=1e-3, atol=1e-6 * float(want.abs().max()))


def test_resume(run, script, monkeypatch):
    monkeypatch.setattr(store, "BLOCK_BYTES", 6 * 8 * 4)
    job = ["scores", "ownscript:problem", "--out", "out", "--quiet", "--batch-size", "8", "--top", "2"]
    assert run(*job)[0] == 0
    before = {path.name: path.read_bytes() for path in (script / "out").iterdir()}
    assert len(before) == 5 + 3
    code, printed, error = run(*job)
    assert (code, printed) == (2, "")
    assert error == "error: out holds scores already: go on with --resume, or choose another folder\n"
    (script / "out" / "scores-000000000-000000016.npy").unlink()
    (script / "out" / "top.csv").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Influence, "fit", lambda *_, **__: pytest.fail("the fitted curvature was there"))
        assert run(*job, "--resume") == (0, "", "")
    assert {path.name: path.read_bytes() for path in (script / "out").iterdir()} == before
    for change, words in (
        (["--damping", "0.1"], "curvature was"),
        (["--sampler", "random", "--k", "9"], "sampler was None, is 'random'; k was None, is 9"),
        (["--seed", "1"], "seed was 0, is 1"),
        (["--measurement", "margin"], "measurement was 'loss', is 'margin'"),
    ):
        code, printed, error = run(*job, "--resume", *change)
        assert (code, printed, error.count("\n")) == (2, "", 1)
        assert words in error
    assert {path.name: path.read_bytes() for path in (script / "out").iterdir()} == before


@pytest.mark.parametrize("curvature", ["cg", "lissa"])
def test_curvatures_that_need_the_data_at_every_solve_resume(run, script, curvature):
    job = ["scores", "ownscript:problem", "--out", "out", "--quiet", "--curvature", curvature, "--sampler", "random"]
    job += ["--k", "30", "--self-influence"]
    assert run(*job)[0] == 0
    before = {path.name: path.read_bytes() for path in (script / "out").iterdir()}
    (script / "out" / "scores-000000000-000000000.npy").unlink()
    assert run(*job, "--resume") == (0, "", "")
    assert {path.name: path.read_bytes() for path in (script / "out").iterdir()} == before
    code, _, error = run(*job, "--resume", "--damping", "0.5")
    assert (code, "curvature was" in error) == (2, True)


def test_a_full_disk_ends_in_one_line_that_says_what_is_kept(run, script, monkeypatch):
    def full(path, values):
        Path(path).write_bytes(b"the part that had room")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    job = ["scores", "ownscript:problem", "--out", "out", "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        code, printed, error = run(*job)
    assert (code, printed, error.count("\n")) == (2, "", 1)
    assert "No space left on device; 0 of 1 blocks are kept in out, and the same job goes on" in error
    assert files(script / "out") == ["curvature.safetensors", "manifest.json"]
    assert run(*job, "--resume") == (0, "", "")
    assert files(script / "out") == WRITTEN


def test_ctrl_c_in_a_real_process(script):
    job = [sys.executable, "-m", "fastif", "scores", "ownscript:slow", "--out", "out", "--batch-size", "1"]
    job += ["--curvature", "identity"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(job, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (script / "out" / "manifest.json").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "the same command with --resume continues" in error
    assert "Traceback" not in error
    assert files(script / "out") == ["curvature.safetensors", "manifest.json"]
    done = subprocess.run([*job, "--resume", "--quiet"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert ScoreFolder("out").finished


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ownscript"], "must be given as module:function or path/to/file.py:function, got 'ownscript'"),
        (["ownscript:"], "must be given as module:function"),
        (["nowhere.py:problem"], "no file nowhere.py"),
        (["nowhere:problem"], "no module nowhere in "),
        (["ownscript:problems"], "ownscript has no function problems"),
        (["ownscript:number"], "ownscript has no function number"),
        (["ownscript:takes"], "ownscript:takes must take no arguments: missing a required argument: 'one'"),
        (["ownscript:nothing"], "ownscript:nothing must return (model, train, query), got NoneType"),
        (["ownscript:two"], "must return (model, train, query), got 2 values"),
        (["ownscript:no_model"], "must return (model, train, query): the model must be a torch.nn.Module, got str"),
        (["ownscript:no_data"], "must return (model, train, query): train: data must be a DataLoader"),
        (["ownscript:shuffled"], "train: the DataLoader draws its order with RandomSampler"),
        (["ownscript:training"], "'0' (Dropout) is in train mode"),
        (["ownscript:problem", "--curvature", "hessian"], "--curvature must be one of ekfac, kfac,"),
        (["ownscript:problem", "--damping", "much"], "--damping must be a number >= 0 or auto, got much"),
        (["ownscript:problem", "--damping", "-1"], "damping must be"),
        (["ownscript:problem", "--fisher", "true"], "--fisher must be one of exact, monte_carlo, empirical, got true"),
        (
            ["ownscript:problem", "--curvature", "exact", "--fisher", "monte_carlo"],
            "--fisher must be exact or empirical",
        ),
        (["ownscript:problem", "--curvature", "identity", "--damping", "1"], "--damping must be left out with"),
        (
            ["ownscript:problem", "--curvature", "identity", "--fisher", "exact"],
            "--fisher must be left out with --curvature identity, got exact",
        ),
        (
            ["ownscript:problem", "--curvature", "cg", "--fisher", "empirical"],
            "--fisher must be exact with --curvature cg, got empirical",
        ),
        (
            ["ownscript:problem", "--curvature", "data-inf", "--fisher", "exact"],
            "--fisher must be empirical with --curvature data-inf, got exact",
        ),
        (["ownscript:problem", "--curvature", "cg", "--damping", "auto"], "damping must be a number, got 'auto'"),
        (["ownscript:problem", "--curvature", "arnoldi", "--damping", "0"], "damping must be a number > 0, got 0"),
        (["ownscript:problem", "--curvature", "data-inf", "--damping", "0"], "damping must be a number > 0 or 'auto'"),
        (["ownscript:problem", "--layers", "nine"], "layers='nine' names no layer"),
        (
            ["ownscript:problem", "--loss", "hinge"],
            "--loss must be one of cross_entropy, causal_lm, bce, mse, got",
        ),
        (["ownscript:problem", "--measurement", "logit"], "--measurement must be one of loss, margin, log_odds"),
        (["ownscript:problem", "--sampler", "random"], "--sampler and --k go together"),
        (["ownscript:problem", "--k", "3"], "--sampler and --k go together"),
        (["ownscript:problem", "--sampler", "rendom", "--k", "3"], "sampler must be one of"),
        (["ownscript:problem", "--sampler", "random", "--k", "41"], "n=40"),
        (["ownscript:problem", "--top", "41"], "--top must be at most the 40 training examples, got 41"),
        (["ownscript:problem", "--top", "-1"], "--top must be >= 0, got -1"),
        (["ownscript:problem", "--batch-size", "0"], "--batch-size must be >= 1, got 0"),
        (["ownscript:problem", "--memory", "0"], "--memory must be >= 1, got 0"),
        (["ownscript:problem", "--seed", "-1"], "--seed must be in [0, 2^63), got -1"),
        (["ownscript:problem", "--device", "abacus"], "--device must be cpu, cuda or cuda:N, got abacus"),
    ],
)
def test_one_line_and_exit_code_2(run, script, arguments, words):
    code, printed, error = run("scores", "--quiet", "--out", "deep/out", *arguments)
    assert (code, printed, error.count("\n")) == (2, "", 1)
    assert error.startswith("error: ")
    assert words in error
    assert files(script) == ["__pycache__", "ownscript.py"] or files(script) == ["ownscript.py"]


@pytest.mark.parametrize("place", ["ownscript", "ownscript.py"])
def test_errors_of_the_script_are_shown_as_they_are(run, script, place):
    code, printed, error = run("scores", f"{place}:raises", "--out", "out")
    assert (code, printed) == (1, "")
    assert error.startswith("Traceback (most recent call last):\n  File ")
    assert error.splitlines()[1].endswith("in raises")
    assert error.endswith("ValueError: the user's own words\nin two lines\n")
    (script / "broken.py").write_text("import no_such_module_anywhere\n")
    code, _, error = run("scores", f"{place.replace('ownscript', 'broken')}:problem", "--out", "out")
    assert code == 1
    assert error.splitlines()[-1] == "ModuleNotFoundError: No module named 'no_such_module_anywhere'"
    assert "broken.py" in error.splitlines()[1]
    (script / "torn.py").write_text("def problem(:\n")
    code, _, error = run("scores", f"{place.replace('ownscript', 'torn')}:problem", "--out", "out")
    assert (code, error.splitlines()[-1].startswith("SyntaxError")) == (1, True)
    assert not (script / "out").exists()


def test_a_damaged_curvature_is_named(run, script):
    job = ["scores", "ownscript:problem", "--out", "out", "--quiet"]
    assert run(*job)[0] == 0
    stored = script / "out" / "curvature.safetensors"
    stored.write_bytes(stored.read_bytes()[:100])
    code, _, error = run(*job, "--resume")
    assert (code, error.count("\n")) == (2, 1)
    assert "curvature.safetensors is damaged" in error
    stored.unlink()
    assert run(*job, "--resume") == (0, "", "")
    assert json.loads((script / "out" / "manifest.json").read_text())["settings"]["q"] == 6
