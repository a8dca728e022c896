"""The retained objective F (docs/math.md (13)) of any layers of a network, as a problem for `fastif.removal.newton`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_map_only

from fastif.curvature import EKFAC, ExactBlock
from fastif.data.batches import batch_length, moved_to, picked, walked
from fastif.data.dealing import deal_picked
from fastif.data.identity import Walked
from fastif.influence.fitting import examples_before
from fastif.influence.influence import Influence
from fastif.influence.sharing import Draws
from fastif.model.calls import call
from fastif.model.features import find_head
from fastif.model.forward import computable
from fastif.model.losses import labels_in, labels_of, logits_of, output_columns, per_sample, settle_fisher
from fastif.removal.below import Below
from fastif.removal.losses import SoftmaxName
from fastif.removal.retained import SMALLEST_STEP, Picks, add_damping, check_removed, check_weight_decay
from fastif.samplers.draw import Sampler
from fastif.samplers.subset import Subset

_TRUST = 1.0  # The first step in the span of the layers' steps is damped by its own curvature, until F has answered.

Matrices = dict[str, Tensor]  # by block, [g, o, d]


class RetainedNetwork:
    """F, its gradient and its curvature for the layers of a network that an `Influence` covers.

    The network is a copy of the model in eval mode, in float32 where that has 16 bits, and its parameters are θ:
    normalisation layers use the statistics that they have, and buffers stay. Every layer's own Newton step answers the
    removal alone: what was left of the full objective's gradient when training ended is subtracted. The head, which has
    little to gain from more training, has the step of F itself beside it: without it, F of a network that is sure of
    itself is mostly what training left, and hardly falls along what is left of the removal. A step is the best
    combination of them and of the step before, by the quadratic model of F with the subset's GGN over all layers at
    once: estimators that know each layer by itself leave it to these few numbers how layers act on one another. The
    model is trusted as far as it foretells how F falls (Levenberg–Marquardt). docs/math.md (13).

    On several ranks each takes its batches of every pass over the data, and sums are those of all. The layers' steps
    and the numbers of their model are the first rank's, so that all move by the same bits.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Any,
        removed: Tensor,
        *,
        layers: str | Sequence[str],
        curvature: Any | Mapping[str, Any] | None = None,
        subset: Any | Sampler | None = None,
        damping: float = 0.0,
        weight_decay: float = 5e-4,
        line_search: bool = True,
        loss: SoftmaxName = "cross_entropy",
        curved_by: Callable[[Any, Any], Tensor] | None = None,
        head: str | None = None,
        batch_size: int = 256,
        device: torch.device | str | None = None,
        generator: Generator | None = None,
        beside: int = 0,
    ):
        """`curved_by`: a loss whose curvature the estimators take in the place of that of `loss`. `beside`: how many
        examples of other data `_batches` will be asked for."""
        train = walked(train, batch_size)
        n = train.n
        check_removed(removed, n)
        check_weight_decay(weight_decay)
        self.model = _in_full(copy.deepcopy(model).eval())
        if device is not None:
            self.model.to(device)
        name, self._head = find_head(self.model, head, op="remove")
        self._head_name = name or "model"
        if curvature is None:
            curvature = {self._head_name: ExactBlock(0.0), "*": EKFAC("auto")}
            if loss != "cross_entropy":  # an exact block would need a backward pass for every word of every text
                curvature = EKFAC("auto", fisher="monte_carlo")
        self._loss = loss
        self._influence = Influence(
            self.model,
            loss if curved_by is None else curved_by,
            curvature=add_damping(curvature, weight_decay, damping),
            layers=layers,
            batch_size=batch_size,
            progress=False,
        )
        kept = torch.ones(n, dtype=torch.bool)
        kept[removed.cpu()] = False
        singly = [next(picked(train, batch_size, row))[0] for row in kept.nonzero()[:2]]
        if labels_in(*singly[0]) is None:
            raise ValueError("remove: the training data has no labels")
        with self._influence.passes.running(None):
            self._influence.look_at(train, kept.nonzero()[:, 0])
        self._capture = self._influence.capture
        self._names = {p: name for p, name in self._capture.names.items() if name in self._capture.covered}
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter in self._names)
        self.n, self.kept, self.removed = n, kept.nonzero()[:, 0], removed.cpu()
        self.weight_decay, self.objective = weight_decay, math.nan
        self.step_size: dict[str, float] = {}  # of the last step: by layer, a multiple of its own Newton step
        self._train, self._batch_size = train, batch_size
        self._line_search = line_search
        self._ranks = self._influence.ranks
        self._picks = Picks(subset, kept, generator, self._ranks)
        self._seen: dict[str, Tensor] = {}  # features, logits and labels of the retained at the current parameters
        self._shift: dict[Tensor, Tensor] = {}  # ∇F_all at the trained parameters
        self._removed_loss = self._retained_loss = math.nan  # Σ ℓ over the removed and the retained, there
        runs = [lambda x=x: logits_of(call(self.model, moved_to(x, self.device))) for x, _ in singly]
        self._below = Below(self.model, self._names, n + beside, runs)
        self._last: Matrices = {}  # the step before
        self._trust = _TRUST

    @property
    def device(self) -> torch.device:
        return self._influence.device

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Copies of the parameters that move, keyed like the model's."""
        return {name: parameter.detach().clone() for parameter, name in self._names.items()}

    def go_on_from(self, parameters: Mapping[str, Tensor]) -> None:
        """Steps begin at these; what they answer is still the gradient of all data at the trained parameters."""
        self.gradient()
        with torch.no_grad():
            for parameter, name in self._names.items():
                if name in parameters:
                    parameter.copy_(parameters[name])
        self.objective = math.nan

    def gradient(self) -> float:
        if not self._shift:
            self._check_model()
        with self._note_head():
            loss, sums = self._sum_over(self.kept)
        if math.isnan(self.objective):  # where steps begin; later they know it from their search
            self.objective = loss / self.n + self._decay()
            if not math.isfinite(self.objective):
                raise ValueError(f"remove: the retained objective is {self.objective} where the steps begin")
        self._gradient = {p: g / self.n + self.weight_decay * p.detach() for p, g in sums.items()}
        norm = sum(float(g.square().sum()) for g in self._gradient.values()) ** 0.5
        if not self._shift:  # of the trained parameters
            self._retained_loss = loss
            self._removed_loss, removed = self._sum_over(self.removed)
            self._shift = {p: g + removed[p] / self.n for p, g in self._gradient.items()}
        return norm

    def curvature(self) -> int:
        picks = self._picks.take(self._seen)
        self._carriers = Subset(self.kept[picks.indices], picks.weights)
        self._influence.fit(self._train, subset=self._carriers)
        return len(picks.indices)

    def step(self) -> bool:
        own = self._newton_steps()
        if not self._line_search:
            self._move(own)
            self.objective, self.step_size = self._objective(), dict.fromkeys(own, 1.0)
            return True
        directions = {name: {name: matrix} for name, matrix in own.items() if bool(matrix.any())}
        head = self._head_name
        if directions and len(own) > 1 and head in own:
            directions[f"{head} to its optimum"] = {head: self._newton_steps(self._gradient)[head]}
        if self._last:
            directions["last step"] = self._last
        slopes, hessian = self._model_along(list(directions.values()))
        before = {p: p.detach().clone() for p in self._names}
        while self._trust <= 1 / SMALLEST_STEP:
            sizes = damped_minimum(slopes, hessian, self._trust)
            foretold = float(slopes @ sizes - 0.5 * sizes @ hessian @ sizes)
            if not foretold > 0:  # the gradient is zero, or below what float64 resolves: no step descends
                return False
            step = combine(directions.values(), sizes.tolist())
            self._move(step)
            value = self._objective()
            ratio = (self.objective - value) / foretold
            if not ratio >= 0.25:
                self._trust *= 4
            elif ratio > 0.75:
                self._trust = max(self._trust / 4, SMALLEST_STEP)
            if value < self.objective:
                self._last, self.objective = step, value
                self.step_size = dict(zip(directions, sizes.tolist(), strict=True))
                return True
            with torch.no_grad():
                for parameter, value in before.items():
                    parameter.copy_(value)
        return False

    # ------------------------------------------------------------------------------------------------- steps and model

    def _newton_steps(self, gradient: Mapping[Tensor, Tensor] | None = None) -> Matrices:
        """−(G + (γ + λ)I)⁻¹ gradient, by block; of ∇F(θ) − ∇F_all(θ̂) where none is given."""
        if gradient is None:
            gradient = {p: g - self._shift[p] for p, g in self._gradient.items()}
        solved = self._influence.solve({name: gradient[p].to(p.dtype) for p, name in self._names.items()})
        solved = self._ranks.of_first("the layers' steps", solved, self.device)
        return self._matrices({p: -solved[name] for p, name in self._names.items()})

    def _model_along(self, directions: Sequence[Matrices]) -> tuple[Tensor, Tensor]:
        """b [m] and A [m, m] of the model F(θ + Σ_j c_j d_j) ≈ F − b·c + ½ cᵀAc, in float64.

        A has the GGN of the subset, with all that layers have in common: c backward passes over it. Of texts it is
        estimated from one draw of each word's label, in one pass.
        """
        m = len(directions)
        gradient = self._matrices(self._gradient)
        slopes, squares = torch.zeros(m, dtype=torch.float64), torch.zeros(m, m, dtype=torch.float64)
        holders = {name: [j for j in range(m) if name in directions[j]] for name in self._capture.blocks}
        holders = {name: rows for name, rows in holders.items() if rows}
        stacked = {name: torch.stack([directions[j][name] for j in rows]) for name, rows in holders.items()}
        for name, rows in holders.items():
            flat = stacked[name].flatten(1).double()
            slopes[rows] -= (flat @ gradient[name].flatten().double()).cpu()
            squares[torch.tensor(rows)[:, None], torch.tensor(rows)] += (flat @ flat.T).cpu()
        ggn = torch.zeros(m, m, dtype=torch.float64)
        draw = Generator().manual_seed(self._influence.setup.seed)
        draws = Draws(self._loss, draw, examples_before(self._train, self._carriers, self._ranks))
        mine = self._own(self._carriers.indices)
        own_weights = self._carriers.weights[mine]
        with self._capture.attached():
            for x, y, places in self._batches(self._carriers.indices[mine]):
                forward = self._capture.forward(x)
                weights = own_weights[places].to(self.device)
                batch = labels_in(x, y)
                seen = self._loss, forward.outputs, batch, forward.n
                fisher = settle_fisher("auto", *seen)
                if self._ranks.world > 1:
                    draws.begin(forward.outputs, batch, forward.n, fisher)
                for scores, column in output_columns(*seen, fisher, draw):
                    along = torch.zeros(m, forward.n, dtype=torch.float64, device=self.device)
                    for name, g in forward.gradients(scores, column, keep=True).items():
                        if name in holders:
                            along[holders[name]] += g.dots(stacked[name])
                    ggn += ((along * weights) @ along.T).cpu()
        if self._ranks.world > 1:
            draws.end(self._ranks)
            device = self._ranks.device
            ggn = self._ranks.sum("the model of the objective", ggn.to(device)).cpu()
            made = {"slopes": slopes.to(device), "squares": squares.to(device)}
            made = self._ranks.of_first("the model of the objective", made, device)
            slopes, squares = made["slopes"].cpu(), made["squares"].cpu()
        return slopes, ggn + self.weight_decay * squares

    def _move(self, step: Matrices) -> None:
        with torch.no_grad():
            for name, matrix in step.items():
                for parameter, rows, value in self._capture.blocks[name].split(matrix):
                    parameter[rows] += value

    def _matrices(self, values: Mapping[Tensor, Tensor]) -> Matrices:
        return {name: block.matrix(values) for name, block in self._capture.blocks.items()}

    # ------------------------------------------------------------------------------------------------- passes over data

    def _own(self, indices: Tensor) -> Tensor:
        """The places in `indices` of the examples that this rank takes."""
        return deal_picked(self._train, indices, self._ranks)

    def _batches(self, indices: Tensor, beside: Walked | None = None) -> Iterator[tuple[Any, Any, Tensor]]:
        """Inputs and labels of these training examples, or of those of the data beside them, and their places."""
        if not len(indices):
            return
        data, first = (self._train, 0) if beside is None else (beside, self.n)
        for (x, y), places in picked(data, self._batch_size, indices):
            with self._below.of(first + indices[places]):
                yield moved_to(x, self.device), moved_to(y, self.device), places

    def _check_model(self) -> None:
        """Refuses, on one example, layers that are not called (`Capture` does) and a head that is not the last one."""
        calls: list[Tensor] = []
        hook = self._head.register_forward_hook(lambda _module, _args, output: calls.append(output.detach().clone()))
        try:
            with self._capture.attached():
                # Not by `_batches`: of what that keeps below the layers that move, hooks see nothing in later passes.
                ((x, _), _) = next(iter(picked(self._train, self._batch_size, self.kept[:1])))
                logits = logits_of(self._capture.forward(moved_to(x, self.device)).outputs).detach()
        finally:
            hook.remove()
        if len(calls) == 1 and logits.dim() == calls[0].dim() - 1:  # the model squeezes a batch of one
            logits = logits[None]
        same = len(calls) == 1 and calls[0].shape == logits.shape
        if not same or not torch.allclose(calls[0].to(logits), logits, rtol=0.0, atol=0.0, equal_nan=True):
            raise ValueError(
                f"remove: the head {self._head_name!r} is not the last operation of the model: it runs {len(calls)} "
                "times, and its last output must be the model's; name the last layer with head=, and let the model "
                "return logits"
            )
        if self._loss == "cross_entropy" and logits.dim() > 2:
            raise ValueError(
                f"remove: loss='cross_entropy' is for one label per example, got outputs {list(logits.shape)}; of "
                "words say 'causal_lm' (each position foretells the next) or 'token_cross_entropy'"
            )

    def _losses(self, x: Any, y: Any) -> Tensor:
        batch = labels_in(x, y)
        if batch is None:
            raise ValueError("remove: the training data has no labels")
        return per_sample(self._loss, call(self.model, x), batch, batch_length(x))

    def _sum_over(
        self,
        indices: Tensor,
        values: Callable[[Any, Any], Tensor] | None = None,
        weights: Tensor | None = None,
    ) -> tuple[float, dict[Tensor, Tensor]]:
        """Σ ℓ and Σ ∇ℓ over some examples, in float64; or of what `values` makes of inputs and labels, [n]; or
        Σ w ℓ with weights [len(indices)]."""
        parameters = list(self._names)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        sums = {p: torch.zeros_like(p, dtype=torch.float64, requires_grad=False) for p in parameters}
        own = self._own(indices)
        for x, y, places in self._batches(indices[own]):
            losses = (values or self._losses)(x, y)
            if weights is not None:
                losses = losses * weights[own[places].to(weights.device)].to(losses)
            total += losses.detach().double().sum()
            for parameter, g in zip(parameters, torch.autograd.grad(losses.sum(), parameters), strict=True):
                sums[parameter] += g
        found = {"": total, **{self._names[p]: value for p, value in sums.items()}}
        found = self._ranks.sum_each("losses and gradients", found, lambda _: None, self.device)
        return float(found[""]), {p: found[name] for p, name in self._names.items()}

    @torch.no_grad()
    def _objective(self) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for x, y, _ in self._batches(self.kept[self._own(self.kept)]):
            total += self._losses(x, y).double().sum()
        return float(self._ranks.sum("losses", total)) / self.n + self._decay()

    def _decay(self, parameters: Iterable[Tensor] | None = None) -> float:
        """½ γ ‖θ‖² of all that move, or of these."""
        parameters = self._names if parameters is None else parameters
        total = 0.5 * self.weight_decay * sum(float(p.detach().double().square().sum()) for p in parameters)
        (first, *_) = self._ranks.meet("the decay", total)
        return first

    @contextmanager
    def _note_head(self) -> Iterator[None]:
        """Notes what the head sees and says of the retained, where a sampler will ask for it."""
        if self._picks.sampler is None:
            yield
            return
        with self._noting_head() as notes:
            yield
        features, logits = self._noted(notes)
        labels = self._seen["labels"] if self._seen else self._labels_of(self.kept)
        self._seen = {"features": features, "logits": logits, "labels": labels}

    @contextmanager
    def _noting_head(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        notes: list[tuple[Tensor, Tensor]] = []

        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            rows = (args[0] if args else kwargs["input"]), output
            x, y = (z.detach().cpu() if z.dim() > 1 else z.detach().cpu()[None] for z in rows)
            notes.append((x, y))  # of a batch of one that the model squeezes a row, too

        hook = self._head.register_forward_hook(note, with_kwargs=True)
        try:
            yield notes
        finally:
            hook.remove()

    def _noted(self, notes: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """What the head saw and said of the examples of a pass, those of all ranks."""
        own = [torch.cat(parts) for parts in zip(*notes, strict=True)] or [None, None]
        features, logits = (self._joined(name, rows) for name, rows in zip(("features", "logits"), own, strict=True))
        return features, logits

    def _labels_of(self, indices: Tensor) -> Tensor:
        found = [labels_of(labels_in(x, y)) for x, y, _ in self._batches(indices[self._own(indices)])]
        return self._joined("labels", torch.cat(found).cpu() if found else None)

    def _joined(self, what: str, own: Tensor | None) -> Tensor:
        """The rows of all ranks, of the retained examples in their order."""
        device = self._ranks.device
        return self._ranks.join(what, None if own is None else own.to(device), device).cpu()


def _in_full(model: nn.Module) -> nn.Module:
    """A model in 16 bits as one in float32, which takes the same inputs: steps smaller than its roundings add up."""
    if not any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters()):
        return model

    def widen(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map_only(Tensor, computable, (args, kwargs))

    model.register_forward_pre_hook(widen, with_kwargs=True)
    return model.float()


def damped_minimum(slopes: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """The c that minimises −slopes·c + ½ cᵀ(hessian + damping·diag(hessian))c: lengths of directions do not matter."""
    scale = hessian.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)  # a direction without curvature takes a gradient step
    unit = hessian / scale[:, None] / scale
    unit.diagonal().add_(damping)
    return torch.linalg.solve(unit, slopes / scale) / scale


def combine(directions: Iterable[Matrices], sizes: list[float]) -> Matrices:
    out: Matrices = {}
    for direction, size in zip(directions, sizes, strict=True):
        for name, matrix in direction.items():
            out[name] = out[name] + size * matrix if name in out else size * matrix
    return out
