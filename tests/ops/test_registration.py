"""Every op has a kernel for every device, all of the op's type: torch looks at it only when it is called."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastif.ops import _library, build_info

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
KERNELS = sorted(file for file in CSRC.glob("*/*/*.cpp") if "TORCH_LIBRARY_IMPL" in file.read_text())


@pytest.mark.parametrize("op", _library.SCHEMAS)
@pytest.mark.parametrize("device", ["CPU", "CUDA", "Meta"])
def test_every_op_has_a_kernel(op, device):
    name = f"fastif::{op}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, device) or (
        not build_info()["compiled"]
        and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd")
    )


@pytest.mark.parametrize("file", KERNELS, ids=lambda file: str(file.relative_to(CSRC)))
def test_every_kernel_is_held_against_its_ops_type(file):
    text = file.read_text()
    registered = re.findall(r'm\.impl\("\w+", TORCH_BOX\(&(\w+)\)\)', text)
    assert registered
    for kernel in registered:
        assert re.search(rf"static_assert\(std::is_same_v<decltype\({kernel}\), \w+Op>\);", text), kernel


def test_all_ops_are_registered_for_both_devices():
    for device in ("cpu", "cuda"):
        registered = [
            op for file in CSRC.glob(f"*/{device}/*.cpp") for op in re.findall(r'm\.impl\("(\w+)"', file.read_text())
        ]
        assert sorted(registered) == sorted(_library.SCHEMAS)


def check_wrapper(folder: Path, wrapper: str) -> subprocess.CompletedProcess:
    """`make cuda-check` of one wrapper in a copy of csrc/."""
    return subprocess.run(
        ["sh", str(folder / "csrc" / "check_cuda.sh"), wrapper],
        env={**os.environ, "PY": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("nvcc", path=f"/usr/local/cuda/bin:{os.environ['PATH']}") is None,
    reason="needs g++ and the CUDA toolkit's headers, which nvcc names",
)
def test_a_kernel_of_another_type_fails_cuda_check(tmp_path):
    shutil.copytree(CSRC, tmp_path / "csrc")
    wrapper = "csrc/ggn_block/cuda/wrapper.cpp"
    done = check_wrapper(tmp_path, wrapper)
    assert done.returncode == 0, done.stdout
    text = (tmp_path / wrapper).read_text()
    mutant = text.replace("void ggn_block_cuda_(const Tensor& out, ", "void ggn_block_cuda_(Tensor out, ")
    assert mutant != text
    (tmp_path / wrapper).write_text(mutant)
    done = check_wrapper(tmp_path, wrapper)
    assert done.returncode == 1, done.stdout
    assert "static assertion failed" in done.stdout
    assert "GgnBlockOp" in done.stdout
