import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastif.ops import per_sample_grad
from tests import reference

SIZES = {
    "n": st.sampled_from([1, 2, 9, 300]),
    "t": st.sampled_from([1, 2, 5, 17]),
    "d": st.sampled_from([1, 3, 32, 45]),
    "o": st.sampled_from([1, 4, 33]),
    "dtype": st.sampled_from([torch.float32, torch.float64]),
    "offset": st.sampled_from([0.0, 1e3]),
}


def problem(n, t, d, o, dtype, offset=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, t, d, generator=g, dtype=dtype) + offset
    return inputs, torch.randn(n, t, o, generator=g, dtype=dtype), g


def check_close(got, want):
    tolerance = 3e-6 if got.dtype == torch.float32 else 1e-13
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max() + 1e-300


@given(**SIZES, q=st.integers(1, 4))
def test_dots_are_the_definition(n, t, d, o, dtype, offset, q):
    inputs, output_grads, g = problem(n, t, d, o, dtype, offset)
    directions = torch.randn(q, o, d, generator=g, dtype=dtype)
    got = per_sample_grad.dots(inputs, output_grads, directions)
    # Entries may cancel: the error is held against the size of what is summed.
    size = reference.dots(inputs.abs(), output_grads.abs(), directions.abs()).max()
    assert (got.double() - reference.dots(inputs, output_grads, directions)).abs().max() <= size * (
        1e-6 if dtype == torch.float32 else 1e-14
    )


@given(**SIZES)
def test_sq_norms_are_the_definition(n, t, d, o, dtype, offset):
    inputs, output_grads, _ = problem(n, t, d, o, dtype, offset)
    got = per_sample_grad.sq_norms(inputs, output_grads)
    size = reference.sq_norms(inputs.abs(), output_grads.abs()).max()
    assert (got.double() - reference.sq_norms(inputs, output_grads)).abs().max() <= size * (
        1e-6 if dtype == torch.float32 else 1e-14
    )


@given(**SIZES, num_groups=st.integers(1, 5))
def test_accumulate_is_the_definition(n, t, d, o, dtype, offset, num_groups):
    inputs, output_grads, g = problem(n, t, d, o, dtype, offset)
    weights = torch.randn(n, generator=g, dtype=dtype)
    groups = torch.randint(0, num_groups, (n,), generator=g)
    got = per_sample_grad.accumulate(inputs, output_grads, weights, groups, num_groups)
    size = reference.accumulate(inputs.abs(), output_grads.abs(), weights.abs(), groups, num_groups).max()
    error = (got.double() - reference.accumulate(inputs, output_grads, weights, groups, num_groups)).abs().max()
    assert error <= size * (1e-6 if dtype == torch.float32 else 1e-14)


def test_two_axes_mean_one_position():
    inputs, output_grads, g = problem(7, 1, 5, 3, torch.float64)
    flat = inputs[:, 0], output_grads[:, 0]
    directions = torch.randn(2, 3, 5, generator=g, dtype=torch.float64)
    check_close(per_sample_grad.dots(*flat, directions), reference.dots(inputs, output_grads, directions))
    check_close(per_sample_grad.sq_norms(*flat), reference.sq_norms(inputs, output_grads))
    check_close(per_sample_grad.accumulate(*flat)[0], reference.per_sample_grads(inputs, output_grads).sum(0))


def test_empty_groups_are_zero():
    inputs, output_grads, _ = problem(4, 1, 3, 2, torch.float32)
    got = per_sample_grad.accumulate(inputs, output_grads, groups=torch.tensor([3, 3, 1, 3]), num_groups=5)
    assert [bool(block.any()) for block in got] == [False, True, False, True, False]


def test_one_long_group_in_several_chunks():
    inputs, output_grads, _ = problem(9000, 1, 200, 100, torch.float32)
    got = per_sample_grad.accumulate(inputs, output_grads)[0]
    check_close(got, output_grads[:, 0].double().T @ inputs[:, 0].double())


def test_strides_do_not_matter():
    inputs, output_grads, g = problem(20, 3, 8, 6, torch.float32)
    directions = torch.randn(2, 6, 8, generator=g)
    strided = inputs.transpose(0, 2).contiguous().transpose(0, 2), output_grads.repeat(1, 2, 1)[:, :3]
    assert torch.equal(
        per_sample_grad.dots(*strided, directions), per_sample_grad.dots(inputs, output_grads, directions)
    )
    assert torch.equal(per_sample_grad.sq_norms(*strided), per_sample_grad.sq_norms(inputs, output_grads))
    assert torch.equal(per_sample_grad.accumulate(*strided), per_sample_grad.accumulate(inputs, output_grads))
    turned = directions.transpose(1, 2).contiguous().transpose(1, 2)
    check_close(per_sample_grad.dots(inputs, output_grads, turned), per_sample_grad.dots(*strided, directions).double())


