"""farthest_first against the loops and packages that people run, and on the CPU against its own plain kernel.

One read of the points per pick is the floor of all of them but the lazy kernel: its share of that limit exceeds 100 %.

`make bench` runs a few sizes. `make bench-kcenter` (FASTIF_BENCH=all) runs all data, all peers and the growth of time
with n, d and k, keeps the figures in benchmarks/results/kcenter-cpu.json and draws docs/kcenter-growth.png from them.
Peers that are not installed are left out: pip install fpsample torch-quickfps; pip install --no-build-isolation
torch-cluster. FASTIF_DATA names the folder with CIFAR-10.
"""

from __future__ import annotations

import os
import time
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import DEVICE
from benchmarks.ops.cifar10_features import features as cifar10
from benchmarks.ops.kcenter_peers import ABSENT, BUCKETS, LOOPS, PEERS, SLOW, Peer, direct
from fastif.measure import Measure
from fastif.ops import farthest_first

N, D = 50_000, 512
PART, PART_PLAIN = 50, 250  # picks given to peers whose picks all cost the same and are too slow to wait for
EVERYTHING = pytest.mark.skipif(os.environ.get("FASTIF_BENCH") != "all", reason="FASTIF_BENCH=all runs it: long")
ON_CPU = pytest.mark.skipif(DEVICE.type != "cpu", reason="the peers are CPU programs")


