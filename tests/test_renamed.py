"""Old names: each still does what it did, and says what it is called now."""

from functools import partial

import pytest
import torch

import fastif
from fastif import Diagonal, Influence, LiSSA, ScoreFolder, remove, samplers
from fastif.removal import Step
from fastif.renamed import rename_arguments
from tests.helpers.problems import trained
from tests.helpers.stored import problem


def renamed(old: str, new: str):
    return pytest.warns(DeprecationWarning, match=f"^{old} was renamed to {new}$")


@pytest.fixture
def scored():
    model, query, train = problem()
    return Influence(model, curvature=Diagonal(), progress=False).fit(train), query, train


def test_scores_by_layer_and_by_token(scored, tmp_path):
    influence, query, train = scored
    with renamed("Influence.scores_by_layer", r"Influence.scores\(by='layer'\)"):
        layers = influence.scores_by_layer(query, train)
    want = influence.scores(query, train, by="layer")
    assert list(layers) == list(want)
    assert all(torch.equal(layers[name], want[name]) for name in want)
    with renamed("Influence.scores_by_token", r"Influence.scores\(by='token'\)"):
        stored = influence.scores_by_token(query, train, out=tmp_path)
    assert torch.equal(stored.load(), influence.scores(query, train, by="token"))


def test_rank_of_a_matrix(scored, tmp_path):
    influence, query, train = scored
    want = influence.scores(query, train, low_rank=1, out=tmp_path)
    with renamed("Influence.scores: rank=", "low_rank="):
        assert torch.equal(influence.scores(query, train, rank=1), influence.scores(query, train, low_rank=1))
    with renamed("Influence.rank_error", "Influence.low_rank_error"):
        assert influence.rank_error == influence.low_rank_error > 0
    with renamed("ScoreFolder.rank_error", "ScoreFolder.low_rank_error"):
        assert ScoreFolder(tmp_path).rank_error == want.low_rank_error > 0
    with renamed("Influence.plan: rank=", "low_rank="):
        assert influence.plan(train, query, rank=1) == influence.plan(train, query, low_rank=1)
    with pytest.raises(TypeError, match="Influence.scores: rank= was renamed to low_rank=; give one of them"):
        influence.scores(query, train, rank=1, low_rank=1)


def test_steps_of_a_series():
    with renamed("LiSSA: steps=", "max_steps="):
        series = LiSSA(1e-2, steps=7)
    assert series.max_steps == 7
    with renamed("LiSSA.steps", "LiSSA.max_steps"):
        assert series.steps == 7
    assert repr(series) == repr(LiSSA(1e-2, max_steps=7))


def test_steps_of_a_removal():
    for name in ("HeadStep", "NetworkStep"):
        for module in (fastif, fastif.removal, fastif.removal.steps):
            with renamed(f"{module.__name__}.{name}", f"{module.__name__}.Step"):
                assert getattr(module, name) is Step
    for module in (fastif, fastif.removal, fastif.removal.steps):
        with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'LastStep'"):
            module.LastStep  # noqa: B018
    tiny = trained()
    whole = partial(remove, tiny.model, (tiny.x, tiny.y), torch.arange(4), steps=1, progress=False)
    (head,) = whole().history
    with renamed("Step.weight", r"Step.parameters\['2.weight'\]"):
        assert torch.equal(head.weight, head.parameters["2.weight"])
    with renamed("Step.bias", r"Step.parameters\['2.bias'\]"):
        assert torch.equal(head.bias, head.parameters["2.bias"])
    (several,) = whole(layers="*", subset=partial(samplers.random, k=40)).history
    with pytest.raises(AttributeError, match="Step.weight: several layers moved; see parameters"):
        several.weight  # noqa: B018


def test_warnings_stand_where_the_old_name_does():
    @rename_arguments(old="new")
    def function(new: int) -> int:
        return new

    with pytest.warns(DeprecationWarning, match="old= was renamed to new=") as caught:
        assert function(old=3) == 3
    assert caught[0].filename == __file__


def test_verbs_of_estimators(scored):
    influence, query, train = scored
    for name, old, new in (("EKFAC", "rotated", "rotate"), ("RandomProjection", "projected_block", "project_block")):
        fitted = Influence(influence.model, curvature=getattr(fastif, name)(), progress=False).fit(train)
        estimator, passes = fitted.curvature["0"], fitted.passes
        block = () if name == "EKFAC" else ("0",)
        with passes.running(None):
            ((_, _, gradients),) = passes.gradients(query, "queries")
        want = getattr(estimator, new)(*block, gradients["0"])
        with renamed(f"{name}.{old}", f"{name}.{new}"):
            found = getattr(estimator, old)(*block, gradients["0"])
        if name == "EKFAC":
            want, found = want.formed(), found.formed()
            with renamed("EKFAC.unrotated", "EKFAC.unrotate"):
                assert torch.equal(estimator.unrotated(want), estimator.unrotate(want))
        else:
            with renamed("RandomProjection.projected", "RandomProjection.project"):
                assert torch.equal(estimator.projected(gradients), estimator.project(gradients))
        assert torch.equal(found, want)


def test_approximations_of_low_rank():
    matrices = torch.randn(3, 1, 4, 5)
    with renamed("LowRank.of", "LowRank.approximate"):
        found = fastif.curvature.LowRank.of(matrices, 2)
    assert torch.equal(found.left, fastif.curvature.LowRank.approximate(matrices, 2).left)
