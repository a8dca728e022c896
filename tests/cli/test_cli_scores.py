"""`fastif scores` on a user's own script: what it writes is what Python gives, and it resumes."""

import csv
import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fastif.cli.scores
import fastif.influence.planning
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
    TrainingDamping,
    extract,
    samplers,
)
from fastif.influence import score_job
from tests.helpers.user_script import files, returned

REPOSITORY = Path(__file__).parents[2]
WRITTEN = ["curvature.safetensors", "manifest.json", "run.toml", "scores-000000000-000000000.npy", "top.csv"]


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
        "6 queries; scores: peak ",
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
        (["--curvature", "exact", "--fisher", "monte_carlo"], ExactBlock(fisher="monte_carlo")),
        (["--curvature", "ekfac", "--damping", "auto", "--fisher", "monte_carlo"], EKFAC("auto", "monte_carlo")),
        (["--curvature", "kfac"], KFAC()),
        (
            ["--damping", "training", "--training-time", "9", "--weight-decay", "0.01"],
            EKFAC(TrainingDamping(9.0, 0.01)),
        ),
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


@pytest.mark.parametrize(("by", "function"), [("layer", "problem"), ("token", "tokens")])
def test_parts_of_the_scores(run, script, by, function):
    job = ["scores", f"ownscript:{function}", "--out", "out", "--curvature", "diagonal", "--by", by]
    code, printed, _ = run(*job, "--top", "3")
    assert code == 0
    model, train, query = returned(function)
    influence = Influence(model, curvature=Diagonal(), progress=False).fit(train)
    want = influence.scores(query, train, by=by)
    want = torch.stack([*want.values()], 2) if isinstance(want, dict) else want
    got = ScoreFolder("out")
    assert got.layers == (["0", "2"] if by == "layer" else None)
    assert torch.allclose(got.load(), want, rtol=1e-3, atol=1e-6 * float(want.abs().max()))
    with open("out/top.csv", newline="") as file:
        found = [int(row["train"]) for row in csv.DictReader(file)]
    assert found == influence.top(query, train, 3)[1].flatten().tolist()
    assert f"6 queries; scores take {want.numel() * 4 / 2**20:.1f} MiB" in printed
    assert "peak" in printed
    assert "6 queries; scores: peak" not in printed  # a plan knows that of whole scores alone
    assert run(*job, "--resume", "--quiet") == (0, "", "")
    code, _, error = run(*job[:-2], "--resume", "--quiet")
    assert (code, f"by was '{by}', is None" in error) == (2, True)


def test_groups_of_queries(run, script):
    groups = torch.tensor([0, 1, 0, 2, 2, 1])
    np.save("groups.npy", groups.numpy())
    job = ["scores", "ownscript:problem", "--out", "out", "--query-groups", "groups.npy", "--curvature", "diagonal"]
    code, printed, _ = run(*job)
    assert code == 0
    assert "3 groups of queries; scores take" in printed
    assert "help the first groups of queries most" in printed
    model, train, query = returned()
    influence = Influence(model, curvature=Diagonal(), progress=False).fit(train)
    want = influence.scores(query, train, query_groups=groups)
    assert torch.allclose(ScoreFolder("out").load(), want, rtol=1e-3, atol=1e-6 * float(want.abs().max()))
    with open("out/top.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["group"]) for row in rows] == [group for group in range(3) for _ in range(10)]
    assert [int(row["train"]) for row in rows[:10]] == want[0].argsort(descending=True)[:10].tolist()


def test_gradients_of_queries_at_a_rank(run, script):
    job = ["scores", "ownscript:tokens", "--out", "out", "--curvature", "diagonal", "--low-rank", "1"]
    code, printed, _ = run(*job)
    assert code == 0
    model, train, query = returned("tokens")
    influence = Influence(model, curvature=Diagonal(), progress=False).fit(train)
    exact, want = influence.scores(query, train), influence.scores(query, train, low_rank=1)
    assert not torch.allclose(exact, want, rtol=1e-3)
    assert torch.allclose(ScoreFolder("out").load(), want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))
    assert f"relative error of the queries' gradients at rank 1: at most {influence.low_rank_error:.1e}" in printed


