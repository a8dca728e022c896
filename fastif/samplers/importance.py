"""Samplers in proportion to what each example adds to the curvature."""

from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from fastif.samplers.subset import (
    Subset,
    blocks,
    check_generator,
    check_labels,
    check_matrix,
    equal_weights,
    shown_weights,
)
from fastif.samplers.systematic import check_k, systematic_picks, tails

_UNIFORM = 0.1  # part of a sampling share that is the same for every example: bounds the weights by 1 / (0.1 k)


class CertifiedSubset(NamedTuple):
    """A subset and a bound on what it leaves out: || G - (1/n) sum_{i in indices} G_i ||_2 <= bound."""

    indices: Tensor  # int64 [k], distinct, ascending
    weights: Tensor  # float64 [k], 1/n each
    bound: float  # in the units of the curvature

    def __repr__(self) -> str:
        return f"CertifiedSubset({shown_weights(self.indices, self.weights)}, bound={self.bound:.3g})"


def logit(
    logits: Tensor, labels: Tensor, k: int, *, weighted: bool = True, generator: Generator | None = None
) -> Subset:
    """Systematic sampling in proportion to the uncertainty of the prediction, with inverse-probability weights.

    With p_i = softmax(logits_i) the uncertainty is u_i = tr(H_i) = 1 - sum_c p_ic^2, and the sampling share

        s_i = 0.9 u_i / sum_j u_j + 0.1 / n             (1/n where every u is 0).

    Example i is included with probability pi_i = min(1, alpha s_i), alpha such that sum_i pi_i = k, by systematic
    sampling over the examples class after class, in random order within a class; its weight is 1 / (n pi_i), or 1/k
    with `weighted=False`, the plain set. Guarantees: exactly k distinct picks; from each class, the number of picks
    is its expectation, rounded up or down; sum_i w_i x_i is unbiased for (1/n) sum_i x_i, whatever x is;
    the weights are at most 10 / k.
    logits [n, c], labels [n] integers in [0, c); indices ascend. Raises ValueError or TypeError. docs/math.md (9).
    """
    logits = check_matrix("logit", "logits", logits, "c")
    labels = check_labels("logit", labels, n=len(logits), classes=logits.shape[1])
    k = check_k("logit", k, len(logits))
    check_generator("logit", generator)
    return _importance(_curvature_traces(logits), labels, k, weighted, generator)


def leverage(
    features: Tensor,
    logits: Tensor,
    k: int,
    *,
    kind: Literal["trace", "ridge"] = "trace",
    damping: float = 1e-3,
    weighted: bool = True,
    generator: Generator | None = None,
) -> Subset:
    """Systematic sampling, as in `logit`, by each example's share of the last layer's GGN.

    With a_i the features and an appended 1 (the bias), u_i = tr(H_i) and D = diag(u), s_i = 0.9 v_i / sum_j v_j + 0.1/n
    (1/n where every v is 0) with

        kind="trace":  v_i = u_i |a_i|^2 = tr(G_i)                          each example's part of the GGN's trace
        kind="ridge":  v_i = u_i a_i^T (A^T D A / n + damping I)^-1 a_i      of its effective dimension

    The ridge form puts u_i I in the place of H_i, which is at least as large: it needs one (d+1) x (d+1) matrix where
    the exact ridge leverage tr((G + damping I)^-1 G_i) needs c (d+1) squared, and is a lower bound of it. `damping` is
    the absolute number that the curvature will be damped by; only the ridge form reads it. Classes in turn are the
    predicted ones (argmax of the logits). Guarantees as in `logit`.
    features [n, d], logits [n, c]; indices ascend. Raises ValueError or TypeError. docs/math.md (11).
    """
    features = check_matrix("leverage", "features", features, "d")
    logits = check_matrix("leverage", "logits", logits, "c", n=len(features))
    k = check_k("leverage", k, len(features))
    check_generator("leverage", generator)
    traces = _curvature_traces(logits)
    if kind == "trace":
        values = traces * _sq_norms(features)
    elif kind == "ridge":
        values = traces * _ridge_norms(features, traces, damping)
    else:
        raise ValueError(f"leverage: kind must be 'trace' or 'ridge', got {kind!r}")
    return _importance(values, logits.argmax(1).cpu(), k, weighted, generator)


