"""Removed examples that come to look like unseen ones, against the definitions in float64, docs/math.md (34)."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from fastif import EKFAC, ExactBlock, Identity, remove, samplers
from fastif.removal.matching import MatchedNetwork
from fastif.removal.neighbours import votes
from fastif.samplers import Subset
from tests.helpers.problems import QUIET, REMOVED, WEIGHT_DECAY, clusters, flat, small_images, sure, trained
from tests.removal.test_removal_layers import kept_of
from tests.removal.test_removal_refit import NAMES, mean_loss

EXACT = ExactBlock(0.02, joint=True)
HARD = torch.tensor([3, 7, 11, 40, 41, 42, 60, 61, 75])


def unseen_of(seed=0, n=120):
    """Examples of the same clusters that `trained(seed=seed)` has not seen."""
    x, y = clusters(90 + n, seed)
    return x[90:], y[90:]


def matched(problem, removed=REMOVED, **how):
    model, x, y = problem
    settings = {"layers": "*", "refit_head": True, "unseen": unseen_of(), **QUIET, **how}
    return remove(model, (x, y), removed, **settings)


def log_odds(logits, labels):
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    return (p / (1 - p)).log()


def loaded(model, state):
    found = copy.deepcopy(model)
    found.load_state_dict(state)
    return found


def views_by_hand(model, x):
    return [torch.nn.functional.normalize(v) for v in (x, model[:2](x).detach())]


def usual_by_hand(asked, label, odds, layers, y, voting, neighbours=30):
    """How usual an example is that has these views and this label, by the votes of its neighbours, one by one."""
    votes = 0
    for own, seen in zip(asked, layers, strict=True):
        near = sorted(voting, key=lambda j: -float(own @ seen[j]))[:neighbours]
        votes += sum(int(y[j]) == int(label) for j in near)
    return votes + 0.5 + 0.5 * float(odds / (1 + odds.abs()))


def quantiles_by_hand(model, x, y, removed, seen=None):
    """Of each removed example, where it stands among those of its label."""
    kept = kept_of(len(y), removed).nonzero()[:, 0].tolist()
    layers = views_by_hand(model, x) if seen is None else [torch.nn.functional.normalize(v) for v in seen]
    odds = log_odds(model(x), y).detach()
    usual = [
        usual_by_hand([v[i] for v in layers], y[i], odds[i], layers, y, [j for j in kept if j != i])
        for i in range(len(y))
    ]
    found = []
    for i in removed.tolist():
        others = [usual[j] for j in range(len(y)) if y[j] == y[i] and j != i]
        less = sum(value < usual[i] for value in others) + 0.5 * sum(value == usual[i] for value in others)
        found.append((less + 0.5) / (len(others) + 1))
    return torch.tensor(found, dtype=torch.float64)


def lost_by_hand(model, x, y, removed, unseen):
    """What the log-odds of each unseen example lose with its removed neighbours, and what is left to those that are as
    usual as it then is, by places."""
    layers, views = views_by_hand(model, x), views_by_hand(model, unseen[0])
    odds = log_odds(model(unseen[0]), unseen[1]).detach()
    voting = [range(len(y)), kept_of(len(y), removed).nonzero()[:, 0].tolist()]
    with_all, left = (
        torch.tensor(
            [usual_by_hand([v[u] for v in views], unseen[1][u], odds[u], layers, y, those) for u in range(len(odds))],
            dtype=torch.float64,
        )
        for those in voting
    )
    lost, least = torch.zeros_like(odds), torch.zeros_like(odds)
    for u in range(len(odds)):
        mine = unseen[1] == unseen[1][u]

        def said(value, mine=mine):
            less = (with_all[mine] < value).double() + 0.5 * (with_all[mine] == value).double()
            return float(odds[mine].quantile(less.mean()))

        lost[u], least[u] = max(0.0, said(with_all[u]) - said(left[u])), said(left[u])
    return lost, least


def targets_by_hand(model, problem, removed, unseen):
    """Of unseen examples as the network `model` stands, lower where their neighbours left and it has not followed."""
    trained_model, x, y = problem
    trained_odds, odds = (log_odds(net(unseen[0]), unseen[1]).detach() for net in (trained_model, model))
    lost, least = lost_by_hand(trained_model, x, y, removed, unseen)
    said = odds.minimum((odds.maximum(trained_odds) - lost).maximum(least))
    quantiles = quantiles_by_hand(trained_model, x, y, removed)
    return torch.stack([said[unseen[1] == label].quantile(q) for label, q in zip(y[removed], quantiles, strict=True)])


def step_by_hand(before, trained_model, x, y, removed, weights, targets):
    """−s (Σ_i w_i J_iᵀJ_i + γI)⁻¹ g, J at the trained parameters, g at those before, s ‖…‖ as (34) has it."""
    theta = {name: p.detach() for name, p in trained_model.named_parameters() if name in NAMES}
    jacobian = jacrev(lambda values: functional_call(trained_model, values, (x,)))(theta)
    jacobian = torch.cat([j.flatten(2) for j in jacobian.values()], 2)
    curvature = torch.einsum("nap,naq,n->pq", jacobian, jacobian, weights)
    curvature.diagonal().add_(WEIGHT_DECAY + 0.02)
    now = {name: p.detach() for name, p in before.named_parameters() if name in NAMES}
    half = jacrev(
        lambda values: (
            0.5 * (log_odds(functional_call(before, values, (x[removed],)), y[removed]) - targets).square().mean()
        )
    )(now)
    gradient = torch.cat([part.flatten() for part in half.values()])
    direction = torch.linalg.solve(curvature, gradient)
    off = (log_odds(before(x[removed]), y[removed]) - targets).square().mean().detach()
    return -off / (gradient @ direction) * direction, gradient.norm()


FORGET_SETS = [HARD, torch.tensor([5]), torch.arange(0, 90, 3)[:25], torch.arange(15, 90)]


@pytest.mark.parametrize("removed", FORGET_SETS, ids=["some", "one", "most of a class", "all but a few"])
def test_neighbours_say_what_the_definition_does(removed):
    model, x, y = trained()
    network = MatchedNetwork(model, (x, y), removed, unseen=unseen_of(), layers="*", weight_decay=WEIGHT_DECAY)
    around = network._look_around()[0]
    want = quantiles_by_hand(model, x, y, removed)
    assert torch.allclose(around.places, want, atol=1e-12)
    assert 0 < want.min() <= want.max() < 1
    alike = torch.isin(unseen_of()[1], y[removed])
    lost, least = lost_by_hand(model, x, y, removed, unseen_of())
    assert torch.allclose(around.lost, lost[alike], atol=1e-6)
    assert torch.allclose(around.least, least[alike], atol=1e-6)
    assert torch.allclose(around.odds, log_odds(model(unseen_of()[0]), unseen_of()[1])[alike], atol=1e-9)


@pytest.mark.parametrize("n", [1, 9, 30, 31])
def test_where_few_vote_all_vote_on_unseen_examples_and_all_others_on_a_training_one(n):
    views = torch.nn.functional.normalize(torch.randn(n + 5, 2, 4, dtype=torch.float64), dim=-1)
    labels, voting, gone = torch.zeros(n + 5, dtype=torch.int64), torch.arange(n), torch.tensor([0])
    of_all, of_kept = votes(views, labels, torch.arange(n + 5), voting, gone)  # all have the same label
    others = torch.tensor([n - 1] * n + [n] * 5)
    assert torch.equal(of_all, 2 * others.clamp(max=30))
    stay = torch.tensor([n - 1] + [n - 2] * (n - 1) + [n - 1] * 5)
    assert torch.equal(of_kept, 2 * stay.clamp(max=30))


def test_half_of_a_class_takes_from_unseen_examples_like_it_what_it_gave():
    model, x, y = trained()
    of_class = (y == 0).nonzero()[:, 0]
    removed = of_class[x[of_class, 0] > x[of_class, 0].median()]
    network = MatchedNetwork(model, (x, y), removed, unseen=unseen_of(), layers="*", weight_decay=WEIGHT_DECAY)
    lost = network._look_around()[0].lost
    seen = unseen_of()[0][unseen_of()[1] == 0, 0]
    like, unlike = lost[seen > seen.quantile(0.75)].mean(), lost[seen < seen.quantile(0.25)].mean()
    assert like > 2 * unlike


class Words(nn.Module):
    """Texts by the mean of what a layer says of their words, which it sees in one of several orders."""

    def __init__(self, order="examples first"):
        super().__init__()
        self.order = order
        self.words, self.inner, self.head = nn.Embedding(10, 5), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, tokens, attention_mask=None):
        seen = self.words(tokens)
        if self.order == "positions first":
            said = self.inner(seen.transpose(0, 1)).transpose(0, 1)
        elif self.order == "in one axis":
            said = self.inner(seen.flatten(0, 1)).view(*seen.shape[:2], -1)
        else:
            said = self.inner(seen)
        counts = torch.ones_like(said[..., :1]) if attention_mask is None else attention_mask[..., None].to(said)
        return self.head((said.tanh() * counts).sum(1) / counts.sum(1))


def texts(n=90, length=6, seed=0):
    """Words of which most say the label."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    about = 1 + 3 * y[:, None] + torch.randint(3, (n, length), generator=g)
    other = torch.randint(1, 10, (n, length), generator=g)
    return torch.where(torch.rand(n, length, generator=g) < 0.6, about, other), y


