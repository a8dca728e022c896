"""The command line: `fastif scores`, `index`, `query`, `remove`, `class-removal`, `sample`, `info`.

Whatever the user can get wrong ends in one line on stderr and exit code 2; an interrupted job in exit code 130; an
error in a script of the user in its traceback and exit code 1.
"""

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as missing:
    sys.exit(f"error: the command line needs {missing.name}: pip install 'fastif[cli]'")

from fastif._version import __version__
from fastif.cli.arguments import Interrupted, ScriptError
from fastif.cli.class_removal import class_removal_command
from fastif.cli.index import index_command, print_index, query_command
from fastif.cli.processes import check_divided, ranks_of_torchrun
from fastif.cli.remove import remove_command
from fastif.cli.sample import sample_command
from fastif.cli.scores import scores_command
from fastif.measure import MEMORY_BY
from fastif.ops import build_info
from fastif.ranks import RankFailed, Ranks

app = typer.Typer(
    name="fastif",
    help="Which training examples made a model behave so, and what would it be without them?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    with ranks_of_torchrun() as ranks:
        # All are told of an error of one, and the first tells the user.
        return _run(arguments, ranks, _errors if ranks.rank == 0 else Console(quiet=True))


def _run(arguments: Sequence[str] | None, ranks: Ranks, errors: Console) -> int:
    try:
        with ranks.together("fastif"):
            code = app(args=None if arguments is None else list(arguments), standalone_mode=False)
            if code == 130:  # what typer makes of a KeyboardInterrupt
                raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except typer.Exit as end:
        return end.exit_code
    except (KeyboardInterrupt, typer.Abort, Interrupted) as end:
        errors.print(f"interrupted: {end}" if isinstance(end, Interrupted) else "interrupted")
        return 130
    except ScriptError as error:
        if error.__cause__ is not None:  # another rank's script has none here: that rank prints it
            _print_traceback(error.__cause__)
        return 1
    except (ValueError, OSError, ModuleNotFoundError, torch.OutOfMemoryError) as error:
        errors.print(f"error: {_one_line(str(error))}")
        return 2
    except RankFailed as error:  # of the one that failed or is missing, whichever rank says so
        _errors.print(f"error: {_one_line(str(error))}")
        return 1
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own errors: an unknown option, a value of the wrong type
            raise
        message = _one_line(error.format_message())  # pyright: ignore[reportAttributeAccessIssue]
        if message:  # `fastif` alone has printed its help, and has nothing to add
            errors.print(f"error: {message}")
        return 2


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _print_traceback(error: BaseException) -> None:
    """As Python would print it had it run the script: from its first frame there on."""
    trace, own = error.__traceback__, str(Path(__file__).parent)
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith(own) and "importlib" not in file:
            break
        trace = trace.tb_next
    traceback.print_exception(type(error), error, trace)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fastif {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
) -> None:
    check_divided(context.invoked_subcommand)


app.command("scores")(scores_command)
app.command("index")(index_command)
app.command("query")(query_command)
app.command("remove")(remove_command)
app.command("class-removal")(class_removal_command)
app.command("sample")(sample_command)


@app.command("info")
def info_command(
    folder: Annotated[Path | None, typer.Argument(help="An index: what it holds.", show_default=False)] = None,
) -> None:
    """Versions, and what was built; or what an index holds."""
    if folder is not None:
        print_index(folder)
        return
    facts = {
        "fastif": __version__,
        "python": sys.version.split()[0],
        **build_info(),
        "memory_by": MEMORY_BY,
    }
    for name, value in facts.items():
        print(f"{name:<10} {value}")
