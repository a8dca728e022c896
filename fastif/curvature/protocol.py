"""What an estimator must be able to do: for one block of parameters, or for several blocks at once.

Estimators answer for themselves: what they cost, what they take from a batch besides its gradients, what they keep. The
rest of the house asks them, and never who they are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastif.curvature.called import Called
from fastif.curvature.directions import Directions, Explicit
from fastif.curvature.eigenbasis import Eigenbasis
from fastif.curvature.limits import MEMORY
from fastif.model.capture import Forward
from fastif.model.gradients import Formed, Gradients
from fastif.model.layers import Block
from fastif.model.losses import Fisher, Loss
from fastif.ranks import ALONE, Ranks
from fastif.samplers.subset import Subset

Shape = tuple[int, int, int]  # g, o, d of a block
STANDING = 8  # vectors that a solve takes beside each of its right-hand sides, and these themselves


class FitData(NamedTuple):
    """What a fit looks at, for estimators that multiply with the curvature instead of keeping it."""

    model: nn.Module  # at the parameters in question, on the device, its covered parameters requiring gradients
    loss: Loss
    blocks: Mapping[str, Block]  # the estimator's own
    subset: Subset
    batches: Callable[[Subset], Iterator[tuple[Any, Any, Tensor]]]  # x, y, weights of those examples, on the device
    seed: int = 0
    autocast: torch.dtype | None = None  # of forward passes
    progress: bool = False  # whether iterations show a bar
    ranks: Ranks = ALONE  # among which the examples are divided: `batches` brings this one's


class SeenBatch(NamedTuple):
    """A batch on its way through the model, for estimators that are not made of gradients alone."""

    forward: Forward
    losses: Tensor  # [n]
    weights: Tensor  # [n], of the examples whose curvature is asked for
    blocks: Mapping[str, Block]
    softmax: bool  # whether the loss is the cross-entropy of the model's outputs
    counted: Tensor | None  # bool [n], whether an example has a label that counts; where the loss is that


class BlockWork(NamedTuple):
    """A block as its estimator has to work on it."""

    shape: Shape
    positions: int  # t
    table: bool  # whether its rows are looked up

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class FitWork(NamedTuple):
    """How much a fit brings before an estimator."""

    n: int  # examples
    columns: int  # gradients of each, one per column of the outputs' Hessian
    item: int  # bytes of a number
    head: bool = False  # whether the block's outputs are the logits of a softmax
    device: torch.device = torch.device("cpu")


class Cost(NamedTuple):
    """What an estimator takes, beside the passes through the model."""

    held: int = 0  # bytes, once fitted
    making: int = 0  # bytes that making it takes beside these
    operations: float = 0.0  # of a fit
    hessian_rows: int = 0  # of a fit: backward passes through the graph of a gradient, each of all examples
    learned: int = 0  # bytes that the first pass leaves
    observing: int = 0  # bytes that taking in a slice of a batch takes beside its gradients and what is learned
    solving: int = 0  # bytes that the first solve makes and that are kept for the next
    beside: int = 0  # bytes that a solve takes at a time beside these and its right-hand sides

    def __add__(self, other: Cost) -> Cost:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Adds the costs of two estimators that are made one after another."""
        return Cost(
            self.held + other.held,
            max(self.making, other.making),
            self.operations + other.operations,
            self.hessian_rows + other.hessian_rows,
            self.learned + other.learned,
            max(self.observing, other.observing),
            self.solving + other.solving,
            max(self.beside, other.beside),
        )


class Exchanged(NamedTuple):
    """What a fit exchanges among ranks, in bytes, beside products with the curvature."""

    owned: int = 0  # sums that travel to one rank, its owner, which ends the passes and keeps what it makes of them
    lent: int = 0  # of that, what the passes that follow need on every rank
    made: int = 0  # and what the others get too where all are to keep it
    ending: float = 0.0  # operations of making it
    summed: int = 0  # sums that travel to all ranks
    kept: int = 0  # what is kept of all examples, each of which travels from its rank to all others

    def __add__(self, other: Exchanged) -> Exchanged:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Exchanged(
            self.owned + other.owned,
            self.lent + other.lent,
            self.made + other.made,
            self.ending + other.ending,
            self.summed + other.summed,
            self.kept + other.kept,
        )


