"""Readers on files synthesised in the same formats, and on real ones where FASTIF_DATA has them."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fastif.data import HUMAN_LABELS, NAMES, human_labels, load

FASHION = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def real_data(folder: str) -> Path:
    """The folder that FASTIF_DATA names; skips where it names none, or one that lacks the data set's folder."""
    root = os.environ.get("FASTIF_DATA")
    if root is None:
        pytest.skip("FASTIF_DATA, the folder with the data sets, is not set")
    if not (Path(root) / folder).is_dir():
        pytest.skip(f"no {folder} in FASTIF_DATA={root}")
    return Path(root).resolve()  # tests link to files in it


def test_the_real_data_is_only_looked_for_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTIF_DATA", raising=False)
    with pytest.raises(pytest.skip.Exception, match="FASTIF_DATA, .* is not set"):
        real_data("cifar10")
    monkeypatch.setenv("FASTIF_DATA", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="no cifar10 in FASTIF_DATA="):
        real_data("cifar10")
    (tmp_path / "cifar10").mkdir()
    assert real_data("cifar10") == tmp_path


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.fixture
def fashion(tmp_path):
    """A folder with 6 + 4 random images in Fashion-MNIST's files, and the arrays."""
    draw = np.random.default_rng(0)
    arrays = {}
    for name, n in zip(FASHION, (6, 6, 4, 4), strict=True):
        arrays[name] = draw.integers(256, size=(n, 28, 28)) if "images" in name else draw.integers(10, size=n)
        write_idx(tmp_path / f"{name}-ubyte.gz", arrays[name])
    return tmp_path, arrays


def test_fashion_mnist_reads_what_was_written(fashion):
    root, arrays = fashion
    data = load("fashion-mnist", root)
    expected = (arrays["train-images-idx3"] / 255 - 0.2860) / 0.3530
    assert data.x_train.shape == (6, 1, 28, 28)
    assert data.x_train.dtype == torch.float32
    np.testing.assert_allclose(data.x_train[:, 0].numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(data.y_test.numpy(), arrays["t10k-labels-idx1"])
    assert data.classes[9] == "Ankle boot"


def test_the_folder_may_be_a_subfolder(fashion):
    root, _ = fashion
    inner = root / "fashion_mnist"
    inner.mkdir()
    for name in FASHION:
        (root / f"{name}-ubyte.gz").rename(inner / f"{name}-ubyte.gz")
    assert len(load("fashion-mnist", root).x_test) == 4


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no gzip at all", "is damaged"),
        (gzip.compress(bytes(200))[:-12], "is damaged"),
        (gzip.compress(b"PK\x03\x04" + bytes(40)), "is not an idx file of uint8 and rank 3"),
        (gzip.compress(bytes((0, 0, 8, 3)) + np.array([6, 28, 28], ">u4").tobytes() + bytes(99)), "99 values where"),
        (gzip.compress(b""), "is not an idx file"),
    ],
    ids=["no gzip", "cut off", "another format", "too few values", "empty"],
)
def test_damaged_idx_files_are_named(fashion, content, words):
    root, _ = fashion
    path = root / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        load("fashion-mnist", root)
    assert str(path) in str(caught.value)


def test_labels_must_match_the_images(fashion):
    root, _ = fashion
    write_idx(root / "t10k-labels-idx1-ubyte.gz", np.zeros(3))
    with pytest.raises(ValueError, match=r"4 images but .* holds 3 labels"):
        load("fashion-mnist", root)
    write_idx(root / "t10k-labels-idx1-ubyte.gz", np.array([0, 1, 2, 10]))
    with pytest.raises(ValueError, match="labels run from 0 to 10"):
        load("fashion-mnist", root)


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10"])
def test_missing_files_say_what_was_looked_for_and_where(tmp_path, name):
    looked_for = "train-images-idx3-ubyte.gz" if name == "fashion-mnist" else "shard0.npz"
    with pytest.raises(FileNotFoundError) as caught:
        load(name, tmp_path / "nowhere")
    assert looked_for in str(caught.value)
    assert str(tmp_path / "nowhere") in str(caught.value)
    with pytest.raises(FileNotFoundError, match="none was given"):
        load(name)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=f"one of {', '.join(NAMES)}, got 'mnist'"):
        load("mnist")


