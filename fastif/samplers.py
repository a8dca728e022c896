"""Samplers: which k of n training examples carry the curvature, and with which weights.

A sampler returns `indices` and `weights` such that the weighted sum of per-example curvatures stands for their mean,

    sum_i weights[i] G_i  ~  G = (1/n) sum_i G_i        (docs/math.md (4)),

so the weights of a subset sum to 1 (`logit` and `leverage`: in expectation; `certified`: to k/n). Samplers are plain
functions of what they need and nothing else. Those that draw take `generator=`, a CPU generator: the draw is made on
the CPU and does not depend on the device of the tensors. Arithmetic is float64, one block of rows at a time; nothing of
size n x n is ever stored, nor a second copy of the features (but for the unit rows of `k_center` with "cosine").

The idea of choosing the curvature's examples by features or by logits, and the names, come from arXiv 2510.26776; its
formulas are not given there, and the definitions on this page are our own.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor

from fastif import ops
from fastif.ops._checks import first_nonfinite_row
from fastif.systematic import check_k, classes_in_turn, systematic_picks, tails

_UNIFORM = 0.1  # part of a sampling share that is the same for every example: bounds the weights by 1 / (0.1 k)
_LARGEST = 1e140  # n d squares of it still sum below the float64 maximum
_BLOCK = 2**22  # entries of a block of rows, 32 MiB in float64


class Subset(NamedTuple):
    """Examples and the weights of their curvatures; any object with these two attributes can be passed as a subset."""

    indices: Tensor  # int64 [k], distinct
    weights: Tensor  # float64 [k], >= 0


class CertifiedSubset(NamedTuple):
    """A subset and a bound on what it leaves out: || G - (1/n) sum_{i in indices} G_i ||_2 <= bound."""

    indices: Tensor  # int64 [k], distinct, ascending
    weights: Tensor  # float64 [k], 1/n each
    bound: float  # in the units of the curvature


def check_subset(subset: Any, n: int) -> Subset:
    """A subset of n examples, on the CPU with float64 weights, or an error that names the rule it breaks.

    `subset` is any object with `indices` (int64 [k], distinct, in [0, n), k >= 1) and `weights` ([k], finite, >= 0).
    Raises TypeError for what is not such an object, ValueError for values that break a rule.

    >>> check_subset(Subset(torch.tensor([0, 3]), torch.tensor([0.5, 0.5])), n=3)
    Traceback (most recent call last):
        ...
    ValueError: subset: indices must be in [0, n=3), got 3
    """
    if not (hasattr(subset, "indices") and hasattr(subset, "weights")):
        raise TypeError(f"subset: must have indices and weights, got {type(subset).__name__}")
    indices = torch.as_tensor(subset.indices).detach().cpu()
    weights = torch.as_tensor(subset.weights).detach().cpu()
    if indices.dim() != 1:
        raise ValueError(f"subset: indices must be [k], got shape {list(indices.shape)}")
    if indices.numel() == 0:
        raise ValueError("subset: indices must not be empty")
    if indices.dtype != torch.int64:
        raise TypeError(f"subset: indices must be int64, got {indices.dtype}")
    outside = indices[(indices < 0) | (indices >= n)]
    if outside.numel():
        raise ValueError(f"subset: indices must be in [0, n={n}), got {int(outside[0])}")
    values, counts = indices.unique(return_counts=True)
    if len(values) < len(indices):
        raise ValueError(f"subset: indices must be distinct, {int(values[counts > 1][0])} appears more than once")
    if weights.shape != indices.shape:
        raise ValueError(f"subset: weights must be [k={len(indices)}], got shape {list(weights.shape)}")
    if not weights.is_floating_point():
        raise TypeError(f"subset: weights must be floating point, got {weights.dtype}")
    weights = weights.double()
    broken = (~(weights.isfinite() & (weights >= 0))).nonzero()
    if len(broken):
        i = int(broken[0])
        raise ValueError(f"subset: weights must be finite and >= 0, entry {i} is {float(weights[i])}")
    return Subset(indices, weights)


def random(n: int, k: int, *, generator: Generator | None = None) -> Subset:
    """k of n examples, every k-set equally likely; weights 1/k, unbiased. Indices ascend.

    >>> random(5, 5).indices
    tensor([0, 1, 2, 3, 4])
    """
    k = check_k("random", k, n)
    _check_generator("random", generator)
    return _equal_weights(torch.randperm(n, generator=generator)[:k])


def prefix(n: int, k: int) -> Subset:
    """The first k of n examples, weights 1/k: what several libraries take as their curvature subset; a baseline.

    >>> prefix(5, 2).indices
    tensor([0, 1])
    """
    return _equal_weights(torch.arange(check_k("prefix", k, n)))


def stratified(labels: Tensor, k: int, *, generator: Generator | None = None) -> Subset:
    """A random draw within each class, classes in proportion to their sizes.

    Class c of n_c examples gets k_c = k n_c / n picks, rounded by largest remainder (ties: the lower class), and its
    picks weigh n_c / (n k_c) each: the total weight of a class is its share of the data. Where k is so small that a
    class gets no pick, the shares are those among the classes that did, and the weights still sum to 1.
    labels [n] are integers >= 0; indices ascend. Raises ValueError or TypeError. docs/math.md (4).
    """
    labels = _check_labels("stratified", labels)
    k = check_k("stratified", k, len(labels))
    _check_generator("stratified", generator)
    labels, counts, picks = _allocate(labels, k)
    order = classes_in_turn(labels, generator)
    rank_in_class = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    return _class_weights(order[rank_in_class < picks[labels[order]]], labels, counts, picks)


def intermediate_distance(features: Tensor, labels: Tensor, k: int, *, weighted: bool = True) -> Subset:
    """The examples at middling distance from their class prototype: neither the typical ones nor the outliers.

    The prototype of a class is the coordinate-wise median of its features (the mean of the two middle values where n_c
    is even). Each class gets k_c picks as in `stratified`; with its examples ranked by Euclidean distance to the
    prototype (ties: the lower index), the picks are the ranks floor((n_c - k_c) / 2), ..., + k_c - 1.
    Weights as in `stratified`, or 1/k with `weighted=False`. Deterministic, and biased: the tails are never picked.
    features [n, d], labels [n] integers >= 0; indices ascend. Raises ValueError or TypeError. docs/math.md (10).

    >>> features, labels = torch.tensor([[0.0], [1.0], [2.0], [4.0], [9.0]]), torch.zeros(5, dtype=torch.int64)
    >>> intermediate_distance(features, labels, 1).indices  # distances 2, 1, 0, 2, 7: the median distance is 2
    tensor([0])
    """
    features = _check_matrix("intermediate_distance", "features", features, "d")
    labels = _check_labels("intermediate_distance", labels, n=len(features))
    k = check_k("intermediate_distance", k, len(features))
    labels, counts, picks = _allocate(labels, k)
    bands = []
    for members, k_c in zip(labels.argsort(stable=True).split(counts.tolist()), picks.tolist(), strict=True):
        ranked = members[_sq_distance_to_median(features, members).argsort(stable=True)]
        bands.append(ranked[(len(members) - k_c) // 2 :][:k_c])
    indices = torch.cat(bands)
    return _class_weights(indices, labels, counts, picks) if weighted else _equal_weights(indices)


def k_center(
    points: Tensor,
    k: int,
    *,
    weighted: bool = True,
    metric: Literal["euclidean", "cosine"] = "euclidean",
    generator: Generator | None = None,
) -> Subset:
    """Farthest-first centres, each weighted by the share of the points that are nearest to it.

    The first centre is drawn from `generator`; each next one is the point farthest from the centres before it (ties:
    the lower index), so that every point is within twice the smallest possible covering radius. A point belongs to its
    nearest centre (ties: the earlier one), and weights[j] = (points that belong to j) / n, or 1/k with
    `weighted=False`: without weights the outliers, which are picked first, would count as much as the bulk.
    `metric="cosine"` is the same on rows scaled to length 1, where the squared distance is 2 (1 - cos).

    points [n, d], features or logits, on any device; indices are in the order of the picks. A duplicate of a centre is
    picked only when no distinct point is left, and weighs 0. Raises ValueError or TypeError. docs/math.md (7).
    """
    points = _check_matrix("k_center", "points", points, "d")
    k = check_k("k_center", k, len(points))
    _check_generator("k_center", generator)
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f"k_center: metric must be 'euclidean' or 'cosine', got {metric!r}")
    if points.dtype not in (torch.float32, torch.float64):
        points = points.float()
    if metric == "cosine":
        points = _unit_rows(points)
    start = int(torch.randint(len(points), (), generator=generator))
    centres = ops.farthest_first(points, k, start=start)
    indices = centres.indices.cpu()
    cells = torch.bincount(centres.nearest.cpu(), minlength=k)
    return Subset(indices, cells.double() / len(points) if weighted else torch.full((k,), 1 / k, dtype=torch.float64))


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
    logits = _check_matrix("logit", "logits", logits, "c")
    labels = _check_labels("logit", labels, n=len(logits), classes=logits.shape[1])
    k = check_k("logit", k, len(logits))
    _check_generator("logit", generator)
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
    features = _check_matrix("leverage", "features", features, "d")
    logits = _check_matrix("leverage", "logits", logits, "c", n=len(features))
    k = check_k("leverage", k, len(features))
    _check_generator("leverage", generator)
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

    >>> certified(torch.tensor([[3.0], [0.0], [0.0]]), torch.zeros(3, 2), k=1)
    CertifiedSubset(indices=tensor([0]), weights=tensor([0.3333], dtype=torch.float64), bound=0.3333333333333333)
    """
    features = _check_matrix("certified", "features", features, "d")
    logits = _check_matrix("certified", "logits", logits, "c", n=len(features))
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


