"""Every op, called with arguments that something is the matter with: its result is right, or it says what is wrong.

A spoiler makes of a good argument another one, and tells what that means: the entries that the op must go by, or WRONG,
which no call may accept.
"""

import os
import random
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from fastif.measure import Measure
from fastif.ops import _checks, factor_dots, farthest_first, ggn_block, kronecker_block
from fastif.ops import per_sample_grad as psg
from tests import reference

WRONG = object()


class Subclass(Tensor):
    pass


def negative_view(x: Tensor) -> Tensor:
    """x, in memory that holds -x, at every second place where x is the imaginary part of something."""
    if not x.is_floating_point() or x.element_size() < 4:
        return torch._neg_view(-x)
    z = torch.zeros(x.shape, dtype=torch.complex64 if x.dtype == torch.float32 else torch.complex128)
    z.imag.copy_(-x)
    return z.conj().imag


def strided(x: Tensor) -> Tensor:
    return x.new_zeros((*x.shape, 3)).index_copy_(-1, torch.tensor([1]), x[..., None])[..., 1]


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def quantized(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8)


def nested(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([x, x])


def with_entry(value: float):
    def spoil(x: Tensor) -> Tensor:
        x = x.clone()
        x.view(-1)[0] = value
        return x

    return spoil


def floats(x: Tensor) -> bool:
    return x.is_floating_point()


def signed(x: Tensor) -> bool:
    return x.dtype != torch.bool


def any_tensor(x: Tensor) -> bool:
    return True


# Other ways to say the same: right, or refused.
SAME = {
    "strided": (any_tensor, strided),
    "columns first": (any_tensor, lambda x: x.mT.contiguous().mT if x.dim() > 1 else x),
    "with an offset": (any_tensor, lambda x: torch.cat([x, x])[len(x) :]),
    "negative view": (signed, negative_view),
    "contiguous negative view": (signed, lambda x: torch._neg_view(-x)),
    "parameter": (floats, torch.nn.Parameter),
    "requires grad": (floats, lambda x: x.clone().requires_grad_()),
    "subclass": (any_tensor, lambda x: x.as_subclass(Subclass)),
    "inference": (any_tensor, inference),
}
# Other arguments: the op must go by their entries, or refuse them.
OTHER = {
    "expanded": (any_tensor, expanded),
    "float16": (floats, Tensor.half),
    "bfloat16": (floats, Tensor.bfloat16),
    "float64": (floats, Tensor.double),
    "a third of the rows": (any_tensor, lambda x: x[::3]),
    "large": (floats, with_entry(1e30)),
    "largest": (floats, with_entry(3e38)),
    "negative": (signed, torch.neg),
}
NEVER = {
    "meta": (any_tensor, lambda x: x.to("meta")),
    "sparse": (any_tensor, lambda x: x.to_sparse()),
    "complex": (floats, lambda x: x.to(torch.complex64)),
    "conjugate": (floats, lambda x: x.to(torch.complex64).conj()),
    "int32": (any_tensor, lambda x: x.int()),
    "quantized": (any_tensor, quantized),
    "nested": (any_tensor, nested),
    "no rows": (any_tensor, lambda x: x[:0]),
    "no axes": (any_tensor, lambda x: x.sum()),
    "too many axes": (any_tensor, lambda x: x[None, None]),
    "NaN": (floats, with_entry(torch.nan)),
    "Inf": (floats, with_entry(-torch.inf)),
    "freed": (any_tensor, freed),
    "list": (any_tensor, lambda x: x.tolist()),
    "array": (any_tensor, lambda x: x.numpy()),
    "a word": (any_tensor, lambda x: "all"),
    "a number": (any_tensor, lambda x: 1.5),
    "true": (any_tensor, lambda x: True),
}
TENSORS = (
    [(name, applies, spoil, lambda x, _: x) for name, (applies, spoil) in SAME.items()]
    + [(name, applies, spoil, lambda _, spoiled: spoiled.detach().clone()) for name, (applies, spoil) in OTHER.items()]
    + [(name, applies, spoil, lambda *_: WRONG) for name, (applies, spoil) in NEVER.items()]
)
INTEGERS = [(x, WRONG) for x in (True, 2.0, "2", None, [2], -1, 0, 2**70, 2**62, torch.tensor(True), torch.ones(2))]
INTEGERS += [(np.int64(3), 3), (torch.tensor(3), 3), (torch.tensor(3, device="meta"), WRONG), (torch.nan, WRONG)]
RADII = [(x, WRONG) for x in (True, "1", [1.0], -1, -0.5, torch.nan, 10**400, torch.ones(2), torch.tensor(True))]
RADII += [(1, 1.0), (np.float32(0.5), 0.5), (torch.tensor(0.5), 0.5), (torch.inf, torch.inf), (None, None)]

N, D, C = 6, 4, 3


def problems() -> dict:
    """Of each op: how to call it, and its good arguments."""
    g = torch.Generator().manual_seed(0)
    features, probs, weights = (torch.randn(N, D, generator=g), torch.rand(N, C, generator=g), torch.ones(N) / 4)
    probs = (4 * probs).softmax(1)
    half = torch.randn(N, C, C, generator=g)
    maps = dict(inputs=torch.randn(N, 2, D, generator=g), output_grads=torch.randn(N, 2, C, generator=g))
    clouds = dict(
        points=torch.randn(2, N, D, generator=g),
        k=3,
        start=torch.tensor([[1], [4]]),
        picks=torch.tensor([3, 2]),
        mask=torch.arange(N).expand(2, N) < 5,
        until_radius=1e-3,
    )
    factors = dict(
        left=torch.randint(-127, 128, (N, C), generator=g).to(torch.int8),
        right=torch.randint(-127, 128, (N, D), generator=g).to(torch.int8),
        ranks=torch.tensor([2, 0, 1, 3]).int(),
        queries=torch.randn(2, C, 2, generator=g),
        scale=torch.rand(N, generator=g),
        along=torch.randn(2, 2, D, generator=g),
    )
    return {
        "factor_dots": (factor_dots, factors),
        "ggn_block": (ggn_block, dict(features=features, probs=probs, weights=weights, out=torch.zeros(C, D, C, D))),
        "kronecker_block": (kronecker_block, dict(features=features, outer=half + half.mT, out=torch.ones(C, D, C, D))),
        "per_sample_grad.accumulate": (
            psg.accumulate,
            maps | dict(weights=weights, groups=torch.arange(N) % 2, num_groups=2),
        ),
        "per_sample_grad.accumulate_squares": (psg.accumulate_squares, maps | dict(weights=weights)),
        "per_sample_grad.sq_norms": (psg.sq_norms, maps | dict(scale=torch.rand(C, D, generator=g))),
        "per_sample_grad.dots": (psg.dots, maps | dict(directions=torch.randn(2, C, D, generator=g))),
        "farthest_first": (farthest_first, clouds),
    }


PROBLEMS = problems()
GOOD = {"ranks": ["int32"]}  # by argument, what is no spoiler of it
OPTIONAL = {"along", "weights", "groups", "scale", "picks", "mask", "out", "until_radius"}


def by_definition(op: str, given: dict) -> list[tuple[Tensor, Tensor]]:
    """What the op must return, and how large the terms are that it sums, in float64."""
    if op == "farthest_first":
        return [(x, x) for x in _farthest_first(**given)]
    if op == "factor_dots":
        return [_factor_dots(**given)]
    name = op.rpartition(".")[2]
    out = given.pop("out", None)
    maps = name not in ("ggn_block", "kronecker_block")
    first = given["inputs" if maps else "features"]
    n = len(first)
    if maps and first.dim() == 2:
        given |= dict(inputs=first[:, None], output_grads=given["output_grads"][:, None])
    if "weights" in given and given["weights"] is None:
        given["weights"] = torch.full((n,), 1.0 if maps else 1 / n, dtype=torch.float64)
    if "groups" in given and given["groups"] is None:
        given["groups"] = torch.zeros(n, dtype=torch.int64)
    given = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in given.items()}
    if name == "kronecker_block":  # whose lower triangle is read
        given["outer"] = given["outer"].tril() + given["outer"].tril(-1).mT
    definition = getattr(reference, name)
    sizes = {name: x.abs() if isinstance(x, Tensor) else x for name, x in given.items()}
    want, size = definition(**given), definition(**sizes).abs()
    return [(want, size)] if out is None else [(want + out, size + out.abs())]


