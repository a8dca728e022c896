"""Which scores predict retraining? LDS and leave-one-out of fastif, kronfluence and dattri on the same networks.

FASTIF_DATA=folder python benchmarks/experiments/lds.py       # goes on where it was cut off
python -m benchmarks.figures.keep keep runs/lds/results.json lds

Retraining takes a few CPU minutes, CG and LiSSA of all contenders about ten, everything else two.

Every contender explains the same network (seed 0, all data) and is judged by the same retrainings: 100 halves of the
data, and 40 single examples left out. Curvature is damped by each of three numbers, the same for all; the table shows
the best for each contender, the kept results show all. CPU seconds are those of one damping, peers' own work included.
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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import fastif
from fastif import evaluation, samplers
from fastif.evaluation.training import train
from fastif.files import write_whole
from fastif.journal import Journal
from fastif.measure import environment

WEIGHT_DECAY = 1e-3  # of all trainings
DAMPINGS = (1e-3, 1e-2, 1e-1)


class Work(NamedTuple):
    train_fn: Callable[[Tensor, int], nn.Module]
    train: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]
    seeds: int  # retrainings of each subset


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


def descended(kept: Tensor, seed: int, x: Tensor, y: Tensor, build: Callable[[], nn.Module], epochs: int) -> nn.Module:
    """A network trained by SGD; torch's generator, from which `build` draws, is at `seed`."""
    how = dict(epochs=epochs, lr=0.05, weight_decay=WEIGHT_DECAY, batch_size=64, seed=seed, progress=False)
    return train(build(), x[kept], y[kept], **how)


def works(root: str, n: int, q: int) -> dict[str, Work]:
    digits, fashion = fastif.data.load("digits"), fastif.data.load("fashion-mnist", root)
    draw = torch.Generator().manual_seed(0)

    def parts(data: fastif.data.Data) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        some, asked = (torch.randperm(len(y), generator=draw)[:k] for y, k in ((data.y_train, n), (data.y_test, q)))
        return (data.x_train[some], data.y_train[some]), (data.x_test[asked], data.y_test[asked])

    a, b = parts(digits), parts(fashion)
    return {
        "logistic regression, digits": Work(partial(converged, x=a[0][0], y=a[0][1]), *a, seeds=1),
        "MLP, Fashion-MNIST": Work(partial(descended, x=b[0][0], y=b[0][1], build=mlp, epochs=20), *b, seeds=3),
        "CNN, digits": Work(partial(descended, x=a[0][0], y=a[0][1], build=cnn, epochs=12), *a, seeds=2),
    }


# ---------------------------------------------------------------------------------------------------------- contenders

Contender = Callable[[Work, list[nn.Module], float], Tensor]  # networks, damping → scores [q, n]; the first is judged


def ours(
    work: Work,
    models: list[nn.Module],
    damping: float,
    make: Callable[..., Any],
    share: float | None = None,
    ensemble: bool = False,
    layers: str | None = "*",
) -> Tensor:
    model = models[0]
    subset = None
    if share is not None:
        _, logits, labels = fastif.extract(model, work.train, progress=False)
        draw = torch.Generator().manual_seed(0)
        subset = samplers.logit(logits, labels, round(share * len(labels)), generator=draw)
    checkpoints = [m.state_dict() for m in models] if ensemble else None
    curvature = make(damping, model) if make is mixed else make(damping)
    influence = fastif.Influence(
        model, curvature=curvature, layers=layers, checkpoints=checkpoints, progress=False, seed=0
    )
    return influence.fit(work.train, subset=subset).scores(work.query, work.train)


def kronfluence(work: Work, models: list[nn.Module], damping: float) -> Tensor:
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
            "lds", prepare_model(copy.deepcopy(models[0]), task), task, cpu=True, disable_tqdm=True, output_dir=folder
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
            score_args=ScoreArguments(damping_factor=damping),
        )
        return analyzer.load_pairwise_scores("s")["all_modules"].float() / n


def dattri(work: Work, models: list[nn.Module], damping: float, method: str) -> Tensor:
    """One batch of all examples, as dattri adds up the inverses of its batches' Hessians; ten queries at a time, as
    each takes the memory of a pass over all examples."""
    from dattri.algorithm.influence_function import IFAttributorCG, IFAttributorLiSSA
    from dattri.task import AttributionTask

    model, n = models[0], len(work.train[0])
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


def trak(work: Work, models: list[nn.Module], damping: float, ensemble: bool = False) -> Tensor:
    """TRAK as its authors use it: gradients of the log-odds, projected. Its scores are of the log-odds with an example
    in: removing it lowers them, and so raises the loss."""
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask

    model = models[0]
    shape = (-1, *work.train[0].shape[1:])

    def log_p(parameters, batch):
        inputs, label = batch
        return -F.cross_entropy(functional_call(model, parameters, inputs.reshape(shape)), label.reshape(-1))

    def log_odds(parameters, batch):
        logp = log_p(parameters, batch)
        return logp - torch.log1p(-torch.exp(logp).clamp(max=1 - 1e-6))

    def p(parameters, batch):
        return torch.exp(log_p(parameters, batch))

    states = [m.state_dict() for m in (models if ensemble else models[:1])]
    task = AttributionTask(loss_func=log_odds, model=model, checkpoints=states)
    attributor = TRAKAttributor(
        task, p, projector_kwargs={"proj_dim": 512, "proj_max_batch_size": 32, "proj_seed": 0}, regularization=damping
    )
    loaders = [DataLoader(TensorDataset(*data), batch_size=250) for data in (work.train, work.query)]
    attributor.cache(loaders[0])
    return attributor.attribute(loaders[1]).detach().T


