"""Processes of one process group that a test gives work: the same call for all, one answer from each."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 12  # seconds of the process group: what a rank waits for the others
START = timedelta(seconds=60)  # what it waits for them when the group is made


class Failed(RuntimeError):
    """What a rank raised."""

    def __init__(self, kind: str, text: str, trace: str = ""):
        super().__init__(f"{kind}: {text}")
        self.kind, self.text, self.trace = kind, text, trace

    def __reduce__(self) -> Any:
        return Failed, (self.kind, self.text, self.trace)


class Crew:
    """`world` ranks, ready until `dismiss`; the store is this process's, so that each of them may be killed."""

    def __init__(self, world: int, timeout: float = TIMEOUT):
        self.world = world
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        # Forks of one process that has imported everything: ranks that each import torch start seconds apart on a busy
        # machine, and with a short timeout the first one gave up before the other was there.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.ranks.sharded_cases"])
        pipes = [context.Pipe() for _ in range(world)]
        self.processes = [
            context.Process(
                target=_work, args=(rank, world, self._store.port, timeout, theirs, _covering()), daemon=True
            )
            for rank, (_, theirs) in enumerate(pipes)
        ]
        self._pipes = [ours for ours, _ in pipes]
        for process in self.processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()

    def begin(self, function: Callable[..., Any], *args: Any, by_rank: Any = None) -> None:
        """Has all ranks call a function of a module; `by_rank`: more arguments of each."""
        for rank, pipe in enumerate(self._pipes):
            more = () if by_rank is None else (by_rank[rank],)
            pipe.send_bytes(pickle.dumps((function, (*args, *more))))

    def end(self, within: float = 90) -> list[Any]:
        """What each returned, or the `Failed` of what it raised; None of one that ended."""
        answers: list[Any] = []
        for pipe in self._pipes:
            try:
                answers.append(pickle.loads(pipe.recv_bytes()) if pipe.poll(within) else TimeoutError())
            except (EOFError, ConnectionError):
                answers.append(None)
        return answers

    def __call__(self, function: Callable[..., Any], *args: Any, by_rank: Any = None) -> list[Any]:
        """What each rank returned; raises what the first raised."""
        self.begin(function, *args, by_rank=by_rank)
        answers = self.end()
        for rank, answer in enumerate(answers):
            if isinstance(answer, Exception):
                raise AssertionError(f"rank {rank}: {answer}\n{getattr(answer, 'trace', '')}") from answer
        return answers

    def kill(self, rank: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def dismiss(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _covering() -> bool:
    """Whether this process counts the lines that it runs."""
    coverage = sys.modules.get("coverage")
    return coverage is not None and coverage.Coverage.current() is not None


def _work(rank: int, world: int, port: int, timeout: float, pipe: Any, covering: bool) -> None:
    gc.freeze()  # what the fork has from its parent stays: no collection of garbage need look at it
    count = None
    if covering:  # what ranks run is run nowhere else
        import coverage

        count = coverage.Coverage(data_suffix=True, source_pkgs=["fastif"])
        count.start()
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    # On a busy machine ranks may find one another seconds apart: the short wait counts from when they have.
    store.set_timeout(START)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=START)
    dist.barrier()
    limit = timedelta(seconds=timeout)
    store.set_timeout(limit)
    dist.distributed_c10d._set_pg_timeout(limit)  # torch has no public name for it
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            if count is not None:
                count.stop()
                count.save()
            os._exit(0)  # no goodbyes: others may be gone
        try:
            answer = function(*args)
        except Exception as error:
            answer = Failed(type(error).__name__, str(error), traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