def gaussian(n: int = N, d: int = D) -> Tensor:
    """Every point is far from every other: the hardest case."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


def features() -> Tensor:
    """Like the penultimate layer of a CNN: non-negative, sparse, of low effective rank, with some noise."""
    g = torch.Generator().manual_seed(0)
    signal = torch.randn(N, 32, generator=g) @ torch.randn(32, D, generator=g) / 32**0.5
    return signal.relu() + 0.05 * torch.randn(N, D, generator=g)


def mixture() -> Tensor:
    """100 Gaussian clusters of unequal size and width."""
    g = torch.Generator().manual_seed(0)
    component = torch.multinomial(1 / torch.arange(1.0, 101.0), N, replacement=True, generator=g)
    width = 0.2 + torch.rand(100, generator=g)
    return 2 * torch.randn(100, D, generator=g)[component] + width[component, None] * torch.randn(N, D, generator=g)


def plain(points: Tensor, k: int) -> Tensor:
    os.environ["FASTIF_KCENTER"] = "plain"
    try:
        return farthest_first(points, k).indices
    finally:
        del os.environ["FASTIF_KCENTER"]


def lazy(points: Tensor, k: int) -> Tensor:
    return farthest_first(points, k).indices


@pytest.fixture(autouse=True)
def no_kernel_is_forced(monkeypatch):
    monkeypatch.delenv("FASTIF_KCENTER", raising=False)


@pytest.mark.parametrize("k", [500, 2000])
@pytest.mark.parametrize("points", [gaussian, features], ids=["gaussian", "features"])
def test_farthest_first(race, points, k):
    points = points().to(DEVICE)
    picks = lazy(points, k)
    assert torch.equal(picks[:20].cpu(), direct(points.double(), 20))
    peers = {f"{name} ({PART} picks, scaled)": lambda peer=peer: peer(points, PART) for name, peer in LOOPS.items()}
    scale = dict.fromkeys(peers, k / PART)
    if DEVICE.type == "cpu":
        assert torch.equal(picks, plain(points, k))
        mine = f"fastif, plain kernel ({PART_PLAIN} picks, scaled)"
        peers, scale = {mine: lambda: plain(points, PART_PLAIN), **peers}, {mine: k / PART_PLAIN, **scale}
    race(lambda: lazy(points, k), peers, scale=scale, bytes_read=k * points.nbytes)


# ------------------------------------------------------------------------------------- everything: make bench-kcenter


class Turn(NamedTuple):
    contender: str
    run: Peer
    k: int
    timed: int  # picks that are timed: k, or fewer where k would take too long


def take_turns(points: Tensor, turns: list[Turn], rounds: int = 2) -> list[dict[str, Any]]:
    """The least cost of each in `rounds` rounds: wall-clock seconds, and processor seconds of all threads.

    Where not all k picks are timed, a quarter of them is as well, and the line through both is drawn on to k: what is
    spent once, before the first pick, is then counted once. agree: of the first picks, how many are those of float64.
    """
    parts = [sorted({turn.timed, turn.timed if turn.timed == turn.k else turn.timed // 4}) for turn in turns]
    want = direct(points.double(), 12)
    costs: list[list[Tensor]] = [[torch.full((2,), torch.inf)] * len(counts) for counts in parts]
    agree = [0] * len(turns)
    for _ in range(rounds):
        for t, (turn, counts) in enumerate(zip(turns, parts, strict=True)):
            for p, picks in enumerate(counts):
                wall, cpu = time.perf_counter(), time.process_time()
                made = turn.run(points, picks)
                seconds = torch.tensor([time.perf_counter() - wall, time.process_time() - cpu])
                costs[t][p] = torch.minimum(costs[t][p], seconds)
            agree[t] = int((made[: len(want)] == want).long().cumprod(0).sum())
    rows = []
    for turn, counts, own, same in zip(turns, parts, costs, agree, strict=True):
        total = own[-1]
        if len(counts) == 2:
            total = total + (own[1] - own[0]) / (counts[1] - counts[0]) * (turn.k - turn.timed)
        wall, cpu = total.tolist()
        row = {"contender": turn.contender, "k": turn.k, "timed": turn.timed, "wall": wall, "cpu": cpu, "agree": same}
        rows.append(row)
    return rows


DATA = {
    "gaussian": gaussian,
    "mixture": mixture,
    "cifar10-penultimate": lambda: cifar10().penultimate,
    "cifar10-patches": lambda: cifar10().patches,
    "gaussian-200k-64": lambda: gaussian(200_000, 64),
    "gaussian-20k-2048": lambda: gaussian(20_000, 2048),
}


@EVERYTHING
@ON_CPU
@pytest.mark.parametrize("data", DATA)
def test_kcenter(benchmark, capsys, data):
    if data.startswith("cifar10") and cifar10() is None:
        pytest.skip("FASTIF_DATA does not name the folder with CIFAR-10")
    points = DATA[data]()
    ks = (500, 2000, 5000)
    assert torch.equal(lazy(points, 300), plain(points, 300))
    with Measure() as measured:
        lazy(points, ks[-1])
    assert measured.peak_bytes is not None
    peak = measured.peak_bytes / points.nbytes
    turns = [Turn("fastif", lazy, k, k) for k in ks]
    turns += [Turn("fastif, plain kernel", plain, ks[-1], 80)]
    turns += [Turn(name, peer, ks[-1], 12 if name in SLOW else 60) for name, peer in PEERS.items()]
    rows = take_turns(points, turns)
    assert all(row["agree"] == 12 for row in rows[: len(ks) + 1])
    benchmark.pedantic(lambda: lazy(points, ks[0]), rounds=1)
    benchmark.extra_info.update(n=len(points), d=points.shape[1], rows=rows, peak_share_of_input=peak, absent=ABSENT)
    with capsys.disabled():
        print(f"\n{data} {list(points.shape)}: {peak:.2f} of the input besides it; absent: {ABSENT or 'none'}")
        for row in rows:
            print(f"  {row['wall']:9.3f} s  {row['cpu']:9.3f} cpu s  k={row['k']:5d}  {row['contender']}", end="")
            print(f"  (of the first 12 picks, {row['agree']} as in float64)")


GROWTH = {  # axis -> n, d and k, one of them a list
    "n": ((2_000, 6_000, 20_000, 60_000, 200_000), 128, 1000),
    "d": (20_000, (3, 8, 32, 128, 512, 2048), 1000),
    "k": (50_000, 128, (30, 100, 300, 1000, 3000, 10_000)),
}
GROWTH_PEERS = ("torch norm trick (inexact)", "anomalib's loop", "torch_cluster.fps", "torch-quickfps")
PATIENCE = 0.3  # seconds; what would take longer is given a part of the picks, 12 at least


@EVERYTHING
@ON_CPU
@pytest.mark.parametrize("axis", GROWTH)
def test_kcenter_growth(benchmark, capsys, axis):
    contenders = {
        "fastif": lazy,
        "fastif, plain kernel": plain,
        **{name: PEERS[name] for name in GROWTH_PEERS if name in PEERS},
        **BUCKETS,
    }
    rows = []
    which = "ndk".index(axis)
    for value in GROWTH[axis][which]:
        n, d, k = (*GROWTH[axis][:which], value, *GROWTH[axis][which + 1 :])
        points = gaussian(n, d)
        turns = []
        for name, contender in contenders.items():
            if name in BUCKETS and d > 8:
                continue
            tried = min(k, 12)
            before = time.process_time()
            contender(points, tried)
            affordable = int(PATIENCE * tried / (time.process_time() - before))
            timed = k if name == "fastif" else min(k, max(tried, affordable))
            turns.append(Turn(name, contender, k, timed))
        measured = take_turns(points, turns)
        assert measured[0]["agree"] == measured[1]["agree"] == 12
        rows += [{**row, "n": n, "d": d} for row in measured]
        with capsys.disabled():
            print(f"\nn={n} d={d} k={k}: " + ", ".join(f"{row['contender']} {row['cpu']:.3f}" for row in measured))
    benchmark.pedantic(lambda: lazy(points, 20), rounds=1)
    benchmark.extra_info.update(axis=axis, rows=rows, absent=[name for name in GROWTH_PEERS if name in ABSENT])
