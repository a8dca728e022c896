"""Mislabel detection: does a score find the examples whose labels are wrong?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastif.evaluation.correlation import ranks


class Detection(NamedTuple):
    """What `mislabel_detection` found."""

    auc: float  # probability that a wrong label scores above a right one, ties half; 0.5 by chance
    precision: float  # share of wrong labels among the `checked` highest scores
    checked: int
    wrong: float  # share of wrong labels among all: the precision of chance


def mislabel_detection(suspicion: Tensor, given: Tensor, true: Tensor, *, share: float = 0.1) -> Detection:
    """AUC and precision of a suspicion [n] at telling labels `given` [n] that differ from the `true` ones [n].

    Higher is more suspicious: the self-influence (how much an example's loss would rise without it: a wrong label is
    learned from nobody else), its loss, or any other number. `precision` is that of the round(share·n) highest, ties to
    the lower index. docs/math.md (21).

    >>> found = mislabel_detection(torch.tensor([0.1, 0.9, 0.2]), torch.tensor([0, 1, 2]), torch.tensor([0, 0, 2]))
    >>> found.auc, found.checked, found.precision
    (1.0, 1, 1.0)

    Raises ValueError for shapes that differ, a suspicion that is not finite, and labels that are all right or all
    wrong: there is nothing to tell apart.
    """
    suspicion, given, true = (torch.as_tensor(x).detach().cpu() for x in (suspicion, given, true))
    n = len(suspicion) if suspicion.dim() else 0
    shapes = {name: list(x.shape) for name, x in (("suspicion", suspicion), ("given", given), ("true", true))}
    if n == 0 or any(shape != [n] for shape in shapes.values()):
        raise ValueError(f"mislabel_detection: all must be [n] of one length, got {shapes}")
    if not 0 < share <= 1:
        raise ValueError(f"mislabel_detection: share must be in (0, 1], got {share!r}")
    broken = (~suspicion.isfinite()).nonzero()
    if len(broken):
        row = int(broken[0])
        raise ValueError(f"mislabel_detection: suspicion must be finite, row {row} is {float(suspicion[row])}")
    wrong = given != true
    positives = int(wrong.sum())
    if positives in (0, n):
        raise ValueError(f"mislabel_detection: {positives} of {n} labels are wrong: there is nothing to tell apart")
    above = float(ranks(suspicion.double())[wrong].sum()) - positives * (positives + 1) / 2  # Mann & Whitney's U
    checked = max(1, round(share * n))
    top = suspicion.sort(descending=True, stable=True).indices[:checked]
    return Detection(above / (positives * (n - positives)), float(wrong[top].double().mean()), checked, positives / n)
