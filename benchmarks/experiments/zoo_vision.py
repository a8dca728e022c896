"""Networks of timm and torchvision for the zoo: real families with few layers, random weights and small images."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

N, SIZE = 4, 64  # examples, pixels on a side
SMALL_VIT: dict[str, Any] = {"img_size": SIZE, "embed_dim": 48, "depth": 2, "num_heads": 2}
TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": SMALL_VIT,
    "deit_tiny_distilled_patch16_224": SMALL_VIT,
    "beit_base_patch16_224": SMALL_VIT,
    "eva02_tiny_patch14_224": {**SMALL_VIT, "img_size": 56},
    "cait_xxs24_224": SMALL_VIT,
    "xcit_nano_12_p16_224": SMALL_VIT,
    "swin_tiny_patch4_window7_224": {
        "img_size": SIZE, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2),
    },
    "mlp_mixer.MlpMixer": {"img_size": SIZE, "embed_dim": 32, "num_blocks": 2},
    "metaformer.MetaFormer": {"depths": (1, 1), "dims": (16, 24)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (16, 16, 24, 24)},
    "resnet10t": {},
    "resnetv2_50": {"layers": (1, 1, 1, 1), "channels": (32, 32, 64, 64)},
    "efficientnet_lite0": {},
    "mobilenetv3_small_050": {},
    "ghostnet_050": {},
    "regnetx_002": {},
    "densenet121": {"block_config": (2, 2)},
    "repvgg_a0": {},
    "edgenext_xx_small": {},
    "mobilevit_xxs": {},
    "nf_resnet26": {},
}  # fmt: skip
TORCHVISION: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "densenet": {},
    "squeezenet1_1": {},
    "shufflenet_v2_x0_5": {},
    "mobilenet_v2": {"width_mult": 0.25},
    "mobilenet_v3_small": {},
    "mnasnet0_5": {},
    "efficientnet_b0": {},
    "regnet_y_400mf": {},
    "convnext_tiny": {},
    "vision_transformer": {},
    "swin_t": {},
}


class Absent(Exception):
    """A package is not there, or was made for another torch."""


def imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError) as error:  # of an operator that another torch does not have
        raise Absent(f"{package} cannot be imported beside torch {torch.__version__}: {error}") from error


def batch(size: int = SIZE) -> tuple[Tensor, Tensor]:
    return torch.randn(N, 3, size, size), torch.arange(N) % 3


def drawn(model: nn.Module) -> nn.Module:
    """Without weights that begin as zeros, behind which nothing has a gradient."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()):
                parameter.normal_(std=0.1)
    return model


def timm_network(kind: str) -> tuple[nn.Module, str, Any]:
    module, _, name = kind.rpartition(".")
    if module:
        model = getattr(imported(f"timm.models.{module}"), name)(num_classes=3, **TIMM[kind])
    else:
        model = imported("timm").create_model(name, pretrained=False, num_classes=3, **TIMM[kind])
    return drawn(model), "cross_entropy", batch(TIMM[kind].get("img_size", SIZE))


def torchvision_network(kind: str) -> tuple[nn.Module, str, Any]:
    models = imported("torchvision.models")
    if kind == "vision_transformer":
        model: nn.Module = models.VisionTransformer(SIZE, 16, 2, 2, 48, 96, num_classes=3)
    elif kind == "swin_t":
        model = models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=3)
    elif kind == "convnext_tiny":
        block = imported("torchvision.models.convnext").CNBlockConfig
        model = models.ConvNeXt([block(16, 24, 1), block(24, None, 1)], num_classes=3)
    elif kind == "densenet":
        model = models.DenseNet(8, (2, 2), 16, num_classes=3)
    else:
        model = getattr(models, kind)(weights=None, num_classes=3, **TORCHVISION[kind])
    return drawn(model), "cross_entropy", batch()
