"""What samplers return, and what they have in common: checks, rows in blocks, shares of classes."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from fastif.ops._checks import first_nonfinite_row

_LARGEST = 1e140  # n d squares of it still sum below the float64 maximum
_BLOCK = 2**22  # entries of a block of rows, 32 MiB in float64


class Subset(NamedTuple):
    """Examples and the weights of their curvatures; any object with these two attributes can be passed as a subset."""

    indices: Tensor  # int64 [k], distinct
    weights: Tensor  # float64 [k], >= 0

    def __repr__(self) -> str:
        return f"Subset({shown_weights(self.indices, self.weights)})"


def shown_weights(indices: Tensor, weights: Tensor) -> str:
    """How many examples, and how they weigh."""
    if not len(indices):
        return "no examples"
    low, high, total = float(weights.min()), float(weights.max()), float(weights.sum())
    each = f"weights {low:.3g}" + (f" to {high:.3g}" if high > low else " each")
    return f"{len(indices):,} examples, {each}, {total:.3g} in all"


def check_subset(subset: Any, n: int) -> Subset:
    """A subset of n examples, on the CPU with float64 weights, or an error that names the rule it breaks.

    `subset` is any object with `indices` (int64 [k], distinct, in [0, n), k >= 1) and `weights` ([k], finite, >= 0).
    Raises TypeError for what is not such an object, ValueError for values that break a rule.

    >>> check_subset(Subset(torch.tensor([0, 3]), torch.tensor([0.5, 0.5])), n=3)
    Traceback (most recent call last):
        ...
    ValueError: subset: indices must be in [0, n=3), got 3
    """
    if not (hasattr(subset, "indices") and hasattr(subset, "weights")):
        raise TypeError(f"subset: must have indices and weights, got {type(subset).__name__}")
    indices = torch.as_tensor(subset.indices).detach().cpu()
    weights = torch.as_tensor(subset.weights).detach().cpu()
    if indices.dim() != 1:
        raise ValueError(f"subset: indices must be [k], got shape {list(indices.shape)}")
    if indices.numel() == 0:
        raise ValueError("subset: indices must not be empty")
    if indices.dtype != torch.int64:
        raise TypeError(f"subset: indices must be int64, got {indices.dtype}")
    outside = indices[(indices < 0) | (indices >= n)]
    if outside.numel():
        raise ValueError(f"subset: indices must be in [0, n={n}), got {int(outside[0])}")
    values, counts = indices.unique(return_counts=True)
    if len(values) < len(indices):
        raise ValueError(f"subset: indices must be distinct, {int(values[counts > 1][0])} appears more than once")
    if weights.shape != indices.shape:
        raise ValueError(f"subset: weights must be [k={len(indices)}], got shape {list(weights.shape)}")
    if not weights.is_floating_point():
        raise TypeError(f"subset: weights must be floating point, got {weights.dtype}")
    weights = weights.double()
    broken = (~(weights.isfinite() & (weights >= 0))).nonzero()
    if len(broken):
        i = int(broken[0])
        raise ValueError(f"subset: weights must be finite and >= 0, entry {i} is {float(weights[i])}")
    return Subset(indices, weights)


def allocate(labels: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels renumbered to 0, 1, ... without gaps, class sizes, and the picks of each class: k shared out in proportion
    to the sizes by largest remainder, in integers (ties: the lower class)."""
    _, labels, counts = labels.unique(return_inverse=True, return_counts=True)
    n = len(labels)
    picks = k * counts // n
    remainders = k * counts % n
    picks[remainders.argsort(descending=True, stable=True)[: k - int(picks.sum())]] += 1
    return labels, counts, picks


def class_weights(indices: Tensor, labels: Tensor, counts: Tensor, picks: Tensor) -> Subset:
    """Weights by which the picks of a class carry the class's share among the classes that have picks."""
    indices = indices.sort().values
    n = int(counts[picks > 0].sum())
    return Subset(indices, (counts.double() / picks / n)[labels[indices]])


def equal_weights(indices: Tensor) -> Subset:
    return Subset(indices.sort().values, torch.full((len(indices),), 1 / len(indices), dtype=torch.float64))


def block_size(width: int) -> int:
    """How many rows of `width` entries are walked at a time."""
    return max(1, _BLOCK // width)


def blocks(x: Tensor) -> Iterator[Tensor]:
    """The rows of x in order, some at a time, in float64 on the CPU: the same bits whatever the device of x."""
    for block in x.split(block_size(x.shape[1])):
        yield block.to("cpu", torch.float64)


def check_matrix(name: str, what: str, x: Tensor, columns: str, n: int | None = None) -> Tensor:
    x = check_shape(name, what, x, f"[n, {columns}]")
    if n is not None and len(x) != n:
        raise ValueError(f"{name}: {what} must have n={n} rows, got {len(x)}")
    check_finite(name, what, x)
    return x


def check_shape(name: str, what: str, x: Tensor, axes: str) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: {what} must be a floating-point tensor, got {got}")
    if x.dim() != 2:
        raise ValueError(f"{name}: {what} must be {axes}, got shape {list(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"{name}: {what} must have at least one row and one column, got shape {list(x.shape)}")
    return x.detach()


def check_finite(name: str, what: str, x: Tensor, first_row: int = 0) -> None:
    """first_row: the index of row 0 of x among all rows."""
    row = first_nonfinite_row(x)
    if row is not None:
        raise ValueError(f"{name}: {what} must be finite, row {first_row + row} holds NaN or Inf")
    if x.dtype == torch.float64 and (largest := max(abs(float(v)) for v in x.aminmax())) > _LARGEST:
        raise ValueError(f"{name}: |{what}| must be at most {_LARGEST:g} (squares overflow), got {largest:g}")


def check_labels(name: str, labels: Tensor, n: int | None = None, classes: int | None = None) -> Tensor:
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    if not isinstance(labels, Tensor) or labels.dtype not in integers:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{name}: labels must be an integer tensor, got {got}")
    if labels.dim() != 1:
        raise ValueError(f"{name}: labels must be [n], got shape {list(labels.shape)}")
    if len(labels) == 0:
        raise ValueError(f"{name}: labels must not be empty")
    if n is not None and len(labels) != n:
        raise ValueError(f"{name}: labels must have n={n} entries, got {len(labels)}")
    labels = labels.detach().to("cpu", torch.int64)
    outside = ((labels < 0) | (labels >= classes) if classes is not None else labels < 0).nonzero()
    if len(outside):
        rule = ">= 0" if classes is None else f"in [0, c={classes})"
        raise ValueError(f"{name}: labels must be {rule}, row {int(outside[0])} is {int(labels[outside[0]])}")
    return labels


def check_generator(name: str, generator: Generator | None) -> None:
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"{name}: generator must be a CPU generator, got one on {generator.device}")
