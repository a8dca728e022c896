"""What each position of a training example adds to its score, where not all layers see every position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastif.influence.fitted import Fitted
from fastif.influence.queries import query_blocks
from fastif.model.calls import dtype_of


def split_by_token(fitted: Fitted, query: Any, train: Any, t: int) -> tuple[Tensor, Tensor]:
    """Scores as parts by position [q, n, t], and the rest [q, n]; a row's parts and its rest add up to the score.

    `scores(by="token")` refuses layers that have another number of positions than the others: normalisations, which sum
    over them, and heads, which see one. Here what layers with another number than t add is the rest. For a few examples
    that are shown to people: every query is held at full size. docs/math.md (2).

    Args:
        t: the positions of the training examples, padding included.
    """
    query, train = fitted.walk(query, train)
    passes, checkpoints = fitted.passes, fitted.at_checkpoints()
    dtype = dtype_of(passes.model)
    parts, rest = torch.zeros(query.n, train.n, t, dtype=dtype), torch.zeros(query.n, train.n, dtype=dtype)
    for checkpoint, curvature in checkpoints:
        with passes.running(checkpoint):
            for first, held in query_blocks(fitted, query, query.n, curvature, None, None, True):
                for start, n, gradients in passes.gradients(train, "tokens"):
                    for name, g in gradients.items():
                        matrices = torch.cat([part.matrices for part in held[name]])  # pyright: ignore[reportAttributeAccessIssue]  explicit ones
                        own = g.by_position(matrices).div_(fitted.n * len(checkpoints)).cpu()
                        rows, columns = slice(first, first + len(own)), slice(start, start + n)
                        if own.shape[2] == t:
                            parts[rows, columns] += own
                        else:
                            rest[rows, columns] += own.sum(2)
    return parts, rest
