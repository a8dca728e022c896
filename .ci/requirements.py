"""What pyproject.toml asks for, one requirement a line: dependencies and extras are named there and nowhere else.

python .ci/requirements.py build test          the package's own dependencies and those of two extras, but torch
python .ci/requirements.py --alone oracles     the extra's packages, without the package's own dependencies
python .ci/requirements.py --have build test   exit status 0 if all of it is installed, torch too

torch is left to the Makefile's TORCH: on a machine without a GPU that is another build than the one a resolver takes.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def of(extra: str) -> list[str]:
    """An extra's requirements; `fastif[other]` stands for those of the other."""
    found: list[str] = []
    for requirement in PROJECT["optional-dependencies"][extra]:
        other = re.fullmatch(r"fastif\[([\w-]+)\]", requirement)
        found += of(other[1]) if other else [requirement]
    return found


def name_of(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None, requirement
    return found[0]


def applies(requirement: str) -> bool:
    """Whether it is meant for this Python."""
    marker = requirement.partition(";")[2]
    if not marker:
        return True
    from pip._vendor.packaging.markers import Marker

    return Marker(marker).evaluate()


def main(arguments: list[str]) -> None:
    options, extras = [a for a in arguments if a.startswith("--")], [a for a in arguments if not a.startswith("--")]
    wanted = [] if "--alone" in options else list(PROJECT["dependencies"])
    wanted = list(dict.fromkeys(wanted + [requirement for extra in extras for requirement in of(extra)]))
    if "--have" in options:
        for requirement in wanted:
            try:
                if applies(requirement):
                    version(name_of(requirement))
            except PackageNotFoundError:
                sys.exit(1)
        return
    print("\n".join(requirement for requirement in wanted if name_of(requirement) != "torch"))


if __name__ == "__main__":
    main(sys.argv[1:])
