"""Words and digests that tell one object from another, the same in every process: tensors by their bits, functions by
their code and all that it reads, models by their modules' code, other objects by their class and what they hold."""

from __future__ import annotations

import copyreg
import functools
import hashlib
import platform
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastif._version import __version__
from fastif.files import canonical, checksum
from fastif.loaded_code import code_text, global_paths, imported, is_installed, named
from fastif.sharded import gathered, written_as

VERSIONS = {"fastif": __version__, "torch": torch.__version__, "python": platform.python_version()}
_MOST_ENTRIES = 100  # of a container that is described one by one: the rest is a digest


def told_function(given: Any) -> tuple[str, str]:
    """What ranks compare of a loss or measurement: its name, and a digest of its code and of what it reads, where that
    can be told."""
    if isinstance(given, str):
        return given, ""
    name = getattr(given, "__qualname__", type(given).__qualname__)
    try:
        return name, checksum(canonical(described(given, "given", "ranks")))
    except ValueError:  # such as one that reads an open file
        return name, ""


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Of the tensors' types, shapes and bits: 16 digits of their SHA-256. Parts on ranks are gathered one by one."""
    digest = hashlib.sha256()
    for tensor in map(gathered, tensors):
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
        values = dense.cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(values.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of nested mappings, lists and tuples, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)


def described(value: Any, name: str = "value", key: str | None = None, *, travels: bool = False) -> Any:
    """What `value` is and holds, as JSON: equal for equal values, in this process and in others.

    Functions are their code, their defaults, what they close over, what they are bound to and the globals that they
    read, to any depth; code of installed packages is named, with a digest of its file. A set has no order, a
    `torch.Generator` is its state, a lock is a lock.

    travels: installed code is named alone, and own code is told by what it does and not by the module that it stands
    in: equal on machines with other releases of the packages, as long as their Python has the same bytecode.

    >>> described(functools.partial(max, 3, key=None))
    {'partial': 'builtins.max', 'arguments': [3], 'keywords': {'key': None}}

    Raises ValueError, with its place in `name`, for what is not the same in every process or cannot be looked into
    (sockets, open files, pointers, functions of C without a name); where `key` is given, it stands for them.
    """
    return _Description(key, travels).of(value, name)


def described_model(model: nn.Module, key: str | None = None) -> dict[str, Any]:
    """The code of a model, without the bits of its state: each module's class, settings, attributes and hooks."""
    return _Description(key).model(model, "model")


