"""Iterations: what they are asked for, how they are shown, and the warning where they did not suffice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastif.curvature.protocol import FitData
from fastif.progress import tqdm


class NotConverged(UserWarning):
    """An iterative solver ran out of steps; the message tells the residual that is left."""


@contextmanager
def iterating(op: str, steps: int, data: FitData) -> Iterator[Callable[[float], None]]:
    """A progress bar of at most so many steps; each is told with the residual that it begins or ends with."""
    with tqdm(total=steps, desc=op, leave=False, disable=not data.progress) as bar:

        def stepped(residual: float) -> None:
            bar.set_postfix(residual=f"{residual:.1e}", refresh=False)
            bar.update()

        yield stepped


def silent(residual: float) -> None:
    del residual


def check_iterations(op: str, tolerance: float, **counts: int) -> None:
    if not 0 < tolerance < 1:
        raise ValueError(f"{op}: tolerance must be in (0, 1), got {tolerance}")
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{op}: {name} must be an integer >= 1, got {value!r}")
