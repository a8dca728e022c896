"""Influence of training examples on a model's parameters and on its losses.

Sign and units, once for the whole library: scores are predicted RISES of a query's loss when a training example is
removed; positive means that the example helps the query. docs/math.md (1), (2).
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastif.capture import Capture, Forward, dtype_of
from fastif.curvature import Curvature, Directions, ExactBlock, Explicit, LowRank
from fastif.curvature.network import Alone, FitData, JointCurvature, NetworkCurvature, Together
from fastif.data import as_loader, batch_length, count, picked, rows_of
from fastif.features import find_head, moved_to, placed
from fastif.gradients import Gradients
from fastif.losses import (
    IGNORED,
    Loss,
    Measurement,
    check_loss,
    check_measurement,
    labels_in,
    labels_of,
    measured,
    output_columns,
    per_sample,
)
from fastif.plan import Plan, plan
from fastif.samplers import Subset, check_subset
from fastif.store import ScoreFolder, best_of, write_scores

Estimator = Curvature | JointCurvature
_RANDOM_LAYERS = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


class Influence:
    """Influence functions on a trained model, over the layers that are chosen and with the curvature that is chosen.

    >>> from fastif import EKFAC
    >>> _ = torch.manual_seed(0)
    >>> model, x, y = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(8, 2), torch.arange(8) % 3
    >>> influence = Influence(model, curvature=EKFAC(damping=1e-2), progress=False).fit((x, y))
    >>> influence.scores((x[:2], y[:2]), (x, y)).shape
    torch.Size([2, 8])

    Args:
        model: left as it is by every method. It runs as it is: a model in train mode whose dropout or BatchNorm would
            act is refused unless `allow_train_mode`.
        loss: "cross_entropy", "causal_lm", "bce", "mse", or a function (outputs, batch) → [n]; see `fastif.losses`. The
            model was trained on its mean over the training examples.
        curvature: an estimator (`ExactBlock`, `KFAC`, `EKFAC`, `Diagonal`, `Identity`), or a mapping from patterns of
            layer names to estimators, the first match counts. They are copied. Default ExactBlock(damping=1e-3).
        layers: names or patterns of the layers whose parameters may move (see `Capture`). Default all that are known;
            for a lone ExactBlock, which holds the square of what it covers, the head: the last nn.Linear
            (with joint=True all).
        measurement: what is asked of queries: "loss", "margin", "log_odds", or a function (outputs, batch) → [q].
        checkpoints: state dicts; influence is averaged over the model at each of them. Default: the model as it is.
        batch_size: for data that brings no batches of its own; results do not depend on it.
        memory: bytes that preconditioned query gradients may take at a time.
        device: where to compute; default that of the model.
        autocast: run forward and backward passes under autocast of this 16-bit type, whatever surrounds the call; sums
            are float32 all the same. Default: not.
        allow_train_mode: run a model in train mode as it is.
        seed: of what is drawn: the labels of fisher="monte_carlo", the examples of a stochastic LiSSA.
        progress: show progress bars.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = "cross_entropy",
        curvature: Estimator | Mapping[str, Estimator] | None = None,
        *,
        layers: str | Sequence[str] | None = None,
        measurement: Measurement = "loss",
        checkpoints: Sequence[Mapping[str, Tensor]] | None = None,
        batch_size: int = 256,
        memory: int = 1 << 27,
        device: torch.device | str | None = None,
        autocast: torch.dtype | None = None,
        allow_train_mode: bool = False,
        seed: int = 0,
        progress: bool = True,
    ):
        check_loss(loss)
        check_measurement(measurement, loss)
        if checkpoints is not None and not len(checkpoints):
            raise ValueError("Influence: checkpoints must not be empty")
        if memory < 1:
            raise ValueError(f"Influence: memory must be at least 1 byte, got {memory}")
        curvature = ExactBlock() if curvature is None else curvature
        if isinstance(curvature, ExactBlock) and not curvature.joint and layers is None:
            layers = find_head(model)[0] or "*"
        self.model, self.measurement = model, measurement
        self.loss: Loss = loss
        self.batch_size, self.memory, self.seed, self.progress = batch_size, memory, seed, progress
        self.allow_train_mode, self.checkpoints, self.autocast = allow_train_mode, checkpoints, autocast
        self.capture = Capture(model, layers)
        self._parts = self._assigned(curvature)
        places = {parameter.device for parameter in model.parameters()}
        if device is None and len(places) > 1:
            raise ValueError(f"Influence: the model is spread over {', '.join(sorted(map(str, places)))}")
        self.device = places.pop() if device is None else torch.empty(0, device=device).device
        self._fitted: list[NetworkCurvature] = []  # by checkpoint
        self._n = 0

    @property
    def curvature(self) -> dict[str, Any]:
        """The fitted estimators by block (of the first checkpoint)."""
        if not self._fitted:
            raise ValueError("Influence: not fitted; call fit(train) first")
        return self._fitted[0].by_block

    def plan(self, train: Any) -> Plan:
        """What will be covered, skipped, stored and computed; only a few examples go through the model."""
        with self._running(None):
            return plan(self, train)

    def fit(self, train: Any, subset: Any | None = None) -> Influence:
        """Builds the curvature at the model's parameters.

        Args:
            train: the data that the model was trained on, as `fastif.data.as_loader` takes it; its length is n of (2).
            subset: the examples of `train` that carry the curvature, with weights; default all, 1/n each.

        Raises ValueError for whatever `Capture` refuses: layers that are not called, examples that mix, parameters
        used behind a layer's back, NaN; NotPositiveDefinite, naming the layer, where damping does not suffice.
        """
        n = count(train, self.batch_size)
        indices, weights = torch.arange(n), torch.full((n,), 1 / n, dtype=torch.float64)
        if subset is not None:
            indices, weights = check_subset(subset, n)
        fitted: list[NetworkCurvature] = []
        for checkpoint in self.checkpoints or [None]:
            with self._running(checkpoint):
                fitted.append(self._fit_one(train, Subset(indices, weights)))
        self._fitted, self._n = fitted, n
        return self

    def on_parameters(self, batch: Any) -> dict[str, Tensor]:
        """Σ_z I(z) = −(G + λI)⁻¹ Σ_z ∇ℓ(z) over the examples of `batch`: a dict keyed like the model's parameters.

        θ̂ + ε·I(z) approximates the optimum when z gains weight ε in the mean loss: removing z is ε = −1/n. Parameters
        that are not covered are absent: they are taken as fixed. With checkpoints, the mean over them.
        docs/math.md (1).
        """
        total: dict[str, Tensor] = {}
        for checkpoint, curvature in self._at_checkpoints():
            sums: dict[str, Tensor] = {}
            with self._running(checkpoint):
                for _, _, gradients in self._gradients(batch, "on_parameters"):
                    for name, g in gradients.items():
                        part = g.sum(torch.ones(len(g), device=self.device))
                        sums[name] = sums[name].add_(part) if name in sums else part
                for name, moved in curvature.solve(sums).items():
                    moved = moved.div_(-len(self._fitted))
                    total[name] = total[name].add_(moved) if name in total else moved
        return self._on_parameters(total)

    def solve(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(G + λI)⁻¹ v for a vector v in parameter space: as dicts keyed like the model's parameters.

        Parameters that are not covered may be absent and stay so. With checkpoints, the mean over them. Raises
        ValueError for a covered parameter that is missing or has another shape.
        """
        blocks, total = self.capture.blocks, dict[str, Tensor]()
        values: dict[Tensor, Tensor] = {}
        for name, shape in self.capture.covered.items():
            if name not in vectors or vectors[name].shape != shape:
                found = list(vectors[name].shape) if name in vectors else "nothing"
                raise ValueError(f"solve: {name!r} must be {list(shape)}, got {found}")
        for parameter, name in self.capture.names.items():
            if name in self.capture.covered:
                values[parameter] = vectors[name].to(self.device)
        for checkpoint, curvature in self._at_checkpoints():
            with self._running(checkpoint):
                for name, solved in curvature.solve({n: b.matrix(values) for n, b in blocks.items()}).items():
                    solved = solved / len(self._fitted)
                    total[name] = total[name].add_(solved) if name in total else solved
        return self._on_parameters(total)

    def _on_parameters(self, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters' part of every block's matrix, keyed like the model's parameters."""
        found: dict[Tensor, Tensor] = {}
        for name, matrix in matrices.items():
            for parameter, rows, value in self.capture.blocks[name].split(matrix):
                if parameter not in found:
                    found[parameter] = torch.zeros_like(parameter, requires_grad=False)
                found[parameter][rows] += value
        return {name: found[p].detach() for p, name in self.capture.names.items() if p in found}

    @overload
    def scores(
        self,
        query: Any,
        train: Any,
        *,
        groups: Tensor | None = None,
        query_groups: Tensor | None = None,
        rank: int | None = None,
    ) -> Tensor: ...
    @overload
    def scores(
        self, query: Any, train: Any, *, rank: int | None = None, out: Path | str, resume: bool = False
    ) -> ScoreFolder: ...
    def scores(
        self,
        query: Any,
        train: Any,
        *,
        groups: Tensor | None = None,
        query_groups: Tensor | None = None,
        rank: int | None = None,
        out: Path | str | None = None,
        resume: bool = False,
    ) -> Tensor | ScoreFolder:
        """scores[q, t] = (1/n) ∇m_qᵀ (G + λI)⁻¹ ∇ℓ_t, [q, n]: predicted rise of q's measurement if t is removed.

        With the measurement "loss", positive: t helps q. In units of the measurement; on the CPU. docs/math.md (2).

        Args:
            query, train: data with labels.
            groups: int64 [n]; columns are then groups of training examples, scores of a group are summed, [q, groups].
            query_groups: int64 [q]; rows are then groups of queries, [groups, n].
            rank: keep only so many singular vectors of each query's preconditioned gradient (less memory, so fewer
                passes over `train` for many queries); the largest relative error is in `rank_error` afterwards.
            out: a folder for the scores; they are written block by block as they are computed and returned as a
                `ScoreFolder`, which reads them from there, also later and without the model. Not with groups.
            resume: go on with a job in `out` that was cut off, at whatever point: what is there is not computed again,
                and the scores end with the same bits. A folder of other settings is refused, each difference named.
        """
        if out is not None:
            if groups is not None or query_groups is not None:
                raise ValueError("scores: out= and groups exclude each other; sum the columns of what was written")
            return write_scores(self, query, train, out, rank=rank, resume=resume)
        if resume:
            raise ValueError("scores: resume=True needs out=, the folder of the job")
        return self._assembled(self._tiles(query, train, query_groups, rank), query, query_groups, groups, train)[""]

    def scores_by_layer(self, query: Any, train: Any) -> dict[str, Tensor]:
        """The part of every block in `scores`, {block: [q, n]}; they add up to `scores`."""
        return self._assembled(self._tiles(query, train, by="layer"), query, None, None, train)

    def scores_by_token(self, query: Any, train: Any) -> Tensor:
        """The part of every position of the training examples in `scores`, [q, n, t]; they add up to `scores`.

        Raises ValueError where a covered layer has other positions than the rest (a normalisation layer sums over
        them): leave it out with layers=.
        """
        return self._assembled(self._tiles(query, train, by="token"), query, None, None, train)[""]

    def top(self, query: Any, train: Any, k: int, *, largest: bool = True) -> tuple[Tensor, Tensor]:
        """The k training examples with the largest scores for each query: (values [q, k], indices int64 [q, k]).

        Largest first: the most helpful; `largest=False` gives the most harmful, smallest first. Ties go to the lower
        index. The score matrix [q, n] is not stored, unless there are several checkpoints.
        """
        n = count(train, self.batch_size)
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= n:
            raise ValueError(f"top: k must be an integer in [1, n={n}], got k={k}")
        if len(self._fitted) > 1:  # a checkpoint's part is no score: the sum has to be there before it is ranked
            values, indices = self.scores(query, train).sort(dim=1, descending=largest, stable=True)
            return values[:, :k], indices[:, :k]
        best: dict[int, tuple[Tensor, Tensor]] = {}  # by first query of a block
        with closing(self._tiles(query, train)) as tiles:
            for tile in tiles:
                best[tile.query] = best_of(best.get(tile.query), tile.values[""], tile.train, k, largest)
        values, indices = zip(*(best[start] for start in sorted(best)), strict=True)
        return torch.cat(values), torch.cat(indices)

    def self_influence(self, train: Any) -> Tensor:
        """scores[t, t] of every training example, [n], never negative: how much its loss rests on it."""
        total = None
        for checkpoint, curvature in self._at_checkpoints():
            with self._running(checkpoint):
                parts = [
                    curvature.sq_norms(gradients).cpu() for _, _, gradients in self._gradients(train, "self-influence")
                ]
            total = torch.cat(parts) if total is None else total + torch.cat(parts)
        assert total is not None
        return total / (self._n * len(self._fitted))

    def state_dict(self) -> dict[str, Tensor]:
        """All that `fit` learned, as tensors: safetensors or torch.save keep it."""
        _ = self.curvature  # refuses what is not fitted
        state = {"n": torch.tensor(self._n)}
        for number, curvature in enumerate(self._fitted):
            state.update(curvature.state_dict(f"{number}/"))
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Influence:
        """Takes what `state_dict` gave an Influence of the same model and arguments; refuses what does not fit."""
        fitted: list[NetworkCurvature] = []
        left = set(state) - {"n"}
        for number in range(len(self.checkpoints or [None])):
            own = {key: state[key].to(self.device) for key in left if key.startswith(f"{number}/")}
            left -= own.keys()
            fitted.append(self._begun(None))
            fitted[-1].load_state_dict(own, f"{number}/")
        if left or "n" not in state:
            raise ValueError(f"load_state_dict: the state is another model's: {min(left) if left else 'no n'}")
        self._fitted, self._n = fitted, int(state["n"])
        return self

    # --------------------------------------------------------------------------------------------------------- fitting

    def _assigned(self, curvature: Estimator | Mapping[str, Estimator]) -> NetworkCurvature:
        """An estimator for every block: a copy of its own, or one for all that match its pattern.

        Blocks that no pattern matches are no longer covered.
        """
        rules = dict(curvature) if isinstance(curvature, Mapping) else {"*": curvature}
        for estimator in rules.values():
            if not hasattr(estimator, "observe"):
                raise TypeError(f"Influence: curvature must be an estimator or a mapping to them, got {estimator!r}")
        members: dict[str, list[str]] = {pattern: [] for pattern in rules}
        for name, block in list(self.capture.blocks.items()):
            pattern = next((pattern for pattern in rules if fnmatchcase(name, pattern)), None)
            if pattern is None:
                self.capture.leave_out(block, "no pattern of curvature= matches its layer")
            else:
                members[pattern].append(name)
        parts: dict[tuple[str, ...], JointCurvature] = {}
        for pattern, names in members.items():
            estimator = rules[pattern]
            if isinstance(estimator, JointCurvature):
                parts.update({tuple(names): estimator} if names else {})
            elif getattr(estimator, "joint", False):
                parts.update({tuple(names): Together(tuple(names), estimator)} if names else {})
            else:
                parts.update({(name,): Alone(name, estimator) for name in names})
        if not parts:
            raise ValueError(f"Influence: no pattern of curvature= matches a layer, got {', '.join(rules)}")
        return NetworkCurvature(parts)

    def _begun(self, data: FitData | None) -> NetworkCurvature:
        curvature = NetworkCurvature({names: copy.deepcopy(part) for names, part in self._parts.parts.items()})
        curvature.begin({name: block.shape for name, block in self.capture.blocks.items()}, data)
        return curvature

    def _fit_one(self, train: Any, subset: Subset) -> NetworkCurvature:
        def batches(subset: Subset) -> Iterator[tuple[Any, Any, Tensor]]:
            for (x, y), places in picked(train, self.batch_size, subset.indices):
                yield moved_to(x, self.device), moved_to(y, self.device), subset.weights[places].to(self.device)

        data = FitData(self.model, self.loss, self.capture.blocks, subset, batches, self.seed, self.autocast)
        curvature = self._begun(data)
        for turn in range(max(1, curvature.passes)):
            looking = curvature.open(turn)
            generator = torch.Generator().manual_seed(self.seed)
            total = -(-len(subset.indices) // self.batch_size)
            with tqdm(batches(subset), f"fit, pass {turn + 1}", total, disable=not self.progress) as bar:
                for number, (x, y, weights) in enumerate(bar):
                    self.capture.batch = number
                    self._observe(looking, x, y, weights, turn, generator)
                    if not looking.parts:
                        break  # nothing to learn: the first batch was looked at for what `Capture` refuses
            (looking if turn else curvature).end(turn)  # those that look at nothing end with pass 0 too
        return curvature

    def _check(self, x: Any, y: Any, value: Measurement = "loss") -> None:
        """Refuses what `Forward.check` refuses, and random forward passes, on a few examples; once."""
        most = min(5, batch_length(x))
        for size in (most, max(1, most - 1)):  # the second where a layer sees as many positions as examples: which?
            rows = torch.arange(size)
            few = rows_of(x, rows)
            labels = labels_in(few, None if y is None else rows_of(y, rows))
            forward = self._forward(few)
            if not self.capture.ambiguous:
                break
        values = measured(value, self.loss, forward.outputs, labels, forward.n)
        if not self.allow_train_mode and any(module.training for module in self.model.modules()):
            again = measured(value, self.loss, self._forward(few).outputs, labels, forward.n)
            if not torch.allclose(again, values, rtol=1e-3, atol=1e-6):
                raise ValueError(
                    "Influence: the model is in train mode and two forward passes of one batch differ (dropout?); "
                    "call model.eval(), or pass allow_train_mode=True"
                )
        forward.check(values, mixing=not self.allow_train_mode)

    def _observe(
        self, curvature: NetworkCurvature, x: Any, y: Any, weights: Tensor, turn: int, generator: torch.Generator
    ) -> None:
        if not self.capture.checked:
            self._check(x, y)
        forward = self._forward(x)
        batch = labels_in(x, y)
        losses = per_sample(self.loss, forward.outputs, batch, forward.n)
        rest = dict(curvature.parts)
        for names, part in curvature.parts.items():
            if isinstance(part, Alone) and isinstance(part.estimator, ExactBlock) and self.loss == "cross_entropy":
                head = forward.head(names[0]) if part.fisher == "exact" else None
                if head is not None:
                    counted = labels_of(batch) != IGNORED
                    part.estimator.update(*head, weights=weights * counted)
                    del rest[names]
        for fisher in dict.fromkeys(part.fisher for part in rest.values()):
            mine = NetworkCurvature({names: part for names, part in rest.items() if part.fisher == fisher})
            if fisher == "empirical":
                found = iter([forward.gradients(losses, keep=True)])
            else:
                columns = output_columns(self.loss, forward.outputs, batch, forward.n, fisher, generator)
                found = (forward.gradients(scores, column, keep=True) for scores, column in columns)
            for column, gradients in enumerate(found):
                mine.observe(gradients, weights, column, turn)
                del gradients  # before those of the next column come

    # --------------------------------------------------------------------------------------------------------- scoring

    def _at_checkpoints(self) -> list[tuple[Mapping[str, Tensor] | None, NetworkCurvature]]:
        if not self._fitted:
            raise ValueError("Influence: not fitted; call fit(train) first")
        return list(zip(self.checkpoints or [None], self._fitted, strict=True))

    def _gradients(self, data: Any, name: str, value: Any = "loss") -> Iterator[tuple[int, int, dict[str, Gradients]]]:
        """First index, number of examples, and the gradients of every batch: of the loss or of a measurement."""
        start = 0
        with tqdm(as_loader(data, self.batch_size), name, disable=not self.progress) as batches:
            for number, (x, y) in enumerate(batches):
                self.capture.batch = number
                x, y = moved_to(x, self.device), moved_to(y, self.device)
                if not self.capture.checked:
                    self._check(x, y, value)
                forward = self._forward(x)
                n, values = forward.n, measured(value, self.loss, forward.outputs, labels_in(x, y), forward.n)
                gradients = forward.gradients(values)
                del forward, values  # and the graph with them
                yield start, n, gradients
                del gradients
                start += n
        if start == 0:
            raise ValueError("data holds no examples")

    def _query_blocks(
        self, query: Any, curvature: NetworkCurvature, groups: Tensor | None, rank: int | None, explicit: bool
    ) -> Iterator[tuple[int, dict[str, list[Directions]]]]:
        """The query side for as many queries at a time as `memory` holds, with the first query's index."""
        if groups is not None:
            yield 0, self._grouped_queries(query, curvature, groups)
            return
        whole = sum(block.size for block in self.capture.blocks.values()) * dtype_of(self.model).itemsize
        each = max(1, self.memory // (4 * whole))  # making them takes some copies
        first, held, used = 0, {name: [] for name in self.capture.blocks}, 0
        for start, n, gradients in self._gradients(query, "queries", self.measurement):
            for begin in range(0, n, each):
                part = {name: g.rows(begin, begin + each) for name, g in gradients.items()}
                made = self._directions(curvature, part, rank, explicit)
                size = sum(directions.nbytes for directions in made.values())
                del part
                if used and used + size > self.memory:
                    yield first, held
                    first, held, used = start + begin, {name: [] for name in self.capture.blocks}, 0
                for name, directions in made.items():
                    held[name].append(directions)
                used += size
        yield first, held

    def _directions(
        self, curvature: NetworkCurvature, gradients: Mapping[str, Gradients], rank: int | None, explicit: bool
    ) -> dict[str, Directions]:
        if rank is None and not explicit:
            return curvature.directions(gradients)
        solved = curvature.solve({name: g.formed() for name, g in gradients.items()})
        if rank is None:
            return {name: Explicit(matrices) for name, matrices in solved.items()}
        compressed = {name: LowRank.of(matrices, rank) for name, matrices in solved.items()}
        self.rank_error = max(self.rank_error, *(directions.error for directions in compressed.values()))
        return dict(compressed)

    def _grouped_queries(self, query: Any, curvature: NetworkCurvature, groups: Tensor) -> dict[str, list[Directions]]:
        number = int(groups.max()) + 1
        totals = {
            name: torch.zeros((number, *block.shape), device=self.device, dtype=dtype_of(self.model))
            for name, block in self.capture.blocks.items()
        }
        for start, n, gradients in self._gradients(query, "queries", self.measurement):
            here = groups[start : start + n].to(self.device)
            for group in here.unique().tolist():
                for name, g in gradients.items():
                    totals[name][group] += g.sum((here == group).to(self.device))
        return {name: [Explicit(solved)] for name, solved in curvature.solve(totals).items()}

    def _tiles(
        self,
        query: Any,
        train: Any,
        query_groups: Tensor | None = None,
        rank: int | None = None,
        by: str = "all",
    ) -> Generator[Tile]:
        """Rectangles of the scores: queries of a block × training examples of a batch."""
        if query_groups is not None:
            _check_groups("query_groups", query_groups, count(query, self.batch_size))
        if rank is not None and rank < 1:
            raise ValueError(f"scores: rank must be at least 1, got {rank}")
        self.rank_error = 0.0
        share = self._n * len(self._at_checkpoints())
        for checkpoint, curvature in self._at_checkpoints():
            with self._running(checkpoint):
                for first, held in self._query_blocks(query, curvature, query_groups, rank, by == "token"):
                    for start, _, gradients in self._gradients(train, "scores"):
                        parts = {}
                        for name, g in gradients.items():
                            dots = _by_position if by == "token" else _dots
                            parts[name] = torch.cat([dots(each, g) for each in held[name]]).div_(share).cpu()
                        if by == "token":
                            _check_positions({name: g.positions for name, g in gradients.items()})
                        del gradients  # before those of the next batch come
                        yield Tile(first, start, parts if by == "layer" else {"": _added(parts.values())})
                    held.clear()  # before the next queries are held

    def _assembled(
        self, tiles: Generator[Tile], query: Any, query_groups: Tensor | None, groups: Tensor | None, train: Any
    ) -> dict[str, Tensor]:
        rows = count(query, self.batch_size) if query_groups is None else int(query_groups.max()) + 1
        columns = n = count(train, self.batch_size)
        if groups is not None:
            _check_groups("groups", groups, n)
            columns = int(groups.max()) + 1
        out: dict[str, Tensor] = {}
        with closing(tiles):  # whatever happens, the model is released at once
            for tile in tiles:
                for key, values in tile.values.items():
                    if key not in out:
                        out[key] = values.new_zeros((rows, columns, *values.shape[2:]))
                    if out[key].shape[2:] != values.shape[2:]:
                        raise ValueError(
                            f"scores_by_token: batches must have one number of positions, got {out[key].shape[2]} and "
                            f"{values.shape[2]}; pad the examples to one length"
                        )
                    place = out[key][tile.query : tile.query + len(values)]
                    if groups is None:
                        place[:, tile.train : tile.train + values.shape[1]] += values
                    else:
                        place.index_add_(1, groups[tile.train : tile.train + values.shape[1]].cpu(), values)
        return out

    @contextmanager
    def _running(self, checkpoint: Mapping[str, Tensor] | None) -> Iterator[None]:
        """The model on the device, with a checkpoint's parameters and the capture's hooks; afterwards as it was."""
        if not self.allow_train_mode:
            for name, module in self.model.named_modules():
                acts = module.training and isinstance(module, _RANDOM_LAYERS) and getattr(module, "p", 1) > 0
                if acts:
                    raise ValueError(
                        f"Influence: {name!r} ({type(module).__name__}) is in train mode, so one example's loss is "
                        "random or depends on others; call model.eval(), or pass allow_train_mode=True"
                    )
        with ExitStack() as undo:
            if checkpoint is not None or self.allow_train_mode:  # BatchNorm in train mode writes its buffers
                before = {key: value.detach().clone() for key, value in self.model.state_dict().items()}
                undo.callback(self.model.load_state_dict, before)
            if checkpoint is not None:
                self.model.load_state_dict(checkpoint)
            undo.enter_context(placed(self.model, self.device, "Influence"))
            undo.enter_context(self.capture.attached())
            undo.enter_context(torch.autocast(self.device.type, enabled=False))
            yield

    def _forward(self, x: Any) -> Forward:
        """The one place where `autocast` acts: all else is computed in full."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return self.capture.forward(x)


class Tile(NamedTuple):
    """A rectangle of scores and where it stands."""

    query: int  # first row
    train: int  # first column
    values: dict[str, Tensor]  # "" or, by layer, its name: [rows, columns]


def _dots(directions: Directions, g: Gradients) -> Tensor:
    return directions.dots(g)


def _by_position(directions: Directions, g: Gradients) -> Tensor:
    assert isinstance(directions, Explicit)
    return g.by_position(directions.matrices)


def _added(parts: Any) -> Tensor:
    first, *rest = parts
    for part in rest:
        first += part
    return first


def _check_positions(positions: dict[str, int]) -> None:
    most = max(positions.values())
    for name, t in positions.items():
        if t != most:
            raise ValueError(
                f"scores_by_token: layer {name!r} has {t} positions where others have {most}; leave it out with layers="
            )


def _check_groups(what: str, groups: Tensor, n: int) -> None:
    if groups.dtype != torch.int64:
        raise TypeError(f"scores: {what} must be int64, got {groups.dtype}")
    if groups.shape != (n,) or (n and int(groups.min()) < 0):
        raise ValueError(
            f"scores: {what} must be [{n}] numbers >= 0, got shape {list(groups.shape)}, "
            f"the smallest {int(groups.min()) if groups.numel() else None}"
        )
