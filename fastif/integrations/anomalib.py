"""k-center in the place of anomalib's: change the import, keep the code. Nothing of anomalib is imported."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastif import ops


class KCenterGreedy:
    """The core set of anomalib's `KCenterGreedy` (PatchCore), with the same constructor and methods.

        from fastif.integrations.anomalib import KCenterGreedy  # was: anomalib.models.components.sampling

    Each pick is the point farthest from a point drawn at random (by torch's global generator, as there; it is not part
    of the core set) and from the picks before it. What differs: distances are those of the embedding itself, formed in
    float64, where anomalib's are of a sparse random projection of it; a point is never picked twice; and points that
    were selected before are taken as centres whatever the embedding's shape. docs/math.md (7), docs/kcenter.md.

    >>> embedding = torch.tensor([[0.0], [1.0], [5.0], [9.0]])
    >>> _ = torch.manual_seed(0)
    >>> KCenterGreedy(embedding, sampling_ratio=0.5).select_coreset_idxs()
    [3, 2]

    Args:
        embedding: [n, ...], float; taken as n rows.
        sampling_ratio: share of the rows that are picked, rounded down.

    Raises ValueError for NaN and Inf, and where fewer rows than are to be picked are not selected yet.
    """

    def __init__(self, embedding: Tensor, sampling_ratio: float):
        if not 0 <= sampling_ratio <= 1:
            raise ValueError(f"KCenterGreedy: sampling_ratio must be in [0, 1], got {sampling_ratio}")
        self.embedding = embedding
        self.coreset_size = int(embedding.shape[0] * sampling_ratio)
        self.features = embedding.reshape(embedding.shape[0], -1)
        self.min_distances: Tensor | None = None
        self.n_observations = embedding.shape[0]

    def reset_distances(self) -> None:
        """Forgets all centres."""
        self.min_distances = None

    def update_distances(self, cluster_centers: Sequence[int]) -> None:
        """Takes rows as further centres: `min_distances` [n, 1] are the distances to the nearest of all so far."""
        if len(cluster_centers):
            centres = self.features[list(cluster_centers)].double()
            distances = torch.stack([(self.features.double() - c).square().sum(1) for c in centres]).amin(0).sqrt()
            distances = distances.to(self.features.dtype)[:, None]
            known = self.min_distances
            self.min_distances = distances if known is None else torch.minimum(known, distances)

    def get_new_idx(self) -> int:
        """The row farthest from the centres. Raises TypeError where there are none."""
        if not isinstance(self.min_distances, Tensor):
            raise TypeError(f"self.min_distances must be of type Tensor. Got {type(self.min_distances)}")
        return int(self.min_distances.argmax())

    def select_coreset_idxs(self, selected_idxs: Sequence[int] | None = None) -> list[int]:
        """The rows of the core set, in the order of the picks; those selected before are centres and not picked.

        Afterwards `min_distances` are the distances to the nearest of all centres.
        """
        selected = [] if selected_idxs is None else list(selected_idxs)
        if self.coreset_size > self.n_observations - len(selected):
            raise ValueError(
                f"KCenterGreedy: sampling_ratio asks for {self.coreset_size} of {self.n_observations} rows, of which "
                f"{len(selected)} are selected already"
            )
        first = int(torch.randint(high=self.n_observations, size=(1,)).item())
        starts = selected if first in selected else [*selected, first]
        if self.coreset_size == 0:
            return []
        k = min(self.n_observations, len(starts) + self.coreset_size)
        centres = ops.farthest_first(self.features, k, torch.tensor(starts), progress=True)
        self.min_distances = centres.sq_dists.sqrt().to(self.features.dtype)[:, None]
        picked = centres.indices[len(starts) :].tolist()
        return picked if len(picked) == self.coreset_size else [*picked, first]  # all rows: the one drawn comes last

    def sample_coreset(self, selected_idxs: Sequence[int] | None = None) -> Tensor:
        """The core set's rows of the embedding."""
        return self.embedding[self.select_coreset_idxs(selected_idxs)]
