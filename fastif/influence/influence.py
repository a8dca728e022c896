"""Influence of training examples on a model's parameters and on its losses.

Sign and units, once for the whole library: scores are predicted RISES of a query's loss when a training example is
removed; positive means that the example helps the query. docs/math.md (1), (2).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, overload

import torch
from torch import Generator, Tensor, nn

from fastif.curvature.automatic import Automatic
from fastif.curvature.exact.block import ExactBlock
from fastif.curvature.limits import MEMORY
from fastif.curvature.protocol import Estimator
from fastif.data.batches import count, walked
from fastif.data.loaders import Sharded, needs_all
from fastif.influence.averaging import average_scores, average_self_influence, write_averaged_scores
from fastif.influence.coverage import (
    assign,
    check_default_head,
    cover_head,
    look_at,
    look_together,
    restore_coverage,
    warn_of_lost,
)
from fastif.influence.fitted import Fitted, Setup
from fastif.influence.fitting import fit
from fastif.influence.networks import Networks, check_networks
from fastif.influence.origin import check_picklable
from fastif.influence.parameters import move_parameters, solve
from fastif.influence.planning import Plan, make_plan
from fastif.influence.score_folder import ScoreFolder
from fastif.influence.score_job import write_scores
from fastif.influence.scoring import compute_scores, compute_self_influence, find_top
from fastif.influence.sharing import compare_setups
from fastif.influence.states import gather, load_fitted, state_of
from fastif.influence.tiles import By, best_of, check_certainty, check_k
from fastif.model.capture import Capture, LateLayer
from fastif.model.features import extract, find_head
from fastif.model.losses import Loss, Measurement, check_loss, check_measurement, loss_name
from fastif.model.passes import Passes
from fastif.ranks import Ranks, find_ranks, together
from fastif.renamed import rename_arguments, warn_renamed
from fastif.samplers.draw import Sampler, call_sampler, needs_pass
from fastif.samplers.subset import Subset, check_subset
from fastif.sharded import refuse_sharded


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
        loss: "cross_entropy", "causal_lm", "bce", "mse", or a function (outputs, batch) → [n]; see
            `fastif.model.losses`. The model was trained on its mean over the training examples.
        curvature: an estimator of single layers (`ExactBlock`, `KFAC`, `EKFAC`, `Diagonal`, `DataInf`, `Identity`) or
            of all together (`CG`, `LiSSA`, `Arnoldi`, `RandomProjection`, `ExactBlock` with joint=True), or a mapping
            from patterns of layer names to estimators, the first match counts. They are copied. "auto" is
            `Automatic()`: exact blocks where they fit `memory`, EK-FAC for the rest; of drawn labels where an example
            has several, as texts have. Default ExactBlock(), of the head.
        layers: which parameters may move (see `Capture`): "trained" (the default: those that require gradients, all
            where none does), "all", or names and patterns of layers, "!pattern" for what is left out. For a lone
            ExactBlock, which holds the square of what it covers, the default is the head: the last nn.Linear that is
            called and gives the logits (with joint=True all that is trained). `fit` looks at its first examples: what
            does not give autograd's gradients for each of them is read otherwise, or listed in `capture.skipped`, and
            a warning says so where it was trained.
        measurement: what is asked of queries: "loss", "margin", "log_odds", or a function (outputs, batch) → [q].
        checkpoints: state dicts; influence is averaged over the model at each of them. Default: the model as it is.
        networks: `fastif.Networks` trained on parts of the data; each has a curvature of its own, from what it was
            trained on, and its scores of a query are brought to the networks' median spread before they are averaged.
            `model` gives the architecture, and is what samplers are shown. docs/math.md (23).
        batch_size: for data that brings no batches of its own; results do not depend on it.
        memory: bytes that preconditioned query gradients may take at a time, and that a solve for the self-influence of
            several examples may. Queries of few positions stand in factors where their matrices would not fit; what
            does not fit then takes further passes over `train`. On a CPU a batch goes through the model a few examples
            at a time where their layers' inputs and outputs take more than a quarter of it (between 1 and 16 MiB).
        device: where to compute; default that of the model.
        autocast: run forward and backward passes under autocast of this 16-bit type, whatever surrounds the call; sums
            are float32 all the same. Default: not.
        allow_train_mode: run a model in train mode as it is.
        seed: of what is drawn: the labels of fisher="monte_carlo", the examples of a stochastic LiSSA, and those of a
            sampler that `fit` is given without a generator.
        progress: show progress bars; of several ranks the first does.
        group: on several ranks (`torchrun`), the process group among whose ranks passes over data are divided; default
            all that `torch.distributed` was started with. Every rank makes the same calls with the same model and data,
            and gets the same results; training data may come in parts (`fastif.sharded`), and the model sharded by
            torch's `fully_shard`. docs/scale.md.
        replicate: on several ranks, keep every layer's factors on each of them. Default: a layer's are kept by the one
            rank that solves with them, to which gradients travel; then a rank holds its share of the curvature, and
            queries are held as matrices. Small networks with many queries are quicker with True.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = "cross_entropy",
        curvature: Estimator | Mapping[str, Estimator] | Literal["auto"] | None = None,
        *,
        layers: str | Sequence[str] | None = None,
        measurement: Measurement = "loss",
        checkpoints: Sequence[Mapping[str, Tensor]] | None = None,
        networks: Networks | None = None,
        batch_size: int = 256,
        memory: int = MEMORY,
        device: torch.device | str | None = None,
        autocast: torch.dtype | None = None,
        allow_train_mode: bool = False,
        seed: int = 0,
        progress: bool = True,
        group: Any = None,
        replicate: bool = False,
    ):
        ranks = find_ranks(group)
        check_loss(loss)
        check_measurement(measurement, loss)
        if checkpoints is not None and not len(checkpoints):
            raise ValueError("Influence: checkpoints must not be empty")
        if networks is not None:
            check_networks(networks)
            if checkpoints is not None:
                raise ValueError("Influence: checkpoints= and networks= exclude each other")
            checkpoints = networks.states
        if memory < 1:
            raise ValueError(f"Influence: memory must be at least 1 byte, got {memory}")
        if curvature is None:
            curvature = ExactBlock()
        elif curvature == "auto":
            curvature = Automatic()
        alone = curvature if isinstance(curvature, Estimator) else None
        self._arguments: dict[str, Any] = {
            "layers": layers, "batch_size": batch_size, "device": device, "autocast": autocast,
            "allow_train_mode": allow_train_mode, "progress": progress, "replicate": replicate,
        }  # fmt: skip
        of_head = alone is not None and alone.prefers_head and not alone.joint and layers is None
        if of_head:
            layers = find_head(model, op="Influence")[0] or "*"
            check_default_head(model, layers)
        passes = Passes(
            model,
            loss,
            layers,
            batch_size=batch_size,
            memory=memory,
            device=device,
            autocast=autocast,
            allow_train_mode=allow_train_mode,
            progress=progress and ranks.rank == 0,
            ranks=ranks,
        )
        given = copy.deepcopy(dict(curvature) if isinstance(curvature, Mapping) else curvature)
        estimators = assign(passes.capture, given, memory)
        self.setup = Setup(
            passes, given, of_head, estimators, measurement, checkpoints, memory, seed, networks, ranks, replicate
        )
        self._fitted: Fitted | None = None
        self._warned = False  # of parameters that are not covered
        self.bound: float | None = None  # of the last fit's subset, where it has one
        self.low_rank_error = 0.0  # of the last scores with low_rank=

    def __repr__(self) -> str:
        loss, blocks = self.passes.loss, self.capture.blocks
        size = sum(math.prod(shape) for shape in self.capture.covered.values())
        state = "not fitted" if self._fitted is None else f"fitted on n={self._fitted.n:,}"
        return (
            f"Influence({type(self.model).__name__}, loss={loss_name(loss)!r}, curvature={self.setup.given!r}, "
            f"{size:,} parameters in {len(blocks)} blocks, {state})"
        )

    @property
    def model(self) -> nn.Module:
        return self.setup.model

    @property
    def passes(self) -> Passes:
        return self.setup.passes

    @property
    def capture(self) -> Capture:
        """What is covered of the model, and what is not."""
        return self.setup.capture

    @property
    def ranks(self) -> Ranks:
        """The processes among which passes over data are divided."""
        return self.setup.ranks

    @property
    def device(self) -> torch.device:
        return self.setup.device

    @property
    def fitted(self) -> Fitted:
        """What the last fit made, or the state that was loaded."""
        if self._fitted is None:
            raise ValueError("Influence: not fitted; call fit(train) first")
        return self._fitted

    def _ready(self) -> Fitted:
        """What was fitted, at the weights that the model still has."""
        self.fitted.check_weights()
        return self.fitted

    def _compare(self, op: str, **arguments: Any) -> None:
        """Has ranks compare what they were given, and the states that they loaded: each keeps its part of one."""
        compare_setups(self.setup, op, {"state": self.fitted.loaded, **arguments})

    @property
    def n(self) -> int:
        """Training examples of the fit; 0 before it."""
        return 0 if self._fitted is None else self._fitted.n

    @property
    def subset(self) -> Subset | None:
        """The subset of the last fit; a state does not hold it."""
        return None if self._fitted is None else self._fitted.subset

    @property
    def curvature(self) -> dict[str, Any]:
        """The fitted estimators by block (of the first checkpoint).

        Of one that another rank keeps, this one knows what it reports, such as `damping_used`; what else is asked of it
        raises ValueError, until `gather` has brought it here.
        """
        return self.fitted.curvatures[0].by_block

    @rename_arguments(rank="low_rank")
    def plan(
        self, train: Any, query: Any | None = None, *, low_rank: int | None = None, ranks: int | None = None
    ) -> Plan:
        """What will be covered, skipped, stored and computed; only a few examples go through the model.

        Args:
            query: where given, the plan holds the peak memory of scores(query, train, low_rank=low_rank)
                and of self_influence(train) too. For that, the first queries that are held at a time meet the first two
                batches of `train`, with a curvature that has the sizes of a fitted one; it takes as long as this part
                of `scores` does.
            low_rank: as for `scores`.
            ranks: plan for so many ranks too (`Plan.ranks`): by rank the examples, the layers that it owns, bytes held,
                sent and received, the peak and the operations. Nothing is sent for it. Of a sharded model it is the
                number of those that hold it, as by default; they call this together, each learns its own peak, in which
                the layers stand that torch has gathered, and `RankPlan.model_received` has what torch brings.
        """
        if ranks is not None and (isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1):
            raise ValueError(f"plan: ranks must be an integer >= 1, got {ranks!r}")
        if self.passes.sharding is None:
            refuse_sharded(self.model, "plan")
            return self._plan(train, query, low_rank, ranks)
        if ranks not in (None, self.ranks.world):
            raise ValueError(
                f"plan: the model is held in parts by {self.ranks.world} ranks, which can plan for themselves alone, "
                f"got ranks={ranks}"
            )
        with self.ranks.together("plan"):
            return self._plan(train, query, low_rank, self.ranks.world)

    def _plan(self, train: Any, query: Any | None, low_rank: int | None, ranks: int | None) -> Plan:
        if isinstance(train, Sharded):
            raise ValueError(needs_all("plan"))
        train = walked(train, self.passes.batch_size)
        every = torch.arange(train.n)
        self.setup = cover_head(self.setup, train, every)
        while True:
            try:
                with self.passes.running(None):
                    self.setup = look_at(self.setup, train, every)
                    return make_plan(self.setup, train, query, low_rank, ranks)
            except LateLayer as late:  # as in a fit
                self.capture.take_up(late.name)

    @together
    def fit(self, train: Any, subset: Any | Sampler | None = None, *, generator: Generator | None = None) -> Influence:
        """Builds the curvature at the model's parameters.

        Args:
            train: the data that the model was trained on, as `fastif.data.as_loader` takes it; its length is n of (2).
            subset: the examples of `train` that carry the curvature: anything with `indices` and `weights`, or a
                sampler with its k bound, such as `functools.partial(samplers.logit, k=500)`, which is drawn once, from
                the model as it is; where it takes features, logits or labels, `fastif.extract` brings them in a pass of
                its own. Default all, 1/n each. One of `samplers.certified` leaves its bound in `bound`: so far at most,
                in the spectral norm, the head's GGN is from that of all examples. docs/math.md (12).
            generator: for samplers that draw; default a new one with this Influence's `seed`.

        Raises ValueError for whatever `Capture` refuses: layers that are not called, examples that mix, parameters
        used behind a layer's back, NaN; NotPositiveDefinite, naming the layer, where damping does not suffice; and what
        a sampler, or `extract` for it, raises.
        """
        train, chosen = walked(train, self.passes.batch_size), None
        if subset is not None:
            if callable(subset):
                subset = self._call_sampler(subset, train, train.n, generator)
            chosen = check_subset(subset, train.n)
        self._fitted, self.bound = fit(self.setup, train, chosen), getattr(subset, "bound", None)
        self.setup = self._fitted.setup
        self._warned = self._warned or warn_of_lost(self.capture)
        return self

    def look_at(self, train: Any, indices: Tensor) -> None:
        """Has the first of the examples `indices` decide what is covered; the model is running."""
        self.setup = look_at(self.setup, train, indices)

    def _call_sampler(self, sampler: Sampler, train: Any, n: int, generator: Generator | None) -> Any:
        seen: dict[str, Tensor | None] = {}
        if needs_pass(sampler):
            batch_size, progress = self.passes.batch_size, self.passes.progress
            how: dict[str, Any] = dict(batch_size=batch_size, progress=progress, group=self.ranks.group)
            given = extract(self.model, train, device=self.device, **how)
            seen = given._asdict()
        if generator is None:
            generator = Generator().manual_seed(self.setup.seed)
        return call_sampler(sampler, n, seen, generator, "fit")

    @together
    def on_parameters(self, batch: Any) -> dict[str, Tensor]:
        """Σ_z I(z) = −(G + λI)⁻¹ Σ_z ∇ℓ(z) over the examples of `batch`: a dict keyed like the model's parameters.

        θ̂ + ε·I(z) approximates the optimum when z gains weight ε in the mean loss: removing z is ε = −1/n. Parameters
        that are not covered are absent: they are taken as fixed. With checkpoints, the mean over them.
        docs/math.md (1). Raises ValueError with networks, whose parameters have no mean.
        """
        (batch,) = self._ready().walk(batch)
        self._compare("on_parameters", **({} if isinstance(batch, Iterator) else {"batch": batch}))
        look_together(self.setup, batch)
        return move_parameters(self.fitted, batch)

    @together
    def solve(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(G + λI)⁻¹ v for a vector v in parameter space: as dicts keyed like the model's parameters.

        Parameters that are not covered may be absent and stay so. With checkpoints, the mean over them. Raises
        ValueError for a covered parameter that is missing or has another shape.
        """
        self._compare("solve", vectors=vectors)
        return solve(self._ready(), vectors)

    @overload
    def scores(
        self,
        query: Any,
        train: Any,
        *,
        by: Literal["all"] = "all",
        groups: Tensor | None = None,
        query_groups: Tensor | None = None,
        low_rank: int | None = None,
    ) -> Tensor: ...
    @overload
    def scores(self, query: Any, train: Any, *, by: Literal["layer"]) -> dict[str, Tensor]: ...
    @overload
    def scores(self, query: Any, train: Any, *, by: Literal["token"]) -> Tensor: ...
    @overload
    def scores(
        self,
        query: Any,
        train: Any,
        *,
        by: By = "all",
        query_groups: Tensor | None = None,
        low_rank: int | None = None,
        out: Path | str,
        resume: bool = False,
        key: str | None = None,
    ) -> ScoreFolder: ...
    @overload
    def scores(self, query: Any, train: Any, *, spread: Literal[True], **options: Any) -> tuple[Any, Any]: ...
    @rename_arguments(rank="low_rank")
    @together
    def scores(
        self,
        query: Any,
        train: Any,
        *,
        by: By = "all",
        groups: Tensor | None = None,
        query_groups: Tensor | None = None,
        low_rank: int | None = None,
        spread: bool = False,
        out: Path | str | None = None,
        resume: bool = False,
        key: str | None = None,
    ) -> Any:
        """scores[q, t] = (1/n) ∇m_qᵀ (G + λI)⁻¹ ∇ℓ_t, [q, n]: predicted rise of q's measurement if t is removed.

        With the measurement "loss", positive: t helps q. In units of the measurement; on the CPU. docs/math.md (2).

        Args:
            query, train: data with labels.
            by: "all": the scores, [q, n]; "layer": the part of every block in them, {block: [q, n]}; "token": the part
                of every position of the training examples, [q, n, t]. Parts add up to the scores.
            groups: int64 [n]; columns are then groups of training examples, scores of a group are summed, [q, groups].
            query_groups: int64 [q]; rows are then groups of queries, [groups, n].
            low_rank: keep only so many singular vectors of each query's preconditioned gradient (less memory, so fewer
                passes over `train` for many queries); the largest relative error is in `low_rank_error` afterwards.
            spread: with networks=, return (scores, standard errors) of the same shapes: how far the mean over the
                networks would move with others of the same recipe. At least two, or two pairs of halves.
            out: a folder for the scores; they are written block by block as they are computed and returned as a
                `ScoreFolder`, [q, n], [q, n, blocks] or [q, n, t], which reads them from there, also later and without
                the model. Not with groups=, whose sums are complete with the last training example only: add the
                columns of what was written.
            resume: go on with a job in `out` that was cut off, at whatever point: what is there is not computed again,
                and the scores end with the same bits. A folder of other settings is refused, each difference named.
                Settings are all that determines the scores: data, the model's state and code, functions with all that
                they read, the number of threads.
            key: with out=, a name of your own for what cannot be fingerprinted, of which an error tells; change it
                whenever that changes.

        Raises ValueError for groups=, query_groups= and low_rank= with parts of scores, and by token where a covered
        layer has other positions than the rest (a normalisation layer sums over them): leave it out with layers=.
        """
        if by not in get_args(By):
            raise ValueError(f"scores: by must be one of {', '.join(map(repr, get_args(By)))}, got {by!r}")
        for name, given in (("groups", groups), ("query_groups", query_groups), ("low_rank", low_rank)):
            if given is not None and by != "all":
                raise ValueError(f"scores: {name}= goes with by='all' alone, got by={by!r}")
        query, train = self._ready().walk(query, train)
        self._check_spread("scores", "spread=True", spread)
        asked = dict(by=by, groups=groups, query_groups=query_groups, low_rank=low_rank, out=out, key=key)
        self._compare("scores", query=query, train=train, **asked)
        look_together(self.setup, train, query)
        if out is None:
            for name, given in (("resume=True", resume), (f"key={key!r}", key is not None)):
                if given:
                    raise ValueError(f"scores: {name} needs out=, the folder of the job")
            of_what = query_groups, groups, low_rank, by
            if self.setup.kept is None:
                values, self.low_rank_error = compute_scores(self.fitted, query, train, *of_what)
                return values if by == "layer" else values[""]
            averaged = average_scores(self.fitted, query, train, *of_what, spread=spread)
            self.low_rank_error = averaged.low_rank_error
            found = [values if by == "layer" else values[""] for values in (averaged.values, averaged.errors) if values]
            return (found[0], found[1]) if spread else found[0]
        if groups is not None:
            raise ValueError("scores: out= and groups= exclude each other; sum the columns of what was written")
        how: dict[str, Any] = dict(query_groups=query_groups, low_rank=low_rank, by=by, key=key)
        errors = None
        if self.setup.kept is None:
            folder = write_scores(self.fitted, query, train, out, resume=resume, **how)
        else:
            folder, errors = write_averaged_scores(self.fitted, query, train, out, spread=spread, resume=resume, **how)
        self.low_rank_error = folder.low_rank_error
        return (folder, errors) if spread else folder

    def _check_spread(self, op: str, argument: str, asked: object) -> None:
        if asked and self.setup.kept is None:
            raise ValueError(f"{op}: {argument} needs networks=, over which scores spread")

    def scores_by_layer(self, query: Any, train: Any, **options: Any) -> Any:
        """The old name of `scores` with by="layer"."""
        warn_renamed("Influence.scores_by_layer", "Influence.scores(by='layer')")
        return self.scores(query, train, by="layer", **options)

    def scores_by_token(self, query: Any, train: Any, **options: Any) -> Any:
        """The old name of `scores` with by="token"."""
        warn_renamed("Influence.scores_by_token", "Influence.scores(by='token')")
        return self.scores(query, train, by="token", **options)

    @property
    def rank_error(self) -> float:
        """The old name of `low_rank_error`."""
        warn_renamed("Influence.rank_error", "Influence.low_rank_error")
        return self.low_rank_error

    @together
    def top(
        self, query: Any, train: Any, k: int, *, largest: bool = True, certainty: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The k training examples with the largest scores for each query: (values [q, k], indices int64 [q, k]).

        Largest first: the most helpful; `largest=False` gives the most harmful, smallest first. Ties go to the lower
        index. The score matrix [q, n] is not stored, unless there are several checkpoints or networks. With networks=,
        `certainty` ranks by score − certainty · standard error (largest=False: plus), and these are the values: what
        scores high with all networks comes before what scores high with some.
        """
        check_certainty(certainty)
        self._check_spread("top", "certainty", certainty)
        query, train = self._ready().walk(query, train)
        check_k(k, count(train, self.passes.batch_size))
        asked = dict(k=k, largest=largest, certainty=certainty)
        self._compare("top", query=query, train=train, **asked)
        look_together(self.setup, train, query)
        if self.setup.kept is None:
            return find_top(self.fitted, query, train, k, largest)
        spread = certainty > 0
        found = average_scores(self.fitted, query, train, None, None, None, "all", spread)
        values = found.values[""]
        if found.errors is not None:
            values = values - (certainty if largest else -certainty) * found.errors[""]
        return best_of(None, values, 0, k, largest)

    @overload
    def self_influence(self, train: Any) -> Tensor: ...
    @overload
    def self_influence(self, train: Any, *, spread: Literal[True]) -> tuple[Tensor, Tensor]: ...
    @together
    def self_influence(self, train: Any, *, spread: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """scores[t, t] of every training example, [n], never negative: how much its loss rests on it.

        spread: with networks=, return (self-influence, standard errors), as for `scores`.
        """
        self._check_spread("self_influence", "spread=True", spread)
        (train,) = self._ready().walk(train)
        self._compare("self_influence", train=train)
        look_together(self.setup, train)
        if self.setup.kept is None:
            return compute_self_influence(self.fitted, train)
        averaged = average_self_influence(self.fitted, train, spread)
        return (averaged.values[""], averaged.errors[""]) if averaged.errors is not None else averaged.values[""]

    @together
    def state_dict(self, *, rank: int | None = None) -> dict[str, Tensor]:
        """All that `fit` learned, as tensors: safetensors or torch.save keep it.

        `CG` and `LiSSA` learn nothing that could be kept: they have to be fitted again. Of several ranks all call it.

        Args:
            rank: the one that gets it, of several; the others get {}. Default all.
        """
        if rank is not None and not (isinstance(rank, int) and 0 <= rank < self.ranks.world):
            raise ValueError(f"state_dict: rank must be None or in [0, {self.ranks.world}), got {rank!r}")
        return state_of(self.fitted, rank)

    @together
    def gather(self) -> Influence:
        """Brings all that was fitted to every rank, as `replicate=True` would have kept it; returns itself.

        All ranks call it. After it each can work alone with what it has: pickle, look at `curvature`. An index does it
        by itself. Without ranks, and where everything is everywhere, nothing happens.
        """
        self._fitted = gather(self.fitted)
        return self

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Influence:
        """Takes what `state_dict` gave an Influence of the same model and arguments.

        Raises ValueError for a state of other blocks, weights, checkpoints or estimators (damping may differ), and
        of another loss: functions are told by what they do, read and close over. A state without its entry "fit" is not
        asked for that. Where a function cannot be told from another, a warning says so. Of several ranks each loads the
        same state and keeps its share.
        """
        described = state.get("blocks")
        if self._fitted is None and described is not None and not self.setup.describes(described):
            self.setup = restore_coverage(self.setup, described)
        self._fitted, self.bound = load_fitted(self.setup, state), None
        self.capture.fixed = True
        return self

    # --------------------------------------------------------------------------------------------------------- pickling

    def __getstate__(self) -> dict[str, Any]:
        """Arguments, model included, and what `state_dict` keeps; data are not. Raises PicklingError for functions and
        models that pickle cannot take, and ValueError where the weights changed since the fit. Ranks that keep the
        curvature for one another pickle, and copy, together."""
        kept = self._kept()
        for name in ("loss", "measurement", "curvature", "model"):
            check_picklable(f"Influence: {name}", kept["arguments"][name])
        return kept

    def _kept(self) -> dict[str, Any]:
        setup, fitted = self.setup, self._fitted
        refuse_sharded(setup.model, "Influence: a copy or a pickle (keep state_dict(), which another Influence loads)")
        if fitted is not None:
            fitted.check_weights()
        return {
            "arguments": {
                "model": setup.model, "loss": setup.passes.loss, "curvature": setup.given,
                "measurement": setup.measurement, "memory": setup.memory, "seed": setup.seed,
                "networks": setup.networks, "checkpoints": None if setup.networks else setup.checkpoints,
                **self._arguments,
            },
            "state": None if fitted is None else self.state_dict() if fitted.divided else fitted.state_dict(),
            "subset": self.subset,
            "bound": self.bound,
            "low_rank_error": self.low_rank_error,
            "warned": self._warned,
            "passes": setup.passes.seen,
        }  # fmt: skip

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.__init__(**kept["arguments"])
        self.passes.seen = kept["passes"]
        if kept["state"] is not None:
            self.load_state_dict(kept["state"])
            self._fitted = self.fitted._replace(subset=kept["subset"])
        self.bound, self.low_rank_error, self._warned = kept["bound"], kept["low_rank_error"], kept["warned"]

    def __deepcopy__(self, memo: dict[int, Any]) -> Influence:
        kept = copy.deepcopy(self._kept(), memo)
        kept["arguments"]["group"] = self.ranks.group  # processes cannot be copied; a file leaves them out
        made = object.__new__(type(self))
        made.__setstate__(kept)
        return made
