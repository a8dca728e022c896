"""The two networks of the experiments: a small CNN for grey images and VGG11 with batch norm for CIFAR-10.

Both end in a single `nn.Linear` called `head`, on top of features that come out of global average pooling.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

ARCHITECTURES = ("cnn", "vgg11")


class SmallCNN(nn.Module):
    """Three 3×3 convolutions with batch norm and ReLU, `channels` wide; the features are the last map's mean.

    The first convolution has stride 2 where the images are 16 pixels or wider; the maps are halved after the first and
    the second.
    """

    def __init__(self, in_channels: int, size: int, classes: int, channels: tuple[int, int, int]):
        super().__init__()
        widths = (in_channels, *channels)
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(pairwise(widths)):
            stride = 2 if number == 0 and size >= 16 else 1
            layers += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            if number < 2:
                layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class VGG11(nn.Module):
    """VGG11 with batch norm for 32×32 images (Simonyan & Zisserman 2015), every convolution `width` times as wide.

    The fully connected layers of the original are one Linear on the 512·width features of the last map.
    """

    def __init__(self, in_channels: int, classes: int, width: float = 1.0):
        super().__init__()
        layers: list[nn.Module] = []
        before = in_channels
        for entry in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
            if isinstance(entry, str):
                layers.append(nn.MaxPool2d(2))
                continue
            after = scaled(entry, width)
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            before = after
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, rounded, at least 1."""
    return max(1, round(channels * width))


def build(
    architecture: str, shape: tuple[int, int, int], classes: int, *, width: float = 1.0, seed: int = 0
) -> nn.Module:
    """A new network for images of `shape` (channels, height, width), its weights drawn from `seed`."""
    if not width > 0:
        raise ValueError(f"width must be positive, got {width}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "cnn":
            channels = (16, 32, 64) if shape[-1] < 16 else (16, 48, 128)
            first, second, third = (scaled(c, width) for c in channels)
            return SmallCNN(shape[0], shape[-1], classes, (first, second, third))
        if architecture == "vgg11":
            return VGG11(shape[0], classes, width)
    raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
