import importlib.util

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastif import KFAC, Identity, Influence
from fastif.capture import Capture
from fastif.data import rows_of
from fastif.features import call
from fastif.gradients import Dense, OneHot, Sliced
from fastif.losses import per_sample
from tests import networks
from tests.networks import Apply, Attends, Checkpointed, Masked, N, build, inputs, norm, tokens, wavy

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed (make test installs it)"
)
NETWORKS = [*networks.LAYERS, *(pytest.param(name, marks=needs_transformers) for name in networks.TRANSFORMERS)]


def captured(capture, network):
    with capture.attached():
        forward = capture.forward(network.x)
        losses = per_sample(network.loss, forward.outputs, network.batch, forward.n)
        forward.check(losses)
        return forward.gradients(losses)


def by_autograd(network, parameters):
    """Each example's gradient by itself, {parameter: [n, *shape]}."""
    rows = {parameter: [] for parameter in parameters}
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    for i in range(N):
        x, batch = rows_of(network.x, torch.tensor([i])), rows_of(network.batch, torch.tensor([i]))
        loss = per_sample(network.loss, call(network.model, x), batch, 1)[0]
        grads = torch.autograd.grad(loss, list(parameters), allow_unused=True)
        for parameter, grad in zip(parameters, grads, strict=True):
            rows[parameter].append(torch.zeros_like(parameter) if grad is None else grad)
    for parameter in frozen:
        parameter.requires_grad_(False)
    return {parameter: torch.stack(parts) for parameter, parts in rows.items()}


def snapshot(model):
    """All that a capture might leave behind."""
    tensors = {name: (t.detach().clone(), t.requires_grad) for name, t in model.named_parameters()}
    tensors |= {name: (t.clone(), t.requires_grad) for name, t in model.named_buffers()}
    tensors |= {f"{n}.grad": (p.grad.clone(), False) for n, p in model.named_parameters() if p.grad is not None}
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    modules = [
        (module.training, vars(module).get("forward"), *(list(getattr(module, h)) for h in hooks))
        for module in model.modules()
    ]
    return tensors, modules


def assert_unchanged(before, model):
    tensors, modules = snapshot(model)
    assert modules == before[1]
    assert tensors.keys() == before[0].keys()
    for name, (value, requires_grad) in tensors.items():
        assert torch.equal(value, before[0][name][0]), name
        assert requires_grad == before[0][name][1], name


@pytest.mark.parametrize("name", NETWORKS)
def test_every_examples_gradient_is_autograds(name):
    network = build(name)
    for i, parameter in enumerate(network.model.parameters()):  # leave traces that a capture could wipe out
        parameter.grad = torch.full_like(parameter, 0.5) if i % 2 else None
    before = snapshot(network.model)
    outputs = call(network.model, network.x)
    capture = Capture(network.model)
    gradients = captured(capture, network)
    assert_unchanged(before, network.model)
    assert capture.skipped == {}
    assert set(capture.covered) == {name for name, _ in network.model.named_parameters()}
    want = by_autograd(network, capture.names)
    got = {parameter: torch.zeros_like(rows) for parameter, rows in want.items()}
    for block_name, block in capture.blocks.items():
        formed = gradients[block_name].formed()
        assert formed.shape == (N, *block.shape)
        for i in range(N):
            for piece in block.split(formed[i]):
                got[piece.parameter][i][piece.rows] += piece.value
    largest = max(float(rows.abs().max()) for rows in want.values())
    rtol, atol = (1e-5, 1e-6) if name == "llama" else (1e-9, 1e-12)  # its RMSNorm computes in float32
    for parameter, rows in want.items():
        label = capture.names[parameter]
        assert rows.abs().max() > 0, f"{label} takes no gradient: the comparison would be empty"
        assert torch.allclose(got[parameter], rows, rtol=rtol, atol=atol * largest), label
    again = call(network.model, network.x)
    first, second = (o if isinstance(o, torch.Tensor) else o.logits for o in (outputs, again))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_question_to_gradients_is_its_definition(name):
    capture = Capture((network := build(name)).model)
    draw = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    def same(got, want):
        assert got.shape == want.shape
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-12 * float(want.abs().max()))

    weights = random(N).abs()
    weights[1] = 0
    for block_name, g in captured(capture, network).items():
        shape = capture.blocks[block_name].shape
        formed, whole = g.formed(), g.make(0, N) if isinstance(g, Sliced) else g
        factors = whole.dense() if isinstance(whole, OneHot) else whole
        a, u = factors.inputs, factors.output_grads
        scale, directions = random(*shape).abs(), random(3, *shape)
        assert len(g) == N
        assert g.positions == a.shape[2] == u.shape[2]
        same(formed, torch.einsum("snto,sntd->nsod", u, a))
        same(g.sum(weights), torch.einsum("n,nsod->sod", weights, formed))
        same(g.squares(weights), torch.einsum("n,nsod->sod", weights, formed.square()))
        same(g.sq_norms(), formed.square().sum((1, 2, 3)))
        same(g.sq_norms(scale), (scale * formed.square()).sum((1, 2, 3)))
        same(g.dots(directions), torch.einsum("qsod,nsod->qn", directions, formed))
        same(g.by_position(directions), torch.einsum("qsod,snto,sntd->qnt", directions, u, a))
        same(g.by_position(directions).sum(2), g.dots(directions))
        same(g.rows(1, 4).formed(), formed[1:4])
        outputs = None if isinstance(g, OneHot) else random(shape[0], shape[1], 3)
        basis = random(shape[0], shape[2], 2)
        turned = formed @ basis if outputs is None else outputs.mT @ formed @ basis
        same(g.rotated(outputs, basis).formed(), turned)
        second = {
            "inputs": torch.einsum("n,sntd,snte->sde", weights, a, a),
            "outputs": torch.einsum("n,snto,sntp->sop", weights, u, u),
        }
        for side, want in second.items():
            diagonal = isinstance(g, OneHot) and side == "outputs"
            want, lower = (want.diagonal(dim1=1, dim2=2), Tensor.clone) if diagonal else (want, Tensor.tril)
            moment = g.moment(side, weights)
            same(lower(moment if isinstance(moment, Tensor) else moment.matrix()), lower(want))
            moment = g.moment(side, weights, moment)
            same(lower(moment if isinstance(moment, Tensor) else moment.matrix()), lower(2 * want))
        transposed = "transpose" in name and not block_name.endswith("bias")
        kinds = {
            use.gradients.__qualname__
            for use in capture.blocks[block_name].uses
            if hasattr(use.gradients, "__qualname__")
        }
        mixed = len(capture.blocks[block_name].uses) > 1 and any("_embedding" in kind for kind in kinds)
        want = "outputs" if isinstance(g, OneHot) or transposed else None if mixed else "inputs"
        assert g.activations == want  # the table's rows and the head's inputs: not the same side