def draw(
    sampler: Callable[..., Any],
    *,
    features: Tensor,
    logits: Tensor,
    labels: Tensor | None = None,
    generator: Generator | None = None,
) -> Subset:
    """The subset that a sampler draws from a data set, checked.

    `sampler` is a function whose arguments are among n, features, points (the features), logits, labels and generator,
    or a `functools.partial` that binds the others; what is bound stays bound. Raises ValueError where the sampler
    needs something else, or labels that the data does not have.

    >>> x = torch.eye(4)
    >>> draw(partial(prefix, k=2), features=x, logits=x)
    Subset(indices=tensor([0, 1]), weights=tensor([0.5000, 0.5000], dtype=torch.float64))
    """
    known = {
        "n": len(features),
        "features": features,
        "points": features,
        "logits": logits,
        "labels": labels,
        "generator": generator,
    }
    function = sampler.func if isinstance(sampler, partial) else sampler
    bound = sampler.keywords if isinstance(sampler, partial) else {}
    name = getattr(function, "__name__", type(function).__name__)
    given = {}
    for parameter in inspect.signature(sampler).parameters.values():
        needed = parameter.default is parameter.empty
        if parameter.name in bound or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name == "labels" and labels is None:
            if needed:
                raise ValueError(f"draw: {name} needs labels, and the data has none")
        elif parameter.name in known:
            given[parameter.name] = known[parameter.name]
        elif needed:
            raise ValueError(
                f"draw: {name} needs {parameter.name}, which is none of {', '.join(known)}: "
                f"bind it with functools.partial({name}, {parameter.name}=...)"
            )
    return check_subset(sampler(**given), len(features))


