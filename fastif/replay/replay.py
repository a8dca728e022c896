"""The training run backwards: the derivative of the queries' losses by the weight of every training example."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fastif.curvature.limits import MEMORY
from fastif.curvature.matrix_free.lissa import Diverged
from fastif.data.batches import Sharded, Walked, moved_to, rows_of, walked
from fastif.data.dealing import tell_data
from fastif.data.loaders import needs_all
from fastif.data.parts import Parts
from fastif.fingerprints import VERSIONS, fingerprint, told_function
from fastif.influence.averaging import average_rows
from fastif.influence.tiles import check_groups
from fastif.model.losses import Loss, Measurement, check_loss, check_measurement, loss_name
from fastif.progress import tqdm
from fastif.ranks import find_ranks, together
from fastif.renamed import warn_outside
from fastif.replay.agreement import check_logs, tell_log, tell_model
from fastif.replay.crossing import Sums
from fastif.replay.dealing import bring_together, cut, deal
from fastif.replay.log import Point, TrainingLog
from fastif.replay.network import Matrix
from fastif.replay.path import Path, Piece
from fastif.replay.schedule import Schedule
from fastif.sharded import refuse_sharded


class _Run(NamedTuple):
    path: Path
    schedule: Schedule


class Replay:
    """Scores from the training run itself, computed backwards step by step. docs/math.md (24).

    scores[q, t] is the predicted rise of query q's loss at the end of the training had example t not been in its
    batches, −Σ_steps (w_t/b) ⟨∇ℓ_t, c⟩: with matrix="hessian" the exact first-order answer for this run, with "ggn"
    that of a run whose Hessians are replaced by Gauss–Newton matrices, which is steadier where networks bend (ReLU) and
    for large removals. Every step takes one forward pass for all queries, and a Jacobian-vector and a vector-Jacobian
    product for each.

    With several logs, of networks that were trained on parts of the data (complementary halves are best), every
    network scores all examples: those that it did not see join its steps with weight zero, once an epoch. The
    networks' rows are scaled to one spread and averaged, so that differences in how far they were trained do not count.

    Args:
        logs: a `TrainingLog` or several; steps, rows and number of epochs may differ.
        model: a network of the architecture; it is left as it is. With one log, the one that was trained.
        train: the training data that the logs' rows are places in, in the same order: tensors or a data set whose
            examples can be had one by one.
        loss: as for `Influence`; that of the training, whose mean over a batch was descended.
        matrix: "ggn" or "hessian".
        crossed: with several logs, take an example's residual ∂ℓ/∂logits in the middle of each epoch as the half of its
            mean over networks that trained on it and of that over those that did not, a trapezoid rule for the removal;
            without it examples score several times less in networks that fitted them than in others. Examples that all
            networks trained on, or none, keep their own.
        measurement: what is asked of queries, as for `Influence`.
        memory: bytes for the path and the adjoints. Half of it is for states of the network: what lies between two
            checkpoints of the log is computed again, and where it does not fit in several stages (2√m states for m
            steps take one more). Half is for adjoints, two copies of each; queries that do not fit take further rounds.
            Results do not depend on it.
        batch_size: examples of `train` that go through the model at a time, at most, where the data has no batches of
            its own; default as many as a step has.
        queries_at_a_time: queries whose products are computed side by side; the intermediate results of a batch are
            held for each of them.
        max_growth: how many times larger than at the end an adjoint may become.
        seed: of the order in which examples that a network was not trained on join its steps.
        progress: show progress bars; of several ranks the first does.
        group: on several ranks (`torchrun`), the process group among whose ranks replays are divided; default all. Each
            takes whole networks, and runs of the queries of those that are not enough for all ranks; every rank gets
            the same result. docs/scale.md.

    Raises ValueError for logs, model and data that do not fit together. `NotReproduced`, a ValueError, where the first
    scores find that a log does not give the training's numbers again, with step and size; `Diverged`, likewise, where
    an adjoint grows beyond max_growth, with step and norm.
    """

    def __init__(
        self,
        logs: TrainingLog | Sequence[TrainingLog],
        model: nn.Module,
        train: Any,
        loss: Loss = "cross_entropy",
        *,
        matrix: Matrix = "ggn",
        crossed: bool = True,
        measurement: Measurement = "loss",
        memory: int = MEMORY,
        batch_size: int | None = None,
        queries_at_a_time: int = 64,
        max_growth: float = 1e6,
        seed: int = 0,
        progress: bool = True,
        group: Any = None,
    ):
        self.ranks = find_ranks(group)
        refuse_sharded(model, "Replay")
        logs = check_logs("Replay", logs, model)
        check_loss(loss)
        check_measurement(measurement, loss)
        if matrix not in get_args(Matrix):
            raise ValueError(f"Replay: matrix must be 'ggn' or 'hessian', got {matrix!r}")
        numbers = {"memory": memory, "batch_size": batch_size, "queries_at_a_time": queries_at_a_time}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise ValueError(f"Replay: {name} must be at least 1, got {value}")
        if not max_growth > 1:
            raise ValueError(f"Replay: max_growth must be > 1, got {max_growth}")
        largest = max(len(step.rows) for log in logs for step in log.steps)
        if isinstance(train, Sharded):
            raise ValueError(needs_all("Replay"))
        self.train = walked(train, largest if batch_size is None else batch_size)
        self.n = self.train.n
        if not self.train.indexable:
            raise ValueError("Replay: train must be data whose examples can be had one by one: tensors or a data set")
        last = max(int(step.rows.max()) for log in logs for step in log.steps)
        if last >= self.n:
            raise ValueError(f"Replay: the logs' rows must be in [0, n={self.n}), got {last}: other data?")
        self.model, self.crossed, self.memory = model, crossed, memory
        self.loss: Loss = loss
        self.matrix: Matrix = matrix
        self.measurement: Measurement = measurement
        self.max_growth, self.seed, self.progress = max_growth, seed, progress and self.ranks.rank == 0
        self.runs = [
            _Run(
                Path(log, model, loss, self.train, memory // 2, queries_at_a_time),
                Schedule(log.steps, self.n, seed, number),
            )
            for number, log in enumerate(logs)
        ]
        self.deviations: list[float] | None = None  # of each log's checkpoints, relative, when it was computed again
        # Of the last scores, by log: float64 [steps + 1], the largest over queries of the adjoint before each step.
        self.adjoint_norms: list[Tensor] = []
        self._residuals: tuple[Tensor, Tensor] | None = None  # by epoch and example, and which examples have them

    def __repr__(self) -> str:
        steps = sum(len(run.path.log.steps) for run in self.runs)
        again = (
            "not yet run again"
            if self.deviations is None
            else f"run again, checkpoints off by {max(self.deviations):.1e} at most"
        )
        logs = f"{len(self.runs)} log{'s' if len(self.runs) > 1 else ''} of {steps:,} steps"
        return (
            f"Replay({type(self.model).__name__}, loss={loss_name(self.loss)!r}, matrix={self.matrix!r}, {logs}, "
            f"n={self.n:,}, {again})"
        )

    # ---------------------------------------------------------------------------------------------------------- methods

    @together
    def scores(self, query: Any, train: Any = None, *, query_groups: Tensor | None = None) -> Tensor:
        """Predicted rise of every query's measurement if a training example were removed, [q, n], on the CPU.

        Args:
            query: data with labels.
            train: the data that the replay was made with, or nothing; other data is refused.
            query_groups: int64 [q]; rows are then groups of queries, whose measurements are summed, [groups, n].
        """
        query = self._begin("scores", query, train, query_groups)
        return torch.cat([rows for _, rows in self._rows(query, query_groups)])

    @together
    def top(self, query: Any, train: Any, k: int, *, largest: bool = True) -> tuple[Tensor, Tensor]:
        """The k training examples with the largest scores for each query: (values [q, k], indices int64 [q, k]).

        `largest=False` gives the most harmful, smallest first. Ties go to the lower index.
        """
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= self.n:
            raise ValueError(f"top: k must be an integer in [1, n={self.n}], got k={k}")
        query = self._begin("top", query, train, k=k, largest=largest)
        found = [rows.sort(dim=1, descending=largest, stable=True) for _, rows in self._rows(query, None)]
        return torch.cat([f.values[:, :k] for f in found]), torch.cat([f.indices[:, :k] for f in found])

    @together
    def self_influence(self, train: Any = None) -> Tensor:
        """scores[t, t] of every training example, [n]; each is a query, so it takes as long as the scores of n."""
        parts = []
        for first, rows in self._rows(self._begin("self_influence", self.train, train), None):
            places = torch.arange(len(rows))
            parts.append(rows[places, first + places])
        return torch.cat(parts)

    @together
    def verify(self) -> list[float]:
        """Computes the trainings again and holds them against the logs, once: the largest deviation of each.

        It is that of a checkpoint's parameters, relative to how far they moved since the one before. Scores do it
        first. Several ranks divide what lies between checkpoints. Raises `NotReproduced`.
        """
        self._compare("verify", {})
        return self._verified()

    # ---------------------------------------------------------------------------------------------------- before scores

    def _begin(self, op: str, query: Any, train: Any, query_groups: Tensor | None = None, **arguments: Any) -> Walked:
        """Looks at what a call was given, before any work, and at the logs, once; the queries as data."""
        data = {"query": walked(query, self.train.batch_size)}
        if train is not None and train is not self.train and not self.train.holds(train):
            data["train"] = walked(train, self.train.batch_size)
        arguments["query_groups"] = None if query_groups is None else fingerprint([query_groups])
        self._compare(op, arguments, **data)
        given = data.get("train")
        if given is not None and not torch.equal(given.identity.rows, self.train.identity.rows):
            raise ValueError("Replay: train must be the data that the replay was made with, got other examples")
        if query_groups is not None:
            check_groups("query_groups", query_groups, data["query"].n)
        self._verified()
        return data["query"]

    def _compare(self, op: str, arguments: dict[str, Any], **data: Walked) -> None:
        """Raises ValueError, on all ranks, where one of them has other logs, data or arguments than the first."""
        if self.ranks.world == 1:
            return
        told: dict[str, Any] = {
            **{f"version of {name}": version for name, version in VERSIONS.items()},
            "kind of device": self.runs[0].path.device.type,
            "number of threads": torch.get_num_threads(),
            "loss": told_function(self.loss),
            "measurement": told_function(self.measurement),
            **{name: getattr(self, name) for name in ("matrix", "crossed", "memory", "max_growth", "seed")},
            "batch_size": self.train.batch_size,
            "queries_at_a_time": self.runs[0].path.network.at_a_time,
            "model": tell_model(self.model),
            "number of logs": len(self.runs),
            **{f"log {number}": tell_log(run.path.log) for number, run in enumerate(self.runs)},
            **{f"{name}=": value for name, value in arguments.items()},
        }
        for name, value in {"the replay's train": self.train, **data}.items():
            if isinstance(value, Parts):
                raise ValueError(needs_all(f"{op}: {name}="))
            told.update({f"{part} of {name}=": what for part, what in tell_data(value, self.ranks).items()})
        self.ranks.compare(op, told)

    def _verified(self) -> list[float]:
        if self.deviations is not None:
            return self.deviations
        sums: Sums | None = None
        if self.crossed and len(self.runs) > 1:
            sums = Sums(self.n, [run.schedule.epochs for run in self.runs], self.memory, self.ranks)
        found: list[float] = []
        for first in range(0, len(self.runs), self.ranks.world):  # as many networks as ranks, and each a part of these
            runs = self.runs[first : first + self.ranks.world]
            own = [0.0] * len(runs)
            for number, places in cut([len(run.path.segments) for run in runs], self.ranks.rank, self.ranks.world):
                (path, schedule), network = runs[number], first + number
                steps = sum(len(path.segments[place]) for place in places)
                with self._running(path), self._bar(steps, f"training again{self._of(network)}") as bar:
                    look = partial(self._look_at, network, schedule.middles, sums, bar)
                    own[number] = path.verify(look, places)
            told = self.ranks.meet("how far the trainings are off", own)
            found.extend(max(off) for off in zip(*told, strict=True))
            if sums is not None:
                seen_by = [(first + number, run.schedule.present) for number, run in enumerate(runs)]
                sums.exchange(seen_by, runs[0].path.device)
        if sums is not None:
            self._residuals = sums.crossed()
        if self.matrix == "hessian":
            self._warn_of_kinks()
        self.deviations = found
        return found

    def _look_at(
        self, network: int, middles: dict[int, list[int]], sums: Sums | None, bar: tqdm, step: int, at: Tensor
    ) -> None:
        """In the middle of an epoch, adds the residuals of all examples."""
        bar.update()
        path, schedule = self.runs[network]
        for epoch in middles.get(step, []):
            if sums is None:
                return
            for piece in path.pieces(torch.arange(self.n), torch.ones(self.n)):
                sums.add(network, epoch, piece.rows, path.network.residuals(at, piece.x, piece.y), schedule.present)

    # --------------------------------------------------------------------------------------------------------- the work

    def _rows(self, query: Walked, query_groups: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        """Rows of the scores, as many at a time as memory holds adjoints of, and the first one's number."""
        total = query.n if query_groups is None else int(query_groups.max()) + 1
        each = min(self._queries_together(run.path) for run in self.runs)
        world, networks = self.ranks.world, len(self.runs)
        at_once = max(each, each * world // networks)  # queries, of which no rank has more than `each` of a network
        self.adjoint_norms = [torch.zeros(len(run.path) + 1, dtype=torch.float64) for run in self.runs]
        for first in range(0, total, at_once):
            stop = min(first + at_once, total)
            own: dict[int, tuple[int, Tensor]] = {}  # by network: scores of this rank, and the first one's number
            for network, queries in deal(networks, stop - first, self.ranks.rank, world):
                run, chosen = self.runs[network], first + torch.arange(queries.start, queries.stop)
                with self._running(run.path):
                    begun = self._query_gradients(run.path, query, chosen, query_groups)
                    own[network] = int(chosen[0]), self._backwards(network, run, begun)
            for begin in range(first, stop, each):
                found = bring_together(self.ranks, own, networks, begin, min(begin + each, stop))
                yield begin, found[0] if networks == 1 else average_rows(found)
        told = self.ranks.gather("norms of adjoints", dict(enumerate(self.adjoint_norms)), self.ranks.device)
        self.adjoint_norms = [torch.stack([norms[n].cpu() for norms in told]).amax(0) for n in range(networks)]

    def _queries_together(self, path: Path) -> int:
        return max(1, self.memory // 2 // (2 * path.state_bytes))

    def _query_gradients(self, path: Path, query: Any, chosen: Tensor, groups: Tensor | None) -> Tensor:
        """∇m at the end of the training, [queries or groups chosen, P]."""
        at = path.end.at
        out = at.new_zeros((len(chosen), len(at)))
        first = int(chosen[0])
        wanted = chosen if groups is None else torch.arange(len(groups))[torch.isin(groups, chosen)]
        if not len(wanted):  # groups without a query
            return out
        for (x, y), places in query.picked(wanted):
            x, y = moved_to(x, path.device), moved_to(y, path.device)
            for i, place in enumerate(wanted[places].tolist()):
                one = slice(i, i + 1)
                labels = None if y is None else rows_of(y, one)
                gradient = path.network.query_gradient(at, rows_of(x, one), labels, self.measurement)
                out[(place if groups is None else int(groups[place])) - first] += gradient
        return out

    def _backwards(self, network: int, run: _Run, begun: Tensor) -> Tensor:
        """One network's scores of as many queries as gradients were begun with, [q, n]."""
        path, schedule = run
        adjoints = (begun, *(torch.zeros_like(begun) for _ in path.log.rule.state))
        scores = begun.new_zeros((len(begun), self.n))
        start = self._note_norms(network, len(path), begun, None)
        with self._bar(len(path), f"backwards{self._of(network)}") as bar:
            for number, point in path.backwards():
                pieces = path.batch(number)
                gradient = path.gradient(point.at, pieces) if path.log.rule.needs_gradient else None
                c, adjoints = path.pull(adjoints, point, number, gradient)
                epoch = schedule.epoch_of[number]
                for piece in pieces:
                    self._take(path, point, piece, c, epoch, scores, adjoints[0])
                joining = schedule.joining[number]
                if len(joining):
                    share = schedule.rate / len(path.log.steps[number].rows)
                    for piece in path.pieces(joining, torch.full((len(joining),), share, dtype=torch.float64)):
                        self._take(path, point, piece, c, epoch, scores, None)
                self._note_norms(network, number, adjoints[0], start)
                bar.update()
        return scores.cpu()

    def _take(
        self, path: Path, point: Point, piece: Piece, c: Tensor, epoch: int, scores: Tensor, adjoint: Tensor | None
    ) -> None:
        """Adds what some examples of a step give: to their scores and, where they were trained on, to the adjoint."""
        weights = None if adjoint is None else piece.weights
        residuals = None
        if self._residuals is not None:
            values, known = self._residuals
            residuals = values[epoch, piece.rows]
            if not bool(known[piece.rows].all()):
                own = path.network.residuals(point.at, piece.x, piece.y)
                mask = known[piece.rows].to(own.device).view(-1, *(1,) * (own.dim() - 1))
                residuals = torch.where(mask, residuals.view_as(own), own)
        found = path.network.products(point.at, piece.x, piece.y, weights, self.matrix, c, residuals)
        scores.index_add_(1, piece.rows.to(scores.device), found.changes * -piece.weights)
        if adjoint is not None and found.curved is not None:
            adjoint += found.curved

    def _note_norms(self, network: int, place: int, adjoint: Tensor, start: Tensor | None) -> Tensor:
        """The norms [q] of the queries' adjoints, noted; raises `Diverged` where one outgrew what it was at the end."""
        norms = adjoint.norm(dim=1)
        if start is not None and not bool((norms <= self.max_growth * start).all()):
            worst = int((norms / start.clamp(min=1e-30)).nan_to_num(nan=math.inf).argmax())
            raise Diverged(
                f"Replay: before step {place}{self._of(network)} an adjoint's norm is {float(norms[worst]):.3g}, more "
                f"than max_growth={self.max_growth:g} times what it was at the end ({float(start[worst]):.3g}): the "
                "derivative of this training explodes and predicts nothing; matrix='ggn', a smaller learning rate or a "
                "smooth activation keep it bounded"
            )
        self.adjoint_norms[network][place] = max(float(self.adjoint_norms[network][place]), float(norms.max()))
        return norms

    def _warn_of_kinks(self) -> None:
        path = self.runs[0].path
        piece = path.batch(0)[0]
        with self._running(path):
            kinks = path.network.find_kinks(path.end.at, piece.x, piece.y)
        if kinks:
            warn_outside(
                f"Replay: the model bends sharply ({', '.join(kinks)}): matrix='hessian' is exact for an infinitesimal "
                "change of weights alone, a removal flips kinks that it does not see; matrix='ggn' serves such models",
                UserWarning,
            )

    def _running(self, path: Path) -> Any:
        return path.network.running(path.log.modes)

    def _of(self, network: int) -> str:
        return f", network {network + 1} of {len(self.runs)}" if len(self.runs) > 1 else ""

    def _bar(self, total: int, name: str) -> tqdm:
        return tqdm(total=total, desc=name, disable=not self.progress, leave=False)
