"""Counts floating-point operations of whatever runs, those of this library's ops included, and what they would take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.conftest import DEVICE


def _forming(inputs: Any, output_grads: Any, *_: Any, **__: Any) -> int:
    """Σ_t u_t a_tᵀ of every example, for inputs [n, d] or [n, t, d]."""
    (n, *positions, d), o = inputs, output_grads[-1]
    return 2 * n * d * o * (positions[0] if positions else 1)


def _dots(inputs: Any, output_grads: Any, directions: Any, **_: Any) -> int:
    formed = _forming(inputs, output_grads) if len(inputs) == 3 else 0
    return formed + 2 * inputs[0] * directions[0] * output_grads[-1] * inputs[-1]


_OURS = {
    torch.ops.fastif.per_sample_grad_accumulate: _forming,
    torch.ops.fastif.per_sample_grad_accumulate_squares: _forming,
    torch.ops.fastif.per_sample_grad_sq_norms: _forming,
    torch.ops.fastif.per_sample_grad_dots: _dots,
}


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """`get_total_flops()`: of the matrix products and convolutions that ran inside; no eigenvectors, nothing else."""
    with FlopCounterMode(display=False, custom_mapping=_OURS) as counter:
        yield counter


def seconds_of(work: Callable[[], object]) -> float:
    """Of the processor, all threads together; of a GPU those on the clock."""
    clock = time.process_time if DEVICE.type == "cpu" else time.perf_counter
    start = clock()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def products_per_second() -> float:
    """Operations of a large float32 matrix product in a second, as `seconds_of` counts them."""
    square = torch.randn(2048, 2048, device=DEVICE)
    return 2 * 2048**3 / min(seconds_of(lambda: square @ square) for _ in range(5))
