"""The page of a removal and the numbers on it, against networks by hand."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import fastif
from fastif import Certificate, Networks, remove, verify_removal
from fastif.evaluation import membership, train_halves, without
from tests.helpers.retrainings import NET, QUERY, X, Y
from tests.report.test_report import Tags

X, HELD = X.float(), (QUERY[0].float(), QUERY[1])
GONE = torch.tensor([41, 3, 7, 11, 40])  # in no order


@pytest.fixture(scope="module")
def model(one_thread):
    torch.manual_seed(0)
    return NET(torch.arange(60), 0)


@pytest.fixture(scope="module")
def removal(model):
    return remove(model, (X, Y), GONE, steps=2, progress=False)


@pytest.fixture(scope="module")
def halves(one_thread):
    return train_halves(NET, 60, 3, progress=False)


def logits(model, state, x):
    network = copy.deepcopy(model)
    network.load_state_dict(state)
    with torch.no_grad():
        return network(x).double()


def odds(values, labels):
    return torch.special.logit(values.softmax(1)[torch.arange(len(labels)), labels])


def test_numbers_are_those_of_the_networks(model, removal):
    retrained = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        retrained.append(NET(without(60, GONE), seed).state_dict())
    found = verify_removal(model, removal, (X, Y), GONE, HELD, retrained=retrained)
    rows = {row["network"]: row for row in found.metrics}
    assert list(rows) == ["before", "after", "retrained"]
    gone = GONE.sort().values
    for name, state in (("before", model.state_dict()), ("after", removal.state_dict)):
        own = logits(model, state, X[gone])
        losses = cross_entropy(own, Y[gone], reduction="none")
        assert found.losses[name] == pytest.approx(losses.tolist())
        assert rows[name]["removed_loss"] == pytest.approx(float(losses.mean()))
        alike = torch.isin(HELD[1], Y[gone])
        held = cross_entropy(logits(model, state, HELD[0])[alike], HELD[1][alike], reduction="none")
        assert rows[name]["membership_auc"] == pytest.approx(membership(losses, held).auc)
    strangers = torch.stack([odds(logits(model, state, X[gone]), Y[gone]) for state in retrained]).mean(0)
    excess = {
        name: odds(logits(model, state, X[gone]), Y[gone]) - strangers
        for name, state in (("before", model.state_dict()), ("after", removal.state_dict))
    }
    assert found.known == pytest.approx({name: float(values.mean()) for name, values in excess.items()})
    order = excess["after"].argsort(descending=True)
    assert [entry["example"] for entry in found.remembered] == gone[order].tolist()
    assert [entry["excess_before"] for entry in found.remembered] == pytest.approx(
        excess["before"][order].tolist(), abs=1e-6
    )
    assert [entry["label"] for entry in found.remembered] == Y[gone][order].tolist()
    assert [row["name"] for row in found.changed] == ["2.weight", "2.bias"]
    change = removal.state_dict["2.weight"] - model[2].weight.detach()
    assert found.changed[0]["change"] == pytest.approx(float(change.norm()))
    assert found.changed[0]["relative"] == pytest.approx(float(change.norm() / model[2].weight.detach().norm()))


def test_halves_count_where_they_never_saw_the_example(model, removal, halves):
    found = verify_removal(model, removal, DataLoader(TensorDataset(X, Y), 16), GONE, [HELD], networks=halves)
    gone = GONE.sort().values
    strangers = []
    for example in gone.tolist():
        out = [s for s, kept in zip(halves.states, halves.kept, strict=True) if example not in kept.tolist()]
        assert len(out) == 3
        values = [odds(logits(model, s, X[example : example + 1]), Y[example : example + 1]) for s in out]
        strangers.append(torch.cat(values).mean())
    excess = odds(logits(model, removal.state_dict, X[gone]), Y[gone]) - torch.stack(strangers)
    assert found.known is not None
    assert found.known["after"] == pytest.approx(float(excess.mean()))
    assert len(found.losses["halves that never saw it"]) == 15
    row = found.metrics[-1]
    assert row["network"] == "halves that never saw it"
    assert row["networks"] == sum(int((~torch.isin(gone, kept)).sum() >= 2) for kept in halves.kept)
    assert "beyond networks that never saw them" in str(found)


def test_page_and_file_hold_it(model, removal, halves, tmp_path):
    found = verify_removal(
        model, removal, (X, Y), GONE, HELD, networks=halves, out=tmp_path / "new", about={"script": "<own>"}
    )
    page = (tmp_path / "new" / "verification.html").read_text()
    Tags(page)  # well formed
    for words in (
        "Removal of 5 examples",
        "Still remembered best",
        "2.weight",
        "halves that never saw it (",
        "&lt;own&gt;",
    ):
        assert words in page
    assert page.count("data:image/png") == 1
    assert "Certificate" not in page
    stored = json.loads((tmp_path / "new" / "verification.json").read_text())
    assert stored["remembered"] == found.remembered
    assert stored["about"] == {"script": "<own>"}


def test_alone_it_says_what_is_missing_and_a_certificate_is_told(model, tmp_path):
    removal = remove(model, (X, Y), GONE, certificate=Certificate(1.0, 1e-5, 0.1), progress=False)
    found = verify_removal(model, removal, (X, Y), GONE, HELD, out=tmp_path)
    assert found.known is None
    assert found.remembered[0]["excess_after"] is None
    losses = [entry["loss_after"] for entry in found.remembered]
    assert losses == sorted(losses)
    page = (tmp_path / "verification.html").read_text()
    assert "nothing says how low it should be" in page
    assert "Not certified: the features" in page
    plain = verify_removal(model, removal.state_dict, (X, Y), GONE, HELD)
    assert plain.certified is None
    assert plain.metrics == found.metrics


def test_refusals(model, removal, halves):
    def refused(error, message, **change):
        given = dict(removal=removal, train=(X, Y), removed=GONE, held_out=HELD) | change
        with pytest.raises(error, match=message):
            verify_removal(model, **given)

    def kept(indices):
        return Networks(halves.states, [indices] * 6)

    one_class = torch.full((8,), 2)
    refused(ValueError, r"\[0, n=60\), got 60", removed=torch.tensor([1, 60]))
    refused(ValueError, "at least two examples", removed=torch.tensor([1]))
    refused(ValueError, "of the removed ones' labels", held_out=(HELD[0], one_class), removed=torch.tensor([0, 3]))
    refused(ValueError, "other data: example 60 of n=60", networks=kept(torch.arange(61)))
    refused(ValueError, "every network was trained on the removed example 3", networks=kept(torch.arange(40)))
    last = torch.tensor([40, 41])
    refused(ValueError, "none of the networks was trained on .* 40", networks=kept(torch.arange(3)), removed=last)
    refused(TypeError, r"must be fastif.Networks, got list", networks=[])
    refused(ValueError, "have labels", train=X)
    broken = {name: value / 0 for name, value in removal.state_dict.items()}
    refused(ValueError, "not all finite", removal=broken)
    assert fastif.verify_removal is verify_removal
    assert isinstance(model, nn.Module)
