"""K-FAC and EK-FAC scores, held against kronfluence module by module.

kronfluence's loss is the sum over the examples, so that its scores are n times ours. For t positions its K-FAC divides
both covariances by their number, A ⊗ B / t in our terms: with the damping divided by t as well its scores are t times
ours. EK-FAC's eigenvalues are the curvature's own, with nothing to choose.
"""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fastif import EKFAC, KFAC, Influence

pytest.importorskip("kronfluence", reason="kronfluence is not installed (make test installs it)")
pytestmark = pytest.mark.filterwarnings("ignore")

N, QUERIES, DAMPING = 40, 6, 2e-3


def _sequence(t):
    layers = nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(3 * t, 3)
    return nn.Sequential(*layers)


MODELS = {  # model, shape of an example, positions of each module
    "mlp": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)),
        (6,),
        {"0": 1, "2": 1, "4": 1},
    ),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 5, 4, bias=False),
            nn.Flatten(),
            nn.Linear(5, 3),
        ),
        (2, 8, 8),
        {"0": 16, "2": 1, "4": 1},
    ),
    "positions": (lambda: _sequence(7), (7, 5), {"0": 7, "2": 7, "5": 1}),
}


def problem(name):
    torch.manual_seed(0)
    build, shape, positions = MODELS[name]
    model = build().double()
    return model, torch.randn(N, *shape, dtype=torch.float64), torch.arange(N) % 3, positions


def kronfluence_scores(model, x, y, strategy, damping, folder, own=True):
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    logging.disable(logging.CRITICAL)
    try:
        model = prepare_model(copy.deepcopy(model), Classification())
        analyzer = Analyzer("t", model, Classification(), cpu=True, disable_tqdm=True, output_dir=str(folder))
        double = torch.float64
        factors = FactorArguments(
            strategy=strategy,
            use_empirical_fisher=True,
            activation_covariance_dtype=double,
            gradient_covariance_dtype=double,
            eigendecomposition_dtype=double,
            per_sample_gradient_dtype=double,
            lambda_dtype=double,
        )
        train, query = TensorDataset(x, y), TensorDataset(x[:QUERIES], y[:QUERIES])
        options = {"overwrite_output_dir": True}
        analyzer.fit_all_factors("f", train, per_device_batch_size=32, factor_args=factors, **options)
        arguments = ScoreArguments(
            damping_factor=damping,
            compute_per_module_scores=True,
            per_sample_gradient_dtype=double,
            score_dtype=double,
            precondition_dtype=double,
        )
        analyzer.compute_pairwise_scores(
            "s",
            "f",
            query,
            train,
            per_device_query_batch_size=8,
            per_device_train_batch_size=32,
            score_args=arguments,
            **options,
        )
        pairwise = analyzer.load_pairwise_scores("s")
        if not own:
            return pairwise, {}
        analyzer.compute_self_scores(
            "self", "f", train, per_device_train_batch_size=32, score_args=arguments, **options
        )
        return pairwise, analyzer.load_self_scores("self")
    finally:
        logging.disable(logging.NOTSET)


def close(got, want):
    return (got - want).abs().max() <= 1e-8 * want.abs().max()


@pytest.mark.parametrize("name", list(MODELS))
def test_ekfac(name, tmp_path):
    model, x, y, positions = problem(name)
    pairwise, own = kronfluence_scores(model, x, y, "ekfac", DAMPING, tmp_path)
    influence = Influence(model, curvature=EKFAC(DAMPING, "empirical"), layers="*", progress=False).fit((x, y))
    scores = influence.scores((x[:QUERIES], y[:QUERIES]), (x, y), by="layer")
    whole = influence.scores((x, y), (x, y), by="layer")
    assert set(pairwise) == set(own) == set(scores) == set(positions)
    for module in positions:
        assert close(N * scores[module], pairwise[module].double()), module
        assert close(N * whole[module].diagonal(), own[module].double()), module
    assert close(N * influence.self_influence((x, y)), sum(own.values()))


@pytest.mark.parametrize("name", list(MODELS))
def test_kfac(name, tmp_path):
    model, x, y, positions = problem(name)
    for t in dict.fromkeys(positions.values()):
        pairwise, _ = kronfluence_scores(model, x, y, "kfac", DAMPING / t, tmp_path / str(t), own=False)
        influence = Influence(model, curvature=KFAC(DAMPING, "empirical"), layers="*", progress=False).fit((x, y))
        scores = influence.scores((x[:QUERIES], y[:QUERIES]), (x, y), by="layer")
        for module in (module for module, number in positions.items() if number == t):
            assert close(t * N * scores[module], pairwise[module].double()), (module, t)
