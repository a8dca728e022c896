"""Progress bars, and one switch for all of them."""

from __future__ import annotations

from typing import Any

import tqdm as _bars

_shown = True


def set_progress(shown: bool) -> None:
    """Shows progress bars, or none, from now on and in this process: `False` counts for all calls, whatever they ask.

    With True, the default, calls show what their own `progress=` says.

    >>> set_progress(False)
    >>> set_progress(True)
    """
    global _shown
    if not isinstance(shown, bool):
        raise TypeError(f"set_progress: shown must be True or False, got {shown!r}")
    _shown = shown


class tqdm(_bars.tqdm):
    """A bar of tqdm that `set_progress` can switch off."""

    def __init__(self, *args: Any, disable: bool = False, **options: Any):
        super().__init__(*args, disable=disable or not _shown, **options)
