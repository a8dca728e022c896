"""Trainings of a user's networks, one by one or in processes side by side, with the same bits either way."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastif.ranks import find_ranks

TrainFn = Callable[[Tensor, int], nn.Module]


class Task(NamedTuple):
    """One training."""

    number: int  # of the set
    kept: Tensor  # int64, ascending: the examples to train on
    seed: int


class Trained(NamedTuple):
    """What came of a training."""

    task: Task
    seen: Any  # what `look` returned
    seconds: float  # wall clock


class Trainings(NamedTuple):
    """How networks are trained and what is kept of each; all that a process needs but for the tasks."""

    op: str  # that the user called, for messages
    train_fn: TrainFn
    look: Callable[[nn.Module], Any]  # picklable, as what it returns, which holds no tensors: they would be shared
    processes: int
    threads: int  # CPU threads of each training

    def check(self) -> None:
        """Raises TypeError and ValueError for arguments that cannot be."""
        if not callable(self.train_fn):
            raise TypeError(
                f"{self.op}: train_fn must be a function (indices, seed) -> nn.Module, got {self.train_fn!r}"
            )
        for name, value in (("processes", self.processes), ("threads", self.threads)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{self.op}: {name} must be an integer >= 1, got {value!r}")
        world = find_ranks().world
        if world > 1 and self.processes > 1:
            raise ValueError(
                f"{self.op}: processes={self.processes} on {world} ranks: each rank trains one network at a time; "
                "start more ranks, or leave processes=1"
            )

    def run(self, tasks: Sequence[Task]) -> Iterator[Trained]:
        """Trains the networks, in any order. torch's generator and number of threads are what they were afterwards.

        On several ranks each trains one at a time, and all of them see what came of all.
        """
        if find_ranks().world > 1:
            return self._on_ranks(tasks)
        return self._one_by_one(tasks) if self.processes == 1 else self._side_by_side(tasks)

    def train(self, task: Task) -> Trained:
        began = time.perf_counter()
        torch.manual_seed(task.seed)
        with torch.enable_grad():
            model = self.train_fn(task.kept, task.seed)
        if not isinstance(model, nn.Module):
            raise TypeError(f"{self.op}: train_fn must return an nn.Module, got {type(model).__name__}")
        seen = self.look(model)
        return Trained(task, seen, time.perf_counter() - began)

    def _one_by_one(self, tasks: Sequence[Task]) -> Iterator[Trained]:
        with _with_threads(self.threads), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            for task in tasks:
                yield self.train(task)

    def _on_ranks(self, tasks: Sequence[Task]) -> Iterator[Trained]:
        """Round by round: a rank that ends before its round does takes no more with it than that."""
        ranks = find_ranks()
        with _with_threads(self.threads), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            for begin in range(0, len(tasks), ranks.world):
                mine = tasks[begin + ranks.rank : begin + ranks.rank + 1]
                own: dict[str, Tensor] = {}
                for task in mine:
                    _, seen, seconds = self.train(task)
                    packed = np.frombuffer(pickle.dumps((seen, seconds)), np.uint8)
                    own["trained"] = torch.from_numpy(packed.copy()).to(ranks.device)
                for place, part in enumerate(ranks.gather(f"what {self.op} trained", own, ranks.device), begin):
                    if part:
                        yield Trained(tasks[place], *pickle.loads(part["trained"].cpu().numpy().tobytes()))

    def _side_by_side(self, tasks: Sequence[Task]) -> Iterator[Trained]:
        """In spawned processes. Tensors travel by value: sharing them would need /dev/shm to hold the data."""
        try:
            pickled = pickle.dumps(self)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(
                f"{self.op}: with processes={self.processes} train_fn, query, loss and measurement must be picklable "
                "(functions of a module, not lambdas, each under its own name there: `f = partial(f, ...)` hides f): "
                f"{error}"
            ) from error
        pool = ProcessPoolExecutor(
            min(self.processes, max(1, len(tasks))), multiprocessing.get_context("spawn"), _begin, (pickled,)
        )
        try:
            futures = {pool.submit(_work, task.number, task.kept.numpy(), task.seed): task for task in tasks}
            for future in as_completed(futures):
                seen, seconds = future.result()
                yield Trained(futures[future], seen, seconds)
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"{self.op}: a process ended before its work: killed (out of memory?), or started from a script "
                'without the guard if __name__ == "__main__":, or from one where train_fn cannot be imported; see '
                "stderr"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_trainings: Trainings | None = None  # of a spawned process


def _begin(pickled: bytes) -> None:
    global _trainings
    _end_with_parent()
    _trainings = pickle.loads(pickled)
    assert _trainings is not None
    torch.set_num_threads(_trainings.threads)


def _end_with_parent() -> None:
    """Makes this process end when its parent does, however that ends: nobody else would tell it.

    A thread waits for the parent, which works everywhere; on Linux the kernel kills the process, too, also while the
    thread cannot run.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="waits for the parent's end").start()
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent.pid:  # it ended before the kernel was asked
            os._exit(1)


def _work(number: int, kept: np.ndarray, seed: int) -> tuple[Any, float]:
    assert _trainings is not None
    _, seen, seconds = _trainings.train(Task(number, torch.from_numpy(kept), seed))
    return seen, seconds


@contextmanager
def _with_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
