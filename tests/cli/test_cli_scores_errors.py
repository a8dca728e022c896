"""`fastif scores` says in one line what is wrong, and shows the errors of a user's own script as they are."""

import json

import numpy as np
import pytest

from tests.helpers.user_script import files


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
        (["ownscript:problem", "--damping", "much"], "--damping must be a number >= 0, auto or training, got much"),
        (["ownscript:problem", "--damping", "training"], "--damping training needs --training-time"),
        (["ownscript:problem", "--training-time", "9"], "--training-time must be left out without --damping training"),
        (["ownscript:problem", "--damping", "training", "--training-time", "0"], "TrainingDamping: time must be"),
        (["ownscript:problem", "--damping", "-1"], "damping must be"),
        (["ownscript:problem", "--fisher", "true"], "--fisher must be one of exact, monte_carlo, empirical, got true"),
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
        (
            ["ownscript:problem", "--curvature", "arnoldi", "--damping", "0"],
            "damping must be a number > 0 or a TrainingDamping",
        ),
        (["ownscript:problem", "--curvature", "data-inf", "--damping", "0"], "damping must be a number > 0 or 'auto'"),
        (["ownscript:problem", "--layers", "nine"], "layers='nine' names no layer"),
        (
            ["ownscript:problem", "--loss", "hinge"],
            "--loss must be one of cross_entropy, token_cross_entropy, causal_lm, bce, mse, got",
        ),
        (["ownscript:problem", "--measurement", "logit"], "--measurement must be one of loss, margin, log_odds"),
        (["ownscript:problem", "--by", "head"], "--by must be one of all, layer, token, got head"),
        (
            ["ownscript:problem", "--by", "layer", "--low-rank", "2"],
            "--low-rank must be left out with --by layer, got 2",
        ),
        (["ownscript:problem", "--low-rank", "0"], "--low-rank must be >= 1, got 0"),
        (["ownscript:pooled", "--by", "token"], "layer '3' has 1 positions where others have 4; leave it out"),
        (["ownscript:problem", "--query-groups", "groups.npy"], "no file groups.npy for --query-groups"),
        (["ownscript:problem", "--query-groups", "ownscript.py"], "must be a .npy or .safetensors file, got ownscript"),
        (
            ["ownscript:problem", "--query-groups", "../five.npy"],
            "query_groups must be [6] numbers >= 0, got shape [5]",
        ),
        (["ownscript:problem", "--query-groups", "../real.npy"], "--query-groups must be int64, got torch.float64"),
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
    np.save(script.parent / "five.npy", np.arange(5))
    np.save(script.parent / "real.npy", np.arange(6.0))
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
