"""The head's curvature and its solves, held against curvlinops on a whole small model."""

import pytest
import torch
from torch import nn

from fastif import ExactBlock, Influence
from tests.helpers.problems import trained

curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed (make test installs it)")
pytestmark = pytest.mark.filterwarnings("ignore")

OPERATORS = {
    "ggn": curvlinops.GGNLinearOperator,
    "hessian": curvlinops.HessianLinearOperator,
    "empirical_fisher": curvlinops.EFLinearOperator,
}


@pytest.mark.parametrize("matrix", list(OPERATORS))
def test_block_and_solve(matrix):
    problem = trained()
    head = problem.model[2]
    everything = list(problem.model.parameters())
    operator = OPERATORS[matrix](problem.model, nn.CrossEntropyLoss(), everything, [(problem.x, problem.y)])
    size = sum(p.numel() for p in everything)
    dense = operator @ torch.eye(size, dtype=torch.float64)
    weights = head.weight.numel()
    dense = dense[-weights - 3 :, -weights - 3 :]  # the head's parameters come last: weight [3, 6], bias [3]

    influence = Influence(problem.model, curvature=ExactBlock(1e-2, matrix), progress=False)
    influence.fit((problem.x, problem.y))
    order = torch.cat([torch.arange(21).view(3, 7)[:, :6].flatten(), torch.arange(21).view(3, 7)[:, 6]])
    block = influence.curvature["2"].block.view(21, 21)[order][:, order]
    assert (block - dense).norm() <= 1e-10 * dense.norm()

    damped = dense + 1e-2 * torch.eye(21, dtype=torch.float64)
    inverse = influence.curvature["2"].inverse()[order][:, order]
    assert (inverse - torch.linalg.inv(damped)).norm() <= 1e-10 * inverse.norm()
