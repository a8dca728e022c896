"""The zoo: networks as their users have them, each given one try, its gradients held against autograd's.

python -m benchmarks.experiments.zoo --out runs/zoo.json     (or `make zoo`)
python -m benchmarks.experiments.zoo --only gpt2 llama       # some of them
python -m benchmarks.experiments.zoo --only timm torchvision --add   # among what another environment has found

timm and torchvision are made for one torch each: where they cannot be imported, their networks are left out with the
reason, and `--add` brings them from an environment of their own (pyproject's extra `vision`).

Every network has small random weights, in float64 where its kernels know that. `Influence` gets it with no word about
its layers; then each example's gradient of each covered parameter is compared with autograd's for that example alone.
Kept are the share of the trained parameters (of those that autograd gives a gradient to) that is covered, the largest
relative error, and the reasons for what is left out. Wrong is what is off by more than WRONG.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastif
from benchmarks.experiments.zoo_vision import TIMM, TORCHVISION, Absent, timm_network, torchvision_network
from fastif.data.batches import rows_of
from fastif.model.calls import call
from fastif.model.losses import IGNORED, labels_in, per_sample

N, T = 4, 9  # examples and positions
WRONG = 1e-5
ABSENT = ModuleNotFoundError, Absent
SMALL = {  # what configurations call their sizes
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner"), 48),
    **dict.fromkeys(("vocab_size",), 60),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length"), 32),
    **dict.fromkeys(("head_dim", "d_kv"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_selected_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("image_size",), 32),
    **dict.fromkeys(("patch_size",), 8),
    **dict.fromkeys(("state_size",), 8),
}
UNSETTABLE = {"falcon": ("head_dim",), "xlnet": ("max_position_embeddings",), "swin": ("num_attention_heads",)}
PARTICULARS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "mamba2": {"num_heads": 4, "n_groups": 1},
    "squeezebert": {"embedding_size": 32},
}
# fmt: off
CAUSAL = [
    "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon", "mpt", "llama", "mistral", "qwen2", "qwen3",
    "gemma", "gemma2", "gemma3_text", "phi", "phi3", "stablelm", "olmo", "olmo2", "cohere", "starcoder2", "granite",
    "glm", "smollm3", "codegen", "biogpt", "xglm", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "mamba", "mamba2",
    "falcon_mamba",
]
SEQUENCE = [
    "bert", "roberta", "distilbert", "albert", "electra", "deberta-v2", "mpnet", "convbert", "fnet", "xlnet",
    "squeezebert", "esm",
]
TOKEN = [
    "bert", "roberta", "distilbert", "electra",
]
SEQ2SEQ = [
    "t5", "bart", "mbart", "pegasus", "marian", "switch_transformers",
]
IMAGE = [
    "vit", "beit", "swin", "convnext", "resnet", "regnet", "mobilenet_v2", "dinov2", "segformer", "poolformer",
]
AUDIO = [
    "wav2vec2", "hubert", "wavlm",
]
# fmt: on


class Case(NamedTuple):
    name: str
    build: Callable[[], tuple[nn.Module, Any, Any]]  # model, loss, one batch


# ------------------------------------------------------------------------------------------------------------ networks


def token_loss(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of an encoder–decoder's tokens, summed over each example's, [n]."""
    losses = F.cross_entropy(outputs.logits.transpose(1, 2), batch["labels"], ignore_index=IGNORED, reduction="none")
    return losses.sum(1)


def small_config(kind: str, **more: Any) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind)
    known = {key: value for key, value in SMALL.items() if hasattr(config, key) and key not in UNSETTABLE.get(kind, ())}
    return AutoConfig.for_model(kind, **{**known, **PARTICULARS.get(kind, {}), **more})


