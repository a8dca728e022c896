"""farthest_first against the loops that people write in torch: one read of the points per pick is their floor."""

import torch

from benchmarks.conftest import DEVICE
from fastif.ops import farthest_first

N, D, K = 50_000, 512, 500
PART = 50  # picks given to peers whose picks all cost the same and are too slow to wait for


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


def test_farthest_first(race):
    points = torch.randn(N, D, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    picks = farthest_first(points, K).indices.cpu()
    assert torch.equal(picks[:20], direct(points.double(), 20))
    race(
        lambda: farthest_first(points, K),
        {
            f"torch direct differences ({PART} picks, scaled)": lambda: direct(points, PART),
            f"torch.cdist without mm ({PART} picks, scaled)": lambda: by_cdist(points, PART),
            "torch norm trick (inexact)": lambda: norm_trick(points, K),
        },
        scale={
            f"torch direct differences ({PART} picks, scaled)": K / PART,
            f"torch.cdist without mm ({PART} picks, scaled)": K / PART,
        },
        bytes_read=K * points.nbytes,
    )
