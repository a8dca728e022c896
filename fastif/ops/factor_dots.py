"""Products of queries with gradients that are stored as outer products of int8 vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastif.ops import _checks as check
from fastif.ops._library import plain

_OP = "factor_dots"
_ENTRIES = 1 << 18  # of vectors and their products at a time, in plain torch


def factor_dots(
    left: Tensor,
    right: Tensor,
    ranks: Tensor,
    queries: Tensor,
    scale: Tensor | None = None,
    along: Tensor | None = None,
) -> Tensor:
    """⟨Q_q, g_i⟩ for the gradients g_i = Σ_f scale_f left_f right_fᵀ, which are neither formed nor unpacked: [q, n].

    On the CPU what is given of a query is rounded to 16 bits: an entry errs by at most 1/65,000 of the largest in its
    row or, for some shapes, in its column, which the shapes alone decide, or by 2⁻¹²⁷ where that is more (entries below
    it become 0); on the GPU it is taken as it is. Sums over 512 entries of a vector are then exact (on the GPU,
    float32), sums of these float32. The CPU's bits depend neither on the number of threads nor on the processor. Not
    differentiable. docs/math.md (26).

    Args:
        left: int8 [F, o], of each factor; those of an example stand together, in the order of the examples.
        right: int8 [F, d].
        ranks: int32 [n], how many factors each example has.
        queries: float32 [q, o, d], finite.
        scale: float32 [F]; default 1 each.
        along: float32 [q, r, d], finite: queries are then [q, o, r], and Q_q = queries_q along_q is not formed on the
            CPU, where a factor takes r (o + d) products instead of o d.

    Raises:
        ValueError: shapes that do not fit, ranks that do not sum to F, NaN or Inf (with the row's index), a result, or
            a product on the way to it, that overflows.
        TypeError: other dtypes, or no tensors.
        MemoryError: a result that cannot be held.

    >>> left, right = torch.tensor([[1], [2], [3]]), torch.tensor([[1, 0], [0, 1], [1, 1]])
    >>> ranks, query = torch.tensor([2, 0, 1]), torch.tensor([[[1.0, 0.5]]])
    >>> factor_dots(left.to(torch.int8), right.to(torch.int8), ranks.int(), query).round(decimals=2).tolist()
    [[2.0, 0.0, 4.5]]
    """
    check.rank(_OP, "left", "[F, o]", left, 2)
    check.rank(_OP, "ranks", "[n]", ranks, 1)
    check.rank(_OP, "queries", "[q, o, d]" if along is None else "[q, o, r]", queries, 3)
    check.tensor(_OP, "right", right)
    for name, x in (("scale", scale), ("along", along)):
        if x is not None:
            check.tensor(_OP, name, x)
    scale, along = (None if x is None else x.detach() for x in (scale, along))
    given = left, right, scale, ranks, queries.detach(), along
    shape = len(queries), len(ranks)
    return check.call(_OP, "[q, n]", shape, torch.float32, torch.ops.fastif.factor_dots, *given)


@torch.library.register_fake("fastif::factor_dots")
def _fake(left, right, scale, ranks, queries, along=None):
    _check_shapes(left, right, scale, ranks, queries, along)
    return queries.new_empty((queries.shape[0], ranks.shape[0]))


def _check_shapes(left, right, scale, ranks, queries, along):
    """The shapes, types and devices of check_factor_dots in csrc/factor_dots/factor_dots.h."""
    check.rank(_OP, "left", "[F, o]", left, 2)
    check.rank(_OP, "right", "[F, d]", right, 2)
    check.rank(_OP, "ranks", "[n]", ranks, 1)
    check.rank(_OP, "queries", "[q, o, d]" if along is None else "[q, o, r]", queries, 3)
    check.dtype(_OP, "left", left, torch.int8)
    check.same_type(_OP, "right", right, "left", left)
    check.dtype(_OP, "ranks", ranks, torch.int32)
    check.dtype(_OP, "queries", queries, torch.float32)
    check.device(_OP, "ranks", ranks, "left", left)
    check.device(_OP, "queries", queries, "left", left)
    (f, o), d = left.shape, right.shape[1]
    check.require_of_sizes(
        o > 0 and d > 0,
        f"{_OP}: vectors must not be empty, got left {list(left.shape)} and right {list(right.shape)}",
    )
    check.require(right.shape[0] == f, f"{_OP}: right must have F={f} rows, got {right.shape[0]}")
    got = f"got {list(queries.shape)}"
    if along is None:
        check.require(queries.shape[1:] == (o, d), f"{_OP}: queries must be [q, o={o}, d={d}], {got}")
    else:
        check.rank(_OP, "along", "[q, r, d]", along, 3)
        check.same_type(_OP, "along", along, "queries", queries)
        q, _, r = queries.shape
        check.require_of_sizes(queries.shape[1] == o and r > 0, f"{_OP}: queries must be [q, o={o}, r > 0], {got}")
        check.require(along.shape == (q, r, d), f"{_OP}: along must be [q={q}, r={r}, d={d}], got {list(along.shape)}")
    if scale is not None:
        check.rank(_OP, "scale", "[F]", scale, 1)
        check.dtype(_OP, "scale", scale, torch.float32)
        check.device(_OP, "scale", scale, "left", left)
        check.require(scale.shape[0] == f, f"{_OP}: scale must have F={f} entries, got {scale.shape[0]}")


@plain("factor_dots")
def _plain(left, right, scale, ranks, queries, along=None):
    _check_shapes(left, right, scale, ranks, queries, along)
    given = {"left": left, "right": right, "ranks": ranks, "queries": queries, "along": along, "scale": scale}
    for name, x in given.items():
        if x is not None:
            check.memory(_OP, name, x)
    for name, x in (("along", along), ("scale", scale), ("queries", queries)):
        if x is not None and len(x):
            check.finite_rows(_OP, name, x)
    least = ranks.min().item() if len(ranks) else 0
    check.require(least >= 0, f"{_OP}: ranks must be >= 0, got {least}")
    check.require(int(ranks.sum()) == len(left), f"{_OP}: ranks must sum to F={len(left)}, got {int(ranks.sum())}")
    queries = queries if along is None else queries @ along
    out = queries.new_zeros((len(queries), len(ranks)))
    owners = torch.arange(len(ranks), device=left.device).repeat_interleave(ranks.long())
    each = max(1, _ENTRIES // max(left.shape[1], right.shape[1]))
    for begin in range(0, len(left), each):
        rows = slice(begin, begin + each)
        one, other = left[rows].float(), right[rows].float()
        if scale is not None:
            one *= scale[rows, None]
        for query, row in zip(queries, out, strict=True):
            products = (other @ query.T * one if len(query) <= query.shape[1] else one @ query * other).sum(1)
            row.index_add_(0, owners[rows], products)
    check.require(bool(out.isfinite().all()), f"{_OP}: the result overflows Float; scale the queries")
    return out
