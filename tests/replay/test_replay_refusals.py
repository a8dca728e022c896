"""What a replay refuses, and what it warns of: trainings that it cannot run again, kinks, arguments that do not fit."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastif import Diverged
from fastif.replay import NotReproduced, Replay, TrainingLog
from tests.helpers.trainings import OPTIMIZERS, network, recorded
from tests.replay.test_replay import EXAMPLES, ORDER, QUERY, linear, replayed


def clipped(model, optimizer, log, order):
    x, y = EXAMPLES
    for number, rows in enumerate(order):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        if number == 4:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        log.step(optimizer, rows)


def test_a_training_that_is_not_reproduced_is_refused_with_its_step():
    model = network()
    log = TrainingLog(model)
    clipped(model, torch.optim.SGD(model.parameters(), lr=0.1), log, ORDER)
    with pytest.raises(
        NotReproduced, match=r"in step 4 the gradient's norm is .*, the log has 0.00999.*; likely causes: clipped"
    ):
        replayed(log, model).scores(QUERY)

    model, log = recorded(OPTIMIZERS["Nesterov"], EXAMPLES, ORDER)
    noisy = EXAMPLES[0] + 1e-3 * torch.randn(24, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(NotReproduced, match="in step 0 .*augmentation"):
        Replay(log, model, (noisy, EXAMPLES[1]), progress=False).scores(QUERY)
    with pytest.raises(NotReproduced, match="in step 0 .*another loss"):
        replayed(log, model, loss=lambda out, y: F.cross_entropy(out, y, reduction="none") ** 2).scores(QUERY)
    weights = torch.linspace(0.5, 1.5, 24, dtype=torch.float64)
    model, log = recorded(OPTIMIZERS["Nesterov"], EXAMPLES, ORDER, weights=weights)
    with pytest.raises(NotReproduced, match="weights that log.step was not given"):
        replayed(log, model).scores(QUERY)


def test_parameters_that_others_moved_are_refused():
    model = network()
    log = TrainingLog(model, every=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = EXAMPLES
    for number, rows in enumerate(ORDER):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        log.step(optimizer, rows)
        if number == 5:
            with torch.no_grad():
                model[2].bias.add_(1e-4)  # the same gradient's norm within rounding it is not, but the place is worse
    with pytest.raises(NotReproduced, match="after step 5 the parameters differ by up to 0.0001 .*outside"):
        replayed(log, model).scores(QUERY)


def test_a_forward_pass_that_draws_is_refused():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 3)

        def forward(self, x):
            return self.head(F.dropout(x, 0.5, self.training))

    model, log = recorded(OPTIMIZERS["momentum"], EXAMPLES, ORDER, build=lambda: Noisy().double())
    with pytest.raises(ValueError, match="draws at random"):
        replayed(log, model).scores(QUERY)


def test_an_explosion_is_an_error_with_step_and_norm():
    model, examples = linear(), (EXAMPLES[0], EXAMPLES[0])
    log, optimizer = TrainingLog(model), torch.optim.SGD(model.parameters(), lr=2.0)
    for rows in ORDER:  # steps beyond 2/λ: it runs away, and so does its derivative
        optimizer.zero_grad()
        (model(EXAMPLES[0][rows]) - EXAMPLES[0][rows]).square().sum(1).mean().backward()
        log.step(optimizer, rows)
    replay = Replay(log, model, examples, loss="mse", max_growth=100, progress=False)
    with pytest.raises(Diverged, match=r"before step \d+ an adjoint's norm is .*max_growth=100 times .* at the end"):
        replay.scores((QUERY[0], QUERY[0]))
    model, log = recorded(OPTIMIZERS["momentum"], EXAMPLES, ORDER)
    replay = replayed(log, model)
    replay.scores(QUERY)
    (norms,) = replay.adjoint_norms
    assert norms.shape == (13,)
    assert bool((norms > 0).all())


def test_kinks_warn_once_with_the_hessian():
    model, log = recorded(OPTIMIZERS["momentum"], EXAMPLES, ORDER, build=lambda: network(nn.ReLU))
    replay = replayed(log, model, matrix="hessian")
    with pytest.warns(UserWarning, match=r"bends sharply \(relu\)") as said:
        replay.scores(QUERY)
    assert [warning.filename for warning in said] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replay.scores(QUERY)
        replayed(log, model).scores(QUERY)


class _Shifted(nn.Module):
    """Its shift is added to all logits, so that its gradient is zero but for rounding."""

    def __init__(self):
        super().__init__()
        self.inner, self.shift = network(), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.inner(x) + self.shift


@pytest.mark.parametrize("away", [0.0, 3e-4])
def test_adams_steps_along_gradients_that_are_rounding_are_not_held_against_the_log(away):
    """Another summation's rounding, as that of a Trainer's own loss: Adam makes whole steps of it."""
    torch.manual_seed(0)
    model = _Shifted().float()
    examples = EXAMPLES[0].float(), EXAMPLES[1]
    log, optimizer = TrainingLog(model, every=4), torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step, rows in enumerate(ORDER[:8]):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(examples[0][rows]), examples[1][rows]).backward()
        model.shift.grad.copy_(torch.tensor([3e-8 * (-1) ** step]))
        log.step(optimizer, rows)
        if away and step == 6:
            with torch.no_grad():
                model.inner[0].weight[0, 0] += away
    moved = float((log.final.at - log.point(1).at).abs().max())
    replay = Replay(log, model, examples, progress=False)
    if away:
        with pytest.raises(NotReproduced, match="after step 7 the parameters differ"):
            replay.verify()
        return
    assert abs(float(model.shift.detach())) > 1e-2 * moved
    assert max(replay.verify()) < 1e-4


def test_what_does_not_fit_together_is_refused():
    model, log = recorded(OPTIMIZERS["momentum"], EXAMPLES, ORDER)
    with pytest.raises(ValueError, match=r"the log is of another model: '0.weight' is \[5, 3\] in the log, \[4, 3\]"):
        replayed(log, network(width=4))
    with pytest.raises(ValueError, match="the log is of torch.float64, the model is torch.float32"):
        replayed(log, network().float())
    with pytest.raises(ValueError, match="the model is not what the log ended with: '0.weight' differs by"):
        replayed(log, network())
    with pytest.raises(ValueError, match=r"rows must be in \[0, n=20\), got 23"):
        Replay(log, model, (EXAMPLES[0][:20], EXAMPLES[1][:20]))
    with pytest.raises(ValueError, match="matrix must be 'ggn' or 'hessian', got 'fisher'"):
        replayed(log, model, matrix="fisher")
    with pytest.raises(ValueError, match="logs must be a TrainingLog or several"):
        replayed([], model)
    with pytest.raises(ValueError, match="no step was recorded"):
        replayed(TrainingLog(model), model)
    with pytest.raises(ValueError, match="train must be the data that the replay was made with"):
        replayed(log, model).scores(QUERY, QUERY)
    with pytest.raises(ValueError, match=r"top: k must be an integer in \[1, n=24\], got k=25"):
        replayed(log, model).top(QUERY, EXAMPLES, 25)


def test_the_model_is_left_as_it_is():
    model, log = recorded(OPTIMIZERS["momentum"], EXAMPLES, ORDER)
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    replayed(log, model).scores(QUERY)
    assert (model.training, model[1].training) == (True, False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