class Products(NamedTuple):
    """How often an estimator multiplies with the curvature of the fit's data, at most, and with which."""

    fit: float = 0.0  # with `together` vectors at once
    solve: float = 0.0  # for a right-hand side on its own; then the data are needed at every solve, a state does not do
    together: int = 1
    matrix: Literal["ggn", "hessian"] = "ggn"
    keep_graph: bool = False


class Estimator(Called, ABC):
    """What both kinds of estimator have in common."""

    passes: int = 1  # how often it must see the data; 0 for one that only multiplies with their curvature
    fisher: Fisher = "exact"  # of which gradients it is made
    joint: bool = False  # whether it takes all blocks that it is given together
    prefers_head: bool = False  # whether it covers the head alone where it is the only one and no layers are named
    learned_by: tuple[str, ...] = ("fisher",)  # arguments that what it learns depends on, and damping does not
    has_owner: bool = False  # whether one of several ranks ends its passes, solves with it and keeps it for all
    keeps_query_factors: bool = False  # whether `directions` keeps queries of few positions in factors

    @abstractmethod
    def assign(self, shapes: Mapping[str, Shape], memory: int) -> dict[tuple[str, ...], JointCurvature]:
        """What takes care of these blocks, not copied: this estimator for each, one for all, or others by their shapes.

        memory: bytes, as for `Influence`.
        """

    def end(self, pass_index: int) -> None:
        """Ends a pass; raises NotPositiveDefinite with a diagnosis. Called once where there are no passes."""
        del pass_index

    def sums(self, pass_index: int) -> dict[str, Tensor]:
        """What a pass has added up over the examples that it was shown, before it ends; ranks add theirs up."""
        del pass_index
        raise NotImplementedError(
            f"{type(self).__name__} does not say what ranks have to add up: see `sums` in fastif/curvature/protocol.py"
        )

    def take_sums(self, pass_index: int, sums: dict[str, Tensor]) -> None:
        """Takes the sums over the examples of all ranks in the place of `sums`."""
        del pass_index, sums

    def let_go(self, pass_index: int) -> None:
        """Lets go of `sums`, which the part's owner has now: a rank is not to hold them beside what is made of them."""
        del pass_index

    def kept(self, pass_index: int) -> dict[str, Tensor]:
        """What a pass has kept of every example that it was shown; ranks bring theirs together."""
        del pass_index
        return {}

    def take_kept(self, pass_index: int, kept: Sequence[Mapping[str, Tensor]]) -> None:
        """Takes what was kept of the examples of every rank, by rank, in the place of `kept`."""
        del pass_index, kept

    def ending(self, pass_index: int) -> float:
        """Operations that `end` takes of an owner, by which ranks divide this work.

        It is asked once `sums` was; a rank that was shown no examples does not know, and says 0.
        """
        del pass_index
        return 0.0

    def made(self, pass_index: int) -> dict[str, Tensor]:
        """What `end` made of the sums on its owner: another rank takes it in the place of ending the pass."""
        del pass_index
        return self.state_dict()

    def take_made(self, pass_index: int, made: dict[str, Tensor]) -> None:
        """Takes what `end` made on the owner."""
        del pass_index
        self.load_state_dict(made)

    def reports(self) -> dict[str, Any]:
        """Attributes that other ranks know of what their owner keeps, without further work: numbers."""
        return {}

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]: ...

    @abstractmethod
    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...

    def stand_in(self) -> None:
        """For `Influence.plan`: has the sizes of what is fitted, once pass 0 was observed, and not its values."""
        self.end(0)

    def eigenbasis(self) -> Eigenbasis | None:
        """The basis in which it is diagonal, once fitted, of an estimator of one block; None where it has none."""
        return None

    def choices(self) -> dict[str, Any]:
        """What it chose by itself while it was fitted, no state holds, and last bits depend on; JSON."""
        return {}