def _importance(values: Tensor, classes: Tensor, k: int, weighted: bool, generator: Generator | None) -> Subset:
    """Systematic sampling in proportion to values [n] >= 0, weighted by inverse inclusion probability."""
    indices, probabilities = systematic_picks(_shares(values), classes, k, generator)
    return Subset(indices, 1 / probabilities / len(values)) if weighted else _equal_weights(indices)


def _shares(values: Tensor) -> Tensor:
    """Sampling shares: 0.9 v_i / sum(v) + 0.1 / n, or 1/n where every v is 0."""
    total = float(tails(values)[0])
    uniform = torch.full_like(values, 1 / len(values))
    return uniform if total == 0 else (1 - _UNIFORM) * (values / total) + _UNIFORM * uniform


def _curvature_traces(logits: Tensor) -> Tensor:
    """tr(H_i) = 1 - sum_c p_ic^2 [n], without the cancellation that this form has where one p is near 1."""
    traces = []
    for block in _blocks(logits):
        probs = block.softmax(1)
        top, rest = probs.max(1, keepdim=True), probs.clone()
        rest.scatter_(1, top.indices, 0.0)
        traces.append(top.values.squeeze(1) * rest.sum(1) + (rest * (1 - rest)).sum(1))
    return torch.cat(traces)


def _sq_norms(features: Tensor) -> Tensor:
    """|a_i|^2 [n], a_i the features and an appended 1."""
    return torch.cat([block.square().sum(1) + 1 for block in _blocks(features)])


def _ridge_norms(features: Tensor, traces: Tensor, damping: float) -> Tensor:
    """a_i^T (A^T D A / n + damping I)^-1 a_i [n], a_i the features and an appended 1, D = diag(traces)."""
    if not 0 < damping < float("inf"):
        raise ValueError(f"leverage: damping must be finite and > 0, got {damping}")
    d = features.shape[1]
    moment = torch.zeros(d + 1, d + 1, dtype=torch.float64)
    row = 0
    for block in _blocks(features):
        a = torch.nn.functional.pad(block, (0, 1), value=1.0)
        moment.addmm_(a.mT * traces[row : row + len(a)], a, alpha=1 / len(features))
        row += len(a)
    factor, info = torch.linalg.cholesky_ex(moment + damping * torch.eye(d + 1, dtype=torch.float64))
    if int(info) != 0:
        enough = 4 * (d + 1) * torch.finfo(torch.float64).eps * float(moment.trace())
        raise ValueError(
            f"leverage: A^T D A / n + damping I is not positive definite at row {int(info) - 1}: "
            f"damping={damping:g} is below the rounding of a trace of {float(moment.trace()):g}, {enough:.1g} would do"
        )
    norms = []
    for block in _blocks(features):
        a = torch.nn.functional.pad(block, (0, 1), value=1.0)
        norms.append(torch.linalg.solve_triangular(factor, a.mT, upper=False).square().sum(0))
    return torch.cat(norms)


