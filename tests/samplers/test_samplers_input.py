"""What samplers refuse: each rule by its name, with the value."""

from functools import partial

import numpy as np
import pytest
import torch

from fastif.samplers import (
    Subset,
    certified,
    check_subset,
    intermediate_distance,
    k_center,
    k_center_by_class,
    leverage,
    logit,
    prefix,
    random,
    stratified,
)
from fastif.samplers.systematic import inclusion_probabilities


def test_check_subset_accepts_any_object_with_indices_and_weights():
    class Mine:
        indices = np.array([4, 2])
        weights = (0.25, 0.75)

    subset = check_subset(Mine(), 5)
    assert subset.indices.tolist() == [4, 2]
    assert subset.weights.tolist() == [0.25, 0.75]
    assert subset.weights.dtype == torch.float64
    whole = certified(torch.ones(3, 1), torch.zeros(3, 2), k=2)
    assert torch.equal(check_subset(whole, 3).indices, whole.indices)


@pytest.mark.parametrize(
    ("indices", "weights", "error", "message"),
    [
        ([[0]], [1.0], ValueError, r"subset: indices must be \[k\], got shape \[1, 1\]"),
        ([], [], ValueError, "subset: indices must not be empty"),
        ([0.0], [1.0], TypeError, "subset: indices must be int64, got torch.float32"),
        ([0, 3], [0.5, 0.5], ValueError, r"subset: indices must be in \[0, n=3\), got 3"),
        ([-1], [1.0], ValueError, r"subset: indices must be in \[0, n=3\), got -1"),
        ([2, 1, 2], [0.1] * 3, ValueError, "subset: indices must be distinct, 2 appears more than once"),
        ([0, 1], [1.0], ValueError, r"subset: weights must be \[k=2\], got shape \[1\]"),
        ([0, 1], [1, 1], TypeError, "subset: weights must be floating point, got torch.int64"),
        ([0, 1], [1.0, -0.5], ValueError, "subset: weights must be finite and >= 0, entry 1 is -0.5"),
        ([0, 1], [float("nan"), 1.0], ValueError, "subset: weights must be finite and >= 0, entry 0 is nan"),
        ([0, 1], [1.0, float("inf")], ValueError, "subset: weights must be finite and >= 0, entry 1 is inf"),
    ],
)
def test_check_subset_names_the_broken_rule(indices, weights, error, message):
    with pytest.raises(error, match=message):
        check_subset(Subset(torch.tensor(indices), torch.tensor(weights)), 3)


X, Z, Y = torch.ones(3, 2), torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)


TAKES_K = {
    "random": partial(random, 3),
    "prefix": partial(prefix, 3),
    "stratified": partial(stratified, Y),
    "intermediate_distance": partial(intermediate_distance, X, Y),
    "k_center": partial(k_center, X),
    "k_center_by_class": partial(k_center_by_class, X, Y),
    "logit": partial(logit, Z, Y),
    "leverage": partial(leverage, X, Z),
    "certified": lambda k: certified(X, Z, k=k),
    "inclusion_probabilities": partial(inclusion_probabilities, torch.ones(3)),
}


@pytest.mark.parametrize("name", TAKES_K)
def test_k_is_an_integer_from_one_to_n(name):
    for k in (0, -1, 4):
        with pytest.raises(ValueError, match=rf"{name}: k must be in \[1, n=3\], got k={k}"):
            TAKES_K[name](k)
    for k, kind in ((1.0, "float"), (True, "bool"), ("2", "str")):
        with pytest.raises(TypeError, match=f"{name}: k must be an integer, got {kind}"):
            TAKES_K[name](k)
    TAKES_K[name](np.int64(2))


def spoiled(x: torch.Tensor, row: int, value: float) -> torch.Tensor:
    x = x.clone()
    x[row, -1] = value
    return x


MATRICES = {
    "intermediate_distance: features": (lambda x: intermediate_distance(x, Y, 1), "d"),
    "k_center_by_class: points": (lambda x: k_center_by_class(x, Y, 1), "d"),
    "logit: logits": (lambda x: logit(x, Y, 1), "c"),
    "leverage: features": (lambda x: leverage(x, Z, 1), "d"),
    "leverage: logits": (lambda x: leverage(X, x, 1), "c"),
    "certified: features": (lambda x: certified(x, Z, k=1), "d"),
    "certified: logits": (lambda x: certified(X, x, k=1), "c"),
}


