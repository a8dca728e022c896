"""fastif: which training examples made a model behave so, and what would it be without them?"""

from typing import Any

from fastif import curvature, data, evaluation, ops, samplers
from fastif._version import __version__
from fastif.curvature import (
    CG,
    EKFAC,
    KFAC,
    Arnoldi,
    Automatic,
    DataInf,
    Diagonal,
    Diverged,
    ExactBlock,
    Identity,
    IllConditioned,
    LiSSA,
    NotConverged,
    NotPositiveDefinite,
    RandomProjection,
    RelativeDamping,
    Shampoo,
    TrainingDamping,
    training_time,
)
from fastif.data import sharded
from fastif.index import Index, answer
from fastif.influence import Influence
from fastif.influence.choosing import choose
from fastif.influence.networks import Networks
from fastif.influence.planning import Plan
from fastif.influence.rows import top_rows, write_rows
from fastif.influence.score_folder import ScoreFolder
from fastif.model.captured import Captured, capture
from fastif.model.features import Extracted, extract, find_head
from fastif.ops import build_info
from fastif.progress import set_progress
from fastif.removal import Certificate, Removal, Step, remove
from fastif.renamed import find_renamed
from fastif.replay import NotReproduced, Replay, Source, TrainingLog
from fastif.report import verify_removal
from fastif.samplers import CertifiedSubset, Subset

__all__ = [
    "CG",
    "EKFAC",
    "KFAC",
    "Arnoldi",
    "Automatic",
    "Captured",
    "Certificate",
    "CertifiedSubset",
    "DataInf",
    "Diagonal",
    "Diverged",
    "ExactBlock",
    "Extracted",
    "Identity",
    "IllConditioned",
    "Index",
    "Influence",
    "LiSSA",
    "Networks",
    "NotConverged",
    "NotPositiveDefinite",
    "NotReproduced",
    "Plan",
    "RandomProjection",
    "RelativeDamping",
    "Removal",
    "Replay",
    "ScoreFolder",
    "Shampoo",
    "Source",
    "Step",
    "Subset",
    "TrainingDamping",
    "TrainingLog",
    "__version__",
    "answer",
    "build_info",
    "capture",
    "choose",
    "curvature",
    "data",
    "evaluation",
    "extract",
    "find_head",
    "ops",
    "remove",
    "samplers",
    "set_progress",
    "sharded",
    "top_rows",
    "training_time",
    "verify_removal",
    "write_rows",
]


def __getattr__(name: str) -> Any:
    return find_renamed(__name__, name, {"HeadStep": Step, "NetworkStep": Step})
