"""Code as it was loaded: what it does, which globals it reads, and whether it is of an installed package."""

from __future__ import annotations

import dis
import functools
import hashlib
import importlib
import sys
import sysconfig
import types
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any


def code_text(code: types.CodeType) -> str:
    """What code does, but not where it stands, which line breaks and comments change."""
    constants = [code_text(c) if isinstance(c, types.CodeType) else _constant_text(c) for c in code.co_consts]
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    table = getattr(code, "co_exceptiontable", b"")
    return repr((code.co_name, counts, code.co_code.hex(), table.hex(), constants, names))


def _constant_text(constant: Any) -> str:
    if isinstance(constant, frozenset):
        return f"frozenset {sorted(map(_constant_text, constant))}"
    if isinstance(constant, tuple):
        return f"({', '.join(map(_constant_text, constant))})"
    return repr(constant)


def global_paths(code: types.CodeType) -> list[tuple[str, ...]]:
    """The globals that code reads, with the attributes that it takes of them at once; and what it imports.

    An import is ("import", module, level, names …).
    """
    paths: dict[tuple[str, ...], None] = {}
    instructions = [*dis.get_instructions(code)]
    for number, instruction in enumerate(instructions):
        after = instructions[number + 1 :]
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            path = [str(instruction.argval)]
            for following in after:
                if following.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                    break
                path.append(str(following.argval))
            paths[tuple(path)] = None
        elif instruction.opname == "IMPORT_NAME":
            level = instructions[number - 2].argval
            start = ("import", str(instruction.argval), str(level if isinstance(level, int) else 0))
            own = takewhile(lambda i: i.opname != "IMPORT_NAME", after)
            names = [str(i.argval) for i in own if i.opname == "IMPORT_FROM"]
            paths.update(dict.fromkeys([(*start, name) for name in names] or [start]))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            paths.update(dict.fromkeys(global_paths(constant)))
    return [*paths]


def imported(name: str, level: int, spaces: Mapping[str, Any]) -> Any:
    try:
        return importlib.import_module("." * level + name, spaces.get("__package__") if level else None)
    except Exception:  # the function may never come to this line
        return None


@functools.cache
def _installed_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple({str(Path(paths[name]).resolve()) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def is_installed(module: str | None) -> bool:
    """Whether a module belongs to Python, to fastif or to an installed package: its file does not change by itself."""
    if module is None or module == "__main__":
        return False
    top = module.partition(".")[0]
    if top in ("builtins", "fastif"):
        return True
    for name in (module, top):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None:
            folder = str(Path(file).resolve())
            return folder.startswith(_installed_folders()) or "site-packages" in folder or "dist-packages" in folder
    return top in sys.stdlib_module_names


def named(module: str, name: str, digest: bool = True) -> str:
    """The full name of a part of a module, and a digest of the module's file where there is one and it is wanted."""
    full = f"{module}.{name}" if name else f"module {module}"
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or not digest:
        return full
    try:
        status = Path(file).stat()
    except OSError:
        return full
    return f"{full} ({_file_digest(file, status.st_mtime_ns, status.st_size)})"


@functools.cache
def _file_digest(file: str, changed: int, size: int) -> str:
    del changed, size  # of the file: another entry of the cache
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
