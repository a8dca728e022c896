"""Patches: what the kernel of a convolution sees at each position, and their second moment without them.

docs/math.md (15).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Pairs = tuple[tuple[int, int], int | None, int | None]  # a step; a row and a column of the kernel, None: of all
_ENTRIES = 1 << 21  # of an image and its copies that stand at a time: 8 MiB in float32


class Window(NamedTuple):
    """How a kernel slides over an image: entry k of an axis sees pixel p·stride + k·dilation − before at position p."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]  # zeros beside the image
    after: tuple[int, ...]
    positions: tuple[int, ...]

    def patches(self, x: Tensor, groups: int, ones: bool) -> Tensor:
        """[g, n, t, d] for an image [n, channels, ...]; with `ones` a last entry 1. In memory t runs fastest."""
        n, t, entries = len(x), math.prod(self.positions), x.shape[1] // groups * math.prod(self.kernel)
        margins = [m for b, a in reversed(list(zip(self.before, self.after, strict=True))) for m in (b, a)]
        x = F.pad(x, margins) if any(margins) else x
        axes = x.stride()[2:]
        seen = x.as_strided(
            (groups, n, x.shape[1] // groups, *self.kernel, *self.positions),
            (
                x.stride(1) * (x.shape[1] // groups),
                *x.stride()[:2],
                *(a * s for a, s in zip(axes, self.dilation, strict=True)),
                *(a * s for a, s in zip(axes, self.stride, strict=True)),
            ),
            x.storage_offset(),
        )
        out = x.new_empty((groups, n, entries + ones, t))
        out[:, :, :entries].unflatten(3, self.positions).unflatten(2, seen.shape[2 : -len(self.positions)]).copy_(seen)
        if ones:
            out[:, :, entries:] = 1
        return out.mT

    def moment_is_shorter(self, channels: int, size: torch.Size) -> bool:
        """Whether `PatchMoment` takes far fewer operations than the product of the patches would."""
        if len(size) > 2 or math.prod(self.positions) == 1 or any(step != 1 for step in self.stride):
            return False
        area = math.prod(length + (k - 1) * s for length, k, s in zip(size, self.kernel, self.dilation, strict=True))
        shifts = (math.prod(2 * k - 1 for k in self.kernel) + 1) // 2
        entries = channels * math.prod(self.kernel)
        return 2 * shifts * area * channels**2 < math.prod(self.positions) * entries**2


class PatchMoment:
    """Σ_i weights[i] Σ_t a_it a_itᵀ of the patches a (of one group), for strides of 1: examples are added, then it is
    one matrix.

    Entries k and m of the kernel see pixels that are a fixed step apart, at all positions. So the products of all
    pixels with those one step on are the moment of every such pair, but for pixels that k does not reach: of the
    (Π kernel)² pairs only the different steps cost a product, and a place to be summed in.
    """

    def __init__(self, window: Window, ones: bool):
        self._window = window
        if len(window.kernel) == 1:  # one axis: an image of one row
            self._window = Window(*((first, *rest) for first, rest in zip((1, 1, 1, 0, 0, 1), window, strict=True)))
        self._ones = ones
        self._total: dict[Pairs, Tensor] = {}
        self._image = self._weight = torch.zeros(())  # Σ_i weights[i] x_i, Σ_i weights[i]

    def add(self, x: Tensor, weights: Tensor) -> PatchMoment:
        """With the patches of images x [n, channels, ...]."""
        x, weights = x if x.dim() == 4 else x[:, :, None], weights.to(x)
        shifted = _Shifted(self._window, x.shape)
        each = max(1, _ENTRIES // (2 * shifted.area * x.shape[1]))
        for begin in range(0, len(x), each):
            for key, value in shifted.products(x[begin : begin + each], weights[begin : begin + each]):
                self._total[key] = self._total[key].add_(value) if key in self._total else value
        if self._ones:
            self._image = torch.einsum("n,nchw->chw", weights, x) + self._image.to(x)
            self._weight = weights.sum() + self._weight.to(x)
        return self

    def matrix(self) -> Tensor:
        """[1, d, d]."""
        kernel = list(product(*map(range, self._window.kernel)))
        one = self._total[(0, 0), None, None]
        moment = one.new_empty((len(one), len(kernel), len(one), len(kernel)))
        for (number, k), (other, m) in product(enumerate(kernel), repeat=2):
            if number <= other:
                step = m[0] - k[0], m[1] - k[1]
                value = self._total[step, None, None].clone()
                missed: list[tuple[Pairs, int]] = [
                    ((step, k[0], None), -1),
                    ((step, None, k[1]), -1),
                    ((step, k[0], k[1]), 1),
                ]
                for pairs, sign in missed:
                    if pairs in self._total:
                        value.add_(self._total[pairs], alpha=sign)
                moment[:, number, :, other] = value
                moment[:, other, :, number] = value.T
        moment = moment.view(len(one) * len(kernel), -1)
        return (self._with_ones(moment) if self._ones else moment)[None]

    def _with_ones(self, moment: Tensor) -> Tensor:
        window = self._window
        image = F.pad(self._image, (window.before[1], window.after[1], window.before[0], window.after[0]))
        (h, w), (dh, dw) = window.positions, window.dilation
        sums = [
            image[:, i * dh : i * dh + h, j * dw : j * dw + w].sum((1, 2))
            for i, j in product(*map(range, window.kernel))
        ]
        column = torch.stack(sums, 1).flatten()
        corner = (self._weight * math.prod(window.positions)).view(1, 1)
        return torch.cat([torch.cat([moment, column[:, None]], 1), torch.cat([column[None], corner], 1)])


class _Shifted:
    """Products of an image's pixels with those a step on: of all, and of those that a kernel's entry never sees."""

    def __init__(self, window: Window, shape: torch.Size):
        self.window, (self.height, self.width) = window, shape[2:]
        gaps = [(k - 1) * s for k, s in zip(window.kernel, window.dilation, strict=True)]
        self.rows, self.columns = self.height + gaps[0], self.width + gaps[1]  # zeros keep rows and images apart
        self.area = self.rows * self.columns

    def products(self, x: Tensor, weights: Tensor) -> Iterator[tuple[Pairs, Tensor]]:
        """[c, c]: of all pixels, of those in rows that the kernel's row never sees, in such columns, in both."""
        n, c = x.shape[:2]
        image = x.new_zeros((n, self.rows, self.columns, c))
        image[:, : self.height, : self.width] = x.permute(0, 2, 3, 1)
        weighted = image * weights[:, None, None, None]
        flat, flat_weighted = image.flatten(0, 2), weighted.flatten(0, 2)
        (kh, kw), (dh, dw) = self.window.kernel, self.window.dilation
        for dr, dc in product(range(kh), range(1 - kw, kw)):
            if dr == 0 and dc < 0:
                continue
            step = dr * dh * self.columns + dc * dw
            yield ((dr, dc), None, None), flat_weighted[: len(flat) - step].T @ flat[step:]
            rows = {i: self._missed(0, i, dr * dh) for i in range(kh - dr)}
            columns = {j: self._missed(1, j, dc * dw) for j in range(max(0, -dc), kw - max(0, dc))}
            everywhere = range(self.height), range(self.width)
            for i, missed in rows.items():
                if missed:
                    yield ((dr, dc), i, None), _apart(weighted, image, missed, everywhere[1], dr * dh, dc * dw)
            for j, missed in columns.items():
                if missed:
                    yield ((dr, dc), None, j), _apart(weighted, image, everywhere[0], missed, dr * dh, dc * dw)
            for (i, missed), (j, missing) in product(rows.items(), columns.items()):
                if missed and missing:
                    yield ((dr, dc), i, j), _apart(weighted, image, missed, missing, dr * dh, dc * dw)

    def _missed(self, axis: int, k: int, step: int) -> list[int]:
        """Places of the image that entry k of the kernel never sees, though a pixel a step on is in the image."""
        first = k * self.window.dilation[axis] - self.window.before[axis]
        seen = range(first, first + self.window.positions[axis])
        size = (self.height, self.width)[axis]
        return [place for place in range(size) if place not in seen and 0 <= place + step < size]


def _apart(
    weighted: Tensor, image: Tensor, rows: Iterable[int], columns: Iterable[int], down: int, right: int
) -> Tensor:
    """Σ of the products of the pixels at rows × columns with those `down` and `right` of them, [c, c]."""
    columns = [j for j in columns if 0 <= j + right < image.shape[2]]
    rows = [i for i in rows if 0 <= i + down < image.shape[1]]
    i, j = (torch.tensor(places, dtype=torch.int64, device=image.device) for places in (rows, columns))
    i = i[:, None]
    return weighted[:, i, j].flatten(0, 2).T @ image[:, i + down, j + right].flatten(0, 2)
