"""Pages of the first queries of a job over files."""

from pathlib import Path

import torch
from torch import Tensor

from fastif.cli.problem import Given
from fastif.index.index import Index
from fastif.influence.fitted import Fitted
from fastif.influence.score_folder import ScoreFolder
from fastif.influence.token_parts import split_by_token
from fastif.integrations.files import Examples
from fastif.report.explanations import explain

PAGES = "explain"  # in the folder of the scores
_BESIDE = 8  # training examples on each side of a page


def write_index_pages(index: Index, given: Given, out: Path, queries: int, rerank: int) -> list[Path]:
    """The same of an index: scores as `Index.top` gives them, the parts of tokens computed from the examples anew."""
    query, train = given.query_examples, given.train_examples
    if query is None or train is None or not queries:
        return []
    first = query.picked(torch.arange(min(queries, len(query.texts))))
    k, n = min(_BESIDE, index.n), len(train.texts)
    again = dict(rerank=max(rerank, k), train=given.train) if rerank else {}
    scores = torch.zeros(min(queries, len(query.texts)), n)
    for largest in (True, False):
        found = index.top(first, k, largest=largest, **again)
        scores.scatter_(1, found.indices, found.values.to(scores))  # what is zero is on no page
    assert index.influence is not None
    if index.ranks.rank > 0:  # all ranks ask, the first writes
        return []
    return write_pages(index.influence.fitted, scores, given, out, queries)


def write_pages(fitted: Fitted, scores: ScoreFolder | Tensor, given: Given, out: Path, queries: int) -> list[Path]:
    """Pages that explain the first queries; the tokens of texts coloured by their parts in the scores.

    `scores` may be those of the first queries alone.
    """
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
            query.shown[: len(scores)],
            train.shown,
            out,
            k=_BESIDE,
            queries=range(min(queries, len(scores))),
            by_token=None if images else parts,
            query_names=names_of(query)[: len(scores)],
            train_names=names_of(train),
            measurement=measurement if isinstance(measurement, str) else "measurement",
        )
    finally:
        passes.progress = shown


def names_of(examples: Examples) -> list[str]:
    """Of each example its id and its label, where there are any."""
    columns = [column for column in (examples.ids, examples.labels) if column is not None]
    return [" · ".join(str(column[row]) for column in columns) for row in range(len(examples.texts))]
