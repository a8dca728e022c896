"""The table of unlearning: every entry by hand, resumable, and refused where it cannot be."""

import copy
import json
import math
from functools import partial

import pytest
import torch
from scipy import special, stats
from torch import nn

from fastif import Networks
from fastif.evaluation import baselines, membership, train_halves, u_lira, unlearning, without
from fastif.evaluation.trainings import Trainings
from fastif.evaluation.unlearned import kl, relearn, tug_of_war
from fastif.model.losses import log_odds
from tests.helpers.retrainings import NET, QUERY, X, Y

TRAIN, HELD = (X.float(), Y), (QUERY[0].float(), QUERY[1])
GONE = torch.tensor([3, 7, 11, 40, 41])
MODEL = NET(torch.arange(60), 0)
HOW = dict(seeds=2, progress=False, relearning_lr=0.1)
METHODS = {
    "head": partial(baselines.newton_steps, steps=2),
    "fine-tuning": partial(baselines.fine_tuning, lr=0.05),
}


def broken_in_the_middle(model, data, removed, seed):
    del data, removed, seed
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    return model


def nothing(model, data, removed, seed):
    del data, removed, seed
    return model


def logits(model, x):
    with torch.no_grad():
        return model(x).double()


@pytest.fixture(scope="module")
def table(one_thread):
    return unlearning(MODEL, NET, TRAIN, GONE, HELD, METHODS, **HOW)


def trained(kept, seed):
    torch.manual_seed(seed)
    return NET(kept, seed)


def test_every_metric_by_hand(table):
    kept = without(60, GONE)
    x, y = TRAIN
    parts = {"removed": (x[GONE], y[GONE]), "retained": (x[kept], y[kept]), "held_out": HELD}
    before = [trained(torch.arange(60), seed) for seed in (0, 1)]
    after = [trained(kept, seed) for seed in (0, 1)]
    moved = []
    for seed in (0, 1):
        model = copy.deepcopy(before[seed])
        torch.manual_seed(seed)
        model.load_state_dict(METHODS["fine-tuning"](copy.deepcopy(model), TRAIN, GONE, seed))
        moved.append(model)
    for name, networks, others in (
        ("nothing removed", before, lambda _: after),
        ("retrained", after, lambda seed: [after[1 - seed]]),
        ("fine-tuning", moved, lambda _: after),
    ):
        for seed in (0, 1):
            (row,) = [r for r in table["rows"] if (r["method"], r["seed"]) == (name, seed)]
            tug = 1.0
            for part, (px, py) in parts.items():
                own, theirs = logits(networks[seed], px), [logits(o, px) for o in others(seed)]
                accuracy = float((own.argmax(1) == py).double().mean())
                wanted = sum(float((o.argmax(1) == py).double().mean()) for o in theirs) / len(theirs)
                tug *= 1 - abs(accuracy - wanted)
                p = [special.softmax(o.numpy(), 1) for o in theirs]
                far = [stats.entropy(q, special.softmax(own.numpy(), 1), axis=1).mean() for q in p]
                assert row[f"{part}_accuracy"] == pytest.approx(accuracy, abs=1e-12)
                loss = -special.log_softmax(own.numpy(), 1)[range(len(py)), py.numpy()].mean()
                assert row[f"{part}_loss"] == pytest.approx(loss, rel=1e-9)
                assert row[f"{part}_kl"] == pytest.approx(sum(far) / len(far), rel=1e-6)
            assert row["tug_of_war"] == pytest.approx(tug, rel=1e-9)
            losses = [nn.functional.cross_entropy(logits(networks[seed], px), py, reduction="none")
                      for px, py in (parts["removed"], parts["held_out"])]  # fmt: skip
            told = membership(losses[0], losses[1][torch.isin(HELD[1], y[GONE])])
            assert (row["membership_auc"], row["membership_balanced_accuracy"]) == pytest.approx(told)
            learner = copy.deepcopy(networks[seed])
            target = nn.functional.cross_entropy(logits(before[seed], x[GONE]), y[GONE])
            steps = 0
            while nn.functional.cross_entropy(logits(learner, x[GONE]), y[GONE]) > target and steps < 100:
                grads = torch.autograd.grad(
                    nn.functional.cross_entropy(learner(x[GONE]), y[GONE]), [*learner.parameters()]
                )
                with torch.no_grad():
                    for p, g in zip(learner.parameters(), grads, strict=True):
                        p -= 0.1 * g
                steps += 1
            assert row["relearning_steps"] == pytest.approx(steps, abs=1)  # rounding of a threshold
            if name == "nothing removed":
                assert row["relearning_steps"] == 0


def test_summary_is_mean_and_deviation(table):
    assert [entry["method"] for entry in table["summary"]] == ["nothing removed", "retrained", *METHODS]
    for entry in table["summary"]:
        values = torch.tensor([r["held_out_kl"] for r in table["rows"] if r["method"] == entry["method"]]).double()
        assert entry["held_out_kl_mean"] == pytest.approx(float(values.mean()), rel=1e-5)
        assert entry["held_out_kl_std"] == pytest.approx(float(values.std()), rel=1e-4)
        assert entry["runs"] == 2
    assert table["by_example"].keys() == {"nothing removed", "retrained", *METHODS, "nothing removed: held out"}
    assert all(len(v) == 5 for k, v in table["by_example"].items() if ":" not in k)
    json.dumps(table, allow_nan=False)


