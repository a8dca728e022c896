"""Curvature of models with several labels per example: drawn labels, what "auto" comes to, halves, the chooser."""

import pytest
import torch
from torch import nn

from fastif import (
    CG,
    EKFAC,
    KFAC,
    Automatic,
    Diagonal,
    ExactBlock,
    Influence,
    Networks,
    RelativeDamping,
    Subset,
    choose,
)
from fastif.model.losses import settle_fisher
from tests.curvature.test_exact_block import close, dense_jacobian, order_of

N, LENGTH, WORDS = 12, 6, 13
MEMORY = 2 * 8 * 200**2  # the exact blocks of all layers but the largest two


class Tagger(nn.Module):
    """Tokens to scores of words at every position; positions see the mean of all, so that none stands alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.hidden, self.out = nn.Embedding(WORDS, 4), nn.Linear(4, 3), nn.Linear(3, WORDS)

    def forward(self, x):
        h = self.table(x)
        return self.out(torch.tanh(self.hidden(h + h.mean(1, keepdim=True))))


def texts(seed=1):
    """Padded tokens and labels, of at least three words each."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, WORDS, (N, LENGTH), generator=g)
    mask = torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (N,), generator=g)[:, None]
    return ids * mask, ids.masked_fill(~mask, -100)


def tagger():
    return Tagger().double(), texts()


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = dict(vocab_size=WORDS, hidden_size=8, intermediate_size=12, num_hidden_layers=1, max_position_embeddings=8)
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **size)).double().eval()


def mappings():
    """The texts as a tokenizer's batches, which differ in their length."""
    ids, labels = texts()
    batches = []
    for k in range(0, N, 4):
        longest = int((labels[k : k + 4] != -100).sum(1).max())
        part = slice(k, k + 4), slice(0, longest)
        mask = (labels[part] != -100).long()
        batches.append({"input_ids": ids[part], "attention_mask": mask, "labels": labels[part]})
    return batches


def drawn_gradients(model, x, y, seed):
    """[n, P] by the definition: of one draw of labels from the model's prediction, those that do not count left out."""
    probs = model(x).detach().softmax(2)[:, :-1]
    u = torch.rand(probs.shape[0] * probs.shape[1], 1, dtype=torch.float64, generator=seed)
    labels = (u >= probs.flatten(0, 1).cumsum(1)).sum(1).view(probs.shape[:2])
    s = (probs - nn.functional.one_hot(labels, WORDS)) * (y[:, 1:] != -100)[..., None]
    s = torch.cat([s, torch.zeros_like(s[:, :1])], 1).flatten(1)
    return torch.einsum("nm,nmp->np", s, dense_jacobian(model, x))


def dense_ggn(model, x, y):
    probs = model(x).detach().softmax(2) * (y.roll(-1, 1) != -100)[..., None]
    probs[:, -1] = 0  # the last position predicts nothing
    hessians = torch.diag_embed(probs) - probs[..., None] * probs[..., None, :]
    jacobian = dense_jacobian(model, x).unflatten(1, (LENGTH, WORDS))
    return torch.einsum("ntcp,ntcd,ntdq->pq", jacobian, hessians, jacobian) / len(x)


def fitted(model, data, curvature, loss="causal_lm", **arguments):
    return Influence(model, loss, curvature, **{"layers": "*", "progress": False, **arguments}).fit(data)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("batch_size", [5, 64])
def test_a_sampled_block_is_the_sum_of_outer_products_of_drawn_gradients(joint, batch_size):
    model, (x, y) = tagger()
    influence = fitted(
        model, (x, y), ExactBlock(1e-2, joint=joint, fisher="monte_carlo"), batch_size=batch_size, seed=7
    )
    generator = torch.Generator().manual_seed(7)
    parts = zip(x.split(batch_size), y.split(batch_size), strict=True)
    rows = torch.cat([drawn_gradients(model, *part, generator) for part in parts])
    for names in [list(influence.curvature)] if joint else [[one] for one in influence.curvature]:
        order = order_of(influence, names)
        block = influence.curvature[names[0]].block.reshape(len(order), len(order))
        assert close(block, (rows.T @ rows / N)[order][:, order]), names


