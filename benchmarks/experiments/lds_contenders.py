"""The contenders of the table of rank correlations: fastif, kronfluence and dattri explain the same networks."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastif
from benchmarks.experiments.lds_trainings import FULL, HALVES, Work
from fastif import samplers

DAMPINGS = (1e-3, 1e-2, 1e-1)


class Given(NamedTuple):
    """What a contender explains."""

    models: list[nn.Module]  # on all data; the first is the one to explain
    halves: fastif.Networks
    logs: list[fastif.TrainingLog]  # of the first model, and of those on halves; empty where training is no descent
    damping: float | fastif.TrainingDamping


Contender = Callable[[Work, Given], Tensor]  # → scores [q, n]


def ours(
    work: Work,
    given: Given,
    make: Callable[..., Any],
    share: float | None = None,
    full: int = 1,
    halves: int = 0,
    layers: str | None = "*",
) -> Tensor:
    """`full` networks on all data, or `halves` networks on halves; curvature from a share of the data, by `logit`."""
    model = given.models[0]
    subset = None
    if share is not None:
        _, logits, labels = fastif.extract(model, work.train, progress=False)
        draw = torch.Generator().manual_seed(0)
        subset = samplers.logit(logits, labels, round(share * len(labels)), generator=draw)
    how: dict[str, Any] = {}
    if halves:
        how["networks"] = given.halves.first(halves)
    elif full > 1:
        how["checkpoints"] = [m.state_dict() for m in given.models[:full]]
    curvature = make(given.damping, model) if make is mixed else make(given.damping)
    influence = fastif.Influence(model, curvature=curvature, layers=layers, progress=False, seed=0, **how)
    return influence.fit(work.train, subset=subset).scores(work.query, work.train)


def indexed(work: Work, given: Given, share: float) -> Tensor:
    """From an index that keeps a share of the numbers of EK-FAC's training gradients."""
    influence = fastif.Influence(
        given.models[0], curvature=fastif.EKFAC(given.damping), layers="*", progress=False, seed=0
    )
    influence.fit(work.train)
    with tempfile.TemporaryDirectory() as folder:
        return fastif.Index.build(influence, work.train, folder, share=share).scores(work.query)


def replayed(
    work: Work, given: Given, halves: int, matrix: Literal["ggn", "hessian"] = "ggn", crossed: bool = True
) -> Tensor:
    """The training of the first network, or of some on halves, run backwards."""
    logs = given.logs[1 : halves + 1] or given.logs[:1]
    replay = fastif.Replay(logs, given.models[0], work.train, matrix=matrix, crossed=crossed, progress=False)
    return replay.scores(work.query, work.train)


def source(work: Work, given: Given, segments: int, halves: int = 0) -> Tensor:
    logs = given.logs[1 : halves + 1] or given.logs[:1]
    return fastif.Source(logs, given.models[0], work.train, segments=segments, progress=False).scores(work.query)


def kronfluence(work: Work, given: Given) -> Tensor:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Summed(Task):
        def compute_train_loss(self, batch, model, sample=False):
            logits = model(batch[0])
            labels = torch.multinomial(logits.detach().softmax(1), 1)[:, 0] if sample else batch[1]
            return F.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch, model):
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    torch.manual_seed(0)
    task, n = Summed(), len(work.train[0])
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "lds",
            prepare_model(copy.deepcopy(given.models[0]), task),
            task,
            cpu=True,
            disable_tqdm=True,
            output_dir=folder,
        )
        train_set, query_set = TensorDataset(*work.train), TensorDataset(*work.query)
        analyzer.fit_all_factors("f", train_set, per_device_batch_size=250, factor_args=FactorArguments("ekfac"))
        analyzer.compute_pairwise_scores(
            "s",
            "f",
            query_set,
            train_set,
            per_device_query_batch_size=len(work.query[0]),
            per_device_train_batch_size=250,
            score_args=ScoreArguments(damping_factor=given.damping),
        )
        return analyzer.load_pairwise_scores("s")["all_modules"].float() / n


def dattri(work: Work, given: Given, method: str) -> Tensor:
    """One batch of all examples, as dattri adds up the inverses of its batches' Hessians; ten queries at a time, as
    each takes the memory of a pass over all examples."""
    from dattri.algorithm.influence_function import IFAttributorCG, IFAttributorLiSSA
    from dattri.task import AttributionTask

    model, n, damping = copy.deepcopy(given.models[0]), len(work.train[0]), given.damping
    shape = (-1, *work.train[0].shape[1:])

    def loss(parameters, batch):
        inputs, label = batch
        return F.cross_entropy(functional_call(model, parameters, inputs.reshape(shape)), label.reshape(-1).long())

    torch.manual_seed(0)
    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    if method == "CG":
        attributor = IFAttributorCG(task, max_iter=30, regularization=damping)
    else:
        attributor = IFAttributorLiSSA(task, batch_size=50, recursion_depth=200, damping=damping, scaling=100.0)
    sizes = ((work.train, n), (work.query, 10))
    loaders = [DataLoader(TensorDataset(*data), batch_size=size) for data, size in sizes]
    attributor.cache(loaders[0])
    return attributor.attribute(*loaders).detach().T / n


