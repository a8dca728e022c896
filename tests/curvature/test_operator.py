"""Products with the GGN and the Hessian, held against matrices and differences of gradients made in other ways."""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from fastif.curvature.matrix_free.operator import Layout, Operator, _all_derivatives
from fastif.model.losses import logits_of, per_sample
from fastif.samplers.subset import Subset
from tests.helpers.networks import LAYERS, TRANSFORMERS, N, build

WEIGHTS = torch.tensor([0.5, 0.1, 0.0, 0.3, 0.25], dtype=torch.float64)
EVERYTHING = Subset(torch.arange(N), WEIGHTS)
DOUBLE_BACKWARD = {"tied embedding with bias", "checkpointed", "gpt2, checkpointed"}  # the rest by forward over reverse

NETWORKS = [
    *(pytest.param(name, id=name, marks=pytest.mark.filterwarnings("ignore:Using padding")) for name in LAYERS),
    *(pytest.param(name, id=name, marks=pytest.mark.filterwarnings("ignore")) for name in TRANSFORMERS),
]


@pytest.fixture
def products_of(fit_data):
    def make(network, matrix="ggn", batch_size=2, keep_graph=False):
        data = [network.x] if isinstance(network.x, dict) else [(network.x, network.y)]
        made = fit_data(network.model, network.loss, data, EVERYTHING, batch_size=batch_size)
        return Operator(made, matrix, keep_graph=keep_graph)

    return make


@pytest.fixture
def operator_of(fit_data):
    def make(model, x, y=None, loss="cross_entropy", subset=EVERYTHING, matrix="ggn", keep_graph=False, **options):
        data = x if y is None else (x, y)
        return Operator(fit_data(model, loss, data, subset, **options), matrix, keep_graph=keep_graph)

    return make


@contextmanager
def stepped(network, operator: Operator, flat: torch.Tensor):
    """The model with its parameters changed by a vector [P], as `Block.split` has it."""
    before = copy.deepcopy(network.model.state_dict())
    with torch.no_grad():
        for name, matrix in operator.layout.by_block(flat[None]).items():
            for piece in operator.data.blocks[name].split(matrix[0]):
                piece.parameter[piece.rows] += piece.value
    yield
    network.model.load_state_dict(before)


def without_padding(network, operator, flat):
    """Rows of embeddings that take no gradient stay where they are: to move them would change the outputs."""
    by_block = operator.layout.by_block(flat)
    for name, module in network.model.named_modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            by_block[name or "model"][:, 0, module.padding_idx] = 0
    return operator.layout.flat(by_block)


def dot(operator: Operator, gradients: dict[torch.Tensor, torch.Tensor], flat: torch.Tensor) -> float:
    """⟨gradient, vector [P]⟩ over the parameters."""
    total = 0.0
    for name, matrix in operator.layout.by_block(flat[None]).items():
        for piece in operator.data.blocks[name].split(matrix[0]):
            total += float((gradients[piece.parameter][piece.rows] * piece.value).sum())
    return total


def gradient(network, operator) -> dict[torch.Tensor, torch.Tensor]:
    with _all_derivatives():
        losses = per_sample(network.loss, outputs_of(network), network.batch, N)
        found = torch.autograd.grad((losses * WEIGHTS).sum(), operator.parameters, allow_unused=True)
    zeros = (torch.zeros_like(p) for p in operator.parameters)
    return {p: z if g is None else g for p, g, z in zip(operator.parameters, found, zeros, strict=True)}


def vectors(size, m=2, seed=0):
    return torch.randn(m, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NETWORKS)
def test_hessian_is_the_change_of_the_gradient(name, products_of):
    network = build(name)
    operator = products_of(network, "hessian")
    u, v = without_padding(network, operator, vectors(operator.layout.size))
    got = operator(torch.stack([u, v]))
    assert operator.mode == ("double backward" if name in DOUBLE_BACKWARD else "forward over reverse"), operator.reason
    kept = products_of(network, "hessian", 3, keep_graph=True)
    tolerance = 1e-6 if name == "llama" else 1e-12  # its norms compute in float32
    assert torch.allclose(kept(torch.stack([u, v])), got, rtol=tolerance, atol=tolerance * float(got.abs().max()))
    assert kept.graph_bytes > 0
    if name == "llama":
        return
    step, slopes = 1e-5 / float(v.norm()), []
    for sign in (1, -1):
        with stepped(network, operator, sign * step * v):
            slopes.append(dot(operator, gradient(network, operator), u))
    want = (slopes[0] - slopes[1]) / (2 * step)
    assert float(u @ got[1]) == pytest.approx(want, rel=2e-5, abs=2e-6 * float(u.norm() * got[1].norm()))


