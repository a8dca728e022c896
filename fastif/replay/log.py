"""What a training run did, step by step: enough to run it again, and backwards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastif.curvature.damping import TrainingDamping
from fastif.replay.layout import Layout
from fastif.replay.log_files import Folder
from fastif.replay.optimizers import Rule, State, rule_named, rule_of

_MIXING = (nn.modules.batchnorm._BatchNorm,)
_DRAWING = (nn.modules.dropout._DropoutNd,)


class Step(NamedTuple):
    """One step of the optimizer."""

    rows: Tensor  # int64 [b], the training examples of the batch
    weights: Tensor | None  # float64 [b], factors of their losses; None: 1 each
    numbers: tuple[tuple[float, ...], ...]  # of each parameter group, as the optimizer's rule reads them
    norm: Tensor  # of the gradient, float64 []


class Point(NamedTuple):
    """Where a training stands before a step."""

    at: Tensor  # the parameters, [P]
    state: State


class TrainingLog:
    """A record of a training run, made by the training loop itself; what `Replay` runs backwards.

    `log.step(optimizer, rows)` takes the place of `optimizer.step()`: it notes what the step is about to do, and takes
    it. The gradients are those of (1/b) Σ_i w_i ℓ_i over the b examples of the batch, w_i = 1 where no weights are
    given: the mean of their losses.

    >>> model = nn.Linear(2, 2)
    >>> log, optimizer = TrainingLog(model, every=2), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> x, y = torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    >>> for rows in torch.arange(4).split(2):
    ...     optimizer.zero_grad()
    ...     nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
    ...     log.step(optimizer, rows)
    >>> len(log.steps), round(log.training_time, 6)
    (2, 2.0)

    Args:
        model: the network that is trained.
        every: steps from one checkpoint to the next. A checkpoint holds the parameters and the optimizer's state, in
            main memory or in `out`; replay computes again what lies between two of them, and holds these steps' states
            while it does: √T for T steps makes the sum of both smallest.
        out: a new or empty folder for the checkpoints, so that they need no memory; `save` completes it.

    Raises ValueError for an optimizer that is not torch's SGD (dampening 0), Adam or AdamW (no amsgrad), and in a step
    for whatever could not be run again: BatchNorm in train mode, whose batches mix examples; dropout, which draws;
    another optimizer, other parameters or modes than in the first step.
    """

    def __init__(self, model: nn.Module, every: int = 100, out: str | Path | None = None):
        if type(every) is not int or every < 1:
            raise ValueError(f"TrainingLog: every must be an integer >= 1, got {every!r}")
        self.every = every
        self.steps: list[Step] = []
        self.constants: dict[str, Tensor] = {}  # buffers, and parameters that the optimizer does not move
        self.modes: tuple[str, ...] = ()  # modules in train mode
        self._model: nn.Module | None = model
        self._folder = None if out is None else Folder.new(Path(out))
        self._points: list[Point | None] = []  # the checkpoints; None for those in the folder
        self._final: Point | None = None
        self._optimizer: Any = None
        self._moved: list[nn.Parameter] = []

    layout: Layout
    rule: Rule
    dtype: torch.dtype

    def __repr__(self) -> str:
        if not self.steps:
            return f"TrainingLog(no steps yet, a checkpoint every {self.every})"
        where = "in memory" if self._folder is None else f"in {str(self._folder.path)!r}"
        return (
            f"TrainingLog({len(self.steps):,} steps of {self.rule.name}, {len(self.kept):,} examples, "
            f"{self.layout.size:,} parameters, {len(self.starts)} checkpoints {where})"
        )

    # ------------------------------------------------------------------------------------------------------- recording

    def step(self, optimizer: torch.optim.Optimizer, rows: Any, weights: Any = None) -> None:
        """Notes a step of the optimizer and takes it: call it where `optimizer.step()` would be called.

        Args:
            rows: the places in the training data of the batch's examples: int64 [b], as a tensor, array or list.
            weights: of the examples' losses, [b], where the gradients are those of the mean of weights × losses.
        """
        self.note(optimizer, rows, weights)
        optimizer.step()

    def note(self, optimizer: torch.optim.Optimizer, rows: Any, weights: Any = None) -> None:
        """Notes the step that the optimizer takes next: for loops of others, which call `optimizer.step()` themselves.

        The arguments are those of `step`; the gradients are in place, and nothing changes them before the step.
        """
        rows, weights = _checked_rows(rows), None if weights is None else _checked_weights(weights, len(rows))
        if self._model is None:
            raise ValueError("TrainingLog: a log that was loaded is complete; record a new one")
        if not self.steps:
            self._begin(self._model, optimizer)
        elif optimizer is not self._optimizer:
            raise ValueError(f"TrainingLog: step {len(self.steps)} is of another optimizer than step 0")
        elif self._final is not None and not self._is_where_it_was():
            raise ValueError(f"TrainingLog: the parameters changed between steps {len(self.steps) - 1} and this one")
        self._check(optimizer)
        counts = [self._steps_taken(optimizer, group) for group in optimizer.param_groups]
        numbers = [self.rule.read(group, n) for group, n in zip(optimizer.param_groups, counts, strict=True)]
        if len(self.steps) % self.every == 0:
            self._check_modes(self._model)
            self._keep(self._point())
        norm = nn.utils.get_total_norm([p.grad for p in self._moved if p.grad is not None]).double()
        self.steps.append(Step(rows, weights, tuple(map(tuple, numbers)), norm))
        self._final = None

    def _begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.rule, self._optimizer = rule_of(optimizer), optimizer
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = [[p for p in group["params"] if p.grad is not None] for group in optimizer.param_groups]
        self._moved = [parameter for group in groups for parameter in group]
        if not self._moved:
            raise ValueError("TrainingLog: no parameter of the optimizer has a gradient: call step after backward()")
        for number, parameter in enumerate(self._moved):
            if parameter not in names:
                raise ValueError(
                    f"TrainingLog: the optimizer moves a parameter of shape {list(parameter.shape)} (number {number}) "
                    "that the model does not have"
                )
        kinds = {(p.dtype, p.device) for p in self._moved}
        if len(kinds) > 1 or self._moved[0].dtype not in (torch.float32, torch.float64):
            found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise ValueError(f"TrainingLog: parameters must be float32 or float64 on one device, got {found}")
        self.dtype = self._moved[0].dtype
        self.layout = Layout(
            tuple(names[p] for p in self._moved),
            tuple(tuple(p.shape) for p in self._moved),
            tuple(map(len, groups)),
        )
        self.modes = tuple(name for name, module in model.named_modules() if module.training)
        self.constants = self._constants_of(model)

    def _constants_of(self, model: nn.Module) -> dict[str, Tensor]:
        moved = set(self.layout.names)
        rest = {name: value for name, value in model.named_parameters() if name not in moved}
        return {name: value.detach().cpu().clone() for name, value in {**rest, **dict(model.named_buffers())}.items()}

    def _check(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuses a step that does not move the parameters that the first step moved."""
        assert self._model is not None
        now = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if len(now) != len(self._moved) or any(a is not b for a, b in zip(now, self._moved, strict=True)):
            names = {parameter: name for name, parameter in self._model.named_parameters()}
            differ = {*now} ^ {*self._moved}
            name = names.get(next(iter(differ)), "?") if differ else "?"
            raise ValueError(
                f"TrainingLog: step {len(self.steps)} has gradients of other parameters than step 0 ({name!r}): "
                "parameters must move in all steps or in none"
            )
        for name, parameter in zip(self.layout.names, now, strict=True):
            if parameter.grad is not None and parameter.grad.is_sparse:
                raise ValueError(f"TrainingLog: the gradient of {name!r} is sparse, which cannot be replayed")

    def _check_modes(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if module.training and isinstance(module, _MIXING):
                raise ValueError(
                    f"TrainingLog: {name!r} ({type(module).__name__}) is in train mode: a batch's examples change one "
                    "another's outputs, so none has a loss of its own; put it into eval mode, or use LayerNorm or "
                    "GroupNorm"
                )
            if module.training and isinstance(module, _DRAWING) and module.p > 0:
                raise ValueError(
                    f"TrainingLog: {name!r} ({type(module).__name__}, p={module.p:g}) is in train mode and draws: no "
                    "second run would draw the same; set p=0"
                )
        if (modes := tuple(name for name, module in model.named_modules() if module.training)) != self.modes:
            name = sorted({*modes} ^ {*self.modes})[0]
            raise ValueError(f"TrainingLog: {name!r} is not in the mode (train or eval) that it was in in step 0")

    def _steps_taken(self, optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float:
        """How often the optimizer moved a group before this step: looked up once, then counted."""
        if self.steps:
            place = next(i for i, other in enumerate(optimizer.param_groups) if other is group)
            counted = self.steps[-1].numbers[place]
            return counted[-1]  # of no meaning for SGD, which does not ask
        found = {float(optimizer.state[p]["step"]) for p in group["params"] if "step" in optimizer.state.get(p, {})}
        if len(found) > 1:
            raise ValueError(f"TrainingLog: parameters of one group took {sorted(found)} steps before the log began")
        return found.pop() if found else 0.0

    def _point(self) -> Point:
        """The parameters and the optimizer's state as they are: copies in main memory."""
        kept: list[Tensor] = []
        for name in self.rule.state:  # there is none before an optimizer's first step
            found = [self._optimizer.state.get(p, {}).get(name) for p in self._moved]
            pairs = zip(self._moved, found, strict=True)
            kept.append(self.layout.join(torch.zeros_like(p) if v is None else v for p, v in pairs))
        return Point(self.layout.join(self._moved).cpu(), tuple(value.cpu() for value in kept))

    def _keep(self, point: Point) -> None:
        if self._folder is not None:
            self._folder.write_point(len(self._points), point.at, dict(zip(self.rule.state, point.state, strict=True)))
        self._points.append(point if self._folder is None else None)

    def _is_where_it_was(self) -> bool:
        assert self._final is not None
        return torch.equal(self._final.at, self.layout.join(self._moved).cpu())

    # --------------------------------------------------------------------------------------------------------- reading

    @property
    def final(self) -> Point:
        """Where the training ended: the model's parameters when they are first asked for after the last step."""
        if not self.steps:
            raise ValueError("TrainingLog: no step was recorded; call log.step(optimizer, rows) in the training loop")
        if self._final is None:
            assert self._model is not None
            now = self._constants_of(self._model)
            changed = [name for name, value in self.constants.items() if not torch.equal(now[name], value)]
            if changed:
                raise ValueError(
                    f"TrainingLog: {changed[0]!r} changed during training though no optimizer moved it: a forward pass "
                    "that writes to it cannot be replayed"
                )
            self._final = self._point()
        return self._final

    @property
    def kept(self) -> Tensor:
        """The training examples that were in a batch, int64 ascending."""
        return torch.cat([step.rows for step in self.steps]).unique()

    @property
    def starts(self) -> list[int]:
        """The steps before which there are checkpoints."""
        return list(range(0, len(self.steps), self.every))

    @property
    def in_folder(self) -> bool:
        """Whether checkpoints are read when they are asked for."""
        return self._folder is not None

    def point(self, number: int) -> Point:
        """A checkpoint."""
        point = self._points[number]
        if point is None:
            assert self._folder is not None
            at, state = self._folder.read_point(number, self.layout.size, self.dtype, self.rule.state)
            return Point(at, tuple(state[name] for name in self.rule.state))
        return point

    def parameters(self, number: int | None = None) -> dict[str, Tensor]:
        """What `load_state_dict(..., strict=False)` takes: of a checkpoint or, by default, of the end."""
        point = self.final if number is None else self.point(number)
        return {**self.constants, **self.layout.split(point.at)}

    def rates(self) -> list[float]:
        """How far every step goes along a constant gradient: η/(1 − μ) of SGD; η of Adam, where it is that gradient
        divided by D (docs/math.md (24)). Raises ValueError for groups that differ."""
        found = [{self.rule.rate(row) for row in step.numbers} for step in self.steps]
        for number, rates in enumerate(found):
            if len(rates) > 1:
                raise ValueError(
                    f"TrainingLog: parameter groups differ in step {number}: {self.rule.of_rate} is "
                    f"{', '.join(f'{rate:g}' for rate in sorted(rates))}: there is no one training time"
                )
        return [rates.pop() for rates in found]

    @property
    def training_time(self) -> float:
        """τ = Σ_t η_t/(1 − μ_t) of SGD, for `TrainingDamping`; raises what `rates` does, and ValueError for Adam, whose
        time differs from parameter to parameter."""
        if self.rule.name != "SGD":
            raise ValueError(f"TrainingLog: there is no training time of {self.rule.name}: it differs by parameter")
        return math.fsum(self.rates())

    @property
    def weight_decay(self) -> float:
        """γ. Raises ValueError where it is not one for all steps and groups."""
        place = self.rule.fields.index("weight_decay")
        found = {row[place] for step in self.steps for row in step.numbers}
        if len(found) != 1:
            raise ValueError(f"TrainingLog: steps or groups differ in weight_decay: {sorted(found)}")
        return found.pop()

    @property
    def damping(self) -> TrainingDamping:
        """What this training puts in the place of a chosen damping. docs/math.md (22)."""
        return TrainingDamping(self.training_time, self.weight_decay)

    # ------------------------------------------------------------------------------------------------------- on disk

    def save(self, out: str | Path | None = None) -> None:
        """Completes the folder that the log was made with, or writes all of it to a new or empty folder `out`.

        It holds safetensors files and `log.json` with their checksums, and no code.
        """
        final = self.final
        if out is None and self._folder is None:
            raise ValueError("TrainingLog: save needs a folder, as the log was made without out=")
        folder = self._folder if out is None else Folder.new(Path(out))
        assert folder is not None
        if folder is not self._folder:
            for number in range(len(self._points)):
                point = self.point(number)
                folder.write_point(number, point.at, dict(zip(self.rule.state, point.state, strict=True)))
        folder.write("final", {"parameters": final.at, **dict(zip(self.rule.state, final.state, strict=True))})
        folder.write("constants", self.constants)
        steps: dict[str, Tensor] = {
            "rows": torch.cat([step.rows for step in self.steps]),
            "lengths": torch.tensor([len(step.rows) for step in self.steps]),
            "numbers": torch.tensor([step.numbers for step in self.steps], dtype=torch.float64),
            "norms": torch.stack([step.norm.cpu() for step in self.steps]),
        }
        if any(step.weights is not None for step in self.steps):
            ones = (torch.ones(len(step.rows), dtype=torch.float64) for step in self.steps)
            given = [one if step.weights is None else step.weights for one, step in zip(ones, self.steps, strict=True)]
            steps["weights"] = torch.cat(given)
        folder.write("steps", steps)
        folder.finish(
            {
                "optimizer": self.rule.name,
                "state": list(self.rule.state),
                "fields": list(self.rule.fields),
                "every": self.every,
                "dtype": str(self.dtype).removeprefix("torch."),
                "modes": list(self.modes),
                "names": list(self.layout.names),
                "shapes": [list(shape) for shape in self.layout.shapes],
                "groups": list(self.layout.groups),
            }
        )

    @classmethod
    def load(cls, folder: str | Path) -> TrainingLog:
        """A log that `save` wrote; its checkpoints are read when they are needed.

        Raises FileNotFoundError where there is no finished log, and `fastif.files.Damaged`, a ValueError, with its
        name, for a file that is not what was written.
        """
        opened, facts = Folder.open(Path(folder))
        log = cls.__new__(cls)
        try:
            log.rule = rule_named(facts["optimizer"], facts["state"])
            log.layout = Layout(tuple(facts["names"]), tuple(map(tuple, facts["shapes"])), tuple(facts["groups"]))
            log.every, log.modes = facts["every"], tuple(facts["modes"])
            log.dtype = {"float32": torch.float32, "float64": torch.float64}[facts["dtype"]]
            same = facts["fields"] == list(log.rule.fields)
        except (KeyError, ValueError, TypeError) as error:
            raise opened.damaged(str(error)) from error
        if not same:
            raise opened.damaged("its steps are of another version of fastif")
        log._model = log._optimizer = None
        log._moved, log._folder = [], opened
        log.constants = opened.read("constants")
        steps, final = opened.read("steps"), opened.read("final")
        log._final = Point(final["parameters"], tuple(final[name] for name in log.rule.state))
        lengths = steps["lengths"].tolist()
        weights = steps["weights"].split(lengths) if "weights" in steps else [None] * len(lengths)
        log.steps = [
            Step(rows, given, tuple(map(tuple, numbers)), norm)
            for rows, given, numbers, norm in zip(
                steps["rows"].split(lengths), weights, steps["numbers"].tolist(), steps["norms"], strict=True
            )
        ]
        log._points = [None] * len(log.starts)
        return log


def _checked_rows(rows: Any) -> Tensor:
    found = torch.as_tensor(rows).detach().cpu()
    if found.dtype == torch.bool or found.is_floating_point() or found.dim() != 1 or len(found) == 0:
        raise ValueError(f"TrainingLog: rows must be int64 [b], at least one, got {found.dtype} {list(found.shape)}")
    if int(found.min()) < 0:
        raise ValueError(f"TrainingLog: rows must be >= 0, got {int(found.min())}")
    return found.to(torch.int64, copy=True)


def _checked_weights(weights: Any, n: int) -> Tensor:
    values: Sequence[float] | np.ndarray | Tensor = weights
    found = torch.as_tensor(values).detach().cpu().to(torch.float64, copy=True)
    if found.shape != (n,) or not bool(found.isfinite().all()):
        raise ValueError(f"TrainingLog: weights must be finite, [b={n}], got {list(found.shape)}")
    return found
