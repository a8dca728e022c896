"""Products, CG, Arnoldi and DataInf, held against curvlinops and dattri."""

import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fastif import CG, Arnoldi, DataInf, Influence
from fastif.curvature.matrix_free.operator import Operator
from tests.helpers.networks import LAYERS, build
from tests.helpers.problems import trained

pytestmark = pytest.mark.filterwarnings("ignore")

DAMPING = 1e-2
NAMES = [
    "linear",
    "conv2d",
    "conv1d groups",
    "conv_transpose2d",
    "layer_norm",
    "batch_norm2d",
    "three times",
    "in place",
]


@pytest.fixture
def curvlinops():
    return pytest.importorskip("curvlinops", reason="curvlinops is not installed (make test installs it)")


@pytest.fixture
def dattri():
    return pytest.importorskip("dattri.task", reason="dattri is not installed (make test installs it)")


def flat_of(layout, blocks, parameters, by_parameter):
    """Columns over parameters [P, m] as rows over blocks [m, P]."""
    split = by_parameter.T.split([p.numel() for p in parameters], 1)
    values = dict(zip(parameters, split, strict=True))
    rows = []
    for i in range(by_parameter.shape[1]):
        own = {p: value[i].view(p.shape) for p, value in values.items()}
        rows.append(layout.flat({name: block.matrix(own)[None] for name, block in blocks.items()}))
    return torch.cat(rows)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
def test_products(name, matrix, curvlinops, fit_data):
    assert name in LAYERS
    network = build(name)
    model = nn.Sequential(network.model, nn.Flatten())
    classes = model(network.x).shape[1]
    y = torch.arange(len(network.x)) % classes
    kind = curvlinops.GGNLinearOperator if matrix == "ggn" else curvlinops.HessianLinearOperator
    parameters = list(dict(model.named_parameters()).values())
    theirs = kind(model, nn.CrossEntropyLoss(), parameters, [(network.x, y)], check_deterministic=False)
    size = sum(p.numel() for p in parameters)
    v = torch.randn(size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data = fit_data(model, "cross_entropy", (network.x, y), batch_size=2)
    for keep_graph in (False, True):
        ours = Operator(data, matrix, keep_graph=keep_graph)
        got = ours(flat_of(ours.layout, data.blocks, parameters, v))
        want = flat_of(ours.layout, data.blocks, parameters, theirs @ v)
        assert float((got - want).norm()) <= 1e-10 * float(want.norm())


@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
def test_cg_inverse(matrix, curvlinops):
    model, x, y = trained()
    parameters, damping = list(model.parameters()), 0.3  # the Hessian is indefinite with less
    kind = curvlinops.GGNLinearOperator if matrix == "ggn" else curvlinops.HessianLinearOperator
    operator = kind(model, nn.CrossEntropyLoss(), parameters, [(x, y)])
    size = sum(p.numel() for p in parameters)
    v = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dense = operator @ torch.eye(size, dtype=torch.float64) + damping * torch.eye(size, dtype=torch.float64)
    influence = Influence(model, curvature=CG(damping, matrix, tolerance=1e-12), progress=False).fit((x, y))
    named = zip(dict(model.named_parameters()), v.split([p.numel() for p in parameters]), strict=True)
    shapes = dict(model.named_parameters())
    got = influence.solve({name: part.view(shapes[name].shape) for name, part in named})
    got = torch.cat([got[name].flatten() for name in shapes])
    assert torch.allclose(got, torch.linalg.solve(dense, v), rtol=1e-8, atol=1e-10)
    from curvlinops.examples import IdentityLinearOperator

    eye = IdentityLinearOperator([p.shape for p in parameters], torch.device("cpu"), torch.float64)
    damped = operator + damping * eye
    theirs = curvlinops.CGInverseLinearOperator(damped, eps=0, tolerance=1e-12) @ v
    assert torch.allclose(got, theirs, rtol=1e-6, atol=1e-8)


def test_eigenvalues(curvlinops):
    model, x, y = trained()
    operator = curvlinops.GGNLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)])
    values = torch.linalg.eigvalsh(operator @ torch.eye(57, dtype=torch.float64)).flip(0)
    influence = Influence(model, curvature=Arnoldi(8, DAMPING, tolerance=1e-9), progress=False).fit((x, y))
    assert torch.allclose(influence.curvature["0"].eigenvalues, values[:8], rtol=1e-8)


def attributed(dattri, kind, **options):
    """dattri's scores [q, n] of the first seven examples, for one batch of all."""
    model, x, y = trained()

    def loss(parameters, batch):
        inputs, label = batch
        return F.cross_entropy(functional_call(model, parameters, inputs.reshape(-1, 5)), label.reshape(-1))

    task = dattri.AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    attributor = kind(task, **options)
    train = DataLoader(TensorDataset(x, y), batch_size=len(x), shuffle=False)
    query = DataLoader(TensorDataset(x[:7], y[:7]), batch_size=7, shuffle=False)
    attributor.cache(train)
    return attributor.attribute(train, query).T / len(x)


def test_data_inf(dattri):
    from dattri.algorithm.influence_function import IFAttributorDataInf

    model, x, y = trained()
    torch.set_default_dtype(torch.float64)  # of the sums that it keeps
    try:
        want = attributed(dattri, IFAttributorDataInf, regularization=DAMPING)
    finally:
        torch.set_default_dtype(torch.float32)
    got = Influence(model, curvature=DataInf(DAMPING), progress=False).fit((x, y)).scores((x[:7], y[:7]), (x, y))
    assert float((got - want).abs().max()) <= 1e-6 * float(want.abs().max())


def test_the_hessian_of_the_whole_network(dattri):
    from dattri.algorithm.influence_function import IFAttributorExplicit

    model, x, y = trained()
    want = attributed(dattri, IFAttributorExplicit, regularization=0.3)
    influence = Influence(model, curvature=CG(0.3, "hessian", tolerance=1e-10), progress=False).fit((x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = influence.scores((x[:7], y[:7]), (x, y))
    assert float((got - want).abs().max()) <= 1e-6 * float(want.abs().max())


def test_the_hessian_of_the_whole_network_once_more():
    """captum's matrix is the sum over the examples."""
    captum = pytest.importorskip("captum.influence", reason="captum is not installed (make test installs it)")
    model, x, y = trained()
    few = (x[:7], y[:7])
    theirs = captum.NaiveInfluenceFunction(
        model,
        TensorDataset(x, y),
        checkpoint="",
        checkpoints_load_func=lambda *_: 1.0,
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
        batch_size=len(x),
        projection_dim=sum(p.numel() for p in model.parameters()),
        hessian_reg=0.3 * len(x),
        hessian_inverse_tol=-1e9,
        sample_wise_grads_per_batch=False,
    )
    want = theirs.influence(few, show_progress=False)
    influence = Influence(model, curvature=CG(0.3, "hessian", tolerance=1e-12), progress=False).fit((x, y))
    got = influence.scores(few, (x, y))
    assert float((got - want).norm()) <= 1e-9 * float(want.norm())
