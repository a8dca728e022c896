"""run.toml: the options of a run, from which it can be run again."""

import json
from pathlib import Path
from typing import Any

import typer

from fastif.files import write_whole

RUN = "run.toml"
_OF_THE_RUN = ("config", "resume", "quiet")  # no part of what is computed


def read_config(context: typer.Context, config: Path | None) -> Path | None:
    """Has a command take the options of a file where they are not given to it."""
    if config is None:
        return None
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib  # pyright: ignore[reportMissingImports]

    if not config.is_file():
        raise FileNotFoundError(f"no file {config} for --config")
    try:
        options = tomllib.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config} is no TOML: {error}") from error
    known = {str(option.name): option for option in context.command.params if option.name not in _OF_THE_RUN}
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{config}: {context.info_name} has no option {name!r}; it has {', '.join(known)}")
        if isinstance(value, str) and getattr(known[name], "multiple", False):
            options[name] = [value]  # once, of an option that may be repeated
    context.default_map = options
    return config


def write_config(context: typer.Context, folder: Path) -> None:
    """Writes run.toml to a folder that has none: all options, paths in full."""
    path = folder / RUN
    if path.exists():
        return
    given = {
        name: value for name, value in context.params.items() if value not in (None, [], ()) and name not in _OF_THE_RUN
    }
    lines = [f"{name} = {_toml(value)}" for name, value in given.items()]
    begin = f"# fastif {context.info_name} --config {RUN} --out ANOTHER_FOLDER computes the same again"
    write_whole(path, "\n".join([begin, *lines]) + "\n")


def _toml(value: Any) -> str:
    """Strings, numbers, truth values and lists of strings, as JSON writes them: all of these are TOML too."""
    if isinstance(value, Path):
        value = str(value.resolve())
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
