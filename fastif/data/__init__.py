"""Data: readers for the image sets of the experiments, and one way to walk through anything that holds examples."""

from fastif.data.batches import (
    Arguments,
    Batch,
    Identity,
    Shared,
    Walked,
    as_loader,
    batch_length,
    batch_lengths,
    count,
    indexable,
    picked,
    rebuilt,
    rows_of,
    sharded,
    walked,
)
from fastif.data.image_sets import HUMAN_LABELS, NAMES, Data, human_labels, load

__all__ = [
    "HUMAN_LABELS",
    "NAMES",
    "Arguments",
    "Batch",
    "Data",
    "Identity",
    "Shared",
    "Walked",
    "as_loader",
    "batch_length",
    "batch_lengths",
    "count",
    "human_labels",
    "indexable",
    "load",
    "picked",
    "rebuilt",
    "rows_of",
    "sharded",
    "walked",
]