def test_many_draws_approach_the_exact_matrix():
    """The mean of m draws is as far from it as one draw is, over √m."""
    model, (x, y) = tagger()
    draws = []
    for seed in range(300):
        influence = fitted(model, (x, y), ExactBlock(1e-2, joint=True, fisher="monte_carlo"), seed=seed)
        order = order_of(influence)
        draws.append(next(iter(influence.curvature.values())).block.view(len(order), -1))
    want = dense_ggn(model, x, y)[order][:, order]
    one = torch.stack([(draw - want).square().sum() for draw in draws]).mean()
    assert (sum(draws) / len(draws) - want).square().sum() < 2 * one / len(draws)
    assert one.sqrt() < 2 * want.norm()


def test_a_classifier_is_sampled_where_it_is_asked_for():
    """Of its head, too: the closed form is that of the exact matrix."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3
    exact, auto, drawn = (
        fitted(model, data, ExactBlock(1e-2, fisher=fisher), "cross_entropy").curvature["2"].block
        for fisher in ("exact", "auto", "monte_carlo")
    )
    assert torch.equal(exact, auto)
    generator = torch.Generator().manual_seed(0)
    probs = model(data[0]).detach().softmax(1)
    labels = (torch.rand(20, 1, dtype=torch.float64, generator=generator) >= probs.cumsum(1)).sum(1)
    u = probs - nn.functional.one_hot(labels, 3)
    a = torch.cat([model[:2](data[0]).detach(), torch.ones(20, 1, dtype=torch.float64)], 1)
    rows = (u[:, :, None] * a[:, None, :]).flatten(1)
    assert close(drawn.reshape(18, 18), rows.T @ rows / 20)


def test_what_auto_comes_to():
    def settled(loss, outputs, labels, fisher="auto"):
        return settle_fisher(fisher, loss, outputs, labels, len(labels))

    single, several = torch.zeros(5, dtype=torch.int64), torch.zeros(5, 3, dtype=torch.int64)
    assert settled("cross_entropy", torch.zeros(5, 4), single) == "exact"
    assert settled("cross_entropy", torch.zeros(5, 4, 3), several) == "monte_carlo"
    assert settled("token_cross_entropy", torch.zeros(5, 3, 4), several) == "monte_carlo"
    assert settled("causal_lm", torch.zeros(5, 2, 4), several[:, :2]) == "monte_carlo"
    assert settled("mse", torch.zeros(5, 3), torch.zeros(5, 3)) == "exact"
    assert settled(lambda outputs, y: outputs.square().sum(1), torch.zeros(5, 3), single) == "exact"
    assert settled("causal_lm", torch.zeros(5, 3, 4), several, "empirical") == "empirical"


@pytest.mark.parametrize("make", [EKFAC, KFAC, Diagonal])
def test_auto_of_each_estimator_is_what_it_comes_to(make):
    model, data = tagger()
    for loss, y, named in (
        ("causal_lm", data[1], "monte_carlo"),
        (lambda o, _: o[:, 0, :3].square().sum(1), data[1], "exact"),
    ):
        got, want = (
            fitted(model, (data[0], y), make(1e-2, fisher=fisher), loss).scores(data, data)
            for fisher in ("auto", named)
        )
        assert torch.equal(got, want)


def test_auto_on_a_padded_language_model_is_the_estimators_of_its_layers():
    model, data = llama(), mappings()
    influence = fitted(model, data, "auto", memory=MEMORY)
    kinds = {name: type(one).__name__ for name, one in influence.curvature.items()}
    large = {"model.embed_tokens", "lm_head"}
    assert kinds == {name: "EKFAC" if name in large else "ExactBlock" for name in kinds}
    rule = RelativeDamping(0.1)
    given = {"model.embed_tokens": EKFAC("auto", "monte_carlo"), "lm_head": EKFAC("auto", "monte_carlo")}
    want = fitted(model, data, {**given, "*": ExactBlock(rule, fisher="monte_carlo")})
    assert torch.equal(influence.scores(data[:1], data), want.scores(data[:1], data))
    assert close(
        influence.self_influence(data), want.self_influence(data)
    )  # whose layers are added up in another order
    again = Influence(model, "causal_lm", "auto", layers="*", memory=MEMORY, progress=False)
    again.load_state_dict(influence.state_dict())
    assert torch.equal(again.scores(data[:1], data), influence.scores(data[:1], data))
    plan = influence.plan(data)
    assert {(layer.curvature, layer.fisher) for layer in plan.layers.values()} == {
        ("EKFAC", "monte_carlo"), ("ExactBlock", "monte_carlo")
    }  # fmt: skip
    assert f"ExactBlock of {len(kinds) - 2} blocks (fisher='monte_carlo')" in str(plan)


@pytest.mark.parametrize("fisher", ["monte_carlo", "empirical"])
def test_automatic_takes_what_its_parts_take(fisher):
    model, data = tagger()
    got = fitted(model, data, Automatic(1e-2, fisher=fisher, share=1.0), memory=8 * 30**2)
    want = fitted(model, data, {"hidden": ExactBlock(1e-2, fisher=fisher), "*": EKFAC(1e-2, fisher)})
    assert {name: type(one).__name__ for name, one in got.curvature.items()}["hidden"] == "ExactBlock"
    assert torch.allclose(got.scores(data, data), want.scores(data, data), rtol=1e-10)
    with pytest.raises(ValueError, match="fisher='exact' with loss='causal_lm' would need 5 x 13 backward passes"):
        fitted(model, data, Automatic(1e-2, fisher="exact"))


def test_a_share_of_the_mean_eigenvalue_in_conjugate_gradients():
    """λ of a layer is a tenth of tr(G)/P of one draw; the products are with the exact GGN."""
    model, (x, y) = tagger()
    influence = fitted(model, (x, y), CG(RelativeDamping(0.1), tolerance=1e-10))
    rows = drawn_gradients(model, x, y, torch.Generator().manual_seed(0))
    used = influence.curvature["hidden"].damping_used
    places = {name: order_of(influence, [name]) for name in used}
    assert used == pytest.approx(
        {name: 0.1 * float(rows[:, p].square().sum()) / N / len(p) for name, p in places.items()}
    )
    order = torch.cat([*places.values()])
    damping = torch.cat([torch.full((len(p),), used[name], dtype=torch.float64) for name, p in places.items()])
    labels = y.roll(-1, 1).masked_fill(torch.arange(LENGTH) == LENGTH - 1, -100)
    residuals = model(x).detach().softmax(2) - nn.functional.one_hot(labels.clamp(min=0), WORDS)
    residuals = (residuals * (labels != -100)[..., None]).flatten(1)
    gradients = torch.einsum("nm,nmp->np", residuals, dense_jacobian(model, x))[:, order]
    matrix = dense_ggn(model, x, y)[order][:, order] + damping.diag()
    want = gradients[:3] @ torch.linalg.solve(matrix, gradients.T) / N
    assert close(influence.scores((x[:3], y[:3]), (x, y)), want, 1e-7)


def test_networks_on_halves_by_token():
    """docs/math.md (23), network by network; norms have no gradient of a token's own."""
    model, data = llama(), mappings()
    how = {"layers": ("*", "!*norm*"), "memory": MEMORY}
    states = []
    for seed in range(2):
        torch.manual_seed(seed)
        states.append({name: value + 0.1 * torch.randn_like(value) for name, value in model.state_dict().items()})
    kept = torch.randperm(N, generator=torch.Generator().manual_seed(2)).split(N // 2)
    ids, labels = texts()
    padded = [{"input_ids": ids, "attention_mask": (labels != -100).long(), "labels": labels}]
    influence = fitted(model, data, "auto", networks=Networks(states, kept), **how)
    by_token = influence.scores(data[:1], padded, by="token")
    assert by_token.shape == (4, N, LENGTH)
    assert close(by_token.sum(2), influence.scores(data[:1], padded))
    parts = []
    for state, mine in zip(states, kept, strict=True):
        model.load_state_dict(state)
        half = Subset(mine, torch.full((len(mine),), 1 / len(mine), dtype=torch.float64))
        alone = Influence(model, "causal_lm", "auto", progress=False, **how).fit(data, subset=half)
        parts.append(alone.scores(data[:1], padded, by="token"))
    sigma = torch.stack([part.sum(2).std(1, correction=0) for part in parts])
    mean = sum(part / s[:, None, None] for part, s in zip(parts, sigma, strict=True)) / 2
    assert close(by_token, mean * sigma.mean(0)[:, None, None])


def test_the_chooser_chooses_what_can_be_fitted():
    model, data = llama(), mappings()
    choice = choose(model, data, data[:1], loss="causal_lm", operations=1e9)
    assert choice.chosen.name == "exact blocks and EK-FAC"
    for one in choice.considered:
        assert one.seconds > 0
        choice = choice._replace(chosen=one)
        influence = choice.influence(model, "causal_lm", progress=False).fit(data, subset=choice.subset(N))
        assert influence.scores(data[:1], data).isfinite().all()
        assert influence.subset is not None
        assert len(influence.subset.indices) == (1 if one.share else N)
