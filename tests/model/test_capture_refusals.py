"""What a capture refuses, and with it Influence: nothing wrong is taken for a gradient, and no trace is left."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastif import KFAC, Identity, Influence
from fastif.model.capture import Capture
from tests.helpers import networks
from tests.helpers.captures import assert_unchanged, by_autograd, captured, snapshot
from tests.helpers.networks import Apply, Checkpointed, N, build, inputs, tokens, wavy


class Refused(Exception):
    pass


@pytest.mark.parametrize("name", ["linear", "self-attention", "encoder", "frozen", "tied embedding"])
@pytest.mark.parametrize("where", ["forward", "loss", "backward"])
def test_an_error_inside_leaves_the_model_as_it_was(name, where):
    network = build(name)
    capture, before = Capture(network.model), snapshot(network.model)

    def refuse(*_):
        raise Refused

    def loss(outputs, batch):
        if where == "loss":
            refuse()
        outputs.register_hook(refuse)
        return wavy(outputs, batch)

    model = network.model if where == "forward" else nn.Module()
    handle = model.register_forward_hook(refuse)  # after every layer has run
    with pytest.raises(Refused):
        captured(capture, network._replace(loss=loss))
    handle.remove()
    assert_unchanged(before, network.model)
    assert captured(capture, network)  # and it can be used again


def attempt(model, x=None, loss=wavy, layers=None):
    model.double()
    network = networks.Network(model, inputs(6) if x is None else x, None, loss)
    before = snapshot(model)
    try:
        captured(Capture(model, layers), network)
    finally:
        if not any(isinstance(module, nn.BatchNorm1d) and module.training for module in model.modules()):
            assert_unchanged(before, model)


def _overwrites(m, x):
    h = m.first(x) + 1
    y = m.second(h)
    h.mul_(2)
    return y


class Behind(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(11, 4), nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(self.out(self.table(x)), self.table.weight)


def _batch_last(m, x):
    return m.first(x.T).T


def _mixes(m, x):
    h = m.first(x)
    return m.second(h - h.mean(0))


def _divides(m, x):
    h = m.first(x)
    scale = torch.ones(len(x), 1, dtype=x.dtype)
    scale[3] = torch.nan
    return m.second(h * scale)


def _infinite_gradient(m, x):
    h = m.first(x)
    return m.second(torch.cat([h[:2], (h[2:3] * 0).sqrt(), h[3:]]))


def _checkpoint_all(m, x):
    return checkpoint(m.first, x, use_reentrant=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: attempt(Apply(lambda m, x: m.first(x), first=nn.Linear(6, 3), second=nn.Linear(3, 2))),
            "layer 'second' was not called in the forward pass; leave it out with layers=",
        ),
        (
            lambda: attempt(Apply(_overwrites, first=nn.Linear(6, 4), second=nn.Linear(4, 3))),
            "input of layer 'second' was overwritten in place",
        ),
        (
            lambda: attempt(nn.Linear(6, 3), loss=lambda outputs, _: outputs.square().mean()),
            r'shape \[n=5\], got \[\]; a mean or a sum will not do: use reduction="none"',
        ),
        (
            lambda: attempt(Apply(_divides, first=nn.Linear(6, 4), second=nn.Linear(4, 3))),
            "the input of layer 'second' holds NaN or Inf, example 3 of (the batch|batch 0)",
        ),
        (
            lambda: attempt(Apply(_infinite_gradient, first=nn.Linear(6, 4), second=nn.Linear(4, 3))),
            "the output gradient of layer 'first' holds NaN or Inf, example 2 of (the batch|batch 0)",
        ),
        (
            lambda: attempt(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))),
            r"in layer '0' the loss of one example depends on the rows of others: .*BatchNorm in train mode\?",
        ),
        (
            lambda: attempt(Apply(_mixes, first=nn.Linear(6, 4), second=nn.Linear(4, 3))),
            "in layer 'first' the loss of one example depends on the rows of others",
        ),
        (
            lambda: attempt(Apply(_batch_last, first=nn.Linear(5, 4)), inputs(6)),
            r"layer 'first' saw an input of shape \[6, 5\], whose first axis is not the batch of 5",
        ),
        (
            lambda: attempt(Apply(_batch_last, first=nn.Linear(5, 5)), inputs(5)),
            "in layer 'first' the loss of one example depends on the rows of others: .* the batch is not its first",
        ),
        (
            lambda: attempt(Apply(lambda m, x: m.layer(x, x, x)[0], layer=nn.MultiheadAttention(6, 2))),
            r"must see batches \[n, t, e\], got a query of shape \[5, 6\]",
        ),
        (lambda: attempt(Behind(), tokens()), r"captured for 'table.weight' in layer 'table' is not autograd's"),
        (
            lambda: attempt(Apply(_checkpoint_all, first=nn.Linear(6, 4))),
            r"layer 'first' ran without a graph: .*use_reentrant=True \(use_reentrant=False works\)",
        ),
        (lambda: attempt(Checkpointed(use_reentrant=True)), "layer 'second.0' ran without a graph"),
        (
            lambda: attempt(Apply(lambda m, x: torch.no_grad()(m.first)(x), first=nn.Linear(6, 4))),
            "layer 'first' ran without a graph: under torch.no_grad",
        ),
        (
            lambda: attempt(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), layers="2"),
            "layers='2' names no layer with parameters; there are: 0, 1",
        ),
        (
            lambda: Capture(nn.Sequential(nn.Bilinear(2, 2, 2), nn.Linear(2, 2)), "0"),
            "cannot cover '0': Bilinear is not a kind of layer that is known",
        ),
        (lambda: Capture(nn.ReLU()), r"no layer that can be covered \(it has no parameters\)"),
        (
            lambda: Capture(networks.Tied(nn.Linear(4, 4, bias=False), nn.Conv1d(4, 4, 1, groups=4, bias=False))),
            r"'first' and 'second' share a weight as matrices of different shapes, \[1, 4, 4\] and \[4, 1, 4\]",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_forward_needs_the_hooks():
    with pytest.raises(RuntimeError, match="with capture.attached"):
        Capture(nn.Linear(2, 2)).forward(torch.ones(1, 2))


def fitted(model, x=None, y=None, **options):
    x = inputs(6) if x is None else x
    y = torch.arange(len(x)) % 3 if y is None else y
    return Influence(model.double(), curvature=KFAC(1e-2), progress=False, **options).fit((x, y))


class FunctionalDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(F.dropout(self.first(x).tanh(), 0.5, self.training))


@pytest.mark.parametrize(
    ("layer", "kind"), [(nn.Dropout(0.1), "Dropout"), (nn.BatchNorm1d(4), "BatchNorm1d"), (nn.Dropout1d(), "Dropout1d")]
)
def test_random_or_mixing_layers_in_train_mode_are_refused_with_advice(layer, kind):
    model = nn.Sequential(nn.Linear(6, 4), layer, nn.Linear(4, 3))
    with pytest.raises(ValueError, match=rf"'1' \({kind}\) is in train mode.*call model.eval\(\)"):
        fitted(model)
    assert model.training
    assert fitted(model.eval()).self_influence((inputs(6), torch.arange(N) % 3)).shape == (N,)


def test_dropout_that_drops_nothing_is_no_dropout():
    assert fitted(nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.0), nn.Linear(4, 3))).curvature


def test_functional_dropout_in_train_mode_is_found_out():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"two forward passes of one batch differ \(dropout\?\)"):
        fitted(FunctionalDropout())
    assert fitted(FunctionalDropout().eval()).curvature


def test_allow_train_mode_runs_dropout_and_batchnorm_and_leaves_its_statistics():
    torch.manual_seed(0)
    assert fitted(nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.1), nn.Linear(4, 3)), allow_train_mode=True).curvature
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert fitted(model, allow_train_mode=True).curvature
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_on_two_devices_is_refused():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3, device="meta"))
    with pytest.raises(ValueError, match="the model is spread over cpu, meta"):
        Influence(model)


def test_positions_as_many_as_examples_are_not_taken_for_them():
    """[t] with t = n cannot be told from one token per example: the first batch says so, unless another size came."""
    model = Apply(
        lambda m, x: (m.tokens(x) + m.places(torch.arange(x.shape[1]))).mean(1),
        tokens=nn.Embedding(11, 3),
        places=nn.Embedding(9, 3),
    )
    model.double()
    ids = tokens(N)
    with pytest.raises(ValueError, match="vector of positions happens to be as long as the batch"):
        captured(Capture(model), networks.Network(model, ids, None, wavy))
    capture = Capture(model)
    captured(capture, networks.Network(model, ids[:4], None, wavy))
    gradients = captured(capture, networks.Network(model, ids, None, wavy))  # the layer is known by now
    want = by_autograd(networks.Network(model, ids, None, wavy), capture.names)
    assert torch.allclose(gradients["places"].formed()[:, 0], want[model.places.weight], rtol=1e-10)


@pytest.mark.parametrize("t", [4, 5, 6])
def test_influence_tells_positions_from_examples_whatever_their_number(t):
    model = Apply(
        lambda m, x: (m.tokens(x) + m.places(torch.arange(x.shape[1]))).sum(1),
        tokens=nn.Embedding(11, 3),
        places=nn.Embedding(9, 3),
    ).double()
    x, y = torch.randint(0, 11, (N, t)), torch.arange(N) % 3
    scores = [
        Influence(model, curvature=Identity(), layers="*", batch_size=size, progress=False)
        .fit((x, y))
        .scores((x, y), (x, y))
        for size in (1, t, N)
    ]
    assert torch.allclose(scores[0], scores[1])
    assert torch.allclose(scores[0], scores[2])
