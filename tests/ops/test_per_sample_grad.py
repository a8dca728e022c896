import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastif.ops import build_info, per_sample_grad
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


@given(**SIZES, scaled=st.booleans())
def test_sq_norms_are_the_definition(n, t, d, o, dtype, offset, scaled):
    inputs, output_grads, g = problem(n, t, d, o, dtype, offset)
    scale = torch.rand(o, d, generator=g, dtype=dtype) if scaled else None
    got = per_sample_grad.sq_norms(inputs, output_grads, scale)
    size = reference.sq_norms(inputs.abs(), output_grads.abs(), scale).max()
    assert (got.double() - reference.sq_norms(inputs, output_grads, scale)).abs().max() <= size * (
        1e-6 if dtype == torch.float32 else 1e-14
    )


@given(**SIZES, weighted=st.booleans())
def test_accumulated_squares_are_the_definition(n, t, d, o, dtype, offset, weighted):
    inputs, output_grads, g = problem(n, t, d, o, dtype, offset)
    weights = torch.randn(n, generator=g, dtype=dtype) if weighted else torch.ones(n, dtype=dtype)
    got = per_sample_grad.accumulate_squares(inputs, output_grads, weights if weighted else None)
    size = reference.accumulate_squares(inputs.abs(), output_grads.abs(), weights.abs()).max()
    assert (got.double() - reference.accumulate_squares(inputs, output_grads, weights)).abs().max() <= size * (
        1e-6 if dtype == torch.float32 else 1e-14
    )


# Sides beyond one tile and one region of tiles, positions beyond one chunk, directions that pay for explicit gradients.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "t", "d", "o"), [(5, 9, 577, 128), (3, 40, 130, 515), (2, 700, 33, 7), (40, 6, 5, 300)])
def test_large_sides_and_many_positions(n, t, d, o, dtype):
    inputs, output_grads, g = problem(n, t, d, o, dtype)
    weights, scale = torch.rand(n, generator=g, dtype=dtype), torch.rand(o, d, generator=g, dtype=dtype)
    directions = torch.randn(11, o, d, generator=g, dtype=dtype)
    grads = inputs, output_grads
    check_close(per_sample_grad.accumulate_squares(*grads, weights), reference.accumulate_squares(*grads, weights))
    check_close(per_sample_grad.sq_norms(*grads), reference.sq_norms(*grads))
    check_close(per_sample_grad.sq_norms(*grads, scale), reference.sq_norms(*grads, scale))
    error = per_sample_grad.dots(*grads, directions).double() - reference.dots(*grads, directions)
    size = reference.dots(inputs.abs(), output_grads.abs(), directions.abs()).max()  # entries cancel
    assert error.abs().max() <= size * (1e-6 if dtype == torch.float32 else 1e-14)


@given(
    n=st.sampled_from([1, 3, 50]),
    t=st.sampled_from([1, 2, 17]),
    d=st.sampled_from([1, 33]),
    o=st.sampled_from([1, 4, 40]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    q=st.integers(1, 4),
)
def test_16_bit_inputs_give_what_their_values_in_32_bits_give(n, t, d, o, dtype, q):
    inputs, output_grads, g = problem(n, t, d, o, torch.float32)
    short = inputs.to(dtype), output_grads.to(dtype)
    same = short[0].float(), short[1].float()
    weights, scale = torch.randn(n, generator=g), torch.rand(o, d, generator=g)
    groups, directions = torch.randint(0, 3, (n,), generator=g), torch.randn(q, o, d, generator=g)
    for call in (
        lambda a, u: per_sample_grad.accumulate(a, u, weights, groups, 3),
        per_sample_grad.accumulate,
        lambda a, u: per_sample_grad.accumulate_squares(a, u, weights),
        per_sample_grad.accumulate_squares,
        per_sample_grad.sq_norms,
        lambda a, u: per_sample_grad.sq_norms(a, u, scale),
        lambda a, u: per_sample_grad.dots(a, u, directions),
    ):
        got = call(*short)
        assert got.dtype == torch.float32
        check_close(got, call(*same).double())


def test_inputs_stay_as_they_are():
    inputs, output_grads, g = problem(6, 1, 5, 4, torch.float32)
    before = inputs.clone(), output_grads.clone()
    scale = torch.rand(4, 5, generator=g)
    per_sample_grad.sq_norms(inputs, output_grads, scale)
    per_sample_grad.sq_norms(inputs, output_grads)
    per_sample_grad.accumulate_squares(inputs, output_grads, torch.rand(6, generator=g))
    per_sample_grad.accumulate(inputs, output_grads, torch.rand(6, generator=g))
    assert torch.equal(inputs, before[0])
    assert torch.equal(output_grads, before[1])


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
    check_close(
        per_sample_grad.accumulate_squares(*flat),
        reference.accumulate_squares(inputs, output_grads, torch.ones(7, dtype=torch.float64)),
    )
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
    assert torch.equal(
        per_sample_grad.accumulate_squares(*strided), per_sample_grad.accumulate_squares(inputs, output_grads)
    )
    scale = torch.rand(6, 8, generator=g)
    turned = scale.T.contiguous().T
    check_close(
        per_sample_grad.sq_norms(*strided, turned), per_sample_grad.sq_norms(inputs, output_grads, scale).double()
    )
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
            total = torch.stack([per_sample_grad.accumulate_squares(a, u) for a, u in parts]).sum(0)
            check_close(total, per_sample_grad.accumulate_squares(inputs, output_grads))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not build_info()["compiled"], reason="plain torch's products depend on the number of threads")
