"""The curvature of a whole network by products with vectors alone: nothing of its size squared is ever formed."""

from fastif.curvature.matrix_free.arnoldi import Arnoldi
from fastif.curvature.matrix_free.cg import CG
from fastif.curvature.matrix_free.iterations import NotConverged
from fastif.curvature.matrix_free.lissa import Diverged, LiSSA

__all__ = ["CG", "Arnoldi", "Diverged", "LiSSA", "NotConverged"]
