"""Which scores predict retraining? LDS of fastif, kronfluence and dattri on the same networks.

FASTIF_DATA=folder python benchmarks/experiments/lds.py       # goes on where it was cut off
python -m benchmarks.figures.keep keep runs/lds/results.json lds

Every contender explains the same training recipe and is judged by the same retrainings: 100 halves of the data, and 50
sets that keep four fifths of it, which no choice in this project was ever made by. Leaving out single examples tells
scores from noise only where training ends at an optimum: for logistic regression.

Damping comes from the training (`TrainingDamping`, one row: nobody chose anything), or is each of three numbers, the
same for all, of which the table shows the best; the kept results show all. CPU seconds are those of one damping, peers'
own work included, without the training of the networks that are explained: one, five on all data, or some on halves.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import io
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import fastif
from fastif import evaluation, samplers
from fastif.evaluation.halves import draw_halves
from fastif.evaluation.training import train
from fastif.files import write_whole
from fastif.journal import Journal
from fastif.measure import environment

WEIGHT_DECAY = 1e-3  # of all trainings
DAMPINGS = (1e-3, 1e-2, 1e-1)


HALVES = 10  # networks on halves, at most
FULL = 5  # networks on all data, at most


class Work(NamedTuple):
    train_fn: Callable[[Tensor, int], nn.Module]
    train: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]
    seeds: int  # retrainings of each subset
    epochs: int | None  # of SGD; None: trained to the optimum


class Given(NamedTuple):
    """What a contender explains."""

    models: list[nn.Module]  # on all data; the first is the one to explain
    halves: fastif.Networks
    logs: list[fastif.TrainingLog]  # of the first model, and of those on halves; empty where training is no descent
    damping: float | fastif.TrainingDamping


# ----------------------------------------------------------------------------------------------------------- the models


def converged(kept: Tensor, seed: int, x: Tensor, y: Tensor) -> nn.Module:
    """Logistic regression at its optimum."""
    del seed
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 10))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        norm = sum(parameter.square().sum() for parameter in model.parameters())
        value = F.cross_entropy(model(x[kept]), y[kept]) + WEIGHT_DECAY / 2 * norm
        value.backward()
        return value

    optimizer.step(objective)
    return model


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)),
    )


LR, BATCH = 0.05, 64
EVERY = 4  # steps from one checkpoint of a log to the next


def descended(kept: Tensor, seed: int, x: Tensor, y: Tensor, build: Callable[[], nn.Module], epochs: int) -> nn.Module:
    """A network trained by SGD; torch's generator, from which `build` draws, is at `seed`."""
    how = dict(epochs=epochs, lr=LR, weight_decay=WEIGHT_DECAY, batch_size=BATCH, seed=seed, progress=False)
    return train(build(), x[kept], y[kept], **how)


def logged(work: Work, kept: Tensor, seed: int) -> tuple[nn.Module, fastif.TrainingLog]:
    """The network that `train_fn` trains, with a record of its training."""
    torch.manual_seed(seed)
    build = work.train_fn.keywords["build"]  # pyright: ignore[reportFunctionMemberAccess]
    model, (x, y) = build(), work.train
    log = fastif.TrainingLog(model, every=EVERY)
    how = dict(epochs=work.epochs, lr=LR, weight_decay=WEIGHT_DECAY, batch_size=BATCH, seed=seed, progress=False)
    train(model, x[kept], y[kept], **how, step=lambda optimizer, rows: log.step(optimizer, kept[rows]))
    return model, log


