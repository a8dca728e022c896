"""Influence and its solvers, raced against other libraries."""
