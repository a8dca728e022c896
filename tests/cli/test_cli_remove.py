"""`fastif remove` on a user's own script: what it writes is what Python gives."""

import json
import runpy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastif import remove, verify_removal
from tests.helpers.user_script import files, returned

GONE = [1, 4, 9, 30]


@pytest.fixture(autouse=True)
def indices(script):
    (script / "gone.txt").write_text("30\n4\n1\n9\n4\n")
    return script / "gone.txt"


def test_it_removes_and_verifies(run, script):
    code, printed, error = run("remove", "ownscript:problem", "--indices", "gone.txt", "--verify", "--out", "out")
    assert (code, error.count("error")) == (0, 0)
    model, train, query = returned()
    want = remove(model, train, torch.tensor(GONE), progress=False)
    found = load_file("out/removed.safetensors")
    assert found.keys() == want.state_dict.keys()
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in want.state_dict.items())
    record = json.loads((script / "out" / "removal.json").read_text())
    assert record["removed"] == GONE
    assert [step["objective"] for step in record["steps"]] == pytest.approx([s.objective for s in want.history])
    assert files(script / "out") == ["removal.json", "removed.safetensors", "verification.html", "verification.json"]
    assert str(verify_removal(model, want, train, torch.tensor(GONE), query))[:60] in printed
    assert "4 of 40 examples" in printed


def test_a_query_s_best_can_be_removed_and_layers_samplers_and_certificates_chosen(run, script):
    (script / "best.csv").write_text("query,rank,train,score\n0,1,9,0.5\n1,1,30,0.4\n1,2,9,0.3\n")
    np.save("gone.npy", np.array(GONE))
    code, _, _ = run(
        *("remove", "ownscript:problem", "--indices", "best.csv", "--out", "all", "--layers", "*"),
        *("--sampler", "random", "--k", "50%", "--steps", "1", "--quiet"),
    )
    assert code == 0
    record = json.loads((script / "all" / "removal.json").read_text())
    assert record["removed"] == [9, 30]
    assert record["steps"][0]["subset_size"] == 20
    assert files(script / "all") == ["removal.json", "removed.safetensors"]
    refitted = ("remove", "ownscript:problem", "--indices", "best.csv", "--layers", "*", "--refit-head", "--quiet")
    assert run(*refitted, "--out", "refitted")[0] == 0
    model, train, _ = returned()
    seeded = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    want = remove(
        model, train, torch.tensor([9, 30]), layers="*", refit_head=True, generator=seeded, progress=False
    ).state_dict
    found = load_file("refitted/removed.safetensors")
    assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in want.items())
    record = json.loads((script / "refitted" / "removal.json").read_text())
    assert record["about"]["refit_head"] is True
    further = "from ownscript import problem\n\ndef unseen():\n    x, y = problem()[2]\n    return x + 0.5, y\n"
    (script / "further.py").write_text(further)
    assert run(*refitted, "--unseen", "further:unseen", "--out", "matched")[0] == 0
    _, _, (x, y) = returned()
    seeded = torch.Generator().manual_seed(0)
    how = {"layers": "*", "refit_head": True, "unseen": (x + 0.5, y), "generator": seeded, "progress": False}
    want = remove(model, train, torch.tensor([9, 30]), **how)
    found = load_file("matched/removed.safetensors")
    assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in want.state_dict.items())
    assert json.loads((script / "matched" / "removal.json").read_text())["about"]["unseen"] == "further:unseen"
    code, _, error = run(*refitted, "--unseen", "further:none", "--out", "none")
    assert code != 0
    assert "further has no function none" in error
    certified = ("remove", "ownscript:problem", "--indices", "gone.npy", "--epsilon", "1", "--noise", "0.1")
    code, printed, _ = run(*certified, "--out", "first")
    assert code == 0
    assert "Not certified: the features" in printed
    run(*certified, "--out", "second")
    first, second = (load_file(f"{name}/removed.safetensors")["2.weight"] for name in ("first", "second"))
    assert 0.05 < float((first - second).std()) < 0.3  # noise of its own each time, whatever --seed