def test_one_seed_has_no_spread_and_no_other_retrained_network():
    table = unlearning(MODEL, NET, TRAIN, GONE, HELD, {}, **{**HOW, "seeds": 1})
    before, retrained = table["summary"]
    assert before["tug_of_war_mean"] is not None
    assert before["tug_of_war_std"] is None
    assert retrained["tug_of_war_mean"] is None
    assert retrained["removed_kl_mean"] is None


def test_u_lira_takes_the_half_networks_through_the_method():
    networks = train_halves(NET, 60, 3, progress=False)
    table = unlearning(MODEL, NET, TRAIN, GONE, HELD, METHODS, networks=networks, **{**HOW, "seeds": 1})
    x, y = TRAIN
    values = []
    for state, kept in zip(networks.states, networks.kept, strict=True):
        model = copy.deepcopy(MODEL)
        model.load_state_dict(state)
        own = torch.isin(kept, GONE).nonzero()[:, 0]
        if len(own):
            torch.manual_seed(0)
            state = METHODS["head"](copy.deepcopy(model), (x[kept], y[kept]), own, 0)
            model.load_state_dict(state)
        probs = logits(model, x[GONE]).softmax(1)[torch.arange(5), y[GONE]]
        values.append(torch.special.logit(probs))
    want = u_lira(torch.stack(values), torch.stack([torch.isin(GONE, kept) for kept in networks.kept]))
    entry = next(entry for entry in table["u_lira"] if entry["method"] == "head")
    assert entry["auc"] == pytest.approx(want.auc)
    assert entry["by_example"] == pytest.approx(want.by_example.tolist())
    assert [e["method"] for e in table["u_lira"]] == ["nothing removed", *METHODS]


def test_an_interrupted_job_goes_on(tmp_path, monkeypatch):
    networks = train_halves(NET, 60, 2, progress=False)
    calls: list[int] = []

    def interrupted(self, *given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return without_it(self, *given)

    job = unlearning.__globals__["_Job"]
    without_it = job._without
    monkeypatch.setattr(job, "_without", interrupted)
    how = dict(networks=networks, out=tmp_path, **HOW)
    with pytest.raises(KeyboardInterrupt):
        unlearning(MODEL, NET, TRAIN, GONE, HELD, METHODS, **how)
    with pytest.raises(ValueError, match="resume"):
        unlearning(MODEL, NET, TRAIN, GONE, HELD, METHODS, **how)
    trained_again: list[int] = []
    monkeypatch.setattr(Trainings, "train", lambda self, task: trained_again.append(task.number))
    table = unlearning(MODEL, NET, TRAIN, GONE, HELD, METHODS, resume=True, **how)
    assert not trained_again
    assert len(calls) == 3 + 2 + 2 * 4
    again = unlearning(MODEL, NET, TRAIN, GONE, HELD, METHODS, resume=True, **how)
    assert again == table
    with pytest.raises(ValueError, match="relearning_lr was 0.1, is 0.2"):
        unlearning(MODEL, NET, TRAIN, GONE, HELD, METHODS, resume=True, **{**how, "relearning_lr": 0.2})
    with pytest.raises(ValueError, match="holds a finished job"):
        unlearning(MODEL, NET, TRAIN, GONE, HELD, METHODS, **how)


def test_formulas_alone():
    assert tug_of_war([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]) == 1.0
    p, q = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    want = stats.entropy(special.softmax(p.numpy(), 1), special.softmax(q.numpy(), 1), axis=1).mean()
    assert kl(p, q) == pytest.approx(want, rel=1e-6)
    assert kl(p, p) == 0
    y = torch.tensor([0, 2, 1, 1])
    assert torch.allclose(log_odds(p, y), torch.special.logit(p.softmax(1)[torch.arange(4), y]))
    assert relearn(MODEL, TRAIN, -1.0, lr=0.1, most=3) == (3, False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(removed=torch.tensor([60, 1])), ValueError, r"\[0, n=60\), got 60"),
        (dict(removed=torch.tensor([4])), ValueError, "at least two examples"),
        (dict(removed=torch.arange(60)), ValueError, "nothing stays"),
        (dict(held_out=(HELD[0], torch.full((8,), 9))), ValueError, "held_out must hold at least two"),
        (dict(train=(X, Y.float())), TypeError, "train must be a pair of tensors"),
        (dict(methods={"retrained": nothing}), ValueError, "no method may be called 'retrained'"),
        (dict(methods={"mine": 3}), TypeError, "'mine' must be a function"),
        (dict(methods={"mine": broken_in_the_middle}), ValueError, "that 'mine' made is not finite"),
        (
            dict(methods={"mine": lambda *given: 3}),
            TypeError,
            "'mine' must return an nn.Module or a state dict, got int",
        ),
        (dict(networks=Networks([], [])), ValueError, "at least two pairs"),
        (dict(networks=Networks([{}] * 4, [torch.arange(70)] * 4)), ValueError, "other data: example 69 of n=60"),
        (dict(networks=Networks([{}] * 4, [torch.arange(30)] * 4)), ValueError, "complementary halves"),
        (dict(relearning_lr=0.0), ValueError, "relearning_lr must be a finite number > 0"),
        (dict(key="mine"), ValueError, "needs out="),
    ],
)
def test_refusals(change, error, message):
    given = {"train": TRAIN, "removed": GONE, "held_out": HELD, "methods": {}, **HOW, "seeds": 1, **change}
    with pytest.raises(error, match=message):
        unlearning(MODEL, NET, **given)
