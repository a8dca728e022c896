"""Any model: right example by example, or refused, or left out and listed; never wrong."""

import importlib.util
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastif import CG, EKFAC, KFAC, Identity, Influence
from fastif.model.capture import NEVER_CALLED, Capture
from tests.helpers.captures import by_autograd, captured
from tests.helpers.networks import Apply, N, Network, inputs, tokens, wavy

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed (make test installs it)"
)


def assert_autograds(model, x, layers=None, rtol=1e-9):
    """That every covered parameter has autograd's gradient of each example; returns the capture."""
    network = Network(model.double().eval(), x, None, wavy)
    capture = Capture(network.model, layers)
    gradients = captured(capture, network)
    want = by_autograd(network, capture.names)
    want = {p: torch.stack([row.to_dense() if row.is_sparse else row for row in rows]) for p, rows in want.items()}
    got = {parameter: torch.zeros_like(rows) for parameter, rows in want.items()}
    for name, block in capture.blocks.items():
        formed = gradients[name].formed()
        for i in range(N):
            for piece in block.split(formed[i]):
                got[piece.parameter][i][piece.rows] += piece.value
    for parameter in capture.used:
        assert torch.allclose(got[parameter], want[parameter], rtol=rtol, atol=1e-12), capture.names[parameter]
    for parameter, name in capture.names.items():
        if name in capture.skipped and capture.skipped[name] == NEVER_CALLED:
            assert not want[parameter].any(), f"{name} takes a gradient"
    return capture


class Weights(nn.Module):
    """Bare parameters beside layers."""

    def __init__(self, function, layers=(), **shapes):
        super().__init__()
        self.function = function
        for name, layer in dict(layers).items():
            self.add_module(name, layer)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        return self.function(self, x)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class BatchNormAct(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 4


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / w.std((1, 2, 3), keepdim=True), self.bias)


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


