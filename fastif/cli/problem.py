"""What a command computes with: from a script of the user, or from a folder with a model and files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from fastif.cli.arguments import check
from fastif.cli.script import function_named, returned
from fastif.integrations.files import Examples, problem_of
from fastif.model.losses import LOSSES

_FOLDER_BATCH, _SCRIPT_BATCH = 16, 256  # texts are padded to the longest of their batch


class Given(NamedTuple):
    """A model, its loss and data; of files also what people read."""

    model: nn.Module
    loss: str
    train: Any
    query: Any
    train_examples: Examples | None = None
    query_examples: Examples | None = None


def given_by(
    script: str | None,
    loss: str | None,
    *,
    model: Path | None,
    train: Path | None,
    query: Path | None,
    batch_size: int,
    needs: Sequence[str] = ("train", "query"),
    one_length: bool = False,
    **columns: Any,
) -> Given:
    """What a command is given. `needs` says which files it cannot do without; `columns` are those of the files."""
    check_given(script, loss, model=model, train=train, query=query, **columns)
    if model is None:
        assert script is not None
        made, first, second = returned(script, function_named(script))
        return Given(made, loss or "cross_entropy", first, second)
    for name, file in (("train", train), ("query", query)):
        if name in needs and file is None:
            raise ValueError(f"--{name} is needed with a model's folder: a .jsonl or .csv file")
    problem = problem_of(model, train, query, batch_size=batch_size, one_length=one_length, **columns)
    first, second = (None if part is None else part.loader for part in (problem.train, problem.query))
    return Given(problem.model, problem.loss, first, second, problem.train, problem.query)


def check_given(script: str | None, loss: str | None, *, model: Path | None, **files: Any) -> None:
    """Raises ValueError for a script and a folder, for neither, and for what goes with the other."""
    if (script is None) == (model is None):
        what = "both" if script is not None else "neither"
        raise ValueError(f"give a script (MODULE:FUNCTION), or a folder with a model (--model), got {what}")
    if loss is not None:
        check("loss", loss, loss in LOSSES, f"one of {', '.join(LOSSES)}")
        check("loss", loss, model is None, "left out with --model, whose training had one")
    for name, value in files.items():
        check(name.replace("_", "-"), value, value is None or model is not None, "left out without --model")


def batch_of(batch_size: int | None, model: Path | None) -> int:
    """Examples in a batch, where nothing was said."""
    size = (_SCRIPT_BATCH if model is None else _FOLDER_BATCH) if batch_size is None else batch_size
    check("batch-size", size, size >= 1, ">= 1")
    return size
