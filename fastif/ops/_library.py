"""Loads the compiled extension, or stands in for it with plain torch formulations of every op."""

from __future__ import annotations

import importlib
import importlib.util
import mmap
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fastif._version import __version__
from fastif.progress import tqdm

# As in csrc/ops.cpp; needed here only where the extension is absent (a test holds the two against each other).
SCHEMAS = {
    "farthest_first": "(Tensor points, int k, Tensor start, Tensor? picks=None, Tensor? mask=None, "
    "float? until_radius=None) -> (Tensor indices, Tensor sq_radii, Tensor sq_dists, Tensor nearest)",
    "ggn_block_": "(Tensor(a!) out, Tensor features, Tensor probs, Tensor weights) -> ()",
    "kronecker_block_": "(Tensor(a!) out, Tensor features, Tensor outer) -> ()",
    "per_sample_grad_accumulate": "(Tensor inputs, Tensor output_grads, Tensor weights, Tensor groups, int num_groups) "
    "-> Tensor",
    "per_sample_grad_accumulate_squares": "(Tensor inputs, Tensor output_grads, Tensor weights) -> Tensor",
    "per_sample_grad_sq_norms": "(Tensor inputs, Tensor output_grads, Tensor? scale=None) -> Tensor",
    "per_sample_grad_dots": "(Tensor inputs, Tensor output_grads, Tensor directions) -> Tensor",
}


_STAMP = b"fastif was built for torch "
_BUILD = "pip install --no-build-isolation --no-deps --force-reinstall .   (in the folder of its source)"


def _read_torch_built_for(library: str) -> str | None:
    """The version of torch that the extension was built for, read from its bytes: csrc/ops.cpp has it."""
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        begin = mapped.find(_STAMP)
        if begin < 0:
            return None
        begin += len(_STAMP)
        return mapped[begin : mapped.find(b"\0", begin)].decode()


def _reason_to_refuse() -> str | None:
    """Why the extension must not be loaded, if there is a reason.

    Its kernels register themselves while it is loaded, by numbers that another torch gives to other devices: to ask it
    afterwards would be too late.
    """
    spec = importlib.util.find_spec("fastif._C")
    if spec is None or spec.origin is None:
        return None  # the import says so in its own words
    built_for = _read_torch_built_for(spec.origin)
    if built_for is None:
        return "the compiled extension does not say which torch it was built for"
    if built_for.split(".")[:2] != torch.__version__.split(".")[:2]:
        return f"the compiled extension was built for torch {built_for}, and this is torch {torch.__version__}"
    return None


def _load():
    if os.environ.get("FASTIF_PLAIN") == "1":
        return None
    reason = None
    try:
        reason = _reason_to_refuse()
        if reason is None:
            return importlib.import_module("fastif._C")
    except (ImportError, OSError, ValueError) as error:
        reason = f"the compiled extension could not be loaded ({error})"
    warnings.warn(
        f"fastif: {reason}; every op runs as plain torch, slower. Build it for this torch with: {_BUILD}", stacklevel=2
    )
    return None


extension = _load()
compiled = extension is not None
compiled_for_cuda = extension is not None and extension.built_with_cuda()

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
    if extension is not None:
        extension.set_progress(report)


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
        "isa": extension.isa() if extension is not None else "plain torch",
        "torch": torch.__version__,
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }
