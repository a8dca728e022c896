"""Do the error bars of scores over half networks hold? True rises without groups of examples, ±2 standard errors.

FASTIF_DATA=folder python -m benchmarks.experiments.calibration    # goes on where it was cut off
python -m benchmarks.figures.keep keep runs/calibration/results.json calibration

The standard error of a score is that of its mean over networks. What all networks have in common, such as what a second
order expansion leaves out, is not in it, and neither is the noise of the retraining that is the truth: the page shows
the share of true rises inside with and without the latter.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

import fastif
from benchmarks.experiments.lds_trainings import explained, works
from fastif import evaluation
from fastif.files import write_whole
from fastif.measure import environment

GROUPS = 20


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=os.environ.get("FASTIF_DATA"), help="folder with fashion_mnist")
    parser.add_argument("--n", type=int, default=1000, help="training examples")
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=6, help="retrainings without each group")
    parser.add_argument("--networks", type=int, nargs="+", default=[4, 10])
    parser.add_argument("--out", type=Path, default=Path("runs/calibration"))
    given = parser.parse_args(arguments)
    if given.root is None:
        parser.error("--root or FASTIF_DATA must name the folder with the data")
    groups = torch.randperm(given.n, generator=torch.Generator().manual_seed(5)) % GROUPS
    rows: list[dict[str, Any]] = []
    for name, work in works(given.root, given.n, given.queries).items():
        if work.epochs is None:
            continue
        members = [(groups == group).nonzero()[:, 0] for group in range(GROUPS)]
        left_out = evaluation.leave_group_out(
            work.train_fn, members, work.query, given.n, seeds=given.seeds, resume=True, progress=False,
            out=given.out / name.split(",")[0].lower(),
        )  # fmt: skip
        truth, noise = left_out.rises, left_out.errors  # [q, groups]
        assert noise is not None
        models, networks, logs = explained(work, given.n)
        for number in given.networks:
            influence = fastif.Influence(
                models[0], curvature=fastif.Automatic(logs[1].damping), networks=networks.first(number), progress=False
            )
            influence.fit(work.train)
            scores, errors = influence.scores(work.query, work.train, groups=groups, spread=True)
            away = (truth - scores.double()).abs()
            rows.append(
                {
                    "model": name,
                    "networks": number,
                    "inside": float((away <= 2 * errors).double().mean()),
                    "inside with noise": float((away <= 2 * (errors.double() ** 2 + noise**2).sqrt()).double().mean()),
                    "error": float(errors.median()),
                    "noise": float(noise.median()),
                    "rise": float(truth.abs().median()),
                    "slope": float((truth * scores).sum() / (scores.double() ** 2).sum()),
                }
            )
    sizes = {"n": given.n, "queries": given.queries, "seeds": given.seeds, "groups": GROUPS}
    results = {"meta": {**sizes, **environment(torch.device("cpu"))}, "rows": rows}
    given.out.mkdir(parents=True, exist_ok=True)
    write_whole(given.out / "results.json", json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    for row in main()["rows"]:
        print(row)
