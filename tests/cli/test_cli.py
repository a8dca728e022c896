"""The command line: the whole job on a small scale, and one clear line for everything that can be wrong."""

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
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fastif
from fastif import cli, samplers
from fastif.evaluation.settings import SAMPLERS

QUICK = ["class-removal", "--classes", "3", "--k", "5%", "--seeds", "1", "--steps", "2", "--epochs", "1"]
QUICK += ["--width", "0.5", "--samplers", "random,logit", "--no-lissa", "--no-retrain"]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def _threads():
    """The command line sets the number of threads for its process: put back for the tests after these."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a finished quick job."""
    out = tmp_path_factory.mktemp("trained") / "job"
    assert cli.main([*QUICK, "--quiet", "--out", str(out)]) == 0
    return out


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_job_writes_its_files_and_prints_its_table(run, tmp_path):
    out = tmp_path / "deep" / "out"
    code, printed, _ = run(*QUICK[:-1], "--out", out)
    assert code == 0
    names = ["bars.png", "budget.png", "model.safetensors", "radar.png", "report.html", "results.json", "steps.png"]
    names += ["story.png"]
    assert files(out) == names
    for word in ("random", "logit", "original model", "head retrained", "whole network retrained", "72 (5", "F1"):
        assert word in printed
    assert str(out / "report.html") in printed
    results = json.loads((out / "results.json").read_text())
    assert {(row["sampler"], row["class"]) for row in results["rows"]} == {("random", 3), ("logit", 3)}
    assert len(results["retrained"]) == 1
    assert results["meta"]["recipe"]["epochs"] == 1
    assert results["summary"][-1]["F1_mean"] > results["original"][0]["F1"]


def test_quiet_prints_nothing(run, tmp_path):
    assert run(*QUICK, "--quiet", "--out", tmp_path) == (0, "", "")


def test_the_papers_baseline_is_a_row_of_the_table(run, tmp_path):
    job = [option for option in QUICK if option != "--no-lissa"]
    code, printed, _ = run(*job, "--out", tmp_path)
    assert code == 0
    assert "LiSSA, one step" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(row["k"], row["class"], row["seed"]) for row in results["baseline"]] == [(72, 3, 0)]


def test_resume_of_a_finished_job_changes_nothing(run, trained):
    before = json.loads((trained / "results.json").read_text())
    assert run(*QUICK, "--quiet", "--out", trained, "--resume") == (0, "", "")
    assert json.loads((trained / "results.json").read_text()) == before


def test_a_checkpoint_is_saved_then_loaded(run, tmp_path, monkeypatch):
    stored = tmp_path / "a.safetensors"
    assert run(*QUICK, "--quiet", "--out", tmp_path / "x", "--checkpoint", stored)[0] == 0
    first = json.loads((tmp_path / "x" / "results.json").read_text())
    monkeypatch.setattr("fastif.cli.class_removal.train", lambda *_, **__: pytest.fail("the checkpoint was there"))
    assert run(*QUICK, "--quiet", "--out", tmp_path / "y", "--checkpoint", stored)[0] == 0
    again = json.loads((tmp_path / "y" / "results.json").read_text())
    assert first["original"] == again["original"]
    assert "model.safetensors" not in files(tmp_path / "y")


def test_an_interrupted_job_says_how_to_go_on(run, tmp_path, monkeypatch):
    job_class = sys.modules["fastif.evaluation.class_removal"]._Job
    done, step = 0, job_class.run

    def interrupted(*arguments):
        nonlocal done
        done += 1
        if done > 2:
            raise KeyboardInterrupt
        return step(*arguments)

    job = [*QUICK, "--quiet", "--out", tmp_path, "--seeds", "3"]
    job[job.index("random,logit")] = "random"
    with monkeypatch.context() as patch:
        patch.setattr(job_class, "run", interrupted)
        code, _, error = run(*job)
    assert code == 130
    assert "--resume continues" in error
    assert files(tmp_path) == ["model.safetensors", "rows.jsonl"]
    code, _, error = run(*job)
    assert code == 2
    assert error.count("\n") == 1
    assert "holds an unfinished job: continue it with --resume" in error
    code, _, error = run(*job, "--resume", "--damping", "0.5")
    assert (code, "damping was 0.0, is 0.5" in error) == (2, True)
    assert run(*job, "--resume") == (0, "", "")
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["rows"]) == 3 * 2
    assert results["meta"]["rows_kept_from_before"] > 0


