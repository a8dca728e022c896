"""Run time and peak memory of a piece of work (RTE and ME of docs/math.md (5)), and where they were measured."""

from __future__ import annotations

import importlib
import os
import platform
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastif.ops._library import build_info, read_built_for


def _load_counter() -> Any:
    """PeakMemory of fastif._memory, where that was built and for this torch; else None."""
    try:
        built_for = read_built_for("fastif._memory", "torch")
        if built_for is None or built_for.split(".")[:2] != torch.__version__.split(".")[:2]:
            return None
        return importlib.import_module("fastif._memory").PeakMemory
    except (ImportError, OSError):
        return None


PeakMemory = _load_counter()
# How the memory of CPU tensors is measured: counted allocation by allocation, or by what the process holds.
MEMORY_BY = "allocations" if PeakMemory is not None else "resident set"


class Measure:
    """Context manager: `seconds`, and `peak_bytes` of tensors allocated within it on `device` beyond those before it.

    On the CPU the allocations of the thread that enters it are counted by fastif._memory, until it ends, in whichever
    thread. Where that was not built for this torch, peak_bytes is how far the resident set of the process rose, which
    misses what it had in reserve and has what other threads take (`MEMORY_BY` says which); with exact=True it is None
    then, and so it is where another library has put an allocator of its own above torch's.

    >>> with Measure() as work:
    ...     x = torch.empty(1000, dtype=torch.float32)
    >>> work.peak_bytes == 4000 or MEMORY_BY == "resident set"
    True
    """

    seconds: float = 0.0
    peak_bytes: int | None = None

    def __init__(self, device: torch.device | str = "cpu", exact: bool = False):
        self._device = torch.device(device)
        self._cpu = None
        if self._device.type == "cpu":
            self._cpu = PeakMemory() if PeakMemory is not None else None if exact else _ResidentSet()

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


class _ResidentSet:
    """How far the resident set of the process rises, from Linux's high-water mark; None where nothing tells."""

    _lock = threading.Lock()
    _active: list[_ResidentSet] = []  # noqa: RUF012 (of the class: the mark is the process's)

    def start(self) -> None:
        with self._lock:
            for other in self._active:  # the mark is about to fall under what they have seen
                other._peak = max(other._peak, _status("VmHWM"))
            self._before = self._peak = _status("VmRSS")
            try:
                Path("/proc/self/clear_refs").write_text("5")
                self._told = self._before > 0
            except OSError:
                self._told = False
            self._active.append(self)

    def stop(self) -> int | None:
        with self._lock:
            self._active.remove(self)
            return max(self._peak, _status("VmHWM")) - self._before if self._told else None


def _status(name: str) -> int:
    """A line of /proc/self/status in bytes; 0 where there is none."""
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    except (OSError, StopIteration):
        return 0


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


def in_mib(size: int | None, digits: int = 1) -> str:
    """Bytes for people to read; "unknown" where nothing counted them."""
    return "unknown" if size is None else f"{size / 2**20:.{digits}f} MiB"


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
        "memory_by": MEMORY_BY,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
