"""Loads the compiled extension, or stands in for it with plain torch formulations of every op."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastif._version import __version__
from fastif.progress import tqdm
from fastif.renamed import warn_outside

# As in csrc/ops.cpp; needed here only where the extension is absent (a test holds the two against each other).
SCHEMAS = {
    "farthest_first": "(Tensor points, int k, Tensor start, Tensor? picks=None, Tensor? mask=None, "
    "float? until_radius=None) -> (Tensor indices, Tensor sq_radii, Tensor sq_dists, Tensor nearest)",
    "factor_dots": "(Tensor left, Tensor right, Tensor? scale, Tensor ranks, Tensor queries, Tensor? along=None) "
    "-> Tensor",
    "ggn_block_": "(Tensor(a!) out, Tensor features, Tensor probs, Tensor weights) -> ()",
    "kronecker_block_": "(Tensor(a!) out, Tensor features, Tensor outer) -> ()",
    "per_sample_grad_accumulate": "(Tensor inputs, Tensor output_grads, Tensor weights, Tensor groups, int num_groups) "
    "-> Tensor",
    "per_sample_grad_accumulate_squares": "(Tensor inputs, Tensor output_grads, Tensor weights) -> Tensor",
    "per_sample_grad_sq_norms": "(Tensor inputs, Tensor output_grads, Tensor? scale=None) -> Tensor",
    "per_sample_grad_dots": "(Tensor inputs, Tensor output_grads, Tensor directions) -> Tensor",
}


_BUILD = "pip install --no-build-isolation --no-deps --force-reinstall .   (in the folder of its source)"


def read_built_for(module: str, of: str) -> str | None:
    """The version of torch or CUDA that a compiled module was built for, read from its bytes; None if there is none.

    What is loaded for another version can end the process, so that to ask it afterwards would be too late.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return None
    stamp = rf"fastif was built for {of} ([\d.]+)".encode()
    found = re.search(stamp, Path(spec.origin).read_bytes())
    return found[1].decode() if found else None


def _check_whole(module: str) -> None:
    """Raises ImportError for a library that was cut off while it was written: loading it can end the process.

    An ELF file ends with the table of its sections, of which its header says the place.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not os.path.isfile(spec.origin):
        return
    with open(spec.origin, "rb") as file:
        header = file.read(64).ljust(64, b"\0")
        held = os.fstat(file.fileno()).st_size
    if header[:6] == b"\x7fELF\x02\x01":  # of 64 bits, the least significant byte first
        place, size, count = struct.unpack_from("<Q", header, 40)[0], *struct.unpack_from("<HH", header, 58)
        if place + size * count > held:
            raise ImportError(f"{spec.origin} is cut off: it has {held} of {place + size * count} bytes")


def _load(module: str):
    """The compiled module; None and one warning where it cannot be loaded."""
    try:
        _check_whole(module)
        return importlib.import_module(module)
    except (ImportError, OSError, ValueError) as error:
        runs = "every op runs as plain torch" if module == "fastif._C" else "ops on CUDA run as plain torch"
        warn_outside(
            f"fastif: {module} could not be loaded ({error}); {runs}, slower. Build it with: {_BUILD}", UserWarning
        )
        return None


def _load_kernels() -> tuple[ModuleType | None, ModuleType | None]:
    """fastif._C and, where torch has CUDA of the major version that it was built for, fastif._C_cuda."""
    if os.environ.get("FASTIF_PLAIN") == "1":
        return None, None
    kernels = _load("fastif._C")
    if kernels is None or torch.version.cuda is None:
        return kernels, None
    built_for, there = read_built_for("fastif._C_cuda", "CUDA"), torch.version.cuda.split(".")[0]
    if built_for is not None and built_for != there:
        warn_outside(
            f"fastif: the CUDA kernels were built for CUDA {built_for}, and this torch has CUDA {there}; ops on CUDA "
            f"run as plain torch, slower. Build them with: {_BUILD}",
            UserWarning,
        )
    return kernels, _load("fastif._C_cuda") if built_for == there else None


_kernels, _cuda_kernels = _load_kernels()
_modules = [module for module in (_kernels, _cuda_kernels) if module is not None]
compiled = _kernels is not None
compiled_for_cuda = _cuda_kernels is not None


_ERRORS = {kind.__name__: kind for kind in (ValueError, TypeError, MemoryError, RuntimeError)}


def run(kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """kernel(...), whose errors are those of Python: csrc/common/errors.h."""
    try:
        return kernel(*args, **kwargs)
    except RuntimeError as error:
        kind, _, text = str(error).partition(": ")
        if kind in _ERRORS:
            raise _ERRORS[kind](text) from None
        if kind == "Raised":
            for module in _modules:
                module.raise_again()
        raise


_definitions = torch.library.Library("fastif", "FRAGMENT")
if not compiled:
    for _name, _schema in SCHEMAS.items():
        _definitions.define(_name + _schema)
for _name, _schema in SCHEMAS.items():
    if "!)" in _schema:
        # torch's own kernels for such views resolve them before the op and write back what the op returns, which is
        # nothing here. They pass: the contract refuses them as outputs, and kernels read them rightly as inputs.
        for _key in ("Conjugate", "Negative"):
            _definitions.impl(_name, torch.library.fallthrough_kernel, _key)


def plain(name: str) -> Callable[[Callable], Callable]:
    """Registers a plain torch formulation of op `name` where no compiled kernel exists."""

    def register(formulation: Callable) -> Callable:
        def exact(*args, **kwargs):  # the kernels know no autocast either
            with torch.autocast(args[0].device.type, enabled=False):
                return formulation(*args, **kwargs)

        if not compiled:
            _definitions.impl(name, exact, "CompositeExplicitAutograd")
        elif not compiled_for_cuda:
            _definitions.impl(name, exact, "CUDA")
        return formulation

    return register


class _Thread(threading.local):
    report: Callable[[int, int], object] | None = None


_thread = _Thread()


def poll(done: int, total: int) -> None:
    """To plain torch formulations what csrc/common/poll.h is to kernels."""
    if _thread.report is not None:
        _thread.report(done, total)


def _report_to(report: Callable[[int, int], object] | None) -> None:
    _thread.report = report
    for module in _modules:
        module.set_progress(report)


@contextmanager
def progress_bar(description: str, total: int, unit: str) -> Iterator[None]:
    """Shows a bar of what the op that runs inside reports; full when it ends well."""
    with tqdm(desc=description, total=total, unit=unit) as bar:
        _report_to(lambda done, _: bar.update(done - bar.n))
        try:
            yield
        finally:
            _report_to(None)
        bar.update(total - bar.n)


def build_info() -> dict[str, object]:
    """What was built and what runs: `compiled`, `cuda` (kernels built), `isa` (CPU vector instructions), versions."""
    return {
        "fastif": __version__,
        "compiled": compiled,
        "cuda": compiled_for_cuda,
        "isa": _kernels.isa() if _kernels is not None else "plain torch",
        "torch": torch.__version__,
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }
