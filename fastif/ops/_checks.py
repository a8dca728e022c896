"""The contracts of csrc/<op>/<op>.h for the plain torch formulations: the same rules, the same words.

What the dispatcher would refuse in words of its own, before any kernel sees it, the public functions check here first.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastif.ops._library import run

_NAMES = {
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.float32: "Float",
    torch.float64: "Double",
    torch.int8: "Char",
    torch.int32: "Int",
    torch.int64: "Long",
    torch.bool: "Bool",
}


def dtype_name(dtype: torch.dtype) -> str:
    return _NAMES.get(dtype, str(dtype))


def tensor(op: str, name: str, x: Any) -> None:
    """Refuses what no kernel is for: no tensor at all, or one whose entries do not lie at strides."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.is_nested or x.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {'nested' if x.is_nested else x.layout}")
    if x.is_quantized:
        raise TypeError(f"{op}: {name} must be a dense tensor, got quantized {dtype_name(x.dtype)}")


def integer(op: str, name: str, x: Any) -> int:
    """x as an int, from whatever stands for one: True does not."""
    if isinstance(x, int | torch.SymInt) and not isinstance(x, bool):
        return x  # pyright: ignore[reportReturnType]
    try:
        if not isinstance(x, bool) and not (isinstance(x, Tensor) and x.dtype == torch.bool):
            return operator.index(x)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor on meta
        pass
    raise TypeError(f"{op}: {name} must be an integer, got {_got(x)}")


def real(op: str, name: str, x: Any) -> float:
    """x as a float, from whatever stands for one: True does not."""
    if isinstance(x, float | torch.SymFloat):
        return x  # pyright: ignore[reportReturnType]
    number = isinstance(x, int | numbers.Real) and not isinstance(x, bool)
    try:
        if number or (isinstance(x, Tensor) and (x.is_floating_point() or x.dtype == torch.int64)):
            return float(x)
    except OverflowError:
        raise ValueError(f"{op}: {name} must be a float64 number, got {x}") from None
    except (TypeError, ValueError, RuntimeError):  # a tensor of several entries, or on meta
        pass
    raise TypeError(f"{op}: {name} must be a number, got {_got(x)}")


def _got(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"a tensor of shape {list(x.shape)}, {dtype_name(x.dtype)}, on {x.device}"
    return f"{type(x).__name__} {x!r}" if isinstance(x, bool | float | str) else type(x).__name__


def call(op: str, axes: str, shape: Sequence[int], dtype: torch.dtype, kernel: Callable[..., Any], *args: Any) -> Any:
    """kernel(*args), which makes a result of this shape; memory that cannot be had is a MemoryError with the bytes."""
    if torch.compiler.is_compiling():
        return kernel(*args)
    size = math.prod(shape) * dtype.itemsize
    reason = None
    if size < 2**63:
        try:
            return run(kernel, *args)
        except (MemoryError, RuntimeError) as error:
            words = "can't allocate memory", "std::bad_alloc"  # of torch, and of what else C++ allocates
            if not (isinstance(error, MemoryError) or any(said in str(error) for said in words)):
                raise
            reason = error
    raise MemoryError(
        f"{op}: memory for the result {axes} = {list(shape)}, {size} bytes, and for what is formed on the way to it "
        "cannot be had"
    ) from reason


def derivable(op: str, **tensors: Tensor) -> None:
    """Refuses what autograd would drop without a word, or only after the op has run."""
    if torch.compiler.is_compiling():
        return
    saved = torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values())
    for name, x in tensors.items():
        require(
            not (saved and x.is_inference()),
            f"{op}: {name} must not be an inference tensor where another input requires grad",
        )
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{op}: {name} has a forward-mode tangent; the op has derivatives in reverse mode"
            )


def rank(op: str, name: str, axes: str, x: Tensor, dims: int) -> None:
    tensor(op, name, x)
    if x.dim() != dims:
        raise ValueError(f"{op}: {name} must be {axes}, got shape {list(x.shape)}")


def dtype(op: str, name: str, x: Tensor, *allowed: torch.dtype) -> None:
    if x.dtype not in allowed:
        *most, last = [str(one).removeprefix("torch.") for one in allowed]
        rule = f"{', '.join(most)} or {last}" if most else last
        raise TypeError(f"{op}: {name} must be {rule}, got {dtype_name(x.dtype)}")