@pytest.mark.slow
def test_ctrl_c_in_a_real_process(tmp_path):
    command = [sys.executable, "-m", "fastif", *QUICK, "--out", str(tmp_path), "--seeds", "100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True)
    rows = tmp_path / "rows.jsonl"
    for _ in range(600):
        if rows.exists() and rows.read_text().count("\n") > 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "--resume continues" in error
    assert "Traceback" not in error
    assert files(tmp_path) == ["model.safetensors", "rows.jsonl"]


def test_an_interrupted_training_says_so(run, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastif.cli.class_removal.train", interrupted)
    assert run(*QUICK, "--quiet", "--out", tmp_path / "out") == (130, "", "interrupted\n")
    assert files(tmp_path) == []


@pytest.mark.slow
def test_ctrl_c_while_a_real_process_trains(tmp_path):
    command = [sys.executable, "-m", "fastif", *QUICK, "--out", str(tmp_path / "out"), "--epochs", "100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    printed = tmp_path / "stderr"
    with printed.open("w") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=file)
    for _ in range(600):
        if "training" in printed.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert printed.read_text().endswith("interrupted\n")
    assert "Traceback" not in printed.read_text()
    assert files(tmp_path) == ["stderr"]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samplers", "rendom"], ["one of " + ", ".join(SAMPLERS), "'rendom'"]),
        (["--samplers", ","], ["samplers must be given"]),
        (["--data", "imagenet"], ["digits, fashion-mnist, cifar10", "'imagenet'"]),
        (["--data", "fashion-mnist"], ["--root"]),
        (["--data", "fashion-mnist", "--root", "nowhere"], ["train-images-idx3-ubyte.gz", "nowhere/fashion_mnist"]),
        (["--data", "cifar10", "--root", "nowhere"], ["shard0.npz", "nowhere/cifar10"]),
        (["--k", "2000"], ["k must be in [1, n=1438]", "2000"]),
        (["--k", "many"], ["percentage", "'many'"]),
        (["--seeds", "0"], ["seeds must be", "0"]),
        (["--seeds", "three"], ["--seeds", "integer"]),
        (["--steps", "0"], ["--steps must be >= 1, got 0"]),
        (["--epochs", "0"], ["--epochs must be >= 1, got 0"]),
        (["--width", "-1"], ["--width must be in (0, 64], got -1"]),
        (["--width", "64.5"], ["--width must be in (0, 64], got 64.5"]),
        (["--width", "nan"], ["--width must be in (0, 64], got nan"]),
        (["--weight-decay", "0"], ["--weight-decay must be a positive number, got 0"]),
        (["--damping", "-0.1"], ["--damping must be a finite number >= 0, got -0.1"]),
        (["--classes", "10"], ["[0, c=10), got 10"]),
        (["--classes", "cat"], ["'cat'"]),
        (["--threads", "0"], ["--threads must be >= 1, got 0"]),
        (["--device", "abacus"], ["--device must be cpu, cuda or cuda:N, got abacus"]),
        (["--device", "meta"], ["--device must be cpu, cuda or cuda:N, got meta"]),
        (["--device", "cpu:1"], ["--device must be cpu, cuda or cuda:N, got cpu:1"]),
        (["--device", "cuda:99999999999"], ["--device cuda:99999999999 cannot be used"]),
        (["--checkpoint", "file/model.safetensors", "--epochs", "1", "--width", "0.1"], ["cannot write to the folder"]),
        (["--weight-decay", "1e30", "--epochs", "1", "--width", "0.1"], ["the loss is"]),
        (["--seeds", "9" * 30], ["seeds must be at most"]),
        (["--no-such-option"], ["--no-such-option"]),
    ],
)
def test_one_line_and_exit_code_2(run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    code, printed, error = run("class-removal", "--quiet", "--out", tmp_path / "deep" / "out", *arguments)
    assert code == 2
    assert printed == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert files(tmp_path) == ["file"]  # a wrong call leaves nothing
    run("class-removal", "--quiet", *arguments)
    assert files(tmp_path) == ["file"]  # nor in the folder it takes when none is given


def test_an_unwritable_folder_is_found_before_training(run, tmp_path, monkeypatch):
    monkeypatch.setattr("fastif.cli.class_removal.train", lambda *_, **__: pytest.fail("trained first"))
    (tmp_path / "file").write_text("")
    code, _, error = run(*QUICK, "--out", tmp_path / "file" / "out")
    assert (code, error.count("\n")) == (2, 1)
    assert f"cannot write to the folder {tmp_path / 'file' / 'out'}" in error
    code, _, error = run(*QUICK, "--out", tmp_path / "out", "--checkpoint", tmp_path / "file" / "model.safetensors")
    assert (code, "cannot write to the folder" in error) == (2, True)
    assert files(tmp_path) == ["file"]


def test_checkpoints_that_do_not_fit(run, trained, tmp_path):
    stored = trained / "model.safetensors"
    code, _, error = run(*QUICK, "--out", tmp_path, "--checkpoint", stored, "--width", "1")
    assert (code, "holds another network: width is 0.5, expected 1.0" in error) == (2, True)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(stored.read_bytes()[:5000])
    code, _, error = run(*QUICK, "--out", tmp_path, "--checkpoint", broken)
    assert (code, error.count("\n")) == (2, 1)
    assert f"{broken} is not a safetensors file, or is damaged" in error
    save_file(load_file(stored), broken)
    code, _, error = run(*QUICK, "--out", tmp_path, "--checkpoint", broken)
    assert (code, "was not written by fastif" in error) == (2, True)
    save_file(load_file(stored), broken, {"fastif": json.dumps({"architecture": "cnn", "width": 1e9})})
    code, _, error = run(*QUICK, "--out", tmp_path, "--checkpoint", broken)
    assert (code, error.count("\n")) == (2, 1)
    assert f"{broken} has metadata that make no network: width must be a number in (0, 64]" in error
    assert files(tmp_path) == ["broken.safetensors"]


# ----------------------------------------------------------------------------------------------------- sample and info


@pytest.fixture
def saved(tmp_path):
    draw = torch.Generator().manual_seed(0)
    tensors = {"features": torch.randn(40, 3, generator=draw), "logits": torch.randn(40, 4, generator=draw)}
    tensors["labels"] = torch.arange(40) % 4
    save_file(tensors, tmp_path / "all.safetensors")
    for name, values in tensors.items():
        np.save(tmp_path / f"{name}.npy", values.numpy())
    return tmp_path, tensors


@pytest.mark.parametrize("name", SAMPLERS)
def test_sample_writes_what_the_sampler_returns(run, saved, name):
    folder, tensors = saved
    arguments = [part for what in tensors for part in (f"--{what}", folder / f"{what}.npy")]
    code, printed, _ = run("sample", name, "--k", "25%", "--seed", "3", "--out", folder / "subset.npz", *arguments)
    assert code == 0
    assert "10 of 40" in printed
    source = [part for what in tensors for part in (f"--{what}", folder / "all.safetensors")]
    assert run("sample", name, "--k", "10", "--seed", "3", "--out", folder / "subset.safetensors", *source)[0] == 0
    first, second = np.load(folder / "subset.npz"), load_file(folder / "subset.safetensors")
    np.testing.assert_array_equal(first["indices"], second["indices"].numpy())
    np.testing.assert_array_equal(first["weights"], second["weights"].numpy())
    assert len(set(first["indices"].tolist())) == 10


def test_sample_is_the_python_call(run, saved):
    folder, tensors = saved
    out = folder / "s.npz"
    arguments = ["--logits", folder / "logits.npy", "--labels", folder / "labels.npy", "--out", out]
    assert run("sample", "logit", "--k", "7", "--seed", "5", *arguments)[0] == 0
    generator = torch.Generator().manual_seed(5)
    expected = samplers.logit(tensors["logits"], tensors["labels"], 7, generator=generator)
    assert np.load(out)["indices"].tolist() == expected.indices.tolist()
    assert np.load(out)["weights"].tolist() == expected.weights.tolist()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["logit", "--k", "5", "--logits", "logits.npy"], "the sampler logit needs --labels"),
        (["k-center", "--k", "5", "--logits", "logits.npy"], "the sampler k_center needs --features"),
        (["random", "--k", "5"], "at least one of --features"),
        (["random", "--k", "41", "--labels", "labels.npy"], "n=40"),
        (["random", "--k", "5", "--labels", "none.npy"], "no file"),
        (["random", "--k", "5", "--labels", "text.npy"], "text.npy is not a numeric .npy file"),
        (["random", "--k", "5", "--labels", "text.csv"], "must be a .npy or .safetensors file"),
        (["random", "--k", "5", "--features", "none.safetensors"], "has no tensor features, or is damaged"),
        (["stratified", "--k", "5", "--labels", "logits.npy"], "labels"),
        (["random", "--k", "5", "--labels", "labels.npy", "--logits", "short.npy"], "as many examples each"),
        (["random", "--k", "5", "--labels", "labels.npy", "--out", "x.csv"], "must end in .npz or .safetensors"),
        (["random", "--k", "5", "--labels", "labels.npy", "--seed", "-1"], "--seed must be in [0, 2^63), got -1"),
        (["random", "--k", "5", "--labels", "labels.npy", "--seed", str(2**63)], "--seed must be in [0, 2^63), got 9"),
        (
            ["random", "--k", "1", "--features", "number.npy"],
            "one entry per example, got a single number in number.npy",
        ),
        (["random", "--k", "1", "--labels", "number.safetensors"], "got a single number in number.safetensors"),
        (["random", "--k", "1", "--labels", "zip.npy"], "zip.npy is not a numeric .npy file"),
        (["random", "--k", "41", "--labels", "labels.npy", "--out", "deep/s.npz"], "n=40"),
        (["random"], "--k"),
    ],
)
def test_sample_refuses_in_one_line(run, saved, monkeypatch, arguments, words):
    folder, _ = saved
    monkeypatch.chdir(folder)
    (folder / "text.npy").write_text("no numbers")
    (folder / "text.csv").write_text("1,2")
    (folder / "none.safetensors").write_text("")
    np.save(folder / "short.npy", np.zeros((3, 4)))
    np.save(folder / "number.npy", np.array(1.0))
    save_file({"labels": torch.tensor(1)}, folder / "number.safetensors")
    (folder / "zip.npy").write_bytes(b"PK\x03\x04 no archive")
    before = files(folder)
    code, printed, error = run("sample", *(["--out", "s.npz"] if "--out" not in arguments else []), *arguments)
    assert (code, printed, error.count("\n")) == (2, "", 1)
    assert words in error
    assert files(folder) == before


