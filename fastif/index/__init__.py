"""Training gradients once, any number of queries."""

from fastif.index.index import Index, Top
from fastif.index.sampling import Measured

__all__ = ["Index", "Measured", "Top"]
