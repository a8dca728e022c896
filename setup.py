"""Builds what fastif compiles; each part may be absent, and fastif says what runs instead.

fastif._C       the ops' CPU kernels, over torch's and CPython's stable ABIs: for every torch from 2.11, every Python
fastif._C_cuda  their CUDA kernels, where torch has CUDA and a fitting nvcc is found; FASTIF_CUDA=0 or 1 overrides
fastif._memory  counts the memory of CPU tensors, for the torch that is there alone; FASTIF_MEMORY=0 leaves it out
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from setuptools import setup

try:
    import torch
except ImportError:
    sys.exit(
        "fastif builds against the torch that is installed, and none was found here.\n"
        "Install torch first, then run:  pip install 'setuptools>=77' ninja && pip install --no-build-isolation ."
    )

HERE = Path(__file__).parent
# Kernels for A100, H100 and B200; PTX, from which the driver compiles for later GPUs.
ARCHITECTURES = "8.0;9.0;10.0+PTX"


def find_nvccs() -> Iterator[str]:
    """Every nvcc that this machine may mean: CUDA_HOME's alone if it is set, else PATH's, the usual folder's, pip's."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        yield str(Path(home, "bin", "nvcc"))
        return
    yield from filter(None, [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"])
    pip = importlib.util.find_spec("nvidia")  # nvidia-cuda-nvcc and its siblings share this namespace package
    for place in pip.submodule_search_locations or () if pip else ():
        yield from map(str, sorted(Path(place).glob("cu*/bin/nvcc")))


def find_toolkits() -> Iterator[tuple[str, str]]:
    """Folder and version of each toolkit, as nvcc itself says them: the one on PATH may be a script that calls it."""
    for nvcc in find_nvccs():
        try:
            plan = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
            version = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
        except OSError:
            continue
        top, release = re.search(r"^#\$ TOP=(.*)$", plan.stderr, re.M), re.search(r"release (\d+\.\d+)", version.stdout)
        if top and release:
            yield os.path.realpath(top[1]), release[1]


def find_cuda_home() -> str | None:
    """The toolkit to build with; None for a build for the CPU, of which one sentence says why."""
    wanted = os.environ.get("FASTIF_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"FASTIF_CUDA must be 0, 1 or auto, got {wanted!r}")
    if wanted == "0":
        return None
    if torch.version.cuda is None:
        lacking = "a CUDA build of torch"
    else:
        toolkits = list(find_toolkits())
        major = torch.version.cuda.split(".")[0]
        fitting = [home for home, version in toolkits if version.split(".")[0] == major]
        if fitting:
            return fitting[0]
        found = ", ".join(f"{version} in {home}" for home, version in toolkits) or "none"
        lacking = f"an nvcc of CUDA {major}, which torch {torch.__version__} was built with (found: {found})"
    if wanted == "1":
        sys.exit(f"FASTIF_CUDA=1, but this machine lacks {lacking}")
    if torch.version.cuda is not None:
        print(f"fastif: no CUDA kernels will be built, for want of {lacking}")
    return None


def link_cudart(extension, home: str) -> None:
    """Links the CUDA runtime in, so that none is looked for later; with pip's toolkit, which lacks that form, it is."""
    places = [Path(home, lib) for lib in ("lib64", "lib")]
    static = next((place for place in places if (place / "libcudart_static.a").exists()), None)
    if static is not None:
        extension.libraries.remove("cudart")
        extension.library_dirs.append(str(static))
        extension.extra_link_args += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        return
    if any((place / "libcudart.so").exists() for place in places):
        return
    runtimes = sorted(file for place in places for file in place.glob("libcudart.so.*"))
    if not runtimes:
        sys.exit(f"fastif: {home} has nvcc but no libcudart.so*, install the CUDA runtime there or set FASTIF_CUDA=0")
    # The linker asks for libcudart.so without a version.
    folder = HERE / "build" / "cudart"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "libcudart.so"
    link.unlink(missing_ok=True)
    link.symlink_to(runtimes[0])
    extension.library_dirs.append(str(folder))


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(HERE)) for path in HERE.glob(pattern))


cuda_home = find_cuda_home()
if cuda_home is not None:
    os.environ["CUDA_HOME"] = cuda_home
from torch.utils import cpp_extension  # noqa: E402  (it reads CUDA_HOME when it is imported)

# No contraction into fused multiply-adds: farthest_first defines its result to the last bit, and kernels that want them
# say so. No debug information, which Python's own flags ask for: it would be nineteen twentieths of the library.
CXX = ["-O3", "-std=c++20", "-ffp-contract=off", "-g0"]
# torch 2.11's stable ABI. (That of CPython 3.10 is torch's own flag, with py_limited_api.)
STABLE = [flag for flag in (HERE / "csrc" / "stable_abi.flags").read_text().split() if "Py_LIMITED_API" not in flag]
kernels = cpp_extension.CppExtension(
    "fastif._C",
    ["csrc/ops.cpp", *sources("csrc/*/cpu/*.cpp")],
    extra_compile_args={"cxx": [*CXX, *STABLE]},
    py_limited_api=True,
)
extensions = [kernels]

if cuda_home is None:
    print(f"fastif: building for CPU, torch {torch.__version__}")
else:
    if not torch.cuda.is_available():  # otherwise torch builds for the GPUs that it sees
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    target = os.environ.get("TORCH_CUDA_ARCH_LIST", "the GPUs here")
    print(f"fastif: building for CPU and CUDA ({target}), torch {torch.__version__}, toolkit {cuda_home}")
    major = torch.version.cuda.split(".")[0]
    cuda_kernels = cpp_extension.CUDAExtension(
        "fastif._C_cuda",
        ["csrc/cuda.cpp", *sources("csrc/*/cuda/*.cpp"), *sources("csrc/*/cuda/*.cu")],
        extra_compile_args={
            "cxx": [*CXX, *STABLE, "-DUSE_CUDA", f"-DFASTIF_CUDA_MAJOR={major}"],
            "nvcc": ["-O3", "-std=c++20", "-lineinfo"],
        },
        py_limited_api=True,
    )
    link_cudart(cuda_kernels, cuda_home)
    extensions.append(cuda_kernels)

with_memory = os.environ.get("FASTIF_MEMORY") != "0"
if with_memory:
    extensions.append(
        cpp_extension.CppExtension(
            "fastif._memory", ["csrc/memory.cpp"], extra_compile_args={"cxx": [*CXX, "-fvisibility=hidden"]}
        )
    )


class Build(cpp_extension.BuildExtension):
    def run(self):
        compiler = (os.environ.get("CXX") or "c++").split()[0]
        if shutil.which(compiler) is None:
            sys.exit(
                f"fastif: no C++ compiler was found ({compiler}): install one (apt install g++) or name it in CXX; "
                "FASTIF_PLAIN=1 installs fastif without one, with every op as plain torch, slower"
            )
        if self.inplace:  # Python would take one that an older build named otherwise
            for built in [*HERE.glob("fastif/_C*.so"), *HERE.glob("fastif/_memory*.so")]:
                built.unlink()
        self.force = True  # a library that was half written is newer than all that it is made of; ninja keeps objects
        super().run()


if os.environ.get("FASTIF_PLAIN") == "1":  # no compiler: every op runs as plain torch
    setup()
else:
    setup(
        ext_modules=extensions,
        cmdclass={"build_ext": Build},
        options={} if with_memory else {"bdist_wheel": {"py_limited_api": "cp310"}},
    )
