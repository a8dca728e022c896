"""Samplers that look at no more than the labels: at random, the first ones, class by class."""

import torch
from torch import Generator, Tensor

from fastif.samplers.subset import Subset, allocate, check_generator, check_labels, class_weights, equal_weights
from fastif.samplers.systematic import check_k, classes_in_turn


def random(n: int, k: int, *, generator: Generator | None = None) -> Subset:
    """k of n examples, every k-set equally likely; weights 1/k, unbiased. Indices ascend.

    >>> random(5, 5).indices
    tensor([0, 1, 2, 3, 4])
    """
    k = check_k("random", k, n)
    check_generator("random", generator)
    return equal_weights(torch.randperm(n, generator=generator)[:k])


def prefix(n: int, k: int) -> Subset:
    """The first k of n examples, weights 1/k: what several libraries take as their curvature subset; a baseline.

    >>> prefix(5, 2).indices
    tensor([0, 1])
    """
    return equal_weights(torch.arange(check_k("prefix", k, n)))


def stratified(labels: Tensor, k: int, *, generator: Generator | None = None) -> Subset:
    """A random draw within each class, classes in proportion to their sizes.

    Class c of n_c examples gets k_c = k n_c / n picks, rounded by largest remainder (ties: the lower class), and its
    picks weigh n_c / (n k_c) each: the total weight of a class is its share of the data. Where k is so small that a
    class gets no pick, the shares are those among the classes that did, and the weights still sum to 1.
    labels [n] are integers >= 0; indices ascend. Raises ValueError or TypeError. docs/math.md (4).
    """
    labels = check_labels("stratified", labels)
    k = check_k("stratified", k, len(labels))
    check_generator("stratified", generator)
    labels, counts, picks = allocate(labels, k)
    order = classes_in_turn(labels, generator)
    rank_in_class = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    return class_weights(order[rank_in_class < picks[labels[order]]], labels, counts, picks)
