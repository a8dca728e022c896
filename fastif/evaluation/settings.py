"""What experiments are asked for, from names and numbers: samplers, budgets, seeds, classes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any

from fastif import samplers as sampling

SAMPLERS = ("random", "prefix", "stratified", "intermediate_distance", "k_center", "logit", "leverage", "certified")

Sampler = Callable[..., Any]


def choose_samplers(samplers: Iterable[str | tuple[str, Sampler]]) -> list[tuple[str, Sampler]]:
    """Names as they are in `fastif.samplers` ("-" passes for "_") become pairs (name, function); pairs stay.

    Raises ValueError for a name that is none of `SAMPLERS`, listing them, for a name given twice, and for none at all,
    TypeError for what is neither a name nor a pair.
    """
    chosen: list[tuple[str, Sampler]] = []
    for sampler in _entries("samplers", "names or pairs (name, function)", samplers):
        if isinstance(sampler, str):
            name = sampler.strip().replace("-", "_")
            if name not in SAMPLERS:
                raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
            chosen.append((name, getattr(sampling, name)))
        elif isinstance(sampler, tuple | list) and [isinstance(part, str) for part in sampler] == [True, False]:
            name, function = sampler
            if not callable(function):
                raise TypeError(f"the sampler {name} must be a function, got {function!r}")
            chosen.append((name, function))
        else:
            raise TypeError(f"samplers must be names or pairs (name, function), got {sampler!r}")
    names = [name for name, _ in chosen]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"samplers must be given, each name once, got {', '.join(names) or 'none'}")
    return chosen


def check_budgets(k: int | str | Iterable[int | str], n: int) -> list[int]:
    """Numbers of examples from numbers and percentages of n, in the order given, repeats left out.

    >>> check_budgets(["1%", 500, "0.5%"], n=50_000)
    [500, 250]
    """
    budgets: list[int] = []
    rule = 'a number of examples or a percentage such as "0.5%"'
    for entry in _entries("k", rule, k):
        text = entry.strip() if isinstance(entry, str) else str(*integers("k", rule, [entry]))
        try:
            share = text.endswith("%")
            number = float(text[:-1]) * n / 100 if share else int(text)
        except ValueError:
            raise ValueError(f"k must be {rule}, got {entry!r}") from None
        if not 0 < number <= n:
            raise ValueError(f"k must be in [1, n={n}] or (0%, 100%], got {entry!r}")
        budgets.append(max(1, round(number)))
    if not budgets:
        raise ValueError("k must be given, got none")
    return list(dict.fromkeys(budgets))


_MOST_SEEDS = 10**6


def check_seeds(seeds: int | Iterable[int]) -> list[int]:
    """The seeds 0 .. seeds - 1, or the seeds themselves."""
    rule = "a number >= 1, or distinct numbers >= 0"
    chosen = integers("seeds", rule, _entries("seeds", rule, seeds))
    if isinstance(seeds, Integral):
        chosen = list(range(min(chosen[0], _MOST_SEEDS + 1)))
    if len(chosen) > _MOST_SEEDS or max(chosen, default=0) >= 2**43:  # times 1,000,003 they must fit in 63 bits
        raise ValueError(f"seeds must be at most {_MOST_SEEDS}, each below 2^43, got {seeds!r}")
    if not chosen or min(chosen) < 0 or len(set(chosen)) < len(chosen):
        raise ValueError(f"seeds must be {rule}, got {seeds!r}")
    return chosen


def check_classes(classes: Iterable[int] | None, c: int) -> list[int]:
    """The classes to remove, ascending; None means all c."""
    if isinstance(classes, Integral):
        raise TypeError(f"classes must be a list of numbers, got {classes!r}")
    chosen = range(c) if classes is None else integers("classes", "numbers", _entries("classes", "numbers", classes))
    chosen = sorted(set(chosen))
    if outside := [str(label) for label in chosen if not 0 <= label < c]:
        raise ValueError(f"classes must be in [0, c={c}), got {', '.join(outside)}")
    if not chosen:
        raise ValueError("classes must be given, got none")
    return chosen


def _entries(name: str, rule: str, given: Any) -> list[Any]:
    """What was given, as a list: of one entry for a string or an integer."""
    if isinstance(given, str | Integral):
        return [given]
    if not isinstance(given, Iterable):
        raise TypeError(f"{name} must be {rule}, got {given!r}")
    return list(given)


def integers(name: str, rule: str, given: list[Any]) -> list[int]:
    """Integers, numpy's among them, as int."""
    try:
        return [operator.index(value) for value in given]
    except TypeError:
        raise TypeError(f"{name} must be {rule}, got {', '.join(map(repr, given))}") from None
