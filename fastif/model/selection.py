"""Which of a model's parameters are to be covered: what `layers=` says."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

LEFT_OUT = "layers= leaves"
FROZEN = "is not trained (requires_grad is False)"


class Selection:
    """`layers`: "trained" (the default): parameters that require gradients, or all where none does; "all"; or names and
    patterns of modules, blocks and parameters. Those that begin with "!" leave out what they match: by themselves of
    what is trained, and beside others of what these take."""

    def __init__(self, model: nn.Module, layers: str | Sequence[str] | None):
        given = ["trained"] if layers is None else [layers] if isinstance(layers, str) else list(layers)
        self._without = [pattern[1:] for pattern in given if pattern.startswith("!")]
        wanted = [pattern for pattern in given if not pattern.startswith("!")] or ["trained"]
        self._patterns = ["*" if pattern == "all" else pattern for pattern in wanted if pattern != "trained"]
        trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
        self.trained = trained or set(model.parameters())
        self._takes_trained = "trained" in wanted
        self._unused = {*self._patterns, *self._without}

    @property
    def chosen(self) -> bool:
        """Whether the caller named what is to be covered."""
        return not self._takes_trained

    def names(self, name: str) -> bool:
        """Whether the caller named this very layer."""
        return name in self._patterns

    def takes(self, names: Sequence[str], parameters: Sequence[Tensor]) -> str | None:
        """None where parameters under any of these names are wanted, else why not."""

        def matching(patterns: Sequence[str]) -> list[str]:
            found = [pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)]
            self._unused.difference_update(found)
            return found

        without, within = matching(self._without), matching(self._patterns)
        if without:
            return f"{LEFT_OUT} {names[0]!r} out"
        if within or (self._takes_trained and all(parameter in self.trained for parameter in parameters)):
            return None
        return FROZEN if self._takes_trained else f"{LEFT_OUT} {names[0]!r} out"

    def check(self, known: Sequence[str]) -> None:
        """Raises ValueError for a pattern that matched nothing."""
        if self._unused:
            there = ", ".join(name for name in known if name) or "none"
            raise ValueError(
                f"capture: layers={min(self._unused)!r} names no layer with parameters; there are: {there}"
            )

    def splits(self, parameters: Sequence[Tensor]) -> bool:
        """Whether of one module's parameters some are trained and others not, and that decides."""
        return self._takes_trained and len({parameter in self.trained for parameter in parameters}) > 1