def _factor_dots(left, right, ranks, queries, scale, along):
    """What is given of queries is rounded by a share of the largest in its row or column."""
    want = reference.factor_dots(left, right, ranks, queries, scale, along)
    sizes, others = (_largest_beside(x) if x is not None and x.numel() else x for x in (queries, along))
    scale = None if scale is None else scale.abs()
    return want, 3 * reference.factor_dots(left.double().abs(), right.double().abs(), ranks, sizes, scale, others)


def _largest_beside(x):
    """In the place of each entry of x [q, a, b], the largest in its row or column."""
    return torch.maximum(x.abs().amax(1, keepdim=True), x.abs().amax(2, keepdim=True)).expand(x.shape)


def _farthest_first(points, k, start, picks, mask, until_radius):
    results = []
    for j, cloud in enumerate(points):
        count = k if picks is None else int(picks[j])
        indices, sq_radii, *per_point = reference.farthest_first(
            cloud, count, start[j].tolist(), None if mask is None else mask[j], until_radius
        )
        indices = torch.nn.functional.pad(indices, (0, k - count), value=-1)
        results.append((indices, sq_radii[torch.arange(k).clamp(max=count - 1)], *per_point))
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


def spoilers(name: str, good) -> dict[str, Callable]:
    """Of one argument: by what is done to it, what makes of it the one to give, and what that means."""

    def of_tensor(spoil, meaning):
        spoiled = spoil(good.clone())  # ops write to some
        return spoiled, meaning(good, spoiled)

    if isinstance(good, Tensor):
        found = {label: partial(of_tensor, *how) for label, applies, *how in TENSORS if applies(good)}
        for label in GOOD.get(name, ()):
            del found[label]
    else:
        values = RADII if isinstance(good, float) else INTEGERS
        found = {f"{x} of {type(x).__name__}": partial(tuple, pair) for pair in values for x in pair[:1]}
    return found | {"None": lambda: (None, None if name in OPTIONAL else WRONG)}