def quantiles_of(model, train, **how):
    settings = {"layers": "*", "weight_decay": WEIGHT_DECAY, "unseen": texts(seed=1), **how}
    return MatchedNetwork(model, train, HARD, **settings)._look_around()[0].places


@pytest.mark.parametrize("order", ["examples first", "positions first", "in one axis"])
def test_neighbours_of_texts_are_found_in_what_layers_see_of_their_words(order):
    torch.manual_seed(0)
    model, (x, y) = Words(order).double(), texts()
    seen = model.words(x).detach()
    want = quantiles_by_hand(model, x, y, HARD, seen=(seen.mean(1), model.inner(seen).tanh().mean(1).detach()))
    for size in (90, 6):  # of which one is the number of positions
        assert torch.allclose(quantiles_of(model, (x, y), batch_size=size), want, atol=1e-9)


def test_padding_is_no_part_of_what_layers_see():
    torch.manual_seed(0)
    model, (x, y) = Words().double(), texts()
    lengths = 2 + torch.arange(90) % 5
    alone = [{"tokens": x[i : i + 1, : lengths[i]], "labels": y[i : i + 1]} for i in range(90)]
    masks = (torch.arange(8) < lengths[:, None]).long()
    padded = torch.cat([x, x.new_zeros(90, 2)], 1) * masks
    batches = [
        {"tokens": padded[rows, :t], "attention_mask": masks[rows, :t], "labels": y[rows]}
        for rows, t in ((slice(0, 40), 8), (slice(40, 90), 6))
    ]
    assert torch.allclose(quantiles_of(model, batches), quantiles_of(model, alone), atol=1e-9)


