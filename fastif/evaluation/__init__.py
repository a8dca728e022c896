"""Experiments: how well do influence functions predict what retraining would have given?"""

from fastif.evaluation.class_removal import class_removal
from fastif.evaluation.correlation import Interval
from fastif.evaluation.counterfactual import Brittleness, Counterfactual, brittleness, subset_counterfactual
from fastif.evaluation.halves import train_halves
from fastif.evaluation.lds import LDS, ceiling, linear_datamodeling_score, random_subsets
from fastif.evaluation.leave_out import Agreement, LeftOut, agreement, leave_group_out, leave_one_out
from fastif.evaluation.membership import Membership, ULiRA, membership, u_lira
from fastif.evaluation.mislabel import Detection, mislabel_detection
from fastif.evaluation.retraining import Retrained, retrain, without
from fastif.evaluation.unlearning import unlearning

__all__ = [
    "LDS",
    "Agreement",
    "Brittleness",
    "Counterfactual",
    "Detection",
    "Interval",
    "LeftOut",
    "Membership",
    "Retrained",
    "ULiRA",
    "agreement",
    "brittleness",
    "ceiling",
    "class_removal",
    "leave_group_out",
    "leave_one_out",
    "linear_datamodeling_score",
    "membership",
    "mislabel_detection",
    "random_subsets",
    "retrain",
    "subset_counterfactual",
    "train_halves",
    "u_lira",
    "unlearning",
    "without",
]
