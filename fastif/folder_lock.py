"""One writer for each folder: a second one is told who the first is."""

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from fastif.files import is_alive, remove_abandoned, write_whole

LOCK, HOLDER = ".fastif.lock", ".fastif.lock.holder"
_mine: dict[tuple[int, int, str], int] = {}  # how often this process and thread has entered a folder that it holds


class FolderInUse(OSError):
    """Another process, or another thread of this one, is writing to the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder, which must exist, as its only writer; the thread that holds it may enter again.

    The lock is the operating system's: it ends with its process, however that ends. What killed processes left
    unfinished is removed. Raises FolderInUse, at once, where somebody else holds it.
    """
    me = os.getpid(), threading.get_ident(), str(folder.resolve())
    if me in _mine:
        yield
        return
    lock = FileLock(folder / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FolderInUse(f"{folder} is being written by {_holder(folder)}; wait for it, or choose another") from None
    _mine[me] = 1
    try:
        remove_abandoned(folder)
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        write_whole(folder / HOLDER, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}))
        yield
    finally:
        del _mine[me]
        # While it is held: whoever waits for the lock file that is gone finds that it is, and makes another.
        for name in (HOLDER, LOCK):
            with suppress(OSError):
                (folder / name).unlink()
        lock.release()


def _holder(folder: Path) -> str:
    try:
        found = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        if found["host"] != socket.gethostname() or is_alive(found["pid"]):  # else it is of one before
            return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return "another process, which has only just begun or ended"
