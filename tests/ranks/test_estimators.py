"""Every estimator on two ranks answers as one process does, to the rounding of sums, and the same each time."""

import copy
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fastif import EKFAC, Arnoldi, Automatic, DataInf, ExactBlock
from tests.curvature.test_language_models import tagger
from tests.helpers.by_hand import problem
from tests.helpers.crew import Crew
from tests.ranks.cases import ESTIMATORS, answers, fit_answers, fit_late, parts_of_data

ROUNDING = 1e-9  # relative to the largest answer; sums of float64 differ by n ε = 5e-15 and solves amplify that


def compare(got, want, rounding=ROUNDING):
    for key in want:
        if key in ("traffic", "state"):
            continue
        if key == "indices":
            assert torch.equal(got[key], want[key])
            continue
        scale = float(want[key].abs().max())
        assert got[key].shape == want[key].shape, key
        assert float((got[key] - want[key]).abs().max()) <= rounding * scale, key


@pytest.mark.parametrize("name", ESTIMATORS)
def test_two_ranks_answer_as_one_process(two, name):
    want = answers(name)
    first, second = two(answers, name)
    compare(first, want, 1e-6 if name == "arnoldi" else ROUNDING)
    for key in want:
        if key not in ("traffic", "state"):
            assert torch.equal(first[key], second[key]), key
    assert all(torch.equal(a, b) for a, b in zip(first["state"], second["state"], strict=True))
    assert sum(first["traffic"]) > 0
    assert want["traffic"] == (0, 0)
    if name in ("ekfac", "kfac monte carlo"):
        again, _ = two(answers, name)
        assert all(torch.equal(again[key], first[key]) for key in ("scores", "self", "moved"))


def test_positions_float32_and_other_kinds_of_data_come_to_the_same(two):
    for kind in ("words", "pixels"):
        compare(two(answers, "ekfac", kind)[1], answers("ekfac", kind))
    model, (x, y), _ = problem("mlp")
    single = copy.deepcopy(model).float(), (x.float(), y)
    for (net, data), rounding in (((model, (x, y)), ROUNDING), (single, 1e-5)):
        rows = list(zip(data[0].split([5, 1, 7, 7, 4]), data[1].split([5, 1, 7, 7, 4]), strict=True))
        for source in (rows, TensorDataset(*data), DataLoader(TensorDataset(*data), batch_size=7)):
            for estimator in (EKFAC(1e-2, "monte_carlo"), DataInf(1e-2)):
                want = fit_answers(source, net, estimator, (data[0][:4], data[1][:4]), batch_size=7)
                got = two(fit_answers, source, net, estimator, (data[0][:4], data[1][:4]))[0]
                for key in ("scores", "self"):
                    assert torch.allclose(got[key], want[key], rtol=0, atol=rounding * float(want[key].abs().max()))


def test_labels_drawn_for_texts_are_those_of_one_process(two):
    model, data = tagger()
    for curvature in (Automatic(1e-2, share=1e-5), ExactBlock(1e-2, fisher="monte_carlo")):
        how = dict(query=(data[0][:3], data[1][:3]), loss="causal_lm", batch_size=5)
        want = fit_answers(data, model, curvature, **how)
        for got in two(partial(fit_answers, **how), data, model, curvature):
            for key in ("scores", "self"):
                assert torch.allclose(got[key], want[key], rtol=0, atol=ROUNDING * float(want[key].abs().max()))


def test_weighted_subsets_networks_and_checkpoints(two):
    for options in (dict(subset=True), dict(networks=True), dict(checkpoints=True)):
        want, (first, second) = parts_of_data(**options), two(partial(parts_of_data, **options))
        compare(first, want)
        assert torch.equal(first["scores"], second["scores"])


@pytest.mark.parametrize(("n", "batch_size"), [(3, 5), (7, 3), (1, 1)])
def test_few_examples_and_ranks_that_get_none(two, n, batch_size):
    model, (x, y), _ = problem("mlp")
    data = x[:n], y[:n]
    for estimator in (EKFAC(1e-2), DataInf(1e-2), ExactBlock(1e-2), Arnoldi(2, 1e-2, tolerance=1e-6)):
        want = fit_answers(data, model, estimator, (x[:1], y[:1]), batch_size=batch_size)
        got, _ = two(partial(fit_answers, batch_size=batch_size), data, model, estimator, (x[:1], y[:1]))
        for key in ("scores", "self"):
            assert torch.allclose(got[key], want[key], rtol=0, atol=1e-6 * float(want[key].abs().max()))


def test_a_layer_that_one_rank_meets_late_is_taken_up_by_all(two):
    want = fit_late()
    for got in two(fit_late):
        assert got["blocks"] == want["blocks"]
        assert any(name.startswith("rare") for name in got["blocks"])
        assert torch.allclose(got["scores"], want["scores"], rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4])
def test_more_ranks_answer_as_one_process(world):
    crew = Crew(world, 60)
    try:
        for name in ESTIMATORS:
            want, got = answers(name), crew(answers, name)
            compare(got[-1], want, 1e-6 if name == "arnoldi" else ROUNDING)
            assert all(torch.equal(one["scores"], got[0]["scores"]) for one in got)
            again = crew(answers, name)
            assert torch.equal(again[0]["scores"], got[0]["scores"])
            assert torch.equal(again[0]["self"], got[0]["self"])
    finally:
        crew.dismiss()
