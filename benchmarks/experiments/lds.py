"""Which scores predict retraining? LDS of fastif, kronfluence and dattri on the same networks.

FASTIF_DATA=folder python -m benchmarks.experiments.lds       # goes on where it was cut off
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
import importlib
import io
import json
import logging
import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import fastif
from benchmarks.experiments.lds_contenders import CHOSEN, CONTENDERS, DAMPINGS, DESCENT, OF_MEAN, Given
from benchmarks.experiments.lds_trainings import WEIGHT_DECAY, Work, explained, works
from fastif import evaluation
from fastif.files import write_whole
from fastif.journal import Journal
from fastif.measure import environment


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
