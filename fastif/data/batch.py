"""One batch: which of its parts hold a row per example, and which are the same for all of them.

A batch comes as x, (x,), (x, y), (x1, x2, ..., y) or a mapping, of tensors, arrays, lists and what else a model takes.
`read_batch` decides once what of it can be cut; from then on rows are cut by `rows_of` alone.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Batch = tuple[Any, Any]  # x, and y or None


class Shared:
    """A part of a batch that all its examples share, such as a bank or an adjacency: it goes to the model whole.

    A part whose first axis is not as long as the batch is recognised as shared. One that happens to be as long cannot
    be: wrap it where the batch is made.

    >>> x, _ = read_batch(({"x": torch.zeros(2, 3), "bank": torch.zeros(5, 3)}, torch.tensor([0, 1])), 0, {})
    >>> whole(rows_of(x, torch.tensor([1])))["bank"].shape
    torch.Size([5, 3])
    """

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __repr__(self) -> str:
        return f"Shared({self.value!r})"


class Arguments(tuple):
    """Several inputs: the model is called with all of them."""

    __slots__ = ()


_PARTS = (Tensor, np.ndarray, list, tuple, Shared, Mapping)  # what makes a list or tuple parts of a batch


def read_batch(batch: Any, number: int, held: dict[str, str]) -> Batch:
    """The batch as (x, y), its arrays as tensors, and what its examples share as `Shared`.

    n is the number of labels, or without labels the length of the first tensor. `held` says of every part whether
    batches before told it to be "rows" or "shared"; it is written to.

    Raises ValueError, naming the batch, for x and y of unequal length, and for a part that is rows in one batch and not
    in another; TypeError for what holds no tensor.
    """
    x, y = _pair(_tensors(batch))
    n = _length(x, y, number)

    def marked(path: str, value: Any) -> Any:
        size = _size(value)
        if size is None:
            return value
        told = held.get(path)
        if size == n and told != "shared":
            if n > 1:  # with one example, a part with one row may be either
                held[path] = "rows"
            return value
        if size != n and told == "rows":
            raise ValueError(
                f"data: batch {number} has {n} examples and {size} rows of {path}, which had a row per example in "
                "batches before; if all examples share it, make it fastif.data.Shared(...) where the batch is made"
            )
        if size != n:
            held[path] = "shared"
        return Shared(value)

    if isinstance(x, Tensor):
        if x.dim() == 0 or len(x) != n:
            raise ValueError(f"data: batch {number} has x of shape {list(x.shape)} and {n} labels")
    else:
        x = _mapped(x, "x", marked)
        if not any(size == n for size in map(_size, _leaves(x))):
            raise ValueError(f"data: batch {number} has {n} labels, and no part of x has {n} rows")
    return x, y if isinstance(y, Tensor) else _mapped(y, "y", marked)


def batch_length(x: Any) -> int:
    """Examples in a batch: the first axis of its first tensor that is not shared; a mapping's labels come first."""
    labels = x.get("labels") if isinstance(x, Mapping) else None
    for value in (labels, *_leaves(x)):
        if isinstance(value, Tensor) and value.dim() > 0:
            return len(value)
    raise TypeError(f"data: a batch must be a tensor, or a mapping or tuple of tensors, got {type(x).__name__}")


def rows_of(x: Any, rows: Tensor | slice) -> Any:
    """The examples `rows` of a batch; those of a slice share its memory."""

    def cut(_path: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            which = rows if isinstance(rows, slice) else rows.to(value.device)
            return value[which] if value.dim() else value
        if isinstance(value, list | tuple):  # of strings and the like
            return value[rows] if isinstance(rows, slice) else rebuilt(value, [value[i] for i in rows.tolist()])
        return value

    return _mapped(x, "", cut)


def moved_to(x: Any, device: torch.device) -> Any:
    """x on the device, what is shared too. A copy of what was made in inference mode: no graph may hold that."""

    def move(_path: str, value: Any) -> Any:
        if isinstance(value, Shared):
            return Shared(moved_to(value.value, device))
        if not isinstance(value, Tensor):
            return value
        moved = value.to(device)
        return moved.clone() if moved.is_inference() and not torch.is_inference_mode_enabled() else moved

    return _mapped(x, "", move)


def whole(x: Any) -> Any:
    """The batch as a model or a loss takes it: what is shared without its wrapping."""
    if not any(isinstance(value, Shared) for value in _leaves(x)):
        return x
    return _mapped(x, "", lambda _, value: value.value if isinstance(value, Shared) else value)


def parts_of(x: Any) -> Iterator[tuple[str, Any]]:
    """Every part and where it stands; a list of strings or numbers is one part."""
    found: list[tuple[str, Any]] = []
    _mapped(x, "", lambda path, value: found.append((path, value)))
    return iter(found)


def rebuilt(x: Any, values: list[Any]) -> Any:
    """A list, tuple or named tuple like x."""
    return x._make(values) if hasattr(x, "_make") else type(x)(values)


# ------------------------------------------------------------------------------------------------------------- reading


def _pair(batch: Any) -> Batch:
    if not isinstance(batch, tuple | list):
        return batch, None
    if not batch:
        raise TypeError("a batch must be x, (x,), (x, y) or (x1, x2, ..., y), got 0 parts")
    *inputs, y = (*batch, None) if len(batch) == 1 else batch
    if isinstance(y, list | tuple) and y and all(isinstance(label, int | float) for label in y):
        y = torch.tensor(y)
    return (inputs[0] if len(inputs) == 1 else Arguments(inputs)), y


def _length(x: Any, y: Any, number: int) -> int:
    if isinstance(y, Tensor) and y.dim() > 0:
        return len(y)
    n = batch_length(x)
    label = x.get("labels") if y is None and isinstance(x, Mapping) else y
    if isinstance(label, Tensor) and label.dim() == 0 and n != 1:
        raise ValueError(
            f"data: batch {number} has one label of no axis and {n} rows of x: single examples are no batches "
            "(batch_size=None?)"
        )
    return n


def _tensors(value: Any) -> Any:
    """Arrays of numbers as tensors, wherever they stand."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist() if value.dtype.kind in "OUS" else torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Mapping):
        return {key: _tensors(part) for key, part in value.items()}
    if isinstance(value, list | tuple) and not _is_column(value):
        return rebuilt(value, [_tensors(part) for part in value])
    return value


def _is_column(value: Any) -> bool:
    """Whether a list or tuple holds strings, numbers or other things one by one, and not parts of a batch."""
    return isinstance(value, list | tuple) and not any(isinstance(part, _PARTS) for part in value)


def _size(value: Any) -> int | None:
    """Rows of a part; None where it has none and passes as it is: strings, numbers, what is shared already."""
    if isinstance(value, Tensor):
        return len(value) if value.dim() else None
    return len(value) if _is_column(value) else None


def _mapped(x: Any, path: str, function: Callable[[str, Any], Any]) -> Any:
    """A batch of the same structure, with `function(path, part)` in the place of every part."""
    if isinstance(x, Tensor):  # by far the most frequent
        return function(path, x)
    if isinstance(x, Mapping):
        return {key: _mapped(value, f"{path}[{key!r}]", function) for key, value in x.items()}
    if isinstance(x, list | tuple) and not _is_column(x):
        return rebuilt(x, [_mapped(value, f"{path}[{i}]", function) for i, value in enumerate(x)])
    return function(path, x)


def _leaves(x: Any) -> list[Any]:
    return [value for _, value in parts_of(x)]
