"""What torch.distributed says: which rank this process is, of how many, and what tensors they exchange.

fastif starts no processes for it and makes no process group: it reads the one that is there. Without one, or with one
of a single rank, every method here gives back what it was given, and nothing is sent.

Sums over ranks are taken in the order of the ranks, each chunk by one of them, in float64 where the terms are float32:
they are the same from run to run, and rounding to float32 once is all that they add to the error of the terms. Ranks
meet before every exchange (`fastif.meetings`). docs/math.md (27), docs/scale.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from fastif.meetings import Meetings, RankFailed, first_line

__all__ = [
    "ALONE",
    "BUCKET",
    "RankFailed",
    "Ranks",
    "aligned",
    "apart",
    "divide",
    "find_ranks",
    "on_all_ranks",
    "stretch",
    "together",
]

# Bytes that are exchanged at a time: enough for the bandwidth. Up to six times as many stand beside the fit.
BUCKET = 1 << 24

Method = TypeVar("Method", bound=Callable[..., Any])


class Ranks(Meetings):
    """The processes among which work is divided, seen from one of them; `find_ranks` gives it."""

    def __init__(self, group: Any = None):
        super().__init__(group)
        self.bytes_sent = self.bytes_received = 0  # by this rank, of tensors; the store's few bytes are not counted

    @staticmethod
    def of(rank: int, world: int) -> Ranks:
        """One of ranks that are not there, for plans: it says which it is, and meets nobody."""
        made = Ranks()
        made.rank, made.world = rank, world
        return made

    def __reduce__(self) -> Any:  # where it is read again, the group that is there counts
        return find_ranks, ()

    def check_device(self, device: torch.device) -> None:
        """Raises ValueError where the process group cannot send what is on the device."""
        if self.world > 1 and device.type == "cuda" and "nccl" not in str(dist.get_backend_config(self.group)):
            raise ValueError(
                f"the process group is of {dist.get_backend(self.group)}, which sends no CUDA tensors, and the model "
                f"is on {device}: call init_process_group('nccl'), or 'cpu:gloo,cuda:nccl'"
            )

    @property
    def device(self) -> torch.device:
        """Where tensors have to be to be sent, of those that are on no device in particular."""
        alone = self.world == 1 or "cpu" in str(dist.get_backend_config(self.group))
        return torch.device("cpu") if alone else torch.device("cuda", torch.cuda.current_device())

    def sum(self, what: str, tensor: Tensor) -> Tensor:
        """The sum over ranks of tensors of one shape, on all of them."""
        if self.world == 1:
            return tensor
        self.meet(f"{what}, {list(tensor.shape)}")
        return self._sum_flat(tensor.reshape(-1)).view(tensor.shape)

    def sum_each(
        self, what: str, tensors: Mapping[Any, Tensor], owner_of: Callable[[Any], int | None], device: torch.device
    ) -> dict[Any, Tensor]:
        """Sums over ranks by name: of a name with an owner on that rank alone, of the others on all ranks.

        A rank that has nothing to add to a name leaves it out. Returns those that this rank is to have.
        """
        if self.world == 1:
            return dict(tensors)
        known: dict[Any, tuple[tuple[int, ...], torch.dtype]] = {}
        for theirs in self.meet(what, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}):
            for name, form in theirs.items():
                if known.setdefault(name, form) != form:
                    raise ValueError(
                        f"{what}: {name} has the shape and type {known[name]} on one rank, {form} on another"
                    )
        owners = {name: owner for name in known if (owner := owner_of(name)) is not None}
        out: dict[Any, Tensor] = {}
        for names in _buckets(known, owners):
            form = known[names[0]][1]
            pieces = {
                name: tensors[name].reshape(-1)
                if name in tensors
                else torch.zeros(torch.Size(known[name][0]).numel(), dtype=form, device=device)
                for name in names
            }
            if names[0] in owners:
                order = sorted(names, key=lambda name: owners[name])
                sizes = [sum(len(pieces[n]) for n in order if owners[n] == rank) for rank in range(self.world)]
                summed = self._scatter(_flat([pieces[name] for name in order]), sizes)
                mine = [name for name in order if owners[name] == self.rank]
            else:
                summed, mine = self._sum_flat(_flat([*pieces.values()])), names
            parts = summed.split([len(pieces[name]) for name in mine]) if mine else ()
            out.update({n: part.view(known[n][0]) for n, part in zip(mine, parts, strict=True)})
        return {name: out[name] for name in known if name in out}

    def gather(self, what: str, tensors: Mapping[Any, Tensor], device: torch.device) -> list[dict[Any, Tensor]]:
        """The tensors of every rank, by rank; their names, shapes and types may differ."""
        if self.world == 1:
            return [dict(tensors)]
        forms = self.meet(what, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
        out: list[dict[Any, Tensor]] = []
        for rank, theirs in enumerate(forms):
            out.append({})
            for names in _buckets(theirs, {}):
                sizes = [torch.Size(theirs[name][0]).numel() for name in names]
                if rank == self.rank:
                    flat = _flat([tensors[name].detach().reshape(-1) for name in names])
                else:
                    flat = torch.empty(sum(sizes), dtype=theirs[names[0]][1], device=device)
                if len(flat):
                    self._count(*((self.world - 1, 0) if rank == self.rank else (0, 1)), flat.nbytes)
                    with self._exchanging(what):
                        dist.broadcast(_sendable(flat), group_src=rank, group=self.group)
                if rank != self.rank:
                    out[-1].update(
                        {n: aligned(p.view(theirs[n][0])) for n, p in zip(names, flat.split(sizes), strict=True)}
                    )
            if rank == self.rank:
                out[-1] = {name: aligned(tensor.detach()) for name, tensor in tensors.items()}
        return out

    def exchange(
        self, what: str, sent: Sequence[Mapping[Any, Tensor]], device: torch.device
    ) -> list[dict[Any, Tensor]]:
        """What each rank has for this one, by rank; `sent`: what this one has for each, itself included."""
        if self.world == 1:
            return [dict(sent[0])]
        told = self.meet(what, [{name: (tuple(t.shape), t.dtype) for name, t in own.items()} for own in sent])
        forms = [of[self.rank] for of in told]
        out: list[dict[Any, Tensor]] = [{} for _ in forms]
        out[self.rank] = dict(sent[self.rank])
        for dtype in sorted({form[1] for of in told for own in of for form in own.values()}, key=str):
            mine = [
                [t.detach().reshape(-1) for t in own.values() if t.dtype == dtype and rank != self.rank]
                for rank, own in enumerate(sent)
            ]
            names = [
                [name for name, form in own.items() if form[1] == dtype and rank != self.rank]
                for rank, own in enumerate(forms)
            ]
            sizes = [sum(map(len, parts)) for parts in mine]
            coming = [[torch.Size(forms[rank][name][0]).numel() for name in own] for rank, own in enumerate(names)]
            flat = torch.cat([part for parts in mine for part in parts] or [torch.empty(0, dtype=dtype, device=device)])
            received = flat.new_empty(sum(map(sum, coming)))
            self._count(1, 0, flat.nbytes)
            self._count(0, 1, received.nbytes)
            with self._exchanging(what):
                dist.all_to_all_single(received, flat, [sum(one) for one in coming], sizes, group=self.group)
            parts = received.split([size for one in coming for size in one])
            places = [(rank, name) for rank, own in enumerate(names) for name in own]
            for (rank, name), part in zip(places, parts, strict=True):
                out[rank][name] = aligned(part.view(forms[rank][name][0]))
        return out

    def of_first(self, what: str, tensors: Mapping[Any, Tensor], device: torch.device) -> dict[Any, Tensor]:
        """The first rank's tensors, on all ranks: of what each could make, and might round otherwise or draw."""
        return self.gather(what, tensors if self.rank == 0 else {}, device)[0]

    def join(self, what: str, rows: Tensor | None, device: torch.device, dim: int = 0) -> Tensor:
        """The rows of all ranks, one rank's after another's; None: none. The ranks must not all have none."""
        if self.world == 1:
            assert rows is not None
            return rows
        gathered = self.gather(what, {} if rows is None else {"": rows.contiguous()}, device)
        return torch.cat([part[""] for part in gathered if part], dim)

    def _sum_flat(self, flat: Tensor) -> Tensor:
        """Chunk r of the sum is made by rank r and sent to all: 2 (W − 1)/W of its bytes are sent by each."""
        each = -(-len(flat) // self.world)
        padded = torch.cat([flat, flat.new_zeros(each * self.world - len(flat))])
        chunk = self._scatter(padded, [each] * self.world)
        out = [torch.empty_like(chunk) for _ in range(self.world)]
        self._count(self.world - 1, self.world - 1, chunk.nbytes)
        with self._exchanging("a sum"):
            dist.all_gather(out, chunk, group=self.group)
        return torch.cat(out)[: len(flat)]

    def _scatter(self, flat: Tensor, sizes: list[int]) -> Tensor:
        """Part r of the sum over ranks, which is all that rank r gets; added up in the order of the ranks."""
        mine, step = sizes[self.rank], max(1, BUCKET // (self.world * flat.itemsize))
        wide = torch.float64 if flat.is_floating_point() else flat.dtype
        summed, parts = flat.new_empty(mine), flat.split(sizes)
        self.bytes_sent += (len(flat) - mine) * flat.itemsize
        self.bytes_received += (self.world - 1) * mine * flat.itemsize
        for begin in range(0, max(sizes), step):  # of large parts a piece at a time: every rank's arrive at once
            pieces = [part[begin : begin + step] for part in parts]
            own = summed[begin : begin + step]
            received = flat.new_empty(self.world * len(own))
            sent = flat if max(sizes) <= step else _flat([piece for piece in pieces if len(piece)])
            with self._exchanging("a sum"):
                dist.all_to_all_single(received, sent, [len(own)] * self.world, [*map(len, pieces)], group=self.group)
            terms = received.view(self.world, len(own))
            total = terms[0].to(wide, copy=True)
            for term in terms[1:]:
                total += term
            own.copy_(total)
        return summed

    def _count(self, sent: int, received: int, each: int) -> None:
        self.bytes_sent += sent * each
        self.bytes_received += received * each

    @contextmanager
    def _exchanging(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._broken = f"an exchange between ranks failed ({first_line(error)})"
            raise RankFailed(
                f"rank {self._names[self.rank]}: {self._broken} in {what}: another rank has ended, or the network has"
            ) from error


ALONE = Ranks()
_known: WeakKeyDictionary[Any, Ranks] = WeakKeyDictionary()  # by group
_apart = False


def find_ranks(group: Any = None) -> Ranks:
    """The ranks of a process group, default all that there are; this process alone where no group was made, or `apart`.

    Raises ValueError where WORLD_SIZE says that there are several and no group is there, and for a group that this
    process does not belong to.
    """
    if _apart and group is None:
        return ALONE
    if not (dist.is_available() and dist.is_initialized()):
        world = os.environ.get("WORLD_SIZE", "1")
        if group is not None:
            raise ValueError("group= was given, and torch.distributed has no process group: call init_process_group()")
        if world.isdigit() and int(world) > 1:
            raise ValueError(
                f"WORLD_SIZE={world} is in the environment, and torch.distributed has no process group: call "
                "torch.distributed.init_process_group('gloo') ('nccl' on GPUs) first, or unset WORLD_SIZE for a "
                "process that works alone"
            )
        return ALONE
    if group is None and dist.get_world_size() == 1:
        return ALONE
    group = dist.group.WORLD if group is None else group
    if dist.get_rank(group) < 0:
        raise ValueError("group=: this process is not a member of the group")
    if group not in _known:
        _known[group] = Ranks(group)
    return _known[group]


@contextmanager
def apart() -> Iterator[None]:
    """Work that this process does while the others do something else: no ranks are found in it."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def together(method: Method) -> Method:
    """A method that all ranks of its object's `ranks` call at once."""

    @wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.ranks.together(method.__name__):
            return method(self, *args, **kwargs)

    return wrapped  # pyright: ignore[reportReturnType]


def on_all_ranks(function: Method) -> Method:
    """A function that all ranks that there are call at once."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with find_ranks().together(function.__name__):
            return function(*args, **kwargs)

    return wrapped  # pyright: ignore[reportReturnType]


def divide(costs: Mapping[Any, float], world: int) -> dict[Any, int]:
    """An owner for everything that costs something: the costliest first, each to the rank that has the least so far."""
    loads, owners = [0.0] * world, dict[Any, int]()
    for key, cost in sorted(((key, cost) for key, cost in costs.items() if cost > 0), key=lambda pair: -pair[1]):
        owners[key] = min(range(world), key=loads.__getitem__)
        loads[owners[key]] += cost
    return owners


def stretch(number: int, rank: int, world: int) -> range:
    """A rank's run of `number` things in order: runs differ by one in length at most."""
    return range(number * rank // world, number * (rank + 1) // world)


def _buckets(
    forms: Mapping[Any, tuple[tuple[int, ...], torch.dtype]], owners: Mapping[Any, int]
) -> Iterator[list[Any]]:
    """Names that travel together: of one type, all with owners or all without, and not too many bytes."""
    kinds: dict[tuple[torch.dtype, bool], list[Any]] = {}
    for name, (_, dtype) in forms.items():
        kinds.setdefault((dtype, name in owners), []).append(name)
    for (dtype, _), names in kinds.items():
        some, nbytes = list[Any](), 0
        for name in names:
            size = torch.Size(forms[name][0]).numel() * dtype.itemsize
            if some and nbytes + size > BUCKET:
                yield some
                some, nbytes = [], 0
            some.append(name)
            nbytes += size
        yield some


def aligned(tensor: Tensor) -> Tensor:
    """As torch allocates tensors: products round by how their operands lie in memory, and all ranks are to get the same
    bits of what one of them made and the others received."""
    own = tensor.is_contiguous() and tensor.data_ptr() % 64 == 0
    return tensor if own else tensor.clone(memory_format=torch.contiguous_format)


def _flat(parts: Sequence[Tensor]) -> Tensor:
    """One after another; a single one, which may be large, is not copied."""
    return torch.cat([*parts]) if len(parts) > 1 else parts[0]


def _sendable(flat: Tensor) -> Tensor:
    return flat.view(torch.uint8) if flat.dtype == torch.bool else flat
