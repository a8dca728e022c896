"""Exact curvature: a block over all pairs of its parameters, its building and its factor."""

from fastif.curvature.exact.block import ExactBlock

__all__ = ["ExactBlock"]
