"""The contracts of csrc/<op>/<op>.h for the plain torch formulations: the same rules, the same words."""

from __future__ import annotations

import torch
from torch import Tensor

_NAMES = {
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.float32: "Float",
    torch.float64: "Double",
    torch.int32: "Int",
    torch.int64: "Long",
    torch.bool: "Bool",
}


def _name(dtype: torch.dtype) -> str:
    return _NAMES.get(dtype, str(dtype))


def rank(op: str, name: str, axes: str, x: Tensor, dims: int) -> None:
    if x.dim() != dims:
        raise ValueError(f"{op}: {name} must be {axes}, got shape {list(x.shape)}")


def dtype(op: str, name: str, x: Tensor, *allowed: torch.dtype) -> None:
    if x.dtype not in allowed:
        *most, last = [str(one).removeprefix("torch.") for one in allowed]
        rule = f"{', '.join(most)} or {last}" if most else last
        raise TypeError(f"{op}: {name} must be {rule}, got {_name(x.dtype)}")


def floating(op: str, name: str, x: Tensor) -> None:
    dtype(op, name, x, torch.float32, torch.float64)


def device(op: str, name: str, x: Tensor, as_name: str, like: Tensor, *, or_cpu: bool = False) -> None:
    if x.device != like.device and not (or_cpu and x.device.type == "cpu"):
        rule = "on the CPU or on the device" if or_cpu else "on the device"
        raise ValueError(f"{op}: {name} must be {rule} of {as_name} ({like.device}), got {x.device}")


def same_type(op: str, name: str, x: Tensor, as_name: str, like: Tensor) -> None:
    if x.dtype != like.dtype:
        raise TypeError(f"{op}: {name} must have the dtype of {as_name} ({_name(like.dtype)}), got {_name(x.dtype)}")
    device(op, name, x, as_name, like)


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