class Rms(nn.Module):
    """As T5 writes it, or as Gemma does."""

    def __init__(self, d, plus=0.0):
        super().__init__()
        self.weight, self.plus = nn.Parameter(torch.randn(d)), plus

    def forward(self, x):
        return (self.plus + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def _routed(m, x):
    h = x.reshape(-1, 6)
    probs, best = m.router(h).softmax(-1).max(-1)
    out = h.new_zeros(len(h), 4)
    for k, expert in enumerate(m.experts):
        rows = (best == k).nonzero()[:, 0]
        if len(rows):
            out = out.index_add(0, rows, expert(h[rows]).tanh() * probs[rows, None])
    return out.view(*x.shape[:2], 4).mean(1)


def _class_token(m, x):
    h = torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.places
    return m.out(h).tanh().mean(1) * m.scale


IMAGES, SEQUENCES = inputs(3, 6, 6), inputs(7, 6)


@pytest.mark.parametrize(
    ("build", "x", "loose"),
    [
        (
            lambda: Apply(lambda m, x: m.o(m.l(x)[0][:, -1]), l=nn.LSTM(6, 4, batch_first=True), o=nn.Linear(4, 3)),
            SEQUENCES,
            4,
        ),
        (
            lambda: Apply(lambda m, x: m.o(m.l(x.transpose(0, 1))[0][-1]), l=nn.GRU(6, 4), o=nn.Linear(4, 3)),
            SEQUENCES,
            4,
        ),
        (lambda: Apply(lambda m, x: m.b(x[:, :3], x[:, 3:]), b=nn.Bilinear(3, 3, 4)), inputs(6), 2),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.PReLU(4), nn.Linear(4, 3)), inputs(6), 0),
        (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 3)), inputs(6), 3),
        (lambda: Apply(lambda m, x: m.o(m.e(x)), e=nn.EmbeddingBag(11, 4), o=nn.Linear(4, 3)), tokens(), 1),
        (
            lambda: Apply(lambda m, x: m.o(m.e(x)), e=nn.EmbeddingBag(11, 4, sparse=True), o=nn.Linear(4, 3)),
            tokens(),
            1,
        ),
        (lambda: Apply(lambda m, x: m.e(x).mean(1), e=nn.Embedding(11, 4, sparse=True)), tokens(), 0),
        (
            lambda: Apply(lambda m, x: m.a(x.flatten(0, 1)).view(*x.shape[:2], 4).tanh().mean(1), a=nn.Linear(6, 4)),
            SEQUENCES,
            0,
        ),
        (
            lambda: Apply(
                lambda m, x: m.a(x.transpose(0, 1).flatten(0, 1)).view(7, -1, 4).tanh().mean(0), a=nn.Linear(6, 4)
            ),
            SEQUENCES,
            0,
        ),
        (lambda: Apply(lambda m, x: m.a(x.transpose(0, 1)).tanh().mean(0), a=nn.Linear(6, 4)), SEQUENCES, 0),
        (
            lambda: Weights(_class_token, {"out": nn.Linear(6, 4)}, token=(1, 1, 6), places=(1, 8, 6), scale=(4,)),
            SEQUENCES,
            3,
        ),
        (lambda: Weights(lambda m, x: (x @ m.v).tanh() @ m.w, v=(6, 4), w=(4, 3)), inputs(6), 2),
        (lambda: Weights(lambda m, x: m.o(x) / m.temperature, {"o": nn.Linear(6, 3)}, temperature=()), inputs(6), 1),
        (lambda: nn.Sequential(nn.Linear(6, 3), Weights(lambda m, x: x.tanh() * m.scale, scale=())), inputs(6), None),
        (
            lambda: Weights(lambda m, x: torch.einsum("ntd,edf->ntef", x, m.w).tanh().mean((1, 2)), w=(4, 6, 5)),
            SEQUENCES,
            1,
        ),
        (
            lambda: Apply(_routed, router=nn.Linear(6, 3), experts=nn.ModuleList(nn.Linear(6, 4) for _ in range(3))),
            SEQUENCES,
            None,
        ),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), LayerNorm2d(4)), IMAGES, 0),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct(4)), IMAGES, 0),
        (lambda: Scaled(11, 4), tokens(), 0),
        (lambda: nn.Sequential(Standardised(3, 4, 3), nn.Tanh()), IMAGES, 2),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), Cosine(4, 3, bias=False)), inputs(6), 1),
        (lambda: nn.Sequential(Rms(6), Rms(6, 1.0), nn.Linear(6, 3)), SEQUENCES, 0),
        (lambda: Apply(lambda m, x: x @ m.table(torch.arange(3)[None])[0].T, table=nn.Embedding(3, 6)), inputs(6), 1),
        (
            lambda: Apply(
                lambda m, x: torch.einsum(
                    "nsd,std->nt", x, m.e((torch.arange(7)[:, None] - torch.arange(7)).abs())
                ).sin(),
                e=nn.Embedding(9, 6),
            ),
            SEQUENCES,
            1,
        ),
        (
            lambda: Apply(lambda m, x: F.linear(m.o(m.t(x)), m.t.weight), t=nn.Embedding(11, 4), o=nn.Linear(4, 4)),
            tokens(),
            1,
        ),
        (lambda: Apply(lambda m, x: F.linear(x, m.spare.weight), spare=nn.Linear(6, 3, bias=False)), inputs(6), 1),
    ],
)
def test_every_parameter_has_autograds_gradient_of_each_example(build, x, loose):
    torch.manual_seed(0)
    capture = assert_autograds(build(), x)
    assert all(reason == NEVER_CALLED for reason in capture.skipped.values())
    if loose is not None:
        assert sum(block.loose for block in capture.blocks.values()) == loose


def test_a_scalar_goes_through_all_that_an_influence_does():
    torch.manual_seed(0)
    model = Weights(lambda m, x: m.o(x) / m.temperature, {"o": nn.Linear(6, 3)}, temperature=()).double()
    data = inputs(6), torch.arange(N) % 3
    influence = Influence(model, curvature=EKFAC(1e-2), progress=False)
    assert influence.plan(data).covered["temperature"] == ()
    scores = influence.fit(data).scores(data, data, by="layer")
    assert set(scores) == {"o", "temperature"}
    change = influence.on_parameters(data)
    assert change["temperature"].shape == ()
    again = influence.solve(change)
    assert again["temperature"].shape == ()


def test_what_is_never_called_is_listed_and_called_later_it_is_taken_up():
    torch.manual_seed(0)
    model = Apply(
        lambda m, x: m.a(x) + (m.b(x) if bool((x > 2).any()) else 0), a=nn.Linear(6, 3), b=nn.Linear(6, 3)
    ).double()
    capture = assert_autograds(model, inputs(6).clamp(max=2))
    assert capture.skipped == {"b.weight": NEVER_CALLED, "b.bias": NEVER_CALLED}
    x, y = torch.cat([inputs(6).clamp(max=2), inputs(6) + 4]), torch.arange(2 * N) % 3
    influence = Influence(model, curvature=Identity(), batch_size=N, progress=False).fit((x, y))
    assert set(influence.capture.covered) == {"a.weight", "a.bias"}  # Identity looks at the first batch alone
    with pytest.raises(ValueError, match="layer 'b' is called in batch 1 and was not in the first examples"):
        influence.self_influence((x, y))
    influence = Influence(model, curvature=KFAC(1e-2), batch_size=N, progress=False).fit((x, y))
    assert set(influence.capture.covered) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert influence.self_influence((x, y)).shape == (2 * N,)