@pytest.mark.parametrize(
    ("n", "t", "d", "o"),
    [
        (20000, 1, 65, 10),
        (9000, 1, 200, 100),
        (900, 1, 65, 10),
        (150, 9, 130, 70),
        (300, 32, 65, 10),
        (3, 40, 200, 300),
    ],
)
def test_the_bits_do_not_depend_on_the_number_of_threads(n, t, d, o):
    inputs, output_grads, g = problem(n, t, d, o, torch.float32)
    scale, directions = torch.rand(o, d, generator=g), torch.randn(9, o, d, generator=g)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(
                (
                    per_sample_grad.accumulate(inputs, output_grads),
                    per_sample_grad.accumulate_squares(inputs, output_grads),
                    per_sample_grad.sq_norms(inputs, output_grads),
                    per_sample_grad.sq_norms(inputs, output_grads, scale),
                    per_sample_grad.dots(inputs, output_grads, directions),
                )
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def samples():
    inputs, output_grads, g = problem(4, 2, 3, 2, torch.float64)
    for x in (inputs, output_grads):
        x.requires_grad_()
    directions = torch.randn(3, 2, 3, generator=g, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, generator=g, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(2, 3, generator=g, dtype=torch.float64).add_(0.1).requires_grad_()  # stays >= 0 nearby
    ops = torch.ops.fastif
    return [
        (ops.per_sample_grad_dots.default, (inputs, output_grads, directions)),
        (ops.per_sample_grad_sq_norms.default, (inputs, output_grads)),
        (ops.per_sample_grad_sq_norms.default, (inputs, output_grads, scale)),
        (ops.per_sample_grad_accumulate_squares.default, (inputs, output_grads, weights)),
        (ops.per_sample_grad_accumulate.default, (inputs, output_grads, weights, torch.tensor([0, 2, 2, 1]), 4)),
    ]


NAMES = ["dots", "sq_norms", "sq_norms with scale", "accumulate_squares", "accumulate"]


@pytest.mark.parametrize(("op", "args"), samples(), ids=NAMES)
def test_opcheck_and_gradcheck(op, args):
    torch.library.opcheck(op, args)
    assert torch.autograd.gradcheck(op, args)


@pytest.mark.parametrize(("op", "args"), samples(), ids=NAMES)
def test_16_bit_inputs_in_opcheck_and_backward(op, args):
    args = [x.detach().float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
    short = [x.bfloat16().requires_grad_() for x in args[:2]]
    torch.library.opcheck(op, (*short, *args[2:]))
    same = [x.detach().float().requires_grad_() for x in short]
    for leaves in (short, same):
        op(*leaves, *args[2:]).square().sum().backward()
    for got, want in zip(short, same, strict=True):
        assert got.grad.dtype == torch.bfloat16
        assert torch.allclose(got.grad.float(), want.grad, rtol=1e-2, atol=1e-6)


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
        (lambda: per_sample_grad.dots(A.int(), U.int(), V), TypeError, "must be floating with 16 to 64 bits, got Int"),
        (
            lambda: per_sample_grad.dots(A.half(), U.bfloat16(), V),
            TypeError,
            "output_grads must have the dtype of inputs",
        ),
        (
            lambda: per_sample_grad.dots(A.half(), U.half(), V.half()),
            TypeError,
            "directions must be Float where inputs are Half, got Half",
        ),
        (
            lambda: per_sample_grad.sq_norms(A, U, V[0].double()),
            TypeError,
            "scale must be Float where inputs are Float",
        ),
        (lambda: per_sample_grad.sq_norms(A, U, V), ValueError, r"scale must be \[o, d\], got shape \[2, 4, 5\]"),
        (lambda: per_sample_grad.sq_norms(A, U, V[0].T), ValueError, r"scale must be \[o=4, d=5\], got \[5, 4\]"),
        (lambda: per_sample_grad.sq_norms(A, U, -V[0].abs() - 1), ValueError, r"sq_norms: scale must be >= 0, got -"),
        (lambda: per_sample_grad.sq_norms(A, U, with_nan(V[0], 3)), ValueError, "scale must be finite, row 3"),
        (lambda: per_sample_grad.sq_norms(with_nan(A, 1), U, V[0].abs()), ValueError, "inputs must be finite, row 1"),
        (
            lambda: per_sample_grad.accumulate_squares(A, with_nan(U, 2)),
            ValueError,
            "accumulate_squares: output_grads must be finite, row 2",
        ),
        (lambda: per_sample_grad.accumulate_squares(A * 1e30, U), ValueError, "the result overflows Float"),
        (lambda: per_sample_grad.accumulate_squares(A, U, W[:2]), ValueError, "weights must have n=3 entries, got 2"),
        (
            lambda: per_sample_grad.accumulate_squares(A, U, W.double()),
            TypeError,
            "weights must be Float where inputs are Float, got Double",
        ),
        (lambda: per_sample_grad.accumulate_squares(A[:, :1], U), ValueError, r"must agree in \[n, t\]"),
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
