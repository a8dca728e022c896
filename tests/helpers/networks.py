"""Small float64 networks that between them hold every kind of layer and every way of using one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

N = 5  # examples; no network has as many positions, so that no axis can pass for another


class Network(NamedTuple):
    model: nn.Module  # in eval mode
    x: Any
    y: Tensor | None = None
    loss: Any = None  # default: `wavy`, which needs no labels

    @property
    def batch(self) -> Any:
        """What a loss is given beside the outputs."""
        return self.x if self.y is None else self.y


def wavy(outputs: Any, _batch: Any) -> Tensor:
    """A loss of any outputs [n, ...]: curved, and different for every entry."""
    flat = outputs.flatten(1)
    phase = torch.linspace(0, 3, flat.shape[1], dtype=flat.dtype, device=flat.device)
    return (1.3 * flat + phase).sin().sum(1) + flat.square().sum(1) / 7


def inputs(*shape: int) -> Tensor:
    return torch.randn(N, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def tokens(t: int = 7, size: int = 11) -> Tensor:
    """Token numbers [n, t] with repetitions within an example and a padding token, 0, at two places."""
    ids = torch.randint(1, size, (N, t), generator=torch.Generator().manual_seed(2))
    ids[:, 3] = ids[:, 1]
    ids[:, t - 1] = ids[2, 2] = 0
    return ids


def lengths_mask(ids: Tensor) -> Tensor:
    """True where a key is to be left out."""
    return ids == 0


# -------------------------------------------------------------------------------------------------------------- modules


class Apply(nn.Module):
    """A module whose forward is a function of (its layers, x)."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Attends(nn.Module):
    """Embedding, attention over the batch's own tokens or another projection of them, a head."""

    def __init__(self, kind: str, **options: Any):
        super().__init__()
        self.kind = kind
        width = options.get("kdim", 8)
        self.embedding = nn.Embedding(11, 8, padding_idx=0)
        if kind == "cross":
            self.keys, self.values = nn.Linear(8, width), nn.Linear(8, options.get("vdim", width))
        self.attention = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})
        if self.attention.in_proj_bias is not None:  # torch starts them at zero, where a lost bias would not show
            nn.init.normal_(self.attention.in_proj_bias)
            nn.init.normal_(self.attention.out_proj.bias)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat([part.flatten(1) for part in self.parts(ids) if part is not None], 1)

    def parts(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        h = self.embedding(ids)
        q, k, v = (h, h, h) if self.kind == "self" else (h[:, :4], self.keys(h), self.values(h))
        options = self._masks(ids, q.shape[1], k.shape[1])
        if not self.attention.batch_first:
            q, k, v = (z.transpose(0, 1) for z in (q, k, v))
        y, weights = self.attention(q, k, v, **options)
        return (y if self.attention.batch_first else y.transpose(0, 1)), weights

    def _masks(self, ids: Tensor, t: int, s: int) -> dict[str, Any]:
        return {"need_weights": False}


class Masked(Attends):
    def __init__(self, masks: Callable[[Tensor, int, int], dict[str, Any]], **options: Any):
        super().__init__("self", **options)
        self.masks = masks

    def _masks(self, ids: Tensor, t: int, s: int) -> dict[str, Any]:
        return self.masks(ids, t, s)


def causal(t: int) -> Tensor:
    return torch.ones(t, t, dtype=torch.bool).triu(1)


def per_head(ids: Tensor, t: int, s: int) -> dict[str, Any]:
    """Another mask [n * heads, t, s] for every example and head."""
    phase = torch.arange(1, 2 * t * s + 1, dtype=torch.float64).view(2, t, s)
    return {"attn_mask": (phase * (1 + ids.sum(1))[:, None, None, None]).sin().flatten(0, 1), "need_weights": False}


MASKS: dict[str, Callable[[Tensor, int, int], dict[str, Any]]] = {
    "bool": lambda ids, t, s: {"attn_mask": causal(t), "need_weights": False},
    "causal": lambda ids, t, s: {"attn_mask": causal(t), "is_causal": True, "need_weights": False},
    "float": lambda ids, t, s: {"attn_mask": causal(t).double() * -1.5, "need_weights": False},
    "minus infinity": lambda ids, t, s: {
        "attn_mask": torch.zeros(t, t, dtype=torch.float64).masked_fill(causal(t), -torch.inf),
        "need_weights": False,
    },
    "per head": per_head,
    "padding": lambda ids, t, s: {"key_padding_mask": lengths_mask(ids), "need_weights": False},
    "float padding": lambda ids, t, s: {"key_padding_mask": lengths_mask(ids).double() * -2, "need_weights": False},
    "both": lambda ids, t, s: {"key_padding_mask": lengths_mask(ids), "attn_mask": causal(t), "need_weights": False},
    "weights": lambda ids, t, s: {"key_padding_mask": lengths_mask(ids)},
    "weights of heads": lambda ids, t, s: {"attn_mask": causal(t), "average_attn_weights": False},
}


class Coder(nn.Module):
    """Tokens and positions through encoder or decoder layers."""

    def __init__(self, kind: str, positions: str = "[t]", **options: Any):
        super().__init__()
        self.kind, self.rank = kind, positions
        self.tokens, self.positions = nn.Embedding(11, 8, padding_idx=0), nn.Embedding(9, 8)
        options = {"batch_first": True, "dropout": 0.1, "dim_feedforward": 12, **options}
        layer = nn.TransformerEncoderLayer if kind == "encoder" else nn.TransformerDecoderLayer
        self.layers = (
            nn.TransformerEncoder(layer(8, 2, **options), 2, enable_nested_tensor=False)
            if kind == "encoder"
            else layer(8, 2, **options)
        )
        self.head = nn.Linear(8, 3)
        for parameter in self.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])
        h = self.tokens(ids) + self.positions(places if self.rank == "[t]" else places[None])
        if self.kind == "encoder":
            h = self.layers(h, mask=causal(ids.shape[1]), is_causal=True)
        else:
            h = self.layers(h, self.tokens(ids[:, :4]), memory_key_padding_mask=lengths_mask(ids[:, :4]))
        return self.head(h.mean(1))


