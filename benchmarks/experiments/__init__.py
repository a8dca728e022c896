"""Experiments on models and data: what influence functions predict against what retraining gives."""
