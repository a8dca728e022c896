"""The image sets of the experiments, read from files."""

import gzip
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

NAMES = ("digits", "fashion-mnist", "cifar10")
HUMAN_LABELS = ("aggre", "random1", "random2", "random3", "worse")


class Data(NamedTuple):
    """Images and labels: x float32 [n, channels, height, width], normalised per channel; y int64 [n]; class names."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: tuple[str, ...]


def load(name: str, root: str | Path | None = None) -> Data:
    """The data set `name` ("digits", "fashion-mnist" or "cifar10"), read from the folder `root`.

    - "digits" comes with scikit-learn and needs no folder: 1,797 images of 8×8, split 80/20 within each class by a
      fixed seed.
    - "fashion-mnist": the four official `*-ubyte.gz` files, in `root` or `root/fashion_mnist`.
    - "cifar10": the shards `shard0.npz`, `shard1.npz`, `shard2.npz`, as many as there are, in `root` or `root/cifar10`.
      Rows are in official order, so with all three shards a training index is the official one.

    Raises FileNotFoundError naming what was looked for and where, and ValueError naming a file that is damaged.
    """
    if name == "digits":
        return _digits()
    if name not in NAMES:
        raise ValueError(f"data must be one of {', '.join(NAMES)}, got {name!r}")
    if root is None:
        raise FileNotFoundError(f"{name} is read from a folder: none was given (--root DIR, or root=)")
    return _fashion_mnist(Path(root)) if name == "fashion-mnist" else _cifar10(Path(root))


# ------------------------------------------------------------------------------------------------ scikit-learn digits


def _digits() -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ModuleNotFoundError("the digits come with scikit-learn, which is not installed") from error
    bunch: Any = load_digits()
    images = (bunch.images / 16).astype(np.float32)[:, None]
    labels = bunch.target.astype(np.int64)
    draw = np.random.default_rng(0)
    is_test = np.zeros(len(labels), bool)
    for label in range(10):
        rows = np.flatnonzero(labels == label)
        is_test[draw.permutation(rows)[: round(len(rows) / 5)]] = True
    mean, std = images[~is_test].mean(dtype=np.float64), images[~is_test].std(dtype=np.float64)
    x, y = torch.from_numpy((images - np.float32(mean)) / np.float32(std)), torch.from_numpy(labels)
    test = torch.from_numpy(is_test)
    return Data(x[~test], y[~test], x[test], y[test], tuple("0123456789"))


# ------------------------------------------------------------------------------------------------------ Fashion-MNIST

_FASHION_CLASSES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"


def _fashion_mnist(root: Path) -> Data:
    stems = {"train": "train", "test": "t10k"}
    names = [f"{stem}-{kind}-ubyte.gz" for stem in stems.values() for kind in ("images-idx3", "labels-idx1")]
    folder = _folder_with(root, "fashion_mnist", names)
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for split, stem in stems.items():
        images_path = folder / f"{stem}-images-idx3-ubyte.gz"
        labels_path = folder / f"{stem}-labels-idx1-ubyte.gz"
        images, labels = _read_idx(images_path, rank=3), _read_idx(labels_path, rank=1)
        if len(images) != len(labels):
            raise ValueError(f"{images_path} holds {len(images)} images but {labels_path} holds {len(labels)} labels")
        _check_labels(labels, 10, labels_path)
        x = _normalised(torch.from_numpy(images)[:, None], [0.2860], [0.3530])
        parts[split] = x, torch.from_numpy(labels.astype(np.int64))
    return Data(*parts["train"], *parts["test"], tuple(_FASHION_CLASSES.split(",")))


def _read_idx(path: Path, rank: int) -> np.ndarray:
    """The uint8 array of a gzipped idx file: two zero bytes, type 8 (uint8), rank, big-endian sizes, values."""
    try:
        with gzip.open(path) as file:
            raw = file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    header = 4 + 4 * rank
    if len(raw) < header or raw[:4] != bytes((0, 0, 8, rank)):
        raise ValueError(f"{path} is not an idx file of uint8 and rank {rank}: it begins with {raw[:4].hex(' ')!r}")
    shape = np.frombuffer(raw, ">u4", count=rank, offset=4).astype(int)
    if len(raw) != header + shape.prod():
        expected = " x ".join(str(size) for size in shape)
        raise ValueError(f"{path} is damaged: {len(raw) - header} values where its header says {expected}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


# ----------------------------------------------------------------------------------------------------------- CIFAR-10
# A shard holds its images as prediction residuals. The planes are G, R - G, B - G; pixels are visited row by row, each
# predicted from its left, upper and upper-left neighbours, and a residual is filed in one of 13 streams by how busy
# the neighbourhood is. The decoder walks over the 3 × 1024 pixel positions, over all images of the shard at once.

_CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR_MEAN, _CIFAR_STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
_STREAMS = 13
_STREAM_OF_ACTIVITY = np.searchsorted([1, 2, 4, 6, 9, 13, 18, 24, 32, 44, 60, 85], np.arange(2048), side="right")


def _cifar10(root: Path) -> Data:
    shards = [_read_shard(path) for path in _shards(root)]
    x: list[Tensor] = []
    y: list[Tensor] = []
    for flag in (0, 1):
        rows = [np.flatnonzero(shard["test"] == flag) for shard in shards]
        order = np.argsort(np.concatenate([shard["i"][r] for shard, r in zip(shards, rows, strict=True)]))
        images = np.concatenate([shard["x"][r] for shard, r in zip(shards, rows, strict=True)])[order]
        labels = np.concatenate([shard["y"][r] for shard, r in zip(shards, rows, strict=True)])[order]
        x.append(_normalised(torch.from_numpy(images), _CIFAR_MEAN, _CIFAR_STD))
        y.append(torch.from_numpy(labels.astype(np.int64)))
    return Data(x[0], y[0], x[1], y[1], tuple(_CIFAR_CLASSES.split()))


def _shards(root: Path) -> list[Path]:
    names = [f"shard{number}.npz" for number in range(3)]
    folder = _folder_with(root, "cifar10", names, need=any)
    return [folder / name for name in names if (folder / name).is_file()]


def _read_shard(path: Path) -> dict[str, np.ndarray]:
    """x uint8 [n, 3, 32, 32], y (class), i (official index within its split), test (0 train, 1 test) of one shard."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            shard = {key: stored[key] for key in ("y", "i", "test")}
            if not len(shard["y"]) == len(shard["i"]) == len(shard["test"]):
                raise ValueError("y, i and test differ in length")
            shard["x"] = _decode(stored, len(shard["y"]))
    except KeyError as error:
        raise ValueError(f"{path} is not a CIFAR-10 shard: it lacks the array {error.args[0]}") from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    _check_labels(shard["y"], 10, path)
    return shard


