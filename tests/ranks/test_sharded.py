"""A model that ranks hold in parts answers as the whole one does on one process, and as often as it is asked."""

from functools import partial

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from tests.helpers.crew import TIMEOUT, Crew
from tests.ranks.sharded_cases import (
    answers,
    brief_answers,
    failing_backward,
    failing_layer,
    failing_loss,
    gathered_bytes,
    mixed_precision,
    moved_state,
    on_mesh,
    planned_and_moved,
    refusals,
    sampled,
)
from tests.ranks.test_estimators import compare

pytestmark = pytest.mark.usefixtures("one_thread")
MADE_OF_GRADIENTS = ["kfac", "ekfac", "diagonal", "kfac monte carlo", "exact", "data inf", "projection", "auto"]


def hold(got, want):
    assert got.pop("covered") == want["covered"]
    state = got.pop("state")
    compare(got, {key: value for key, value in want.items() if key != "covered"})
    assert [value.shape for value in state] == [value.shape for value in want["state"]]


@pytest.mark.parametrize("name", MADE_OF_GRADIENTS)
def test_a_sharded_model_answers_as_a_whole_one(two, name):
    want = brief_answers(name)
    first, second = two(brief_answers, name)
    assert torch.equal(first["scores"], second["scores"])
    hold(first, want)


@pytest.mark.parametrize(
    ("n", "q", "kind"), [(11, 3, "layers"), (3, 1, "layers"), (9, 2, "bare"), (9, 3, "words"), (9, 1, "pixels")]
)
def test_ranks_with_fewer_batches_or_none_go_along(two, n, q, kind):
    want = answers("ekfac", n, q, kind)
    first, second = two(answers, "ekfac", n, q, kind)
    assert all(torch.equal(first[key], second[key]) for key in want if key not in ("covered", "state"))
    hold(second, want)


def test_states_folders_and_checkpoints_are_those_of_a_whole_model(two, tmp_path):
    written, _, state = moved_state(str(tmp_path / "one"), None)
    for folder in ("two", "one"):  # the whole model's folder is that of the sharded one, too
        for got in two(moved_state, str(tmp_path / folder), state):
            assert torch.allclose(got[0], got[1], rtol=0, atol=1e-12 * float(written.abs().max()))
            assert torch.allclose(got[0], written, rtol=0, atol=1e-9 * float(written.abs().max()))
    want = moved_state(str(tmp_path / "three"), None, True)
    for got in two(moved_state, str(tmp_path / "four"), None, True):
        for a, b in zip(got[:2], want[:2], strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-9 * float(b.abs().max()))


def test_a_sampler_sees_the_features_of_a_sharded_model(two):
    (indices, scores), found = sampled(), two(sampled)
    for got in found:
        assert torch.equal(got[0], indices)
        assert torch.allclose(got[1], scores, rtol=0, atol=1e-9 * float(scores.abs().max()))


def test_what_a_sharded_model_cannot_do_is_refused_on_all_ranks(two, tmp_path):
    for said in two(refusals, str(tmp_path / "index")):
        for name, kind in (("cg", "CG"), ("lissa", "LiSSA"), ("arnoldi", "Arnoldi"), ("hessian", "ExactBlock")):
            assert said[name].startswith(f"Influence: {kind} differentiates by parameters, of which each rank holds a")
        assert "is held in parts by 2 ranks, which can plan for themselves alone, got ranks=5" in said["plan"]
        for name in ("copy", "index", "remove", "remove all", "replay"):
            assert "is a DTensor, of which each rank has a part" in said[name], name
            assert "get_model_state_dict" in said[name]
        assert (
            "'first.weight' is a DTensor placed as (Shard(dim=0)), which fully_shard alone" in said["tensor parallel"]
        )
        assert "wrapped by FullyShardedDataParallel" in said["FSDP1"]
        assert "was sharded after this Influence was made" in said["sharded later"]
        assert "is held in parts by ranks 0, 1, and the work is divided among" in said["group"]


