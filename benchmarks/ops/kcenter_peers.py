"""What people run for farthest-first: the loops of known projects, written anew after their published algorithms, and
the packages that are installed. Each is a function (points, k) -> picks that starts at row 0 and reads all coordinates.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Peer = Callable[[Tensor, int], Tensor]


def direct(points: Tensor, k: int) -> Tensor:
    """Direct differences into one buffer."""
    best, difference = points.new_full((len(points),), torch.inf), torch.empty_like(points)
    picks = torch.zeros(k, dtype=torch.int64)
    for t in range(1, k):
        torch.sub(points, points[picks[t - 1]], out=difference)
        best = torch.minimum(best, difference.square_().sum(1))
        picks[t] = best.argmax()
    return picks


def by_cdist(points: Tensor, k: int) -> Tensor:
    """Direct differences fused by torch.cdist without its matrix product."""
    best = points.new_full((len(points),), torch.inf)
    picks = torch.zeros(k, dtype=torch.int64)
    for t in range(1, k):
        centre = points[picks[t - 1]][None]
        distances = torch.cdist(points, centre, compute_mode="donot_use_mm_for_euclid_dist")
        best = torch.minimum(best, distances[:, 0])
        picks[t] = best.argmax()
    return picks


def norm_trick(points: Tensor, k: int) -> Tensor:
    """|x|^2 - 2 x.c + |c|^2: one matrix-vector product per pick, inexact (it cancels)."""
    best, norms = points.new_full((len(points),), torch.inf), points.square().sum(1)
    picks = torch.zeros(k, dtype=torch.int64)
    for t in range(1, k):
        centre = points[picks[t - 1]]
        best = torch.minimum(best, torch.addmv(norms, points, centre, alpha=-2) + centre.square().sum())
        picks[t] = best.argmax()
    return picks


def pairwise_loop(points: Tensor, k: int) -> Tensor:
    """anomalib's k-center greedy (PatchCore's memory bank), less its random projection."""
    best, picks = None, [0]
    while len(picks) < k:
        distance = F.pairwise_distance(points, points[picks[-1:]], p=2)[:, None]
        best = distance if best is None else torch.minimum(best, distance)
        picks.append(int(best.argmax()))
        best[picks[-1]] = 0
    return torch.tensor(picks)


def distance_table(points: Tensor, k: int) -> Tensor:
    """DeepCore's k-center greedy: a [k, n] table of distances, computed for the rows that are not picked yet."""

    def metric(x: Tensor, y: Tensor) -> Tensor:
        squares = x.square().sum(1)[:, None] + y.square().sum(1)[None]
        return torch.addmm(squares, x, y.T, alpha=-2).clamp_(min=1e-12).sqrt_()

    free = torch.ones(len(points), dtype=torch.bool)
    table = points.new_full((k, len(points)), -1.0)
    picks, best = [0], points.new_full((len(points),), torch.inf)
    for t in range(1, k):
        free[picks[-1]] = False
        best[picks[-1]] = -1
        table[t - 1, free] = metric(points[picks[-1:]], points[free])[0]
        best = torch.minimum(best, table[t - 1])
        picks.append(int(best.argmax()))
    return torch.tensor(picks)


def torch_cluster(points: Tensor, k: int) -> Tensor:
    from torch_cluster import fps  # pyright: ignore[reportMissingImports]

    return fps(points, None, ratio=(k - 0.5) / len(points), random_start=False)  # ceil(ratio n) picks


def fpsample(points: Tensor, k: int) -> Tensor:
    from fpsample import fps_sampling  # pyright: ignore[reportMissingImports]

    return torch.from_numpy(fps_sampling(points.numpy(), k, start_idx=0).astype("int64"))


def fpsample_buckets(points: Tensor, k: int) -> Tensor:
    """QuickFPS: a KD-tree of buckets, for point clouds of at most 8 coordinates. It does not begin with the start."""
    from fpsample import bucket_fps_kdline_sampling  # pyright: ignore[reportMissingImports]

    return torch.from_numpy(bucket_fps_kdline_sampling(points.numpy(), k, h=7, start_idx=0).astype("int64"))


def torch_quickfps(points: Tensor, k: int) -> Tensor:
    from torch_quickfps import sample_idx  # pyright: ignore[reportMissingImports]

    return sample_idx(points[None], k, start_idx=0)[0]


def kmeans_plusplus(points: Tensor, k: int) -> Tensor:
    """Another algorithm, for scale: seeds drawn in proportion to the squared distance, one trial each."""
    from sklearn.cluster import kmeans_plusplus as seeds

    return torch.from_numpy(seeds(points.numpy(), k, n_local_trials=1, random_state=0)[1])


LOOPS: dict[str, Peer] = {
    "torch direct differences": direct,
    "torch.cdist without mm": by_cdist,
    "torch norm trick (inexact)": norm_trick,
}
_OTHERS: dict[str, tuple[str | None, Peer]] = {  # name -> the module that it needs, the peer
    "anomalib's loop": (None, pairwise_loop),
    "DeepCore's loop": (None, distance_table),
    "torch_cluster.fps": ("torch_cluster", torch_cluster),
    "fpsample": ("fpsample", fpsample),
    "torch-quickfps": ("torch_quickfps", torch_quickfps),
    "scikit-learn k-means++": ("sklearn", kmeans_plusplus),
}
ABSENT = [name for name, (module, _) in _OTHERS.items() if module and importlib.util.find_spec(module) is None]
PEERS = LOOPS | {name: peer for name, (_, peer) in _OTHERS.items() if name not in ABSENT}
BUCKETS = {"fpsample, KD-tree of buckets": fpsample_buckets} if "fpsample" in PEERS else {}
SLOW = ("anomalib's loop", "DeepCore's loop")
