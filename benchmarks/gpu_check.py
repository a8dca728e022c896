"""Everything that only a machine with a GPU can show, in one command: build, tests, compute-sanitizer, benchmarks.

python benchmarks/gpu_check.py        (or `make gpu-check`)

Within BUDGET seconds in all. A stage that fails or runs out of time is recorded, leaves what it printed in LOGS, and
the next one starts. What was found goes to benchmarks/results/gpu-<device>-<date>.json, of which
`python -m benchmarks.figures.keep tables` makes the table of GPUs.
Exit status: 0 all stages passed, 1 some failed, 2 no GPU here.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 9 * 60.0
CUDA_HOME = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
TAIL = 3000  # characters of a failed stage's output that are kept beside the results
LOGS = ROOT / "runs" / "gpu-check"  # all of a failed stage's output


class Stages:
    """Runs commands one after another against one deadline, and remembers how each ended."""

    def __init__(self, budget: float) -> None:
        self.deadline = time.monotonic() + budget
        self.rows: list[dict[str, Any]] = []

    def run(self, name: str, command: list[str], limit: float, reserve: float = 0, **env: str) -> bool:
        """Runs `command` for at most `limit` seconds, and leaves `reserve` seconds of the budget to later stages."""
        limit = min(limit, self.deadline - time.monotonic() - reserve)
        if limit < 5:
            self.add(name, rc=None, seconds=0.0, passed=False, note="no time left")
            return False
        print(f"--- {name} (at most {limit:.0f} s)", flush=True)
        start = time.monotonic()
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path, **env},
                start_new_session=True,  # so that what it starts (ninja, nvcc) ends with it
            )
            try:
                rc, note = process.wait(limit), ""
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                rc, note = process.wait(), f"stopped after {limit:.0f} s"
            log.seek(0)
            output = log.read()
        summary = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed|skipped|error)", line)]
        note = note or (summary[-1].strip("= ") if summary else "")
        self.add(name, rc=rc, seconds=time.monotonic() - start, passed=rc == 0, note=note)
        if rc != 0:
            self.rows[-1]["output_tail"] = output[-TAIL:]
            LOGS.mkdir(parents=True, exist_ok=True)
            log_path = LOGS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.log"
            log_path.write_text(f"{' '.join(command)}\n{note}\n{output}", errors="replace")
            print(f"{output[-TAIL:]}\nall of it: {log_path.relative_to(ROOT)}", flush=True)
        return rc == 0

    def add(self, name: str, rc: int | None, seconds: float, passed: bool | None, note: str = "") -> None:
        """passed: None for a stage left out, with the reason as note."""
        self.rows.append({"name": name, "rc": rc, "seconds": round(seconds, 2), "passed": passed, "note": note})


def best_seconds(work, repeats: int = 10) -> float:
    work()
    best = float("inf")
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return best


def measure_limits() -> dict[str, float]:
    """What the device gives to plain torch: bytes per second of a copy (read and written), operations of products."""
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.empty(1 << 28, device="cuda")  # 1 GiB
    target = torch.empty_like(source)
    copy = best_seconds(lambda: target.copy_(source))
    size = 8192
    a = torch.randn(size, size, device="cuda")
    product = best_seconds(lambda: a @ a, repeats=5)
    torch.backends.cuda.matmul.allow_tf32 = True
    tf32 = best_seconds(lambda: a @ a, repeats=5)
    torch.backends.cuda.matmul.allow_tf32 = False
    return {
        "copy_bytes_per_second": 2 * source.nbytes / copy,
        "matmul_float32_flops_per_second": 2 * size**3 / product,
        "matmul_tf32_flops_per_second": 2 * size**3 / tf32,
    }


def large_farthest_first(copy_bytes_per_second: float) -> list[dict[str, Any]]:
    """A million points, 10,000 picks: the plain kernel and the lazy one, to the same bits, beside the time that reading
    the points once per pick takes at the bandwidth of a copy (the floor of the plain kernel, not of the lazy one)."""
    from fastif.ops import farthest_first

    n, d, k = 1_000_000, 512, 10_000
    g = torch.Generator("cuda").manual_seed(0)

    def gaussian() -> torch.Tensor:
        return torch.randn(n, d, device="cuda", generator=g)

    def features() -> torch.Tensor:  # of low rank, not negative, with some noise: as the layers of a network have them
        mixing = torch.randn(32, d, device="cuda", generator=g) / 32**0.5
        signal = torch.randn(n, 32, device="cuda", generator=g) @ mixing
        return signal.relu_() + 0.05 * torch.randn(n, d, device="cuda", generator=g)

    rows = []
    for make in (gaussian, features):
        points, found, seconds = make(), {}, {}
        for kernel, repeats in (("plain", 1), ("lazy", 3)):
            os.environ["FASTIF_KCENTER"] = kernel
            farthest_first(points, 100)
            torch.cuda.synchronize()
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                found[kernel] = farthest_first(points, k)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            seconds[kernel] = min(times)
        for field, plain, lazy in zip(found["plain"]._fields, found["plain"], found["lazy"], strict=True):
            assert torch.equal(plain, lazy), f"{make.__name__}: {field} of the lazy kernel is not that of the plain one"
        floor = k * points.nbytes / copy_bytes_per_second
        for kernel, time_taken in seconds.items():
            rows.append(
                {
                    "name": f"farthest_first 1M x 512 {make.__name__} {kernel}",
                    "n": n,
                    "d": d,
                    "k": k,
                    "seconds": {"fastif": time_taken},
                    "floor_seconds": floor,
                    "share_of_limit": floor / time_taken,
                }
            )
        del points, found
    return rows


def driver_version() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return (
            subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.split("\n")[0].strip()
        )
    except (OSError, subprocess.SubprocessError):
        return None


def sanitize(stages: Stages, tool: str, reserve: float) -> None:
    path = shutil.which("compute-sanitizer") or shutil.which(str(CUDA_HOME / "bin" / "compute-sanitizer"))
    if path is None:
        stages.add(tool, rc=None, seconds=0.0, passed=None, note="compute-sanitizer not found")
        return
    # Only our kernels are instrumented (all live in namespace fastif), unless this version knows no such option. Each
    # allocation stands alone, so that an access past its end is seen and not served from torch's cache.
    tests = [*PYTEST, "-x", "tests/ops/test_cuda.py", "-k", "small"]
    for ours_only in (["--kernel-regex", "kns=fastif"], []):
        command = [path, "--tool", tool, "--error-exitcode", "9", *ours_only, *tests]
        stages.run(tool, command, limit=110, reserve=reserve, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        row = stages.rows[-1]
        if row["passed"] or row["note"] or not ours_only:  # a note: pytest got to its summary, or time ran out
            return
        row.update(passed=None, note="no filter by kernel name: all kernels instead")


def against_kronfluence(stages: Stages, reserve: float) -> list[dict[str, Any]]:
    """EK-FAC from end to end on a tenth of the data, where the peer and the data were brought."""
    name = "EK-FAC against kronfluence"
    if importlib.util.find_spec("kronfluence") is None or "FASTIF_DATA" not in os.environ:
        stages.add(name, rc=None, seconds=0.0, passed=None, note="needs kronfluence, and FASTIF_DATA for the data sets")
        return []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "benchmarks.json"
        command = [*PYTEST, "-s", "benchmarks/influence/bench_influence.py", "-k", "test_influence"]
        command += ["--benchmark-enable", f"--benchmark-json={out}"]
        stages.run(name, command, limit=100, reserve=reserve, FASTIF_BENCH_SCALE="0.1")
        return figures(out)


def figures(path: Path) -> list[dict[str, Any]]:
    if not path.exists() or not path.read_text().strip():
        return []
    return [
        {"name": row["name"], "stats": {k: v for k, v in row["stats"].items() if k != "data"}, **row["extra_info"]}
        for row in json.loads(path.read_text())["benchmarks"]
    ]


def main() -> int:
    if not torch.cuda.is_available():
        print(f"gpu-check: no CUDA GPU that torch {torch.__version__} can use here; nothing was run")
        return 2
    date = datetime.datetime.now(datetime.timezone.utc)
    device = torch.cuda.get_device_name()
    stages = Stages(BUDGET)

    built = stages.run(
        "build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], limit=240, reserve=120, FASTIF_CUDA="1"
    ) and stages.run(
        "has CUDA kernels",
        [sys.executable, "-c", "from fastif.ops import _library; assert _library.compiled_for_cuda"],
        limit=60,
    )
    limits: dict[str, float] = {}
    start = time.monotonic()
    try:
        limits = measure_limits()
        torch.cuda.empty_cache()
        stages.add("limits", rc=0, seconds=time.monotonic() - start, passed=True)
    except RuntimeError as error:
        stages.add("limits", rc=1, seconds=time.monotonic() - start, passed=False, note=str(error)[:200])
    rows: list[dict[str, Any]] = []
    if built:
        # The emulator's tests show nothing new on a GPU; CPU = CUDA comes first, should time run short.
        stages.run("tests on CUDA", [*PYTEST, "tests/ops/test_cuda.py"], limit=120, reserve=150)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "benchmarks.json"
            ops = [*PYTEST, "-s", "benchmarks", "--ignore=benchmarks/influence/bench_influence.py"]
            command = [*ops, "--benchmark-enable", f"--benchmark-json={out}"]
            stages.run("benchmarks", command, limit=120, reserve=100)
            rows = figures(out)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            code = (
                "import json, pathlib, sys; from benchmarks.gpu_check import large_farthest_first; "
                "pathlib.Path(sys.argv[2]).write_text(json.dumps(large_farthest_first(float(sys.argv[1]))))"
            )
            bandwidth = limits.get("copy_bytes_per_second")
            command = [sys.executable, "-c", code, str(bandwidth), str(out)]
            if bandwidth and stages.run("farthest_first at scale", command, limit=90, reserve=100):
                rows += json.loads(out.read_text())
        rows += against_kronfluence(stages, reserve=130)
        for tool, reserve in (("memcheck", 90), ("racecheck", 60), ("synccheck", 40), ("initcheck", 20)):
            sanitize(stages, tool, reserve)
        rest = [*PYTEST, "tests", "--ignore=tests/emulator", "--deselect", "tests/ops/test_cuda.py"]
        stages.run("all other tests", rest, limit=BUDGET)

    result = {
        "device": device,
        "driver": driver_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": date.isoformat(timespec="seconds"),
        "limits": limits,
        "stages": stages.rows,
        "benchmarks": rows,
    }
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = ROOT / "benchmarks" / "results" / f"gpu-{slug}-{date:%Y-%m-%d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")

    print(f"\n{device}, torch {torch.__version__}, CUDA {torch.version.cuda} -> {path.relative_to(ROOT)}")
    for name, value in limits.items():
        print(f"  {name:40s} {value / 1e12:8.2f} T")
    for row in rows:
        ours = row.get("seconds", {}).get("fastif")
        shares = {"the limit": row.get("share_of_limit"), "the TF32 limit": row.get("share_of_tf32_limit")}
        if ours is not None:
            of_limits = "".join(f"  {share:.0%} of {limit}" for limit, share in shares.items() if share)
            print(f"  {row['name']:40s} {ours:8.4f} s{of_limits}")
        elif "ratio" in row:
            print(f"  {row['name']:40s} " + ", ".join(f"{value:.1f}x {of}" for of, value in row["ratio"].items()))
    for row in stages.rows:
        verdict = {True: "passed", False: "FAILED", None: "left out"}[row["passed"]]
        print(f"  {row['name']:20s} {verdict:8s} {row['seconds']:7.1f} s  {row['note']}")
    return 1 if any(row["passed"] is False for row in stages.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
