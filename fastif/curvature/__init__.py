"""Curvature estimators, one per file, with one protocol.

`Influence` drives them: `begin` a layer's block, `observe` its gradients batch by batch in `passes` passes, `end` each
pass; then `solve`, `sq_norms` and `directions` apply the damped inverse. A `JointCurvature` does so for several blocks
at once.
"""

from fastif.curvature.automatic import Automatic
from fastif.curvature.damping import (
    IllConditioned,
    NotPositiveDefinite,
    RelativeDamping,
    TrainingDamping,
    training_time,
)
from fastif.curvature.data_inf import DataInf
from fastif.curvature.diagonal import Diagonal, Identity
from fastif.curvature.directions import Directions, Explicit, LowRank
from fastif.curvature.ekfac import EKFAC
from fastif.curvature.exact.block import ExactBlock
from fastif.curvature.kfac import KFAC
from fastif.curvature.matrix_free.arnoldi import Arnoldi
from fastif.curvature.matrix_free.cg import CG
from fastif.curvature.matrix_free.iterations import NotConverged
from fastif.curvature.matrix_free.lissa import Diverged, LiSSA
from fastif.curvature.projection import RandomProjection
from fastif.curvature.protocol import Curvature, FitData, JointCurvature
from fastif.curvature.shampoo import Shampoo

__all__ = [
    "CG",
    "EKFAC",
    "KFAC",
    "Arnoldi",
    "Automatic",
    "Curvature",
    "DataInf",
    "Diagonal",
    "Directions",
    "Diverged",
    "ExactBlock",
    "Explicit",
    "FitData",
    "Identity",
    "IllConditioned",
    "JointCurvature",
    "LiSSA",
    "LowRank",
    "NotConverged",
    "NotPositiveDefinite",
    "RandomProjection",
    "RelativeDamping",
    "Shampoo",
    "TrainingDamping",
    "training_time",
]