def text(padded: bool) -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (N, T))
    mask = torch.ones_like(ids)
    if padded:
        for i in range(N):
            mask[i, T - i :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def causal(kind: str) -> tuple[nn.Module, Any, Any]:
    from transformers import AutoModelForCausalLM

    batch = text(padded=kind not in ("mamba", "mamba2", "rwkv", "falcon_mamba"))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    return AutoModelForCausalLM.from_config(small_config(kind)), "causal_lm", {**batch, "labels": labels}


def sequence(kind: str) -> tuple[nn.Module, Any, Any]:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_config(small_config(kind, num_labels=3))
    return model, "cross_entropy", {**text(padded=True), "labels": torch.arange(N) % 3}


def token(kind: str) -> tuple[nn.Module, Any, Any]:
    from transformers import AutoModelForTokenClassification

    batch = text(padded=True)
    labels = torch.randint(0, 5, (N, T)).masked_fill(batch["attention_mask"] == 0, IGNORED)
    return (
        AutoModelForTokenClassification.from_config(small_config(kind, num_labels=5)),
        token_loss,
        {**batch, "labels": labels},
    )


def seq2seq(kind: str) -> tuple[nn.Module, Any, Any]:
    from transformers import AutoModelForSeq2SeqLM

    labels = torch.randint(3, 60, (N, 6))
    decoder = torch.cat([torch.ones(N, 1, dtype=torch.int64), labels[:, :-1]], 1)
    model = AutoModelForSeq2SeqLM.from_config(small_config(kind))
    return model, token_loss, {**text(padded=True), "decoder_input_ids": decoder, "labels": labels}


def image(kind: str) -> tuple[nn.Module, Any, Any]:
    from transformers import AutoModelForImageClassification

    small: dict[str, Any] = {
        "swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "patch_size": 4, "window_size": 4},
        "convnext": {"hidden_sizes": [16, 24], "depths": [1, 1], "num_stages": 2},
        "resnet": {"embedding_size": 16, "hidden_sizes": [16, 24], "depths": [1, 1]},
        "regnet": {"embedding_size": 16, "hidden_sizes": [16, 24], "depths": [1, 1], "groups_width": 8},
        "segformer": {"hidden_sizes": [16, 16, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
        "poolformer": {"hidden_sizes": [16, 16, 16, 16], "depths": [1, 1, 1, 1]},
        "mobilenet_v2": {"depth_multiplier": 0.35},
    }.get(kind, {})
    model = AutoModelForImageClassification.from_config(small_config(kind, num_labels=3, **small))
    return model, "cross_entropy", {"pixel_values": torch.randn(N, 3, 32, 32), "labels": torch.arange(N) % 3}


def audio(kind: str) -> tuple[nn.Module, Any, Any]:
    from transformers import AutoModelForAudioClassification

    small = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    small |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16}
    model = AutoModelForAudioClassification.from_config(small_config(kind, num_labels=3, **small))
    return model, "cross_entropy", {"input_values": torch.randn(N, 800), "labels": torch.arange(N) % 3}


def adapted(kind: str) -> tuple[nn.Module, Any, Any]:
    """GPT-2 with an adapter of peft; only the adapter is trained."""
    import peft

    model, loss, batch = causal("gpt2")
    common: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    config = {
        "lora": lambda: peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, **common),
        "dora": lambda: peft.LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True, use_dora=True, **common),
        "ia3": lambda: peft.IA3Config(
            target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"], fan_in_fan_out=True, **common
        ),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **common),
    }[kind]()
    model = peft.get_peft_model(model, config)
    if kind == "prompt":
        virtual = torch.full((N, 3), IGNORED)
        batch = {**batch, "labels": torch.cat([virtual, batch["labels"]], 1)}
    return model, loss, batch


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], **options: Any):
        super().__init__()
        self.words, self.body, self.head = (
            nn.Embedding(30, 8),
            kind(8, 10, batch_first=True, **options),
            nn.LazyLinear(3),
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.words(ids))[0][:, -1])


class ClassToken(nn.Module):
    """A small vision transformer with its class token, positions and layer scale as bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 17, 16))
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.scale, self.head = nn.Parameter(torch.full((16,), 0.1)), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        h = self.norm(x)
        return self.head((x + self.scale * self.attention(h, h, h, need_weights=False)[0])[:, 0])


class Experts(nn.Module):
    """A mixture of experts whose weights are one tensor [e, d, o], with a router over the two best."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(6, 4, bias=False), nn.Parameter(torch.randn(4, 6, 8) / 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        best = self.router(x).softmax(-1).topk(2)
        mixed = torch.einsum("nk,nd,nkdo->no", best.values, x, self.experts[best.indices])
        return self.head(mixed.tanh())