class _Description:
    def __init__(self, key: str | None, travels: bool = False):
        self.key, self.travels = key, travels
        self.known: dict[int, tuple[Any, Any]] = {}  # by id: the object, so that it stays, and its description
        self.open: list[int] = []  # ids of what is being described

    def of(self, value: Any, place: str) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if np.isfinite(value) else f"float {value}"
        if id(value) in self.known:
            return self.known[id(value)][1]
        if id(value) in self.open:
            return {"the object": f"{len(self.open) - self.open.index(id(value))} levels up"}
        self.open.append(id(value))
        try:
            found = self._of(value, place)
        except RecursionError:
            raise ValueError(f"{place} is nested too deep to be told from another") from None
        finally:
            self.open.pop()
        self.known[id(value)] = value, found
        return found

    def _of(self, value: Any, place: str) -> Any:
        match value:
            case Tensor():
                return self.unstable(value, place) if value.is_meta else f"tensor {fingerprint([value])}"
            case np.ndarray() | np.generic() if not value.dtype.hasobject:
                digest = hashlib.sha256(f"{value.dtype.descr} {value.shape}".encode())
                digest.update(np.ascontiguousarray(value).tobytes())
                return f"array {digest.hexdigest()[:16]}"
            case np.ndarray():
                return {"array": [*value.shape], "of": self.of(value.tolist(), place)}
            case nn.Module():
                state = value.state_dict()
                rest = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
                found = {"model": self.model(value, place), "state": fingerprint(tensors_in(state))}
                return {**found, "further state": self.of(rest, place)} if rest else found
            case torch.Generator():
                return {"generator": str(value.device), "state": fingerprint([value.get_state()])}
            case torch.dtype() | torch.layout() | torch.memory_format() | torch.device():
                return str(value)
            case torch._ops.OpOverload() | torch._ops.OpOverloadPacket():
                return f"torch.ops {value}"
            case torch.jit.ScriptFunction():
                return {"scripted": checksum(str(value.code))}
            case functools.partial():
                found = {"partial": self.of(value.func, f"{place}.func")}
                found["arguments"] = self.of(list(value.args), f"{place}.args")
                return {**found, "keywords": self.of(value.keywords, f"{place}.keywords")}
            case types.ModuleType():
                return self.named(value.__name__, "")
            case types.FunctionType():
                return self.function(value, place)
            case types.MethodType():
                return {"method": self.of(value.__func__, place), "bound to": self.of(value.__self__, f"{place}.self")}
            case types.CodeType():
                return checksum(code_text(value))
            case staticmethod() | classmethod():
                return {type(value).__name__: self.of(value.__func__, place)}
            case property():
                return {"property": [self.of(part, place) for part in (value.fget, value.fset, value.fdel)]}
            case type():
                return self.kind(value, place)
            case Enum():
                return {"of": self.of(type(value), place), "member": value.name}
            case weakref.ReferenceType():
                return self.of(value(), place)
            case dict() | types.MappingProxyType() if type(value) in (dict, types.MappingProxyType):
                return self.mapping(value, place)
            case list() | tuple() if type(value) in (list, tuple):
                return _folded([self.of(part, f"{place}[{number}]") for number, part in enumerate(value)])
            case set() | frozenset() if type(value) in (set, frozenset):
                return {"set": _folded(sorted((self.of(part, place) for part in value), key=canonical))}
            case bytes() | bytearray():
                return f"bytes {hashlib.sha256(value).hexdigest()[:16]}"
        if _is_lock(type(value)):
            return "a lock"
        if isinstance(value, functools._lru_cache_wrapper):
            return self.of(value.__wrapped__, place)
        if isinstance(value, _C_CALLABLES) or type(value).__name__ == "cython_function_or_method":
            return self.c_function(value, place)
        return self.instance(value, place)

    def named(self, module: str, name: str) -> str:
        return named(module, name, digest=not self.travels)

    def own(self, code: types.FunctionType | type) -> str:
        return code.__qualname__ if self.travels else f"{code.__module__}.{code.__qualname__}"

    def unstable(self, value: Any, place: str) -> Any:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if self.key is not None:
            return {"known by key": kind}
        raise ValueError(
            f"{place} is a {kind}, which cannot be told from another one; a job on disk needs key=, a name of your own "
            "that changes whenever it does"
        )

    def mapping(self, value: Mapping[Any, Any], place: str) -> Any:
        if all(type(k) is str for k in value):
            return _folded({k: self.of(v, f"{place}.{k}") for k, v in value.items()})
        pairs = [[self.of(k, place), self.of(v, f"{place}[{k!r:.60}]")] for k, v in value.items()]
        return {"mapping": _folded(sorted(pairs, key=canonical))}

    # ------------------------------------------------------------------------------------------------------------ code

    def function(self, function: types.FunctionType, place: str) -> Any:
        name = self.own(function)
        parts: dict[str, Any] = {}
        if own := not is_installed(function.__module__):
            installed, reads = self.reads(function, place)
            text = f"{name} ({checksum(code_text(function.__code__), *installed)[:16]})"
            parts["reads"] = reads
        else:
            text = self.named(function.__module__, function.__qualname__)
        if own or "<locals>" in function.__qualname__:  # else its file says it all
            parts["closure"] = {
                variable: self.of(_contents(cell), f"{place}.{variable}")
                for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
            }
            parts["defaults"] = self.of(list(function.__defaults__ or ()), f"{place}.defaults")
            parts["keyword defaults"] = self.of(function.__kwdefaults__ or {}, f"{place}.defaults")
            held = {k: v for k, v in vars(function).items() if k != "__wrapped__"}  # what wraps it closes over that
            parts["attributes"] = self.of(held, place)
        parts = {part: found for part, found in parts.items() if found}
        return {"function": text, **parts} if parts else text

    def reads(self, function: types.FunctionType, place: str) -> tuple[list[str], dict[str, Any]]:
        """The globals that a function reads: names of what is installed, and descriptions of the rest."""
        installed: list[str] = []
        reads: dict[str, Any] = {}
        for path in global_paths(function.__code__):
            if path[0] == "import":
                value, path = imported(path[1], int(path[2]), function.__globals__), path[3:]
                name = ".".join(("import", value.__name__ if isinstance(value, types.ModuleType) else "", *path))
            elif path[0] in function.__globals__:
                value, name, path = function.__globals__[path[0]], ".".join(path), path[1:]
            else:
                continue  # a built-in, or not there yet
            while isinstance(value, types.ModuleType) and path and not is_installed(value.__name__):
                value, path = getattr(value, path[0], None), path[1:]
            found = self.of(value, f"{place} reads {name}, which")
            module = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
            if isinstance(found, str) and _is_code(value) and is_installed(module):
                installed.append(f"{name} {found} {path}")
            else:
                reads[name] = found
        return sorted(installed), reads

    def kind(self, kind: type, place: str) -> str:
        if is_installed(kind.__module__) and "<locals>" not in kind.__qualname__:
            return self.named(kind.__module__, kind.__qualname__)
        held = {
            name: self.of(value, f"{place}.{name}")
            for name, value in sorted(vars(kind).items())
            if name not in _OF_EVERY_CLASS
            and not isinstance(value, types.MemberDescriptorType | types.GetSetDescriptorType)
            and (callable(value) or isinstance(value, staticmethod | classmethod) or not name.startswith("__"))
        }
        above = [self.of(base, place) for base in (*kind.__bases__, type(kind)) if base not in (object, type)]
        return f"{self.own(kind)} ({checksum(canonical([held, above]))[:16]})"

    def c_function(self, value: Any, place: str) -> Any:
        """A function of C is told by where it is found; its code is that of an installed package, or of a file."""
        name, owner = str(value.__name__), getattr(value, "__objclass__", getattr(value, "__self__", None))
        if isinstance(owner, type):
            return f"{self.of(owner, place)}.{name}"
        module = owner.__name__ if isinstance(owner, types.ModuleType) else getattr(value, "__module__", None)
        places = [module] if module else ["numpy", "scipy.special"]  # a ufunc does not say where it is from
        for there in places:
            if getattr(sys.modules.get(there), name, None) is value:
                return self.named(there, name)
        if owner is not None and type(owner).__name__ != "PyCapsule" and not isinstance(owner, types.ModuleType):
            return {"method": name, "bound to": self.of(owner, f"{place}.self")}
        return self.unstable(value, place)

    # --------------------------------------------------------------------------------------------------------- objects

    def instance(self, value: Any, place: str) -> Any:
        kind = type(value)
        if not is_installed(kind.__module__):
            held = dict(getattr(value, "__dict__", {}))
            for base in kind.__mro__:
                slots = vars(base).get("__slots__", ())
                for slot in (slots,) if isinstance(slots, str) else slots:
                    name = f"_{base.__name__.lstrip('_')}{slot}" if slot[:2] == "__" and slot[-2:] != "__" else slot
                    if slot not in ("__dict__", "__weakref__") and hasattr(value, name):
                        held[name] = getattr(value, name)
            found = {"of": self.of(kind, place), **({"holds": self.mapping(held, place)} if held else {})}
            if contents := [base(value) for base in _CONTAINERS if isinstance(value, base)]:
                return {**found, "contents": self.of(contents, place)}
            try:  # what a base of C holds is in no attribute
                arguments = [part for part in value.__reduce_ex__(2)[1] if part is not kind]
            except Exception:
                return self.unstable(value, place)
            return {**found, "made of": self.of(arguments, place)} if arguments else found
        if isinstance(value, OrderedDict):
            return {"ordered": self.of([*value.items()], place)}
        try:  # as it says itself, to those who would build it again
            reduce = copyreg.dispatch_table.get(kind)
            reduced = value.__reduce_ex__(2) if reduce is None else reduce(value)
        except Exception:
            return self.unstable(value, place)
        if isinstance(reduced, str):
            return f"{kind.__module__}.{reduced}"
        made, arguments, *rest = reduced
        state, items, entries = (*rest, None, None, None)[:3]
        found = {"made by": self.of(made, place), "of": self.of(list(arguments), place)}
        if isinstance(state, dict) and all(type(k) is str for k in state):
            found["holds"] = self.mapping({k: v for k, v in state.items() if k not in _HASHES}, place)
        elif state is not None:
            found["holds"] = self.of(state, place)
        if items is not None:
            found["items"] = self.of(list(items), place)
        if entries is not None:
            found["entries"] = self.of(dict(entries), place)
        return found

    def model(self, model: nn.Module, place: str) -> dict[str, Any]:
        if id(model) not in self.open:  # a module's attributes may hold the model
            self.open.append(id(model))
            try:
                return self.model(model, place)
            finally:
                self.open.pop()
        found: dict[str, Any] = {}
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            self.known.setdefault(id(value), (value, f"state {name}"))  # an attribute that holds it is no further state
        for path, module in model.named_modules():
            own = path or "itself"
            kind, attributes, hooks = written_as(module)
            words = f"{self.of(kind, f'{place}.{own}')}"
            shown = module.extra_repr()
            if shown and " at 0x" not in shown:
                words += f" {shown}"
            held: dict[str, Any] = {k: v for k, v in attributes.items() if k not in _OF_EVERY_MODULE}
            if "_orig_mod" in module._modules:  # what torch.compile made: its own attributes are of the compiler
                held = {}
            elif isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):  # so are theirs
                held = {"code": checksum(str(module.code))}
                held["constants"] = getattr(getattr(module, "code_with_constants", (0, None))[1], "const_mapping", {})
            rest = self.of([held, hooks, module.training], f"{place}.{own}")
            found[own] = f"{words} ({checksum(canonical(rest))[:16]})"
        return _folded(found)