class Encoded(nn.Module):
    def __init__(self, nested):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.words = nn.Embedding(10, 4)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(self.encoder(self.words(tokens), src_key_padding_mask=tokens == 0)[:, 0])


@pytest.mark.parametrize("layers", ["*", "encoder.layers.1.linear*"])
def test_encoders_that_leave_padding_out_where_no_gradient_is_asked_for(layers):
    x, y = texts(30)
    x[::2, 4:] = 0
    found = []
    for nested in (True, False):
        torch.manual_seed(0)
        model = Encoded(nested).double().eval()
        how = dict(layers=layers, refit_head=True, unseen=texts(24, seed=1), steps=1, **QUIET)
        found.append(flat(remove(model, (x, y), torch.tensor([3, 4]), **how).state_dict))
        assert model.encoder.use_nested_tensor == nested
    assert torch.equal(*found)


class Otherwise(nn.Sequential):
    """Calls its layers by the name of their argument, and squeezes a batch of one before the head."""

    def forward(self, x):
        return self[2](input=self[1](self[0](input=x)).squeeze(0))


def test_layers_called_by_name_and_rows_that_are_squeezed():
    model, x, y = trained(seed=3)
    how = dict(curvature=EXACT, unseen=unseen_of(3), steps=2)
    want = flat(matched((model, x, y), HARD, **how).state_dict)
    for size in (256, 7):  # of the 90 and of the 120 the last one is squeezed
        found = matched((Otherwise(*model), x, y), HARD, batch_size=size, **how)
        assert torch.allclose(flat(found.state_dict), want, atol=1e-8)


