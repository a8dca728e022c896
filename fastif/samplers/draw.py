"""Any sampler, called with what it needs of a data set: the one way in which the library draws from samplers."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Generator, Tensor

from fastif.samplers.subset import Subset, check_subset

Sampler = Callable[..., Any]
_FROM_A_PASS = ("features", "points", "logits", "labels")  # what `fastif.extract` brings; points are the features
_KNOWN = ("n", *_FROM_A_PASS, "generator")


def draw(
    sampler: Sampler,
    *,
    features: Tensor | None = None,
    logits: Tensor | None = None,
    labels: Tensor | None = None,
    n: int | None = None,
    generator: Generator | None = None,
    op: str = "draw",
) -> Subset:
    """The subset that a sampler draws from a data set of n examples, checked.

    `sampler` is a function whose arguments are among n, features, points (the features), logits, labels and generator,
    or a `functools.partial` that binds the others; what is bound stays bound. n can be left out beside features, logits
    or labels. `op` opens the messages of errors. Raises ValueError where the sampler needs something else, or features,
    logits or labels that are not there.

    >>> import torch
    >>> from fastif.samplers import prefix
    >>> x = torch.eye(4)
    >>> tuple(draw(partial(prefix, k=2), features=x, logits=x))
    (tensor([0, 1]), tensor([0.5000, 0.5000], dtype=torch.float64))
    """
    seen = {"features": features, "logits": logits, "labels": labels}
    if n is None:
        n = next((len(values) for values in seen.values() if values is not None), None)
    if n is None:
        raise ValueError(f"{op}: give n where there are no features, logits or labels")
    return check_subset(call_sampler(sampler, n, seen, generator, op), n)


def call_sampler(
    sampler: Sampler, n: int, seen: Mapping[str, Tensor | None], generator: Generator | None, op: str
) -> Any:
    """What a sampler returns for n examples of which these features, logits and labels were seen; see `draw`."""
    known: dict[str, Any] = {"n": n, **seen, "points": seen.get("features"), "generator": generator}
    known["progress"] = False  # samplers that are called on their own show bars, but not within another job
    name, given = name_of(sampler), {}
    for parameter in _parameters(sampler):
        needed = parameter.default is parameter.empty
        if parameter.name in _FROM_A_PASS and known.get(parameter.name) is None:
            if needed:
                raise ValueError(f"{op}: {name} needs {parameter.name}, and the data has none")
        elif parameter.name in known:
            given[parameter.name] = known[parameter.name]
        elif needed:
            raise ValueError(
                f"{op}: {name} needs {parameter.name}, which is none of {', '.join(_KNOWN)}: "
                f"bind it with functools.partial({name}, {parameter.name}=...)"
            )
    return sampler(**given)


def needs_pass(sampler: Sampler) -> bool:
    """Whether a sampler takes features, logits or labels: what a pass through the model brings."""
    return any(parameter.name in _FROM_A_PASS for parameter in _parameters(sampler))


def missing_inputs(sampler: Sampler, seen: Mapping[str, Tensor]) -> list[str]:
    """Which of features, logits and labels a sampler cannot do without, and are not there."""
    needed = [parameter.name for parameter in _parameters(sampler) if parameter.default is parameter.empty]
    inputs = ["features" if name == "points" else name for name in needed if name in _FROM_A_PASS]
    return [name for name in inputs if name not in seen]


def name_of(sampler: Sampler) -> str:
    function = sampler.func if isinstance(sampler, partial) else sampler
    return getattr(function, "__name__", type(function).__name__)


def _parameters(sampler: Sampler) -> list[inspect.Parameter]:
    """What may be given to it by name and is not bound yet."""
    bound = sampler.keywords if isinstance(sampler, partial) else {}
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(sampler).parameters.values()
    return [parameter for parameter in found if parameter.name not in bound and parameter.kind not in several]
