"""The influence step with the head refitted behind it, against its definition in float64, docs/math.md (33)."""

import copy
import time
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastif import EKFAC, Certificate, ExactBlock, extract, remove, samplers
from fastif.removal import below, head_steps, optimal_head
from fastif.removal.head import RetainedHead
from fastif.removal.refit import LENGTHS, Refit, RefittedNetwork, longest
from tests.helpers.problems import QUIET, REMOVED, WEIGHT_DECAY, clusters, flat, small_images, sure, trained
from tests.removal.test_removal_layers import dense, kept_of, loaded, objective

EXACT = ExactBlock(0.02, joint=True)
NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.fixture(scope="module")
def problem():
    return trained()


def refitted(problem, removed=REMOVED, **how):
    model, x, y = problem
    return remove(model, (x, y), removed, **{"layers": "*", "refit_head": True, **QUIET, **how})


def mean_loss(model, x, y, rows):
    with torch.no_grad():
        return float(cross_entropy(model(x[rows]), y[rows]))


# ----------------------------------------------------------------------------------------------------------- definition


def test_the_layers_take_formula_3_at_a_length_of_the_ladder(problem):
    theta, removed, _, curvature = dense(problem.model, problem.x, problem.y, NAMES, kept_of(90))
    curvature.diagonal().add_(WEIGHT_DECAY + 0.02)
    step = torch.linalg.solve(curvature, removed)
    removal = refitted(problem, curvature=EXACT)
    (length,) = set(removal.history[0].step_size.values())
    assert length in LENGTHS[1:]
    assert torch.allclose(flat(removal.history[0].parameters), theta + length * step, atol=1e-12)
    for number, entry in enumerate(removal.history):
        assert entry.step == number + 1
        state = {**removal.after(number + 1)}
        model = copy.deepcopy(problem.model)
        model.load_state_dict(state)
        assert entry.objective == pytest.approx(objective(model, problem.x, problem.y, kept_of(90), NAMES), abs=1e-12)
        if number:
            assert entry.step_size.keys() == {"2"}
            assert torch.equal(state["0.weight"], removal.after(1)["0.weight"])
    assert all(torch.equal(removal.after(0)[name], p) for name, p in problem.model.named_parameters())


def test_seconds_are_counted_once(problem, monkeypatch):
    """The head's steps behind the length that is taken are entries of their own."""
    gradient = RetainedHead.gradient
    monkeypatch.setattr(RetainedHead, "gradient", lambda head: time.sleep(0.02) or gradient(head))
    begun = time.perf_counter()
    removal = refitted(problem, (problem.y == 1).nonzero()[:, 0])
    assert sum(entry.seconds for entry in removal.history) <= time.perf_counter() - begun
    assert all(entry.seconds > 0 for entry in removal.history)


def test_it_foretells_the_removed_loss_to_first_order(problem):
    """ℓ_R + (1/|R|) Σ_R ∇ℓ · step, and the slope of the loss along the step by differences."""
    network = RefittedNetwork(
        problem.model, (problem.x, problem.y), REMOVED, layers="*", curvature=EXACT, weight_decay=WEIGHT_DECAY
    )
    network.gradient()
    network.curvature()
    _, foretold = network.influence_step()
    theta, removed, _, curvature = dense(problem.model, problem.x, problem.y, NAMES, kept_of(90))
    curvature.diagonal().add_(WEIGHT_DECAY + 0.02)
    step = torch.linalg.solve(curvature, removed)
    before = mean_loss(problem.model, problem.x, problem.y, REMOVED)
    assert foretold == pytest.approx(before + 90 * float(removed @ step) / len(REMOVED), abs=1e-12)
    model, tiny = copy.deepcopy(problem.model), 1e-6
    nn.utils.vector_to_parameters(theta + tiny * step, model.parameters())
    slope = (mean_loss(model, problem.x, problem.y, REMOVED) - before) / tiny
    assert foretold - before == pytest.approx(slope, rel=1e-4)


