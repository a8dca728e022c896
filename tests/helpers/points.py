"""Points that make a farthest-first traversal hard, and the check of what it gives to the last bit."""

from functools import partial

import torch

from fastif.ops import FarthestFirst, build_info, farthest_first
from fastif.ops._library import run
from tests import reference

op = partial(run, torch.ops.fastif.farthest_first)
COMPILED = build_info()["compiled"]


def problem(n: int, d: int, kind: str, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Points that make the traversal hard: ties, duplicates, offsets beside which the spread is tiny, heavy tails."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    return {
        "normal": x,
        "ties": x.sign(),
        "duplicates": x[torch.randint(0, max(1, n // 3), (n,), generator=g)],
        "zeros": torch.zeros(n, d, dtype=torch.float64),
        "offset": x + 1e3,
        "heavy": x / torch.rand(n, 1, generator=g, dtype=torch.float64).clamp(1e-6),
        "far": x + 1e6,
        "integers": (2 * x).round(),
        "equal": x[:1].expand(n, d),
        "nearly": x[torch.randint(0, max(1, n // 3), (n,), generator=g)] * (1 + 1e-7 * x),
        "sphere": torch.nn.functional.normalize(x, dim=1),
        "tails": x * 10 ** (12 * torch.rand(n, 1, generator=g, dtype=torch.float64) - 6),
        "tiny": x * (1e-42 if dtype == torch.float32 else 1e-160),
        "huge": x * (1e37 if dtype == torch.float32 else 1e139),
        "extremes": x
        * 10 ** ((70 if dtype == torch.float32 else 300) * (torch.rand(n, 1, generator=g, dtype=torch.float64) - 0.55)),
        "beyond": x * (1e37 if dtype == torch.float32 else 1e148),
    }[kind].to(dtype)


KINDS = ("normal", "ties", "duplicates", "zeros", "offset", "heavy")


# Near the limits of the lazy kernel's certificate: bounds within rounding of the distance, underflow, overflow.
HARD = ("far", "integers", "equal", "nearly", "sphere", "tails", "tiny", "huge", "extremes", "beyond")


def check_same_bits(points: torch.Tensor, k: int, start: int) -> None:
    got, want = farthest_first(points, k, start), reference.farthest_first(points, k, start)
    check_equal(got, want)


def check_equal(got, want) -> None:
    for name, mine, theirs in zip(FarthestFirst._fields, got, want, strict=True):
        assert mine.dtype == theirs.dtype, name
        assert torch.equal(mine, theirs), name
