"""What a curvature is of, beside its data: loss, estimators and weights, kept in a state and held against its loader.

A state travels: it is read by other processes, on other machines. So installed code is told by its name alone, own code
by what it does, and functions whose Python had another bytecode, or that cannot be looked into, with a warning.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastif.curvature.network import NetworkCurvature
from fastif.data.checksums import checksum
from fastif.files import canonical
from fastif.files import checksum as digest
from fastif.fingerprints import described
from fastif.model.calls import fleeting_buffers
from fastif.renamed import warn_outside

_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
Buffers = Mapping[str, tuple[int, str]]  # by name: checksum and shape


def describe_fit(loss: Any, estimators: NetworkCurvature, buffers: Buffers) -> Tensor:
    """The loss, the arguments that decide what estimators learn, and the buffers of `buffers_of`: bytes of a JSON."""
    text = canonical({"loss": _of_loss(loss), "estimators": _of_estimators(estimators), "buffers": dict(buffers)})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def check_fit(kept: Tensor, loss: Any, estimators: NetworkCurvature) -> Buffers:
    """Raises ValueError for another loss or other arguments than `describe_fit` was given; returns its buffers."""
    theirs = json.loads(bytes(kept.tolist()))
    _check_loss(theirs["loss"], _of_loss(loss))
    ours = _of_estimators(estimators)
    for name, learned in theirs["estimators"].items():
        if learned != ours.get(name):
            raise ValueError(
                f"load_state_dict: the state of {name!r} was fitted by {learned}, not by {ours.get(name)}; fit again, "
                "or pass the estimators of the fit"
            )
    return {name: (value, shape) for name, (value, shape) in theirs["buffers"].items()}


def _of_estimators(estimators: NetworkCurvature) -> dict[str, str]:
    """By block: the estimator and those of its arguments that what it learns depends on."""
    return {
        name: f"{type(e).__name__}({', '.join(f'{key}={getattr(e, key)!r}' for key in e.learned_by)})"
        for name, e in estimators.by_block.items()
    }


def _of_loss(loss: Any) -> dict[str, str]:
    if isinstance(loss, str):
        return {"name": loss}
    shown = getattr(loss, "__qualname__", type(loss).__qualname__)
    try:
        return {"function": shown, "code": digest(canonical(described(loss, "loss", travels=True))), "python": _PYTHON}
    except ValueError as error:
        return {"function": shown, "untold": str(error).partition(";")[0]}


def _check_loss(theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    shown = [repr(loss["name"]) if "name" in loss else f"the function {loss['function']}" for loss in (theirs, ours)]
    why = next((loss["untold"] for loss in (theirs, ours) if "untold" in loss), None)
    if "function" in theirs and "function" in ours:
        if why is None and theirs["python"] != ours["python"]:
            why = f"it was fitted by Python {theirs['python']}, and this is {ours['python']}"
        if why is not None:
            warn_outside(
                f"load_state_dict: whether the state was fitted with this loss, {shown[1]}, cannot be told: {why}",
                UserWarning,
            )
            return
    if theirs != ours:
        differs = f"loss {shown[0]}, not with {shown[1]}"
        if shown[0] == shown[1]:
            differs = f"another loss than {shown[1]}: its code, or what that reads or closes over, differs"
        raise ValueError(
            f"load_state_dict: the state was fitted with {differs}. The curvature would be another loss's: fit again, "
            "or take the entry 'fit' out of the state where you know that the two are the same"
        )


def checksums_of(state: Mapping[str, Any]) -> dict[str, int]:
    """A number for every tensor of a model's state."""
    return {name: checksum(value) for name, value in state.items() if isinstance(value, Tensor)}


def buffers_of(model: nn.Module, written: set[str]) -> Buffers:
    """A number for each buffer that the model's state leaves out (persistent=False), and its shape.

    Without those that forward passes were seen to write: caches, counters, tables of sines that grow with the text.
    What they hold follows from what the model was shown.
    """
    buffers = {name: value for name, value in fleeting_buffers(model).items() if name not in written}
    return {name: (checksum(value), str(list(value.shape))) for name, value in buffers.items()}


def changed_buffers(then: Buffers, now: Buffers) -> list[str]:
    """Those of another value. One of another shape, or that is not there, is a cache of other lengths."""
    same = (name for name, (_, shape) in then.items() if name in now and now[name][1] == shape)
    return [name for name in same if now[name] != then[name]]


class _WithoutTensors(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return True if isinstance(obj, Tensor) else None


def check_picklable(name: str, value: Any) -> None:
    """Raises PicklingError, with the name of what pickle cannot take: a function needs one that can be imported."""
    try:
        _WithoutTensors(io.BytesIO()).dump(value)
    except Exception as error:
        shown = getattr(value, "__qualname__", type(value).__qualname__)
        raise pickle.PicklingError(
            f"{name} cannot be pickled: {shown} ({error}). Functions need a name at the top of a module, hooks too; or "
            "keep state_dict(), which an Influence of the same model and arguments loads"
        ) from error
