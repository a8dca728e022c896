"""A removal from several layers: what does not change it, what it leaves as it is, and how it is undone."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from fastif import EKFAC, remove, samplers
from tests.helpers.problems import QUIET, REMOVED, flat, small_images, trained


@pytest.fixture(scope="module")
def problem():
    return trained()


@pytest.fixture(scope="module")
def images():
    return small_images()


def test_model_and_buffers_are_as_they_were(images):
    model, x, y = images
    model = copy.deepcopy(model).train()
    for p in list(model.parameters())[:1]:
        p.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    removal = remove(model, (x, y), REMOVED, layers="*", subset=partial(samplers.random, k=20), steps=2, **QUIET)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()][:2] == [False, True]
    assert model.training
    assert all(module.training for module in model.modules())
    assert not model._forward_hooks
    buffers = [name for name, _ in model.named_buffers()]
    assert buffers
    assert all(torch.equal(removal.state_dict[name], before[name]) for name in buffers)
    assert not torch.equal(removal.state_dict["0.0.weight"], before["0.0.weight"])  # frozen for training, not for this


def test_neither_batches_nor_their_loader_change_the_steps(images):
    model, x, y = images
    dataset = torch.utils.data.TensorDataset(x, y)
    settings = dict(layers="*", subset=partial(samplers.logit, k=20), steps=3, **QUIET)
    runs = [
        remove(model, data, REMOVED, batch_size=size, generator=torch.Generator().manual_seed(2), **settings)
        for data, size in (((x, y), 256), ((x, y), 7), (torch.utils.data.DataLoader(dataset, batch_size=11), 256))
    ]
    for run in runs[1:]:
        assert torch.allclose(flat(run.history[-1].parameters), flat(runs[0].history[-1].parameters), atol=1e-9)


class Keywords(nn.Module):
    """A model as transformers' are: keyword arguments in, a mapping with logits out."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, *, inputs, labels=None):
        return {"logits": self.body(inputs)}


def test_batches_may_be_mappings(problem):
    batches = [
        {"inputs": x, "labels": y} for x, y in zip(problem.x.split(40), problem.y.split(40), strict=True)
    ]  # 40, 40, 10
    settings = dict(layers="*", subset=partial(samplers.logit, k=20), steps=2, batch_size=40, **QUIET)
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    plain = remove(problem.model, (problem.x, problem.y), REMOVED, generator=generators[0], **settings)
    keywords = remove(Keywords(problem.model), batches, REMOVED, generator=generators[1], **settings)
    assert torch.allclose(flat(keywords.history[-1].parameters), flat(plain.history[-1].parameters), atol=1e-12)
    assert keywords.state_dict.keys() == {f"body.{key}" for key in plain.state_dict}


def test_the_heads_batches_may_be_mappings_with_labels(problem):
    class Named(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, inputs):
            return self.body(inputs)

    batches = [{"inputs": x, "labels": y} for x, y in zip(problem.x.split(40), problem.y.split(40), strict=True)]
    plain = remove(problem.model, (problem.x, problem.y), REMOVED, steps=2, **QUIET)
    named = remove(Named(problem.model), batches, REMOVED, steps=2, **QUIET)
    ours, theirs = (removal.history[-1].parameters for removal in (named, plain))
    assert torch.allclose(ours["body.2.weight"], theirs["2.weight"], atol=1e-12)


def test_layers_that_no_pattern_of_curvature_matches_stay(problem):
    removal = remove(
        *(problem.model, (problem.x, problem.y), REMOVED), layers="*", curvature={"0": EKFAC(1e-3)}, steps=1, **QUIET
    )
    assert list(removal.history[0].parameters) == ["0.weight", "0.bias"]
    assert torch.equal(removal.state_dict["2.weight"], problem.model[2].weight)


def test_same_generator_same_bits(problem):
    first, second = (
        remove(
            *(problem.model, (problem.x, problem.y), REMOVED),
            layers="*", subset=partial(samplers.logit, k=9), generator=torch.Generator().manual_seed(3), **QUIET,
        ).history
        for _ in range(2)
    )  # fmt: skip
    assert all(torch.equal(flat(a.parameters), flat(b.parameters)) for a, b in zip(first, second, strict=True))


