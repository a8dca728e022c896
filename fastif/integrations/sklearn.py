"""k-center as an estimator of scikit-learn, which selects rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin  # pyright: ignore[reportMissingImports]
from sklearn.utils import check_random_state  # pyright: ignore[reportMissingImports]
from sklearn.utils.validation import check_is_fitted, validate_data  # pyright: ignore[reportMissingImports]

from fastif.samplers.centres import Metric, k_center


class KCenterSelector(TransformerMixin, BaseEstimator, auto_wrap_output_keys=None):
    """Selects rows that leave no row far away: the farthest-first centres of `fastif.samplers.k_center`.

    It selects *examples*, not features: `transform` gives the selected rows of the data that it was fitted on, in the
    order of the picks, and is no step of a pipeline before an estimator that needs as many labels as rows; for those,
    y[selector.indices_].

    >>> selector = KCenterSelector(k=2, random_state=0).fit([[0.0], [0.5], [9.0], [10.0]])
    >>> selector.get_support()
    array([ True, False, False,  True])

    Args:
        k: how many rows, an integer >= 1, or their share in (0, 1), at least one row.
        metric: "euclidean" or "cosine".
        random_state: of the first pick: an integer, a numpy RandomState or None.

    Attributes:
        indices_: int64 [k], the rows, in the order of the picks.
        weights_: float64 [k], the share of rows that are nearest to each; their sum is 1.
        n_rows_in_: rows that `fit` saw.

    Raises ValueError for k outside of these bounds, and for data that scikit-learn's validation refuses.
    """

    def __init__(self, k: int | float = 0.1, *, metric: Metric = "euclidean", random_state: Any = None):
        self.k = k
        self.metric: Metric = metric
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> KCenterSelector:
        """Chooses rows of X [n, d]; y is not looked at."""
        del y
        rows = validate_data(self, X, dtype=[np.float64, np.float32])
        n = len(rows)
        share = isinstance(self.k, float) and 0 < self.k < 1
        if not share and not (
            isinstance(self.k, int | np.integer) and not isinstance(self.k, bool) and 1 <= self.k <= n
        ):
            raise ValueError(
                f"KCenterSelector: k must be an integer in [1, n={n}] or a share in (0, 1), got {self.k!r}"
            )
        start = int(check_random_state(self.random_state).randint(n))
        k = max(1, int(self.k * n)) if share else int(self.k)
        points = torch.from_numpy(np.array(rows))  # a copy: what came may not be written to
        subset = k_center(points, k, start=start, metric=self.metric, progress=False)
        self.indices_, self.weights_ = subset.indices.numpy(), subset.weights.numpy()
        self.n_rows_in_ = n
        return self

    def get_support(self, indices: bool = False) -> np.ndarray:
        """Which rows were selected: a mask [n], or with `indices` their places, ascending."""
        check_is_fitted(self)
        return np.sort(self.indices_) if indices else np.isin(np.arange(self.n_rows_in_), self.indices_)

    def transform(self, X: Any) -> np.ndarray:
        """The selected rows of X, which is the data of the fit, or belongs to it row by row."""
        check_is_fitted(self)
        rows: Any = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        if len(rows) != self.n_rows_in_:
            raise ValueError(f"KCenterSelector: transform takes the {self.n_rows_in_} rows of the fit, got {len(rows)}")
        return rows[self.indices_]
