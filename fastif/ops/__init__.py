"""The compiled ops: they know tensors only, never models or data sets."""

from fastif.ops import per_sample_grad
from fastif.ops._library import build_info
from fastif.ops.factor_dots import factor_dots
from fastif.ops.farthest_first import FarthestFirst, farthest_first
from fastif.ops.ggn_block import ggn_block, kronecker_block

__all__ = [
    "FarthestFirst",
    "build_info",
    "factor_dots",
    "farthest_first",
    "ggn_block",
    "kronecker_block",
    "per_sample_grad",
]
