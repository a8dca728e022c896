"""Benchmarks verify first, then race: all contenders take turns in one run, because machines are noisy.

`pytest benchmarks --benchmark-enable -s` prints the tables; `--benchmark-json FILE` keeps them (in `extra_info`).
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable

import pytest
import torch

import fastif

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(work: Callable[[], object]) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@pytest.fixture(scope="session")
def limits() -> dict[str, float]:
    """What this machine can do, measured in the same run: bytes read and operations per second, in float32 and, on a
    GPU, in TF32."""
    big = torch.randn(1 << 26, device=DEVICE)  # 256 MiB, beyond every cache
    square = torch.randn(2048, 2048, device=DEVICE)
    read = min(seconds(lambda: big.sum()) for _ in range(5))
    product = min(seconds(lambda: square @ square) for _ in range(5))
    found = {"bytes_per_second": big.nbytes / read, "flops_per_second": 2 * 2048**3 / product}
    if DEVICE.type == "cuda":
        square = torch.randn(8192, 8192, device=DEVICE)  # a smaller one would not fill the tensor cores
        torch.backends.cuda.matmul.allow_tf32 = True
        product = min(seconds(lambda: square @ square) for _ in range(5))
        torch.backends.cuda.matmul.allow_tf32 = False
        found["tf32_flops_per_second"] = 2 * 8192**3 / product
    return found


@pytest.fixture
def race(benchmark, limits, capsys):
    """race(ours, peers, rounds=, bytes_read= or flops=): best time of each, ratios, share of the machine's limit.

    tf32_products: in so many TF32 products a GPU does each float32 one; the share of that limit is reported too.
    """

    def run(
        ours: Callable[[], object],
        peers: dict[str, Callable[[], object]],
        rounds: int = 3,
        bytes_read: float = 0,
        flops: float = 0,
        tf32_products: int = 0,
        scale: dict[str, float] | None = None,
        **extra: object,
    ) -> None:
        contenders = {"fastif": ours, **peers}
        best = dict.fromkeys(contenders, float("inf"))
        cpu = dict.fromkeys(contenders, float("inf"))  # of all threads: what a busy machine disturbs less
        for _ in range(rounds):
            for name, work in contenders.items():
                before = time.process_time()
                best[name] = min(best[name], seconds(work))
                cpu[name] = min(cpu[name], time.process_time() - before)
        for name, factor in (scale or {}).items():  # peers that were given a known part of the work
            best[name] *= factor
            cpu[name] *= factor
        floor = bytes_read / limits["bytes_per_second"] + flops / limits["flops_per_second"]
        if tf32_products and "tf32_flops_per_second" in limits:
            tf32_floor = tf32_products * flops / limits["tf32_flops_per_second"]
            extra["share_of_tf32_limit"] = tf32_floor / best["fastif"]
        benchmark.pedantic(ours, rounds=1)
        benchmark.extra_info.update(
            device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or "cpu",
            seconds=best,
            cpu_seconds=cpu,
            ratio={name: best[name] / best["fastif"] for name in peers},
            share_of_limit=floor / best["fastif"],
            **limits,
            **extra,
        )
        with capsys.disabled():
            share = floor / best["fastif"]
            of_limit = f", {share:.0%} of the machine's limit" if share else ""
            print(f"\n{benchmark.name}: fastif {best['fastif']:.4g} s{of_limit}")
            for name in peers:
                wall, processor = best[name] / best["fastif"], cpu[name] / cpu["fastif"]
                print(f"  {wall:8.2f} x, {processor:.2f} x processor time  {name} ({best[name]:.4g} s)")
            for name, value in extra.items():
                print(f"  {name}: {value}")

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)  # the name of one machine says nothing to others
    machine_info.update(
        torch=torch.__version__,
        fastif=fastif.__version__,
        build=fastif.build_info(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
    )
