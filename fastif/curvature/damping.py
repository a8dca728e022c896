"""Damping: the absolute λ on the diagonal, and what is said where it does not suffice."""

from __future__ import annotations

import math
from typing import Literal


class NotPositiveDefinite(ValueError):
    """A damped curvature block has no Cholesky factor; the message names block, pivot and the damping that would do."""


class IllConditioned(ValueError):
    """Solves with a factor in single precision leave too large a residual; the message says what would do."""


def check_damping(damping: float | Literal["auto"]) -> None:
    if damping != "auto" and not (isinstance(damping, (int, float)) and 0 <= damping < math.inf):
        raise ValueError(f"damping must be a finite number >= 0 or 'auto', got {damping!r}")