def _sq_distance_to_median(features: Tensor, members: Tensor) -> Tensor:
    """Squared distances [len(members)] of the members to their coordinate-wise median, some columns at a time."""
    sq_dists = torch.zeros(len(members), dtype=torch.float64)
    for columns in features.split(max(1, _BLOCK // len(members)), dim=1):
        x = columns[members.to(features.device)].to("cpu", torch.float64)
        ordered = x.sort(0).values
        x -= (ordered[(len(x) - 1) // 2] + ordered[len(x) // 2]) / 2
        sq_dists += x.square().sum(1)
    return sq_dists


def _unit_rows(points: Tensor) -> Tensor:
    """Rows scaled to length 1, in the dtype and on the device of the points."""
    blocks = []
    for block in _blocks(points):
        largest = block.abs().amax(1, keepdim=True)
        zero = (largest == 0).nonzero()
        if len(zero):
            row = sum(len(b) for b in blocks) + int(zero[0, 0])
            raise ValueError(f"k_center: metric 'cosine' needs rows that are not zero, row {row} is")
        block = block / largest  # so that squares neither overflow nor vanish
        blocks.append((block / block.square().sum(1, keepdim=True).sqrt()).to(points.dtype))
    return torch.cat(blocks).to(points.device)


def _allocate(labels: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels renumbered to 0, 1, ... without gaps, class sizes, and the picks of each class: k shared out in proportion
    to the sizes by largest remainder, in integers (ties: the lower class)."""
    _, labels, counts = labels.unique(return_inverse=True, return_counts=True)
    n = len(labels)
    picks = k * counts // n
    remainders = k * counts % n
    picks[remainders.argsort(descending=True, stable=True)[: k - int(picks.sum())]] += 1
    return labels, counts, picks


def _class_weights(indices: Tensor, labels: Tensor, counts: Tensor, picks: Tensor) -> Subset:
    """Weights by which the picks of a class carry the class's share among the classes that have picks."""
    indices = indices.sort().values
    n = int(counts[picks > 0].sum())
    return Subset(indices, (counts.double() / picks / n)[labels[indices]])


def _equal_weights(indices: Tensor) -> Subset:
    return Subset(indices.sort().values, torch.full((len(indices),), 1 / len(indices), dtype=torch.float64))


def _blocks(x: Tensor) -> Iterator[Tensor]:
    """The rows of x in order, some at a time, in float64 on the CPU: the same bits whatever the device of x."""
    for block in x.split(max(1, _BLOCK // x.shape[1])):
        yield block.to("cpu", torch.float64)


def _check_matrix(name: str, what: str, x: Tensor, columns: str, n: int | None = None) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: {what} must be a floating-point tensor, got {got}")
    if x.dim() != 2:
        raise ValueError(f"{name}: {what} must be [n, {columns}], got shape {list(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"{name}: {what} must have at least one row and one column, got shape {list(x.shape)}")
    if n is not None and len(x) != n:
        raise ValueError(f"{name}: {what} must have n={n} rows, got {len(x)}")
    x = x.detach()
    row = first_nonfinite_row(x)
    if row is not None:
        raise ValueError(f"{name}: {what} must be finite, row {row} holds NaN or Inf")
    if x.dtype == torch.float64 and (largest := max(abs(float(v)) for v in x.aminmax())) > _LARGEST:
        raise ValueError(f"{name}: |{what}| must be at most {_LARGEST:g} (squares overflow), got {largest:g}")
    return x


def _check_labels(name: str, labels: Tensor, n: int | None = None, classes: int | None = None) -> Tensor:
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    if not isinstance(labels, Tensor) or labels.dtype not in integers:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{name}: labels must be an integer tensor, got {got}")
    if labels.dim() != 1:
        raise ValueError(f"{name}: labels must be [n], got shape {list(labels.shape)}")
    if len(labels) == 0:
        raise ValueError(f"{name}: labels must not be empty")
    if n is not None and len(labels) != n:
        raise ValueError(f"{name}: labels must have n={n} entries, got {len(labels)}")
    labels = labels.detach().to("cpu", torch.int64)
    outside = ((labels < 0) | (labels >= classes) if classes is not None else labels < 0).nonzero()
    if len(outside):
        rule = ">= 0" if classes is None else f"in [0, c={classes})"
        raise ValueError(f"{name}: labels must be {rule}, row {int(outside[0])} is {int(labels[outside[0]])}")
    return labels


def _check_generator(name: str, generator: Generator | None) -> None:
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"{name}: generator must be a CPU generator, got one on {generator.device}")