def floating(op: str, name: str, x: Tensor) -> None:
    dtype(op, name, x, torch.float32, torch.float64)


def device(op: str, name: str, x: Tensor, as_name: str, like: Tensor, *, or_cpu: bool = False) -> None:
    if x.device != like.device and not (or_cpu and x.device.type == "cpu"):
        rule = "on the CPU or on the device" if or_cpu else "on the device"
        raise ValueError(f"{op}: {name} must be {rule} of {as_name} ({like.device}), got {x.device}")


def same_type(op: str, name: str, x: Tensor, as_name: str, like: Tensor) -> None:
    if x.dtype != like.dtype:
        raise TypeError(
            f"{op}: {name} must have the dtype of {as_name} ({dtype_name(like.dtype)}), got {dtype_name(x.dtype)}"
        )
    device(op, name, x, as_name, like)


def require(rule: bool, message: str) -> None:
    if not rule:
        raise ValueError(message)


def require_of_sizes(rule: bool | torch.SymBool, message: str) -> None:
    """The same for sizes, which a trace may not know yet.

    torch's own check comes with sympy: a second of imports at the first call, which Ctrl-C breaks for good.
    """
    if isinstance(rule, bool):
        require(rule, message)
    else:
        torch._check_value(rule, lambda: message)


def _bytes(x: Tensor) -> int:
    """From the first entry to past the last."""
    if x.numel() == 0:
        return 0
    steps = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (steps + 1) * x.element_size()


def memory(op: str, name: str, x: Tensor) -> None:
    """check_memory of csrc/common/checks.h; for tensors that have memory: not in fakes."""
    needed, held = x.storage_offset() * x.element_size() + _bytes(x), x.untyped_storage().nbytes()
    require(
        x.numel() == 0 or held >= needed,
        f"{op}: {name} must hold its entries, {needed} bytes of storage, got {held}",
    )


def out(op: str, x: Tensor, *, fake: bool, **inputs: Tensor) -> None:
    """check_out of csrc/common/checks.h: what is written to lies apart from what is read, and is what is stored.

    A fake has no addresses: two of them share memory where they share a storage.
    """
    if not fake:
        memory(op, "out", x)
    require(not x.requires_grad, f"{op}: out must not require grad (the op is not differentiable)")
    require(
        not (x.is_neg() or x.is_conj()),
        f"{op}: out must not be a {'conjugate' if x.is_conj() else 'negative'} view, "
        "whose entries are not what its memory holds",
    )
    require(
        fake or not x.is_inference() or torch.is_inference_mode_enabled(),
        f"{op}: out must not be an inference tensor outside inference mode",
    )
    for name, read in inputs.items():
        if fake and x.untyped_storage()._cdata != read.untyped_storage()._cdata:
            continue
        begins = [one.storage_offset() * one.element_size() if fake else one.data_ptr() for one in (x, read)]
        shared = min(begins[0] + _bytes(x), begins[1] + _bytes(read)) - max(begins)
        require(
            shared <= 0, f"{op}: out must not share memory with {name}, got {shared} bytes between the ends of both"
        )


_BLOCK = 2**22  # entries of the rows that are looked at together


def first_nonfinite_row(x: Tensor) -> int | None:
    """The first row of x [n, ...] that holds NaN or Inf, or None; row sums find it without a copy or mask of x."""
    axes = tuple(range(1, x.dim()))
    sums = []
    for rows in x.split(max(1, _BLOCK // max(1, math.prod(x.shape[1:])))):
        rows = rows.float() if x.element_size() < 4 else rows  # 16 bits overflow soon
        sums.append(rows.sum(axes) if axes else rows)  # a sum over no axes would be one over all
    for row in (~torch.cat(sums).isfinite()).nonzero().flatten().tolist():
        if not bool(x[row].isfinite().all()):  # finite entries may overflow the sum
            return row
    return None


def finite_rows(op: str, name: str, x: Tensor) -> None:
    row = first_nonfinite_row(x)
    require(row is None, f"{op}: {name} must be finite, row {row} holds NaN or Inf")