@pytest.mark.parametrize("what", MATRICES)
def test_matrices_are_checked_and_the_row_is_named(what):
    call, columns = MATRICES[what]
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match=f"{what} must be finite, row 2 holds NaN or Inf"):
            call(spoiled(X, 2, value))
    with pytest.raises(ValueError, match=rf"{what} must be \[n, {columns}\], got shape \[3\]"):
        call(torch.ones(3))
    with pytest.raises(ValueError, match=rf"{what} must have at least one row and one column, got shape \[0, 2\]"):
        call(torch.ones(0, 2))
    with pytest.raises(ValueError, match=rf"{what} must have at least one row and one column, got shape \[3, 0\]"):
        call(torch.ones(3, 0))
    with pytest.raises(TypeError, match=f"{what} must be a floating-point tensor, got torch.int64"):
        call(torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=f"{what} must be a floating-point tensor, got ndarray"):
        call(np.ones((3, 2)))
    name = what.replace(": ", r": \|") + r"\|"
    with pytest.raises(ValueError, match=rf"{name} must be at most 1e\+140 \(squares overflow\), got 1e\+141"):
        call(spoiled(X.double(), 0, -1e141))
    call(spoiled(X, 0, 3e38))  # finite, although a row of such sums to more than float32 can hold
    call(spoiled(X.double(), 0, 1e140))


LABELLED = {
    "stratified": lambda y: stratified(y, 1),
    "intermediate_distance": lambda y: intermediate_distance(X, y, 1),
    "k_center_by_class": lambda y: k_center_by_class(X, y, 1),
    "logit": lambda y: logit(Z, y, 1),
}


@pytest.mark.parametrize("name", LABELLED)
def test_labels_are_checked_and_the_row_is_named(name):
    call = LABELLED[name]
    with pytest.raises(TypeError, match=f"{name}: labels must be an integer tensor, got torch.float32"):
        call(torch.zeros(3))
    with pytest.raises(TypeError, match=f"{name}: labels must be an integer tensor, got torch.bool"):
        call(torch.zeros(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=f"{name}: labels must be an integer tensor, got list"):
        call([0, 1, 2])
    with pytest.raises(ValueError, match=rf"{name}: labels must be \[n\], got shape \[3, 1\]"):
        call(Y[:, None])
    with pytest.raises(ValueError, match=f"{name}: labels must not be empty"):
        call(Y[:0])
    with pytest.raises(ValueError, match=rf"{name}: labels must be .*0.*, row 1 is -1"):
        call(torch.tensor([0, -1, 0]))
    if name != "stratified":
        with pytest.raises(ValueError, match=f"{name}: labels must have n=3 entries, got 2"):
            call(Y[:2])


def test_other_rules():
    with pytest.raises(ValueError, match=r"logit: labels must be in \[0, c=4\), row 2 is 4"):
        logit(Z, torch.tensor([0, 1, 4]), 1)
    with pytest.raises(ValueError, match="leverage: logits must have n=3 rows, got 2"):
        leverage(X, Z[:2], 1)
    with pytest.raises(ValueError, match="certified: logits must have n=3 rows, got 2"):
        certified(X, Z[:2], 0.1)
    with pytest.raises(ValueError, match="leverage: kind must be 'trace' or 'ridge', got 'row'"):
        leverage(X, Z, 1, kind="row")
    for damping in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"leverage: damping must be finite and > 0, got {damping}"):
            leverage(X, Z, 1, kind="ridge", damping=damping)
    with pytest.raises(ValueError, match=r"leverage: .* is not positive definite at row 1: damping=1e-12 .* would do"):
        leverage(torch.full((3, 2), 1e6), Z, 1, kind="ridge", damping=1e-12)
    for tolerance in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"certified: tolerance must be in \[0, 1\), got {tolerance}"):
            certified(X, Z, tolerance)
    with pytest.raises(ValueError, match="certified: give exactly one of tolerance and k, got tolerance=None, k=None"):
        certified(X, Z)
    with pytest.raises(ValueError, match=r"certified: give exactly one of tolerance and k, got tolerance=0\.1, k=2"):
        certified(X, Z, 0.1, k=2)
    for shares in ([1.0, 0.0], [1.0, float("nan")], [1.0, -1.0]):
        with pytest.raises(ValueError, match="inclusion_probabilities: shares must be finite and > 0, got"):
            inclusion_probabilities(torch.tensor(shares), 1)
    with pytest.raises(ValueError, match=r"inclusion_probabilities: shares must be \[n\], got shape \[1, 2\]"):
        inclusion_probabilities(torch.ones(1, 2), 1)
    with pytest.raises(ValueError, match="prefix: n must be >= 1, got n=0"):
        prefix(0, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_generator_is_refused():
    with pytest.raises(ValueError, match="random: generator must be a CPU generator, got one on cuda"):
        random(3, 1, generator=torch.Generator("cuda"))
