"""One batch that went through a model, and the gradients example by example that a backward pass brings."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastif.model.gradients import Dense, Gradients, OneHot, joined
from fastif.model.layers import Block, Use, loose_gradients
from fastif.model.sliced_gradients import Sliced
from fastif.sharded import Sharding, Step

SLICE = 1 << 21  # of a layer's factors that stand at a time: 8 MiB in float32
READINGS = ("examples", "groups", "positions first, groups", "second axis")


@dataclass
class Sight:
    """How what layers see belongs to examples: found on the first batch, and the same for all others."""

    readings: dict[str, str] = field(default_factory=dict)  # of sources that are not read as "examples"
    shared: set[str] = field(default_factory=set)  # sources that see one row for all examples
    batched: bool = True  # whether one backward pass can be taken for all examples at once (`torch.vmap` knows how)


class Seen:
    """One call of a layer: its input, and where its output stands in the graph.

    The output itself is not held: mostly nothing else needs it once the next layer has run.
    """

    def __init__(self, x: Tensor, y: Tensor):
        self.x, self.version, self.edge = x, x._version, torch.autograd.graph.get_gradient_edge(y)
        self.y, self.y_version = weakref.ref(y), y._version
        self.shape, self.dtype, self.device = y.shape, y.dtype, y.device


class Pair:
    """What a layer saw and what is asked of its output, k rows of both for every example, one example after another."""

    def __init__(self, x: Tensor, u: Tensor, k: int = 1):
        self.x, self.u, self.k = x, u, k

    @staticmethod
    def fits(x: Tensor, outputs: torch.Size, n: int, reading: str) -> bool:
        """Whether input and output have the shape for a reading."""
        if not x.dim() or not outputs:
            return False
        if reading == "second axis":
            return x.dim() > 1 and x.shape[1] == n and outputs[:2] == x.shape[:2]
        return len(x) == outputs[0] and (len(x) == n if reading == "examples" else len(x) > 0 and len(x) % n == 0)

    @staticmethod
    def of(source: str, x: Tensor, u: Tensor, n: int, reading: str) -> Pair:
        if Pair.fits(x, u.shape, n, reading):
            k = len(x) // n
            if reading == "examples":
                return Pair(x, u)
            if reading == "groups":
                return Pair(x, u, k)
            if reading == "positions first, groups":
                x, u = (z.unflatten(0, (k, n)).transpose(0, 1).flatten(0, 1) for z in (x, u))
                return Pair(x, u, k)
            return Pair(x.transpose(0, 1), u.transpose(0, 1))
        raise ValueError(
            f"capture: layer {source!r} saw an input of shape {list(x.shape)}, whose rows are not those of the batch "
            f"of {n} as they are read ({reading}); let the model keep the batch first, or leave the layer out with "
            "layers="
        )

    def gradients(self, use: Use, begin: int, end: int) -> Dense | OneHot:
        rows = slice(begin * self.k, end * self.k)
        made = use.gradients(self.x[rows], self.u[rows])
        return made if self.k == 1 else made.regrouped(self.k)

    def empty(self, n: int, mask: Tensor | None) -> Tensor | None:
        """Positions [n, t] whose output takes no gradient and to which no attention is paid, where there are any."""
        u = self.u.reshape(n, -1, self.u.shape[-1])
        if u.shape[1] < 2 or bool((u.sum(-1) != 0).all()):
            return None
        empty = (u == 0).all(-1)
        if mask is not None and mask.shape == empty.shape:
            empty &= mask == 0
        return empty if bool(empty.any()) else None


class Forward:
    """One batch that went through the model: its outputs, and the gradients that a backward pass brings."""

    def __init__(
        self,
        outputs: Any,
        n: int,
        blocks: Mapping[str, Block],
        seen: dict[str, list[Seen]],
        sight: Sight,
        mask: Tensor | None,
        batch: int | None,
        sharding: Sharding | None = None,
    ):
        self.outputs, self.n, self.seen, self._sharding = outputs, n, seen, sharding
        self._blocks, self.sight, self._mask, self._batch = blocks, sight, mask, batch

    @property
    def nbytes(self) -> int:
        """Of the inputs and outputs of covered layers, and of gradients that have to be formed."""
        calls = (s for uses in self.seen.values() for s in uses)
        formed = sum(p.numel() * p.itemsize for block in self._blocks.values() if block.loose for p in block.parameters)
        return sum(s.x.nbytes + s.shape.numel() * s.dtype.itemsize for s in calls) + self.n * formed

    def head(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Inputs [n, d] (with the 1 of a bias) and logits [n, c] of a block whose output is the model's, else None."""
        uses = self._blocks[name].uses
        calls = [s for use in uses for s in self.seen.get(use.source, ())]
        if len(uses) != 1 or len(calls) != 1 or not isinstance(self.outputs, Tensor) or self.outputs.dim() != 2:
            return None
        (use,), (s,) = uses, calls
        if s.y() is not self.outputs or self.outputs._version != s.y_version:
            return None
        logits = computable(self.outputs.detach())
        gradients = use.gradients(computable(s.x.detach()), logits)
        if not isinstance(gradients, Dense) or gradients.positions > 1 or len(gradients.inputs) > 1:
            return None
        if not torch.equal(gradients.output_grads[0, :, 0], logits):  # a normalisation layer's u is not the output's
            return None
        return gradients.inputs[0, :, 0], logits

    def gradients(
        self, target: Tensor, column: Tensor | None = None, keep: bool = False, moments: bool = True
    ) -> dict[str, Gradients]:
        """Per-sample gradients of every block: of target [n] (summed), or of ⟨column, target⟩.

        keep: whether the graph will be walked again. moments: whether these will be asked for, and `counts`: only then
        is padding told apart from data.
        """
        loose = list({p: None for block in self._blocks.values() if block.loose for p in block.parameters})
        pairs = self.pairs(target, column, keep or bool(loose))
        each = dict(zip(loose, self.each_example(target, loose, column, keep), strict=True))
        self.check_finite(pairs, each)
        return {
            name: loose_gradients(each[block.parameters[0]]) if block.loose else self.of_block(block, pairs, moments)
            for name, block in self._blocks.items()
        }

    def pairs(self, target: Tensor, column: Tensor | None = None, keep: bool = False) -> dict[str, list[Pair]]:
        """What every source saw and was asked for, call by call."""
        raw = self.raw_pairs(target, column, keep)
        readings = self.sight.readings
        return {
            source: [Pair.of(source, x, u, self.n, readings.get(source, "examples")) for x, u in found]
            for source, found in raw.items()
        }

    def raw_pairs(
        self, target: Tensor, column: Tensor | None = None, keep: bool = False
    ) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """The same in the layers' own order of rows."""
        if not target.requires_grad:
            raise ValueError("capture: the loss does not depend on the model's outputs (detached?)")
        read = {use.source for block in self._blocks.values() for use in block.uses}
        flat = [(source, s) for source, uses in self.seen.items() if source in read for s in uses]
        for source, s in flat:
            if s.x._version != s.version:
                raise ValueError(f"capture: the input of layer {source!r} was overwritten in place after it was used")
        if self._sharding is not None:
            self._sharding.begin("layers")
        with self._passing("layers"):
            found = grad(
                target.sum() if column is None else target,
                [s.edge for _, s in flat],
                None if column is None else column.to(target.dtype),
                keep,
            )
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for (source, s), u in zip(flat, found, strict=True):
            u = torch.zeros(s.shape, dtype=s.dtype, device=s.device) if u is None else u
            pairs.setdefault(source, []).append((computable(s.x.detach()), computable(u.detach())))
        return pairs

    def each_example(
        self, target: Tensor, parameters: Sequence[Tensor], column: Tensor | None = None, keep: bool = False
    ) -> list[Tensor]:
        """Gradients [n, ...] of each parameter, as autograd has them: one backward pass for each example."""
        if not parameters:
            return []
        parameters = parameters if self._sharding is None else self._sharding.whole(parameters)
        ones = torch.ones_like(target) if column is None else column.to(target.dtype)
        rows = torch.arange(self.n, device=target.device)
        if self.sight.batched:
            seeds = ones.new_zeros((self.n, *ones.shape))
            seeds[rows, rows] = ones.detach()
            found = torch.autograd.grad(
                target, parameters, seeds, retain_graph=keep, allow_unused=True, is_grads_batched=True
            )
        else:
            passes = []
            times = self.n if self._sharding is None else self._sharding.begin("parameters", self.n)
            for i in range(times):  # more than n where another rank has more examples
                seed = ones.masked_fill((rows != i % self.n).view(-1, *[1] * (ones.dim() - 1)), 0)
                with self._passing("parameters"):
                    grads = grad(target, parameters, seed, keep or i < times - 1)
                passes.append([torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)])
            found = [
                torch.stack([g.to_dense() if g.is_sparse else g for g in grads])
                for grads in zip(*passes[: self.n], strict=True)
            ]
        return [
            computable((p.new_zeros((self.n, *p.shape)) if g is None else g).detach())
            for g, p in zip(found, parameters, strict=True)
        ]

    def _passing(self, step: Step) -> AbstractContextManager[None]:
        return nullcontext() if self._sharding is None else self._sharding.passing(step)

    def repeat(self, step: Step, target: Tensor, times: int) -> None:
        """Backward passes of the kind that another rank makes, whose results are dropped."""
        if step == "layers":
            self.raw_pairs(target, keep=True)
            return
        assert self._sharding is not None
        loose = {p: None for block in self._blocks.values() if block.loose for p in block.parameters}
        for _ in range(times):
            with self._passing(step):
                grad(target.sum(), self._sharding.whole(loose), None, keep=True)

    def check_finite(self, pairs: Mapping[str, list[Pair]], each: Mapping[Tensor, Tensor]) -> None:
        """Raises ValueError for NaN and Inf, with the layer and the example: a NaN of the forward pass is in many."""
        for what in ("input", "output gradient"):
            for name, block in self._blocks.items():
                for pair in (pair for use in block.uses for pair in pairs.get(use.source, ())):
                    self._check(what, name, pair.x if what == "input" else pair.u, pair.k)
        for name, block in self._blocks.items():
            if block.loose and block.parameters[0] in each:
                self._check("gradient", name, each[block.parameters[0]], 1)

    def _check(self, what: str, name: str, factor: Tensor, k: int) -> None:
        if not factor.is_floating_point() or bool(factor.sum().isfinite()) or bool(factor.isfinite().all()):
            return
        row = int((~factor.isfinite()).nonzero()[0, 0]) // k
        where = "the batch" if self._batch is None else f"batch {self._batch}"
        raise ValueError(f"capture: the {what} of layer {name!r} holds NaN or Inf, example {row} of {where}")

    def of_block(self, block: Block, pairs: Mapping[str, list[Pair]], moments: bool = True) -> Gradients:
        """The gradients of a block by what its sources saw; zero where none of them was called."""
        uses = [(use, pair) for use in block.uses for pair in pairs.get(use.source, ())]
        if not uses:
            return self._none(block)
        whole = {id(pair): pair.gradients(use, 0, self.n) for use, pair in uses if not use.sliceable}
        empty = {id(pair): pair.empty(self.n, self._mask) for use, pair in uses if use.words and moments}

        def part(use: Use, pair: Pair, begin: int, end: int) -> Dense | OneHot:
            made = pair.gradients(use, begin, end) if use.sliceable else whole[id(pair)].rows(begin, end)
            nothing = empty.get(id(pair))
            return made if nothing is None else made.without(nothing[begin:end])

        def make(begin: int, end: int) -> Dense | OneHot:
            return joined([part(use, pair, begin, end) for use, pair in uses])

        one = make(0, 1)
        formed = isinstance(one, Dense) and one.formed_to_rotate
        each = max(1, SLICE // max(one.entries, block.size if formed else 0))
        (use, pair), *others = uses
        shorter = use.moments(pair.x, pair.u) if not others and pair.k == 1 else {}
        if self.n <= each and not shorter:
            return make(0, self.n)
        filled = None
        if any(nothing is not None for nothing in empty.values()):
            filled = torch.zeros(self.n, dtype=torch.int64, device=pair.u.device)
            for use, pair in uses:
                nothing = empty.get(id(pair))
                filled += part(use, pair, 0, 1).positions - (0 if nothing is None else nothing.sum(1))
        return Sliced(make, 0, self.n, each, shorter, filled)

    def _none(self, block: Block) -> Dense | OneHot:
        """Of a layer that this batch did not reach, such as an expert that no token was sent to."""
        like, (g, o, d) = block.parameters[0], block.shape
        like = computable(torch.empty(0, dtype=like.dtype, device=like.device))
        nothing = torch.zeros(self.n, dtype=torch.int64, device=like.device)
        if all(use.table for use in block.uses):
            return OneHot(
                nothing[:, None], like.new_zeros((self.n, 1, d)), o, empty=torch.ones_like(nothing[:, None]) > 0
            )
        return Dense(like.new_zeros((g, self.n, 1, d)), like.new_zeros((g, self.n, 1, o)), filled=nothing)


def grad(target: Tensor, inputs: Sequence[Any], seed: Tensor | None, keep: bool) -> Iterable[Tensor | None]:
    if not inputs:
        return []
    try:
        return torch.autograd.grad(target, inputs, grad_outputs=seed, retain_graph=keep, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ValueError(
            "capture: a checkpoint with use_reentrant=True lets no gradients of layers through (use_reentrant=False "
            "works)"
        ) from error


def computable(x: Tensor) -> Tensor:
    """16-bit floats (autocast) as float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
