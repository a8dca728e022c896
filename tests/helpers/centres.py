"""Points and centres, and what k_center makes of them by hand."""

import numpy as np
import torch

from fastif.samplers import Subset


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lattice(n: int, d: int, seed: int) -> torch.Tensor:
    """Small integers: distances are exact, and ties and duplicates are frequent."""
    return torch.randint(-2, 3, (n, d), generator=seeded(seed)).float()


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(((x[:, None].astype(np.float64) - y[None].astype(np.float64)) ** 2).sum(2))


def by_hand(x, k: int | None, start: list[int], until: float = -1.0) -> list[int]:
    """The picks: the definition, one distance at a time."""
    x, picks = np.asarray(x), list(start)
    while len(picks) < (k or len(x)) and distances(x, x[picks]).min(1).max() > until:
        reach = [min(distances(x[i : i + 1], x[picks])[0]) if i not in picks else -1.0 for i in range(len(x))]
        picks.append(int(np.argmax(reach)))
    return picks


def nearest_by_hand(x, centres) -> list[int]:
    """For every row of x the position of its nearest centre, the earliest on ties."""
    return distances(np.asarray(x), np.asarray(centres)).argmin(1).tolist()


def radius(x, indices) -> float:
    x = np.asarray(x)
    return distances(x, x[np.asarray(indices)]).min(1).max()


def same(a: Subset, b: Subset) -> bool:
    return torch.equal(a.indices, b.indices) and torch.equal(a.weights, b.weights)
