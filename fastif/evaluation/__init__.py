"""Experiments: how well do influence functions predict what retraining would have given?"""

from fastif.evaluation.class_removal import class_removal

__all__ = ["class_removal"]
