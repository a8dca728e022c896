"""The training run backwards: the derivative of the queries' losses by the weight of every training example."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor, nn

from fastif.curvature.limits import MEMORY
from fastif.data.batches import Sharded, Walked, walked
from fastif.data.dealing import tell_data
from fastif.data.loaders import needs_all
from fastif.data.parts import Parts
from fastif.fingerprints import fingerprint
from fastif.influence.averaging import average_rows, unit_of
from fastif.influence.tiles import check_certainty, check_groups
from fastif.model.losses import Loss, Measurement, check_loss, check_measurement, loss_name
from fastif.progress import tqdm
from fastif.ranks import find_ranks, together
from fastif.renamed import warn_outside
from fastif.replay.agreement import check_logs, tell_replay
from fastif.replay.backwards import Backwards
from fastif.replay.crossing import Sums
from fastif.replay.dealing import bring_together, cut, deal
from fastif.replay.log import TrainingLog
from fastif.replay.network import Matrix
from fastif.replay.path import Path
from fastif.replay.plans import ReplayPlan, make_plan
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

    @overload
    def scores(self, query: Any, train: Any = None, *, query_groups: Tensor | None = None) -> Tensor: ...
    @overload
    def scores(
        self, query: Any, train: Any = None, *, query_groups: Tensor | None = None, spread: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...
    @together
    def scores(
        self, query: Any, train: Any = None, *, query_groups: Tensor | None = None, spread: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predicted rise of every query's measurement if a training example were removed, [q, n], on the CPU.

        Args:
            query: data with labels.
            train: the data that the replay was made with, or nothing; other data is refused.
            query_groups: int64 [q]; rows are then groups of queries, whose measurements are summed, [groups, n].
            spread: with several logs, return (scores, standard errors) of the same shapes: how far the mean over the
                networks would move with others of the same recipe. At least two, or two pairs of halves. Crossed
                residuals are one for all networks: what chance did to these is not in it. docs/math.md (23).
        """
        unit = self._unit("scores", "spread=True", spread)
        query = self._begin("scores", query, train, query_groups, spread=spread)
        found = [*self._rows(query, query_groups, unit, spread)]
        values = torch.cat([rows for _, rows, _ in found])
        return (values, torch.cat([errors for *_, errors in found if errors is not None])) if spread else values

    @together
    def top(
        self, query: Any, train: Any, k: int, *, largest: bool = True, certainty: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The k training examples with the largest scores for each query: (values [q, k], indices int64 [q, k]).

        `largest=False` gives the most harmful, smallest first. Ties go to the lower index. With several logs,
        `certainty` ranks by score − certainty · standard error (largest=False: plus), and these are the values: what
        scores high with all networks comes before what scores high with some.
        """
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= self.n:
            raise ValueError(f"top: k must be an integer in [1, n={self.n}], got k={k}")
        check_certainty(certainty)
        unit = self._unit("top", "certainty", certainty > 0)
        query = self._begin("top", query, train, k=k, largest=largest, certainty=certainty)
        found = []
        for _, rows, errors in self._rows(query, None, unit, certainty > 0):
            values = rows if errors is None else rows - (certainty if largest else -certainty) * errors
            found.append(values.sort(dim=1, descending=largest, stable=True))
        return torch.cat([f.values[:, :k] for f in found]), torch.cat([f.indices[:, :k] for f in found])

    @overload
    def self_influence(self, train: Any = None) -> Tensor: ...
    @overload
    def self_influence(self, train: Any = None, *, spread: Literal[True]) -> tuple[Tensor, Tensor]: ...
    @together
    def self_influence(self, train: Any = None, *, spread: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """scores[t, t] of every training example, [n]; each is a query, so it takes as long as the scores of n.

        spread: with several logs, return (self-influence, standard errors), as for `scores`.
        """
        unit = self._unit("self_influence", "spread=True", spread)
        values, errors = list[Tensor](), list[Tensor]()
        for first, rows, off in self._rows(
            self._begin("self_influence", self.train, train, spread=spread), None, unit, spread
        ):
            places = torch.arange(len(rows))
            values.append(rows[places, first + places])
            if off is not None:
                errors.append(off[places, first + places])
        return (torch.cat(values), torch.cat(errors)) if spread else torch.cat(values)

    def plan(self, query: Any, *, query_groups: Tensor | None = None, ranks: int | None = None) -> ReplayPlan:
        """What scores(query) will hold, compute again and pass, before any of it; a batch goes through the model.

        Args:
            query: data; as many of it as there are count, not what they are.
            query_groups: as for `scores`.
            ranks: plan for so many ranks too (`ReplayPlan.ranks`). Nothing is sent for it.
        """
        if ranks is not None and (isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1):
            raise ValueError(f"plan: ranks must be an integer >= 1, got {ranks!r}")
        query = walked(query, self.train.batch_size)
        if query_groups is not None:
            check_groups("query_groups", query_groups, query.n)
        return make_plan(self, query.n if query_groups is None else int(query_groups.max()) + 1, ranks)

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

    def _unit(self, op: str, argument: str, asked: bool) -> int:
        """Networks of which a standard error takes one; raises ValueError where there are too few for it."""
        if asked and len(self.runs) == 1:
            raise ValueError(f"{op}: {argument} needs several logs, over whose networks scores spread")
        return unit_of([run.path.log.kept for run in self.runs], self.n, asked)

    def _compare(self, op: str, arguments: dict[str, Any], **data: Walked) -> None:
        """Raises ValueError, on all ranks, where one of them has other logs, data or arguments than the first."""
        if self.ranks.world == 1:
            return
        told = {
            **tell_replay(self, [run.path for run in self.runs]),
            **{f"{name}=": v for name, v in arguments.items()},
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

    def _rows(
        self, query: Walked, query_groups: Tensor | None, unit: int, spread: bool
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Rows of the scores, as many at a time as memory holds adjoints of: the first one's number, rows, errors."""
        total = query.n if query_groups is None else int(query_groups.max()) + 1
        world, networks = self.ranks.world, len(self.runs)
        each, at_once = self.queries_together(world)
        self.adjoint_norms = [torch.zeros(len(run.path) + 1, dtype=torch.float64) for run in self.runs]
        for first in range(0, total, at_once):
            stop = min(first + at_once, total)
            own: dict[int, tuple[int, Tensor]] = {}  # by network: scores of this rank, and the first one's number
            for network, queries in deal(networks, stop - first, self.ranks.rank, world):
                run, chosen = self.runs[network], first + torch.arange(queries.start, queries.stop)
                with self._running(run.path):
                    begun = run.path.query_gradients(query, chosen, query_groups, self.measurement)
                    with self._bar(len(run.path), f"backwards{self._of(network)}") as bar:
                        scores = self.backwards(network, self.adjoint_norms[network]).scores(begun, bar)
                    own[network] = int(chosen[0]), scores
            for begin in range(first, stop, each):
                found = bring_together(self.ranks, own, networks, begin, min(begin + each, stop))
                rows, errors = (found[0], None) if networks == 1 else average_rows(found, unit, spread)
                yield begin, rows, errors
        told = self.ranks.gather("norms of adjoints", dict(enumerate(self.adjoint_norms)), self.ranks.device)
        self.adjoint_norms = [torch.stack([norms[n].cpu() for norms in told]).amax(0) for n in range(networks)]

    def queries_together(self, world: int) -> tuple[int, int]:
        """Queries that a rank carries back through one network at a time, and those of a round of all ranks."""
        each = min(max(1, self.memory // 2 // (2 * run.path.state_bytes)) for run in self.runs)
        return each, max(each, each * world // len(self.runs))

    def backwards(self, network: int, norms: Tensor) -> Backwards:
        """One network's way back; `norms` takes those of its adjoints."""
        path, schedule = self.runs[network]
        residuals, growth = self._residuals, self.max_growth
        return Backwards(path, schedule, self.n, self.matrix, residuals, growth, norms, self._of(network))

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
