"""What memory allows: where an exact block's factor stands, and whether there can be a block at all."""

from __future__ import annotations

import math
from typing import Literal

import torch

from fastif.curvature.exact.factor import InPlaceFactor, SeparateFactor
from fastif.curvature.exact.spectral import SpectralFactor
from fastif.curvature.kfac import KFAC
from fastif.curvature.protocol import BlockWork, FitWork, Shape
from fastif.measure import available_bytes

InPlace = bool | Literal["auto"]
Form = InPlace | Literal["eigenvectors"]  # of a factor: whether it stands in place, or eigenvectors beside the block
Place = type[SeparateFactor] | type[InPlaceFactor] | type[SpectralFactor]


def choose_place(form: Form, size: int, item: int, device: torch.device, there: int) -> Place:
    """Where the factor of a block of `size` parameters stands, or will; of the two, `there` bytes are allocated."""
    if form == "eigenvectors":
        return SpectralFactor
    if form != "auto":
        return InPlaceFactor if form else SeparateFactor
    room = available_bytes(device)
    need = SeparateFactor.footprint(size, item)[0] - there
    return SeparateFactor if room is None or need <= room else InPlaceFactor


def check_room(name: str, shape: Shape, form: Form, item: int, device: torch.device) -> None:
    """Raises MemoryError, with the bytes and the estimator that would do, where block and factor do not fit."""
    room, size, gib = available_bytes(device), math.prod(shape), 2**30
    place = choose_place(True if form == "auto" else form, size, item, device, 0)  # "auto": no more than it can do with
    need = sum(place.footprint(size, item))
    if room is None or need <= room:
        return
    others = {
        ("in_place=True and a number as damping" if form == "eigenvectors" else "in_place=True"): sum(
            InPlaceFactor.footprint(size, item)
        ),
        "KFAC or EKFAC": sum(KFAC().cost(BlockWork(shape, 1, False), FitWork(0, 0, item))[:2]),
        "Diagonal": 2 * size * item,
    }
    fits = [f"; {other} takes {taken / gib:.3g} GiB" for other, taken in others.items() if taken <= room]
    take, each = {
        InPlaceFactor: ("with its factor in place takes", item),
        SeparateFactor: ("and factor take", item + 8),
        SpectralFactor: ("and the making of its eigenvectors take", item + 24),
    }[place]
    raise MemoryError(
        f"ExactBlock: {name!r} has {size:,} parameters, so that its block {take} "
        f"{need / gib:.3g} GiB ({size:,} squared times {each} bytes), of which {room / gib:.3g} GiB can be had"
        + "".join(fits[:1])
    )