def explained(work: Work, n: int) -> tuple[list[nn.Module], fastif.Networks, list[fastif.TrainingLog]]:
    """The networks on all data, those on halves, and the logs of the first and of the halves."""
    models: list[nn.Module] = []
    for seed in range(FULL):
        torch.manual_seed(seed)
        models.append(work.train_fn(torch.arange(n), seed).eval())
    if work.epochs is None:
        return models, evaluation.train_halves(work.train_fn, n, HALVES // 2, progress=False), []
    model, first = logged(work, torch.arange(n), 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), models[0].parameters(), strict=True))
    logs = [logged(work, task.kept, task.seed)[1] for task in draw_halves(n, HALVES // 2, 0)]
    networks = fastif.Networks([log.parameters() for log in logs], [log.kept for log in logs], logs[0].training_time)
    return models, networks, [first, *logs]


def works(root: str, n: int, q: int) -> dict[str, Work]:
    digits, fashion = fastif.data.load("digits"), fastif.data.load("fashion-mnist", root)
    draw = torch.Generator().manual_seed(0)

    def parts(data: fastif.data.Data) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        some, asked = (torch.randperm(len(y), generator=draw)[:k] for y, k in ((data.y_train, n), (data.y_test, q)))
        return (data.x_train[some], data.y_train[some]), (data.x_test[asked], data.y_test[asked])

    a, b = parts(digits), parts(fashion)
    return {
        "logistic regression, digits": Work(partial(converged, x=a[0][0], y=a[0][1]), *a, 1, None),
        "MLP, Fashion-MNIST": Work(partial(descended, x=b[0][0], y=b[0][1], build=mlp, epochs=20), *b, 3, 20),
        "CNN, digits": Work(partial(descended, x=a[0][0], y=a[0][1], build=cnn, epochs=12), *a, 2, 12),
    }


# ---------------------------------------------------------------------------------------------------------- contenders

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


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=os.environ.get("FASTIF_DATA"), help="folder with fashion_mnist")
    parser.add_argument("--n", type=int, default=1000, help="training examples")
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--subsets", type=int, default=100)
    parser.add_argument("--fresh", type=int, default=50, help="sets that keep four fifths")
    parser.add_argument("--left-out", type=int, default=40)
    parser.add_argument("--models", nargs="+", help="parts of names of the models; default all")
    parser.add_argument("--contenders", nargs="+", help="parts of names of the contenders; default all")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/lds"))
    given = parser.parse_args(arguments)
    if given.root is None:
        parser.error("--root or FASTIF_DATA must name the folder with the data")
    # Not within the first one's time:
    for peer in ("kronfluence.analyzer", "dattri.algorithm.influence_function", "dattri.algorithm.trak"):
        with contextlib.suppress(ImportError):
            importlib.import_module(peer)
    given.out.mkdir(parents=True, exist_ok=True)
    sizes = {name: getattr(given, name) for name in ("n", "queries", "subsets", "fresh", "left_out")}
    settings = {**sizes, "models": given.models, "contenders": given.contenders}
    journal = Journal(given.out / "rows.jsonl", settings, resume=True)
    rows: list[dict[str, Any]] = [row for made in journal.of_kind("rows") for row in made]
    done = {(row["model"], row["contender"]) for row in rows}
    facts = {}
    for name, work in works(given.root, given.n, given.queries).items():
        if not _wanted(name, given.models):
            continue
        where = given.out / name.replace(", ", "-").replace(" ", "-").lower()
        judges = retrained(work, where, given)
        models, halves, logs = explained(work, given.n)
        of_all = of_halves = WEIGHT_DECAY
        if logs:
            of_all, of_halves = logs[0].damping, logs[1].damping
        facts[name] = {
            **sizes,
            "seeds": work.seeds,
            "parameters": sum(parameter.numel() for parameter in models[0].parameters()),
            "seconds_of_a_retraining": float(judges.halves.seconds.mean()),
            "accuracy": float((models[0](work.query[0]).argmax(1) == work.query[1]).double().mean()),
            "training_time": [log.training_time for log in logs[:2]] or None,
            "ceilings": [evaluation.ceiling(one) if work.seeds > 1 else None for one in judges[:2]],
        }
        wanted = {k: v for k, v in CONTENDERS.items() if _wanted(k, given.contenders) and (name, k) not in done}
        for contender, scores_of in tqdm(wanted.items(), name, leave=False):
            if "exact blocks of all" in contender and facts[name]["parameters"] > 5000:  # a block is its layer's square
                continue
            if contender in DESCENT and not logs:
                continue
            dampings = DAMPINGS[: 1 if contender == "fastif, no curvature" else None]
            if contender not in CHOSEN:
                dampings = (0.1,) if OF_MEAN in contender else (of_halves if "half network" in contender else of_all,)
            made: list[dict[str, Any]] = []
            for damping in dampings:
                scores, seconds = timed(partial(scores_of, work, Given(models, halves, logs, damping)))
                number = damping.constant if isinstance(damping, fastif.TrainingDamping) else damping
                row = {"model": name, "contender": contender, "damping": number, "cpu_seconds": seconds}
                made.append({**row, **judged(scores, judges)})
            journal.append("rows", made)
            rows += made
    rows.sort(key=lambda row: list(CONTENDERS).index(row["contender"]))
    results = {
        "meta": {"weight_decay": WEIGHT_DECAY, "models": facts, **environment(torch.device("cpu"))},
        "lds": json.loads(json.dumps(rows)),
    }
    write_whole(given.out / "results.json", json.dumps(results, indent=1))
    journal.finish()
    return results


class Judges(NamedTuple):
    """Retrainings that scores are held against."""

    halves: evaluation.Retrained
    fresh: evaluation.Retrained  # sets that keep four fifths, with seeds of their own
    left_out: evaluation.LeftOut | None  # single examples, where training ends at an optimum


def retrained(work: Work, where: Path, given: argparse.Namespace) -> Judges:
    how = dict(processes=given.processes, resume=True)
    halves = evaluation.random_subsets(given.n, given.subsets, 0.5)
    fresh = evaluation.random_subsets(given.n, given.fresh, 0.8, seed=17)
    own = range(1000, 1000 + work.seeds)
    left_out = None
    if work.epochs is None:
        some = torch.randperm(given.n, generator=torch.Generator().manual_seed(1))[: given.left_out]
        left_out = evaluation.leave_one_out(work.train_fn, some, work.query, given.n, out=where / "loo", **how)
    return Judges(
        evaluation.retrain(work.train_fn, halves, work.query, seeds=work.seeds, out=where / "lds", **how),
        evaluation.retrain(work.train_fn, fresh, work.query, seeds=own, out=where / "fresh", **how),
        left_out,
    )


def judged(scores: Tensor, judges: Judges) -> dict[str, Any]:
    if not scores.isfinite().all():  # dattri's LiSSA and CG can end so
        return {"lds": None, "fresh": None, "loo": None}
    lds, fresh = (evaluation.linear_datamodeling_score(scores, one).score._asdict() for one in judges[:2])
    loo = None if judges.left_out is None else evaluation.agreement(scores, judges.left_out).spearman._asdict()
    return {"lds": lds, "fresh": fresh, "loo": loo}


def timed(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Scores and CPU seconds; what peers print is kept from the screen."""
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            began = time.process_time()
            scores = work()
            return scores.detach(), time.process_time() - began
    finally:
        logging.disable(logging.NOTSET)


def _wanted(name: str, parts: list[str] | None) -> bool:
    return parts is None or any(part.lower() in name.lower() for part in parts)


if __name__ == "__main__":
    for row in main()["lds"]:
        lds, fresh = ("NaN" if row[key] is None else f"{row[key]['mean']:.3f}" for key in ("lds", "fresh"))
        found = f"LDS {lds}  fresh {fresh}  {row['cpu_seconds']:.2f} s"
        print(f"{row['model']:28} {row['contender']:70} {row['damping']:8.2g} {found}")
