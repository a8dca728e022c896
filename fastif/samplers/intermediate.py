"""The examples at middling distance from their class prototype."""

import torch
from torch import Tensor

from fastif.samplers.subset import (
    Subset,
    allocate,
    block_size,
    check_labels,
    check_matrix,
    class_weights,
    equal_weights,
)
from fastif.samplers.systematic import check_k


def intermediate_distance(features: Tensor, labels: Tensor, k: int, *, weighted: bool = True) -> Subset:
    """The examples at middling distance from their class prototype: neither the typical ones nor the outliers.

    The prototype of a class is the coordinate-wise median of its features (the mean of the two middle values where n_c
    is even). Each class gets k_c picks as in `stratified`; with its examples ranked by Euclidean distance to the
    prototype (ties: the lower index), the picks are the ranks floor((n_c - k_c) / 2), ..., + k_c - 1.
    Weights as in `stratified`, or 1/k with `weighted=False`. Deterministic, and biased: the tails are never picked.
    features [n, d], labels [n] integers >= 0; indices ascend. Raises ValueError or TypeError. docs/math.md (10).

    >>> features, labels = torch.tensor([[0.0], [1.0], [2.0], [4.0], [9.0]]), torch.zeros(5, dtype=torch.int64)
    >>> intermediate_distance(features, labels, 1).indices  # distances 2, 1, 0, 2, 7: the median distance is 2
    tensor([0])
    """
    features = check_matrix("intermediate_distance", "features", features, "d")
    labels = check_labels("intermediate_distance", labels, n=len(features))
    k = check_k("intermediate_distance", k, len(features))
    labels, counts, picks = allocate(labels, k)
    bands = []
    for members, k_c in zip(labels.argsort(stable=True).split(counts.tolist()), picks.tolist(), strict=True):
        ranked = members[_sq_distance_to_median(features, members).argsort(stable=True)]
        bands.append(ranked[(len(members) - k_c) // 2 :][:k_c])
    indices = torch.cat(bands)
    return class_weights(indices, labels, counts, picks) if weighted else equal_weights(indices)


def _sq_distance_to_median(features: Tensor, members: Tensor) -> Tensor:
    """Squared distances [len(members)] of the members to their coordinate-wise median, some columns at a time."""
    sq_dists = torch.zeros(len(members), dtype=torch.float64)
    for columns in features.split(block_size(len(members)), dim=1):
        x = columns[members.to(features.device)].to("cpu", torch.float64)
        ordered = x.sort(0).values
        x -= (ordered[(len(x) - 1) // 2] + ordered[len(x) // 2]) / 2
        sq_dists += x.square().sum(1)
    return sq_dists