def assert_right_or_refused(op: str, spoiled: dict[str, tuple[object, object]], dtype: torch.dtype) -> None:
    """Calls the op with these spoilers: right by its definition, or refused in its own name with nothing written."""
    function, good = PROBLEMS[op]
    good = {name: in_type(op, x, dtype) for name, x in good.items()}
    if "out" in good:
        good["out"] = good["out"].clone()
    given = good | {name: value for name, (value, _) in spoiled.items()}
    means = good | {name: meaning for name, (_, meaning) in spoiled.items()}
    means = {name: x.clone() if isinstance(x, Tensor) else x for name, x in means.items()}
    got, refusal = None, None
    try:
        got = function(**given)
    except (ValueError, TypeError, MemoryError) as error:
        refusal = str(error)
    if refusal is not None:
        assert refusal.startswith(f"{op}: ")
        assert spoiled, refusal
        if "out" in good and "out" not in spoiled:
            assert torch.equal(good["out"], means["out"])  # nothing was written
        return
    got = [got] if isinstance(got, Tensor) else got
    if all(x.is_meta for x in got):  # the shape that a result would have
        assert all(x.is_meta for x in given.values() if isinstance(x, Tensor))
        return
    assert all(x is not WRONG for x in means.values()), f"accepted, {got}"
    for mine, (want, size) in zip(got, by_definition(op, means), strict=True):
        type_of_result, mine = mine.dtype, mine.detach().as_subclass(Tensor).double()
        assert mine.isfinite().all()
        assert mine.shape == want.shape
        rounding = 1e-5 if type_of_result == torch.float32 else 1e-13
        assert ((mine - want).abs() <= rounding * size.abs() + 1e-30).all()


def in_type(op: str, x, dtype: torch.dtype):
    dtype = torch.float32 if op == "factor_dots" else dtype  # which knows no other
    return x.to(dtype) if isinstance(x, Tensor) and floats(x) else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("op", PROBLEMS)