def _decode(stored: Any, n: int) -> np.ndarray:
    """The n images uint8 [n, 3, 32, 32] whose residuals are `res{plane}_{stream}` of a shard."""
    planes = np.zeros((3, 32, 32, n), np.int16)
    memory = np.zeros((32, 32, n), np.int16)  # how wrong the planes before were at each pixel
    for number, plane in enumerate(planes):
        streams = [stored[f"res{number}_{stream}"] for stream in range(_STREAMS)]
        read = np.zeros(_STREAMS, int)
        base = planes[0] if number else np.zeros_like(planes[0])
        for row in range(32):
            for column in range(32):
                guess, activity = _predict(plane, row, column)
                stream_of = _STREAM_OF_ACTIVITY[activity + memory[row, column]]
                residual = np.empty(n, np.int16)
                for stream, count in enumerate(np.bincount(stream_of, minlength=_STREAMS)):
                    if count:
                        part = streams[stream][read[stream] : read[stream] + count]
                        if len(part) != count:
                            raise ValueError(f"the residuals res{number}_{stream} end too early")
                        residual[stream_of == stream] = part
                        read[stream] += count
                # The stored residual is modulo 256 of the pixel itself, the plane holds its difference to green.
                value = ((guess + base[row, column] + residual) & 255) - base[row, column]
                plane[row, column] = value
                error = memory[row, column] + (np.abs(value - guess) >> 1)
                memory[row, column] = error >> 1 if number else error
    planes[1:] += planes[0]
    return np.ascontiguousarray(planes[[1, 0, 2]].astype(np.uint8).transpose(3, 0, 1, 2))


