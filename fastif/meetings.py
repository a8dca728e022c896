"""Meetings of ranks through the store that the process group was started with: who is there, at what, with which error.

Before every exchange of tensors, and wherever ranks need to know something of one another, each says what it is about
to do or what went wrong: an error on one rank is raised on all, with its number, in the place of a hang. A rank at work
gives signs of life. docs/scale.md.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch.distributed as dist

_CONNECTIONS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # by group
_LOOK = 1.0  # seconds between two looks at who is missing
_PAUSES = 2e-4, 0.02  # seconds between two looks whether all are there, at first and in the end
_OF_EXCHANGES = ("gloo", "pair closure", "NCCL", "Timed out")  # words of errors for which torch has no class
_SILENT = 30.0  # seconds without a sign of life from a rank at work, after which it counts as dead


class RankFailed(RuntimeError):
    """Another rank failed with an error that cannot be raised here as it is, ended, or did not arrive in time."""


class Meetings:
    """The processes of a group, seen from one of them; all have to come to every meeting."""

    def __init__(self, group: Any = None):
        # The group is torch's: held here, it would outlive destroy_process_group(), and its threads abort the process
        # that ends with them.
        self._group = None if group is None else ref(group)  # None: this process alone
        self.rank, self.world, self._names = 0, 1, [0]  # the last: as torchrun counts them
        self.errors: list[Exception] = []  # of the last meeting that failed, by rank
        self._heard: BaseException | None = None  # the last error that all ranks know of
        self._broken = ""  # why the ranks can no longer meet
        self._inside = False
        self._step = self._op = 0
        self._said: list[str] = []  # keys of this rank that may still be read
        if group is not None:
            self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
            self._names = dist.get_process_group_ranks(group)
            # torch's stubs know half of a store.
            self._store: Any = dist.PrefixStore("fastif", group.get_group_store())  # pyright: ignore

    @property
    def group(self) -> Any:
        """The process group; None: this process alone."""
        group = None if self._group is None else self._group()
        if group is None and self._group is not None:
            raise RankFailed(f"the process group of {self.world} ranks was destroyed: make the objects anew in another")
        return group

    def __repr__(self) -> str:
        return f"rank {self.rank} of {self.world}"

    def __deepcopy__(self, memo: Any) -> Any:
        return self  # processes cannot be copied

    @property
    def members(self) -> list[int]:
        """Every rank's number as torchrun counts them."""
        return self._names

    @contextmanager
    def together(self, op: str) -> Iterator[None]:
        """What all ranks do at once: an error of one ends it for all."""
        if self.world == 1 or self._inside:
            yield
            return
        self._inside, self._op = True, self._op + 1
        with self._living():
            try:
                self.meet(op)
                yield
                self.meet(f"the end of {op}")
            except BaseException as error:
                self._say_error(error)
                raise
            finally:
                self._inside = False

    def meet(self, what: str, value: Any = None) -> list[Any]:
        """What each rank brings to this point of its work, by rank; `what` names it and must be the same on all."""
        if self.world == 1:
            return [value]
        self._say((what, None, value))
        said = self._hear(what)
        self.errors = [_revive(name, failed) for name, (_, failed, _) in zip(self._names, said, strict=True) if failed]
        if self.errors:
            self._fail(self.errors[0])
        if any(other != what for other, _, _ in said):
            at = "; ".join(f"rank {name} at {other}" for name, (other, _, _) in zip(self._names, said, strict=True))
            self._fail(ValueError(f"the ranks do not do the same thing: {at}; every rank has to make the same calls"))
        return [value for _, _, value in said]

    def tell(self, error: Exception) -> list[Exception]:
        """Lets all ranks know of an error that they can go on from together; the errors of all, by rank."""
        if self.world == 1:
            return [error]
        if error is not self._heard:
            self._say(("an error", _preserve(error), None))
            said = self._hear("an error")
            self.errors = [
                error if name == self._names[self.rank] else _revive(name, failed)
                for name, (_, failed, _) in zip(self._names, said, strict=True)
                if failed
            ]
        return self.errors

    def explain(self, what: str, error: RuntimeError) -> Exception:
        """The error behind one that torch raised in an exchange of its own: another rank's, where it was said, or that
        the ranks have lost one another; `error` itself where it is no error of an exchange."""
        with suppress(Exception):
            for name, rank in zip(self._names, range(self.world), strict=True):
                key = f"{self._step}/{rank}"
                if rank != self.rank and self._store.check([key]):
                    _, failed, _ = pickle.loads(self._store.get(key))
                    if failed:
                        self._broken = f"rank {name} failed in {what}"
                        self._heard = _revive(name, failed)
                        return self._heard
        if not isinstance(error, dist.DistError) and not any(word in str(error) for word in _OF_EXCHANGES):
            return error
        self._broken = f"an exchange between ranks failed ({first_line(error)})"
        text = f"rank {self._names[self.rank]}: {self._broken} in {what}: another rank has ended, or the network has"
        return RankFailed(text)

    def compare(self, op: str, given: Mapping[str, Any]) -> None:
        """Raises ValueError, on all ranks, where one was given something else than the first."""
        if self.world == 1:
            return
        said = self.meet(f"what {op} was given", dict(given))
        for name, theirs in zip(self._names, said, strict=True):
            for key in dict.fromkeys((*said[0], *theirs)):
                if said[0].get(key) != theirs.get(key):
                    values = f"{_short(theirs.get(key))} and {_short(said[0].get(key))}"
                    self._fail(
                        ValueError(
                            f"{op}: rank {name} has another {key} than rank {self._names[0]} ({values}): every rank "
                            "has to pass the same model, data and arguments"
                        )
                    )

    def _fail(self, error: Exception) -> None:
        """Raises what all ranks have heard and raise."""
        self._heard = error
        raise error

    def _say(self, what: tuple[str, Any, Any]) -> None:
        if self._broken:
            raise RankFailed(f"the ranks lost one another before: {self._broken}")
        key = f"{self._step}/{self.rank}"
        with self._answering():
            self._store.set(key, pickle.dumps(what))
        self._said.append(key)

    def _say_error(self, error: BaseException) -> None:
        if error is not self._heard and not self._broken:
            with suppress(Exception):
                self._say(("an error", _preserve(error), None))
                self._step += 1

    def _hear(self, what: str) -> list[Any]:
        keys = [f"{self._step}/{rank}" for rank in range(self.world)]
        begun, looked, pause = time.monotonic(), time.monotonic(), _PAUSES[0]
        signs, limit = dict[int, tuple[str, float]](), self._store.timeout.total_seconds()
        while True:
            with self._answering():
                if self._store.check(keys):  # not `wait`, of which torch prints a warning whenever it takes longer
                    break
            time.sleep(pause)
            pause, now = min(1.5 * pause, _PAUSES[1]), time.monotonic()
            if now - looked < min(_LOOK, limit):
                continue
            looked = now
            with self._answering():
                missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                silent = [rank for rank in missing if self._silence(rank, signs) > min(_SILENT, limit)]
            if silent:
                self._lose(f"{self._named(silent)} gave no sign of life for {min(_SILENT, limit):.0f} s", what)
            if missing and now - begun > limit:
                self._lose(f"{self._named(missing)} did not arrive within the group's timeout of {limit:.0f} s", what)
        with self._answering():
            said = [pickle.loads(value) for value in self._store.multi_get(keys)]
            while len(self._said) > 1:  # all are here, so that nobody reads what was said before
                self._store.delete_key(self._said.pop(0))
        self._step += 1
        return said

    def _silence(self, rank: int, signs: dict[int, tuple[str, float]]) -> float:
        """Seconds for which a rank that has begun this piece of work shows no sign of life."""
        key, now = f"alive/{rank}", time.monotonic()
        sign = self._store.get(key).decode() if self._store.check([key]) else ""
        if sign.partition(":")[0] != str(self._op) or sign != signs.get(rank, ("", 0.0))[0]:
            signs[rank] = sign, now
        return now - signs[rank][1] if sign.partition(":")[0] == str(self._op) else 0.0

    @contextmanager
    def _living(self) -> Iterator[None]:
        """Signs of life to the others, for as long as this rank is at work."""
        ended, op = threading.Event(), self._op
        with self._answering():
            store = self._own_store()
            store.set(f"alive/{self.rank}", f"{op}:0")

        def beat() -> None:
            count = 0
            while not ended.wait(_LOOK):
                count += 1
                try:
                    store.set(f"alive/{self.rank}", f"{op}:{count}")
                except RuntimeError:
                    return  # the store is gone: the next meeting says so

        thread = threading.Thread(target=beat, name="fastif signs of life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _own_store(self) -> Any:
        """A connection for signs of life, which must not wait for what this rank asks of the store; one for each group,
        as making one can take seconds."""
        if self.group not in _CONNECTIONS:
            _CONNECTIONS[self.group] = self._store.clone()
        return _CONNECTIONS[self.group]

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, RankFailed):
                raise
            self._broken = f"the store of torch.distributed does not answer ({first_line(error)})"
            raise RankFailed(f"{self._broken}: the process that holds it, usually rank 0, has ended") from error

    def _named(self, ranks: Sequence[int]) -> str:
        return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(str(self._names[rank]) for rank in ranks)}"

    def _lose(self, why: str, what: str) -> None:
        self._broken = why
        raise RankFailed(f"{why} while rank {self._names[self.rank]} waited at {what}: killed, or in another call?")


def _preserve(error: BaseException) -> tuple[str, bytes | None]:
    """An error as others can raise it: what it says, and itself where it comes through whole."""
    text, whole = f"{type(error).__name__}: {error}", None
    if isinstance(error, Exception) and error.args and isinstance(error.args[0], str):
        with suppress(Exception):
            whole = pickle.dumps(error)
            pickle.loads(whole)
    return text, whole


def _revive(rank: int, preserved: tuple[str, bytes | None]) -> Exception:
    text, whole = preserved
    if whole is not None:
        with suppress(Exception):
            error = pickle.loads(whole)
            error.args = (f"on rank {rank}: {error.args[0]}", *error.args[1:])
            return error
    return RankFailed(f"on rank {rank}: {text}")


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
