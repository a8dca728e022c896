"""Scores of the head under its exact curvature, held against dattri's explicit influence function.

dattri adds up the inverses of its batches' Hessians, which is an inverse only for one batch of all examples.
"""

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fastif import ExactBlock, Influence
from tests.helpers.problems import trained

dattri = pytest.importorskip("dattri.task", reason="dattri is not installed (make test installs it)")
pytestmark = pytest.mark.filterwarnings("ignore")


def test_scores():
    from dattri.algorithm.influence_function import IFAttributorExplicit

    model, x, y = trained()

    def loss(parameters, batch):
        inputs, label = batch
        return F.cross_entropy(functional_call(model, parameters, inputs.reshape(-1, 5)), label.reshape(-1))

    task = dattri.AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    attributor = IFAttributorExplicit(task, layer_name=["2.weight", "2.bias"], regularization=1e-2)
    train = DataLoader(TensorDataset(x, y), batch_size=len(x), shuffle=False)
    query = DataLoader(TensorDataset(x[:7], y[:7]), batch_size=7, shuffle=False)
    attributor.cache(train)
    want = attributor.attribute(train, query).T / len(x)

    influence = Influence(model, curvature=ExactBlock(1e-2), progress=False).fit((x, y))
    got = influence.scores((x[:7], y[:7]), (x, y))
    assert want.dtype == torch.float32  # as dattri keeps scores
    assert (got - want).abs().max() <= 2e-7 * want.abs().max()
