"""Training gradients once, any number of queries; and several answers from one walk through the training data."""

from fastif.index.index import Index
from fastif.index.one_pass import Answers, answer
from fastif.index.reading import Top
from fastif.index.sampling import Measured

__all__ = ["Answers", "Index", "Measured", "Top", "answer"]
