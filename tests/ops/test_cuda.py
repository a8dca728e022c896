"""On a GPU: every op gives on CUDA what it gives on the CPU; farthest_first to the last bit.

The tests whose names hold `small` are those that benchmarks/gpu_check.py runs under compute-sanitizer.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from fastif.ops import _library, factor_dots, farthest_first
from tests import reference
from tests.ops import test_factor_dots

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# Errors of their kinds: csrc/common/errors.h.
ops = SimpleNamespace(**{name: partial(_library.run, getattr(torch.ops.fastif, name)) for name in _library.SCHEMAS})
DTYPES = (torch.float32, torch.float64)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, tolerance: float = 1e-5) -> None:
    """Largest error relative to the largest magnitude: what a sum of many terms can promise."""
    assert got.dtype == dtype
    error = (got.cpu().double() - want.cpu().double()).abs().max().item()
    size = max(want.abs().max().item(), 1e-300)
    assert error <= (tolerance if dtype == torch.float32 else 1e-12) * size, (error, size)


def points(kind: str, n: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(n, d, generator=generator(n + d), dtype=torch.float64)
    if kind == "ties":
        x = x.round()
    elif kind == "zeros":
        x.zero_()
    elif kind == "duplicates":
        x = x[torch.arange(n) // 2]
    elif kind == "offset":
        x += 1e4
    elif kind == "huge":
        x *= 1e37
    elif kind == "tiny":
        x *= 1e-30
    return x.to(dtype)


KERNELS = ("plain", "lazy")


@pytest.fixture
def kernel(request, monkeypatch):
    monkeypatch.setenv("FASTIF_KCENTER", request.param)


both_kernels = pytest.mark.parametrize("kernel", KERNELS, indirect=True)


def assert_same_farthest_first(
    x: torch.Tensor, k: int, start: int | torch.Tensor, **options: torch.Tensor | float
) -> None:
    on_gpu = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    got, want = farthest_first(x.cuda(), k, start, **on_gpu), farthest_first(x, k, start, **options)
    for name, mine, theirs in zip(got._fields, got, want, strict=True):
        assert (mine.is_cuda, mine.dtype) == (True, theirs.dtype), name
        assert torch.equal(mine.cpu(), theirs), name


@both_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "duplicates", "offset", "huge", "tiny"])
@pytest.mark.parametrize(("n", "d", "k", "start"), [(1, 1, 1, 0), (7, 3, 7, 6), (100, 33, 100, 5), (333, 130, 40, 332)])
def test_small_farthest_first(n, d, k, start, kind, dtype, kernel):
    assert_same_farthest_first(points(kind, n, d, dtype), k, start)


def ragged(b: int, n: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """b clouds of different sizes, with NaN where the mask lets nothing in; rows 0 and 2 are always points."""
    x = torch.stack([points("ties" if j % 3 == 1 else "normal", n, d, dtype) * (j + 1) for j in range(b)])
    mask = torch.rand(b, n, generator=generator(b)) < torch.linspace(0.2, 1, b)[:, None]
    mask[:, [0, 2]] = True
    x[~mask] = torch.nan
    return x, mask


@both_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *DTYPES])
def test_small_farthest_first_of_given_picks_masks_and_radii(dtype, kernel):
    x = points("duplicates", 300, 70, dtype)
    given = torch.tensor([4, 5, 250, 0, 17])
    assert_same_farthest_first(x, 40, given)
    assert_same_farthest_first(x, 5, given)
    radius = farthest_first(x, 30).sq_radii[20].sqrt().item()
    assert_same_farthest_first(x, 300, 7, until_radius=radius)
    assert_same_farthest_first(x, 300, given, until_radius=0.0)
    clouds, mask = ragged(5, 60, 9, dtype)
    picks = torch.tensor([2, 3, 1, 30, 60]).minimum(mask.sum(1))
    assert_same_farthest_first(clouds, 60, 0, picks=picks, mask=mask)
    starts = torch.tensor([[2, 0]] * 5)
    assert_same_farthest_first(clouds, 60, starts, picks=picks.clamp(min=2), mask=mask, until_radius=2.0)


@both_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d", "k"),
    [
        (70_001, 10, 300),
        (20_011, 129, 200),
        (5_003, 512, 500),
        (100_003, 64, 1500),
        (3_001, 4_096, 300),
        (301, 5_888, 30),
        (301, 5_889, 30),
        (301, 20_000, 60),
    ],
)
def test_large_farthest_first(n, d, k, dtype, kernel):
    assert_same_farthest_first(points("normal", n, d, dtype), k, n // 2)


@both_kernels
@pytest.mark.parametrize("kind", ["ties", "zeros", "duplicates"])
@pytest.mark.parametrize("d", [2, 32])
def test_large_farthest_first_with_ties_across_blocks(kind, d, kernel):
    assert_same_farthest_first(points(kind, 60_000, d, torch.float32), 400, 59_999)


def test_large_farthest_first_of_features():
    """As the penultimate layer of a network has them: of low rank, not negative. By the kernel that is chosen."""
    g = generator(3)
    x = (torch.randn(60_000, 24, generator=g) @ torch.randn(24, 256, generator=g)).relu()
    assert_same_farthest_first(x + 0.05 * torch.randn(x.shape, generator=g), 2000, 0)


def test_large_farthest_first_of_many_clouds():
    x, mask = ragged(300, 200, 16, torch.float32)
    assert_same_farthest_first(x, 20, 0, picks=mask.sum(1).clamp(max=20), mask=mask)


@both_kernels
def test_farthest_first_polls_on_the_way_and_can_be_stopped(kernel):
    """In several launches: the same result; what the callback raises ends the run."""
    x = points("normal", 60_000, 512, torch.float32).cuda()
    k = 5000
    seen: list[int] = []

    def remember(done: int, total: int) -> None:
        assert total == k
        seen.append(done)

    try:
        _library._report_to(remember)
        picks = farthest_first(x, k).indices
        _library._report_to(lambda done, total: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            farthest_first(x, k)
    finally:
        _library._report_to(None)
    assert seen == sorted(seen)
    assert torch.equal(picks[:300].cpu(), farthest_first(x.cpu(), 300).indices)


def test_farthest_first_knows_its_kernels(monkeypatch):
    monkeypatch.setenv("FASTIF_KCENTER", "fast")
    with pytest.raises(ValueError, match="FASTIF_KCENTER must be plain or lazy on CUDA, got fast"):
        farthest_first(torch.ones(3, 2, device="cuda"), 1)
    monkeypatch.setenv("FASTIF_KCENTER", "lazy:int8+axes")  # the CPU's
    assert farthest_first(torch.ones(3, 2, device="cuda"), 1).indices.tolist() == [0]


def test_farthest_first_reads_past_two_to_the_31_entries():
    n, d = 1_100_003, 2_000
    if torch.cuda.mem_get_info()[0] < 14 * n * d:
        pytest.skip("needs 31 GB of free GPU memory")
    x = torch.zeros(n, d, device="cuda")
    x[-1, -1] = 3
    result = farthest_first(x, 2)
    assert result.indices.tolist() == [0, n - 1]
    assert result.sq_radii.tolist() == [9, 0]
    assert result.nearest[-1] == 1


def classification(n: int, d: int, c: int, dtype: torch.dtype, sharpness: float = 1):
    g = generator(n + d + c)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) + 0.5
    p = (sharpness * torch.randn(n, c, generator=g, dtype=torch.float64)).softmax(1)
    w = torch.rand(n, generator=g, dtype=torch.float64) / n
    w[::3] = 0
    return x.to(dtype), p.to(dtype), w.to(dtype)


def assert_same_ggn_block(n: int, d: int, c: int, dtype: torch.dtype, sharpness: float = 1) -> None:
    x, p, w = classification(n, d, c, dtype, sharpness)
    gpu = [tensor.cuda() for tensor in (x, p, w)]
    out = torch.zeros(c, d, c, d, dtype=dtype, device="cuda")
    ops.ggn_block_(out, *gpu)
    want = torch.zeros(c, d, c, d, dtype=dtype)
    ops.ggn_block_(want, x, p, w)
    assert_close(out, want, dtype)
    if n * c * c * d * d <= 1e9:
        assert_close(out, reference.ggn_block(x, p, w), dtype)
    assert torch.equal(out, out.permute(2, 3, 0, 1))
    before = torch.randn(c, d, c, d, generator=generator(1), dtype=dtype) * out.abs().max().item()
    added = before.cuda()
    ops.ggn_block_(added, *gpu)
    assert_close(added, before.double() + out.cpu().double(), dtype)
    again = torch.zeros_like(out)
    ops.ggn_block_(again, *gpu)
    assert torch.equal(again, out)  # the same bits from run to run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d", "c"), [(1, 1, 1), (1, 1, 2), (5, 3, 3), (37, 65, 2), (600, 33, 4), (1500, 20, 10), (40, 130, 5)]
)
def test_small_ggn_block(n, d, c, dtype):
    assert_same_ggn_block(n, d, c, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d", "c", "sharpness"),
    [(50_000, 193, 10, 1), (50_000, 130, 2, 1), (3_000, 64, 100, 3), (400, 8, 700, 1), (2_000, 97, 6, 40)],
)
def test_large_ggn_block(n, d, c, sharpness, dtype):
    assert_same_ggn_block(n, d, c, dtype, sharpness)


def assert_same_kronecker_block(n: int, d: int, c: int, dtype: torch.dtype) -> None:
    x, p, w = classification(n, d, c, dtype)
    outer = (p * w[:, None])[:, :, None] * p[:, None, :]
    outer[:, ::2, 1::2] *= -1
    outer[:, 1::2, ::2] *= -1
    gpu = [tensor.cuda() for tensor in (x, outer)]
    out = torch.zeros(c, d, c, d, dtype=dtype, device="cuda")
    ops.kronecker_block_(out, *gpu)
    want = torch.zeros(c, d, c, d, dtype=dtype)
    ops.kronecker_block_(want, x, outer)
    assert_close(out, want, dtype)
    if n * c * c * d * d <= 1e9:
        assert_close(out, reference.kronecker_block(x, outer), dtype)
    assert torch.equal(out, out.permute(2, 3, 0, 1))
    before = torch.randn(c, d, c, d, generator=generator(1), dtype=dtype) * out.abs().max().item()
    added = before.cuda()
    ops.kronecker_block_(added, *gpu)
    assert_close(added, before.double() + out.cpu().double(), dtype)
    again = torch.zeros_like(out)
    ops.kronecker_block_(again, gpu[0], gpu[1].tril())
    assert torch.equal(again, out)  # the same bits from run to run, of the lower triangle


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d", "c"), [(1, 1, 1), (1, 1, 2), (5, 3, 3), (37, 65, 2), (600, 33, 4), (1500, 20, 10), (40, 130, 5)]
)
def test_small_kronecker_block(n, d, c, dtype):
    assert_same_kronecker_block(n, d, c, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "c"), [(50_000, 193, 10), (50_000, 130, 1), (3_000, 64, 50), (600, 3_000, 1)])
def test_large_kronecker_block(n, d, c, dtype):
    assert_same_kronecker_block(n, d, c, dtype)


@pytest.mark.parametrize("cores", ["tensor", "cuda"])
@pytest.mark.parametrize(("n", "d", "c"), [(1, 7, 2), (9, 129, 3), (513, 64, 2), (1100, 130, 2)])
def test_small_blocks_of_badly_scaled_features(n, d, c, cores, monkeypatch):
    """Every entry to 1e-6 of the sum of its terms' magnitudes; products of TF32 numbers alone are off by up to 1e-3."""
    monkeypatch.setenv("FASTIF_GGN", cores)
    g = generator(n)
    scales = [10 ** (6 * torch.rand(shape, generator=g) - 3) for shape in ((n, 1), (d,))]
    x = torch.randn(n, d, generator=g) * scales[0] * scales[1]
    p, w = (3 * torch.randn(n, c, generator=g)).softmax(1), torch.rand(n, generator=g) / n
    outer = torch.randn(n, c, c, generator=g)
    outer = outer.tril() + outer.tril(-1).mT
    ggn, given = (torch.zeros(c, d, c, d, device="cuda") for _ in range(2))
    ops.ggn_block_(ggn, x.cuda(), p.cuda(), w.cuda())
    ops.kronecker_block_(given, x.cuda(), outer.cuda())
    sizes = reference.ggn_block(x.abs(), p, w).abs(), reference.kronecker_block(x.abs(), outer.abs())
    wants = reference.ggn_block(x, p, w), reference.kronecker_block(x, outer)
    for got, want, size in zip((ggn, given), wants, sizes, strict=True):
        assert ((got.cpu().double() - want).abs() <= 1e-6 * size).all()


LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    ("x", "y", "h"),
    [
        (LARGEST, 1, 0.5 / LARGEST),
        (1.5, -1.25, 1e38),
        (0.999, 0.25, LARGEST),
        (3.3e-36, 1.7, 1),
        (3.3e-39, 1.7, 1e3),
        (1.234567e-20, 7.654321e-20, 0.9),
    ],
)
def test_small_kronecker_block_at_the_ends_of_the_range(x, y, h):
    """As csrc/common/tensor_tile.cuh promises."""
    features, outer = torch.tensor([[x, y]]), torch.tensor([[[h]]])
    out = torch.zeros(1, 2, 1, 2, device="cuda")
    ops.kronecker_block_(out, features.cuda(), outer.cuda())
    want = reference.kronecker_block(features, outer)
    weighted = (outer * features).double().abs().view(1, 2, 1, 1)
    lost = 2**-126 * (weighted + features.double().abs().view(1, 1, 1, 2))
    assert ((out.cpu().double() - want).abs() <= 2e-6 * want.abs() + lost + 2**-148).all()


def test_ggn_block_knows_its_cores(monkeypatch):
    monkeypatch.setenv("FASTIF_GGN", "tf32")
    with pytest.raises(ValueError, match="kronecker_block: FASTIF_GGN must be tensor or cuda, got tf32"):
        ops.kronecker_block_(*(torch.ones(shape, device="cuda") for shape in ((1, 1, 1, 1), (1, 1), (1, 1, 1))))


