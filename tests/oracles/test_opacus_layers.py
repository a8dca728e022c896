"""Every example's gradient of every kind of layer that opacus knows."""

import pytest
import torch

from fastif.model.capture import Capture
from tests.helpers.networks import N, build, wavy

opacus = pytest.importorskip("opacus.grad_sample", reason="opacus is not installed (make test installs it)")
pytestmark = pytest.mark.filterwarnings("ignore")

KNOWN = [  # (opacus gives the padding row of an embedding a gradient, autograd does not)
    "linear",
    "linear [n, t, d]",
    "conv1d",
    "conv1d groups",
    "conv2d",
    "conv2d depthwise",
    "conv2d valid",
    "conv3d",
    "embedding",
    "layer_norm",
    "layer_norm, two axes",
    "group_norm",
    "instance_norm1d",
    "instance_norm2d",
    "rms_norm",
    "three times",
]


@pytest.mark.parametrize("name", KNOWN)
def test_gradients(name):
    model, x, *_ = build(name)
    capture = Capture(model)
    with capture.attached():
        forward = capture.forward(x)
        gradients = forward.gradients(wavy(forward.outputs, x))
    model.train()  # opacus looks away otherwise; no layer here acts differently
    module = opacus.GradSampleModule(model, loss_reduction="sum", strict=False)
    wavy(module(x), x).sum().backward()
    seen = set()
    for block in capture.blocks.values():
        formed = gradients[block.name].formed()
        for i in range(N):
            for piece in block.split(formed[i]):
                want = piece.parameter.grad_sample[i]
                assert torch.allclose(piece.value, want, rtol=1e-9, atol=1e-12), capture.names[piece.parameter]
                seen.add(piece.parameter)
    assert seen == set(model.parameters())
