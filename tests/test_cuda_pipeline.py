"""The layers above the ops give on a GPU what they give on the CPU."""

import copy
from functools import partial

import pytest
import torch

from fastif import ExactBlock, Influence, remove, samplers
from fastif.evaluation import class_removal
from tests.helpers.problems import WEIGHT_DECAY, trained

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def problem():
    return trained()


@pytest.mark.parametrize(("matrix", "in_place"), [("ggn", False), ("ggn", True), ("empirical_fisher", False)])
def test_influence(problem, matrix, in_place):
    data = problem.x, problem.y
    results = []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(problem.model).to(device)
        curvature = ExactBlock(WEIGHT_DECAY, matrix, in_place=in_place)
        influence = Influence(model, curvature=curvature, progress=False).fit(data)
        results.append((influence.scores(data, data), influence.self_influence(data), influence.top(data, data, 3)[1]))
        assert influence.curvature["2"].block.device.type == device
        assert influence.on_parameters(data)["2.weight"].device.type == device
    for cpu, cuda in zip(*results, strict=True):
        assert cuda.device.type == "cpu"
        assert torch.allclose(cpu.double(), cuda.double(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("sampler", [None, samplers.logit, samplers.leverage, samplers.k_center, samplers.random])
def test_removal(problem, sampler):
    subset = None if sampler is None else partial(sampler, k=20)
    results = []
    for device in ("cpu", "cuda"):
        removal = remove(
            copy.deepcopy(problem.model).to(device),
            (problem.x, problem.y),
            torch.arange(5),
            subset=subset,
            generator=torch.Generator().manual_seed(0),
            weight_decay=WEIGHT_DECAY,
            steps=3,
            progress=False,
        )
        results.append(removal.state_dict["2.weight"].cpu())
        assert removal.history[0].peak_bytes is not None
    assert torch.allclose(*results, rtol=1e-6, atol=1e-9)


def test_class_removal(problem):
    results = [
        class_removal(
            copy.deepcopy(problem.model).to(device),
            (problem.x, problem.y),
            (problem.x, problem.y),
            samplers=["logit"],
            k=30,
            seeds=1,
            weight_decay=WEIGHT_DECAY,
            device=device,
            progress=False,
        )
        for device in ("cpu", "cuda")
    ]
    for cpu, cuda in zip(results[0]["rows"], results[1]["rows"], strict=True):
        assert cuda["F1"] == pytest.approx(cpu["F1"], abs=1e-6)
        assert cuda["objective"] == pytest.approx(cpu["objective"], rel=1e-6)
