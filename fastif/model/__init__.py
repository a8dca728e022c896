"""The model: how it is called and seen, its layers, its losses, its gradients example by example."""

from fastif.model.features import Extracted, extract, find_head

__all__ = ["Extracted", "extract", "find_head"]