def test_the_head_is_that_of_the_moved_features(problem):
    """With steps enough it is the optimum that removal of the head alone has, given what the moved layers say."""
    removal = refitted(problem, curvature=EXACT, steps=30)
    moved = copy.deepcopy(problem.model)
    moved.load_state_dict(removal.after(1))
    features = moved[:2](problem.x).detach()
    best = optimal_head(features, problem.y, moved[2].weight, moved[2].bias, REMOVED, weight_decay=WEIGHT_DECAY)
    for key in ("weight", "bias"):
        assert torch.allclose(removal.state_dict[f"2.{key}"], best.parameters[key], atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_length_is_the_rules(seed):
    """All lengths by hand, with heads that are refitted to the optimum: the last before one of the two conditions."""
    problem = trained(seed=seed)
    model, x, y = problem
    theta, removed, _, curvature = dense(model, x, y, NAMES, kept_of(90))
    curvature.diagonal().add_(WEIGHT_DECAY + 0.02)
    step = torch.linalg.solve(curvature, removed)
    foretold = mean_loss(model, x, y, REMOVED) + 90 * float(removed @ step) / len(REMOVED)
    losses, kept = [], kept_of(90)
    for length in LENGTHS:
        own = copy.deepcopy(model)
        nn.utils.vector_to_parameters(theta + length * step, own.parameters())
        *_, last = head_steps(
            own[:2](x).detach(), y, own[2].weight, own[2].bias, REMOVED, weight_decay=WEIGHT_DECAY, steps=30
        )
        own[2].load_state_dict(last.parameters)
        losses.append((mean_loss(own, x, y, REMOVED), mean_loss(own, x, y, kept)))
    place = 0
    for number in range(1, len(LENGTHS)):
        (gone, stays), (gone_before, stays_before) = losses[number], losses[number - 1]
        if losses[0][0] >= foretold or gone > foretold or gone - gone_before <= 2 * (stays - stays_before):
            break
        place = number
    removal = refitted(problem, curvature=EXACT, steps=30)
    assert set(removal.history[0].step_size.values()) == {LENGTHS[place]}


def taken(*losses, foretold):
    return longest((Refit(length, {}, 0.0, 0.0, None, [], *of) for length, of in enumerate(losses)), foretold).length


def test_the_rule():
    assert taken((0.1, 0.1), (0.2, 0.1), (0.4, 0.1), (0.8, 0.1), foretold=0.5) == 2, "what is foretold is not passed"
    assert taken((0.1, 0.1), (0.2, 0.1), (0.5, 0.1), (0.8, 0.1), foretold=0.5) == 2
    assert taken((0.1, 0.1), (0.2, 0.1), (0.3, 0.2), (0.9, 0.2), foretold=5.0) == 1, (
        "as much from one as from the other"
    )
    assert taken((0.1, 0.1), (0.2, 0.1), (0.15, 0.0), (0.3, 0.0), foretold=5.0) == 3, "retained loss may fall"
    assert taken((0.7, 0.1), (0.8, 0.1), foretold=0.5) == 0, "the head alone has done it"


@pytest.mark.parametrize("second", [(0.2, 0.2), (0.9, 0.1)], ids=["harm", "too far"])
def test_a_step_that_is_not_taken_is_said(second):
    with pytest.warns(UserWarning, match=r"leaves the layers .* length 1 would take .* from 0.1 to .* 0.5 is foretold"):
        assert taken((0.1, 0.1), second, (1.0, 0.1), foretold=0.5) == 0


def test_that_no_step_leaves_a_network_is_said():
    said = r"leaves the layers .* length 0.25 no head is found.* examples to 0.1, where 0.5 is foretold"
    with pytest.warns(UserWarning, match=said):
        assert taken((0.1, 0.1), foretold=0.5) == 0


def test_a_loss_of_the_removed_that_is_not_finite_is_refused(problem):
    unknown = problem.x.clone()
    unknown[REMOVED[0]] = torch.nan
    with pytest.raises(ValueError, match="foretells a mean loss of nan of the removed examples, which is nan before"):
        refitted((problem.model, unknown, problem.y))


# ------------------------------------------------------------------------------------------------------ what it is for


def test_a_step_that_would_wreck_the_network_is_shortened():
    """The whole step, nearly undamped where the network is sure, raises the retained loss by far."""
    model, x, y = sure(seed=1)
    removed, kept = torch.arange(4), kept_of(60, torch.arange(4))
    how = dict(layers="*", weight_decay=1e-6, progress=False)
    curvature = ExactBlock(0.0, joint=True)
    whole = remove(model, (x, y), removed, curvature=curvature, steps=1, line_search=False, **how)
    assert mean_loss(loaded(model, whole), x, y, kept) > 10
    removal = remove(model, (x, y), removed, curvature=curvature, refit_head=True, **how)
    before, after = mean_loss(model, x, y, removed), loaded(model, removal)
    (length,) = set(removal.history[0].step_size.values())
    assert length < 1
    rise = mean_loss(after, x, y, kept) - mean_loss(model, x, y, kept)
    assert rise < 0.05
    assert mean_loss(after, x, y, removed) - before > rise


def test_a_length_for_whose_features_no_head_is_found_ends_the_search():
    """In float32 the head's block behind a quarter of the step is not positive definite."""
    model, x, y = sure(seed=1)
    model, x = model.float(), x.float()
    how = dict(layers="*", weight_decay=1e-6, progress=False, curvature=ExactBlock(0.0, joint=True))
    network = RefittedNetwork(
        model, (x, y), torch.arange(4), **{k: how[k] for k in ("layers", "weight_decay", "curvature")}
    )
    network.gradient()
    network.curvature()
    step, foretold = network.influence_step()
    (found,) = network.refits(step, 6)
    assert found.length == 0
    assert found.removed < foretold
    removal = remove(model, (x, y), torch.arange(4), refit_head=True, **how)
    assert set(removal.history[0].step_size.values()) == {0.0}


def test_a_class_is_the_heads(problem):
    """The head alone raises the removed loss beyond what is foretold: the layers below it stay, to the last bit."""
    gone = (problem.y == 1).nonzero()[:, 0]
    removal = refitted(problem, gone, curvature=EXACT)
    assert set(removal.history[0].step_size.values()) == {0.0}
    assert torch.equal(removal.state_dict["0.weight"], problem.model[0].weight)
    alone = remove(problem.model, (problem.x, problem.y), gone, **QUIET)
    assert torch.allclose(removal.state_dict["2.weight"], alone.state_dict["2.weight"], atol=1e-12)


def test_the_head_is_refitted_where_it_takes_no_influence_step(problem):
    removal = refitted(problem, layers="0")
    assert removal.history[0].step_size.keys() == {"0"}
    assert removal.history[-1].parameters.keys() == set(NAMES)
    assert not torch.equal(removal.state_dict["2.weight"], problem.model[2].weight)


def test_subsets_samplers_and_convolutions():
    model, x, y = small_images()
    how = dict(layers=["0.0", "1"], refit_head=True, **QUIET)
    found = [remove(model, (x, y), REMOVED, batch_size=size, **how) for size in (7, 60)]
    assert torch.allclose(*(flat(removal.history[-1].parameters) for removal in found), atol=1e-9)
    assert torch.equal(found[0].state_dict["0.1.weight"], model[0][1].weight)

    drawn = remove(model, (x, y), REMOVED, subset=partial(samplers.logit, k=28), **how)
    assert [entry.subset_size for entry in drawn.history[:3]] == [28, 28, 28]


def test_16_bits(problem):
    model = copy.deepcopy(problem.model).bfloat16()
    removal = remove(model, (problem.x.bfloat16(), problem.y), REMOVED, layers="*", refit_head=True, **QUIET)
    in_full = remove(
        model.float(), (problem.x.bfloat16().float(), problem.y), REMOVED, layers="*", refit_head=True, **QUIET
    )
    for key, value in removal.state_dict.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, in_full.state_dict[key].bfloat16())


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"layers": None}, "refit_head=True needs layers="),
        ({"certificate": Certificate(1.0, 1e-5, 0.1)}, "beside certificate= would certify nothing"),
        ({"line_search": False}, "needs line_search=True"),
        ({"loss": "causal_lm"}, "is for loss='cross_entropy' with one output per example, got 'causal_lm'"),
        ({"loss": "mse"}, "is for loss='cross_entropy' with one output per example, got 'mse'"),
        ({"start": "earlier"}, "beside start= cannot be"),
        ({"extracted": "features"}, "beside extracted= cannot be"),
        ({"weight_decay": 0.0}, "damping"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_what_is_refused(problem, how, said):
    how = dict(how)
    if "start" in how:
        how["start"] = remove(problem.model, (problem.x, problem.y), REMOVED, steps=1, **QUIET)
    if "extracted" in how:
        how["extracted"] = extract(problem.model, (problem.x, problem.y), progress=False)
    with pytest.raises(ValueError, match=said):
        refitted(problem, **how)


def test_a_head_that_is_an_embedding_too_is_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(3, 3), nn.Linear(3, 3)
            self.first.weight = self.head.weight

        def forward(self, x):
            return self.head(torch.tanh(self.first(x)))

    x, y = torch.randn(20, 3), torch.arange(20) % 3
    with pytest.raises(ValueError, match="serves elsewhere in the model, in 'first', too.* leave out refit_head=True"):
        remove(Tied(), (x, y), REMOVED, layers="*", refit_head=True, **QUIET)


# --------------------------------------------------------------------------- what enters the first layer that moves


class Counted(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        COUNTS.append(len(x))
        return self.module(x)


COUNTS: list[int] = []


def deep(as_sequential=True):
    torch.manual_seed(3)
    x, y = clusters(50, 3)
    layers = [Counted(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)]
    model = nn.Sequential(*layers).double()

    class Own(nn.Sequential):
        def forward(self, input):
            for module in self:
                input = module(input)
            return input

    return (model if as_sequential else Own(*layers).double()), x, y


@pytest.mark.parametrize("how", [{"refit_head": True}, {"steps": 2}])
def test_below_the_first_layer_that_moves_each_example_is_computed_once(how):
    """An nn.Sequential of one's own is no nn.Sequential: nothing is known of its forward, and nothing kept."""
    found, counts = [], []
    for as_sequential in (True, False):
        model, x, y = deep(as_sequential)
        COUNTS.clear()
        few = samplers.Subset(torch.arange(20, 25), torch.full((5,), 0.2, dtype=torch.float64))
        moving = dict(layers=["2", "4"], curvature=EKFAC(0.1), subset=few, batch_size=16)
        removal = remove(model, (x, y), REMOVED, **moving, **QUIET, **how)
        found.append(flat(removal.history[-1].parameters))
        counts.append(sum(COUNTS))
    assert torch.allclose(*found, atol=1e-10)
    assert counts[0] <= 100, "a pass over 50, those of the curvature over five, and single examples"
    assert counts[1] > counts[0] + 80


class Sorted(nn.Module):
    """Hands its rows to the layers in another order, as networks of texts of several lengths do."""

    def __init__(self):
        super().__init__()
        self.seq, self.head = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5)), nn.Linear(5, 3)

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.head(torch.tanh(self.seq(x[order]))[order.argsort()])


