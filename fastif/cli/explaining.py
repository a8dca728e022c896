"""Pages of the first queries of a job over files."""

from pathlib import Path

import torch
from torch import Tensor

from fastif.cli.problem import Given
from fastif.influence.fitted import Fitted
from fastif.influence.score_folder import ScoreFolder
from fastif.influence.token_parts import split_by_token
from fastif.integrations.files import Examples
from fastif.report.explanations import explain

PAGES = "explain"  # in the folder of the scores


def write_pages(fitted: Fitted, scores: ScoreFolder, given: Given, out: Path, queries: int) -> list[Path]:
    """Pages that explain the first queries; the tokens of texts coloured by their parts in the scores."""
    train, query = given.train_examples, given.query_examples
    assert train is not None
    assert query is not None
    if not queries:
        return []

    def parts(row: int, indices: Tensor) -> Tensor:
        picked = train.picked(indices)
        (batch,) = picked
        length = batch["input_ids"].shape[1]
        return split_by_token(fitted, query.picked(torch.tensor([row])), picked, length)[0][0]

    images, passes, measurement = isinstance(train.shown[0], Path), fitted.passes, fitted.setup.measurement
    shown, passes.progress = passes.progress, False  # a bar for each of a few examples says nothing
    try:
        return explain(
            scores,
            query.shown,
            train.shown,
            out,
            queries=range(queries),
            by_token=None if images else parts,
            query_names=names_of(query),
            train_names=names_of(train),
            measurement=measurement if isinstance(measurement, str) else "measurement",
        )
    finally:
        passes.progress = shown


def names_of(examples: Examples) -> list[str]:
    """Of each example its id and its label, where there are any."""
    columns = [column for column in (examples.ids, examples.labels) if column is not None]
    return [" · ".join(str(column[row]) for column in columns) for row in range(len(examples.texts))]