@pytest.mark.parametrize(
    ("function", "loss"),
    [
        (lambda m, x: m.o(x + x.roll(1, 0)), wavy),
        (lambda m, x: m.o(torch.cat([x[:4], x[4:] + x[3:4]])), wavy),  # example 0 reads none but itself
        (lambda m, x: m.o(x) - m.o(x).mean(0), wavy),
        (lambda m, x: m.o(x), lambda outputs, _: (outputs - outputs.roll(1, 0)).square().sum(1)),
    ],
)
def test_examples_that_mix_are_refused_whichever_they_are(function, loss):
    network = Network(Apply(function, o=nn.Linear(6, 3)).double(), inputs(6), None, loss)
    with pytest.raises(ValueError, match="in layer 'o' the loss of one example depends on the rows of others"):
        captured(Capture(network.model), network)


def test_squared_norms_under_a_batchnorm_that_mixes_are_those_of_each_loss_in_its_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double().train()
    x, y = inputs(6), torch.arange(N) % 3
    influence = Influence(model, curvature=Identity(), layers="all", allow_train_mode=True, progress=False).fit((x, y))
    got = influence.self_influence((x, y)) * N
    losses = F.cross_entropy(model(x), y, reduction="none")
    for i in range(N):
        grads = torch.autograd.grad(losses[i], list(model.parameters()), retain_graph=True)
        assert float(got[i]) == pytest.approx(sum(float(g.square().sum()) for g in grads), rel=1e-9)


def test_a_forward_pass_that_draws_is_refused_in_eval_mode_and_the_callers_draws_stay():
    model = Apply(lambda m, x: m.b(F.dropout(m.a(x), 0.5)), a=nn.Linear(6, 4), b=nn.Linear(4, 3)).double().eval()
    data = inputs(6), torch.arange(N) % 3
    with pytest.raises(ValueError, match=r"in eval mode and two forward passes of one batch differ .*, by up to \d"):
        Influence(model, curvature=CG(0.1), progress=False).fit(data)
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    Influence(nn.Linear(6, 3).double().eval(), curvature=Identity(), progress=False)
    torch.manual_seed(3)
    influence = Influence(_linear(), curvature=Identity(), progress=False)
    torch.manual_seed(3)
    influence.fit(data)
    assert torch.equal(torch.rand(2), want)


def _linear():
    return nn.Linear(6, 3).double().eval()


def test_one_warning_says_what_trained_part_is_not_covered(monkeypatch):
    monkeypatch.setattr("fastif.model.layers._LARGEST", 20)
    model = Apply(lambda m, x: m.o(m.b(x, x)), b=nn.Bilinear(6, 6, 4), o=nn.Linear(4, 3)).double()
    data = inputs(6), torch.arange(N) % 3
    influence = Influence(model, curvature=KFAC(1e-2), progress=False)
    with pytest.warns(
        UserWarning, match=r"19 of 163 trained parameters are covered \(11.7%\).*b.weight: .*144 ent"
    ) as one:
        influence.fit(data)
    assert [warning.filename for warning in one] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        influence.fit(data)
        Influence(model, curvature=KFAC(1e-2), layers="!b", progress=False).fit(data)


def test_the_default_head_is_the_last_linear_layer_that_is_called():
    model = Apply(lambda m, x: m.out(m.body(x).tanh()), out=nn.Linear(4, 3), body=nn.Linear(6, 4)).double()
    data = inputs(6), torch.arange(N) % 3
    influence = Influence(model, progress=False).fit(data)
    assert list(influence.capture.covered) == ["out.weight", "out.bias"]
    again = Influence(model, progress=False).load_state_dict(influence.state_dict())
    assert torch.equal(again.scores(data, data), influence.scores(data, data))


def test_a_state_brings_what_its_fit_found_covered():
    torch.manual_seed(0)
    model = Apply(lambda m, x: x @ m.table(torch.arange(3)[None])[0].T, table=nn.Embedding(3, 6)).double()
    data = inputs(6), torch.arange(N) % 3
    influence = Influence(model, curvature=EKFAC(1e-2), progress=False).fit(data)
    assert list(influence.capture.blocks) == ["table.weight"]
    again = Influence(model, curvature=EKFAC(1e-2), progress=False).load_state_dict(influence.state_dict())
    assert torch.allclose(again.scores(data, data), influence.scores(data, data))