def test_the_plan_of_scores_that_go_to_the_disk_holds_a_block_of_them(run, script, monkeypatch):
    """And not all of them, which Influence.scores would."""
    job = ["scores", "ownscript:problem", "--curvature", "diagonal", "--out"]

    def peak(block, out):
        with monkeypatch.context() as patch:
            patch.setattr(fastif.cli.scores, "BLOCK_BYTES", block)
            printed = run(*job, out)[1]
        return re.search("scores: peak (.*); self", printed)[1]

    model, train, query = returned()
    plan = Influence(model, curvature=Diagonal(), progress=False).plan(train, query)
    if plan.score_bytes is None:
        assert peak(1 << 26, "a") == "unknown"
        return
    monkeypatch.setattr(
        fastif.influence.planning.Plan, "__str__", lambda plan: f"scores: peak {plan.score_bytes}; self"
    )
    assert peak(1 << 26, "a") == str(plan.score_bytes)
    assert peak(300, "b") == str(plan.score_bytes - 6 * 40 * 4 + 300)


def test_resume(run, script, monkeypatch):
    monkeypatch.setattr(score_job, "BLOCK_BYTES", 6 * 8 * 4)
    job = ["scores", "ownscript:problem", "--out", "out", "--quiet", "--batch-size", "8", "--top", "2"]
    assert run(*job)[0] == 0
    before = {path.name: path.read_bytes() for path in (script / "out").iterdir()}
    assert len(before) == 5 + 4
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


def test_a_curvature_of_other_code_is_refused(run, script):
    job = ["--out", "out", "--quiet", "--resume"]
    assert run("scores", "ownscript:problem", *job) == (0, "", "")
    code, _, error = run("scores", "ownscript:other_code", *job)
    assert (code, error.startswith("error: out/curvature.safetensors holds a job with other settings")) == (2, True)
    assert re.search(r"model code: 1 was '.*Tanh \(.*', is 'ownscript.Gelu \(", error)


def test_a_curvature_or_a_result_with_a_flipped_bit_is_refused(run, script):
    job = ["scores", "ownscript:problem", "--out", "out", "--quiet", "--resume", "--self-influence"]
    assert run(*job) == (0, "", "")
    for name in ("curvature.safetensors", "self_influence.npy", "manifest.json", WRITTEN[3]):
        path = script / "out" / name
        before = path.read_bytes()
        path.write_bytes(before[:-40] + bytes([before[-40] ^ 4]) + before[-39:])
        code, _, error = run(*job)
        assert (code, f"{name} is damaged: " in error) == (2, True)
        path.write_bytes(before)
    assert run(*job) == (0, "", "")


def test_an_interrupt_names_no_folder_that_is_not_there(run, script, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    job = ["scores", "ownscript:problem", "--out", "deep/out", "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(Influence, "fit", interrupted)
        assert run(*job) == (130, "", "interrupted\n")
    assert not (script / "deep").exists()
    with monkeypatch.context() as patch:
        patch.setattr(score_job, "make_tiles", interrupted)
        code, _, error = run(*job)
    assert (code, error.startswith("interrupted: what was finished is in deep/out; the same command")) == (130, True)
    assert (script / "deep/out").is_dir()


def test_a_folder_that_another_writes_to_is_refused(run, script):
    job = ["scores", "ownscript:slow", "--out", "out", "--batch-size", "1", "--curvature", "identity"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    other = subprocess.Popen([sys.executable, "-m", "fastif", *job, "--quiet"], env=environment)
    try:
        for _ in range(600):
            if (script / "out" / "manifest.json").exists():
                break
            time.sleep(0.1)
        code, _, error = run(*job, "--quiet", "--resume")
        assert code == 2
        assert f"error: out is being written by process {other.pid} on " in error
    finally:
        other.kill()
        other.wait()


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
    def full(file, values, **_):
        file.write(b"the part that had room")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    job = ["scores", "ownscript:problem", "--out", "out", "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        code, printed, error = run(*job)
    assert (code, printed, error.count("\n")) == (2, "", 1)
    assert re.search(r"No space left on device: out/scores-0+-0+.npy needs 960 bytes and finds [0-9,]+ free; ", error)
    assert "0 of 1 blocks are kept in out, and the same job goes on" in error
    assert files(script / "out") == ["curvature.safetensors", "manifest.json", "run.toml"]
    assert run(*job, "--resume") == (0, "", "")
    assert files(script / "out") == WRITTEN


@pytest.mark.slow
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
    assert files(script / "out") == ["curvature.safetensors", "manifest.json", "run.toml"]
    done = subprocess.run([*job, "--resume", "--quiet"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert ScoreFolder("out").finished


def test_run_toml_names_the_script(run, script):
    job = ["scores", "ownscript:problem", "--curvature", "diagonal", "--damping", "0.1", "--layers", "0,2", "--quiet"]
    assert run(*job, "--out", "out") == (0, "", "")
    assert run("scores", "--config", "out/run.toml", "--out", "again", "--quiet") == (0, "", "")
    assert torch.equal(ScoreFolder("out").load(), ScoreFolder("again").load())
    assert ScoreFolder("out").settings == ScoreFolder("again").settings
