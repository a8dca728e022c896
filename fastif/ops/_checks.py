"""The contracts of csrc/<op>/<op>.h for the plain torch formulations: the same rules, the same words."""

from __future__ import annotations

import torch
from torch import Tensor

_NAMES = {
    torch.float32: "Float",
    torch.float64: "Double",
    torch.int32: "Int",
    torch.int64: "Long",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
}


def dtype_name(dtype: torch.dtype) -> str:
    return _NAMES.get(dtype, str(dtype))


def rank(op: str, name: str, axes: str, x: Tensor, dims: int) -> None:
    if x.dim() != dims:
        raise ValueError(f"{op}: {name} must be {axes}, got shape {list(x.shape)}")


def floating(op: str, name: str, x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: {name} must be float32 or float64, got {dtype_name(x.dtype)}")


def same_type(op: str, name: str, x: Tensor, as_name: str, like: Tensor) -> None:
    if x.dtype != like.dtype:
        raise TypeError(
            f"{op}: {name} must have the dtype of {as_name} ({dtype_name(like.dtype)}), got {dtype_name(x.dtype)}"
        )
    if x.device != like.device:
        raise ValueError(f"{op}: {name} must be on the device of {as_name} ({like.device}), got {x.device}")


def require(rule: bool, message: str) -> None:
    if not rule:
        raise ValueError(message)


def first_nonfinite_row(x: Tensor) -> int | None:
    """The first row of x [n, m] that holds NaN or Inf, or None; row sums find it without a mask of x's size."""
    for row in (~x.sum(1, dtype=torch.float64).isfinite()).nonzero().flatten().tolist():
        if not bool(x[row].isfinite().all()):  # finite entries may overflow the sum
            return row
    return None


def finite_rows(op: str, name: str, x: Tensor) -> None:
    row = first_nonfinite_row(x.reshape(x.shape[0], -1))
    require(row is None, f"{op}: {name} must be finite, row {row} holds NaN or Inf")