def test_a_fixed_subset_leaves_the_removed_out_and_keeps_the_other_weights(problem):
    everything = samplers.Subset(torch.arange(90), torch.full((90,), 1 / 90, dtype=torch.float64))
    exact, fixed = (
        remove(problem.model, (problem.x, problem.y), REMOVED, layers="*", steps=2, subset=subset, **QUIET).history
        for subset in (None, everything)
    )
    assert [step.subset_size for step in fixed] == [86, 86]
    assert torch.allclose(flat(exact[-1].parameters), flat(fixed[-1].parameters), atol=1e-10)


def test_frozen_layers_stay(problem):
    removal = remove(problem.model, (problem.x, problem.y), REMOVED, layers="0", steps=2, **QUIET)
    assert torch.equal(removal.state_dict["2.weight"], problem.model[2].weight)
    assert not torch.equal(removal.state_dict["0.weight"], problem.model[0].weight)


@pytest.mark.parametrize("layers", [None, "*"])
def test_undo_and_any_step(problem, layers):
    removal = remove(problem.model, (problem.x, problem.y), REMOVED, layers=layers, steps=3, **QUIET)
    before = problem.model.state_dict()
    undone = removal.after(0)
    assert undone.keys() == before.keys()
    assert all(torch.equal(undone[key], value) for key, value in before.items())
    last = removal.after(len(removal.history))
    assert all(torch.equal(last[key], value) for key, value in removal.state_dict.items())
    step = removal.history[0]
    weight = step.parameters["2.weight"]
    assert torch.equal(removal.after(1)["2.weight"], weight)
    undone["2.weight"].zero_()  # a copy: it may be changed
    assert torch.equal(removal.after(0)["2.weight"], before["2.weight"])
    with pytest.raises(ValueError, match=r"step must be in \[0, 3\], got 4"):
        removal.after(4)


@pytest.mark.parametrize("layers", [None, "*"])
def test_undo_after_the_model_has_taken_the_removal_on(problem, layers):
    model, before = copy.deepcopy(problem.model), copy.deepcopy(problem.model.state_dict())
    removal = remove(model, (problem.x, problem.y), REMOVED, layers=layers, steps=1, **QUIET)
    model.load_state_dict(removal.state_dict)
    assert not torch.equal(model[2].weight, before["2.weight"])
    model.load_state_dict(removal.after(0))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        model[2].weight.zero_()
    assert torch.equal(removal.after(0)["2.weight"], before["2.weight"])


def test_shared_weights_move_under_all_their_names():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    x, y = torch.randn(30, 4), torch.arange(30) % 3
    removal = remove(model, (x, y), torch.tensor([0]), layers="*", steps=1, progress=False)
    assert torch.equal(removal.state_dict["0.weight"], removal.state_dict["2.weight"])
    assert not torch.equal(removal.state_dict["0.weight"], model[0].weight)
    assert torch.equal(removal.after(0)["2.weight"], model[0].weight)


def test_an_optimum_is_not_left():
    """Without weight decay and with losses that underflow to zero, ∇F is zero: there is nothing to do."""
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 2, bias=False))
    model[1].weight.data = 1e6 * torch.eye(2)
    x, y = torch.eye(2).repeat(3, 1), torch.arange(6) % 2
    removal = remove(model, (x, y), torch.tensor([0]), layers="*", curvature=EKFAC(1e-3), weight_decay=0.0,
                     progress=False)  # fmt: skip
    assert removal.history == []
    assert torch.equal(removal.state_dict["1.weight"], model[1].weight)


def test_measures_time_and_memory(problem):
    from fastif import build_info

    step = remove(problem.model, (problem.x, problem.y), REMOVED, layers="*", steps=1, **QUIET).history[0]
    assert step.seconds > 0
    assert (step.peak_bytes is not None) == build_info()["compiled"]
