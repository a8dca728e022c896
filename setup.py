"""Builds fastif._C: for CUDA too when torch has it and nvcc is found; FASTIF_CUDA=0 or 1 overrides."""

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    sys.exit(
        "fastif builds against the torch that is installed, and none was found here.\n"
        "Install torch first, then run:  pip install 'setuptools>=77' ninja && pip install --no-build-isolation ."
    )

HERE = Path(__file__).parent


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(HERE)) for path in HERE.glob(pattern))


def build_for_cuda() -> bool:
    missing = [
        what
        for what, have in (
            ("a CUDA build of torch", torch.version.cuda is not None),
            ("nvcc (set CUDA_HOME)", cpp_extension.CUDA_HOME is not None),
        )
        if not have
    ]
    wanted = os.environ.get("FASTIF_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"FASTIF_CUDA must be 0, 1 or auto, got {wanted!r}")
    if wanted == "1" and missing:
        sys.exit("FASTIF_CUDA=1, but this machine lacks " + " and ".join(missing))
    return wanted != "0" and not missing


# No contraction into fused multiply-adds: farthest_first defines its result to the last bit. Kernels that want them
# say so.
CXX = ["-O3", "-std=c++20", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off"]
cpu_sources = sources("csrc/*.cpp") + sources("csrc/*/*_cpu.cpp")

if build_for_cuda():
    if not torch.cuda.is_available():  # otherwise torch builds for the GPUs that it sees
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    target = os.environ.get("TORCH_CUDA_ARCH_LIST", "the GPUs here")
    print(f"fastif: building for CPU and CUDA ({target}), torch {torch.__version__}")
    extension = cpp_extension.CUDAExtension(
        "fastif._C",
        cpu_sources + sources("csrc/*/*_cuda.cpp") + sources("csrc/*/*.cu"),
        extra_compile_args={
            "cxx": [*CXX, "-DFASTIF_CUDA"],
            "nvcc": ["-O3", "-std=c++20", "-lineinfo", "-DFASTIF_CUDA"],
        },
        extra_link_args=["-fopenmp"],
    )
else:
    print(f"fastif: building for CPU, torch {torch.__version__}")
    extension = cpp_extension.CppExtension(
        "fastif._C", cpu_sources, extra_compile_args={"cxx": CXX}, extra_link_args=["-fopenmp"]
    )

if os.environ.get("FASTIF_PLAIN") == "1":  # no compiler: every op runs as plain torch
    setup()
else:
    setup(ext_modules=[extension], cmdclass={"build_ext": cpp_extension.BuildExtension})
