"""The gradients that a capture gives are autograd's, example by example; what it covers is told."""

import importlib.util
import warnings

import pytest
import torch
from torch import Tensor, nn

from fastif.model.calls import call
from fastif.model.capture import Capture
from fastif.model.gradients import Dense, OneHot
from fastif.model.sliced_gradients import Sliced
from tests.helpers import networks
from tests.helpers.captures import assert_unchanged, by_autograd, captured, snapshot
from tests.helpers.networks import Apply, Attends, Masked, N, build, inputs, norm, tokens, wavy

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed (make test installs it)"
)
NETWORKS = [*networks.LAYERS, *(pytest.param(name, marks=needs_transformers) for name in networks.TRANSFORMERS)]


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


def test_layers_that_cannot_be_covered_are_listed_and_blocks_can_be_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = nn.utils.weight_norm(nn.Linear(3, 3))
    norms = [nn.LayerNorm(3), nn.LayerNorm(3)]
    norms[1].weight = norms[0].weight
    model = nn.Sequential(old, *norms, nn.MultiheadAttention(3, 1), nn.Linear(3, 2))
    capture = Capture(model)
    assert set(capture.covered) | set(capture.skipped) == {name for name, _ in model.named_parameters()}
    assert "weight norm" in capture.skipped["0.weight_v"]
    assert {"1.weight", "2.bias"} <= set(capture.skipped)
    assert list(Capture(model, ["3.out_proj", "3.q_proj"]).blocks) == ["3.q_proj", "3.out_proj"]


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