def test_uses_of_one_block_are_further_positions():
    network = build("tied embedding")
    capture = Capture(network.model)
    (block,) = capture.blocks.values()
    assert len(block.uses) == 2
    gradients = captured(capture, network)["first"]
    assert isinstance(gradients, Dense)  # a looked-up table and a linear map: both dense
    assert gradients.positions == 14
    shared = nn.Embedding(11, 4)
    twice = networks.Network(
        Apply(lambda m, x: m.e(x) * m.e(x.flip(1)).tanh(), e=shared).double(), tokens(), None, wavy
    )
    gradients = captured(Capture(twice.model), twice)["e"]
    assert isinstance(gradients, OneHot)
    assert gradients.positions == 14


@pytest.mark.parametrize("name", list(networks.MASKS))
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_says_what_torch_says(name, batch_first):
    torch.manual_seed(0)
    model = Masked(networks.MASKS[name], batch_first=batch_first).double().eval()
    capture, ids = Capture(model), tokens()
    want, want_weights = model.parts(ids)
    with capture.attached():
        model_forward = vars(model.attention)["forward"]
        got, weights = model.parts(ids)
    assert "forward" not in vars(model.attention)
    assert model_forward is not None
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-14)
    assert (weights is None) == (want_weights is None)
    if weights is not None:
        assert torch.allclose(weights, want_weights, rtol=1e-12, atol=1e-14)


def test_attention_in_train_mode_drops_what_torch_drops():
    model = Masked(networks.MASKS["weights of heads"], dropout=0.5).double().train()
    torch.manual_seed(7)
    want, want_weights = model.parts(tokens())
    with Capture(model).attached():
        torch.manual_seed(7)
        got, weights = model.parts(tokens())
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-14)
    assert torch.allclose(weights, want_weights, rtol=1e-12, atol=1e-14)
    assert (weights == 0).double().mean() > 0.4


def test_a_forward_that_the_user_put_on_attention_comes_back():
    model = Attends("self").double()
    model.attention.forward = own = model.attention.forward
    with Capture(model).attached():
        assert vars(model.attention)["forward"] is not own
    assert vars(model.attention)["forward"] is own


def test_the_head_is_a_linear_map_whose_output_is_the_models():
    def found(model, name, x=None):
        capture = Capture(model.double())
        with capture.attached():
            return capture.forward(inputs(6) if x is None else x).head(name)

    linear = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    features, logits = found(linear, "2")
    with torch.no_grad():
        assert torch.equal(features[:, :4], linear[:2](inputs(6)))
        assert torch.equal(features[:, 4], torch.ones(N))
        assert torch.equal(logits, linear(inputs(6)))
    assert found(linear, "0") is None
    assert found(nn.Sequential(nn.Linear(6, 4), norm(nn.LayerNorm(4))), "1") is None
    assert found(nn.Sequential(nn.Linear(6, 4), norm(nn.LayerNorm(4, bias=False))), "1") is None
    assert found(nn.Sequential(nn.Linear(6, 4), norm(nn.BatchNorm1d(4))).eval(), "1") is None
    assert found(nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True)), "0") is None
    assert found(nn.Embedding(11, 3), "model", tokens()[:, 0]) is None
    assert found(nn.Linear(6, 4), "model", inputs(7, 6)) is None
    layer = nn.Linear(6, 6)
    assert found(nn.Sequential(layer, layer), "0") is None