class Folded(nn.Module):
    """Rows folded into the batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.each(x.flatten(0, 1)).relu().unflatten(0, x.shape[:2]).mean(1))


def of_images(*modules: nn.Module) -> Callable[[], tuple[nn.Module, Any, Any]]:
    def build() -> tuple[nn.Module, Any, Any]:
        model = nn.Sequential(*modules)
        model(torch.randn(2, 3, 16, 16))  # lazy layers learn their sizes
        return model, "cross_entropy", (torch.randn(N, 3, 16, 16), torch.arange(N) % 3)

    return build


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class StandardizedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


def hand_made() -> Iterator[Case]:
    def ids() -> tuple[Tensor, Tensor]:
        return torch.randint(0, 30, (N, T)), torch.arange(N) % 3

    def rows(*shape: int) -> tuple[Tensor, Tensor]:
        return torch.randn(N, *shape), torch.arange(N) % 3

    tail = lambda: (nn.Flatten(), nn.LazyLinear(3))  # noqa: E731
    networks: dict[str, Callable[[], tuple[nn.Module, Any, Any]]] = {
        "LSTM": lambda: (Recurrent(nn.LSTM, num_layers=2), "cross_entropy", ids()),
        "GRU, both ways": lambda: (Recurrent(nn.GRU, bidirectional=True), "cross_entropy", ids()),
        "RNN": lambda: (Recurrent(nn.RNN), "cross_entropy", ids()),
        "class token": lambda: (ClassToken(), "cross_entropy", rows(3, 32, 32)),
        "fused experts": lambda: (Experts(), "cross_entropy", rows(6)),
        "folded rows": lambda: (Folded(), "cross_entropy", rows(5, 6)),
        "EmbeddingBag": lambda: (nn.Sequential(nn.EmbeddingBag(30, 8), nn.Linear(8, 3)), "cross_entropy", ids()),
        "sparse embedding": lambda: (
            nn.Sequential(nn.Embedding(30, 8, sparse=True), nn.Flatten(), nn.Linear(8 * T, 3)),
            "cross_entropy",
            ids(),
        ),
        "PReLU": lambda: (nn.Sequential(nn.Linear(6, 8), nn.PReLU(8), nn.Linear(8, 3)), "cross_entropy", rows(6)),
        "weight norm": lambda: (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3)),
            "cross_entropy",
            rows(6),
        ),
        "spectral norm": lambda: (
            nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3)),
            "cross_entropy",
            rows(6),
        ),
        "LayerNorm2d": of_images(nn.Conv2d(3, 4, 3), LayerNorm2d(4), nn.ReLU(), *tail()),
        "standardized convolution": of_images(StandardizedConv(3, 4, 3), nn.ReLU(), *tail()),
        "batch norm": of_images(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *tail()),
        "group norm": of_images(nn.Conv2d(3, 4, 3, groups=1), nn.GroupNorm(2, 4), nn.ReLU(), *tail()),
        "transposed convolution": of_images(nn.ConvTranspose2d(3, 4, 3), nn.ReLU(), *tail()),
        "encoder of torch": lambda: (
            nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(8 * T, 3)),
            "cross_entropy",
            rows(T, 8),
        ),
    }
    for name, build in networks.items():
        yield Case(name, build)


def cases() -> Iterator[Case]:
    yield from hand_made()
    families = {causal: CAUSAL, sequence: SEQUENCE, token: TOKEN, seq2seq: SEQ2SEQ, image: IMAGE, audio: AUDIO}
    for build, kinds in families.items():
        for kind in kinds:
            yield Case(f"{kind} ({build.__name__})", lambda build=build, kind=kind: build(kind))
    for name, network, kinds in (("timm", timm_network, TIMM), ("torchvision", torchvision_network, TORCHVISION)):
        for kind in kinds:
            yield Case(f"{kind} ({name})", lambda network=network, kind=kind: network(kind))
    for kind in ("lora", "dora", "ia3", "prompt"):
        yield Case(f"gpt2 with {kind}", lambda kind=kind: adapted(kind))


# ----------------------------------------------------------------------------------------------------------- judgement


def judge(build: Callable[[], tuple[nn.Module, Any, Any]]) -> dict[str, Any]:
    try:
        model, loss, batch, true = by_autograd(build, torch.float64)
    except ABSENT:
        raise
    except RuntimeError:  # some kernels know no float64
        try:
            model, loss, batch, true = by_autograd(build, torch.float32)
        except RuntimeError as error:
            raise NotBuilt(error) from error
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {error}") from error
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    reached = {name for name in trained if any(bool(g[name].any()) for g in true)}
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        influence = fastif.Influence(model, loss, fastif.Identity(), progress=False).fit([batch])
    found = captured(influence, [batch])
    seconds = time.perf_counter() - began
    worst = 0.0
    for i in range(N):
        off = size = 0.0
        for name in found:
            off += float((found[name][i] - true[i][name]).square().sum())
            size += float(true[i][name].square().sum())
        worst = max(worst, math.sqrt(off / size) if size else math.sqrt(off))
    covered = sum(trained[name].numel() for name in reached if name in found)
    return {
        "parameters": sum(trained[name].numel() for name in reached),
        "covered": covered / max(1, sum(trained[name].numel() for name in reached)),
        "error": worst,
        "reasons": sorted({reason for name, reason in influence.capture.skipped.items() if name in reached}),
        "seconds": seconds,
    }


class NotBuilt(Exception):
    """The network does not run, or has no gradients, without fastif either."""


def by_autograd(build: Callable[[], tuple[nn.Module, Any, Any]], dtype: torch.dtype) -> tuple[nn.Module, Any, Any, Any]:
    """Model, loss, batch, and every example's gradient, of that example sent through the model by itself."""
    torch.manual_seed(0)
    model, loss, batch = build()
    model, batch = model.to(dtype).eval(), convert(batch, dtype)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return model, loss, batch, [autograd(model, loss, batch, i, trained) for i in range(N)]


