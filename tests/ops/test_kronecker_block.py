import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastif.ops import ggn_block, kronecker_block
from tests import reference


def problem(n: int, d: int, c: int, dtype: torch.dtype, offset: float = 0, seed: int = 0):
    """Features and symmetric matrices that are not definite; some are zero."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(n, d, generator=g) + offset
    outer = torch.randn(n, c, c, generator=g)
    outer[::3] = 0
    return features.to(dtype), (outer + outer.mT).to(dtype)


def check_is_the_definition(got, features, outer):
    want, scale = reference.kronecker_block(features, outer), reference.kronecker_block(features.abs(), outer.abs())
    tolerance = 1e-6 if features.dtype == torch.float32 else 1e-14
    assert (got.double() - want).norm().item() <= tolerance * scale.norm().item()


@given(
    n=st.sampled_from([1, 2, 127, 128, 129, 300]),
    d=st.sampled_from([1, 2, 11, 12, 13, 31, 32, 33, 65, 100, 129, 250]),
    c=st.sampled_from([1, 2, 3, 5, 6, 9]),  # 15 pairs or fewer take another route than more
    dtype=st.sampled_from([torch.float32, torch.float64]),
    offset=st.sampled_from([0.0, 1e3]),
)
def test_is_the_definition(n, d, c, dtype, offset):
    args = problem(n, d, c, dtype, offset)
    check_is_the_definition(kronecker_block(*args), *args)


@pytest.mark.parametrize(("d", "c"), [(40, 14), (3, 30), (450, 2), (450, 6)])
def test_more_pairs_of_classes_or_features_than_one_chunk_holds(d, c):
    args = problem(200, d, c, torch.float32)
    check_is_the_definition(kronecker_block(*args), *args)


@pytest.mark.parametrize("c", [3, 8])
def test_equals_ggn_block_for_its_hessian(c):
    features, _ = problem(300, 40, c, torch.float32)
    probs, weights = torch.randn(300, c).softmax(1), torch.rand(300)
    outer = weights[:, None, None] * (probs.diag_embed() - probs[:, :, None] * probs[:, None, :])
    block = ggn_block(features, probs, weights)
    assert (kronecker_block(features, outer) - block).norm() <= 1e-6 * block.norm()


@pytest.mark.parametrize("c", [2, 7])
def test_accumulates_into_what_out_holds(c):
    args = problem(100, 20, c, torch.float32)
    before = torch.randn(c, 20, c, 20)
    out = before.clone()
    assert kronecker_block(*args, out=out) is out
    assert torch.allclose(out - before, kronecker_block(*args), atol=1e-3)


@pytest.mark.parametrize("c", [1, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_symmetric_and_reads_the_lower_triangle(c, dtype):
    features, outer = problem(200, 70, c, dtype)
    block = kronecker_block(features, outer)
    assert torch.equal(block, block.permute(2, 3, 0, 1))
    assert torch.equal(block, kronecker_block(features, outer.tril()))


@pytest.mark.parametrize(("d", "c"), [(100, 6), (300, 2)])
def test_threads_do_not_matter(d, c):
    args = problem(700, d, c, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(kronecker_block(*args))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_strides_do_not_matter():
    features, outer = problem(90, 41, 4, torch.float32)
    got = kronecker_block(features.T.contiguous().T, outer.permute(2, 0, 1).contiguous().permute(1, 2, 0))
    assert torch.equal(got, kronecker_block(features, outer))


def test_opcheck():
    features, outer = problem(9, 4, 3, torch.float32)
    torch.library.opcheck(torch.ops.fastif.kronecker_block_.default, (torch.zeros(3, 4, 3, 4), features, outer))


FEATURES, OUTER = torch.randn(3, 2), torch.ones(3, 4, 4)


@pytest.mark.parametrize(
    ("features", "outer", "out", "error", "message"),
    [
        (torch.randn(3), OUTER, None, ValueError, r"kronecker_block: features must be \[n, d\], got shape \[3\]"),
        (FEATURES, torch.ones(3, 4), None, ValueError, r"outer must be \[n, c, c\], got shape \[3, 4\]"),
        (FEATURES, torch.ones(3, 4, 3), None, ValueError, r"outer must be \[n, c, c\] with n=3, got \[3, 4, 3\]"),
        (FEATURES[:2], OUTER, None, ValueError, r"outer must be \[n, c, c\] with n=2, got \[3, 4, 4\]"),
        (FEATURES, OUTER.double(), None, TypeError, "outer must have the dtype of features"),
        (FEATURES.half(), OUTER.half(), None, TypeError, "features must be float32 or float64"),
        (FEATURES * torch.nan, OUTER, None, ValueError, "features must be finite, row 0"),
        (FEATURES, OUTER.index_fill(0, torch.tensor(1), torch.inf), None, ValueError, "outer must be finite, row 1"),
        (FEATURES[:0], OUTER[:0], None, ValueError, "must not be empty"),
        (FEATURES, OUTER, torch.zeros(4, 2, 4, 3), ValueError, r"out must be a contiguous \[c, d, c, d\] = "),
        (FEATURES, OUTER, torch.zeros(4, 2, 4, 2, dtype=torch.float64), TypeError, "out must have the dtype"),
    ],
)
def test_bad_input(features, outer, out, error, message):
    with pytest.raises(error, match=message):
        kronecker_block(features, outer, out=out)


def test_gradients_are_refused_or_cut():
    assert not kronecker_block(FEATURES.clone().requires_grad_(), OUTER).requires_grad
    with pytest.raises(ValueError, match="out must not require grad"):
        kronecker_block(FEATURES, OUTER, out=torch.zeros(4, 2, 4, 2, requires_grad=True))