def test_batches_and_threads_do_not_matter():
    inputs, output_grads, g = problem(200, 3, 16, 12, torch.float64)
    directions = torch.randn(3, 12, 16, generator=g, dtype=torch.float64)
    whole = per_sample_grad.dots(inputs, output_grads, directions)
    norms = per_sample_grad.sq_norms(inputs, output_grads)
    threads = torch.get_num_threads()
    try:
        for count, size in ((1, 1), (2, 7), (4, 64)):
            torch.set_num_threads(count)
            parts = list(zip(inputs.split(size), output_grads.split(size), strict=True))
            check_close(torch.cat([per_sample_grad.dots(a, u, directions) for a, u in parts], 1), whole)
            check_close(torch.cat([per_sample_grad.sq_norms(a, u) for a, u in parts]), norms)
            total = torch.stack([per_sample_grad.accumulate(a, u) for a, u in parts]).sum(0)
            check_close(total, per_sample_grad.accumulate(inputs, output_grads))
    finally:
        torch.set_num_threads(threads)


def samples():
    inputs, output_grads, g = problem(4, 2, 3, 2, torch.float64)
    for x in (inputs, output_grads):
        x.requires_grad_()
    directions = torch.randn(3, 2, 3, generator=g, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, generator=g, dtype=torch.float64, requires_grad=True)
    ops = torch.ops.fastif
    return [
        (ops.per_sample_grad_dots.default, (inputs, output_grads, directions)),
        (ops.per_sample_grad_sq_norms.default, (inputs, output_grads)),
        (ops.per_sample_grad_accumulate.default, (inputs, output_grads, weights, torch.tensor([0, 2, 2, 1]), 4)),
    ]


@pytest.mark.parametrize(("op", "args"), samples(), ids=["dots", "sq_norms", "accumulate"])
def test_opcheck_and_gradcheck(op, args):
    torch.library.opcheck(op, args)
    assert torch.autograd.gradcheck(op, args)


def test_autocast_does_not_matter():
    inputs, output_grads, _ = problem(5, 9, 4, 3, torch.float32)
    plain = per_sample_grad.sq_norms(inputs, output_grads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(per_sample_grad.sq_norms(inputs, output_grads), plain)


def test_meta_tensors_among_others_are_refused():
    with pytest.raises(ValueError, match="directions must be on the device of inputs"):
        per_sample_grad.dots(A, U, V.to("meta"))


A, U, V = torch.randn(3, 2, 5), torch.randn(3, 2, 4), torch.randn(2, 4, 5)
W, G = torch.ones(3), torch.tensor([0, 1, 0])


def with_nan(x, row):
    x = x.clone()
    x[row].view(-1)[0] = torch.nan
    return x


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: per_sample_grad.dots(A[0, 0], U, V), ValueError, r"dots: inputs must be \[n, t, d\], got shape \[5\]"),
        (lambda: per_sample_grad.dots(A, U[:2], V), ValueError, r"agree in \[n, t\], got \[3, 2, 5\] and \[2, 2, 4\]"),
        (lambda: per_sample_grad.dots(A, U, V[:, :3]), ValueError, r"directions must be \[q, o=4, d=5\] with q >= 1"),
        (lambda: per_sample_grad.dots(A, U, V[:0]), ValueError, "q >= 1, got"),
        (lambda: per_sample_grad.dots(A, U.double(), V), TypeError, "output_grads must have the dtype of inputs"),
        (lambda: per_sample_grad.dots(A.half(), U.half(), V.half()), TypeError, "must be float32 or float64, got Half"),
        (lambda: per_sample_grad.dots(with_nan(A, 2), U, V), ValueError, "inputs must be finite, row 2 holds NaN"),
        (lambda: per_sample_grad.dots(A, U, with_nan(V, 1)), ValueError, "directions must be finite, row 1"),
        (lambda: per_sample_grad.sq_norms(A, with_nan(U, 1)), ValueError, "output_grads must be finite, row 1"),
        (lambda: per_sample_grad.sq_norms(A * 1e30, U), ValueError, "the result overflows .*pass float64"),
        (lambda: per_sample_grad.sq_norms(A[:0], U[:0]), ValueError, "must not be empty"),
        (lambda: per_sample_grad.accumulate(with_nan(A, 0), U), ValueError, "inputs must be finite, row 0"),
        (lambda: per_sample_grad.accumulate(A, U, W[:2]), ValueError, "weights must have n=3 entries, got 2"),
        (
            lambda: per_sample_grad.accumulate(A, U, with_nan(W, slice(1, 2))),
            ValueError,
            "weights must be finite, row 1",
        ),
        (
            lambda: per_sample_grad.accumulate(A, U, W, G, 1),
            ValueError,
            r"groups must be in \[0, num_groups=1\), got 1",
        ),
        (lambda: per_sample_grad.accumulate(A, U, W, G - 1, 2), ValueError, "got -1"),
        (lambda: per_sample_grad.accumulate(A, U, W, G.int(), 2), TypeError, "groups must be int64"),
        (lambda: per_sample_grad.accumulate(A, U, W, G, 0), ValueError, "num_groups must be >= 1, got 0"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
