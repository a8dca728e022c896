"""Per-sample gradients of a training's own steps: noted as its backward passes go, without a pass of their own.

Hooks note what each layer sees, and on its output what the loss asks of it. A backward pass of the user's then leaves
both factors of every layer's per-sample gradients behind, as a capture's own would. docs/math.md (8), (31).
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastif.data.batches import Arguments, batch_length, rows_of
from fastif.model.arriving import Arriving
from fastif.model.capture import Capture
from fastif.model.check import settle
from fastif.model.losses import logits_of
from fastif.renamed import warn_outside

Keep = Literal["factors", "numbers"]
_LOOKED_AT = 4  # examples of the first batch on which it is settled how layers are read
_BY_ITSELF = "its gradients would take a backward pass for each example"


@contextmanager
def capture(
    model: nn.Module,
    layers: str | Sequence[str] | None = None,
    *,
    keep: Keep = "factors",
    directions: Mapping[str, Tensor] | None = None,
) -> Iterator[Captured]:
    """Per-sample gradients of any loop that calls `backward()`: no further pass, and the training is as without.

    Within the `with`, each `backward()` leaves the gradients g_i of the losses of its batch's examples, i = 1, …, n,
    to be asked for until the model is called again. Of a loss that is the mean of the examples' losses, g_i is n times
    what the backward pass brings; of another, say so by `captured.factor`. docs/math.md (31).

    >>> model, x, y = nn.Linear(3, 2), torch.randn(8, 3), torch.arange(8) % 2
    >>> with capture(model) as captured:
    ...     nn.functional.cross_entropy(model(x), y).backward()
    ...     norms = captured.norms()
    ...     mean = captured.gradients()["weight"].mean(0)
    >>> norms.shape, torch.allclose(mean, model.weight.grad)
    (torch.Size([8]), True)

    Args:
        model: as it is trained. Its arguments and outputs have the examples first. What it draws (dropout) it may draw:
            gradients are those of the step as it was. Passes without gradients are passed over.
        layers: as for `fastif.Influence`: "trained" (the default), "all", names and patterns. Parameters of no known
            layer are left out, and one warning names them: their gradients would take passes of their own.
        keep: "factors": what every layer saw and was asked for, so that gradients, norms and products can be asked for
            afterwards; as many bytes as the layers' inputs and outputs. "numbers": norms, and products with
            `directions`, are computed layer by layer while the backward pass goes, and nothing else is kept.
        directions: vectors in parameter space, keyed like the model's parameters, [q, *shape] each; parameters that are
            absent count as zero. Those of `captured.dots()`.

    Raises ValueError for BatchNorm in train mode, by which examples change one another; for what a first look at a few
    examples finds: examples that mix, outputs without an axis of examples; and within a backward pass that reaches an
    earlier call of the model than the last.
    """
    if keep not in ("factors", "numbers"):
        raise ValueError(f"capture: keep must be 'factors' or 'numbers', got {keep!r}")
    captured = Captured(model, layers, keep, directions)
    with captured.attached():
        yield captured


class Captured:
    """What `fastif.capture` gives: the gradients of the last backward pass, example by example.

    Attributes:
        factor: what the gradients of the backward pass are multiplied with, a number; None: n, for a loss that is the
            mean over the examples. For a sum it is 1; for a mean over m tokens, m gives gradients of the examples'
            sums; with a GradScaler or an accumulation over a steps multiply by 1/scale or a. It may be set for every
            step; what is asked for afterwards takes it.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str] | None,
        keep: Keep,
        directions: Mapping[str, Tensor] | None,
    ):
        self.factor: float | Tensor | None = None
        self._model, self._keep = model, keep
        self._capture = _Following(model, layers)
        _leave_out_loose(self._capture)
        self._directions = directions
        self._by_block: dict[str, Tensor] | None = None  # the directions, [q, g, o, d]
        self._last: Arriving | None = None
        self._settled = False

    def __repr__(self) -> str:
        size = sum(torch.Size(shape).numel() for shape in self._capture.covered.values())
        left = f", {len(self.skipped)} parameters not covered" if self.skipped else ""
        there = self._last is not None and self._last.arrived
        state = f"gradients of n={self.n:,} examples" if there else "no gradients: ask after backward()"
        return (
            f"Captured({type(self._model).__name__}, keep={self._keep!r}, {size:,} parameters in "
            f"{len(self._capture.blocks)} blocks{left}, {state})"
        )

    @property
    def skipped(self) -> dict[str, str]:
        """Parameters that are not covered, and why."""
        return self._capture.skipped

    @property
    def n(self) -> int:
        """Examples of the last backward pass."""
        return self._passed().n

    # ------------------------------------------------------------------------------------------------------ what it has

    def norms(self) -> Tensor:
        """‖g_i‖ over all covered parameters, [n]."""
        return torch.stack(list(self._passed().sq_norms().values())).sum(0).sqrt() * abs(self._scale())

    def norms_by_layer(self) -> dict[str, Tensor]:
        """The same of each layer's parameters, {layer: [n]}."""
        return {name: values.sqrt() * abs(self._scale()) for name, values in self._passed().sq_norms().items()}

    def dots(self, directions: Mapping[str, Tensor] | None = None) -> Tensor:
        """⟨directions[q], g_i⟩, [q, n]: with the directions that `capture` was given, or with others.

        Others need keep="factors". With the gradient of a validation loss as direction this is n times how fast the
        loss of example i's step would bring the validation loss down.
        """
        if directions is not None:
            if self._keep == "numbers":
                raise ValueError("capture: dots of other directions than capture was given need keep='factors'")
            return self._passed().dots(_by_block(self._capture, directions)) * self._scale()
        if self._directions is None:
            raise ValueError("capture: dots needs directions, here or in capture(directions=...)")
        return self._passed().dots(self._given()) * self._scale()

    def gradients(self) -> dict[str, Tensor]:
        """g_i of every covered parameter, {name: [n, *shape]}: n times the size of the model; needs keep="factors"."""
        if self._keep == "numbers":
            raise ValueError("capture: gradients need keep='factors'")
        passed, scale = self._passed(), self._scale()
        found: dict[Tensor, Tensor] = {}
        for name, block in self._capture.blocks.items():
            formed = passed.of(name).formed()
            for i, matrix in enumerate(formed):
                for parameter, rows, value in block.split(matrix):
                    if parameter not in found:
                        found[parameter] = formed.new_zeros((len(formed), *parameter.shape))
                    found[parameter][i][rows] += value
        return {name: found[p] * scale for p, name in self._capture.names.items() if p in found}

    # -------------------------------------------------------------------------------------------------------- recording

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks in place; all undone at the end."""
        with ExitStack() as undo:
            undo.callback(self._model.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True).remove)
            self._end = self._model.register_forward_hook(self._after, always_call=True)
            undo.callback(lambda: self._end.remove())
            self._hooks = undo.enter_context(ExitStack())
            try:
                yield
            finally:
                self._capture.begin(None)
                self._capture.watching = False

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._capture.looking:
            return
        self._last = None
        if not torch.is_grad_enabled():
            self._capture.begin(None)
            return
        x = _batch_of(model, args, kwargs)
        for name, module in model.named_modules():
            if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise ValueError(
                    f"capture: {name!r} ({type(module).__name__}) is in train mode: a batch's examples change one "
                    "another's outputs, so none has a gradient of its own; put it into eval mode, or use LayerNorm or "
                    "GroupNorm"
                )
        if not self._settled:
            self._settle(x)
        given = None if self._directions is None else self._given()
        at_once = self._keep == "numbers"
        under = weakref.ref(self._capture)

        def wanted() -> bool:
            following = under()
            return following is not None and following.watching

        blocks, sight = self._capture.blocks, self._capture.sight
        self._last = Arriving(blocks, sight, batch_length(x), at_once, given, wanted)
        self._capture.begin(self._last)

    def _after(self, *_: Any) -> None:
        if not self._capture.looking:
            self._capture.begin(None)  # what checkpointed layers run again in the backward pass is not a new use

    def _settle(self, x: Any) -> None:
        """How layers are read, found on a few examples by a random linear function of the outputs as their loss."""
        following, model = self._capture, self._model
        few = rows_of(x, torch.arange(min(_LOOKED_AT, batch_length(x))))

        def values(outputs: Any, rows: Tensor) -> Tensor:
            found = logits_of(outputs)
            if not found.dim() or len(found) != len(rows):
                raise ValueError(
                    f"capture: outputs must have the examples first, [n={len(rows)}, ...], got {list(found.shape)}"
                )
            draw = torch.Generator().manual_seed(0)
            weights = torch.randn(found.shape[1:], generator=draw, dtype=torch.float64).to(found)
            return (found * weights).reshape(len(rows), -1).sum(1)

        training = [module for module in model.modules() if module.training]
        devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
        following.looking = True
        model.eval()
        try:
            with torch.enable_grad(), torch.random.fork_rng(devices), following.attached():
                settle(following, few, values)
        finally:
            following.looking = False
            for module in training:
                module.training = True
        _leave_out_loose(following)
        following.check_any()
        lost = following.lost
        if lost:
            listed = "\n".join(f"  {name}: {reason}" for name, reason in lost.items())
            warn_outside(f"capture: these trained parameters are not covered:\n{listed}", UserWarning)
        following.hook_layers(self._hooks)
        self._end.remove()  # the last of the hooks, after that of a model that is itself a layer
        self._end = model.register_forward_hook(self._after, always_call=True)
        self._settled = True

    def _given(self) -> dict[str, Tensor]:
        if self._by_block is None:
            assert self._directions is not None
            self._by_block = _by_block(self._capture, self._directions)
        return self._by_block

    def _scale(self) -> float | Tensor:
        return float(self.n) if self.factor is None else self.factor

    def _passed(self) -> Arriving:
        if self._last is None or not self._last.arrived:
            raise ValueError("capture: there are no gradients: ask after backward(), and before the next forward pass")
        return self._last


class _Following(Capture):
    """A capture of a model that others run: what it sees goes to the pass that is under way."""

    looking = False  # whether it runs the model itself, to see how layers are read
    watching = True  # whether the `with` has not ended
    _under_way: Arriving | None = None

    def begin(self, passed: Arriving | None) -> None:
        """Forward passes are those of `passed` from now on, or of none."""
        self._under_way = passed
        self._recording = None if passed is None else {}
        self._n = 0 if passed is None else passed.n

    def hook_layers(self, undo: ExitStack) -> None:
        """Hooks on the layers, and nothing else: parameters stay as they are."""
        self._hook(undo)

    def _record(self, source: str, x: Any, y: Any) -> None:
        if self.looking or self._under_way is None:
            super()._record(source, x, y)
        elif isinstance(x, Tensor) and isinstance(y, Tensor):
            self.called.add(self.module_of(source))
            if y.requires_grad:
                self._under_way.see(source, x, y)


def _batch_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The arguments of a call as a batch whose examples can be picked."""
    if not kwargs:
        return args[0] if len(args) == 1 else Arguments(args)
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    found: dict[str, Any] = {}
    for name, value in bound.items():
        found.update(value if isinstance(value, dict) and name not in kwargs else {name: value})
    return {name: value for name, value in found.items() if value is not None}


