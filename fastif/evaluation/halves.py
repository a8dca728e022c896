"""Networks trained on complementary random halves of the data, for scores averaged over them. docs/math.md (23)."""

from __future__ import annotations

from pathlib import Path

import torch

from fastif.evaluation.network_files import packed, train_networks
from fastif.evaluation.trainings import Task, TrainFn, Trainings
from fastif.fingerprints import VERSIONS, described
from fastif.influence.networks import Networks
from fastif.influence.shared_folder import held
from fastif.ranks import find_ranks

_SEEDS = 1 << 30, 1 << 31  # of the networks: far from the small numbers that an evaluation's seeds are


def train_halves(
    train_fn: TrainFn,
    n: int,
    pairs: int = 5,
    *,
    seed: int = 0,
    training_time: float | None = None,
    processes: int = 1,
    threads: int = 1,
    out: str | Path | None = None,
    resume: bool = False,
    key: str | None = None,
    progress: bool = True,
) -> Networks:
    """Trains pairs of networks, one on a random half of the examples and one on the other: for `Influence(networks=)`.

    Halves and seeds of the networks are drawn from `seed`; those of the networks are at least 2^30, so that they are
    none of an evaluation's. More pairs begin with the same ones.

    Args:
        train_fn: (indices int64 ascending, seed) → the network trained on these examples alone, as for `retrain`, with
            all that is said there of seeds and processes.
        n: training examples, at least 2.
        pairs: of networks.
        training_time: τ of each training, if it is known (`fastif.training_time`): the networks carry it.
        processes, threads, key, progress: as for `retrain`.
        out: a folder that keeps each network in a safetensors file as soon as it is trained.
        resume: take from `out` what is there. Refused where n, the seed, train_fn, the number of threads or the
            versions of fastif, torch and Python are others; another number of pairs goes on.

    Raises ValueError for n < 2 and pairs < 1, for a network with a weight that is not finite, and for a file in `out`
    that has changed (`fastif.files.Damaged`, which names it).
    """
    for name, value, least in (("n", n, 2), ("pairs", pairs, 1), ("seed", seed, 0)):
        if type(value) is not int or value < least:
            raise ValueError(f"train_halves: {name} must be an integer >= {least}, got {value!r}")
    if training_time is not None and not 0 < training_time < float("inf"):
        raise ValueError(f"train_halves: training_time must be a number > 0, got {training_time!r}")
    if key is not None and out is None:
        raise ValueError(f"train_halves: key={key!r} needs out=, the folder of the job")
    trainings = Trainings("train_halves", train_fn, packed, processes, threads)
    trainings.check()
    tasks = draw_halves(n, pairs, seed)
    ranks = find_ranks()
    if out is None:
        with ranks.together("train_halves"):
            ranks.compare("train_halves", {"n": n, "pairs": pairs, "seed": seed, "threads": threads})
            states, _ = train_networks(trainings, tasks, "halves", progress)
    else:
        settings = {
            "train_fn": described(train_fn, "train_fn", key),
            "n": n,
            "seed": seed,
            "threads": threads,
            "key": key,
            **VERSIONS,
        }
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        with ranks.together("train_halves"), held(folder, ranks):
            ranks.compare("train_halves", settings)
            states, _ = train_networks(trainings, tasks, "halves", progress, folder, settings, resume)
    return Networks([states[task.number] for task in tasks], [task.kept for task in tasks], training_time)


def draw_halves(n: int, pairs: int, seed: int) -> list[Task]:
    """Two trainings for each pair, on halves that together are all n examples."""
    draw = torch.Generator().manual_seed(seed)
    tasks: list[Task] = []
    for _ in range(pairs):
        order = torch.randperm(n, generator=draw)
        seeds = torch.randint(*_SEEDS, (2,), generator=draw).tolist()
        for half, own in zip((order[: n // 2], order[n // 2 :]), seeds, strict=True):
            tasks.append(Task(len(tasks), half.sort().values, own))
    return tasks
