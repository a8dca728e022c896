"""Networks of transformers as users have them: all that is trained is covered, with autograd's gradients of each
example, at the first try and without a word about layers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastif import EKFAC, Influence
from fastif.data.batches import rows_of
from fastif.model.calls import call
from fastif.model.capture import Capture
from fastif.model.check import settle
from fastif.model.losses import per_sample
from tests import reference

transformers = pytest.importorskip("transformers", reason="transformers is not installed (make test installs it)")

N, T = 6, 9
SMALL = {
    "vocab_size": 31,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}


def _text():
    ids = torch.randint(2, 31, (N, T), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = mask[3, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _classes():
    return {**_text(), "labels": torch.arange(N) % 3}


def _pixels():
    images = torch.randn(N, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": images, "labels": torch.arange(N) % 3}


class Translates(nn.Module):
    """An encoder and a decoder, as one function of ids and mask."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=input_ids[:, :5]).logits


def _tokens(outputs, batch):
    logits = getattr(outputs, "logits", outputs).transpose(1, 2)
    return F.cross_entropy(logits, batch["input_ids"][:, : logits.shape[2]] % logits.shape[1], reduction="none").sum(1)


def _model(name, config, **options):
    return getattr(transformers, name)(getattr(transformers, config)(**options))


FAMILIES = {
    "llama, tied": (
        lambda: _model("LlamaForCausalLM", "LlamaConfig", **SMALL, tie_word_embeddings=True),
        _text,
        "causal_lm",
    ),
    "gemma": (
        lambda: _model("GemmaForCausalLM", "GemmaConfig", **SMALL, head_dim=4, num_key_value_heads=1),
        _text,
        "causal_lm",
    ),
    "mixtral": (
        lambda: _model(
            "MixtralForCausalLM",
            "MixtralConfig",
            **SMALL,
            num_key_value_heads=1,
            num_local_experts=4,
            experts_implementation="eager",
        ),
        _text,
        "causal_lm",
    ),
    "opt": (
        lambda: _model(
            "OPTForCausalLM",
            "OPTConfig",
            vocab_size=31,
            hidden_size=8,
            word_embed_proj_dim=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=16,
            max_position_embeddings=32,
        ),
        _text,
        "causal_lm",
    ),
    "mamba": (
        lambda: _model(
            "MambaForCausalLM", "MambaConfig", vocab_size=31, hidden_size=8, state_size=4, num_hidden_layers=1
        ),
        _text,
        "causal_lm",
    ),
    "bert": (
        lambda: _model("BertForSequenceClassification", "BertConfig", **SMALL, num_labels=3),
        _classes,
        "cross_entropy",
    ),
    "bert, tokens": (lambda: _model("BertForTokenClassification", "BertConfig", **SMALL, num_labels=4), _text, _tokens),
    "t5": (
        lambda: Translates(
            _model(
                "T5ForConditionalGeneration",
                "T5Config",
                vocab_size=31,
                d_model=8,
                d_kv=4,
                d_ff=16,
                num_layers=2,
                num_heads=2,
            )
        ),
        _text,
        _tokens,
    ),
    "bart": (
        lambda: Translates(
            _model(
                "BartForConditionalGeneration",
                "BartConfig",
                vocab_size=31,
                d_model=8,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=16,
                decoder_ffn_dim=16,
                max_position_embeddings=32,
                pad_token_id=1,
            )
        ),
        _text,
        _tokens,
    ),
    "vit": (
        lambda: _model(
            "ViTForImageClassification",
            "ViTConfig",
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=16,
            patch_size=4,
            num_labels=3,
        ),
        _pixels,
        "cross_entropy",
    ),
    "swin": (
        lambda: _model(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=16,
            patch_size=2,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[2, 2],
            window_size=4,
            num_labels=3,
        ),
        _pixels,
        "cross_entropy",
    ),
}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_all_that_is_trained_has_autograds_gradient_of_each_example(name):
    torch.manual_seed(0)
    build, data, loss = FAMILIES[name]
    model, batch = build().double().eval(), data()

    def values(outputs, rows):
        return per_sample(loss, outputs, rows_of(batch, rows), len(rows))

    x = {key: value for key, value in batch.items() if key != "labels"}
    capture = Capture(model)
    with capture.attached():
        settle(capture, rows_of(x, torch.arange(4)), values)
        forward = capture.forward(x)
        gradients = forward.gradients(values(forward.outputs, torch.arange(N)))
    assert not capture.lost
    parameters = list(capture.used)
    for i in range(N):
        rows = torch.tensor([i])
        found = torch.autograd.grad(values(call(model, rows_of(x, rows)), rows)[0], parameters, allow_unused=True)
        want = {p: torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)}
        got = {p: torch.zeros_like(p) for p in parameters}
        for block_name, block in capture.blocks.items():
            for piece in block.split(gradients[block_name].rows(i, i + 1).sum(torch.ones(1))):
                got[piece.parameter][piece.rows] += piece.value
        norm = sum(float(g.square().sum()) for g in want.values()) ** 0.5
        for p in parameters:  # norms of some compute in float32
            assert float((got[p] - want[p]).norm()) <= 1e-7 * norm, capture.names[p]


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank correction beside it."""

    def __init__(self, base, rank):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = (
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_ekfac_of_adapters_is_that_of_their_two_maps_by_hand():
    torch.manual_seed(0)
    model = Adapted(nn.Linear(6, 4), 2).double().eval()
    x, y = torch.randn(12, 6, dtype=torch.float64), torch.arange(12) % 4
    influence = Influence(model, curvature=EKFAC(1e-2, fisher="empirical"), progress=False).fit((x, y))
    assert list(influence.capture.covered) == ["down.weight", "up.weight"]
    with torch.no_grad():
        h = model.down(x)
        u = model(x).softmax(1) - F.one_hot(y, 4)
    weights, want = torch.full((12,), 1 / 12, dtype=torch.float64), 0.0
    for a, g in ((x, u @ model.up.weight.detach()), (h, u)):
        a, g = a[:, None], g[:, None]
        matrix = reference.ekfac(a, g[None], weights)
        flat = torch.einsum("nto,ntd->nod", g, a).flatten(1)
        want = (
            want + (flat @ torch.linalg.inv(matrix + 1e-2 * torch.eye(len(matrix), dtype=torch.float64))) @ flat.T / 12
        )
    assert torch.allclose(influence.scores((x, y), (x, y)), want, rtol=1e-9, atol=1e-12)


def test_ekfac_of_an_lstm_is_that_of_its_head_and_the_moments_of_its_parameters_by_hand(monkeypatch):
    monkeypatch.setattr("fastif.model.layers._WIDE", 8)  # all of its parameters are wider: of them, the diagonal
    torch.manual_seed(0)

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.body(x)[0][:, -1])

    model = Classifier().double().eval()
    x, y = torch.randn(10, 5, 6, dtype=torch.float64), torch.arange(10) % 3
    influence = Influence(model, curvature=EKFAC(1e-2, fisher="empirical"), progress=False).fit((x, y))
    assert influence.capture.skipped == {}
    names = dict(model.named_parameters())
    losses = F.cross_entropy(model(x), y, reduction="none")
    each = {
        name: torch.stack([torch.autograd.grad(loss, p, retain_graph=True)[0].flatten() for loss in losses])
        for name, p in names.items()
    }
    want = torch.zeros(10, 10, dtype=torch.float64)
    for name, rows in each.items():
        if name.startswith("body"):
            want += (rows / (rows.square().mean(0) + 1e-2)) @ rows.T / 10
    a = torch.cat([model.body(x)[0][:, -1].detach(), torch.ones(10, 1, dtype=torch.float64)], 1)[:, None]
    u = each["head.bias"][:, None]
    matrix = reference.ekfac(a, u[None], torch.full((10,), 0.1, dtype=torch.float64))
    flat = torch.einsum("nto,ntd->nod", u, a).flatten(1)
    want += (flat @ torch.linalg.inv(matrix + 1e-2 * torch.eye(len(matrix), dtype=torch.float64))) @ flat.T / 10
    assert torch.allclose(influence.scores((x, y), (x, y)), want, rtol=1e-9, atol=1e-12)
