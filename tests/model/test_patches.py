"""Patches of convolutions and their second moment, held against torch's own unfolding."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fastif import KFAC, Influence
from fastif.model.capture import Capture
from fastif.model.patches import PatchMoment, Window
from fastif.model.sliced_gradients import Sliced


@st.composite
def windows(draw, stride=(1, 1)):
    axes = draw(st.integers(1, 2))
    kernel, dilation = (tuple(draw(st.integers(1, most)) for _ in range(axes)) for most in (4, 2))
    before, after = (tuple(draw(st.integers(0, 3)) for _ in range(axes)) for _ in range(2))
    step = tuple(draw(st.integers(*stride)) for _ in range(axes))
    size = tuple(
        draw(st.integers(max(1, (k - 1) * s + 1 - b - a), 9))
        for k, s, b, a in zip(kernel, dilation, before, after, strict=True)
    )
    reach = zip(size, before, after, kernel, dilation, step, strict=True)
    positions = tuple((length + b + a - (k - 1) * s - 1) // t + 1 for length, b, a, k, s, t in reach)
    return Window(kernel, step, dilation, before, after, positions), size


def problem(size, channels, n=3):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n, channels, *size, dtype=torch.float64, generator=draw)
    return x, torch.rand(n, dtype=torch.float64, generator=draw)


@given(windows(stride=(1, 3)), st.integers(1, 2), st.booleans())
def test_patches_are_torchs(case, groups, ones):
    window, size = case
    x, _ = problem(size, 2 * groups)
    image = x if len(size) == 2 else x[:, :, None]
    pad = [*reversed([m for b, a in zip(window.before, window.after, strict=True) for m in (a, b)])]
    flat = Window(*((first, *rest) if len(rest) == 1 else rest for first, rest in zip((1, 1, 1, 0, 0, 1), window)))  # noqa: B905
    want = F.unfold(F.pad(image, pad), flat.kernel, dilation=flat.dilation, stride=flat.stride)  # [n, channels k, t]
    want = want.unflatten(1, (groups, -1)).permute(1, 0, 3, 2)
    got = window.patches(x, groups, ones)
    assert torch.equal(got[..., : want.shape[-1]], want)
    assert got.shape[-1] == want.shape[-1] + ones
    assert bool((got[..., want.shape[-1] :] == 1).all())


@given(windows(), st.integers(1, 3), st.booleans())
def test_moment_is_that_of_the_patches(case, channels, ones):
    window, size = case
    x, weights = problem(size, channels)
    a = window.patches(x, 1, ones)
    want = torch.einsum("n,gntd,gnte->gde", weights, a, a)
    got = PatchMoment(window, ones).add(x, weights).matrix()
    assert torch.allclose(got, want, rtol=1e-11, atol=1e-11 * max(1.0, float(want.abs().max())))


def test_moment_of_many_images_is_the_sum_of_its_slices(monkeypatch):
    window, size = Window((3, 3), (1, 1), (1, 1), (1, 1), (1, 1), (8, 8)), (8, 8)
    x, weights = problem(size, 4, n=7)
    whole = PatchMoment(window, True).add(x, weights).matrix()
    added = PatchMoment(window, True).add(x[:3], weights[:3]).add(x[3:], weights[3:])
    assert torch.allclose(added.matrix(), whole, rtol=1e-12)
    monkeypatch.setattr("fastif.model.patches._ENTRIES", 1000)  # one image at a time
    assert torch.allclose(PatchMoment(window, True).add(x, weights).matrix(), whole, rtol=1e-12)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 3, 3, padding=1),
        nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular", bias=False),
        nn.Conv2d(4, 3, (5, 3), padding="same", dilation=(1, 2)),
        nn.Conv1d(4, 3, 5, padding=2),
    ],
    ids=str,
)
def test_a_convolution_takes_the_shorter_way_and_gets_the_same_kfac(layer, monkeypatch):
    torch.manual_seed(0)
    axes = layer.weight.dim() - 2
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
    data = torch.randn(9, 4, *(12,) * axes, dtype=torch.float64), torch.arange(9) % 3
    model(data[0])

    def fitted():
        return Influence(model, curvature=KFAC(1e-2), layers="0", batch_size=4, progress=False).fit(data)

    capture = Capture(model, "0")
    with capture.attached():
        forward = capture.forward(data[0])
        (gradients,) = forward.gradients(F.cross_entropy(forward.outputs, data[1], reduction="none")).values()
    assert isinstance(gradients, Sliced)
    assert set(gradients.moments) == {"inputs", "outputs"}
    assert gradients.rows(2, 5).positions == 12**axes
    short = fitted()
    monkeypatch.setattr(Window, "moment_is_shorter", lambda *_: False)
    assert torch.allclose(short.scores(data, data), fitted().scores(data, data), rtol=1e-9, atol=1e-12)


def test_the_shorter_way_is_taken_where_it_is_shorter():
    def shorter(kernel, stride, size, channels=64):
        positions = tuple(math.ceil(length / stride) for length in size)
        beside = tuple(k // 2 for k in kernel)
        window = Window(kernel, (stride,) * len(kernel), (1,) * len(kernel), beside, beside, positions)
        return window.moment_is_shorter(channels, torch.Size(size))

    assert shorter((3, 3), 1, (32, 32))
    assert shorter((5, 5), 1, (8, 8))
    assert not shorter((1, 1), 1, (32, 32))  # the patches are the image
    assert not shorter((3, 3), 2, (32, 32))
    assert not shorter((3, 3, 3), 1, (8, 8, 8))
    assert not shorter((3, 3), 1, (1, 1))
