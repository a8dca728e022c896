"""Estimators shown as they were called."""

from __future__ import annotations

import inspect
from typing import Any


class Called:
    """Shows itself by its name and the arguments of its constructor: EKFAC(damping=0.001, fisher='exact', …)."""

    synonyms: tuple[str, ...] = ()  # arguments that say what another one shows already

    def __repr__(self) -> str:
        return as_called(self)


def as_called(estimator: Any) -> str:
    """Shows any estimator so; the name of the layer that it was fitted on is no argument of interest."""
    hidden = ("name", *getattr(estimator, "synonyms", ()))
    names = [n for n in inspect.signature(type(estimator)).parameters if n not in hidden and hasattr(estimator, n)]
    values = [getattr(estimator, name) for name in names]
    texts = [as_called(value) if hasattr(value, "observe") else repr(value) for value in values]
    return f"{type(estimator).__name__}({', '.join(f'{n}={text}' for n, text in zip(names, texts, strict=True))})"