def certified(
    features: Tensor, logits: Tensor, tolerance: float | None = None, *, k: int | None = None
) -> CertifiedSubset:
    """The smallest subset that leaves out at most a share `tolerance` of the last layer's GGN trace, and its bound.

    With a_i the features and an appended 1 (the bias), example i adds v_i / n to the trace, v_i = tr(H_i) |a_i|^2. The
    subset S is the largest v_i (ties: the lower index), as few as leave sum(the others) <= tolerance * sum(all), at
    least one; or, when `k` is given in the place of `tolerance`, the k largest. Weights are 1/n each: what is
    left out counts as zero, so the subset's curvature G_S never exceeds G, and

        || G - G_S ||_2  <=  tr(G - G_S)  =  (1/n) sum_{i not in S} v_i  =  bound      (up to float64 rounding).

    For a layer without a bias the bound holds as well. Deterministic.
    features [n, d], logits [n, c], tolerance in [0, 1); indices ascend. Raises ValueError or TypeError.
    docs/math.md (12).

    >>> tuple(certified(torch.tensor([[3.0], [0.0], [0.0]]), torch.zeros(3, 2), k=1))
    (tensor([0]), tensor([0.3333], dtype=torch.float64), 0.3333333333333333)
    """
    features = check_matrix("certified", "features", features, "d")
    logits = check_matrix("certified", "logits", logits, "c", n=len(features))
    n = len(features)
    values = _curvature_traces(logits) * _sq_norms(features)
    largest_first, order = values.sort(descending=True, stable=True)
    left_out = torch.cat([tails(largest_first), torch.zeros(1, dtype=torch.float64)])  # [n + 1]: after 0, 1, .. picks
    if tolerance is not None and k is None:
        if not 0 <= tolerance < 1:
            raise ValueError(f"certified: tolerance must be in [0, 1), got {tolerance}")
        k = max(1, int((left_out > tolerance * left_out[0]).sum()))
    elif k is not None and tolerance is None:
        k = check_k("certified", k, n)
    else:
        raise ValueError(f"certified: give exactly one of tolerance and k, got tolerance={tolerance}, k={k}")
    indices = order[:k].sort().values
    return CertifiedSubset(indices, torch.full((k,), 1 / n, dtype=torch.float64), float(left_out[k]) / n)


def _importance(values: Tensor, classes: Tensor, k: int, weighted: bool, generator: Generator | None) -> Subset:
    """Systematic sampling in proportion to values [n] >= 0, weighted by inverse inclusion probability."""
    indices, probabilities = systematic_picks(_shares(values), classes, k, generator)
    return Subset(indices, 1 / probabilities / len(values)) if weighted else equal_weights(indices)


def _shares(values: Tensor) -> Tensor:
    """Sampling shares: 0.9 v_i / sum(v) + 0.1 / n, or 1/n where every v is 0."""
    total = float(tails(values)[0])
    uniform = torch.full_like(values, 1 / len(values))
    return uniform if total == 0 else (1 - _UNIFORM) * (values / total) + _UNIFORM * uniform


def _curvature_traces(logits: Tensor) -> Tensor:
    """tr(H_i) = 1 - sum_c p_ic^2 [n], without the cancellation that this form has where one p is near 1."""
    traces = []
    for block in blocks(logits):
        probs = block.softmax(1)
        top, rest = probs.max(1, keepdim=True), probs.clone()
        rest.scatter_(1, top.indices, 0.0)
        traces.append(top.values.squeeze(1) * rest.sum(1) + (rest * (1 - rest)).sum(1))
    return torch.cat(traces)


def _sq_norms(features: Tensor) -> Tensor:
    """|a_i|^2 [n], a_i the features and an appended 1."""
    return torch.cat([block.square().sum(1) + 1 for block in blocks(features)])


def _ridge_norms(features: Tensor, traces: Tensor, damping: float) -> Tensor:
    """a_i^T (A^T D A / n + damping I)^-1 a_i [n], a_i the features and an appended 1, D = diag(traces)."""
    if not 0 < damping < float("inf"):
        raise ValueError(f"leverage: damping must be finite and > 0, got {damping}")
    d = features.shape[1]
    moment = torch.zeros(d + 1, d + 1, dtype=torch.float64)
    row = 0
    for block in blocks(features):
        a = torch.nn.functional.pad(block, (0, 1), value=1.0)
        moment.addmm_(a.mT * traces[row : row + len(a)], a, alpha=1 / len(features))
        row += len(a)
    factor, info = torch.linalg.cholesky_ex(moment + damping * torch.eye(d + 1, dtype=torch.float64))
    pivots = factor.diagonal().square()
    floor = (d + 1) * torch.finfo(torch.float64).eps * float(moment.diagonal().max())  # within rounding of zero
    singular = (pivots <= floor).nonzero()[:, 0].tolist()
    if int(info) or singular:
        bad = singular[0] if singular else int(info) - 1
        enough = 4 * (d + 1) * torch.finfo(torch.float64).eps * float(moment.trace())
        raise ValueError(
            f"leverage: A^T D A / n + damping I is not positive definite at row {bad}: "
            f"damping={damping:g} is below the rounding of a trace of {float(moment.trace()):g}, {enough:.1g} would do"
        )
    norms = []
    for block in blocks(features):
        a = torch.nn.functional.pad(block, (0, 1), value=1.0)
        norms.append(torch.linalg.solve_triangular(factor, a.mT, upper=False).square().sum(0))
    return torch.cat(norms)
