"""Any sampler, called with what it needs of a data set."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Generator, Tensor

from fastif.samplers.subset import Subset, check_subset


def draw(
    sampler: Callable[..., Any],
    *,
    features: Tensor,
    logits: Tensor,
    labels: Tensor | None = None,
    generator: Generator | None = None,
) -> Subset:
    """The subset that a sampler draws from a data set, checked.

    `sampler` is a function whose arguments are among n, features, points (the features), logits, labels and generator,
    or a `functools.partial` that binds the others; what is bound stays bound. Raises ValueError where the sampler
    needs something else, or labels that the data does not have.

    >>> import torch
    >>> from fastif.samplers import prefix
    >>> x = torch.eye(4)
    >>> draw(partial(prefix, k=2), features=x, logits=x)
    Subset(indices=tensor([0, 1]), weights=tensor([0.5000, 0.5000], dtype=torch.float64))
    """
    known = {
        "n": len(features),
        "features": features,
        "points": features,
        "logits": logits,
        "labels": labels,
        "generator": generator,
    }
    function = sampler.func if isinstance(sampler, partial) else sampler
    bound = sampler.keywords if isinstance(sampler, partial) else {}
    name = getattr(function, "__name__", type(function).__name__)
    given = {}
    for parameter in inspect.signature(sampler).parameters.values():
        needed = parameter.default is parameter.empty
        if parameter.name in bound or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name == "labels" and labels is None:
            if needed:
                raise ValueError(f"draw: {name} needs labels, and the data has none")
        elif parameter.name in known:
            given[parameter.name] = known[parameter.name]
        elif needed:
            raise ValueError(
                f"draw: {name} needs {parameter.name}, which is none of {', '.join(known)}: "
                f"bind it with functools.partial({name}, {parameter.name}=...)"
            )
    return check_subset(sampler(**given), len(features))
