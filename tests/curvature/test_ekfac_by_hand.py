"""EK-FAC of language models, by hand: plain hooks on each text alone and without padding, dense moments, float64.

What fastif is given are padded batches. Positions of padding must leave no trace: not in the gradients, not in the
moments, not in their counts.
"""

from collections import defaultdict
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastif import EKFAC, Influence

transformers = pytest.importorskip("transformers", reason="transformers is not installed (make test installs it)")

N, T, V, DAMPING, WIDE = 6, 9, 23, 1e-2, 100
LENGTHS = (9, 6, 9, 4, 7, 9)
SMALL = {"vocab_size": V, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}


class Language(NamedTuple):
    model: nn.Module
    batch: dict  # padded
    loss: object  # as Influence takes it
    alone: list  # for each text: keyword arguments without padding, and its labels


def causal(model):
    ids = torch.randint(2, V, (N, T), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    alone = [({"input_ids": ids[i : i + 1, :t]}, ids[i, :t]) for i, t in enumerate(LENGTHS)]
    return Language(model.double().eval(), batch, "causal_lm", alone)


def llama():
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)
    return causal(transformers.LlamaForCausalLM(config))


def mixtral():
    config = transformers.MixtralConfig(
        **SMALL, num_key_value_heads=1, num_local_experts=3, experts_implementation="eager", tie_word_embeddings=False
    )
    return causal(transformers.MixtralForCausalLM(config))


def t5():
    config = transformers.T5Config(
        vocab_size=V, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, tie_word_embeddings=True
    )
    model = transformers.T5ForConditionalGeneration(config).double().eval()
    g = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(2, V, (N, T), generator=g), torch.randint(2, V, (N, 5), generator=g)
    mask = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long()
    shown = torch.tensor([5, 3, 4, 5, 2, 5])
    padded = labels.masked_fill(torch.arange(5) >= shown[:, None], -100)
    decoder = torch.cat([torch.zeros(N, 1, dtype=torch.int64), labels[:, :-1]], 1)
    batch = {"input_ids": ids * mask, "attention_mask": mask, "decoder_input_ids": decoder, "labels": padded}
    alone = [
        ({"input_ids": ids[i : i + 1, :t], "decoder_input_ids": decoder[i : i + 1, : shown[i]]}, labels[i, : shown[i]])
        for i, t in enumerate(LENGTHS)
    ]
    return Language(model, batch, "token_cross_entropy", alone)


def seen_alone(language):
    """Of each text: by module, what its calls saw and were asked for, [t, d] and [t, o]; and parameters' gradients."""
    model, names = language.model, {m: n for n, m in language.model.named_modules()}
    parameters = dict(model.named_parameters())
    for arguments, labels in language.alone:
        calls = []
        hooks = [
            module.register_forward_hook(lambda m, args, out, calls=calls: calls.append((m, args[0].detach(), out)))
            for module in model.modules()
            if isinstance(module, nn.Linear | nn.Embedding)
        ]
        logits = model(**arguments).logits[0]
        for hook in hooks:
            hook.remove()
        if language.loss == "causal_lm":
            logits, labels = logits[:-1], labels[1:]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        outs = [out for _, _, out in calls]
        found = torch.autograd.grad(loss, [*outs, *parameters.values()], allow_unused=True)
        uses = defaultdict(list)
        for (module, x, out), u in zip(calls, found, strict=False):
            assert u is not None
            x, u = x.reshape(-1) if isinstance(module, nn.Embedding) else x.flatten(0, -2), u.reshape(-1, out.shape[-1])
            if language.loss != "causal_lm":  # no one mask is that of encoder and decoder: zero gradients alone tell
                x, u = x[u.any(1)], u[u.any(1)]
            uses[names[module]].append((x, u))
        gradients = found[len(outs) :]
        yield (
            uses,
            {
                n: torch.zeros_like(p) if g is None else g
                for (n, p), g in zip(parameters.items(), gradients, strict=True)
            },
        )


def eigenbasis(moment):
    return torch.linalg.eigh(moment).eigenvectors


def scores_in(gradients, left, right):
    """(1/n) g_qᵀ (Q diag(λ) Qᵀ + δ)⁻¹ g_t, λ = the mean of the squares in the basis left ⊗ right."""
    turned = torch.einsum("ab,nac,cd->nbd", left, gradients, right).flatten(1)
    return (turned / (turned.square().mean(0) + DAMPING)) @ turned.T / N


def as_layer(texts, gradients, sources, tables):
    """A matrix whose uses are linear maps (positions a, u) and lookups (the unit vector of the row, the gradient)."""
    d_moment = o_moment = 0.0
    for uses, _ in texts:
        for source in sources:
            for x, u in uses[source]:
                a, u = (u, F.one_hot(x, V).double()) if source in tables else (x, u)
                d_moment, o_moment = d_moment + a.T @ a, o_moment + u.T @ u
    lookups = all(source in tables for source in sources)  # rows that are looked up are a basis of their own
    left = torch.eye(V, dtype=torch.float64) if lookups else eigenbasis(o_moment)
    return scores_in(gradients, left, eigenbasis(d_moment))


def as_vector(gradients):
    """Scales, and parameters of no known layer: one vector, of which the diagonal where it is wide."""
    flat = gradients.flatten(1)
    basis = torch.eye(flat.shape[1], dtype=torch.float64) if flat.shape[1] > WIDE else eigenbasis(flat.T @ flat)
    return scores_in(flat[:, :, None], basis, torch.eye(1, dtype=torch.float64))


@pytest.mark.parametrize("build", [llama, mixtral, t5], ids=lambda build: build.__name__)
def test_scores_of_padded_batches_are_those_of_the_texts_alone(build, monkeypatch):
    monkeypatch.setattr("fastif.model.layers._WIDE", WIDE)
    torch.manual_seed(0)
    language = build()
    model = language.model
    texts = list(seen_alone(language))
    modules = {p: [n for n, m in model.named_modules() if m._parameters.get("weight") is p] for p in model.parameters()}
    tables = {n for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    want, layers = torch.zeros(N, N, dtype=torch.float64), 0
    for name, parameter in model.named_parameters():
        gradients = torch.stack([found[name] for _, found in texts])
        sources = [source for source in modules[parameter] if any(source in uses for uses, _ in texts)]
        known = sources and set(sources) <= tables | linear and "relative" not in name
        want += as_layer(texts, gradients, sources, tables) if known else as_vector(gradients)
        layers += bool(known)
    assert layers >= 6
    for size in (N, 2):  # of the batches: a text is padded to the longest beside it
        data = [{k: v[i : i + size] for k, v in language.batch.items()} for i in range(0, N, size)]
        if size == 2 and "decoder_input_ids" not in language.batch:
            lengths = [max(LENGTHS[i : i + size]) for i in range(0, N, size)]
            data = [{k: v[:, :t] for k, v in part.items()} for part, t in zip(data, lengths, strict=True)]
        curvature = EKFAC(DAMPING, fisher="empirical")
        influence = Influence(model, language.loss, curvature, progress=False).fit(data)
        assert influence.capture.skipped == {}
        assert (influence.scores(data, data) - want).norm() <= 1e-6 * want.norm()  # norms of some compute in float32
