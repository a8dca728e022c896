"""The Makefile lists its commands, and what is installed is named in pyproject.toml alone."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = (ROOT / "pyproject.toml").read_text()


def requirements(*arguments):
    command = [sys.executable, str(ROOT / ".ci" / "requirements.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_alone_lists_every_command():
    printed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (targets,) = re.findall(r"^\.PHONY: (.*?)(?<!\\)\n", MAKEFILE, flags=re.DOTALL | re.MULTILINE)
    for target in targets.replace("\\", "").split():
        assert re.search(rf"^  {target} +\S", printed, flags=re.MULTILINE), target


def test_requirements_are_those_of_the_extras():
    found = requirements("build", "check").stdout.split("\n")
    assert {"numpy", "tqdm", "ninja", "pytest", "pytest-xdist", "typer", "scipy"} <= set(found)
    assert not any(line.startswith(("torch", "fastif")) for line in found)
    alone = requirements("--alone", "oracles-alone").stdout.split()
    assert "kronfluence==1.0.1" in alone
    assert not {"numpy", "tqdm"} & set(alone)
    assert requirements("--have").returncode == 0  # fastif's own dependencies are here, or this test would not run


def test_packages_are_named_in_pyproject_alone():
    names = re.findall(r'"([A-Za-z][\w-]+)(?:[=><\[][^"]*)?"', PROJECT[: PROJECT.index("[project.scripts]")])
    packages = {name for name in names if name not in ("fastif", "version", "torch", "LICENSE", "BSD-3-Clause")}
    rules = MAKEFILE + (ROOT / "csrc" / "link_cuda.sh").read_text() + (ROOT / ".github/workflows/ci.yml").read_text()
    installs = [line for line in rules.splitlines() if "install" in line]
    assert len(packages) > 20
    for package in packages:
        assert not any(re.search(rf"[ \"]{re.escape(package)}\b(?!\.)", line) for line in installs), package