def test_digits_are_split_within_each_class_and_always_alike():
    data, again = load("digits"), load("digits")
    assert len(data.y_train) + len(data.y_test) == 1797
    for label in range(10):
        train, test = int((data.y_train == label).sum()), int((data.y_test == label).sum())
        assert test == round((train + test) / 5)
    assert torch.equal(data.x_train, again.x_train)
    assert abs(float(data.x_train.mean())) < 1e-4
    assert abs(float(data.x_train.std()) - 1) < 1e-3


# ------------------------------------------------------------------------------------------------------------ CIFAR-10


def median_edge(left: int, up: int, corner: int) -> int:
    return sorted((left, up, left + up - corner))[1]


def encode(images: np.ndarray) -> dict[str, np.ndarray]:
    """The residuals of images uint8 [n, 3, 32, 32], image by image and pixel by pixel, as the format defines them."""
    limits = [1, 2, 4, 6, 9, 13, 18, 24, 32, 44, 60, 85]
    n = len(images)
    red, green, blue = (images[:, channel].astype(int) for channel in range(3))
    memory = np.zeros((n, 32, 32), int)
    streams: dict[tuple[int, int], list[int]] = {(plane, s): [] for plane in range(3) for s in range(13)}
    for number, plane in enumerate((green, red - green, blue - green)):
        for row in range(32):
            for column in range(32):
                for image in range(n):
                    p = plane[image]
                    up = p[row - 1, column] if row else p[row, column - 1] if column else 0
                    left = p[row, column - 1] if column else up
                    corner = p[row - 1, column - 1] if row and column else up
                    ahead = p[row - 1, column + 1] if row and column < 31 else up
                    guess = median_edge(left, up, corner)
                    activity = abs(left - corner) + abs(up - corner) + abs(up - ahead) + memory[image, row, column]
                    stream = sum(activity >= limit for limit in limits)
                    base = green[image, row, column] if number else 0
                    streams[number, stream].append((p[row, column] + base - guess - base) % 256)
                    memory[image, row, column] += abs(p[row, column] - guess) // 2
                    if number:
                        memory[image, row, column] //= 2
    return {f"res{plane}_{s}": np.array(values, np.uint8) for (plane, s), values in streams.items()}


def write_shard(path: Path, images: np.ndarray, labels: list[int], index: list[int], test: list[int]) -> None:
    np.savez(path, y=np.uint8(labels), i=np.int32(index), test=np.uint8(test), **encode(images))


@pytest.fixture
def cifar(tmp_path):
    draw = np.random.default_rng(1)
    smooth = draw.integers(0, 256, (5, 3, 4, 4)).repeat(8, 2).repeat(8, 3)
    images = np.clip(smooth + draw.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)
    images[4] = draw.integers(0, 256, (3, 32, 32))
    write_shard(tmp_path / "shard0.npz", images[:3], [3, 7, 1], [5, 2, 0], [0, 0, 1])
    write_shard(tmp_path / "shard2.npz", images[3:], [0, 9], [3, 1], [0, 1])
    return tmp_path, images