@needs_transformers
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_padding_is_no_data(kind):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model, n = LlamaForCausalLM(config).double().eval(), 8
    ids, mask = torch.randint(1, 31, (n, 14)), torch.ones(n, 14, dtype=torch.int64)
    mask[1, 9:] = mask[5, 4:] = 0

    def scores(t, batch, masked=True):
        def wide(x, value):
            return torch.cat([x, torch.full((n, t - 14), value)], 1)

        whole = {"input_ids": wide(ids, 0), "labels": wide(ids.masked_fill(mask == 0, -100), -100)}
        if masked:
            whole["attention_mask"] = wide(mask, 0)
        data = [{key: value[i : i + batch] for key, value in whole.items()} for i in range(0, n, batch)]
        influence = Influence(model, "causal_lm", kind(1e-3, fisher="empirical"), progress=False)
        return influence.fit(data).scores(data, data)

    want = scores(14, n)
    for got in (scores(32, n), scores(32, 3), scores(20, 5)):
        assert float((got - want).norm() / want.norm()) < 1e-6
    unmasked = scores(14, n, masked=False)  # right padding and causal attention: the mask changes no loss
    assert float((scores(32, 3, masked=False) - unmasked).norm() / unmasked.norm()) < 1e-6


class Tied(nn.Module):
    """Uses its table a second time, where no hook sees it."""

    def __init__(self):
        super().__init__()
        self.table, self.body = nn.Embedding(9, 5), nn.Linear(5, 5)

    def forward(self, ids):
        return torch.tanh(self.body(self.table(ids))) @ self.table.weight.T


class Sometimes(nn.Module):
    """Uses a weight a second time for some examples alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.a(x)
        again = h @ (self.a.weight @ self.a.weight.T)
        return self.b(torch.tanh(torch.where(x[:, :1] > 0, again, h)))


@pytest.mark.parametrize("ignored", [5, 15])
def test_examples_that_say_nothing_are_not_believed(ignored):
    """A gradient of zero agrees with every reading: the examples looked at are those with labels that count."""
    torch.manual_seed(0)
    model, ids = Tied().double(), torch.randint(0, 9, (16, 4))
    labels = torch.randint(0, 9, (16, 4))
    labels[:ignored] = -100
    influence = Influence(model, "token_cross_entropy", Identity(), progress=False).fit((ids, labels))
    want = [gradient_norm(model, lambda i=i: token_losses(model(ids[i : i + 1]), labels[i : i + 1])) for i in range(16)]
    assert torch.allclose(16 * influence.self_influence((ids, labels)), torch.tensor(want).double())


def test_the_examples_looked_at_are_spread_over_the_batch():
    torch.manual_seed(0)
    model, x, y = Sometimes().double(), torch.randn(16, 6, dtype=torch.float64), torch.arange(16) % 3
    x[:, 0] = x[:, 0].abs() * torch.where(torch.arange(16) < 5, -1, 1)
    influence = Influence(model, "cross_entropy", Identity(), progress=False).fit((x, y))
    loss = nn.functional.cross_entropy
    want = [gradient_norm(model, lambda i=i: loss(model(x[i : i + 1]), y[i : i + 1])) for i in range(16)]
    assert torch.allclose(16 * influence.self_influence((x, y)), torch.tensor(want).double())


def token_losses(logits, labels):
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def gradient_norm(model, loss):
    return sum(float(g.square().sum()) for g in torch.autograd.grad(loss(), list(model.parameters())))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, partial(nn.InstanceNorm2d, affine=True)], ids=["batch", "instance"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_a_batch_of_one_whose_pixels_become_tokens(norm, last):
    """torch's own gradient of a normalised batch of one is wrong where it comes in the layout of tokens."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 3, 3), norm(3)

        def forward(self, x):
            layout = torch.channels_last if last else torch.contiguous_format
            x = self.norm(self.conv(x).contiguous(memory_format=layout))
            return (x.flatten(2).transpose(1, 2) * torch.linspace(-1, 1, 48).view(16, 3)).sum(1)

    torch.manual_seed(0)
    model = Tokens().double().eval()
    for name, buffer in model.named_buffers():
        if name.endswith("var"):
            buffer.uniform_(0.5, 2.0)
    x, y = torch.randn(6, 2, 6, 6, dtype=torch.float64), torch.arange(6) % 3
    want = torch.zeros(6, dtype=torch.float64)
    for i in range(6):
        losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")  # of the whole batch: as it should be
        want[i] = sum(g.square().sum() for g in torch.autograd.grad(losses[i], list(model.parameters())))
    influence = Influence(model, curvature=Identity(), layers="*", progress=False, batch_size=1)
    assert torch.allclose(influence.fit((x, y)).self_influence((x, y)) * 6, want, rtol=1e-10)
