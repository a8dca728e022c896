"""An EK-FAC on 1, 2 and 4 ranks: the same answer, CPU seconds summed over the ranks, and the bytes that each sends.

Fits and scores the networks of `bench_influence` at FASTIF_BENCH_SCALE (default 0.2) of their examples, with ranks as
processes of one thread each and gloo between them. Before anything is kept, the scores have to be those of one process,
and the bytes sent those that `Influence.plan(ranks=)` foretold, within a tenth. Needs FASTIF_DATA, a folder with data.

`make bench-ranks` keeps the figures; docs/scale.md shows them.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("FASTIF_BENCH_SCALE", "0.2")

import torch
import torch.distributed as dist
import torch.multiprocessing

import fastif
from benchmarks.influence import bench_influence
from fastif.measure import environment

WORKS: dict[str, Callable[[], bench_influence.Work]] = {
    "mlp": bench_influence.mlp,
    "resnet9": bench_influence.resnet9,
    "gpt": bench_influence.gpt,
}
COPIES = ("mlp",)  # also fitted with replicate=True: of its layers, which have one position, copies turn queries faster
WORLDS = (1, 2, 4)
AGREE = 1e-4  # relative, in the Frobenius norm: float32 sums of other parts, through the eigenvectors of their moments


def work_on_rank(rank: int, world: int, folder: str, repeats: int, replicate: bool) -> None:
    """What one rank does: all is written into the folder."""
    torch.set_num_threads(1)
    if world > 1:
        store = dist.FileStore(f"{folder}/store-{world}", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(minutes=10))
    work: bench_influence.Work = torch.load(f"{folder}/work.pt", weights_only=False)
    rows: list[dict[str, Any]] = []
    scores = None
    few = 2 * world * work.batch
    for turn in range(repeats + 1):  # the first, on a few batches, warms up
        train = work.train if turn else (work.train[0][:few], work.train[1][:few])
        influence = fastif.Influence(
            work.model,
            work.loss,  # pyright: ignore[reportArgumentType]
            fastif.EKFAC(bench_influence.DAMPING, fisher="empirical"),
            layers=work.layers,
            batch_size=work.batch,
            progress=False,
            replicate=replicate,
        )
        ranks = influence.ranks
        plan = influence.plan(train, work.query, ranks=world).ranks[rank]
        marks = [(time.process_time(), time.perf_counter(), ranks.bytes_sent, ranks.bytes_received)]
        for step in (partial(influence.fit, train), partial(influence.scores, work.query, train)):
            scores = step()
            marks.append((time.process_time(), time.perf_counter(), ranks.bytes_sent, ranks.bytes_received))
        row: dict[str, Any] = {"planned": [plan.fit_sent, plan.fit_received, plan.score_sent, plan.score_received]}
        for name, before, after in zip(("fit", "scores"), marks, marks[1:], strict=False):
            cpu, wall, sent, received = (now - then for now, then in zip(after, before, strict=True))
            row[name] = {"cpu": cpu, "wall": wall, "sent": sent, "received": received}
        rows.append(row)
    Path(folder, f"rows-{world}-{rank}.json").write_text(json.dumps(rows[1:]))
    if rank == 0:
        torch.save(scores, f"{folder}/scores-{world}.pt")
    if world > 1:
        dist.destroy_process_group()


def measure(name: str, repeats: int, replicate: bool = False) -> list[dict[str, Any]]:
    torch.manual_seed(0)  # how near float32 eigenvectors come to those of one process depends on the network
    work, found = WORKS[name](), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(work, f"{folder}/work.pt")
        for world in WORLDS:
            torch.multiprocessing.spawn(work_on_rank, (world, folder, repeats, replicate), nprocs=world)
            want, got = (torch.load(f"{folder}/scores-{w}.pt") for w in (1, world))
            error = float((got - want).norm() / want.norm())
            assert error <= AGREE, f"{name}: scores of {world} ranks are off by {error:.2g}"
            by_rank = [json.loads(Path(folder, f"rows-{world}-{rank}.json").read_text()) for rank in range(world)]
            row: dict[str, Any] = {"model": name, "n": len(work.train[1]), "q": len(work.query[1]), "world": world}
            row |= {"batch": work.batch, "error": error, "replicate": replicate}
            for stage in ("fit", "scores"):
                times = [sum(rows[i][stage]["cpu"] for rows in by_rank) for i in range(repeats)]
                walls = [max(rows[i][stage]["wall"] for rows in by_rank) for i in range(repeats)]
                row[stage] = {"cpu_seconds": sorted(times)[repeats // 2], "wall_seconds": sorted(walls)[repeats // 2]}
            for place, (stage, way) in enumerate(
                [("fit", "sent"), ("fit", "received"), ("scores", "sent"), ("scores", "received")]
            ):
                planned = [rows[0]["planned"][place] for rows in by_rank]
                moved = [rows[0][stage][way] for rows in by_rank]
                row[stage] |= {way: max(moved), f"{way}_planned": max(planned)}
                for one, foretold in zip(moved, planned, strict=True):
                    assert abs(one - foretold) <= 0.1 * foretold, f"{name}: {way} {one} bytes, {foretold} planned"
            found.append(row)
            print(json.dumps(row), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ranks.json"))
    parser.add_argument("--models", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--repeats", type=int, default=1, help="the median of so many is kept")
    given = parser.parse_args()
    torch.set_num_threads(1)
    asked = [(name, copies) for name in given.models for copies in ((False, True) if name in COPIES else (False,))]
    rows = [row for name, copies in asked for row in measure(name, given.repeats, copies)]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"scale": bench_influence.SCALE, "repeats": given.repeats, **environment(torch.device("cpu"))}
    given.out.write_text(json.dumps({"ranks": rows, "environment": facts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