def test_cifar10_decodes_to_the_images_in_official_order(cifar):
    root, images = cifar
    data = load("cifar10", root)
    assert data.y_train.tolist() == [7, 0, 3]  # official indices 2, 3, 5
    assert data.y_test.tolist() == [1, 9]
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
    expected = (images[[1, 3, 0]] / 255 - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(data.x_train.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_damaged_shards_are_named(cifar):
    root, images = cifar
    path = root / "shard0.npz"
    whole = path.read_bytes()
    for content in (whole[:-200], b"PK nothing", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"shard0\.npz is damaged"):
            load("cifar10", root)
    np.savez(path, y=np.uint8([1]))
    with pytest.raises(ValueError, match=r"shard0\.npz is not a CIFAR-10 shard: it lacks the array i"):
        load("cifar10", root)
    short = encode(images[:1])
    short["res0_0"] = short["res0_0"][:-1]
    np.savez(path, y=np.uint8([1]), i=np.int32([0]), test=np.uint8([0]), **short)
    with pytest.raises(ValueError, match="the residuals res0_0 end too early"):
        load("cifar10", root)


def test_a_shard_never_runs_a_pickle(tmp_path):
    np.savez(tmp_path / "shard0.npz", y=np.array([{}], object), i=np.int32([0]), test=np.uint8([0]))
    with pytest.raises(ValueError, match="damaged"):
        load("cifar10", tmp_path)


def test_the_real_fashion_mnist():
    data = load("fashion-mnist", real_data("fashion_mnist"))
    assert data.y_train.bincount().tolist() == [6000] * 10
    assert abs(float(data.x_train.mean())) < 1e-3
    assert data.classes[int(data.y_train[0])] == "Ankle boot"


def test_one_real_shard_of_cifar10(tmp_path):
    root = real_data("cifar10")
    (tmp_path / "shard1.npz").symlink_to(root / "cifar10" / "shard1.npz")
    data = load("cifar10", tmp_path)
    assert data.x_train.shape == (15_000, 3, 32, 32)
    assert data.y_train.bincount().tolist() == [1500] * 10
    # Natural images: neighbouring pixels differ little. A decoder that slips by one value shows noise here.
    assert float((data.x_train[:, :, 1:] - data.x_train[:, :, :-1]).abs().mean()) < 0.3


@pytest.fixture
def cifar_n(cifar):
    """The shards of `cifar`, whose training rows are the official 2, 3, 5, and human labels of six images."""
    root, _ = cifar
    clean = np.int8([4, 4, 7, 0, 4, 3])
    arrays = {"clean": clean, **{kind: (clean + place) % 10 for place, kind in enumerate(HUMAN_LABELS, 1)}}
    (root / "cifar10n").mkdir()
    np.savez(root / "cifar10n" / "labels.npz", **arrays)
    return root, arrays


def test_human_labels_are_in_the_order_of_the_images(cifar_n):
    root, _ = cifar_n
    for place, kind in enumerate(HUMAN_LABELS, 1):
        labels = human_labels(kind, root)
        assert labels.dtype == torch.int64
        assert labels.tolist() == [(y + place) % 10 for y in load("cifar10", root).y_train.tolist()]


def test_human_labels_that_do_not_fit_are_refused(cifar_n):
    root, arrays = cifar_n
    path = root / "cifar10n" / "labels.npz"
    with pytest.raises(ValueError, match="kind must be one of aggre, .* got 'clean'"):
        human_labels("clean", root)
    for change, words in (
        ({"clean": arrays["clean"] ^ 1}, "its clean labels are others"),
        ({name: array[:5] for name, array in arrays.items()}, "its clean labels are others"),
        ({"worse": np.int8([0, 0, 10, 0, 0, 0])}, "labels run from 0 to 10"),
        ({"worse": np.int8([0, -1, 1, 0, 0, 0])}, "labels run from -1 to 1"),
    ):
        np.savez(path, **{**arrays, **change})
        with pytest.raises(ValueError, match=rf"labels\.npz .*{words}"):
            human_labels("worse", root)
    np.savez(path, clean=arrays["clean"])
    with pytest.raises(ValueError, match="is not CIFAR-10N: it lacks the array worse"):
        human_labels("worse", root)
    path.write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match=r"labels\.npz is damaged"):
        human_labels("worse", root)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"labels\.npz"):
        human_labels("worse", root)


def test_the_real_cifar10n(tmp_path):
    root = real_data("cifar10n")
    (tmp_path / "shard0.npz").symlink_to(root / "cifar10" / "shard0.npz")
    (tmp_path / "labels.npz").symlink_to(root / "cifar10n" / "labels.npz")
    with np.load(tmp_path / "shard0.npz") as shard:
        order = shard["i"][shard["test"] == 0].argsort()
        y = torch.from_numpy(shard["y"][shard["test"] == 0][order].astype(np.int64))
    assert float((human_labels("worse", tmp_path) != y).float().mean()) == pytest.approx(0.4021, abs=0.01)
    assert float((human_labels("aggre", tmp_path) != y).float().mean()) == pytest.approx(0.0901, abs=0.01)