def outputs_of(network):
    x = {k: t for k, t in network.x.items() if k != "labels"} if isinstance(network.x, dict) else network.x
    return logits_of(network.model(**x) if isinstance(x, dict) else network.model(x))


def jacobian_times(network, operator, vs):
    """J v by the rows of J, one backward pass each."""
    scores, options = outputs_of(network), {"retain_graph": True, "allow_unused": True}
    out = torch.zeros(len(vs), scores.numel(), dtype=torch.float64)
    for k, entry in enumerate(scores.flatten()):
        found = torch.autograd.grad(entry, operator.parameters, **options)
        zeros = (torch.zeros_like(p) for p in operator.parameters)
        rows = {p: z if g is None else g for p, g, z in zip(operator.parameters, found, zeros, strict=True)}
        for i, v in enumerate(vs):
            out[i, k] = dot(operator, rows, v)
    return out


def differences(network, operator, vs):
    """J v by differences of outputs."""
    out = []
    for v in vs:
        step, sides = 1e-5 / float(v.norm()), []
        for sign in (1, -1):
            with torch.no_grad(), stepped(network, operator, sign * step * v):
                sides.append(outputs_of(network).flatten())
        out.append((sides[0] - sides[1]) / (2 * step))
    return torch.stack(out)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name.id != "llama"])
def test_ggn_is_made_of_jacobians(name, products_of):
    """uᵀGv = Σ_i w_i (J_i u)ᵀ H_i (J_i v)."""
    network = build(name)
    operator = products_of(network)
    u, v = without_padding(network, operator, vectors(operator.layout.size))
    got = operator(torch.stack([u, v]))
    with _all_derivatives():
        leaf = outputs_of(network).detach().requires_grad_()
        many = leaf.numel() > 150  # backward passes
        ju, jv = (differences if many else jacobian_times)(network, operator, [u, v])
    objective = (per_sample(network.loss, leaf, network.batch, N) * WEIGHTS).sum()
    (slope,) = torch.autograd.grad(objective, leaf, create_graph=True)
    (curved,) = torch.autograd.grad(slope, leaf, jv.view_as(leaf))
    tolerance = 1e-6 if many else 1e-10
    size = float(u.norm() * got[1].norm())
    assert float(u @ got[1]) == pytest.approx(float(ju @ curved.flatten()), rel=tolerance, abs=tolerance * size)
    kept = products_of(network, batch_size=5, keep_graph=True)(torch.stack([u, v]))
    assert torch.allclose(kept, got, rtol=1e-10, atol=1e-12 * float(got.abs().max()))


LOSSES = {
    "cross_entropy": torch.arange(N) % 3,
    "bce": torch.arange(3 * N).view(N, 3) % 2,
    "mse": torch.linspace(-1, 1, 3 * N, dtype=torch.float64).view(N, 3),
}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def data(n=N):
    return torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
@pytest.mark.parametrize("keep_graph", [False, True])
def test_named_losses_give_the_dense_matrix(loss, matrix, keep_graph, operator_of):
    model, x, y = mlp(), data(), LOSSES[loss]
    operator = operator_of(model, x, y, loss, matrix=matrix, keep_graph=keep_graph, batch_size=2)
    got = operator(torch.eye(operator.layout.size, dtype=torch.float64))
    assert torch.allclose(got, dense(model, loss, x, y, matrix), rtol=1e-9, atol=1e-12)
    assert torch.allclose(got, got.T, rtol=1e-10, atol=1e-13)


def dense(model, loss, x, y, matrix):
    """[P, P] over the matrices of the blocks, by autograd's functional Jacobian and Hessian of a hand-written net."""
    first, second = model[0], model[2]
    blocks = [torch.cat([layer.weight, layer.bias[:, None]], 1).detach() for layer in (first, second)]
    flat = torch.cat([block.flatten() for block in blocks])

    def logits(flat):
        a, b = flat[:25].view(5, 5), flat[25:].view(3, 6)
        h = (x @ a[:, :4].T + a[:, 4]).tanh()
        return h @ b[:, :5].T + b[:, 5]

    def value(z):
        return (per_sample(loss, z, y, N) * WEIGHTS).sum()

    if matrix == "hessian":
        return torch.autograd.functional.hessian(lambda flat: value(logits(flat)), flat)
    j = torch.autograd.functional.jacobian(logits, flat).flatten(0, 1)
    h = torch.autograd.functional.hessian(value, logits(flat)).reshape(len(j), len(j))
    return j.T @ h @ j