@pytest.mark.parametrize(
    ("layers", "covered"),
    [
        ("0", {"0.weight", "0.bias"}),
        (["0", "3"], {"0.weight", "0.bias", "3.weight", "3.bias"}),
        ("[13]", {"1.weight", "1.bias", "3.weight", "3.bias"}),
        (None, {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"}),
    ],
)
def test_covered_and_skipped_are_all_parameters(layers, covered):
    strange = Apply(lambda m, x: x * m.scale)
    strange.scale = nn.Parameter(torch.ones(3))
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3), strange).double()
    network = networks.Network(model, inputs(6), None, wavy)
    capture = Capture(model, layers)
    assert set(capture.covered) == covered
    assert set(capture.covered) | set(capture.skipped) == {name for name, _ in model.named_parameters()}
    assert not set(capture.covered) & set(capture.skipped)
    assert capture.skipped["4.scale"] == "its layer '4' Apply is not a kind of layer that is known"
    for name in set(capture.skipped) - {"4.scale"}:
        assert capture.skipped[name] == f"layers= leaves {name.split('.')[0]!r} out"
    want = by_autograd(network, capture.names)
    for name, gradients in captured(capture, network).items():
        for piece in capture.blocks[name].split(gradients.sum(torch.ones(N))):
            assert torch.allclose(piece.value, want[piece.parameter].sum(0), rtol=1e-9, atol=1e-12)


def parametrized():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("build_model", "reason"),
    [
        (parametrized, "arametriz"),
        (lambda: nn.Sequential(nn.LSTM(6, 4), nn.Linear(4, 3)), "LSTM is not a kind of layer that is known"),
        (lambda: nn.Sequential(nn.Embedding(6, 4, max_norm=1.0), nn.Linear(4, 3)), "Embedding with max_norm"),
        (
            lambda: nn.Sequential(nn.MultiheadAttention(6, 2, add_zero_attn=True), nn.Linear(4, 3)),
            "MultiheadAttention with add_bias_kv or add_zero_attn",
        ),
        (lambda: nn.Sequential(nn.Bilinear(6, 6, 4), nn.Linear(4, 3)), "Bilinear is not a kind"),
        (
            lambda: nn.Sequential(nn.InstanceNorm1d(6, affine=True, track_running_stats=True), nn.Linear(4, 3)),
            "InstanceNorm1d is not a kind",
        ),
    ],
)
def test_what_is_not_covered_is_listed_with_its_reason(build_model, reason):
    model = build_model()
    capture = Capture(model)
    assert set(capture.covered) == {"1.weight", "1.bias"}
    assert set(capture.covered) | set(capture.skipped) == {name for name, _ in model.named_parameters()}
    assert all(reason in why for why in capture.skipped.values())


def test_a_shared_weight_is_covered_by_all_its_layers_or_not_at_all():
    model = build("tied embedding with bias").model
    capture = Capture(model, "second")
    assert set(capture.covered) == {"second.bias"}
    assert capture.skipped == {"first.weight": "layers that share it are not covered"}
    assert set(Capture(model).covered) == {"first.weight", "second.bias"}
    with pytest.raises(ValueError, match="no layer that can be covered"):
        Capture(model, "first")


def test_frozen_parameters_are_covered_and_stay_frozen():
    network = build("frozen")
    capture = Capture(network.model)
    gradients = captured(capture, network)
    assert gradients["0"].sq_norms().min() > 0
    assert [p.requires_grad for p in network.model.parameters()] == [False, False, True, True]


@pytest.mark.parametrize("name", ["linear", "conv2d", "self-attention", "encoder", "embedding with padding"])
def test_autocast_gives_float32_gradients_close_to_the_exact_ones(name):
    network = build(name)
    want = captured(Capture(network.model), network)
    network.model.float()
    x = network.x.float() if network.x.is_floating_point() else network.x
    with torch.autocast("cpu", torch.bfloat16):
        got = captured(Capture(network.model), network._replace(x=x))
    for block, gradients in got.items():
        formed = gradients.formed()
        assert formed.dtype == torch.float32
        assert formed.isfinite().all()
        exact = want[block].formed()
        assert (formed - exact).norm() <= 0.05 * exact.norm(), block


# ------------------------------------------------------------------------------------------------------ what is refused


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


# ----------------------------------------------------------------------------------- what Influence refuses before that


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
