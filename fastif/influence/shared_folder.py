"""A folder that several ranks write at once, of scores or an index: the first rank holds it, all of them see it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from fastif.files import write_whole
from fastif.folder_lock import HOLDER, locked
from fastif.influence.score_folder import ScoreFolder, write_manifest
from fastif.ranks import Ranks, stretch

_NOTING = ".manifest.lock"
_SEEN_WITHIN = 10.0  # seconds: what one machine has written, another may see only a little later

T = TypeVar("T")


@contextmanager
def held(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Holds the folder, which must exist, as its only writers, until all ranks are done with it.

    Raises FolderInUse, on all ranks, where somebody else holds it, and ValueError where a rank does not see what the
    first one wrote into it.
    """
    if ranks.world == 1:
        with locked(folder):
            yield
        return
    if ranks.rank > 0:
        (holder, *_) = ranks.meet(f"holding {folder}")
        _see(folder / HOLDER, holder)
        ranks.meet(f"seeing {folder}")
        yield
        ranks.meet(f"leaving {folder}")
        return
    with locked(folder):
        ranks.meet(f"holding {folder}", (folder / HOLDER).read_text(encoding="utf-8"))
        ranks.meet(f"seeing {folder}")
        yield
        ranks.meet(f"leaving {folder}")
        (folder / _NOTING).unlink(missing_ok=True)


def write_seen(path: Path, text: str, ranks: Ranks) -> None:
    """Has the first rank write a file, whole, and the others go on when they see what it wrote."""
    if ranks.rank == 0:
        write_whole(path, text)
    (written, *_) = ranks.meet(f"writing {path.name}", text if ranks.rank == 0 else None)
    if ranks.rank > 0:
        _see(path, written)


def _see(path: Path, text: str) -> None:
    begun = time.monotonic()
    while not (path.is_file() and path.read_text(encoding="utf-8") == text):
        if time.monotonic() - begun > _SEEN_WITHIN:
            raise ValueError(
                f"{path.parent} is not the folder that the first rank writes to: all ranks have to write to one folder "
                "of a file system that they share"
            )
        time.sleep(0.1)


def note_error(scores: ScoreFolder, low_rank_error: float, ranks: Ranks) -> None:
    """Keeps the error of a block before the block itself, which would be taken for exact; the largest of all ranks'."""
    if low_rank_error <= scores.low_rank_error:
        return
    if ranks.world == 1:
        scores.low_rank_error = low_rank_error
        write_manifest(scores.folder, scores.settings, low_rank_error)
        return
    with FileLock(scores.folder / _NOTING):
        there = ScoreFolder(scores.folder).low_rank_error
        scores.low_rank_error = max(there, low_rank_error)
        if low_rank_error > there:
            write_manifest(scores.folder, scores.settings, low_rank_error)


def share_of_all(things: Sequence[T], ranks: Ranks, rank: int | None = None) -> Sequence[T]:
    """Those of some things in order that this rank, or another, sees to."""
    run = stretch(len(things), ranks.rank if rank is None else rank, ranks.world)
    return things[run.start : run.stop]