def mixed(damping: float, model: nn.Module) -> dict[str, Any]:
    head, _ = fastif.find_head(model)
    return {head: fastif.ExactBlock(damping), "*": fastif.EKFAC(damping)}


EXACT = fastif.ExactBlock
EK = fastif.EKFAC
CONTENDERS: dict[str, Contender] = {
    "fastif, exact block of the head": partial(ours, make=EXACT, layers=None),
    "fastif, exact block of the head, mean over 5 networks": partial(ours, make=EXACT, layers=None, ensemble=True),
    "fastif, exact blocks of all layers": partial(ours, make=EXACT),
    "fastif, EK-FAC": partial(ours, make=EK),
    "fastif, EK-FAC from 10 % (logit)": partial(ours, make=EK, share=0.1),
    "fastif, EK-FAC, mean over 5 networks": partial(ours, make=EK, ensemble=True),
    "fastif, exact head, EK-FAC below": partial(ours, make=mixed),
    "fastif, exact head, EK-FAC below, mean over 5 networks": partial(ours, make=mixed, ensemble=True),
    "fastif, K-FAC": partial(ours, make=fastif.KFAC),
    "fastif, CG": partial(ours, make=partial(fastif.CG, tolerance=1e-3)),
    "fastif, LiSSA, 200 steps": partial(ours, make=partial(fastif.LiSSA, max_steps=200)),
    "fastif, diagonal": partial(ours, make=fastif.Diagonal),
    "fastif, no curvature": partial(ours, make=lambda damping: fastif.Identity()),
    "kronfluence, EK-FAC": kronfluence,
    "dattri, CG": partial(dattri, method="CG"),
    "dattri, LiSSA": partial(dattri, method="LiSSA"),
    "dattri, TRAK": trak,
    "dattri, TRAK of 5 networks": partial(trak, ensemble=True),
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=os.environ.get("FASTIF_DATA"), help="folder with fashion_mnist")
    parser.add_argument("--n", type=int, default=1000, help="training examples")
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--subsets", type=int, default=100)
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
    settings = {name: getattr(given, name) for name in ("n", "queries", "subsets", "left_out", "models", "contenders")}
    journal = Journal(given.out / "rows.jsonl", settings, resume=True)
    rows: list[dict[str, Any]] = [row for made in journal.of_kind("rows") for row in made]
    done = {(row["model"], row["contender"]) for row in rows}
    retraining = {}
    for name, work in works(given.root, given.n, given.queries).items():
        if not _wanted(name, given.models):
            continue
        where = given.out / name.replace(", ", "-").replace(" ", "-").lower()
        how = dict(seeds=work.seeds, processes=given.processes, resume=True)
        halves = evaluation.random_subsets(given.n, given.subsets, 0.5)
        retrained = evaluation.retrain(work.train_fn, halves, work.query, out=where / "lds", **how)
        some = torch.randperm(given.n, generator=torch.Generator().manual_seed(1))[: given.left_out]
        left_out = evaluation.leave_one_out(work.train_fn, some, work.query, given.n, out=where / "loo", **how)
        models = []
        for seed in range(5):
            torch.manual_seed(seed)
            models.append(work.train_fn(torch.arange(given.n), seed).eval())
        retraining[name] = {
            **{key: settings[key] for key in ("n", "queries", "subsets", "left_out")},
            "seeds": work.seeds,
            "parameters": sum(parameter.numel() for parameter in models[0].parameters()),
            "seconds_of_a_retraining": float(retrained.seconds.mean()),
            "accuracy": float((models[0](work.query[0]).argmax(1) == work.query[1]).double().mean()),
        }
        chosen = {k: v for k, v in CONTENDERS.items() if _wanted(k, given.contenders) and (name, k) not in done}
        if retraining[name]["parameters"] > 5000:  # a block is the square of its layer
            chosen.pop("fastif, exact blocks of all layers", None)
        for contender, scores_of in tqdm(chosen.items(), name, leave=False):
            made: list[dict[str, Any]] = []
            for damping in DAMPINGS[: 1 if contender == "fastif, no curvature" else None]:
                scores, seconds = timed(partial(scores_of, work, models, damping))
                row = {"model": name, "contender": contender, "damping": damping, "cpu_seconds": seconds}
                made.append({**row, **judged(scores, retrained, left_out)})
            journal.append("rows", made)
            rows += made
    rows.sort(key=lambda row: list(CONTENDERS).index(row["contender"]))
    results = {
        "meta": {"weight_decay": WEIGHT_DECAY, "models": retraining, **environment(torch.device("cpu"))},
        "lds": json.loads(json.dumps(rows)),
    }
    write_whole(given.out / "results.json", json.dumps(results, indent=1))
    journal.finish()
    return results


def judged(scores: Tensor, retrained: evaluation.Retrained, left_out: evaluation.LeftOut) -> dict[str, Any]:
    if not scores.isfinite().all():  # dattri's LiSSA and CG can end so
        return {"lds": None, "loo": None, "loo_pearson": None}
    lds = evaluation.linear_datamodeling_score(scores, retrained)
    loo = evaluation.agreement(scores, left_out)
    return {"lds": lds.score._asdict(), "loo": loo.spearman._asdict(), "loo_pearson": loo.pearson._asdict()}


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
        lds, loo = ("NaN" if row[key] is None else f"{row[key]['mean']:.3f}" for key in ("lds", "loo"))
        found = f"LDS {lds}  LOO {loo}  {row['cpu_seconds']:.2f} s"
        print(f"{row['model']:28} {row['contender']:38} {row['damping']:6} {found}")