class Curvature(Estimator):
    """An estimator of one block, g matrices [o, d] of parameters."""

    @property
    def needs_whole(self) -> bool:
        """As `JointCurvature.needs_whole`."""
        return False

    def assign(self, shapes: Mapping[str, Shape], memory: int) -> dict[tuple[str, ...], JointCurvature]:
        del memory
        if self.joint:
            return {tuple(shapes): JoinedBlocks(tuple(shapes), self)} if shapes else {}
        return {(name,): OneBlock(name, self) for name in shapes}

    @abstractmethod
    def begin(self, name: str, shape: Shape) -> None:
        """Forgets what was learned; name and shape [g, o, d] of the block."""

    def observe_batch(self, seen: SeenBatch, names: Sequence[str]) -> bool:
        """Takes in a batch as it comes out of the model, if it can; then no gradients of it are shown."""
        del seen, names
        return False

    @abstractmethod
    def observe(self, gradients: Gradients, weights: Tensor, column: int, pass_index: int) -> None:
        """Takes in Σ_i weights[i] vec(g_i) vec(g_i)ᵀ of a batch, column `column` of its curvature, in a pass."""

    @abstractmethod
    def solve(self, rhs: Tensor) -> Tensor:
        """(G + λI)⁻¹ rhs for rhs [..., g, o, d]."""

    def precondition(self, gradients: Gradients) -> Tensor:
        """(G + λI)⁻¹ g_i as matrices [n, g, o, d]."""
        return self.solve(gradients.formed())

    @abstractmethod
    def sq_norms(self, gradients: Gradients) -> Tensor:
        """g_iᵀ (G + λI)⁻¹ g_i, [n]."""

    def directions(self, gradients: Gradients) -> Directions:
        """(G + λI)⁻¹ g_q for every q: the query side of pairwise scores."""
        return Explicit(self.solve(gradients.formed()))

    @abstractmethod
    def cost(self, block: BlockWork, fit: FitWork) -> Cost:
        """For `Influence.plan`: what a fit takes, by arithmetic alone."""

    def exchanged(self, block: BlockWork, fit: FitWork) -> Exchanged:
        """For `Influence.plan(ranks=)`: what a fit on several ranks exchanges."""
        del block, fit
        return Exchanged()


