"""Old names: each goes on working for those who use it, and warns with the name that it has now."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, ParamSpec, TypeVar

Given = ParamSpec("Given")
Returned = TypeVar("Returned")
_PACKAGE = f"{Path(__file__).parent}{os.sep}"
_BETWEEN = ("torch", "contextlib", "importlib")  # what may stand between the user's line and the package


def warn_outside(message: str, category: type[Warning]) -> None:
    """Warns at the line outside of the package that led here: there its reader can do something about it.

    Torch may have called the package, as a hook, and Python's import statement may have.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_inside(frame):
        frame = frame.f_back
    names = frame.f_globals
    registry = names.setdefault("__warningregistry__", {})  # of the warnings that were shown, as warnings.warn has it
    where = frame.f_code.co_filename, frame.f_lineno, names.get("__name__", "<string>")
    warnings.warn_explicit(message, category, *where, registry)


def _is_inside(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return frame.f_code.co_filename.startswith(_PACKAGE) or module in _BETWEEN


def warn_renamed(old: str, new: str) -> None:
    """Says what an old name is called now; the test suite turns these warnings into errors by their wording."""
    warn_outside(f"{old} was renamed to {new}", DeprecationWarning)


def rename_arguments(**new_by_old: str) -> Callable[[Callable[Given, Returned]], Callable[Given, Returned]]:
    """A decorator for a function some of whose keyword arguments had other names, which it then takes, too.

    >>> @rename_arguments(steps="max_steps")
    ... def walk(max_steps=3):
    ...     return max_steps
    >>> walk(max_steps=5)
    5

    Raises TypeError where an argument is given under both names.
    """

    def decorate(function: Callable[Given, Returned]) -> Callable[Given, Returned]:
        name = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def call(*args: Given.args, **kwargs: Given.kwargs) -> Returned:
            for old, new in new_by_old.items():
                if old in kwargs:
                    if new in kwargs:
                        raise TypeError(f"{name}: {old}= was renamed to {new}=; give one of them")
                    warn_renamed(f"{name}: {old}=", f"{new}=")
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def find_renamed(module: str, name: str, new_by_old: dict[str, Any]) -> Any:
    """For a module's `__getattr__`: what an old name of its stands for now."""
    if name not in new_by_old:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    found = new_by_old[name]
    warn_renamed(f"{module}.{name}", f"{module}.{found.__name__}")
    return found
