"""What a state says about its fit, and what is refused because of it."""

import functools
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastif import EKFAC, Diagonal, ExactBlock, Influence
from tests.helpers.networks import Apply


def batch():
    g = torch.Generator().manual_seed(0)
    return torch.randn(12, 4, generator=g, dtype=torch.float64), torch.arange(12) % 3


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def fitted(loss="cross_entropy", curvature=None, model=None, **options):
    return influence(loss, curvature, model, **options).fit(batch())


def influence(loss="cross_entropy", curvature=None, model=None, **options):
    curvature = EKFAC(1e-2) if curvature is None else curvature
    return Influence(model or small(), loss, curvature, progress=False, **options)


def smoothed(outputs, y, smoothing=0.1):
    return F.cross_entropy(outputs, y, reduction="none", label_smoothing=smoothing)


def closed_over(weights):
    def weighted(outputs, y):
        return F.cross_entropy(outputs, y, weights, reduction="none")

    return weighted


class Focal:
    def __init__(self, gamma):
        self.gamma = gamma

    def __call__(self, outputs, y):
        losses = F.cross_entropy(outputs, y, reduction="none")
        return (1 - (-losses).exp()) ** self.gamma * losses


ONES = torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kept", "given", "message"),
    [
        ("cross_entropy", "token_cross_entropy", r"loss 'cross_entropy', not with 'token_cross_entropy'"),
        ("cross_entropy", smoothed, r"loss 'cross_entropy', not with the function smoothed"),
        (smoothed, "cross_entropy", r"loss the function smoothed, not with 'cross_entropy'"),
        (
            lambda o, y: smoothed(o, y),
            lambda o, y: -smoothed(o, y),
            r"another loss than the function .*<lambda>: its code",
        ),
        (
            closed_over(ONES),
            closed_over(2 * ONES),
            r"another loss than the function closed_over\.<locals>\.weighted: its",
        ),
        (Focal(2.0), Focal(1.0), r"another loss than the function Focal: its code, or what that reads or"),
        (functools.partial(smoothed, smoothing=0.1), functools.partial(smoothed, smoothing=0.2), r"another loss than"),
    ],
)
def test_a_state_of_another_loss_is_refused(kept, given, message):
    curvature = EKFAC(1e-2, fisher="empirical")
    state = fitted(kept, curvature).state_dict()
    with pytest.raises(ValueError, match=f"load_state_dict: the state was fitted with {message}"):
        influence(given, curvature).load_state_dict(state)
    want = fitted(kept, curvature).scores(batch(), batch())
    assert torch.equal(influence(kept, curvature).load_state_dict(state).scores(batch(), batch()), want)
    del state["fit"]
    influence(given, curvature).load_state_dict(state)  # for who knows better


def test_equal_functions_are_one_loss_wherever_they_were_made():
    def opened(loss, other):
        """Scores of a state that was fitted with one of two losses, loaded with the other, and of the fit itself."""
        own = fitted(loss)
        loaded = influence(other).load_state_dict(own.state_dict())
        return loaded.scores(batch(), batch()), own.scores(batch(), batch())

    assert torch.equal(*opened(closed_over(ONES), closed_over(ONES.clone())))
    code = compile("def smoothed(outputs, y):\n    return F.cross_entropy(outputs, y, reduction='none')\n", "a", "exec")
    spaces = [{"F": F, "__name__": "__main__"}, {"F": F, "__name__": "train"}]
    for space in spaces:  # trained as a script, and imported from it
        exec(code, space)
    assert torch.equal(*opened(spaces[0]["smoothed"], spaces[1]["smoothed"]))


def test_what_cannot_be_told_is_said():
    state = fitted(smoothed).state_dict()
    kept = json.loads(bytes(state["fit"].tolist()))
    kept["loss"]["python"] = "3.9"
    other = {**state, "fit": torch.tensor(list(json.dumps(kept).encode()), dtype=torch.uint8)}
    with pytest.warns(
        UserWarning, match=r"whether the state was fitted with this loss, .* smoothed, .* by Python 3\.9"
    ):
        influence(smoothed).load_state_dict(other)
    file = open(__file__)  # noqa: SIM115

    def reading(outputs, y):
        assert not file.closed
        return smoothed(outputs, y)

    state = fitted(reading).state_dict()
    with pytest.warns(UserWarning, match=r"cannot be told: loss.* is a _io.TextIOWrapper") as said:
        influence(reading).load_state_dict(state)
    assert [warning.filename for warning in said] == [__file__]
    file.close()


