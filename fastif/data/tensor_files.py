"""Files of named tensors (safetensors), with what they belong to and a checksum of both in their metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastif.files import Damaged, canonical, checksum, whole
from fastif.fingerprints import fingerprint


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Any) -> None:
    """Writes a safetensors file that appears whole or not at all; `about` is JSON that says what the tensors are."""
    save = _safetensors().torch.save
    kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    size = sum(value.nbytes for value in kept.values())
    with whole(path, size) as unfinished:
        # One entry: safetensors writes several in an order of its own each time.
        unfinished.write_bytes(save(kept, {"fastif": json.dumps({"about": about, "checksum": _checksum(about, kept)})}))


def load_tensors(path: Path, *, verify: bool = True) -> tuple[Any, dict[str, Tensor]]:
    """What `save_tensors` was given to say of them, and the tensors; with verify, each bit is held against the
    checksum.

    Raises `Damaged`.
    """
    module = _safetensors()
    try:
        with module.safe_open(path, framework="pt") as file:
            found = json.loads(file.metadata()["fastif"])
            about, wanted = found["about"], found["checksum"]
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (module.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise Damaged(path, str(error)) from error
    if verify and _checksum(about, tensors) != wanted:
        raise Damaged(path, "its checksum does not fit what it holds")
    return about, tensors


def _checksum(about: Any, tensors: Mapping[str, Tensor]) -> str:
    return checksum(canonical(about), *(f"{name} {fingerprint([tensors[name]])}" for name in sorted(tensors)))


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "files of tensors need safetensors: pip install safetensors", name="safetensors"
        ) from None
    return safetensors