def test_some_blocks_alone_are_a_part_of_the_matrix(operator_of):
    model, x, y = mlp(), data(), LOSSES["cross_entropy"]
    part = operator_of(model, x, y, layers="2")(torch.eye(18, dtype=torch.float64))
    assert torch.allclose(part, dense(model, "cross_entropy", x, y, "ggn")[25:, 25:], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_batch_size_and_the_number_of_vectors_do_not_matter(batch_size, operator_of):
    model, x, y = mlp(), data(), LOSSES["cross_entropy"]
    v = vectors(43, m=19)  # more than share a forward pass
    want = operator_of(model, x, y)(v)
    operator = operator_of(model, x, y, batch_size=batch_size)
    assert torch.allclose(operator(v), want, rtol=1e-10, atol=1e-14)
    assert torch.allclose(torch.cat([operator(row[None]) for row in v]), want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["linear", "conv2d", "tied embedding", "bert"])
@pytest.mark.filterwarnings("ignore")
def test_slices_of_a_batch_do_not_matter(name, products_of, monkeypatch):
    network = build(name)
    v = vectors(products_of(network).layout.size)
    want = products_of(network, batch_size=N)(v)
    monkeypatch.setattr("fastif.curvature.limits.SLICE_EXAMPLES", 2)
    monkeypatch.setattr("fastif.curvature.limits.SLICE_BYTES", 1)
    sliced, sizes = products_of(network, batch_size=N), []
    network.model.register_forward_hook(lambda _module, _args, outputs: sizes.append(len(logits_of(outputs))))
    assert torch.allclose(sliced(v), want, rtol=1e-9, atol=1e-12 * float(want.abs().max()))
    assert set(sizes) == {1, 2}  # five examples in slices of two


@pytest.mark.parametrize("keep_graph", [False, True])
def test_another_subset_can_be_asked_for(keep_graph, operator_of):
    model, x, y = mlp(), data(), LOSSES["cross_entropy"]
    v, other = vectors(43), Subset(torch.tensor([4, 3]), torch.tensor([0.7, 0.3], dtype=torch.float64))
    want = operator_of(model, x, y, subset=other)(v)
    assert torch.allclose(operator_of(model, x, y, keep_graph=keep_graph)(v, other), want, rtol=1e-12)


def test_float32_and_autocast(operator_of):
    model, x, y = mlp(), data(), LOSSES["cross_entropy"]
    v = vectors(43)
    want = operator_of(model, x, y)(v)
    model.float()
    single = operator_of(model, x.float(), y)(v.float())
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), want, rtol=1e-4, atol=1e-6)
    half = operator_of(model, x.float(), y, autocast=torch.bfloat16)(v.float())
    assert 1e-4 < float((half - single).norm() / single.norm()) < 0.1


@pytest.mark.parametrize("name", ["shared module", "tied embedding", "self-attention", "embedding with padding"])
def test_the_model_is_left_as_it_was(name, products_of):
    network = build(name)
    before = [(p, p._version, p.requires_grad, p.grad) for p in network.model.parameters()]
    state = {key: value.clone() for key, value in network.model.state_dict().items()}
    for keep_graph in (False, True):
        operator = products_of(network, "hessian", keep_graph=keep_graph)
        operator(vectors(operator.layout.size))
    for (p, version, requires_grad, gradient), q in zip(before, network.model.parameters(), strict=True):
        assert p is q
        assert (version, requires_grad, gradient) == (q._version, q.requires_grad, q.grad)
    assert all(torch.equal(value, state[key]) for key, value in network.model.state_dict().items())


# ------------------------------------------------------------------------------------------- functions of one's own


class Halves(torch.autograd.Function):
    """x / 2, with a backward pass that can be differentiated, and no forward derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone() / 2

    @staticmethod
    def backward(ctx, g):
        return g / 2


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos()


class Applies(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.first, self.second = function, nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

    def forward(self, x):
        return self.second(self.function(self.first(x)).tanh())


@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
def test_a_function_without_forward_derivative_is_differentiated_backwards_twice(matrix, operator_of):
    torch.manual_seed(0)
    model, x, y = Applies(Halves.apply), data(), LOSSES["cross_entropy"]
    operator = operator_of(model, x, y, matrix=matrix)
    v = vectors(43)
    got = operator(v)
    assert operator.mode == "double backward"
    assert "setup_context" in operator.reason
    model.function = lambda h: h / 2
    want = operator_of(model, x, y, matrix=matrix)
    assert torch.allclose(got, want(v), rtol=1e-12)
    assert want.mode == "forward over reverse"


class Scaled(nn.Module):
    """Divides by a norm that gradients do not flow through."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

    def forward(self, x):
        h = self.first(x).tanh()
        return self.second(h / self.norm(h))

    @torch.no_grad()
    def norm(self, h):
        return h.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
@pytest.mark.parametrize("m", [1, 2])
def test_what_is_computed_without_gradients_is_constant(matrix, m, operator_of):
    torch.manual_seed(0)
    model, x, y = Scaled(), data(), LOSSES["cross_entropy"]
    operator = operator_of(model, x, y, matrix=matrix)
    v = vectors(43, m)
    got = operator(v)
    assert operator.mode == "double backward"
    assert "torch.no_grad" in operator.reason
    model.norm = lambda h: h.detach().norm(dim=1, keepdim=True)
    want = operator_of(model, x, y, matrix=matrix)
    assert torch.allclose(got, want(v), rtol=1e-12)
    assert want.mode == "forward over reverse"


@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
@pytest.mark.parametrize("keep_graph", [False, True])
def test_a_function_that_cannot_be_differentiated_twice_is_named(matrix, keep_graph, operator_of):
    """torch itself would pass over it in silence, and leave its part of the product out."""
    model = Applies(Once.apply)
    advice = r"differentiated twice: .*\(custom autograd functions: Once\); leave the layers before it out"
    with pytest.raises(ValueError, match=advice):
        operator_of(model, data(), LOSSES["cross_entropy"], matrix=matrix, keep_graph=keep_graph)(vectors(43))
    above = operator_of(model, data(), LOSSES["cross_entropy"], matrix=matrix, layers="second")
    assert above(vectors(18)).any()  # as the message advises


def test_a_loss_without_curvature_gives_zero(operator_of):
    for matrix in ("ggn", "hessian"):
        for keep_graph in (False, True):
            operator = operator_of(
                nn.Linear(4, 3).double(),
                data(),
                loss=lambda outputs, _: outputs.sum(1),
                matrix=matrix,
                keep_graph=keep_graph,
            )
            assert not operator(vectors(15)).any()


def test_nan_is_named(operator_of):
    model, x, y = mlp(), data(), LOSSES["cross_entropy"]
    x[3, 0] = torch.nan
    for keep_graph in (False, True):
        with pytest.raises(ValueError, match="ggn times a vector holds NaN or Inf in layer '0'"):
            operator_of(model, x, y, keep_graph=keep_graph, batch_size=2)(vectors(43))


def test_bad_input(operator_of):
    with pytest.raises(ValueError, match="matrix must be 'ggn' or 'hessian', got 'fisher'"):
        operator_of(mlp(), data(), LOSSES["cross_entropy"], matrix="fisher")
    wrapped = nn.Sequential(nn.Linear(4, 3).double())
    wrapped.forward = lambda x: {"scores": wrapped[0](x)}
    options = {"loss": lambda outputs, _: outputs["scores"].square().sum(1)}
    with pytest.raises(TypeError, match="matrix='ggn' with a function .* a tensor, or something with .*, got dict"):
        operator_of(wrapped, data(), **options)(vectors(15))
    assert operator_of(wrapped, data(), matrix="hessian", **options)(vectors(15)).any()


def test_layout_goes_there_and_back():
    layout = Layout({"a": (1, 2, 3), "b": (2, 1, 4)})
    flat = vectors(14)
    assert layout.size == 14
    assert torch.equal(layout.flat(layout.by_block(flat)), flat)
    assert {name: value.shape for name, value in layout.by_block(flat).items()} == {
        "a": (2, 1, 2, 3),
        "b": (2, 2, 1, 4),
    }


def test_a_third_of_an_attentions_projections_moves_alone(operator_of):
    network = build("self-attention")
    options = {"loss": network.loss, "matrix": "hessian"}
    whole = operator_of(network.model, network.x, **options)
    part = operator_of(network.model, network.x, layers="attention.k_proj", **options)
    v = vectors(part.layout.size)
    filled = {name: torch.zeros(2, *shape, dtype=torch.float64) for name, shape in whole.layout.shapes.items()}
    filled["attention.k_proj"] = part.layout.by_block(v)["attention.k_proj"]
    want = whole.layout.by_block(whole(whole.layout.flat(filled)))["attention.k_proj"]
    assert torch.allclose(part.layout.by_block(part(v))["attention.k_proj"], want, rtol=1e-10, atol=1e-12)


def test_kept_graphs_need_less_work_and_tell_their_memory(operator_of):
    model, x, y, calls = mlp(), data(40), torch.arange(40) % 3, []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    kept = operator_of(model, x, y, subset=None, batch_size=10, keep_graph=True)
    for _ in range(3):
        kept(vectors(43))
    assert len(calls) == 4  # one pass over the four batches
    half = operator_of(model, x[:20], y[:20], subset=None, batch_size=10, keep_graph=True)
    assert 1.7 < kept.graph_bytes / half.graph_bytes < 2.3
