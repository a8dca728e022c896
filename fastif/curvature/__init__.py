"""Curvature estimators, one per file, with one protocol: fit, update, downdate, solve."""

from fastif.curvature.cholesky import NotPositiveDefinite
from fastif.curvature.exact_block import ExactBlock

__all__ = ["ExactBlock", "NotPositiveDefinite"]
