"""How unusual an example's label is among its neighbours, in what every layer of a network sees of it.

Of what a training without an example would say of it, the network that was trained with it gives little away: it is
sure of what it knows by heart. Its neighbours do: of examples that look alike to its layers, those with another label
than most are the ones that a network gets wrong unless it has seen them. docs/math.md (34).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from fastif.model.forward import Pair

NEIGHBOURS = 30
PLACES = 4  # to which each axis of an image is pooled: where something is matters little more closely
DIMENSIONS = 128  # to which what enters a layer is projected
MOST_AMONG = 50  # training examples of each label among which a removed one has its rank
ASKED_AT_ONCE = 1024  # examples whose distances to all others are held at a time
_POOL = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_POOL_UNEVENLY = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Seen(NamedTuple):
    """What is seen of some examples in a pass, as the network was trained."""

    views: Tensor  # of what enters the layers (`Views`), [m, layers, d]
    odds: Tensor  # the log-odds of their labels, float64 [m]
    labels: Tensor  # int64 [m]


class Neighbourhoods(NamedTuple):
    """What the neighbours of the removed examples and of the unseen ones say of them, as the network was trained."""

    places: Tensor  # of each removed example among the training examples of its label, in (0, 1), float64 [r]
    odds: Tensor  # the log-odds of the labels of the unseen examples, [m]
    lost: Tensor  # what these lose with the removed neighbours, in nats, [m]
    least: Tensor  # what it leaves them at least, [m]


class Views:
    """What enters each linear and convolutional layer, as a unit vector per example.

    Images are pooled, positions averaged without padding where the batch has a mask of it, and what is longer than
    `DIMENSIONS` is projected at random, from a seed. `readings` say how rows belong to examples (`Sight`). A layer
    whose input has no row for each example says the same of all.
    """

    def __init__(self, model: nn.Module, readings: Mapping[str, str]):
        self._layers = {
            name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, *_CONVOLUTIONS))
        }
        self._readings = readings
        self._projections: dict[str, Tensor] = {}
        self._noted: dict[str, Tensor] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        hooks = [
            module.register_forward_pre_hook(self._note(name), with_kwargs=True)
            for name, module in self._layers.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def take(self, n: int, mask: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Of the batch of n examples that went through the model last, or of these rows of it, [n, layers, DIMENSIONS].

        mask [n, t]: 0 at positions that are padding.
        """
        seen = [self._view(name, self._noted.get(name), n, mask, rows) for name in self._layers]
        self._noted.clear()
        return torch.stack(seen, 1)

    def _note(self, name: str) -> Any:
        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input")
            if name not in self._noted and isinstance(x, Tensor):  # of several calls the first
                self._noted[name] = x.detach()

        return note

    def _view(self, name: str, x: Tensor | None, n: int, mask: Tensor | None, rows: Tensor | None) -> Tensor:
        module = self._layers[name]
        if x is not None and n == 1 and x.dim() == 1:  # some models squeeze a batch of one
            x = x[None]
        reading = self._readings.get(name, "examples")
        if x is None or x.dim() < 2 or not Pair.fits(x, x.shape, n, reading):
            return module.weight.new_zeros(n if rows is None else len(rows), DIMENSIONS, dtype=torch.float32)
        x = Pair.of(name, x, x, n, reading).x
        if rows is not None:
            x, mask = x.unflatten(0, (n, -1))[rows].flatten(0, 1), None if mask is None else mask[rows]
            n = len(rows)
        x = x.float()
        if isinstance(module, _CONVOLUTIONS):
            x = _pooled(x).flatten(1)
        x = x.reshape(n, -1, x.shape[-1])
        counts = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if mask is not None and mask.shape == counts.shape and bool((mask != 0).any(1).all()):
            counts = mask != 0
        sums = x.masked_fill(~counts[..., None], 0.0).sum(1)  # what stands at padding need not be finite
        return F.normalize(self._projected(name, sums / counts.sum(1, keepdim=True)))

    def _projected(self, name: str, x: Tensor) -> Tensor:
        if x.shape[1] <= DIMENSIONS:
            return F.pad(x, (0, DIMENSIONS - x.shape[1]))
        if name not in self._projections or len(self._projections[name]) != x.shape[1]:
            draw = Generator().manual_seed([*self._layers].index(name))
            self._projections[name] = torch.randn(x.shape[1], DIMENSIONS, generator=draw).to(x.device)
        return x @ self._projections[name]


