"""Files that appear whole or not at all, and that notice when a bit of them has changed."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

CHECKSUM = "checksum"  # the entry of a JSON object that holds the checksum of the others
_DIGEST_BYTES = 32
_UNFINISHED = re.compile(r"\.(?P<pid>[0-9]+)@(?P<host>.+?)\.[0-9a-f]{16}-.+")
_ABANDONED_SECONDS = 3600  # without a change, of a file whose process lives or died on another machine


class Damaged(ValueError):
    """A file is not what was written; the message names it and says what to remove."""

    def __init__(self, path: Path, why: str, remedy: str = "remove it and resume the job"):
        super().__init__(f"{path} is damaged: {why}; {remedy}")


# ---------------------------------------------------------------------------------------------------------- whole files


@contextmanager
def whole(path: Path, size: int | None = None) -> Iterator[Path]:
    """Where to write a file that shall appear at `path` whole or not at all: it is moved there when the block ends.

    The file is there already, empty: it was opened exclusively, so that nothing planted under its name is written to.
    `size`, in bytes, is named where the disk is full.
    """
    unfinished = path.with_name(f".{os.getpid()}@{socket.gethostname()}.{secrets.token_hex(8)}-{path.name}")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    with full_disk_named(path, size):
        descriptor = os.open(unfinished, flags, 0o666)
        try:
            yield unfinished
            if not os.path.samestat(os.fstat(descriptor), os.lstat(unfinished)):
                raise OSError(errno.EEXIST, f"{unfinished} was replaced by another file while it was written")
            os.fsync(descriptor)
            unfinished.replace(path)
        finally:
            os.close(descriptor)
            unfinished.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    data = text.encode()
    with whole(path, len(data)) as unfinished:
        unfinished.write_bytes(data)


@contextmanager
def full_disk_named(path: Path, size: int | None) -> Iterator[None]:
    """A full disk's error says what was to be written, how many bytes it takes and how many are free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise
        needed = "" if size is None else f" needs {size:,} bytes and"
        free = shutil.disk_usage(path.parent).free
        raise OSError(error.errno, f"{error.strerror}: {path}{needed} finds {free:,} free") from error


def remove_abandoned(folder: Path) -> None:
    """Removes what killed processes left of files that they were writing, nothing of a process that may be alive."""
    for path in folder.iterdir():
        found = _UNFINISHED.fullmatch(path.name)
        if found is None:
            continue
        if found["host"] == socket.gethostname():
            abandoned = not is_alive(int(found["pid"]))
        else:
            try:
                abandoned = time.time() - path.lstat().st_mtime > _ABANDONED_SECONDS
            except FileNotFoundError:
                continue
        if abandoned:
            path.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is somebody else's
        return True
    return True


# ------------------------------------------------------------------------------------------------------------ checksums


def canonical(value: Any) -> str:
    """The one JSON text of a value: the order of a mapping's keys does not count, 1, 1.0 and true differ."""
    return json.dumps(value, allow_nan=False, sort_keys=True, separators=(",", ":"))


def checksum(*texts: str) -> str:
    """32 digits of BLAKE2b over the texts and their lengths."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def sealed(entries: Mapping[str, Any], about: str = "") -> dict[str, Any]:
    """The entries of a JSON object with their checksum as the last; `about` is what they belong to."""
    return {**entries, CHECKSUM: checksum(about, canonical(entries))}


def unsealed(text: str, about: str = "") -> dict[str, Any]:
    """The entries that `sealed` was given. Raises ValueError that says what is wrong with the text."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"it must be a JSON object, got {type(found).__name__}")
    if CHECKSUM not in found:
        raise ValueError("it has no checksum")
    wanted = found.pop(CHECKSUM)
    if checksum(about, canonical(found)) != wanted:
        raise ValueError("its checksum does not fit what it holds")
    return found


def save_array(path: Path, values: np.ndarray, about: str) -> None:
    """Writes values as a .npy file that ends with a checksum of its bytes and of `about`, what they are.

    `numpy.load` reads it as any other: it stops before the checksum.
    """
    with whole(path, values.nbytes) as unfinished, unfinished.open("rb+") as file:
        hashing = _Hashing(file, about)
        np.save(hashing, values, allow_pickle=False)  # pyright: ignore[reportArgumentType]  (all that it needs is write)
        file.write(hashing.digest.digest())


def load_array(path: Path, dtype: Any, shape: tuple[int, ...], about: str, *, verify: bool = True) -> np.ndarray:
    """Values that `save_array` wrote, mapped; with verify, each byte is read first. Raises `Damaged`."""
    if verify:
        digest, left = _begun(about), path.stat().st_size - _DIGEST_BYTES
        if left < 0:
            raise Damaged(path, f"it has {left + _DIGEST_BYTES} bytes, fewer than a checksum")
        with path.open("rb") as file:
            while data := file.read(min(left, 1 << 20)):
                digest.update(data)
                left -= len(data)
            if left or file.read() != digest.digest():
                raise Damaged(path, "its checksum does not fit: bytes have changed, or it is the file of other values")
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise Damaged(path, str(error)) from error
    if values.shape != shape or values.dtype != dtype:
        raise Damaged(path, f"it must be {dtype} {list(shape)}, got {values.dtype} {list(values.shape)}")
    return values


def _begun(about: str) -> Any:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    data = about.encode()
    digest.update(len(data).to_bytes(8, "big") + data)
    return digest


class _Hashing:
    """A file to write to that keeps the checksum of what went through."""

    def __init__(self, file: Any, about: str):
        self.file, self.digest = file, _begun(about)

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)
