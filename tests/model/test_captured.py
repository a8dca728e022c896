"""Gradients of a training's own backward passes are autograd's, example by example, and the training is as without."""

import importlib.util
import weakref

import pytest
import torch
from torch import nn

import fastif
from fastif.data.batch import Arguments
from fastif.model.losses import per_sample
from tests.helpers import networks
from tests.helpers.captures import assert_unchanged, by_autograd, snapshot
from tests.helpers.networks import N, build

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed (make test installs it)"
)
NETWORKS = [*networks.LAYERS, *(pytest.param(name, marks=needs_transformers) for name in networks.TRANSFORMERS)]


def run(network):
    if isinstance(network.x, dict):
        return network.model(**{key: value for key, value in network.x.items() if key != "labels"})
    return network.model(*network.x) if isinstance(network.x, Arguments) else network.model(network.x)


def mean_loss(network):
    return per_sample(network.loss, run(network), network.batch, N).mean()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_examples_gradient_is_autograds(name):
    network = build(name)
    model = network.model
    mean_loss(network).backward()  # the training without
    without = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    before = snapshot(model)
    with fastif.capture(model) as captured:
        mean_loss(network).backward()
        got, norms = captured.gradients(), captured.norms()
    assert captured.skipped.keys() == {key for key, p in model.named_parameters() if not p.requires_grad}
    for key, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, without[key], rtol=1e-5, atol=1e-9)
    model.zero_grad()
    assert_unchanged(before, model)
    names = {p: key for key, p in model.named_parameters() if p.requires_grad}
    want = {names[p]: rows for p, rows in by_autograd(network, names).items()}
    largest = max(float(rows.abs().max()) for rows in want.values())
    rtol, atol = (1e-5, 1e-6) if name == "llama" else (1e-9, 1e-12)  # its RMSNorm computes in float32
    assert got.keys() == want.keys()
    for key, rows in want.items():
        assert torch.allclose(got[key], rows, rtol=rtol, atol=atol * largest), key
    squares = sum(rows.flatten(1).square().sum(1) for rows in want.values())
    torch.testing.assert_close(norms, squares.sqrt(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["tied embedding", "three times", "self-attention", "conv2d", "encoder"])
def test_numbers_as_the_backward_pass_goes(name):
    """Norms and products with directions, nothing kept: as of the gradients that autograd gives."""
    network = build(name)
    names = {p: key for key, p in network.model.named_parameters()}
    want = {names[p]: rows for p, rows in by_autograd(network, names).items()}
    generator = torch.Generator().manual_seed(3)
    directions = {k: torch.randn(3, *rows.shape[1:], generator=generator).double() for k, rows in want.items()}
    if len(directions) > 1:
        directions.pop(next(iter(directions)))  # absent: zero
    with fastif.capture(network.model, keep="numbers", directions=directions) as captured:
        mean_loss(network).backward()
        norms, dots, by_layer = captured.norms(), captured.dots(), captured.norms_by_layer()
        assert not captured._passed()._calls  # let go
        with pytest.raises(ValueError, match="need keep='factors'"):
            captured.gradients()
        with pytest.raises(ValueError, match="need keep='factors'"):
            captured.dots(directions)
    squares = sum(rows.flatten(1).square().sum(1) for rows in want.values())
    torch.testing.assert_close(norms, squares.sqrt())
    torch.testing.assert_close(torch.stack(list(by_layer.values())).square().sum(0), squares)
    expected = sum(directions[k].flatten(1) @ want[k].flatten(1).T for k in directions)
    torch.testing.assert_close(dots, expected)
    with fastif.capture(network.model) as captured:
        mean_loss(network).backward()
        torch.testing.assert_close(captured.dots(directions), expected)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


X, Y = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).double(), torch.arange(6) % 3


def test_the_scale_is_that_of_the_loss():
    model = small()
    each = nn.functional.cross_entropy(model(X), Y, reduction="none")
    want = torch.stack([torch.autograd.grad(loss, model[0].weight, retain_graph=True)[0] for loss in each])
    with fastif.capture(model) as captured:
        nn.functional.cross_entropy(model(X), Y).backward()
        torch.testing.assert_close(captured.gradients()["0.weight"], want)
        captured.factor = 1.0
        nn.functional.cross_entropy(model(X), Y, reduction="sum").backward()
        torch.testing.assert_close(captured.gradients()["0.weight"], want)
        norms = captured.norms()
        captured.factor = 64.0  # as 6 examples of 24 words and a mean over their words would
        (nn.functional.cross_entropy(model(X), Y, reduction="sum") / 64).backward()
        torch.testing.assert_close(captured.norms(), norms)


def test_a_training_with_it_is_the_training_without():
    """To the bit, over steps with dropout, an optimizer, accumulation and evaluation in between."""

    def train(around):
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 3)).double()
        torch.manual_seed(7)
        for p in model.parameters():
            nn.init.normal_(p)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        seen = []
        with around(model) as captured:
            for _ in range(3):
                for half in (slice(0, 4), slice(4, 6)):
                    (nn.functional.cross_entropy(model(X[half]), Y[half]) / 2).backward()
                    if captured is not None:
                        seen.append(captured.n)
                optimizer.step()
                optimizer.zero_grad()
                with torch.no_grad():
                    model.eval()(X)
                model.train()
        return list(model.parameters()), seen

    class Nothing:
        def __init__(self, model): ...
        def __enter__(self): ...
        def __exit__(self, *_): ...

    plain, _ = train(Nothing)
    watched, seen = train(fastif.capture)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert seen == [4, 2] * 3


def test_with_dropout_gradients_are_of_the_step_that_was_taken():
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    with fastif.capture(model) as captured:
        nn.functional.cross_entropy(model(X), Y).backward()
        for name, rows in captured.gradients().items():
            torch.testing.assert_close(rows.mean(0), model.get_parameter(name).grad)


def test_nothing_is_held_once_it_is_over():
    model, x = small(), X.clone()
    with fastif.capture(model) as captured:
        loss = nn.functional.cross_entropy(model(x), Y)
        loss.backward()
        held = weakref.ref(captured._passed())
        with torch.no_grad():
            model(x)
        assert held() is None  # the graph, which the loss holds, does not hold what was seen
    loss = nn.functional.cross_entropy(model(x), Y)
    loss.backward()
    with pytest.raises(ValueError, match="there are no gradients"):
        captured.norms()


# ---------------------------------------------------------------------------------------------------------- bad input


def test_what_is_asked_too_early():
    model = small()
    with fastif.capture(model) as captured:
        loss = nn.functional.cross_entropy(model(X), Y)
        with pytest.raises(ValueError, match=r"ask after backward\(\)"):
            captured.norms()
        loss.backward()
        with pytest.raises(ValueError, match="dots needs directions"):
            captured.dots()


def test_a_backward_pass_over_two_calls_of_the_model():
    model = small()
    with fastif.capture(model):
        loss = model(X).sum() + model(X).square().sum()
        with pytest.raises(ValueError, match="reached an earlier call of the model than the last"):
            loss.backward()


def test_two_backward_passes_of_one_call_add_up_or_are_refused():
    model = small()
    with fastif.capture(model) as captured:
        outputs = model(X)
        first, second = nn.functional.cross_entropy(outputs, Y), outputs.square().mean(1).mean()
        first.backward(retain_graph=True)
        second.backward()
        torch.testing.assert_close(captured.gradients()["2.bias"].mean(0), model[2].bias.grad)
    with fastif.capture(model, keep="numbers"):
        outputs = model(X)
        outputs.sum().backward(retain_graph=True)
        with pytest.raises(ValueError, match="a second backward pass for one call"):
            outputs.square().sum().backward()


def test_parameters_of_no_known_layer_are_named():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.rate = nn.Linear(5, 3), nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.inner(x) * self.rate.sum()

    model = Scaled().double()
    with fastif.capture(model) as captured:
        with pytest.warns(UserWarning, match="not covered:\n  rate: its gradients would take a backward pass") as said:
            outputs = model(X)
        assert [warning.filename for warning in said] == [__file__]  # though torch called the hook that warns
        nn.functional.cross_entropy(outputs, Y).backward()
        assert set(captured.gradients()) == {"inner.weight", "inner.bias"}


def test_batch_norm_in_train_mode_and_outputs_without_examples():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).double()
    with fastif.capture(model), pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\) is in train mode"):
        model(X)
    turned = nn.Sequential(nn.Linear(5, 4), nn.Flatten(0)).double()
    with fastif.capture(turned), pytest.raises(ValueError, match="outputs must have the examples first"):
        turned(X)


def test_arguments():
    with (
        pytest.raises(ValueError, match="keep must be 'factors' or 'numbers', got 'norms'"),
        fastif.capture(small(), keep="norms"),
    ):
        pass
    model = small()
    for directions, told in (({"nothing": X}, "got \\['nothing'\\]"), ({"0.weight": X}, r"must be \[q, 4, 5\]")):
        with fastif.capture(model) as captured:
            model(X).sum().backward()
            with pytest.raises(ValueError, match=told):
                captured.dots(directions)
