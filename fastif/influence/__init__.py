"""Influence: a curvature fitted on a model's data, and what it gives: scores, their folders on disk, and plans."""

from fastif.influence.influence import Influence
from fastif.influence.planning import Plan
from fastif.influence.score_folder import ScoreFolder

__all__ = ["Influence", "Plan", "ScoreFolder"]
