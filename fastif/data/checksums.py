"""Checksums of a batch: one number for every example, which differs where anything of the example does.

Σ_j w_j · mix(word_j) modulo 2⁶⁴ over the 64-bit words of an example, with fixed odd weights w. Integer sums come out
the same in every order: on any device and with any number of threads. mix(v) = v ⊕ (v ≫ 29) brings what differs in a
word's high bits (the sign of a float) into its low ones, where the product keeps it. It guards against accidents, not
against an adversary.
"""

from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastif.data.batch import Shared, batch_length, parts_of
from fastif.files import canonical
from fastif.fingerprints import described
from fastif.sharded import gathered

_SHIFT = 29
_RUN = 4096  # words that have weights of their own; a longer example is a row of runs
_NEAR = 1 << 15  # words that are mixed at a time: they stay in a cache


def checksums(x: Any, y: Any) -> tuple[Tensor, int]:
    """Of every example of a batch, int64 [n] on the CPU, and of what all of them share."""
    n = len(y) if isinstance(y, Tensor) and y.dim() else batch_length(x)
    rows, shared = list[Tensor](), 0
    for path, value in parts_of((x, y)):
        held = value.value if isinstance(value, Shared) else value
        by_row = n == 1 or not isinstance(value, Shared)  # of one example, what has one row may be either
        if by_row and isinstance(held, Tensor) and held.dim() and len(held) == n:
            rows.append(_sums(held) * _name(path, held.dtype, held.shape[1:]))
        elif by_row and isinstance(held, list | tuple) and len(held) == n:
            rows.append(torch.tensor([_of_text(one) for one in held]) * _name(path))
        else:
            shared += sum(_of_part(path + inner, part) for inner, part in parts_of(held))
    total = rows[0]
    for part in rows[1:]:
        total += part.to(total.device)
    return total.cpu(), _signed(shared)


def checksum(values: Tensor) -> int:
    """Of one tensor: of its bits, its shape and its type. Parts on ranks are gathered: all of these call it."""
    return _signed(_of_part("", gathered(values)))


def _of_part(path: str, part: Any) -> int:
    if isinstance(part, Tensor):
        return int(_sums(part[None])[0]) * _name(path, part.dtype, part.shape)
    return _of_text(part) * _name(path)


def _sums(values: Tensor) -> Tensor:
    """Of the rows of a tensor, int64 [n], on its device."""
    return _of_words(_words(values.detach()))


def _words(values: Tensor) -> Tensor:
    """The bits of every row, int64 [n, words], zeros behind them where they fill no word."""
    if values.layout != torch.strided:
        values = values.to_dense()
    if values.is_conj() or values.is_neg():
        values = values.clone().resolve_conj().resolve_neg()
    flat = values.reshape(len(values), -1).contiguous()
    size = flat.shape[1] * flat.element_size()
    if size % 8 or flat.storage_offset() * flat.element_size() % 8:
        padded = torch.zeros((len(flat), -(-size // 8) * 8), dtype=torch.uint8, device=flat.device)
        padded[:, :size] = flat.view(torch.uint8) if size else flat.new_zeros((len(flat), 0), dtype=torch.uint8)
        flat = padded
    return flat.view(torch.int64) if size else flat.new_zeros((len(flat), 0), dtype=torch.int64)


def _of_words(words: Tensor) -> Tensor:
    n, w = words.shape
    if w > _RUN:
        runs, rest = divmod(w, _RUN)
        whole = words[:, : w - rest].reshape(n * runs, _RUN)  # of one row a view: a large tensor is not copied
        sums = _of_words(whole).view(n, runs)
        return _of_words(torch.cat([sums, _of_words(words[:, w - rest :])[:, None]], 1) if rest else sums)
    if words.device.type != "cpu":
        mixed = ((words >> _SHIFT) & ((1 << (64 - _SHIFT)) - 1)) ^ words  # >> of a signed number brings its sign along
        return (mixed * torch.from_numpy(_weights(w).view(np.int64)).to(words.device)).sum(1)
    bits, out = words.numpy().view(np.uint64), np.empty(n, np.uint64)
    weights = _weights(w)
    each = max(1, _NEAR // max(1, w))
    for start in range(0, n, each):
        part = bits[start : start + each]
        mixed = part >> np.uint64(_SHIFT)
        mixed ^= part
        np.einsum("ij,j->i", mixed, weights, out=out[start : start + each])
    return torch.from_numpy(out.view(np.int64))


@lru_cache(maxsize=64)
def _weights(w: int) -> np.ndarray:
    """Odd numbers, uint64 [w]: those of SplitMix64."""
    z = np.arange(1, w + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


@lru_cache(maxsize=4096)
def _name(*parts: Any) -> int:
    """An odd factor for a part of this name, type and shape."""
    return _of_text(" ".join(map(str, parts))) | 1


def _of_text(value: Any) -> int:
    """Of a string, number or None; of any other object what it is and holds, where that can be told."""
    if value is None or isinstance(value, str | bytes | int | float | complex):
        text = repr(value)
    elif isinstance(value, list | tuple):
        text = repr([type(value).__qualname__, *map(_of_text, value)])
    else:
        try:
            text = canonical(described(value))
        except ValueError:  # such as an open file
            text = type(value).__qualname__
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _signed(number: int) -> int:
    """Modulo 2⁶⁴, as int64 has it."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
