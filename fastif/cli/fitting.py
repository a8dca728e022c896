"""What the commands that fit a curvature share: their estimators, a fit that is kept in a file, tables of the best."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fastif.cli.arguments import check
from fastif.cli.problem import Given
from fastif.curvature import (
    CG,
    EKFAC,
    KFAC,
    Arnoldi,
    DataInf,
    Diagonal,
    ExactBlock,
    Identity,
    LiSSA,
    RandomProjection,
    TrainingDamping,
)
from fastif.data.tensor_files import load_tensors, save_tensors
from fastif.influence.influence import Influence
from fastif.influence.rows import top_rows, write_rows
from fastif.influence.score_job import fit_settings
from fastif.integrations.files import Examples
from fastif.journal import refuse_differences

FISHERS = ("exact", "monte_carlo", "empirical")
CURVATURES: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {  # the estimator, and what --fisher may be
    "ekfac": (EKFAC, FISHERS),
    "kfac": (KFAC, FISHERS),
    "diagonal": (Diagonal, FISHERS),
    "identity": (Identity, ()),
    "exact": (ExactBlock, FISHERS),
    "cg": (CG, ("exact",)),
    "lissa": (LiSSA, ("exact",)),
    "arnoldi": (Arnoldi, ("exact",)),
    "data-inf": (DataInf, ("empirical",)),
    "random-projection": (RandomProjection, FISHERS),
}
TOP = 10  # training examples for each query, where nothing was said and there are so many
CURVATURE = "curvature.safetensors"  # in the folder of the scores
SHOWN = 5  # queries, and training examples of each, in the table


def damping_of(damping: str | None, time: float | None, decay: float | None) -> float | str | TrainingDamping | None:
    """What --damping and the options that go with it ask for."""
    for name, given in (("training-time", time), ("weight-decay", decay)):
        check(name, given, given is None or damping == "training", "left out without --damping training")
    if damping == "training":
        if time is None:
            raise ValueError("--damping training needs --training-time")
        return TrainingDamping(time, decay or 0.0)
    try:
        return damping if damping in (None, "auto") else float(damping)
    except ValueError:
        raise ValueError(f"--damping must be a number >= 0, auto or training, got {damping}") from None


def estimator_of(curvature: str, damping: Any, fisher: str | None, seed: int) -> Any:
    """The estimator, with its own defaults for what is not given."""
    check("curvature", curvature, curvature in CURVATURES, f"one of {', '.join(CURVATURES)}")
    check("fisher", fisher, fisher is None or fisher in FISHERS, f"one of {', '.join(FISHERS)}")
    make, fishers = CURVATURES[curvature]
    rule = f"{' or '.join(fishers) or 'left out'} with --curvature {curvature}"
    check("fisher", fisher, fisher is None or fisher in fishers, rule)
    options: dict[str, Any] = {}
    if damping is not None:
        check("damping", damping, make is not Identity, f"left out with --curvature {curvature}")
        options["damping"] = damping
    if make is RandomProjection:
        options["seed"] = seed
    if len(fishers) > 1 and fisher is not None:
        options["fisher"] = fisher
    return make(**options)


def fisher_of(fisher: str | None, curvature: str, loss: str) -> str | None:
    """--fisher, where nothing was said and the exact one of a loss of tokens would take a pass for each of them."""
    tokens = loss == "causal_lm" and curvature in ("ekfac", "kfac", "diagonal", "exact")
    return "monte_carlo" if fisher is None and tokens else fisher


# ----------------------------------------------------------------------------------------------------------- curvature


def fit_or_load(
    influence: Influence,
    train: Any,
    stored: Path,
    resume: bool,
    picker: tuple[str, Callable[..., Any]] | None,
    k: int | None,
    key: str | None,
) -> bool:
    """Fits the curvature and keeps it in a file, or takes it from there: whether it was there."""
    name = None if picker is None else picker[0]
    settings = {**fit_settings(influence.setup, train, key), "sampler": name, "k": k}
    ranks = influence.ranks
    known = ranks.meet("whether the curvature is kept", resume and stored.exists())[0]
    if known:
        found, state = load_tensors(stored)
        refuse_differences(stored, found, settings)
        if not influence.setup.estimators.needs_data:
            influence.load_state_dict(state)
            return True
    influence.fit(train, subset=None if picker is None else partial(picker[1], k=k))
    if known:
        return True
    state = influence.state_dict(rank=0)
    if ranks.rank == 0:
        save_tensors(stored, state, settings)
    return False


# ------------------------------------------------------------------------------------------------------------- results


def write_top(path: Path, row: str, values: Tensor, indices: Tensor, k: int, given: Given) -> None:
    """The k best of each row, whose name stands in the place of "query"; of examples of files with ids and texts."""
    train, query = given.train_examples, given.query_examples
    ids = {} if train is None or train.ids is None else {"id": train.ids}
    found = top_rows(
        values[:, :k],
        indices[:, :k],
        query_ids=query.ids if query is not None and row == "query" else None,
        columns=None if train is None else {**ids, **train.columns},
    )
    write_rows([{row if name == "query" else name: value for name, value in one.items()} for one in found], path)


def top_table(
    row: str, rows: str, values: Tensor, indices: Tensor, n: int, what: str = "help", given: Given | None = None
) -> Table:
    """The most helpful training examples of the first queries, or groups of them, or those that harm them."""
    if given is not None and given.train_examples is not None:
        return _text_table(row, rows, values, indices, n, what, given.train_examples, given.query_examples)
    k = min(SHOWN, indices.shape[1])
    table = Table(
        title=f"training examples that {what} the first {rows} most (of {n:,}): index and score",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in (row, *(f"{rank}." for rank in range(1, k + 1))):
        table.add_column(name, justify="right", no_wrap=True)
    for query in range(min(SHOWN, len(values))):
        hits = zip(indices[query, :k].tolist(), values[query, :k].tolist(), strict=True)
        table.add_row(str(query), *(f"{index}  {value:.2e}" for index, value in hits))
    return table


def _text_table(
    row: str,
    rows: str,
    values: Tensor,
    indices: Tensor,
    n: int,
    what: str,
    train: Examples,
    query: Examples | None,
) -> Table:
    """The same with what people read: below each query its training examples, cut to the width of the terminal."""
    table = Table(
        title=f"training examples that {what} the first {rows} most (of {n:,})",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in (row, "train"):
        table.add_column(name, justify="right", no_wrap=True, max_width=16)
    table.add_column("score", justify="right", no_wrap=True, min_width=9)
    if train.labels is not None:
        table.add_column("label", no_wrap=True, max_width=28)
    table.add_column("text")  # the one that is made narrower where the terminal is: a line each, cut off

    def add(cells: Sequence[str], examples: Examples | None, place: int, style: str) -> None:
        read = [] if examples is None else [column[place] for column in reversed(examples.columns.values())]
        cut = [Text(words, style, no_wrap=True, overflow="ellipsis") for words in read]
        table.add_row(*(Text(cell, style) for cell in cells), *cut)

    for place in range(min(SHOWN, len(values))):
        asked = query if row == "query" else None
        add([_named(asked, place), "", ""], asked, place, "bold")
        for score, example in zip(values[place, :SHOWN].tolist(), indices[place, :SHOWN].tolist(), strict=True):
            add(["", _named(train, example), f"{score:+.2e}"], train, example, "")
        table.add_section()
    return table


def _named(examples: Examples | None, place: int) -> str:
    """An example's id, or its number."""
    return str(place) if examples is None or examples.ids is None else examples.ids[place]
