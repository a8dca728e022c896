"""The script of the user that gives model and data."""

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from fastif.cli.arguments import ScriptError
from fastif.data.batches import as_loader


def function_named(script: str) -> Callable[[], Any]:
    """The function that module:function or path/to/file.py:function names; what its import raises is a ScriptError."""
    place, _, name = script.rpartition(":")
    from_file = place.endswith(".py")
    if not name.isidentifier() or not (from_file or all(part.isidentifier() for part in place.split("."))):
        raise ValueError(f"the script must be given as module:function or path/to/file.py:function, got {script!r}")
    if from_file and not Path(place).is_file():
        raise FileNotFoundError(f"no file {place}")
    folder = str(Path(place).parent.resolve()) if from_file else os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = _from_file(Path(place)) if from_file else importlib.import_module(place)
    except ModuleNotFoundError as error:
        if not from_file and f"{place}.".startswith(f"{error.name}."):
            raise ValueError(f"no module {error.name} in {folder}, nor among what is installed") from None
        raise ScriptError(script) from error
    except Exception as error:
        raise ScriptError(script) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{place} has no function {name}")
    return function


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def called(script: str, function: Callable[[], Any]) -> Any:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ValueError(f"{script} must take no arguments: {error}") from None
    try:
        return function()
    except Exception as error:
        raise ScriptError(script) from error


def returned(script: str, function: Callable[[], Any]) -> tuple[nn.Module, Any, Any]:
    given = called(script, function)
    rule = f"{script} must return (model, train, query)"
    if not isinstance(given, tuple | list) or len(given) != 3:
        got = f"{len(given)} values" if isinstance(given, tuple | list) else type(given).__name__
        raise ValueError(f"{rule}, got {got}")
    model, train, query = given
    if not isinstance(model, nn.Module):
        raise ValueError(f"{rule}: the model must be a torch.nn.Module, got {type(model).__name__}")
    for name, data in (("train", train), ("query", query)):
        try:
            as_loader(data)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{rule}: {name}: {error}") from error
    return model, train, query
