"""farthest_first against the loops that people write in torch, and on the CPU against its own plain kernel.

One read of the points per pick is the floor of all of them but the lazy kernel: its share of that limit exceeds 100 %.
"""

import pytest
import torch

from benchmarks.conftest import DEVICE
from fastif.ops import farthest_first

N, D = 50_000, 512
PART, PART_PLAIN = 50, 250  # picks given to peers whose picks all cost the same and are too slow to wait for


def direct(points: torch.Tensor, k: int) -> torch.Tensor:
    """Direct differences into one buffer."""
    best, difference = points.new_full((len(points),), torch.inf), torch.empty_like(points)
    picks = torch.zeros(k, dtype=torch.int64)
    for t in range(1, k):
        torch.sub(points, points[picks[t - 1]], out=difference)
        best = torch.minimum(best, difference.square_().sum(1))
        picks[t] = best.argmax()
    return picks


def by_cdist(points: torch.Tensor, k: int) -> torch.Tensor:
    """Direct differences fused by torch.cdist without its matrix product."""
    best = points.new_full((len(points),), torch.inf)
    picks = torch.zeros(k, dtype=torch.int64)
    for t in range(1, k):
        centre = points[picks[t - 1]][None]
        distances = torch.cdist(points, centre, compute_mode="donot_use_mm_for_euclid_dist")
        best = torch.minimum(best, distances[:, 0])
        picks[t] = best.argmax()
    return picks


def norm_trick(points: torch.Tensor, k: int) -> torch.Tensor:
    """|x|^2 - 2 x.c + |c|^2: one matrix-vector product per pick, inexact (it cancels)."""
    best, norms = points.new_full((len(points),), torch.inf), points.square().sum(1)
    picks = torch.zeros(k, dtype=torch.int64)
    for t in range(1, k):
        centre = points[picks[t - 1]]
        best = torch.minimum(best, torch.addmv(norms, points, centre, alpha=-2) + centre.square().sum())
        picks[t] = best.argmax()
    return picks


def gaussian() -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0))


def features() -> torch.Tensor:
    """Like the penultimate layer of a CNN: non-negative, sparse, of low effective rank, with some noise."""
    g = torch.Generator().manual_seed(0)
    signal = torch.randn(N, 32, generator=g) @ torch.randn(32, D, generator=g) / 32**0.5
    return signal.relu() + 0.05 * torch.randn(N, D, generator=g)


@pytest.mark.parametrize("k", [500, 2000])
@pytest.mark.parametrize("points", [gaussian, features], ids=["gaussian", "features"])
def test_farthest_first(race, points, k, monkeypatch):
    monkeypatch.delenv("FASTIF_KCENTER", raising=False)
    points = points().to(DEVICE)

    def plain(k: int):
        with monkeypatch.context() as patch:
            patch.setenv("FASTIF_KCENTER", "plain")
            return farthest_first(points, k)

    picks = farthest_first(points, k).indices
    assert torch.equal(picks[:20].cpu(), direct(points.double(), 20))
    peers = {
        f"torch direct differences ({PART} picks, scaled)": lambda: direct(points, PART),
        f"torch.cdist without mm ({PART} picks, scaled)": lambda: by_cdist(points, PART),
        f"torch norm trick (inexact; {PART} picks, scaled)": lambda: norm_trick(points, PART),
    }
    scale = dict.fromkeys(peers, k / PART)
    if DEVICE.type == "cpu":
        assert torch.equal(picks, plain(k).indices)
        mine = f"fastif, plain kernel ({PART_PLAIN} picks, scaled)"
        peers, scale = {mine: lambda: plain(PART_PLAIN), **peers}, {mine: k / PART_PLAIN, **scale}
    race(lambda: farthest_first(points, k), peers, scale=scale, bytes_read=k * points.nbytes)
