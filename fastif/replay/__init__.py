"""Replay: the training run itself, recorded by the loop that made it, and run backwards."""

from fastif.replay.log import TrainingLog
from fastif.replay.path import NotReproduced
from fastif.replay.plans import RankReplay, ReplayPlan
from fastif.replay.replay import Replay
from fastif.replay.source import Source

__all__ = ["NotReproduced", "RankReplay", "Replay", "ReplayPlan", "Source", "TrainingLog"]
