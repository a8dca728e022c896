"""Removal: a trained network as it would be without some of its training examples, by Newton steps on what is retained.

`remove` takes the head or any layers; `head_steps` and `optimal_head` work on features that were extracted before.
"""

from fastif.removal.head import head_steps, optimal_head
from fastif.removal.removal import remove
from fastif.removal.steps import HeadStep, NetworkStep, Removal

__all__ = ["HeadStep", "NetworkStep", "Removal", "head_steps", "optimal_head", "remove"]
