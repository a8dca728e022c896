"""Removal: a trained network as it would be without some of its training examples, by Newton steps on what is retained.

`remove` takes the head or any layers; `head_steps` and `optimal_head` work on features that were extracted before.
"""

from typing import Any

from fastif.removal.certificate import Certificate, Certified
from fastif.removal.head import head_steps, optimal_head
from fastif.removal.removal import remove
from fastif.removal.steps import Removal, Step
from fastif.renamed import find_renamed

__all__ = ["Certificate", "Certified", "Removal", "Step", "head_steps", "optimal_head", "remove"]


def __getattr__(name: str) -> Any:
    return find_renamed(__name__, name, {"HeadStep": Step, "NetworkStep": Step})
