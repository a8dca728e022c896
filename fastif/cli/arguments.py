"""What the commands share: checks of their options, folders that can be written to, an end by Ctrl-C."""

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console


class Interrupted(Exception):
    """Ctrl-C, with something to say about it."""


class ScriptError(Exception):
    """A script of the user raised its __cause__."""


def check(name: str, value: Any, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"--{name} must be {rule}, got {value}")


def split(values: Sequence[str]) -> list[str]:
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def device_named(name: str) -> torch.device:
    check("device", name, re.fullmatch("cpu|cuda(:[0-9]+)?", name) is not None, "cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


@contextmanager
def writable(*folders: Path) -> Iterator[None]:
    """Makes the folders, OSError now, not after training, where one cannot be written to.

    Those that it made and that are still empty when the block fails are removed.
    """
    made: list[Path] = []
    try:
        for folder in folders:
            try:
                for path in (*reversed(folder.parents), folder):
                    if not path.exists():
                        path.mkdir()
                        made.append(path)
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                raise OSError(f"cannot write to the folder {folder}: {error.strerror or error}") from error
        yield
    except BaseException:
        for path in reversed(made):
            with suppress(OSError):
                path.rmdir()
        raise


@contextmanager
def interruptible(folder: Path, kept: Sequence[str]) -> Iterator[None]:
    """Ctrl-C becomes Interrupted, which names the folder where it holds something to go on from."""
    try:
        yield
    except KeyboardInterrupt:
        if not any((folder / name).exists() for name in kept):
            raise
        raise Interrupted(f"what was finished is in {folder}; the same command with --resume continues") from None


def terminal() -> Console:
    """Where results are printed; 120 columns where that is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)