class Tied(Sorted):
    """What enters the layers is made with a weight of theirs, without a module."""

    def forward(self, x):
        weight = self.seq[2].weight
        return self.head(torch.tanh(self.seq(torch.tanh(x @ weight @ weight.T))))


class Note(nn.Module):
    def __init__(self, notes):
        super().__init__()
        self.notes = notes

    def forward(self, x):
        self.notes["x"] = x
        return x


class Add(Note):
    def forward(self, x):
        return x + self.notes["x"]


def noting():
    notes = {}
    return nn.Sequential(nn.Linear(5, 7), Note(notes), nn.Linear(7, 7), nn.Tanh(), Add(notes), nn.Linear(7, 3))


@pytest.mark.parametrize("how", [{"refit_head": True}, {"steps": 2}])
@pytest.mark.parametrize(
    ("make", "layers"), [(Sorted, ["seq.2", "head"]), (Tied, ["seq.2", "head"]), (noting, ["2", "5"])]
)
def test_what_is_kept_is_what_would_be_computed(monkeypatch, make, layers, how):
    torch.manual_seed(4)
    model, (x, y) = make().double(), clusters(48, 3)
    found, moving = [], dict(layers=layers, curvature=EKFAC(0.1), batch_size=16)
    for split in (below._split, lambda *_: None):
        monkeypatch.setattr(below, "_split", split)
        removal = remove(model, (x, y), torch.arange(0, 48, 3), **moving, **QUIET, **how)
        found.append(flat(removal.history[-1].parameters))
    assert torch.allclose(*found, atol=1e-10)


def split_of(model, moving, x):
    return below._split(model, set(moving.parameters()), lambda: model(x))


def test_where_it_is_kept():
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    relu, inner = nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = nn.Sequential(nn.Linear(4, 4), relu, inner)
    assert split_of(model, inner[1], x) == (inner, 1), "the innermost"
    assert split_of(model, inner[0], x) == (model, 2)
    assert split_of(model, model[0], x) is None
    twice = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 4))
    assert split_of(twice, twice[4], x) is None, "what runs twice is left alone"
    hooked = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    hooked[0].register_forward_hook(lambda *_: None)
    assert split_of(hooked, hooked[1], x) is None
    patched = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    patched.forward = lambda x: patched[1](patched[0](x)) + x
    assert split_of(patched, patched[1], x) is None, "a forward of its own"


def test_under_autocast_it_is_kept_too():
    """Passes over the data run without autocast; a first look within it must not settle the type of what is kept."""
    model, x, y = deep()
    COUNTS.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        few = samplers.Subset(torch.arange(20, 25), torch.full((5,), 0.2, dtype=torch.float64))
        moving = dict(layers=["2", "4"], curvature=EKFAC(0.1), subset=few, steps=2)
        remove(model.float(), (x.float(), y), REMOVED, **moving, **QUIET)
    assert sum(COUNTS) <= 100


def test_what_would_be_too_much_is_not_kept(monkeypatch):
    monkeypatch.setattr(below, "MOST_BYTES", 100)
    model, x, y = deep()
    COUNTS.clear()
    remove(model, (x, y), REMOVED, layers=["2", "4"], curvature=EKFAC(0.1), steps=2, **QUIET)
    assert sum(COUNTS) > 4 * 46
