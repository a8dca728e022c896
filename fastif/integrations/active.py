"""Which examples to label next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Generator, Tensor

from fastif.samplers.centres import Metric, k_center


def next_batch(
    features: Tensor | np.ndarray,
    labelled: Tensor | np.ndarray | Sequence[int],
    k: int,
    *,
    metric: Metric = "euclidean",
    generator: Generator | None = None,
) -> Tensor:
    """The k examples to label next: each is the one farthest from all that are labelled and from those before it.

    So that every example is as near as can be to one with a label: with the radius of the best choice, the result's is
    at most twice as large. docs/math.md (7); O. Sener, S. Savarese, ICLR 2018.

    >>> features = torch.tensor([[0.0], [1.0], [4.0], [9.0]])
    >>> next_batch(features, [0], 2)
    tensor([3, 2])

    Args:
        features: [n, d], of all examples, as `fastif.extract` gives them.
        labelled: int64 [m], examples that have a label, or a mask [n]; may be empty.
        k: how many, at most those without a label.
        metric: "euclidean" or "cosine".
        generator: draws the first example where none has a label.

    Returns int64 [k], in the order of the picks. Raises ValueError for indices that are not of examples and for k.
    """
    n, given = len(features), torch.as_tensor(labelled)
    if given.dtype == torch.bool:
        if given.shape != (n,):
            raise ValueError(f"next_batch: a mask of labelled must be [n={n}], got {list(given.shape)}")
        given = given.nonzero()[:, 0]
    given = given.to(torch.int64) if len(given) == 0 else given
    if given.is_floating_point() or given.dim() != 1 or len(given.unique()) != len(given):
        raise ValueError(
            f"next_batch: labelled must be distinct indices, int64 [m], got {given.dtype} {list(given.shape)}"
        )
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= n - len(given):
        raise ValueError(f"next_batch: k must be an integer in [1, {n - len(given)} without a label], got k={k}")
    m, start = len(given), given.cpu() if len(given) else None
    points = torch.as_tensor(features)
    subset = k_center(points, m + k, start=start, weighted=False, metric=metric, generator=generator, progress=False)
    return subset.indices[m:]