class Tied(nn.Module):
    """An embedding whose table is the weight of the output layer, or two linear layers of one weight."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second
        second.weight = first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool = False):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.second, self.first(x).tanh(), use_reentrant=self.use_reentrant)


def norm(layer: nn.Module) -> nn.Module:
    """A normalisation layer with parameters and statistics that are not those it starts with."""
    g = torch.Generator().manual_seed(4)
    for tensor in (*layer.parameters(), *(b for b in layer.buffers() if b.is_floating_point())):
        tensor.data.copy_(torch.rand(tensor.shape, generator=g) + 0.5)
    return layer


# --------------------------------------------------------------------------------------------------------------- builds


def _three_times(m: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        x = m.layer(x).tanh()
    return x


def _in_place(m: Any, x: Tensor) -> Tensor:
    h = F.relu_(m.first(x))
    h = m.second(h)
    h += 1
    h[:, 0] *= 2
    return m.third(h).mul_(0.5)


def _conv(kind: Any, channels: tuple[int, int], kernel: Any, size: tuple[int, ...], **options: Any):
    return lambda: Network(kind(*channels, kernel, **options), inputs(channels[0], *size))


def _attends(kind: str, **options: Any):
    return lambda: Network(Attends(kind, **options), tokens())


LAYERS: dict[str, Callable[[], Network]] = {
    "linear": lambda: Network(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)), inputs(6)),
    "linear [n, t, d]": lambda: Network(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), inputs(7, 6)),
    "linear [n, s, t, d]": lambda: Network(nn.Linear(6, 2), inputs(3, 2, 6)),
    "conv1d": _conv(nn.Conv1d, (4, 6), 3, (9,), stride=2, padding=1, dilation=2),
    "conv1d groups": _conv(nn.Conv1d, (4, 6), 3, (9,), groups=2, padding="same", dilation=2),
    "conv1d circular": _conv(nn.Conv1d, (2, 3), 4, (8,), padding=2, padding_mode="circular"),
    "conv1d reflect": _conv(nn.Conv1d, (2, 3), 3, (8,), padding=2, padding_mode="reflect", stride=3),
    "conv2d": _conv(nn.Conv2d, (2, 3), (3, 2), (7, 6), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    "conv2d same, even kernel": _conv(nn.Conv2d, (2, 3), (2, 4), (4, 6), padding="same", bias=False),
    "conv2d valid": _conv(nn.Conv2d, (2, 3), 3, (6, 4), padding="valid", stride=2),
    "conv2d depthwise": _conv(nn.Conv2d, (3, 6), 3, (4, 6), groups=3, padding=1),
    "conv2d replicate": _conv(nn.Conv2d, (2, 2), 3, (4, 4), padding=1, padding_mode="replicate"),
    "conv2d circular, same": _conv(nn.Conv2d, (2, 2), (3, 2), (4, 4), padding="same", padding_mode="circular"),
    "conv2d 1x1": _conv(nn.Conv2d, (3, 4), 1, (2, 3)),
    "conv3d": _conv(nn.Conv3d, (2, 4), (2, 3, 1), (4, 3, 4), stride=(1, 2, 1), padding=(0, 1, 1), groups=2),
    "conv3d reflect": _conv(nn.Conv3d, (1, 2), 2, (3, 3, 3), padding=1, padding_mode="reflect"),
    "conv_transpose1d": _conv(
        nn.ConvTranspose1d, (4, 6), 3, (4,), stride=3, padding=2, output_padding=1, dilation=2, groups=2
    ),
    "conv_transpose2d": _conv(
        nn.ConvTranspose2d, (4, 2), (3, 2), (3, 2), stride=2, padding=(1, 0), output_padding=(1, 0), dilation=(1, 2)
    ),
    "conv_transpose2d groups": _conv(nn.ConvTranspose2d, (4, 6), 3, (3, 2), groups=2, bias=False),
    "conv_transpose3d": _conv(nn.ConvTranspose3d, (2, 2), 2, (2, 3, 2), stride=2, padding=1, output_padding=1),
    "conv_transpose2d, size asked for": lambda: Network(
        Apply(lambda m, x: m.layer(x, output_size=(6, 7)), layer=nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)),
        inputs(2, 3, 4),
    ),
    "embedding": lambda: Network(nn.Embedding(11, 4), tokens()),
    "embedding, one token": lambda: Network(nn.Embedding(11, 4), tokens()[:, 0]),
    "embedding with padding": lambda: Network(nn.Embedding(11, 4, padding_idx=0), tokens()),
    "embedding [n, s, t]": lambda: Network(nn.Embedding(11, 4), tokens(6).view(N, 2, 3)),
    "layer_norm": lambda: Network(norm(nn.LayerNorm(6)), inputs(3, 6)),
    "layer_norm without bias": lambda: Network(norm(nn.LayerNorm(6, bias=False)), inputs(6)),
    "layer_norm, two axes": lambda: Network(norm(nn.LayerNorm((3, 4), eps=0.1)), inputs(2, 3, 4)),
    "rms_norm": lambda: Network(norm(nn.RMSNorm(6)), inputs(3, 6)),
    "rms_norm, two axes": lambda: Network(norm(nn.RMSNorm((3, 4), eps=0.1)), inputs(2, 3, 4)),
    "group_norm": lambda: Network(norm(nn.GroupNorm(2, 4)), inputs(4, 3, 2)),
    "batch_norm1d": lambda: Network(norm(nn.BatchNorm1d(4)), inputs(4)),
    "batch_norm1d [n, c, t]": lambda: Network(norm(nn.BatchNorm1d(4)), inputs(4, 3)),
    "batch_norm2d": lambda: Network(norm(nn.BatchNorm2d(3, eps=0.1)), inputs(3, 2, 4)),
    "batch_norm3d": lambda: Network(norm(nn.BatchNorm3d(2)), inputs(2, 2, 3, 2)),
    "instance_norm1d": lambda: Network(norm(nn.InstanceNorm1d(3, affine=True)), inputs(3, 6)),
    "instance_norm2d": lambda: Network(norm(nn.InstanceNorm2d(3, affine=True)), inputs(3, 4, 2)),
    "self-attention": _attends("self"),
    "self-attention, batch second": _attends("self", batch_first=False),
    "self-attention without bias": _attends("self", bias=False),
    "cross-attention": _attends("cross"),
    "cross-attention, kdim and vdim": _attends("cross", kdim=6, vdim=4),
    "cross-attention, kdim and vdim, batch second": _attends("cross", kdim=6, vdim=4, batch_first=False, bias=False),
    **{
        f"attention, mask: {name}": lambda masks=masks: Network(Masked(masks), tokens())
        for name, masks in MASKS.items()
    },
    "encoder": lambda: Network(Coder("encoder"), tokens()),
    "encoder, norm first": lambda: Network(Coder("encoder", "[1, t]", norm_first=True, activation="gelu"), tokens()),
    "decoder": lambda: Network(Coder("decoder", "[1, t]"), tokens()),
    "tied linear": lambda: Network(Tied(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)), inputs(6)),
    "tied linear with bias": lambda: Network(Tied(nn.Linear(6, 6), nn.Linear(6, 6)), inputs(3, 6)),
    "tied convolution with bias": lambda: Network(
        Tied(nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 3, dilation=2)), inputs(4, 8)
    ),
    "tied embedding": lambda: Network(Tied(nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)), tokens()),
    "tied embedding with bias": lambda: Network(Tied(nn.Embedding(11, 4, padding_idx=0), nn.Linear(4, 11)), tokens()),
    "three times": lambda: Network(Apply(_three_times, layer=nn.Linear(6, 6)), inputs(6)),
    "three times, convolution": lambda: Network(Apply(_three_times, layer=nn.Conv1d(2, 2, 3, padding=1)), inputs(2, 4)),
    "shared module": lambda: Network(
        (lambda shared: nn.Sequential(shared, nn.Tanh(), nn.Sequential(shared, nn.Linear(6, 2))))(nn.Linear(6, 6)),
        inputs(6),
    ),
    "in place": lambda: Network(
        Apply(_in_place, first=nn.Linear(6, 5), second=nn.Linear(5, 4), third=nn.Linear(4, 3)), inputs(6)
    ),
    "frozen": lambda: Network(
        nn.Sequential(nn.Linear(6, 4).requires_grad_(False), nn.Tanh(), nn.Linear(4, 3)), inputs(6)
    ),
    "checkpointed": lambda: Network(Checkpointed(), inputs(6)),
}


def _language(model: nn.Module) -> Network:
    ids = tokens()
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}
    return Network(model, batch, None, "causal_lm")


def _gpt2(**options: Any) -> Network:
    from transformers import GPT2Config, GPT2LMHeadModel

    return _language(
        GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=16, n_embd=8, n_layer=2, n_head=2, **options))
    )


def _gpt2_checkpointed() -> Network:
    network = _gpt2(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    network.model.gradient_checkpointing_enable({"use_reentrant": False})
    network.model.train()  # transformers checkpoints only then
    return network


def _bert() -> Network:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=31,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
        max_position_embeddings=16,
    )
    ids = tokens()
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.arange(N) % 3}
    return Network(BertForSequenceClassification(config), batch, None, "cross_entropy")


def _llama() -> Network:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=31,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    return _language(LlamaForCausalLM(config))


def _conv1d() -> Network:
    from transformers.pytorch_utils import Conv1D

    return Network(nn.Sequential(Conv1D(4, 6), nn.Tanh(), Conv1D(3, 4)), inputs(7, 6))


TRANSFORMERS: dict[str, Callable[[], Network]] = {
    "transformers Conv1D": _conv1d,
    "gpt2, eager": lambda: _gpt2(attn_implementation="eager"),
    "gpt2, sdpa": lambda: _gpt2(attn_implementation="sdpa"),
    "gpt2, checkpointed": _gpt2_checkpointed,
    "bert": _bert,
    "llama": _llama,
}


def build(name: str, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    network = (LAYERS | TRANSFORMERS)[name]()
    network.model.double()
    if name != "gpt2, checkpointed":
        network.model.eval()
    return network._replace(loss=network.loss or wavy)