def _leave_out_loose(capture: Capture) -> None:
    for block in [block for block in capture.blocks.values() if block.loose]:
        capture.leave_out(block, _BY_ITSELF)


def _by_block(capture: Capture, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Directions in parameter space as matrices [q, g, o, d] of the blocks."""
    by_name = {name: parameter for parameter, name in capture.names.items()}
    unknown = [name for name in directions if name not in by_name]
    if unknown or not directions:
        raise ValueError(f"capture: directions must be keyed like the model's parameters, got {unknown[:1] or 'none'}")
    lengths = {len(value) for value in directions.values()}
    for name, value in directions.items():
        if value.shape[1:] != by_name[name].shape or len(lengths) > 1:
            raise ValueError(
                f"capture: directions of {name!r} must be [q, {', '.join(map(str, by_name[name].shape))}] with one q "
                f"for all, got {list(value.shape)}"
            )
    (q,) = lengths
    given = {by_name[name]: value for name, value in directions.items()}
    found: dict[str, Tensor] = {}
    for name, block in capture.blocks.items():
        if any(parameter in given for parameter in block.parameters):
            values = {p: given.get(p, torch.zeros((), device=p.device).expand(q, *p.shape)) for p in block.parameters}
            rows = [block.matrix({p: value[i].to(p) for p, value in values.items()}) for i in range(q)]
            found[name] = torch.stack(rows).detach()
    return found