class JointCurvature(Estimator):
    """An estimator that sees several blocks at once. Dictionaries are keyed by block.

    The protocol is that of one block (`Curvature`), with all blocks in every call. One that only multiplies with the
    curvature has no `passes`; its `end(0)` is called all the same.
    """

    joint = True
    passes = 0
    fisher = "empirical"
    memory: int = MEMORY  # bytes that right-hand sides, and what solving takes beside them, may take at a time

    def assign(self, shapes: Mapping[str, Shape], memory: int) -> dict[tuple[str, ...], JointCurvature]:
        del memory
        return {tuple(shapes): self} if shapes else {}

    @property
    def given(self) -> Estimator:
        """The estimator that its user knows."""
        return self

    @abstractmethod
    def begin(self, shapes: Mapping[str, Shape], data: FitData | None) -> None:
        """Forgets what was learned; `data` is None where a state will be loaded."""

    def observe_batch(self, seen: SeenBatch) -> bool:
        """As `Curvature.observe_batch`."""
        del seen
        return False

    def observe(self, gradients: Mapping[str, Gradients], weights: Tensor, column: int, pass_index: int) -> None:
        """Takes in a batch, as `Curvature.observe`."""
        del gradients, weights, column, pass_index

    @abstractmethod
    def solve(self, rhs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(G + λI)⁻¹ rhs for rhs [..., g, o, d] by block, the same leading axes in all."""

    def precondition(self, gradients: Mapping[str, Gradients]) -> dict[str, Tensor]:
        """(G + λI)⁻¹ g_i as matrices [n, g, o, d] by block."""
        return self.solve({name: g.formed() for name, g in gradients.items()})

    def sq_norms(self, gradients: Mapping[str, Gradients]) -> Tensor:
        """g_iᵀ (G + λI)⁻¹ g_i, [n]."""
        n = len(next(iter(gradients.values())))
        each = max(1, self.memory // (STANDING * sum(g.rows(0, 1).formed().nbytes for g in gradients.values())))
        parts = []
        for begin in range(0, n, each):
            formed = {name: g.rows(begin, begin + each).formed() for name, g in gradients.items()}
            solved = self.solve(formed)
            parts.append(torch.stack([(formed[name] * solved[name]).flatten(1).sum(1) for name in formed]).sum(0))
        return torch.cat(parts)

    def directions(self, gradients: Mapping[str, Gradients]) -> dict[str, Directions]:
        """The query side of pairwise scores."""
        solved = self.solve({name: g.formed() for name, g in gradients.items()})
        return {name: Explicit(matrices) for name, matrices in solved.items()}

    @abstractmethod
    def cost(self, blocks: Mapping[str, BlockWork], fit: FitWork) -> Cost:
        """As `Curvature.cost`, for all its blocks."""

    def exchanged(self, blocks: Mapping[str, BlockWork], fit: FitWork) -> Exchanged:
        """As `Curvature.exchanged`, for all its blocks."""
        del blocks, fit
        return Exchanged()

    @property
    def needs_whole(self) -> bool:
        """Whether it differentiates by the parameters themselves, which all ranks must hold."""
        return self.products(1) != Products()

    def products(self, n: int) -> Products:
        """For `Influence.plan`: products with the curvature of n examples; with that of fewer, as much less of one."""
        del n
        return Products()


class SingleEstimator(JointCurvature):
    """What leaves its work to one estimator of a single block."""

    def __init__(self, estimator: Curvature):
        self.estimator = estimator
        self.passes, self.fisher = estimator.passes, estimator.fisher
        self.has_owner = estimator.has_owner

    @property
    def given(self) -> Curvature:
        return self.estimator

    @property
    def needs_whole(self) -> bool:
        return self.estimator.needs_whole

    def end(self, pass_index: int) -> None:
        self.estimator.end(pass_index)

    def sums(self, pass_index: int) -> dict[str, Tensor]:
        return self.estimator.sums(pass_index)

    def take_sums(self, pass_index: int, sums: dict[str, Tensor]) -> None:
        self.estimator.take_sums(pass_index, sums)

    def let_go(self, pass_index: int) -> None:
        self.estimator.let_go(pass_index)

    def kept(self, pass_index: int) -> dict[str, Tensor]:
        return self.estimator.kept(pass_index)

    def take_kept(self, pass_index: int, kept: Sequence[Mapping[str, Tensor]]) -> None:
        self.estimator.take_kept(pass_index, kept)

    def ending(self, pass_index: int) -> float:
        return self.estimator.ending(pass_index)

    def made(self, pass_index: int) -> dict[str, Tensor]:
        return self.estimator.made(pass_index)

    def take_made(self, pass_index: int, made: dict[str, Tensor]) -> None:
        self.estimator.take_made(pass_index, made)

    def stand_in(self) -> None:
        self.estimator.stand_in()

    def state_dict(self) -> dict[str, Tensor]:
        return self.estimator.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.estimator.load_state_dict(state)


class OneBlock(SingleEstimator):
    """One block's own estimator."""

    def __init__(self, name: str, estimator: Curvature):
        super().__init__(estimator)
        self.name = name

    def begin(self, shapes: Mapping[str, Shape], data: FitData | None) -> None:
        del data
        self.estimator.begin(self.name, shapes[self.name])

    def observe_batch(self, seen: SeenBatch) -> bool:
        return self.estimator.observe_batch(seen, [self.name])

    def observe(self, gradients: Mapping[str, Gradients], weights: Tensor, column: int, pass_index: int) -> None:
        self.estimator.observe(gradients[self.name], weights, column, pass_index)

    def solve(self, rhs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.name: self.estimator.solve(rhs[self.name])}

    def precondition(self, gradients: Mapping[str, Gradients]) -> dict[str, Tensor]:
        return {self.name: self.estimator.precondition(gradients[self.name])}

    def sq_norms(self, gradients: Mapping[str, Gradients]) -> Tensor:
        return self.estimator.sq_norms(gradients[self.name])

    def directions(self, gradients: Mapping[str, Gradients]) -> dict[str, Directions]:
        return {self.name: self.estimator.directions(gradients[self.name])}

    def cost(self, blocks: Mapping[str, BlockWork], fit: FitWork) -> Cost:
        return self.estimator.cost(blocks[self.name], fit)

    def exchanged(self, blocks: Mapping[str, BlockWork], fit: FitWork) -> Exchanged:
        return self.estimator.exchanged(blocks[self.name], fit)


class JoinedBlocks(SingleEstimator):
    """One estimator for several blocks as if they were one: their parameters one after another, [1, 1, P]."""

    def __init__(self, names: tuple[str, ...], estimator: Curvature):
        super().__init__(estimator)
        self.names = names
        self._shapes: Mapping[str, Shape] = {}

    def begin(self, shapes: Mapping[str, Shape], data: FitData | None) -> None:
        del data
        self._shapes = shapes
        self.estimator.begin(", ".join(self.names), self._joint_shape(shapes))

    def observe_batch(self, seen: SeenBatch) -> bool:
        return self.estimator.observe_batch(seen._replace(softmax=False), self.names)  # closed forms are of one layer

    def observe(self, gradients: Mapping[str, Gradients], weights: Tensor, column: int, pass_index: int) -> None:
        self.estimator.observe(self._join(gradients), weights, column, pass_index)

    def solve(self, rhs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        joint = torch.cat([rhs[name].flatten(-3) for name in self.names], -1)
        solved = self.estimator.solve(joint[..., None, None, :])[..., 0, 0, :]
        parts = solved.split([torch.Size(self._shapes[name]).numel() for name in self.names], -1)
        return {name: part.reshape(rhs[name].shape) for name, part in zip(self.names, parts, strict=True)}

    def sq_norms(self, gradients: Mapping[str, Gradients]) -> Tensor:
        return self.estimator.sq_norms(self._join(gradients))

    def cost(self, blocks: Mapping[str, BlockWork], fit: FitWork) -> Cost:
        return self.estimator.cost(self._joint_work(blocks), fit._replace(head=False))

    def exchanged(self, blocks: Mapping[str, BlockWork], fit: FitWork) -> Exchanged:
        return self.estimator.exchanged(self._joint_work(blocks), fit._replace(head=False))

    def _joint_work(self, blocks: Mapping[str, BlockWork]) -> BlockWork:
        shapes = {name: block.shape for name, block in blocks.items()}
        return BlockWork(self._joint_shape(shapes), max(block.positions for block in blocks.values()), False)

    def _joint_shape(self, shapes: Mapping[str, Shape]) -> Shape:
        return 1, 1, sum(torch.Size(shapes[name]).numel() for name in self.names)

    def _join(self, gradients: Mapping[str, Gradients]) -> Gradients:
        return Formed(torch.cat([gradients[name].formed().flatten(1) for name in self.names], 1)[:, None, None])


def check_estimator(rule: str, estimator: Any) -> None:
    """Raises TypeError for what is no estimator, and for the class of one."""
    if isinstance(estimator, type) and hasattr(estimator, "assign"):
        raise TypeError(f"{rule}, got the class {estimator.__name__}; call it: {estimator.__name__}()")
    if not hasattr(estimator, "assign"):
        raise TypeError(f"{rule}, got {estimator!r}")


def check_fisher(op: str, fisher: Any) -> None:
    if fisher not in ("auto", "exact", "monte_carlo", "empirical"):
        raise ValueError(f"{op}: fisher must be 'auto', 'exact', 'monte_carlo' or 'empirical', got {fisher!r}")
