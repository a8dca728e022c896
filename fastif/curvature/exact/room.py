"""What memory allows: where an exact block's factor stands, and whether there can be a block at all."""

from __future__ import annotations

import math
from typing import Literal

import torch

from fastif.curvature.exact.factor import InPlaceFactor, SeparateFactor
from fastif.curvature.kfac import KFAC
from fastif.curvature.protocol import BlockWork, FitWork, Shape
from fastif.measure import available_bytes

InPlace = bool | Literal["auto"]
Place = type[SeparateFactor] | type[InPlaceFactor]


def choose_place(in_place: InPlace, size: int, item: int, device: torch.device, there: int) -> Place:
    """Where the factor of a block of `size` parameters stands, or will; of the two, `there` bytes are allocated."""
    if in_place != "auto":
        return InPlaceFactor if in_place else SeparateFactor
    room = available_bytes(device)
    need = SeparateFactor.footprint(size, item)[0] - there
    return SeparateFactor if room is None or need <= room else InPlaceFactor


def check_room(name: str, shape: Shape, in_place: InPlace, item: int, device: torch.device) -> None:
    """Raises MemoryError, with the bytes and the estimator that would do, where block and factor do not fit."""
    room, size, gib = available_bytes(device), math.prod(shape), 2**30
    place = InPlaceFactor if in_place else SeparateFactor  # "auto" asks for no more than it can do with
    need = sum(place.footprint(size, item))
    if room is None or need <= room:
        return
    others = {
        "in_place=True": sum(InPlaceFactor.footprint(size, item)),
        "KFAC or EKFAC": sum(KFAC().cost(BlockWork(shape, 1, False), FitWork(0, 0, item))[:2]),
        "Diagonal": 2 * size * item,
    }
    fits = [f"; {other} takes {taken / gib:.3g} GiB" for other, taken in others.items() if taken <= room]
    take, each = ("with its factor in place takes", item) if in_place else ("and factor take", item + 8)
    raise MemoryError(
        f"ExactBlock: {name!r} has {size:,} parameters, so that its block {take} "
        f"{need / gib:.3g} GiB ({size:,} squared times {each} bytes), of which {room / gib:.3g} GiB can be had"
        + "".join(fits[:1])
    )