def layers_steps(removal):
    return [entry for entry in removal.history if len(entry.step_size) > 1]


def test_the_layers_take_the_steps_of_the_definition_and_the_removed_come_nearer():
    model, x, y = problem = trained(seed=3)
    removal = matched(problem, HARD, curvature=EXACT, unseen=unseen_of(3), steps=3)
    steps = layers_steps(removal)
    assert steps
    distances = []
    for entry in steps:
        before = loaded(model, removal.after(entry.step - 1))
        targets = targets_by_hand(before, problem, HARD, unseen_of(3))
        whole, norm = step_by_hand(before, model, x, y, HARD, kept_of(90, HARD).double() / 90, targets)
        (length,) = set(entry.step_size.values())
        assert torch.allclose(flat(entry.parameters), flat(dict(before.named_parameters())) + length * whole, atol=1e-9)
        assert entry.gradient_norm == pytest.approx(float(norm), rel=1e-8)
        distances.append((log_odds(before(x[HARD]), y[HARD]) - targets).square().mean().item())
    last = loaded(model, removal.state_dict)
    targets = targets_by_hand(last, problem, HARD, unseen_of(3))
    distances.append((log_odds(last(x[HARD]), y[HARD]) - targets).square().mean().item())
    assert distances == sorted(distances, reverse=True)
    assert all(torch.equal(removal.after(0)[name], p) for name, p in model.named_parameters())
    assert [entry.step for entry in removal.history] == [*range(1, len(removal.history) + 1)]


def test_a_subset_carries_the_curvature_by_its_weights_without_the_removed():
    (model, x, y), carriers = trained(seed=3), torch.tensor([0, 1, 3, 20, 31, 50, 80])
    weights = torch.tensor([0.1, 0.2, 0.3, 0.1, 0.05, 0.15, 0.1], dtype=torch.float64)
    removal = matched((model, x, y), HARD, curvature=EXACT, unseen=unseen_of(3), subset=Subset(carriers, weights))
    everyone = torch.zeros(90, dtype=torch.float64)
    everyone[carriers] = weights
    entry = layers_steps(removal)[0]
    before = loaded(model, removal.after(entry.step - 1))
    targets = targets_by_hand(before, (model, x, y), HARD, unseen_of(3))
    whole, _ = step_by_hand(before, model, x, y, HARD, everyone * kept_of(90, HARD), targets)
    (length,) = set(entry.step_size.values())
    assert torch.allclose(flat(entry.parameters), flat(dict(before.named_parameters())) + length * whole, atol=1e-9)


class Squeezing(nn.Sequential):
    def forward(self, x):
        return super().forward(x).squeeze(0)


def test_batches_of_one_and_models_that_squeeze_them():
    model, x, y = trained(seed=3)
    how = dict(curvature=EXACT, unseen=unseen_of(3), steps=2)
    want = flat(matched((model, x, y), HARD, **how).state_dict)
    for size in (256, 40, 7):  # of the 90, of the 81 retained and of the 120 unseen
        for net in (model, Squeezing(*model)):
            found = matched((net, x, y), HARD, batch_size=size, **how)
            assert torch.allclose(flat(found.state_dict), want, atol=1e-8)