def test_ggn_block_where_the_pairs_do_not_fit_the_scratch():
    n, d, c = 2_000, 130, 96  # 4,560 pairs of 128 x 128 tiles: the diagonal is computed on its own, in several batches
    x, p, w = (tensor.cuda() for tensor in classification(n, d, c, torch.float32))
    out = torch.zeros(c, d, c, d, device="cuda")
    ops.ggn_block_(out, x, p, w)
    rows_of_h = out.double().sum(2)  # the rows of every H sum to zero
    assert rows_of_h.abs().max() <= 1e-5 * out.abs().max()
    for a, b in ((0, 0), (3, 70), (95, 95), (95, 0)):
        h = w.double() * p[:, a].double() * ((p.double().sum(1) - p[:, a]) if a == b else -p[:, b].double())
        assert_close(out[a, :, b], (x.double() * h[:, None]).T @ x.double(), torch.float32)


def linear_map(n: int, t: int, d: int, o: int, dtype: torch.dtype):
    g = generator(n + t + d + o)
    inputs = torch.randn(n, t, d, generator=g, dtype=torch.float64) + 0.3
    output_grads = torch.randn(n, t, o, generator=g, dtype=torch.float64)
    return inputs.to(dtype), output_grads.to(dtype)


SMALL_MAPS = [(1, 1, 1, 1), (9, 1, 33, 5), (7, 3, 20, 70), (3, 37, 130, 6), (2, 130, 5, 3), (4, 9, 70, 130)]
LARGE_MAPS = [(5_000, 1, 512, 10), (3_000, 1, 130, 200), (300, 64, 144, 32), (60, 300, 27, 16), (40, 200, 256, 256)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SMALL_MAPS)
def test_small_per_sample_grad(shape, dtype):
    assert_same_per_sample_grad(*shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LARGE_MAPS)
