"""Run time and peak memory of a piece of work (RTE and ME of docs/math.md (5)), and where they were measured."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastif.ops._library import build_info, extension


class Measure:
    """Context manager: `seconds`, and `peak_bytes` of tensors allocated within it on `device` beyond those before it.

    On the CPU the allocations of the thread that enters it are counted by the compiled extension, until it ends, in
    whichever thread; without the extension, and where another library has put an allocator of its own above torch's,
    peak_bytes is None.

    >>> with Measure() as work:
    ...     x = torch.empty(1000, dtype=torch.float32)
    >>> work.peak_bytes in (4000, None)
    True
    """

    seconds: float = 0.0
    peak_bytes: int | None = None

    def __init__(self, device: torch.device | str = "cpu"):
        self._device = torch.device(device)
        self._cpu = extension.PeakMemory() if extension is not None and self._device.type == "cpu" else None

    def __enter__(self) -> Measure:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        if self._cpu is not None:
            self._cpu.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        self.seconds = time.perf_counter() - self._start
        if self._cpu is not None:
            self.peak_bytes = self._cpu.stop()


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken on `device`, None where nothing tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as lines:  # what can be had without swapping, caches given up
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pages = {"SC_AVPHYS_PAGES", "SC_PAGE_SIZE"} <= set(getattr(os, "sysconf_names", ()))
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if pages else None


def environment(device: torch.device) -> dict[str, Any]:
    """Where and with what a figure was measured."""
    build = build_info()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": {
            "fastif": build["fastif"],
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "build": build,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
