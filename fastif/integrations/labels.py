"""Labels of a file as a classifier's loss takes them."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from fastif.integrations.model_folder import ModelFolder


class Label:
    """What an example is labelled with.

    Attributes:
        target: the number of its class; of a model of numbers the number or numbers; of one whose examples may have
            several labels, 0 or 1 for each class.
        shown: what people read.
    """

    def __init__(self, given: ModelFolder, value: Any, where: str):
        """Raises ValueError, naming the place and the value, for what is no label of the folder's model."""
        outputs = int(given.model.config.num_labels)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        self.target: int | float | list[float]
        self.shown = str(value)
        if given.loss == "bce":
            self.target = _several(given.labels, outputs, value, where)
            by_place = {place: name for name, place in given.labels.items()}
            names = [by_place.get(place, str(place)) for place, mark in enumerate(self.target) if mark]
            self.shown = ", ".join(names) or "none"
        elif given.loss != "mse":
            self.target = _class(given.labels, value, where)
        elif outputs > 1:
            self.target = _numbers(outputs, value, where)
        else:
            self.target = _number(value, where)


def _class(classes: Mapping[str, int], value: Any, where: str) -> int:
    """The number of a class that is given by its name or its number."""
    if isinstance(value, str) and value in classes:
        return classes[value]
    if isinstance(value, int) and not isinstance(value, bool) and classes.get(str(value), value) != value:
        raise ValueError(
            f"{where}: the label {value!r} is the number of a class, and {str(value)!r} the name of number "
            f"{classes[str(value)]}: write names as strings"
        )
    number = int(value) if isinstance(value, str) and value.isdecimal() and value.isascii() else value
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(classes):
        return number
    known = list(classes)
    few = ", ".join(map(repr, known[:5])) + (f" and {len(known) - 5} more" if len(known) > 5 else "")
    raise ValueError(f"{where}: the label {value!r} is none of the model's {len(known)}: {few}")


def _several(classes: Mapping[str, int], outputs: int, value: Any, where: str) -> list[float]:
    """0 or 1 for each class, of a list of classes or of one that holds these numbers."""
    found = _list(value, where, 'the classes of an example, ["a", "b"]')
    if found and len(found) == outputs and all(one in (0, 1) for one in found):
        if _may_be_classes(found):
            raise ValueError(
                f"{where}: the labels {value!r} may be the numbers of classes, or 0 and 1 for each class: write the "
                "classes by their names, or 0.0 and 1.0"
            )
        return [float(one) for one in found]
    places = [_class(classes, one, where) for one in found]
    if len({*places}) < len(places):
        raise ValueError(f"{where}: the labels {value!r} name a class twice")
    return [float(place in places) for place in range(outputs)]


def _may_be_classes(numbers: list[Any]) -> bool:
    """Whether zeros and ones could be the numbers of classes, each of them once."""
    return all(type(one) is int for one in numbers) and len({*numbers}) == len(numbers)


def _numbers(outputs: int, value: Any, where: str) -> list[float]:
    found = _list(value, where, f"{outputs} numbers, as many as the model has outputs")
    if len(found) != outputs:
        raise ValueError(f"{where}: the label must be {outputs} numbers, got {len(found)}")
    return [_number(one, where) for one in found]


def _number(value: Any, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: the label must be a number, got {value!r}") from None


def _list(value: Any, where: str, what: str) -> list[Any]:
    """A list, or one that stands in a CSV file as JSON or Python write it."""
    found = value
    if isinstance(value, str):
        for read in (json.loads, ast.literal_eval):
            try:
                found = read(value)
                break
            except (ValueError, SyntaxError):
                continue
    if not isinstance(found, list):
        raise ValueError(f"{where}: the label must be a list of {what}, got {value!r}")
    return found