def test_a_network_that_knows_all_by_heart_lets_go_of_the_removed_alone():
    model, x, y = sure(seed=1)
    removed = torch.arange(4)  # labels that are wrong
    x_further, y_further = clusters(360, 1)
    y_further[60:90] = (y_further[60:90] + 1) % 3  # a tenth of the unseen, too
    how = dict(layers="*", refit_head=True, weight_decay=1e-4, progress=False)
    how |= {"curvature": EKFAC(0.0, fisher="exact"), "unseen": (x_further[60:], y_further[60:])}
    moved = loaded(model, remove(model, (x, y), removed, **how).state_dict)
    kept = kept_of(60, removed)
    rise = mean_loss(moved, x, y, kept) - mean_loss(model, x, y, kept)
    assert mean_loss(moved, x, y, removed) - mean_loss(model, x, y, removed) > 1.0
    assert rise < 0.1


def test_where_the_head_alone_does_it_the_layers_stay():
    model, x, y = trained()
    removal = matched((model, x, y), torch.arange(0, 90, 3), curvature=EXACT)  # a class
    assert not layers_steps(removal)
    assert removal.history
    assert torch.equal(removal.state_dict["0.weight"], model[0].weight)
    assert not torch.equal(removal.state_dict["2.weight"], model[2].weight)


def test_steps_that_end_far_away_or_do_harm_are_said():
    model, x, y = sure(seed=1)
    removed = torch.arange(4)
    x_further, y_further = clusters(360, 1)
    few = Subset(torch.tensor([50]), torch.ones(1, dtype=torch.float64))
    wrong = (x_further[60:], (y_further[60:] + 1) % 3)  # nothing that the network says of them is right
    how = dict(layers="*", refit_head=True, weight_decay=1e-4, progress=False, unseen=wrong)
    with pytest.warns(UserWarning, match="is surer of the removed examples than of unseen ones like them by"):
        remove(model, (x, y), removed, steps=1, curvature=ExactBlock(1e-4, joint=True), **how)
    with pytest.warns(UserWarning, match="of these layers comes no nearer: others in layers= or"):  # the head alone
        remove(model, (x, y), removed, curvature=Identity(), **how | {"layers": "2"})
    with pytest.warns(UserWarning, match="take the mean loss of the removed examples from .* and that of the retained"):
        remove(model, (x, y), torch.arange(50), curvature=Identity(), subset=few, **how)


def test_harm_that_the_head_does_is_not_said_of_layers_that_stay(recwarn):
    model, x, y = copy.deepcopy(trained())
    with torch.no_grad():
        model[2].weight.mul_(-8)  # a head from which one step leads far from its optimum
    removal = matched((model, x, y), HARD, steps=1)
    moved = loaded(model, removal.state_dict)
    assert not layers_steps(removal)
    assert mean_loss(moved, x, y, kept_of(90, HARD)) > math.log(3)
    assert not [found for found in recwarn if "steps of these layers" in str(found.message)]


def test_samplers_and_a_head_that_takes_no_step():
    model, x, y = small_images()
    g = torch.Generator().manual_seed(2)
    unseen = torch.randn(90, 1, 5, 5, dtype=torch.float64, generator=g), torch.arange(90) % 3
    how = dict(layers=["0.0", "1"], refit_head=True, unseen=unseen, curvature=EXACT, **QUIET)
    found = [remove(model, (x, y), REMOVED, batch_size=size, **how) for size in (7, 60)]
    assert torch.allclose(*(flat(removal.history[-1].parameters) for removal in found), atol=1e-8)
    how |= {"layers": ["0.0", "0.1"], "subset": partial(samplers.logit, k=28)}
    drawn = remove(model, (x, y), torch.arange(20), **how)
    (entry, *_) = layers_steps(drawn)
    assert entry.subset_size == 28
    assert entry.step_size.keys() == {"0.0", "0.1"}
    assert not torch.equal(drawn.state_dict["1.weight"], model[1].weight)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("how", [{}, {"unseen": None}, {"unseen": None, "refit_head": False}])