def test_large_per_sample_grad(shape, dtype):
    assert_same_per_sample_grad(*shape, dtype)


def assert_same_per_sample_grad(n: int, t: int, d: int, o: int, dtype: torch.dtype) -> None:
    inputs, output_grads = linear_map(n, t, d, o, dtype)
    g = generator(n)
    a, u = inputs.cuda(), output_grads.cuda()
    weights = torch.randn(n, generator=g, dtype=torch.float64).to(dtype)
    for num_groups in (1, 2, 7):
        groups = torch.randint(num_groups, (n,), generator=g) // 2 * 2  # odd groups are empty
        arguments = (weights, groups, num_groups)
        got = ops.per_sample_grad_accumulate(a, u, weights.cuda(), groups.cuda(), num_groups)
        assert_close(got, ops.per_sample_grad_accumulate(inputs, output_grads, *arguments), dtype)
        assert torch.equal(got, ops.per_sample_grad_accumulate(a, u, weights.cuda(), groups.cuda(), num_groups))
        assert not got[1::2].any()
    weights = weights.abs()  # so that nothing cancels
    squares = ops.per_sample_grad_accumulate_squares(a, u, weights.cuda())
    assert_close(squares, ops.per_sample_grad_accumulate_squares(inputs, output_grads, weights), dtype)
    assert torch.equal(squares, ops.per_sample_grad_accumulate_squares(a, u, weights.cuda()))
    for scale in (None, torch.rand(o, d, generator=g, dtype=torch.float64).to(dtype)):
        on_gpu = None if scale is None else scale.cuda()
        norms = ops.per_sample_grad_sq_norms(a, u, on_gpu)
        assert_close(norms, ops.per_sample_grad_sq_norms(inputs, output_grads, scale), dtype)
        assert torch.equal(norms, ops.per_sample_grad_sq_norms(a, u, on_gpu))
    for q in (3, 40):  # by position; where positions are several, by gradient
        directions = torch.randn(q, o, d, generator=g, dtype=torch.float64).to(dtype)
        products = ops.per_sample_grad_dots(a, u, directions.cuda())
        assert_close(products, ops.per_sample_grad_dots(inputs, output_grads, directions), dtype)
        assert torch.equal(products, ops.per_sample_grad_dots(a, u, directions.cuda()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SMALL_MAPS, *LARGE_MAPS[:2]])
