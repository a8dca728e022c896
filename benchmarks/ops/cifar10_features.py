"""Real features for the benchmarks: those of a small CNN, trained on CIFAR-10 on the CPU, kept in runs/.

FASTIF_DATA=folder-with-cifar10 python benchmarks/ops/cifar10_features.py
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastif.data import load
from fastif.evaluation.training import train

CACHE = Path(__file__).parents[2] / "runs" / "cifar10-features.pt"


class Features(NamedTuple):
    penultimate: Tensor  # float32 [50000, 512]: what the last layer sees
    patches: Tensor  # float32 [50000, 512]: 2 x 2 neighbourhoods of the last map, 128 channels, as in PatchCore
    test_accuracy: float


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for before, after in pairwise((3, 32, 64, 128)):
            stride = 2 if before == 3 else 1
            stages += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            stages += [nn.MaxPool2d(2)] if stride == 1 else []
        self.maps = nn.Sequential(*stages)  # [n, 128, 4, 4]
        self.penultimate = nn.Sequential(nn.Flatten(), nn.Linear(128 * 16, 512), nn.ReLU())
        self.head = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.penultimate(self.maps(x)))


def features(epochs: int = 2) -> Features | None:
    """The cached features, or those of a network trained now; None where there is no cache and no FASTIF_DATA.

    After two epochs the network is still unsure of most images, after twelve it is confident of what it has seen.
    """
    cache = CACHE if epochs == 2 else CACHE.with_stem(f"{CACHE.stem}-{epochs}")
    if cache.exists():
        return Features(**torch.load(cache))
    if "FASTIF_DATA" not in os.environ:
        return None
    data = load("cifar10", os.environ["FASTIF_DATA"])
    torch.manual_seed(0)
    net = train(Net(), data.x_train, data.y_train, epochs=epochs, lr=0.1)
    penultimate, patches = [], []
    with torch.inference_mode():
        for x in data.x_train.split(1000):
            maps = net.maps(x)
            penultimate.append(net.penultimate(maps))
            if len(patches) * 4000 < len(data.x_train):  # four neighbourhoods of each of the first 12,500 images
                patches.append(nn.functional.unfold(maps, 2, stride=2).transpose(1, 2).flatten(0, 1))
        answers = torch.cat([net(x).argmax(1) for x in data.x_test.split(1000)])
    accuracy = (answers == data.y_test).float().mean().item()
    made = Features(torch.cat(penultimate), torch.cat(patches)[: len(data.x_train)], accuracy)
    cache.parent.mkdir(exist_ok=True)
    torch.save(made._asdict(), cache)
    return made


if __name__ == "__main__":
    made = features()
    if made is None:
        raise SystemExit("FASTIF_DATA names no folder: see this file's first lines")
    print(f"{CACHE}: {made.test_accuracy:.1%} right on the test set")
    for name, rows in (("penultimate", made.penultimate), ("patches", made.patches)):
        print(f"  {name} {list(rows.shape)}, {(rows == 0).float().mean():.0%} zeros")
