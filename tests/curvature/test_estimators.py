"""What estimators refuse, and how they show themselves."""

import pytest
from torch import nn

from fastif import (
    CG,
    EKFAC,
    KFAC,
    Arnoldi,
    DataInf,
    Diagonal,
    ExactBlock,
    Identity,
    LiSSA,
    RandomProjection,
)
from tests.helpers.matrix_free import influence_of, network


def unfitted(estimator):
    estimator.begin({"0": (1, 2, 3)}, None)
    return estimator


def scores_with(estimator):
    model, data = network("mlp")
    return influence_of(model, estimator).fit(data).scores(data, data)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CG(-1.0), "damping must be a finite number >= 0"),
        (lambda: CG("auto"), "CG: damping must be a number, got 'auto'"),
        (lambda: CG(matrix="fisher"), "CG: matrix must be 'ggn' or 'hessian', got 'fisher'"),
        (lambda: CG(tolerance=0), r"CG: tolerance must be in \(0, 1\), got 0"),
        (lambda: CG(max_steps=0), "CG: max_steps must be an integer >= 1, got 0"),
        (lambda: LiSSA(0.0), "LiSSA: damping must be a number > 0 or a RelativeDamping or a TrainingDamping, got 0.0"),
        (lambda: LiSSA(-1.0), "damping must be a finite number >= 0"),
        (lambda: LiSSA(max_steps=0), "LiSSA: max_steps must be an integer >= 1, got 0"),
        (lambda: LiSSA(batch=0), "LiSSA: batch must be an integer >= 1, got 0"),
        (lambda: LiSSA(scale=-2.0), "LiSSA: scale must be a finite number > 0 or 'auto', got -2.0"),
        (lambda: LiSSA(repeats=3), "LiSSA: repeats=3 would do the same thing again without batch="),
        (lambda: LiSSA(batch=3, keep_graph=True), "it goes with batch=None"),
        (lambda: LiSSA().scale_used, "LiSSA: not fitted"),
        (lambda: Arnoldi(0), "Arnoldi: rank must be an integer >= 1, got 0"),
        (lambda: Arnoldi(damping=0.0), "Arnoldi: damping must be a number > 0 or a TrainingDamping, got 0.0"),
        (lambda: Arnoldi(max_steps=0), "Arnoldi: max_steps must be an integer >= 1, got 0"),
        (lambda: Arnoldi(2.5), "Arnoldi: rank must be an integer >= 1, got 2.5"),
        (lambda: Arnoldi("a"), "Arnoldi: rank must be an integer >= 1, got 'a'"),
        (lambda: Arnoldi(tolerance=0), r"Arnoldi: tolerance must be in \(0, 1\), got 0"),
        (lambda: unfitted(Arnoldi()).end(0), r"Arnoldi: multiplies with the data's curvature, .*call fit\(train\)"),
        (lambda: Arnoldi().eigenvalues, "Arnoldi: not fitted"),
        (
            lambda: scores_with(LiSSA(batch=91)),
            "LiSSA: batch must be at most the subset's k=90 examples, got 91",
        ),
        (
            lambda: (
                influence_of(network("mlp")[0], LiSSA(scale=1e-3))
                .fit(network("mlp")[1])
                .scores(*[network("mlp")[1]] * 2)
            ),
            "LiSSA: with scale 0.001 the series diverges in step 2.*would do, or 'auto'",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_preconditioner_must_be_an_estimator():
    with pytest.raises(TypeError, match="preconditioner must be an estimator of single blocks, got 'kfac'"):
        CG(preconditioner="kfac")
    with pytest.raises(TypeError, match=r"of single blocks, got the class KFAC; call it: KFAC\(\)"):
        CG(preconditioner=KFAC)
    for joint in (CG(), Arnoldi(), ExactBlock(joint=True)):
        with pytest.raises(TypeError, match=f"of single blocks, got {type(joint).__name__}, which is one of all"):
            CG(preconditioner=joint)


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (EKFAC(0.1, "empirical"), "EKFAC(damping=0.1, fisher='empirical', separable=None)"),
        (Identity(), "Identity()"),
        (ExactBlock("auto", joint=True), "ExactBlock(damping='auto', matrix='ggn', joint=True, in_place='auto')"),
        (DataInf(), "DataInf(damping='auto')"),
        (
            CG(0.1, preconditioner=Diagonal(1.0)),
            "CG(damping=0.1, matrix='ggn', tolerance=0.0001, max_steps=200, "
            "preconditioner=Diagonal(damping=1.0, fisher='exact'), keep_graph=False)",
        ),
        (RandomProjection(8), "RandomProjection(dimension=8, damping=0.001, fisher='empirical', seed=0)"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_estimators_show_themselves_as_they_were_called(made, text):
    assert repr(made) == text


@pytest.mark.parametrize("made", [EKFAC, {"*": EKFAC}])
def test_a_class_is_no_estimator(made):
    with pytest.raises(TypeError, match=r"Influence: curvature must be .*, got the class EKFAC; call it: EKFAC\(\)"):
        influence_of(nn.Linear(2, 2), made)