def test_16_bit_inputs_give_what_their_values_in_32_bits_give(shape, dtype):
    n, t, d, o = shape
    a, u = (x.to(dtype).cuda() for x in linear_map(n, t, d, o, torch.float32))
    g = generator(n)
    weights, scale = torch.rand(n, generator=g).cuda(), torch.rand(o, d, generator=g).cuda()
    groups, directions = torch.arange(n).cuda() % 3, torch.randn(40, o, d, generator=g).cuda()
    for call in (
        lambda a, u: ops.per_sample_grad_accumulate(a, u, weights, groups, 3),
        lambda a, u: ops.per_sample_grad_accumulate_squares(a, u, weights),
        ops.per_sample_grad_sq_norms,
        lambda a, u: ops.per_sample_grad_sq_norms(a, u, scale),
        lambda a, u: ops.per_sample_grad_dots(a, u, directions),
    ):
        assert_close(call(a, u), call(a.float(), u.float()), torch.float32)


@pytest.mark.parametrize(
    ("n", "most", "o", "d", "q"),
    [(1, 1, 1, 1, 1), (5, 0, 3, 2, 2), (0, 1, 3, 2, 1), (4, 2, 3, 2, 0), (40, 4, 7, 33, 2), (300, 3, 130, 257, 3)],
)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("r", [0, 5])
def test_small_factor_dots(n, most, o, d, q, scaled, r):
    given = test_factor_dots.problem(n, most, o, d, q, extremes=o == 7)
    if r:
        given |= test_factor_dots.two_parts(q, o, d, r)
    if not scaled:
        del given["scale"]
    gpu = {name: x.cuda() for name, x in given.items()}
    got, want = factor_dots(**gpu), reference.factor_dots(**given)
    assert got.is_cuda
    assert ((got.cpu().double() - want).abs() <= test_factor_dots.error_bound(**given) + 1e-37).all()
    assert torch.equal(factor_dots(**gpu), got)


def test_strides_do_not_matter():
    x = points("normal", 90, 44, torch.float32)[::2, ::3]
    assert_same_farthest_first(x, 12, 3)
    inputs, output_grads = (z.transpose(0, 1) for z in linear_map(4, 6, 10, 5, torch.float32))
    want = reference.sq_norms(inputs, output_grads)
    assert_close(ops.per_sample_grad_sq_norms(inputs.cuda(), output_grads.cuda()), want, torch.float32)


def test_runs_on_the_current_stream():
    x = points("normal", 2_000, 40, torch.float32)
    want = farthest_first(x, 50).indices
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        later = x.cuda(non_blocking=True)
        torch.cuda._sleep(20_000_000)
        later = later * 2
        got = farthest_first(later, 50).indices
    stream.synchronize()
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: farthest_first(torch.ones(3, 2, device="cuda"), 4), ValueError, r"k must be in \[1, n=3\]"),
        (
            lambda: farthest_first(torch.full((3, 2), torch.nan, device="cuda"), 1),
            ValueError,
            "row 0 holds NaN or Inf",
        ),
        (
            lambda: ops.ggn_block_(
                torch.zeros(1, 2, 1, 2), *(torch.ones(s, device="cuda") for s in ((3, 2), (3, 1), (3,)))
            ),
            ValueError,
            "out must be on the device of features",
        ),
        (
            lambda: ops.per_sample_grad_sq_norms(
                torch.ones(2, 1, 3, device="cuda"), torch.ones(2, 1, 3, device="cuda", dtype=torch.float64)
            ),
            TypeError,
            "output_grads must have the dtype of inputs",
        ),
    ],
    ids=["k", "nan", "device", "dtype"],
)
def test_the_contract_is_checked(call, error, message):
    with pytest.raises(error, match=message):
        call()