# ---------------------------------------------------------------------------------------------------------------- parts

_CONTAINERS: tuple[Any, ...] = (dict, list, tuple, set, frozenset, str, int, float, complex, bytes, bytearray)
_C_CALLABLES = (
    np.ufunc,
    types.BuiltinFunctionType,
    types.MethodWrapperType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.ClassMethodDescriptorType,
)
_OF_EVERY_CLASS = {
    *("__dict__", "__weakref__", "__module__", "__qualname__", "__doc__", "__annotations__", "__annotate__"),
    *("__annotate_func__", "__annotations_cache__", "__firstlineno__", "__static_attributes__", "_abc_impl"),
    *("_backward_cls", "_autograd_function_id"),  # of an autograd.Function: a number in the order of the imports
}
_HASHES = {"_original_object_hash"}  # of transformers' GenerationConfig: Python's hash, another one in every process
_OF_EVERY_MODULE = {*vars(nn.Module())}
_LOCKS = {
    *(("_thread", "lock"), ("_thread", "RLock"), ("_multiprocessing", "SemLock")),
    ("multiprocessing.synchronize", "SemLock"),
}


def _is_lock(kind: type) -> bool:
    return any((base.__module__, base.__name__) in _LOCKS for base in kind.__mro__)


def _is_code(value: Any) -> bool:
    return isinstance(value, (type, types.FunctionType, types.ModuleType, *_C_CALLABLES))


def _folded(entries: Any) -> Any:
    """Entries as they are where they are few; else their number and digest."""
    if len(entries) <= _MOST_ENTRIES:
        return entries
    return f"{len(entries)} entries ({checksum(canonical(entries))[:16]})"


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing has been bound to the name yet
        return None