@pytest.mark.parametrize(
    ("kept", "given", "message"),
    [
        (EKFAC(1e-2), EKFAC(1e-2, fisher="empirical"), r"EKFAC\(fisher='exact'\), not by EKFAC\(fisher='empirical'\)"),
        (Diagonal(1e-2), Diagonal(1e-2, "monte_carlo"), r"Diagonal\(fisher='exact'\), not by .*'monte_carlo'"),
        (ExactBlock(1e-2), ExactBlock(1e-2, "empirical_fisher"), r"ExactBlock\(matrix='ggn'\), not by .*'empirical_fi"),
    ],
)
def test_a_state_of_another_matrix_is_refused(kept, given, message):
    state = fitted(curvature=kept).state_dict()
    with pytest.raises(ValueError, match=rf"load_state_dict: the state of .* was fitted by {message}"):
        influence(curvature=given).load_state_dict(state)
    influence(curvature=type(kept)(0.5)).load_state_dict(state)  # damping comes later


def test_checkpoints_are_those_of_the_fit():
    model = small()
    states = [{k: v * (1 + i) for k, v in model.state_dict().items()} for i in range(2)]
    made = fitted(model=model, checkpoints=states)
    state = made.state_dict()
    influence(model=model, checkpoints=[dict(s) for s in states]).load_state_dict(state)
    with pytest.raises(ValueError, match=r"4 of 8 tensors changed, '0\.weight of checkpoint 1' first"):
        influence(model=model, checkpoints=[states[0], states[0]]).load_state_dict(state)
    states[1]["0.bias"] += 1
    with pytest.raises(ValueError, match=r"1 of 8 tensors changed, '0\.bias of checkpoint 1' first"):
        made.scores(batch(), batch())


# ------------------------------------------------------------------------------------------------------------- buffers


def scaled():
    """A head whose logits are divided by a temperature that its state_dict leaves out."""
    model = Apply(lambda m, x: m.head(x) / m.temperature, head=nn.Linear(4, 3)).double()
    model.register_buffer("temperature", torch.tensor(2.0, dtype=torch.float64), persistent=False)
    return model


def test_a_buffer_outside_the_state_dict_that_changed_is_refused():
    torch.manual_seed(0)
    model = scaled()
    made = fitted(model=model)
    state = made.state_dict()
    model.temperature.fill_(3.0)
    message = (
        r"not that of the fit: its buffer 'temperature', which its state_dict leaves out .*; put it back, or call fit"
    )
    with pytest.raises(ValueError, match=message):
        made.scores(batch(), batch())
    with pytest.raises(ValueError, match=message):
        influence(model=model).load_state_dict(state)
    model.temperature = torch.tensor(2.0, dtype=torch.float64)
    want = made.scores(batch(), batch())
    assert torch.equal(influence(model=model).load_state_dict(state).scores(batch(), batch()), want)


class Counting(nn.Module):
    """Counts its calls, and keeps a table that grows with the longest input and one that every call makes anew."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3).double()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("table", torch.zeros(0, dtype=torch.float64), persistent=False)
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64), persistent=False)

    def forward(self, x):
        self.calls += 1
        self.mean = x.mean()
        if len(self.table) < x.shape[1]:
            self.table = torch.ones(x.shape[1], dtype=torch.float64)
        return self.head((x * self.table[: x.shape[1]]).unflatten(1, (-1, 4)).mean(1))


def test_caches_and_counters_are_no_weights():
    model = Counting()
    made = fitted(model=model)
    state = made.state_dict()
    with torch.no_grad():
        model(torch.randn(3, 8, dtype=torch.float64))  # the table grows
    long = torch.randn(3, 12, dtype=torch.float64), torch.arange(3)
    assert made.scores(long, batch()).shape == (3, 12)
    assert torch.equal(made.scores(batch(), batch()), made.scores(batch(), batch()))
    influence(model=fresh_copy(model)).load_state_dict(state)


def fresh_copy(model):
    fresh = Counting()
    fresh.load_state_dict(model.state_dict())
    return fresh
