"""What the ops that add to a block of the caller's take as `out`, and what they leave in it."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fastif.ops import ggn_block, kronecker_block
from tests.ops.test_contracts import PROBLEMS, C, D, inference

BLOCKS = ["ggn_block", "kronecker_block"]


def block(op: str, out: Tensor, **others: Tensor) -> Tensor:
    function, good = PROBLEMS[op]
    return function(**(good | dict(out=out) | others))


@pytest.mark.parametrize("op", BLOCKS)
def test_views_whose_sign_is_not_stored_are_refused(op):
    z = torch.zeros(C, D, C, D, dtype=torch.complex64)
    views = [torch._neg_view(torch.zeros(C, D, C, D)), torch.zeros_like(z).conj().imag]
    with pytest.raises(ValueError, match=f"{op}: out must not be a negative view"):
        block(op, views[0])
    with pytest.raises(ValueError, match=f"{op}: out must be a contiguous"):
        block(op, views[1])
    with pytest.raises(TypeError, match=f"{op}: out must have the dtype of features"):
        block(op, z.conj())
    assert not any(view.any() for view in views)


@pytest.mark.parametrize("op", BLOCKS)
def test_memory_that_overlaps_itself_or_an_input_is_refused(op):
    good = PROBLEMS[op][1]
    for out in (torch.zeros(D, C, D).expand(C, D, C, D), torch.zeros(99).as_strided((C, D, C, D), (1, 2, 2, 1))):
        with pytest.raises(ValueError, match=f"{op}: out must be a contiguous"):
            block(op, out)
    for name in good.keys() - {"out"}:
        size = good[name].numel()
        memory = np.zeros(C * D * C * D + size, dtype=np.float32)
        out = torch.from_numpy(memory)[: C * D * C * D].view(C, D, C, D)
        for begin, shared in ((0, 4 * size), (C * D * C * D - 1, 4)):
            x = torch.from_numpy(memory)[begin : begin + size].view(good[name].shape)  # another storage
            x.copy_(good[name])
            message = f"{op}: out must not share memory with {name}, got {shared} bytes"
            with pytest.raises(ValueError, match=message):
                block(op, out, **{name: x})
            assert torch.equal(x, good[name])
        x = torch.from_numpy(memory)[C * D * C * D :].view(good[name].shape)  # side by side
        x.copy_(good[name])
        assert torch.allclose(block(op, out.zero_(), **{name: x}), block(op, torch.zeros(C, D, C, D)))
        meta = torch.zeros(C * D * C * D, device="meta")
        others = {other: good[other].to("meta") for other in good.keys() - {"out"}}
        with pytest.raises(ValueError, match=f"{op}: out must not share memory with {name}"):
            block(op, meta.view(C, D, C, D), **(others | {name: meta[:size].view(good[name].shape)}))


@pytest.mark.parametrize("op", BLOCKS)
def test_inference_tensors_are_written_in_inference_mode_alone(op):
    out = inference(torch.zeros(C, D, C, D))
    for context in (torch.enable_grad, torch.no_grad):
        with context(), pytest.raises(ValueError, match=f"{op}: out must not be an inference tensor outside"):
            block(op, out)
    assert not out.any()
    with torch.inference_mode():
        inside, normal = block(op, torch.zeros(C, D, C, D)), block(op, torch.zeros(C, D, C, D))
        assert torch.equal(block(op, out), inside)
    assert torch.equal(block(op, torch.zeros(C, D, C, D)), normal)


@pytest.mark.parametrize("op", BLOCKS)
def test_autograd_sees_that_what_it_saved_was_written_to(op):
    leaf, out = torch.ones((), requires_grad=True), torch.zeros(C, D, C, D)
    product = (leaf * out).sum()
    block(op, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


# Numbers that leave the range.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("c", [2, 9])  # few pairs of classes take another route than many
@pytest.mark.parametrize("op", BLOCKS)
def test_nothing_that_is_not_finite_comes_out(op, c, dtype):
    """At either side of each limit: a result that is finite, or the largest values."""
    large, most = (1e19, 3e38) if dtype == torch.float32 else (1e150, 1.5e308)

    def run(feature, factor, held):
        features, out = torch.full((3, 4), feature, dtype=dtype), torch.full((c, 4, c, 4), held, dtype=dtype)
        before, refusal = out.clone(), None
        try:
            if op == "ggn_block":
                ggn_block(features, features.new_full((3, c), 1 / c), features.new_full((3,), factor / 3), out=out)
            else:
                kronecker_block(features, features.new_full((3, c, c), factor / 3), out=out)
        except ValueError as error:
            refusal = str(error).splitlines()[0]
        if refusal is None:
            assert out.isfinite().all()
            return True
        assert torch.equal(out, before)
        assert refusal.startswith(f"{op}: the result overflows: the largest |feature| is {feature:g}, the ")
        assert refusal.endswith(f", the largest |out| is {held:g}")
        return False

    assert run(large * 0.99, 1.0, 0.0)
    assert run(large * 0.99, -0.99 if op == "kronecker_block" else 0.99, most * 0.6)
    assert run(1.0, large, most * 0.99)
    assert not run(large * 1.01, 1e-9, 0.0)  # the product of two features
    assert not run(large * 0.9, 1.5, 0.0)
    assert not run(large * 0.9, 1.0, most)
    assert not run(1.0, large * large * 0.1, most)


def test_large_features_and_large_matrices_of_different_rows():
    features, outer = torch.tensor([[1e18], [1.0]]), torch.tensor([[[1.0]], [[1e30]]])
    assert kronecker_block(features, outer).item() == pytest.approx(1e36, rel=1e-3)


@pytest.mark.parametrize("op", BLOCKS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_out_that_is_not_finite_is_refused(op, value):
    out = torch.zeros(C, D, C, D)
    out[1, 2, 0, 3] = value
    with pytest.raises(ValueError, match=f"{op}: out must be finite, row 1 holds NaN or Inf"):
        block(op, out)
