"""Samplers: which k of n training examples carry the curvature, and with which weights.

A sampler returns `indices` and `weights` such that the weighted sum of per-example curvatures stands for their mean,

    sum_i weights[i] G_i  ~  G = (1/n) sum_i G_i        (docs/math.md (4)),

so the weights of a subset sum to 1 (`logit` and `leverage`: in expectation; `certified`: to k/n). Samplers are plain
functions of what they need and nothing else. Those that draw take `generator=`, a CPU generator: the draw is made on
the CPU and does not depend on the device of the tensors. Arithmetic is float64, one block of rows at a time; nothing of
size n x n is ever stored, nor a second copy of the features (but for the unit rows of `k_center` with "cosine" and the
classes of `k_center_by_class`).

The idea of choosing the curvature's examples by features or by logits, and the names, come from arXiv 2510.26776; its
formulas are not given there, and the definitions on this page are our own.
"""

from fastif.samplers.centres import k_center, k_center_by_class, k_center_of_ranks
from fastif.samplers.draw import draw
from fastif.samplers.importance import CertifiedSubset, certified, leverage, logit
from fastif.samplers.intermediate import intermediate_distance
from fastif.samplers.subset import Subset, check_subset
from fastif.samplers.uniform import prefix, random, stratified

__all__ = [
    "CertifiedSubset",
    "Subset",
    "certified",
    "check_subset",
    "draw",
    "intermediate_distance",
    "k_center",
    "k_center_by_class",
    "k_center_of_ranks",
    "leverage",
    "logit",
    "prefix",
    "random",
    "stratified",
]