def _pooled(x: Tensor) -> Tensor:
    """Images [n, c, ...] with `PLACES` places along each axis."""
    sizes = x.shape[2:]
    if any(size % PLACES for size in sizes):
        return _POOL_UNEVENLY[len(sizes) - 1](x, PLACES)
    return _POOL[len(sizes) - 1](x, [size // PLACES for size in sizes])  # up to three times as fast


def neighbourhoods(train: Seen, unseen: Seen, drawn: Tensor, gone: Tensor, device: torch.device) -> Neighbourhoods:
    """On `device`; of the training examples those `drawn`, in random order, vote; `gone` [r] are the removed."""
    views, odds, labels = (torch.cat(pair).to(device) for pair in zip(train, unseen, strict=True))
    further = torch.arange(len(train.odds), len(odds), device=device)
    drawn, gone = drawn.to(device), gone.to(device)
    among = torch.cat([drawn[labels[drawn] == label][:MOST_AMONG] for label in labels[gone].unique()])
    asked = torch.cat([gone, among, further]).unique()
    ties = 0.5 + 0.5 * odds / (1 + odds.abs())
    usual, left = torch.full_like(odds, torch.nan), torch.full_like(odds, torch.nan)
    voting = votes(views, labels, asked, drawn.sort().values, gone)
    for values, counts in zip((usual, left), voting, strict=True):
        values[asked] = counts.double() + ties[asked]
    lost, least = torch.zeros_like(odds), torch.zeros_like(odds)
    for label in labels[gone].unique():
        mine = further[labels[further] == label]
        lost[mine], least[mine] = worth(odds[mine], usual[mine], left[mine])
    return Neighbourhoods(quantiles(left, labels, gone, among), odds[further], lost[further], least[further])


def votes(views: Tensor, labels: Tensor, asked: Tensor, voting: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """Of each asked example, how many of its neighbours have its label, summed over the layers: among all that vote and
    among those that are not `gone`, both [a].

    views [m, layers, d] of unit length and labels [m]; asked [a], voting [v] and gone [r] count them, voting in their
    order. Nobody votes on itself.
    """
    of_all, of_kept = (torch.zeros(len(asked), dtype=torch.int64, device=views.device) for _ in range(2))
    leaves = torch.isin(voting, gone)
    own = torch.searchsorted(voting, asked).clamp_(max=len(voting) - 1)  # the place of who is asked among the voting

    def nearest(near: Tensor, rows: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Of the nearest of these rows who has their label, and who stays, [a, most]."""
        values, found = near.topk(min(most, len(voting)), 1)
        vote = values.isfinite()  # where few vote, the last that is found may be who is asked
        return vote & (labels[voting[found]] == labels[rows, None]), vote & ~leaves[found]

    for layer in range(views.shape[1]):
        everyone = views[:, layer]
        voters = everyone[voting].T.contiguous()
        for place in range(0, len(asked), ASKED_AT_ONCE):
            part = slice(place, place + ASKED_AT_ONCE)
            rows, itself = asked[part], own[part]
            near = everyone[rows] @ voters
            votes_too = (voting[itself] == rows).nonzero()[:, 0]
            near[votes_too, itself[votes_too]] = -torch.inf
            # Twice as many are looked up as vote: mostly they tell who votes without those that are gone, too.
            same, stays = nearest(near, rows, 2 * NEIGHBOURS)
            of_all[part] += same[:, :NEIGHBOURS].sum(1)
            found = (same & stays & (stays.cumsum(1) <= NEIGHBOURS)).sum(1)
            (short,) = torch.where(stays.sum(1) < NEIGHBOURS)
            if len(short):
                same, stays = nearest(near[short].masked_fill_(leaves, -torch.inf), rows[short], NEIGHBOURS)
                found[short] = (same & stays).sum(1)
            of_kept[part] += found
    return of_all, of_kept


def worth(odds: Tensor, usual: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """What examples of one label lose with the neighbours that leave, [m] >= 0, and what it leaves them at least, [m].

    odds [m] are their log-odds, `usual` [m] how usual they are with all neighbours and `left` [m] without: the log-odds
    of those that are as usual as the one was, less those of such that are as usual as it is left; and these.
    """
    ranked = usual.sort().values

    def said(of: Tensor) -> Tensor:
        places = torch.searchsorted(ranked, of) + torch.searchsorted(ranked, of, right=True)
        return odds.quantile(places.double() / (2 * len(usual)))

    least = said(left)
    return (said(usual) - least).clamp_(min=0), least


def quantiles(values: Tensor, labels: Tensor, asked: Tensor, among: Tensor) -> Tensor:
    """Of each asked example, the share of those among whom it stands, with its label, that have less: float64 [a].

    In (0, 1): with s of its label it is (less + ½ equal + ½) / (s + 1), where the example itself does not count.
    """
    found = torch.empty(len(asked), dtype=torch.float64, device=values.device)
    for label in labels[asked].unique():
        mine = (labels[asked] == label).nonzero()[:, 0]
        rows, others = asked[mine], among[labels[among] == label]
        own, theirs = values[rows, None], values[others]
        counts = rows[:, None] != others
        less = ((theirs < own) & counts).sum(1) + 0.5 * ((theirs == own) & counts).sum(1)
        found[mine] = (less + 0.5).double() / (counts.sum(1) + 1)
    return found
