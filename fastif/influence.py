"""Influence of training examples on a model's parameters and on its losses.

Sign and units, once for the whole library: scores are predicted RISES of a query's loss when a training example is
removed; positive means that the example helps the query. docs/math.md (1), (2).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from fastif import ops
from fastif.curvature import ExactBlock
from fastif.curvature.exact_block import output_grads
from fastif.data import as_loader
from fastif.features import extract, find_head
from fastif.samplers import check_subset

_ROWS = 2048  # training examples per block of scores
_ENTRIES = 1 << 22  # of gradients that are formed at a time where they have to be


class Plan(NamedTuple):
    """What `fit` and `scores` will do, known before any work."""

    covered: dict[str, tuple[int, ...]]  # parameters that influence is computed for
    skipped: dict[str, tuple[int, ...]]  # parameters that it is not computed for: taken as fixed
    n: int  # training examples
    curvature_bytes: int  # the block in the head's dtype, its float64 factor and two copies on the way
    feature_bytes: int  # features and logits of all training examples
    flops: float  # of the block over all examples and its factor

    def __str__(self) -> str:
        def lines(parameters: dict[str, tuple[int, ...]]) -> str:
            return "\n".join(f"  {name} {list(shape)}" for name, shape in parameters.items()) or "  none"

        def count(parameters: dict[str, tuple[int, ...]]) -> int:
            return sum(math.prod(shape) for shape in parameters.values())

        return (
            f"covered: {count(self.covered):,} parameters\n{lines(self.covered)}\n"
            f"skipped (taken as fixed): {count(self.skipped):,} parameters\n{lines(self.skipped)}\n"
            f"{self.n:,} training examples; curvature {self.curvature_bytes / 2**20:.1f} MiB, "
            f"features {self.feature_bytes / 2**20:.1f} MiB, {self.flops / 1e9:.1f} GFLOP"
        )


class Influence:
    """Influence functions on the head (the final nn.Linear) of a classifier trained with softmax cross-entropy.

    >>> _ = torch.manual_seed(0)
    >>> model, x, y = nn.Linear(2, 3), torch.randn(8, 2), torch.arange(8) % 3
    >>> influence = Influence(model, curvature=ExactBlock(damping=1e-2), progress=False).fit((x, y))
    >>> influence.scores((x[:2], y[:2]), (x, y)).shape
    torch.Size([2, 8])

    Args:
        model: left as it is by every method.
        loss: "cross_entropy", the mean over the training examples.
        curvature: an `ExactBlock`, copied; default ExactBlock(damping=1e-3).
        head: name of the head; default the last nn.Linear.
        batch_size: for data that brings no batches of its own; results do not depend on it.
        device: where to compute; default that of the head.
        progress: show progress bars.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Literal["cross_entropy"] = "cross_entropy",
        curvature: ExactBlock | None = None,
        *,
        head: str | None = None,
        batch_size: int = 256,
        device: torch.device | str | None = None,
        progress: bool = True,
    ):
        if loss != "cross_entropy":
            raise ValueError(f"Influence: loss must be 'cross_entropy', got {loss!r}")
        self.model, self.batch_size, self.progress = model, batch_size, progress
        self.head_name, self._layer = find_head(model, head)
        if not isinstance(curvature, ExactBlock | None):
            raise TypeError(f"Influence: curvature must be an ExactBlock, got {curvature!r}")
        self.curvature = ExactBlock() if curvature is None else copy.deepcopy(curvature)
        self.device = self._layer.weight.device if device is None else torch.device(device)
        self._n = 0

    def plan(self, train: Any) -> Plan:
        """What will be covered, skipped, stored and computed for this training data; nothing is computed."""
        n = _count(train, self.batch_size)
        prefix = f"{self.head_name}." if self.head_name else ""
        named = self.model.named_parameters(remove_duplicate=False)  # tied parameters under each of their names
        shapes = {name: tuple(parameter.shape) for name, parameter in named}
        covered = {name: shape for name, shape in shapes.items() if name in (f"{prefix}weight", f"{prefix}bias")}
        c, d = self._layer.out_features, self._layer.in_features + (self._layer.bias is not None)
        size, item = c * d, self._layer.weight.element_size()
        return Plan(
            covered,
            {name: shape for name, shape in shapes.items() if name not in covered},
            n,
            size * size * (item + 24),
            n * (self._layer.in_features + c) * item,
            n * c * (c - 1) / 2 * d * (d + 1) + size**3 / 3,
        )

    def fit(self, train: Any, subset: Any | None = None) -> Influence:
        """Builds the curvature at the model's parameters.

        Args:
            train: the data that the model was trained on, as `fastif.data.as_loader` takes it; its length is n of (2).
            subset: the examples of `train` that carry the curvature, with weights; default all, 1/n each.
        """
        inputs, logits, labels = self._extract(train, need_labels=self.curvature.matrix == "empirical_fisher")
        n, weights = len(inputs), None
        if subset is not None:
            picks = check_subset(subset, n)
            rows = picks.indices.to(self.device)
            inputs, logits, labels = inputs[rows], logits[rows], None if labels is None else labels[rows]
            weights = picks.weights.to(inputs)
        self._n = 0  # until all has gone well
        self.curvature.fit(inputs, logits, labels, weights)
        _ = self.curvature.factor  # a block without a factor is reported here, not at the first question
        self._n = n
        return self

    def on_parameters(self, batch: Any) -> dict[str, Tensor]:
        """Σ_z I(z) = −(G + λI)⁻¹ Σ_z ∇ℓ(z) over the examples of `batch`: a dict keyed like the model's state_dict.

        θ̂ + ε·I(z) approximates the optimum when z gains weight ε in the mean loss: removing z is ε = −1/n.
        docs/math.md (1).
        """
        inputs, output_grads_ = self._gradients(batch)
        total = ops.per_sample_grad.accumulate(inputs, output_grads_)[0]
        change = -self.curvature.solve(total)
        prefix = f"{self.head_name}." if self.head_name else ""
        if self._layer.bias is None:
            return {f"{prefix}weight": change}
        return {f"{prefix}weight": change[:, :-1].contiguous(), f"{prefix}bias": change[:, -1].contiguous()}

    def scores(self, query: Any, train: Any) -> Tensor:
        """scores[q, t] = (1/n) ∇ℓ_qᵀ (G + λI)⁻¹ ∇ℓ_t, [q, n]: predicted rise of q's loss if t is removed.

        Positive: t helps q. In units of the query's loss; on the CPU. docs/math.md (2).
        """
        return torch.cat(list(self._score_blocks(query, train)), 1)

    def top(self, query: Any, train: Any, k: int, *, largest: bool = True) -> tuple[Tensor, Tensor]:
        """The k training examples with the largest scores for each query: (values [q, k], indices int64 [q, k]).

        Largest first: the most helpful; `largest=False` gives the most harmful, smallest first. Ties go to the lower
        index. The score matrix [q, n] is never stored.
        """
        n = _count(train, self.batch_size)
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= n:
            raise ValueError(f"top: k must be an integer in [1, n={n}], got k={k}")
        values, indices, start = None, None, 0
        for block in self._score_blocks(query, train):
            here = torch.arange(start, start + block.shape[1]).expand_as(block)
            start += block.shape[1]
            values = block if values is None else torch.cat([values, block], 1)
            indices = here if indices is None else torch.cat([indices, here], 1)
            order = values.argsort(dim=1, descending=largest, stable=True)[:, :k]
            values, indices = values.gather(1, order), indices.gather(1, order)
        assert values is not None
        assert indices is not None
        return values, indices

    def self_influence(self, train: Any) -> Tensor:
        """scores[t, t] of every training example, [n], never negative: how much its loss rests on it."""
        inputs, grads = self._gradients(train)
        parts = []
        rows = max(1, _ENTRIES // (grads.shape[1] * inputs.shape[1]))
        blocks = zip(inputs.split(rows), grads.split(rows), strict=True)
        for a, u in self._progress(blocks, math.ceil(len(inputs) / rows), "self-influence"):
            parts.append(self.curvature.sq_norms(u[:, :, None] * a[:, None, :]).cpu())
        return torch.cat(parts) / self._n

    def _score_blocks(self, query: Any, train: Any) -> Iterator[Tensor]:
        """Columns of the scores, _ROWS training examples at a time: [q, <= _ROWS] on the CPU."""
        query_inputs, query_grads = self._gradients(query)
        directions = self.curvature.solve(query_grads[:, :, None] * query_inputs[:, None, :])  # [q, c, d]
        inputs, grads = self._gradients(train)
        blocks = zip(inputs.split(_ROWS), grads.split(_ROWS), strict=True)
        for a, u in self._progress(blocks, math.ceil(len(inputs) / _ROWS), "scores"):
            yield ops.per_sample_grad.dots(a, u, directions).div_(self._n).cpu()

    def _gradients(self, data: Any) -> tuple[Tensor, Tensor]:
        """Head inputs [n, d] (with the 1 of the bias) and gradients with respect to the logits [n, c]."""
        if not self._n:
            raise ValueError("Influence: not fitted; call fit(train) first")
        inputs, logits, labels = self._extract(data, need_labels=True)
        assert labels is not None
        return inputs, output_grads(logits.softmax(1), labels)

    def _extract(self, data: Any, need_labels: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        features, logits, labels = extract(
            self.model,
            data,
            head=self.head_name,
            batch_size=self.batch_size,
            device=self.device,
            progress=self.progress,
        )
        if need_labels and labels is None:
            raise ValueError("Influence: the data has no labels")
        if self._layer.bias is not None:
            features = torch.cat([features, features.new_ones(len(features), 1)], 1)
        return features.to(self.device), logits.to(self.device), None if labels is None else labels.to(self.device)

    def _progress(self, blocks: Any, total: int, name: str) -> Any:
        return tqdm(blocks, name, total=total, disable=not self.progress)


def _count(data: Any, batch_size: int) -> int:
    loader = as_loader(data, batch_size)  # refuses what has no fixed order
    dataset = getattr(data, "dataset", data)
    if isinstance(dataset, Dataset) and hasattr(dataset, "__len__"):
        return len(dataset)  # pyright: ignore[reportArgumentType]
    return sum(len(x) for x, _ in loader)
