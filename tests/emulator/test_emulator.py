"""The CUDA kernels, run on the CPU against their definitions: plainly, and under two sanitizers.

`cuda_emu.h` says what the emulator checks. Each driver runs its kernels in several thread orders.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
GXX = shutil.which("g++")
FLAGS = ["-std=c++20", "-O1", "-g", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += ["-DFASTIF_EMULATOR", f"-I{HERE}", f"-I{CSRC}", "-pthread"]
FAULT = 3  # the emulator's exit status when it finds misuse
SANITIZER = 66

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(GXX is None, reason="g++ not found: the emulator needs a C++20 compiler"),
]


def build(source: str, target: Path, *flags: str) -> Path:
    done = subprocess.run(
        [GXX, *FLAGS, *flags, str(HERE / source), "-o", str(target)], capture_output=True, text=True, timeout=300
    )
    if done.returncode != 0 and any(word in done.stderr for word in ("cannot find -l", "libtsan", "libasan")):
        pytest.skip(f"g++ lacks the runtime for {flags}")
    assert done.returncode == 0, done.stderr[-3000:]
    return target


def run(program: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and output. Old ThreadSanitizers need addresses that are not random: tried again so."""
    options = f"exitcode={SANITIZER}:halt_on_error=1"
    env = {**os.environ, "TSAN_OPTIONS": options, "ASAN_OPTIONS": options + ":detect_leaks=0"}
    command = [str(program), *arguments]
    for prefix in ([], ["setarch", "-R"]):
        if prefix and shutil.which(prefix[0]) is None:
            break
        done = subprocess.run(prefix + command, capture_output=True, text=True, timeout=300, env=env)
        output = done.stdout + done.stderr
        if "unexpected memory mapping" not in output:
            return done.returncode, output
    pytest.skip("ThreadSanitizer cannot run here: unexpected memory mapping")


SANITIZERS = {"plain": [], "thread": ["-fsanitize=thread"], "address": ["-fsanitize=address"]}


@pytest.mark.parametrize("how", SANITIZERS)
@pytest.mark.parametrize(
    "op", ["factor_dots", "farthest_first", "farthest_first_lazy", "ggn_block", "per_sample_grad", "tensor_tile"]
)
def test_kernels(op, how, tmp_path):
    status, output = run(build(f"{op}_emu.cpp", tmp_path / op, *SANITIZERS[how]))
    assert status == 0, output[-4000:]
    assert " 0 failures" in output


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """The program of planted faults, built once for each way of running it."""
    folder, built = tmp_path_factory.mktemp("faults"), {}

    def program(how):
        if how not in built:
            built[how] = build("faults_emu.cpp", folder / how, *SANITIZERS[how])
        return built[how]

    return program


@pytest.mark.parametrize(
    ("fault", "number", "how", "status", "message"),
    [
        ("none", 0, "plain", 0, " 0 failures"),
        ("none", 0, "thread", 0, " 0 failures"),
        ("none", 0, "address", 0, " 0 failures"),
        ("no barrier", 1, "plain", 1, "not reversed"),
        ("no barrier", 1, "thread", SANITIZER, "data race"),
        ("two barriers for one", 2, "plain", FAULT, "divergent barrier"),
        ("shared memory that nobody wrote", 3, "plain", 1, "not reversed"),
        ("past the end of shared memory", 4, "address", SANITIZER, "heap-buffer-overflow"),
        ("an update by several blocks", 5, "thread", SANITIZER, "data race"),
        ("a warp that does not come", 6, "plain", FAULT, "deadlock"),
        ("a lane not in its mask", 7, "plain", FAULT, "mask that it is not in"),
        ("an operand that is not TF32", 8, "plain", FAULT, "more digits than TF32"),
    ],
)
def test_planted_faults_are_caught(faults, fault, number, how, status, message):
    got, output = run(faults(how), str(number))
    assert got == status, f"{fault}: {output[-4000:]}"
    assert message in output