def trak(work: Work, given: Given, networks: Literal["one", "full", "halves"] = "one") -> Tensor:
    """TRAK as its authors use it: gradients of the log-odds, projected. Its scores are of the log-odds with an example
    in: removing it lowers them, and so raises the loss."""
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask

    model = copy.deepcopy(given.models[0])  # it is left at the last checkpoint
    shape = (-1, *work.train[0].shape[1:])

    def log_p(parameters, batch):
        inputs, label = batch
        return -F.cross_entropy(functional_call(model, parameters, inputs.reshape(shape)), label.reshape(-1))

    def log_odds(parameters, batch):
        logp = log_p(parameters, batch)
        return logp - torch.log1p(-torch.exp(logp).clamp(max=1 - 1e-6))

    def p(parameters, batch):
        return torch.exp(log_p(parameters, batch))

    states = [m.state_dict() for m in given.models[: FULL if networks == "full" else 1]]
    if networks == "halves":
        states = list(given.halves.states)
    task = AttributionTask(loss_func=log_odds, model=model, checkpoints=states)
    attributor = TRAKAttributor(
        task,
        p,
        projector_kwargs={"proj_dim": 512, "proj_max_batch_size": 32, "proj_seed": 0},
        regularization=given.damping,
    )
    loaders = [DataLoader(TensorDataset(*data), batch_size=250) for data in (work.train, work.query)]
    attributor.cache(loaders[0])
    return attributor.attribute(loaders[1]).detach().T


def mixed(damping: Any, model: nn.Module) -> dict[str, Any]:
    head, _ = fastif.find_head(model)
    return {head: fastif.ExactBlock(damping), "*": fastif.EKFAC(damping)}


EXACT, EK, AUTO = fastif.ExactBlock, fastif.EKFAC, fastif.Automatic
HEAD = dict(make=EXACT, layers=None)
CHOSEN: dict[str, Contender] = {  # with each of DAMPINGS; the table shows the best
    "fastif, exact block of the head": partial(ours, **HEAD),
    "fastif, exact block of the head, mean over 5 networks": partial(ours, **HEAD, full=FULL),
    "fastif, exact blocks of all layers": partial(ours, make=EXACT),
    "fastif, EK-FAC": partial(ours, make=EK),
    "fastif, EK-FAC from 10 % (logit)": partial(ours, make=EK, share=0.1),
    "fastif, EK-FAC, mean over 5 networks": partial(ours, make=EK, full=FULL),
    "fastif, exact head, EK-FAC below": partial(ours, make=mixed),
    "fastif, exact head, EK-FAC below, mean over 5 networks": partial(ours, make=mixed, full=FULL),
    "fastif, Shampoo": partial(ours, make=fastif.Shampoo),
    "fastif, K-FAC": partial(ours, make=fastif.KFAC),
    "fastif, CG": partial(ours, make=partial(fastif.CG, tolerance=1e-3)),
    "fastif, LiSSA, 200 steps": partial(ours, make=partial(fastif.LiSSA, max_steps=200)),
    "fastif, diagonal": partial(ours, make=fastif.Diagonal),
    "fastif, no curvature": partial(ours, make=lambda damping: fastif.Identity()),
    "kronfluence, EK-FAC": kronfluence,
    "dattri, CG": partial(dattri, method="CG"),
    "dattri, LiSSA": partial(dattri, method="LiSSA"),
    "dattri, TRAK": trak,
    "dattri, TRAK of 5 networks": partial(trak, networks="full"),
    f"dattri, TRAK of {HALVES} half networks": partial(trak, networks="halves"),
}
RULED: dict[str, Contender] = {  # with damping from the training: nobody chose anything
    "fastif, exact block of the head": partial(ours, **HEAD),
    "fastif, exact blocks of all layers": partial(ours, make=EXACT),
    "fastif, EK-FAC": partial(ours, make=EK),
    **{f"fastif, EK-FAC, an index of {k} %": partial(indexed, share=k / 100) for k in (1, 4)},
    "fastif, Shampoo": partial(ours, make=fastif.Shampoo),
    "fastif, CG": partial(ours, make=partial(fastif.CG, tolerance=1e-3)),
    'fastif, "auto"': partial(ours, make=AUTO),
    'fastif, "auto" from 10 % (logit)': partial(ours, make=AUTO, share=0.1),
    **{
        f'fastif, "auto", {k} half network{"s"[: k > 1]}': partial(ours, make=AUTO, halves=k) for k in (1, 2, 4, HALVES)
    },
    f'fastif, "auto" from 10 % (logit), {HALVES} half networks': partial(ours, make=AUTO, share=0.1, halves=HALVES),
    f"fastif, exact block of the head, {HALVES} half networks": partial(ours, **HEAD, halves=HALVES),
}
TENTH: dict[str, Contender] = {  # damped by a tenth of each layer's mean eigenvalue, which asks for nothing
    "fastif, EK-FAC": partial(ours, make=lambda share: EK(fastif.RelativeDamping(share))),
    'fastif, "auto"': partial(ours, make=lambda share: AUTO(fastif.RelativeDamping(share))),
}
DESCENT: dict[str, Contender] = {  # for networks trained by SGD; they have no damping
    **{f"fastif, SOURCE, EK-FAC, {k} segment{'s' * (k > 1)}": partial(source, segments=k) for k in (1, 3, 6)},
    "fastif, replay": partial(replayed, halves=0),
    "fastif, replay, the Hessian": partial(replayed, halves=0, matrix="hessian"),
    **{f"fastif, replay, crossed over {k} half networks": partial(replayed, halves=k) for k in (4, 8, HALVES)},
    f"fastif, replay, {HALVES} half networks, not crossed": partial(replayed, halves=HALVES, crossed=False),
}
OF_MEAN = ", a tenth of the mean eigenvalue"
CONTENDERS = {
    **CHOSEN,
    **{f"{name}, damping from the training": scores_of for name, scores_of in RULED.items()},
    **{f"{name}{OF_MEAN}": scores_of for name, scores_of in TENTH.items()},
    **DESCENT,
}