def test_each_spoiler_alone(op, dtype):
    assert_right_or_refused(op, {}, dtype)
    for name, good in PROBLEMS[op][1].items():
        for make in spoilers(name, in_type(op, good, dtype)).values():
            assert_right_or_refused(op, {name: make()}, dtype)


def test_several_spoilers_at_once():
    """FASTIF_FUZZ calls, each with none to three of its arguments spoiled."""
    made = {
        (op, dtype, name): [*spoilers(name, in_type(op, good, dtype)).items()]
        for op, (_, goods) in PROBLEMS.items()
        for dtype in (torch.float32, torch.float64)
        for name, good in goods.items()
    }
    for seed in range(int(os.environ.get("FASTIF_FUZZ", 10_000))):
        r = random.Random(seed)
        op, dtype = r.choice([*PROBLEMS]), r.choice([torch.float32, torch.float64])
        chosen = {
            name: r.choice(made[op, dtype, name]) for name in r.sample([*PROBLEMS[op][1]], r.choice([0, 1, 2, 2, 3]))
        }
        try:
            assert_right_or_refused(op, {name: make() for name, (_, make) in chosen.items()}, dtype)
        except BaseException as error:
            labels = {name: label for name, (label, _) in chosen.items()}
            raise AssertionError(f"call {seed}: {op}, {dtype}, {labels}") from error


# Sizes that cannot be held.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ggn_block(x, x[:, :1] + 1), rf"ggn_block: memory for the result \[c, d, c, d\] = .* {2**48} bytes"),
        (lambda x: kronecker_block(x, torch.ones(1, 2, 2)), f"kronecker_block: .* {2**50} bytes"),
        (
            lambda x: psg.accumulate(x[:, :2], x[:, :2], num_groups=2**61),
            f"per_sample_grad.accumulate: .* {2**65} bytes",
        ),
        (
            lambda x: psg.accumulate(x[:, :2], x[:, :2], num_groups=2**70),
            f"per_sample_grad.accumulate: .* {2**74} bytes",
        ),
        (lambda x: psg.accumulate_squares(x, x), rf"accumulate_squares: .* \[o, d\] = .* {2**48} bytes"),
        (lambda x: psg.dots(x.mT, x.mT, x.mT[:, :, None]), rf"dots: .* \[q, n\] = .* {2**48} bytes"),
        (lambda x: farthest_first(x[:, :1].expand(2**46, 4), 1), f"farthest_first: .* {2**49} bytes"),  # a copy of x
    ],
)
def test_results_that_cannot_be_held(call, message):
    x = torch.zeros(1, 1).expand(1, 2**23)  # 2^48 bytes are beyond what processors address
    with pytest.raises(MemoryError, match=message):
        call(x)


# Derivatives.


def test_forward_mode_is_refused_where_it_would_be_dropped():
    inputs, output_grads = torch.randn(3, 4), torch.randn(3, 2)
    with pytest.raises(NotImplementedError, match="sq_norms: output_grads has a forward-mode tangent"):
        torch.func.jvp(lambda u: psg.sq_norms(inputs, u), (output_grads,), (output_grads,))


def test_inference_tensors_beside_what_requires_grad_are_refused():
    output_grads = torch.randn(3, 2, requires_grad=True)
    for inputs in (torch.randn(3, 4), inference(torch.randn(3, 4))):
        with torch.no_grad():
            assert psg.sq_norms(inputs, output_grads).shape == (3,)
    with pytest.raises(ValueError, match="sq_norms: inputs must not be an inference tensor where another"):
        psg.sq_norms(inputs, output_grads)


# Checks cost next to nothing.


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_search_for_a_row_that_is_not_finite_makes_no_copy(dtype):
    x = torch.ones(40_000, 400, dtype=dtype)
    x[:7] = torch.finfo(dtype).max  # finite, and its sum is not
    with Measure(exact=True) as work:
        assert _checks.first_nonfinite_row(x) is None
    assert work.peak_bytes is None or work.peak_bytes < 20 << 20
    for row in (39_999, 5):
        x[row, 7] = torch.nan
        assert _checks.first_nonfinite_row(x) == row
