"""Blocks and parameters, and estimators that see several blocks at once."""

import pytest
import torch
from torch import nn

from fastif import CG, EKFAC, KFAC, ExactBlock, Influence, RandomProjection
from fastif.curvature.protocol import Cost, JointCurvature
from fastif.model.capture import Capture
from tests.helpers.networks import LAYERS

DAMPING = 0.05


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3, bias=False)).double()


def batch(n=12):
    torch.manual_seed(1)
    return torch.randn(n, 4, dtype=torch.float64), torch.arange(n) % 3


def dense_ggn(model, x):
    """(1/n) Σ Jᵀ H J over all parameters, in the order of `parameters()`."""
    parameters = dict(model.named_parameters())

    def outputs(values):
        return torch.func.functional_call(model, values, (x,))

    jacobians = torch.func.jacrev(outputs)(parameters)
    j = torch.cat([jacobians[name].flatten(2) for name in parameters], 2)  # [n, c, P]
    p = outputs(parameters).detach().softmax(1)
    h = p.diag_embed() - p[:, :, None] * p[:, None, :]
    return torch.einsum("ncp,ncd,ndq->pq", j, h, j) / len(x)


@pytest.mark.parametrize("name", LAYERS)
def test_a_blocks_matrix_is_what_it_splits_into_parameters(name):
    network = LAYERS[name]()
    capture = Capture(network.model)
    values = {parameter: torch.randn_like(parameter) for parameter in capture.names}
    for block in capture.blocks.values():
        pieces = block.split(block.matrix(values))
        assert sum(piece.value.numel() for piece in pieces) == block.size
        for piece in pieces:
            assert torch.equal(values[piece.parameter][piece.rows].reshape(piece.value.shape), piece.value)


@pytest.mark.parametrize("curvature", [ExactBlock(DAMPING), EKFAC(DAMPING)], ids=lambda c: type(c).__name__)
def test_solve_in_parameter_space_gives_the_influence_on_the_parameters(curvature):
    model, data = small(), batch()
    influence = Influence(model, curvature=curvature, layers="*", progress=False).fit(data)
    loss = nn.functional.cross_entropy(model(data[0]), data[1], reduction="sum")
    names = [name for name, _ in model.named_parameters()]
    gradient = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    solved, want = influence.solve(gradient), influence.on_parameters(data)
    assert solved.keys() == want.keys() == gradient.keys()
    for name in names:
        assert torch.allclose(solved[name], -want[name], rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match=r"solve: '0.weight' must be \[3, 4\], got nothing"):
        influence.solve({})
    with pytest.raises(ValueError, match=r"solve: '0.bias' must be \[3\], got \[1\]"):
        influence.solve({**gradient, "0.bias": torch.zeros(1)})


def test_a_joint_block_is_the_whole_matrix():
    model, data = small(), batch()
    influence = Influence(model, curvature=ExactBlock(DAMPING, joint=True), progress=False).fit(data)
    dense = dense_ggn(model, data[0]) + DAMPING * torch.eye(24, dtype=torch.float64)
    vector = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    want = torch.linalg.solve(dense, torch.cat([v.flatten() for v in vector.values()]))
    got = influence.solve(vector)
    assert torch.allclose(torch.cat([got[name].flatten() for name in vector]), want, rtol=1e-9)

    rows = [
        torch.autograd.grad(nn.functional.cross_entropy(model(x[None]), y[None]), list(model.parameters()))
        for x, y in zip(*data, strict=True)
    ]
    g = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    scores = g @ torch.linalg.solve(dense, g.T) / len(g)
    assert torch.allclose(influence.scores(data, data), scores, rtol=1e-8, atol=1e-12)
    assert torch.allclose(influence.self_influence(data), scores.diagonal(), rtol=1e-8)
    loaded = Influence(model, curvature=ExactBlock(DAMPING, joint=True), progress=False)
    loaded.load_state_dict(influence.state_dict())
    assert torch.equal(loaded.scores(data, data), influence.scores(data, data))
    assert set(influence.curvature) == {"0", "2"}
    assert influence.curvature["0"] is influence.curvature["2"]


class Scaled(JointCurvature):
    """Divides by the number of blocks it sees plus one, and notes what it is shown."""

    passes = 0

    def begin(self, shapes, data):
        self.shapes, self.data, self.ended = dict(shapes), data, 0

    def end(self, pass_index):
        self.ended += 1
        self.seen = torch.cat([weights for _, _, weights in self.data.batches(self.data.subset)])

    def solve(self, rhs):
        return {name: value / (len(self.shapes) + 1) for name, value in rhs.items()}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def cost(self, blocks, fit):
        return Cost()


def test_a_joint_estimator_gets_its_blocks_and_the_data_of_the_fit():
    model, data = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 3)).double(), batch()
    weights = torch.rand(5, dtype=torch.float64)
    subset = type("Subset", (), {"indices": torch.tensor([0, 2, 4, 6, 11]), "weights": weights})
    influence = Influence(model, curvature={"[02]": Scaled(), "*": EKFAC(DAMPING)}, batch_size=2, progress=False)
    influence.fit(data, subset)
    joint = influence.curvature["0"]
    assert joint is influence.curvature["2"]
    assert set(joint.shapes) == set(joint.data.blocks) == {"0", "2"}
    assert joint.ended == 1
    assert torch.equal(joint.data.subset.indices, subset.indices)
    assert torch.equal(joint.seen, weights)
    lone = Influence(model, curvature=EKFAC(DAMPING), layers="3", batch_size=2, progress=False).fit(data, subset)
    by_layer = influence.scores(data, data, by="layer")
    assert torch.allclose(by_layer["3"], lone.scores(data, data))
    plain = Influence(model, curvature=Scaled(), layers="0", progress=False).fit(data)
    assert torch.allclose(by_layer["0"], plain.scores(data, data) * 2 / 3)
    assert influence.plan(data).layers["0"].curvature == "Scaled"


def test_a_state_of_other_blocks_or_signs_is_refused():
    data = batch()
    state = Influence(small(), curvature=EKFAC(DAMPING), progress=False).fit(data).state_dict()
    wider = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()
    with pytest.raises(ValueError, match=r"of other blocks: of 0 \[1, 3, 5\] EKFAC; .*, not of 0 \[1, 5, 5\] EKFAC"):
        Influence(wider, curvature=EKFAC(DAMPING), progress=False).load_state_dict(state)
    with pytest.raises(ValueError, match=r"of other blocks: .* EKFAC, not of .* KFAC"):
        Influence(small(), curvature=KFAC(DAMPING), progress=False).load_state_dict(state)
    Influence(small(), curvature=EKFAC(2 * DAMPING), progress=False).load_state_dict(state)  # damping comes later
    state = Influence(small(), curvature=RandomProjection(8), progress=False).fit(data).state_dict()
    with pytest.raises(ValueError, match=r"the state is of dimension=8, seed=0, not of dimension=8, seed=5"):
        Influence(small(), curvature=RandomProjection(8, seed=5), progress=False).load_state_dict(state)


@pytest.mark.parametrize("curvature", [ExactBlock(DAMPING), CG(DAMPING)], ids=lambda c: type(c).__name__)
def test_data_that_can_be_walked_through_only_once_are_refused(curvature):
    influence = Influence(small(), curvature=curvature, progress=False)
    with pytest.raises(TypeError, match="only once"):
        influence.fit(iter([batch()]))
    with pytest.raises(TypeError, match="only once"):
        influence.fit(batch()).scores(batch(), iter([batch()]))
