"""Limits: how much is held or made at a time. Results depend on none of them but for rounding."""

MEMORY = 1 << 27
"""Bytes, 128 MiB: the default of `memory=` in Python and of `--memory` in the shell, so that either goes on with the
other's folder. It suits a laptop, and the peaks in docs/memory.md were measured with it."""