def test_the_call_computes_gradients_where_none_are_asked_for_around_it(around, how):
    want = matched(trained(), **how).state_dict
    with around():
        found = matched(trained(), **how).state_dict
    assert all(torch.equal(found[name], value) for name, value in want.items())
    assert not any(value.is_inference() or value.requires_grad for value in found.values())


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"refit_head": False}, "unseen= .* needs refit_head=True"),
        ({"layers": None}, "refit_head=True needs layers="),
        ({"unseen": iter([unseen_of()])}, "walked through more than once, got .*iterator"),
        ({"unseen": unseen_of()[0]}, "no labels"),
        (
            {"unseen": (unseen_of()[0], torch.ones(120, dtype=torch.int64))},
            "unseen= has no example of label 0, which 1 ",
        ),
        (
            {"unseen": (unseen_of()[0].index_fill(0, torch.tensor([8, 9]), torch.nan), unseen_of()[1])},
            "says of the examples in unseen= must be finite log-odds .* of 2 of them, such as 8",
        ),
        (
            {"unseen": (unseen_of()[0], unseen_of()[1].index_fill(0, torch.tensor([8]), 3))},
            r"unseen= .* in \[0, c=3\); of 1 they are not, such as example 8, which has 3",
        ),
        ({"unseen": (unseen_of()[0], unseen_of()[1][:, None])}, r"unseen= .* one integer .*, got labels \[120, 1\]"),
        (
            {"unseen": tuple(values[[0, 1, 3, 4, 6, 7, 2, 5]] for values in trained()[1:])},
            "has not seen: of 8 with a label that a removed one has, 8, such as 0, are training examples",
        ),
        ({"weight_decay": 0.0, "curvature": EXACT}, "head .* with damping 0 is not positive definite"),
    ],
)
def test_what_is_refused(how, said):
    with pytest.raises(ValueError, match=said):
        matched(trained(), **how)


def test_a_few_training_examples_among_the_unseen_are_let_pass():
    model, x, y = trained()
    further = unseen_of()
    matched((model, x, y), unseen=(torch.cat([x[:50], further[0]]), torch.cat([y[:50], further[1]])), steps=1)
    with pytest.raises(ValueError, match="of 54 with a label that a removed one has, 50, such as 0, are training"):
        matched((model, x, y), unseen=(torch.cat([x[:50], further[0][:4]]), torch.cat([y[:50], further[1][:4]])))


def test_training_examples_without_log_odds_are_refused():
    model, x, y = trained()
    ignored, unknown = y.clone(), x.clone()
    ignored[0] = -100
    with pytest.raises(ValueError, match="'log_odds' needs one label per example and none that is -100"):
        matched((model, x, ignored))
    with pytest.raises(TypeError, match=r"unseen= must have one integer label per example, .* got torch.float64"):
        matched((model, x, y), unseen=(unseen_of()[0], unseen_of()[1].double()))
    unknown[REMOVED[0]] = torch.nan
    with pytest.raises(ValueError, match="says of the training examples must be finite .* of 1 of them, such as 3"):
        matched((model, unknown, y))
    alone = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    with pytest.raises(ValueError, match=r"so of two classes or more"):
        matched((alone, x, torch.zeros_like(y)), unseen=(x, torch.zeros_like(y)))


class Idle(nn.Module):
    """A network with a layer that nothing depends on."""

    def __init__(self, model):
        super().__init__()
        self.model, self.idle = copy.deepcopy(model), nn.Linear(5, 6).double()

    def forward(self, x):
        return self.model[2](self.model[:2](x) + 0.0 * self.idle(x))


def test_layers_that_change_nothing_are_refused():
    model, x, y = trained(seed=3)
    with pytest.raises(ValueError, match="no step of these layers changes the removed examples' log-odds: slope 0"):
        matched((Idle(model), x, y), HARD, unseen=unseen_of(3), layers="idle", head="model.2", curvature=EXACT)
