"""fastif: which training examples made a model behave so, and what would it be without them?"""

from fastif import curvature, data, ops, samplers
from fastif.curvature import ExactBlock, NotPositiveDefinite
from fastif.features import Extracted, extract, find_head
from fastif.influence import Influence, Plan
from fastif.ops import build_info
from fastif.removal import HeadStep, Removal, remove
from fastif.samplers import CertifiedSubset, Subset

__version__ = "0.1.0"
__all__ = [
    "CertifiedSubset",
    "ExactBlock",
    "Extracted",
    "HeadStep",
    "Influence",
    "NotPositiveDefinite",
    "Plan",
    "Removal",
    "Subset",
    "build_info",
    "curvature",
    "data",
    "extract",
    "find_head",
    "ops",
    "remove",
    "samplers",
]
