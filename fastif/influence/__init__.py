"""Influence functions of a trained model: fitted once, then asked for scores, by layer or token too, on disk or not."""

from fastif.influence.influence import Influence
from fastif.influence.planning import Plan
from fastif.influence.score_folder import ScoreFolder

__all__ = ["Influence", "Plan", "ScoreFolder"]
