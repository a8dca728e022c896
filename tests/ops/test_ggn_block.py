import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastif.ops import build_info, ggn_block
from tests import reference


def problem(n: int, d: int, c: int, dtype: torch.dtype, offset: float = 0, sharpness: float = 1, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(n, d, generator=g) + offset
    probs = (sharpness * torch.randn(n, c, generator=g, dtype=torch.float64)).softmax(1)
    weights = torch.rand(n, generator=g)
    weights[::3] = 0
    return features.to(dtype), probs.to(dtype), weights.to(dtype)


def check_is_the_definition(got, features, probs, weights):
    want = reference.ggn_block(features, probs, weights)
    tolerance = 1e-6 if features.dtype == torch.float32 else 1e-13
    scale = want.norm().item()
    assert (got.double() - want).norm().item() <= tolerance * scale + 1e-300


@given(
    n=st.sampled_from([1, 2, 7, 255, 256, 257, 600]),
    d=st.sampled_from([1, 2, 7, 8, 9, 31, 32, 33, 65, 100]),
    c=st.sampled_from([1, 2, 3, 5, 13]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    offset=st.sampled_from([0.0, 1e3]),
    sharpness=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_is_the_definition(n, d, c, dtype, offset, sharpness):
    args = problem(n, d, c, dtype, offset, sharpness)
    check_is_the_definition(ggn_block(*args), *args)


def test_more_class_pairs_than_one_chunk_holds():
    args = problem(300, 40, 14, torch.float32)  # 91 pairs
    check_is_the_definition(ggn_block(*args), *args)


def test_accumulates_into_what_out_holds():
    args = problem(100, 20, 4, torch.float32)
    before = torch.randn(4, 20, 4, 20)
    out = before.clone()
    assert ggn_block(*args, out=out) is out
    assert torch.allclose(out - before, ggn_block(*args), atol=1e-6)


def test_batches_add_up():
    features, probs, weights = problem(500, 33, 5, torch.float64)
    whole = ggn_block(features, probs, weights)
    for size in (1, 7, 64):
        out = torch.zeros_like(whole)
        for rows in torch.arange(500).split(size):
            ggn_block(features[rows], probs[rows], weights[rows], out=out)
        assert torch.allclose(out, whole, rtol=1e-12, atol=1e-13)


def test_default_weights_are_the_mean():
    features, probs, _ = problem(10, 3, 3, torch.float64)
    assert torch.allclose(
        ggn_block(features, probs), reference.ggn_block(features, probs, torch.full((10,), 0.1, dtype=torch.float64))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_symmetric_and_rows_of_classes_sum_to_zero(dtype):
    features, probs, weights = problem(200, 40, 6, dtype)
    block = ggn_block(features, probs, weights)
    assert torch.equal(block, block.permute(2, 3, 0, 1))
    assert block.sum(2).abs().max() <= 1e-5 * block.abs().max()


@pytest.mark.skipif(not build_info()["compiled"], reason="plain torch's products depend on the number of threads")
def test_threads_do_not_matter():
    args = problem(3000, 100, 6, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ggn_block(*args))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_strides_do_not_matter():
    features, probs, weights = problem(90, 41, 4, torch.float32)
    got = ggn_block(features.T.contiguous().T, probs.T.contiguous().T, weights.repeat_interleave(2)[::2])
    assert torch.equal(got, ggn_block(features, probs, weights))


def test_confident_predictions_keep_their_curvature():
    """1 - p of a float32 p near one is all rounding; the sum of the other probabilities is not."""
    probs = torch.tensor([[1.0, 1e-12]])
    assert ggn_block(torch.ones(1, 1), probs).flatten()[0].item() == pytest.approx(1e-12, rel=1e-5)


def test_opcheck():
    features, probs, weights = problem(9, 4, 3, torch.float32)
    torch.library.opcheck(torch.ops.fastif.ggn_block_.default, (torch.zeros(3, 4, 3, 4), features, probs, weights))


GOOD = (torch.randn(3, 2), torch.full((3, 4), 0.25), torch.ones(3))


def bad(position, value):
    return (*GOOD[:position], value, *GOOD[position + 1 :])


@pytest.mark.parametrize(
    ("args", "out", "error", "message"),
    [
        (bad(0, torch.randn(3)), None, ValueError, r"ggn_block: features must be \[n, d\], got shape \[3\]"),
        (bad(0, torch.randn(2, 2)), None, ValueError, "probs must have n=2 rows, got 3"),
        (bad(1, torch.full((3, 4), 0.3)), None, ValueError, r"must sum to 1 \(within 1e-3\), row 0 is off by 0.2"),
        (
            bad(1, torch.full((3, 4), 0.25, dtype=torch.float64)),
            None,
            TypeError,
            "probs must have the dtype of features",
        ),
        (bad(1, torch.tensor([[1.5, -0.5]] * 3)), None, ValueError, "probs must be >= 0, got -0.5"),
        (bad(2, -torch.ones(3)), None, ValueError, "weights must be >= 0, got -1"),
        (bad(2, torch.ones(2)), None, ValueError, "weights must have n=3 entries, got 2"),
        (bad(0, torch.tensor([[1.0, 1], [1, torch.inf], [1, 1]])), None, ValueError, "features must be finite, row 1"),
        (bad(1, torch.full((3, 4), torch.nan)), None, ValueError, "probs must be finite, row 0"),
        (bad(2, torch.tensor([1, 1, torch.nan])), None, ValueError, "weights must be finite, row 2"),
        (bad(0, torch.randn(3, 0)), None, ValueError, "must not be empty"),
        (GOOD, torch.zeros(4, 2, 4, 3), ValueError, r"out must be a contiguous \[c, d, c, d\] = \[4, 2, 4, 2\]"),
        (GOOD, torch.zeros(4, 2, 4, 2).permute(2, 3, 0, 1), ValueError, "out must be a contiguous"),
        (GOOD, torch.zeros(4, 2, 4, 2, dtype=torch.float64), TypeError, "out must have the dtype of features"),
    ],
)
def test_bad_input(args, out, error, message):
    with pytest.raises(error, match=message):
        ggn_block(*args, out=out)


def test_overflow_is_refused():
    with pytest.raises(
        ValueError, match=r"the result overflows: the largest \|feature\| is 1e\+25, the weights sum to 1"
    ):
        ggn_block(torch.full((4, 2), 1e25), torch.full((4, 2), 0.5))


def test_gradients_are_refused_or_cut():
    features = torch.randn(3, 2, requires_grad=True)
    assert not ggn_block(features, GOOD[1]).requires_grad
    with pytest.raises(ValueError, match="out must not require grad"):
        ggn_block(*GOOD, out=torch.zeros(4, 2, 4, 2, requires_grad=True))


def test_meta_tensors_among_others_are_refused():
    with pytest.raises(ValueError, match="on the device of features"):
        ggn_block(GOOD[0], GOOD[1].to("meta"), GOOD[2])


def test_bad_input_leaves_out_as_it_was():
    out = torch.ones(4, 2, 4, 2)
    with pytest.raises(ValueError, match="finite"):
        ggn_block(*bad(0, torch.full((3, 2), torch.nan)), out=out)
    assert torch.equal(out, torch.ones_like(out))
