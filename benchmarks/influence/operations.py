"""Counts floating-point operations of whatever runs, those of this library's ops included, and what they would take."""

from __future__ import annotations

import math
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
    """Of every entry of a gradient: to form it and multiply it with q directions, or its t positions with each."""
    (n, *positions, d), o, q = inputs, output_grads[-1], directions[0]
    t = positions[0] if positions else 1
    return 2 * n * o * d * min(t + q, t * q)


def _adding(_: Any, left: Any, right: Any, **__: Any) -> int:
    """A matrix product that is added to what stands there."""
    return 2 * math.prod(left) * right[-1]


def _attention(query: Any, key: Any, *_: Any, **__: Any) -> int:
    """QKᵀ and what it makes of V; a causal mask is not looked at."""
    return 4 * math.prod(query) * key[-2]


def _attention_backward(_: Any, query: Any, key: Any, *__: Any, **___: Any) -> int:
    """QKᵀ again, and the gradients of V, QKᵀ, Q and K."""
    return 10 * math.prod(query) * key[-2]


_MORE = {  # than torch counts
    torch.ops.aten.addmm_: _adding,
    torch.ops.aten.baddbmm_: _adding,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.fastif.per_sample_grad_accumulate: _forming,
    torch.ops.fastif.per_sample_grad_accumulate_squares: _forming,
    torch.ops.fastif.per_sample_grad_sq_norms: _forming,
    torch.ops.fastif.per_sample_grad_dots: _dots,
}


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """`get_total_flops()`: of the matrix products and convolutions that ran inside; no eigenvectors, nothing else."""
    with FlopCounterMode(display=False, custom_mapping=_MORE) as counter:
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