LANGUAGE = """
import torch
from torch import nn


class Language(nn.Module):  # each position sees the mean of the words so far
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, tokens):
        places = torch.arange(1, tokens.shape[1] + 1)[:, None]
        return self.head(torch.tanh(self.words(tokens).cumsum(1) / places))


def problem():
    torch.manual_seed(0)
    tokens = torch.randint(7, (40, 6))
    model, data = Language(), (tokens, tokens)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        logits = model(tokens)[:, :-1].flatten(0, 1)
        (nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()) * 5).backward()
        optimizer.step()
    return model, data, data
"""


def test_all_layers_of_a_language_model(run, script):
    (script / "language.py").write_text(LANGUAGE)
    how = ("--loss", "causal_lm", "--layers", "*", "--sampler", "random", "--k", "50%", "--steps", "2")
    code, printed, _ = run("remove", "language.py:problem", "--indices", "gone.txt", *how, "--out", "out")
    assert code == 0
    assert "4 of 40 examples, 2 steps" in printed
    model, train, _ = runpy.run_path("language.py")["problem"]()
    found = load_file("out/removed.safetensors")
    assert all(bool((found[name] != value).any()) for name, value in model.state_dict().items()), "all of them move"
    kept = torch.ones(40, dtype=torch.bool)
    kept[GONE] = False

    def loss(rows):
        logits = model(train[0][rows])[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, train[0][rows][:, 1:].flatten()).item()

    before = loss(kept)
    model.load_state_dict(found)
    assert loss(kept) < before
    assert json.loads((script / "out" / "removal.json").read_text())["about"]["loss"] == "causal_lm"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--indices", "gone.txt", "--loss", "hinge"], "--loss must be one of cross_entropy, token_cross_entropy"),
        (["--indices", "gone.txt", "--loss", "causal_lm", "--verify"], "--verify judges classifiers with one label"),
        (["--indices", "gone.txt", "--loss", "bce", "--layers", "*"], "loss= is for the head alone"),
        (["--indices", "none.txt"], "no file none.txt for --indices"),
        (["--indices", "words.txt"], "words.txt holds no indices: invalid literal"),
        (["--indices", "empty.txt"], "empty.txt holds no indices: it is empty"),
        (["--indices", "other.csv"], "none of the columns train, index, indices"),
        (["--indices", "floats.npy"], "its numbers are float64"),
        (["--indices", "far.txt"], "indices must be in [0, n=40), got 40"),
        (["--indices", "gone.txt", "--epsilon", "1"], "--epsilon and --noise make a certificate together"),
        (["--indices", "gone.txt", "--epsilon", "0", "--noise", "1"], "epsilon must be a finite number > 0, got 0"),
        (
            ["--indices", "gone.txt", "--epsilon", "1", "--noise", "1", "--weight-decay", "0"],
            "a certificate needs weight_decay > 0",
        ),
        (["--indices", "gone.txt", "--steps", "0"], "--steps must be >= 1, got 0"),
        (["--indices", "gone.txt", "--sampler", "best"], "sampler must be one of"),
    ],
)
def test_bad_input_is_one_line(run, script, arguments, message):
    (script / "words.txt").write_text("three\n")
    (script / "empty.txt").write_text("")
    (script / "far.txt").write_text("3\n40\n")
    (script / "other.csv").write_text("a,b\n1,2\n")
    np.save("floats.npy", np.ones(3))
    code, _, error = run("remove", "ownscript:problem", "--out", "out", "--quiet", *arguments)
    assert code == 2
    assert error.count("\n") == 1
    assert message in error
    assert not (script / "out").exists()


def test_a_folder_with_a_removal_is_refused(run, script):
    for want in (0, 2):
        code, _, error = run("remove", "ownscript:problem", "--indices", "gone.txt", "--out", "out", "-q")
        assert code == want
    assert "out holds a removal already" in error