def test_an_error_of_one_rank_between_passes_ends_all(two):
    two.begin(failing_loss)
    first, second = two.end()
    assert second.text.startswith("a loss that fails on one rank") or "on rank 1" in second.text
    assert "a loss that fails on one rank" in first.text
    assert torch.equal(*[got["scores"] for got in two(answers, "ekfac")])  # and all can go on


@pytest.mark.parametrize("name", ["middle.0", "first"])
def test_an_error_within_a_pass_of_one_rank_ends_all_at_once(two, name):
    want = failing_layer(name)
    assert want[0] == ["a layer that fails on one rank"] * 2
    for said, scores in two(failing_layer, name):
        assert len(said) == 2
        assert all(one.endswith("a layer that fails on one rank") for one in said)  # and not that the time is over
        assert torch.allclose(scores, want[1], rtol=0, atol=1e-9 * float(want[1].abs().max()))


@pytest.mark.parametrize(
    ("name", "kind", "call", "whole"),
    [
        ("middle.0", "layers", 4, True),
        ("middle.1", "layers", 2, True),
        ("head", "layers", 3, True),
        ("middle.1", "bare", 7, True),
        ("middle.1", "layers", 4, False),
    ],
)
def test_an_error_in_a_backward_pass_of_one_rank_ends_all_at_once(two, name, kind, call, whole):
    _, _, want = failing_backward(name, kind, 0)
    for said, took, scores in two(failing_backward, name, kind, call, whole):
        assert said.endswith("a layer that fails on one rank")
        assert took < 0.8 * TIMEOUT  # which torch would wait
        assert torch.allclose(scores, want, rtol=0, atol=1e-9 * float(want.abs().max()))  # and all can go on


def test_whole_layers_do_not_stand_all_at_once(two):
    for most, total, of_blocks in two(gathered_bytes):
        assert 0 < most <= total - min(of_blocks)


@pytest.mark.parametrize(
    ("name", "kind", "how"),
    [
        ("ekfac", "layers", {}),
        ("kfac", "bare", {}),
        ("ekfac", "layers", {"whole": False}),
        ("exact", "layers", {"reshard_after_forward": False}),
        ("kfac monte carlo", "layers", {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}),
    ],
    ids=str,
)
def test_a_plan_of_a_sharded_model(two, name, kind, how):
    for plan, held, moved, received in two(partial(planned_and_moved, **how), name, kind):
        assert plan.curvature_bytes == held or name == "exact"  # which holds a factor, too
        assert plan.model_received == received > 0
        assert moved == pytest.approx((plan.fit_sent, plan.fit_received), rel=0.1, abs=64)
        assert "MiB of the model" in str(plan)


def test_layers_that_are_gathered_in_16_bits(two):
    want = mixed_precision("none")
    for kind, rounding in (("none", 1e-4), ("policy", 0.1)):
        for got in two(mixed_precision, kind):
            assert torch.allclose(got.float(), want, rtol=0, atol=rounding * float(want.abs().max()))


@pytest.mark.parametrize("shape", [(1, 2), (2, 1)])
def test_copies_of_a_sharded_model(two, shape):
    want = on_mesh(shape)
    for got in two(on_mesh, shape):
        assert torch.allclose(got, want, rtol=0, atol=1e-9 * float(want.abs().max()))


@pytest.mark.slow
def test_one_rank_three_ranks_and_four():
    for world, shape in ((1, (1,)), (3, (3,)), (4, (2, 2))):
        crew = Crew(world, 60)
        try:
            for name in MADE_OF_GRADIENTS if world == 3 else ["ekfac", "exact"]:
                for n, q, kind in ((23, 2, "layers"), (5, 1, "bare"), (3, 3, "layers")):
                    want = answers(name, n, q, kind)
                    for got in crew(answers, name, n, q, kind):
                        hold(got, want)
            if world > 1:
                want = on_mesh(shape)
                for got in crew(on_mesh, shape):
                    assert torch.allclose(got, want, rtol=0, atol=1e-9 * float(want.abs().max()))
        finally:
            crew.dismiss()