def convert(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, Tensor):
        return x.to(dtype) if x.is_floating_point() else x
    return (
        {k: convert(v, dtype) for k, v in x.items()} if isinstance(x, Mapping) else tuple(convert(v, dtype) for v in x)
    )


def autograd(model: nn.Module, loss: Any, batch: Any, i: int, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of example i, sent through the model by itself."""
    one = rows_of(batch, torch.tensor([i]))
    x, y = one if isinstance(one, tuple) else (one, None)
    values = per_sample(loss, call(model, x), labels_in(x, y), 1)
    found = torch.autograd.grad(values.sum(), list(trained.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
        for (name, p), g in zip(trained.items(), found, strict=True)
    }


def captured(influence: fastif.Influence, data: Any) -> dict[str, Tensor]:
    """Every example's gradient of every covered parameter, [n, ...]."""
    capture, found = influence.capture, dict[str, Tensor]()
    with influence.passes.running(None):
        for start, n, gradients in influence.passes.gradients(data, "zoo"):
            for name, g in gradients.items():
                for i, matrix in enumerate(g.formed()):
                    for parameter, rows, value in capture.blocks[name].split(matrix):
                        key = capture.names[parameter]
                        if key not in found:
                            found[key] = torch.zeros(N, *parameter.shape, dtype=parameter.dtype)
                        found[key][start + i][rows] += value.reshape(parameter[rows].shape)
            del n
    return found


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def merged(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of two environments: what was tried now takes the place of what was, and what is absent now does not."""
    tried = {row["name"]: row for row in now if "absent" not in row}
    names = dict.fromkeys([row["name"] for row in (*before, *now)])
    known = {row["name"]: row for row in (*now, *before)}
    return [tried.get(name, known[name]) for name in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/zoo.json"))
    parser.add_argument("--only", nargs="*", help="words of which a network's name must hold one")
    parser.add_argument("--add", action="store_true", help="to what --out holds already")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, build in cases():
        if options.only and not any(word in name for word in options.only):
            continue
        try:
            row = judge(build)
            verdict = "WRONG" if row["error"] > WRONG else "right"
            print(
                f"{name:32s} {verdict} {row['covered']:7.2%} of {row['parameters']:,}, error {row['error']:.1e}",
                flush=True,
            )
        except ABSENT as error:
            row = {"absent": str(error)}
            print(f"{name:32s} left out: {error}", flush=True)
        except NotBuilt as error:
            row = {"not built": str(error)[:400]}
            print(f"{name:32s} not built: {str(error)[:150]!r}", flush=True)
        except Exception as error:
            row = {"refused": f"{type(error).__name__}: {str(error)[:400]}"}
            print(f"{name:32s} REFUSED: {str(error)[:150]!r}", flush=True)
        rows.append({"name": name, **row, "torch": torch.__version__})
    tried = [row for row in rows if "error" in row or "refused" in row]
    well = [row for row in tried if row.get("covered", 0) >= 0.95 and row["error"] <= WRONG]
    wrong = [row["name"] for row in tried if row.get("error", 0) > WRONG]
    print(f"{len(tried)} tried; {len(well)} with 95 % of their parameters or more; wrong: {', '.join(wrong) or 'none'}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.add and options.out.exists():
        rows = merged(json.loads(options.out.read_text())["networks"], rows)
    meta = {"fastif": fastif.__version__, "torch": torch.__version__, "transformers": version_of("transformers")}
    options.out.write_text(json.dumps({"meta": meta, "networks": rows}, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