def test_info_and_version(run):
    code, printed, _ = run("info")
    assert code == 0
    for name, value in fastif.build_info().items():
        assert f"{name:<10} {value}" in printed
    names = [line.split()[0] for line in printed.splitlines()]
    assert len(set(names)) == len(names)
    assert "gpu" not in names  # build_info has cuda_device
    assert run("--version") == (0, f"fastif {fastif.__version__}\n", "")


def test_without_arguments_it_prints_its_help_and_no_error(run):
    code, printed, error = run()
    assert (code, error) == (2, "")
    assert "class-removal" in printed


def test_help_lists_the_commands():
    shown = CliRunner().invoke(cli.app, ["--help"])
    assert shown.exit_code == 0
    for command in ("scores", "class-removal", "sample", "info"):
        assert command in shown.output


@pytest.mark.parametrize(("command", "instead"), [("scores", "--model"), ("index", "--model"), ("query", "--query")])
def test_help_names_what_stands_for_a_script(command, instead):
    shown = CliRunner().invoke(cli.app, [command, "--help"], terminal_width=200)
    assert f"Or {instead}." in " ".join(shown.stdout.replace("│", " ").split())


def test_help_of_sample_tells_shapes():
    shown = CliRunner().invoke(cli.app, ["sample", "--help"])  # square brackets would be taken for markup
    assert all(shape in shown.output for shape in ("n × d, .npy", "n × c, .npy", "n numbers, .npy"))


@pytest.mark.slow
def test_the_module_runs_and_the_library_needs_no_extra():
    done = subprocess.run(
        [sys.executable, "-m", "fastif", "--version"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"fastif {fastif.__version__}\n")
    extras = ("typer", "rich", "matplotlib", "sklearn", "safetensors")
    code = f"import sys; sys.modules.update(dict.fromkeys({extras!r})); import fastif, fastif.evaluation, fastif.report"
    code += "; import fastif.evaluation.training"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    code = f"import sys; sys.modules.update(dict.fromkeys({extras!r})); import fastif.__main__"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stderr == "error: the command line needs typer: pip install 'fastif[cli]'\n"