def _predict(plane: np.ndarray, row: int, column: int) -> tuple[np.ndarray, np.ndarray]:
    """Median-edge guess of one pixel of every image (int16 [n]), and the activity around it (int16 [n])."""
    if row == 0 and column == 0:
        return np.zeros_like(plane[0, 0]), np.zeros_like(plane[0, 0])
    up = plane[row - 1, column] if row else plane[row, column - 1]
    left = plane[row, column - 1] if column else up
    corner = plane[row - 1, column - 1] if row and column else up
    ahead = plane[row - 1, column + 1] if row and column < 31 else up
    guess = np.clip(left + up - corner, np.minimum(up, left), np.maximum(up, left))
    return guess, np.abs(left - corner) + np.abs(up - corner) + np.abs(up - ahead)


def human_labels(kind: str, root: str | Path) -> Tensor:
    """CIFAR-10N (Wei et al. 2022): what people called the training images of `load("cifar10", root)`, int64 [n].

    "worse" has a wrong label wherever one of three people was wrong (40 % of all), "aggre" is their majority (9 %),
    "random1" to "random3" are one of them each (17 to 18 %); wrong is what differs from `load(...).y_train`. Read from
    `labels.npz` in `root` or `root/cifar10n`, for the shards that there are in `root` or `root/cifar10`.

    Raises FileNotFoundError and ValueError as `load` does, ValueError also where its clean labels are not CIFAR-10's.
    """
    if kind not in HUMAN_LABELS:
        raise ValueError(f"human_labels: kind must be one of {', '.join(HUMAN_LABELS)}, got {kind!r}")
    root = Path(root)
    path = _folder_with(root, "cifar10n", ["labels.npz"]) / "labels.npz"
    labels, clean = _arrays(path, "CIFAR-10N", kind, "clean")
    _check_labels(labels, 10, path)
    parts = [_arrays(shard, "a CIFAR-10 shard", "i", "y", "test") for shard in _shards(root)]
    official, known = (np.concatenate([part[place][part[2] == 0] for part in parts]) for place in (0, 1))
    if len(labels) != len(clean) or int(official.max()) >= len(labels) or (clean[official] != known).any():
        raise ValueError(f"{path} does not fit the CIFAR-10 in {root}: its clean labels are others")
    return torch.from_numpy(labels[np.sort(official)].astype(np.int64))


def _arrays(path: Path, what: str, *names: str) -> list[np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return [stored[name] for name in names]
    except KeyError as error:
        raise ValueError(f"{path} is not {what}: it lacks the array {error.args[0]}") from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


# ------------------------------------------------------------------------------------------------------------- shared


def _folder_with(root: Path, name: str, files: list[str], need: Any = all) -> Path:
    """`root` or `root/name`, whichever holds the files (all of them, or with need=any at least one)."""
    for folder in (root, root / name):
        if need((folder / file).is_file() for file in files):
            return folder
    which = "all of" if need is all else "any of"
    raise FileNotFoundError(f"found not {which} {', '.join(files)} in {root} or {root / name}")


def _check_labels(labels: np.ndarray, classes: int, path: Path) -> None:
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"{path} is damaged: labels run from {labels.min()} to {labels.max()}, not in [0, {classes})")


def _normalised(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """uint8 [n, ch, h, w] as float32, (x / 255 - mean) / std per channel, with one float copy in memory."""
    x = images.to(torch.float32)
    return x.div_(255).sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])
