"""Networks, their training and their checkpoints."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastif.data import load
from fastif.evaluation.models import ARCHITECTURES, VGG11, build
from fastif.evaluation.training import RECIPES, Checkpoint, load_checkpoint, save_checkpoint, train
from fastif.model.features import find_head

TINY = RECIPES["digits"]._replace(width=0.25, epochs=1)


def blobs(n: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes of 8×8 images that differ in brightness."""
    y = torch.arange(n) % 2
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0)) + 2 * y[:, None, None, None], y


def tiny_network(seed: int = 0) -> nn.Module:
    return build("cnn", (1, 8, 8), 2, width=0.25, seed=seed)


@pytest.mark.parametrize(
    ("architecture", "shape", "features"),
    [("cnn", (1, 8, 8), 64), ("cnn", (1, 28, 28), 128), ("vgg11", (3, 32, 32), 512)],
)
def test_networks_end_in_a_linear_head_with_bias(architecture, shape, features):
    network = build(architecture, shape, 10)
    name, head = find_head(network)
    assert (name, head.in_features, head.out_features) == ("head", features, 10)
    assert head.bias is not None
    assert network.eval()(torch.zeros(2, *shape)).shape == (2, 10)


def test_vgg11_has_eight_convolutions_and_scales_with_width():
    convolutions = [m for m in VGG11(3, 10, width=0.125).modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [8, 16, 32, 32, 64, 64, 64, 64]


def test_weights_come_from_the_seed_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    a, b, c = tiny_network(), tiny_network(), tiny_network(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.head.weight, b.head.weight)
    assert not torch.equal(a.head.weight, c.head.weight)


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan")])
def test_width_must_be_positive(width):
    with pytest.raises(ValueError, match="width must be positive"):
        build("cnn", (1, 8, 8), 2, width=width)


def test_unknown_architectures_are_refused():
    with pytest.raises(ValueError, match=f"one of {', '.join(ARCHITECTURES)}, got 'resnet'"):
        build("resnet", (1, 8, 8), 2)


def test_training_is_the_same_for_a_seed_and_ends_in_eval_mode():
    x, y = blobs()
    state = torch.get_rng_state()
    networks = [
        train(tiny_network(), x, y, epochs=2, lr=0.05, batch_size=16, seed=s, progress=False) for s in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    first, second, other = (network.head.weight for network in networks)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert not networks[0].training
    assert float((networks[0](x).argmax(1) == y).float().mean()) > 0.9


def test_one_step_is_sgd_with_weight_decay_in_the_gradient():
    x, y = blobs(8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    before = model[1].weight.detach().clone()
    nn.functional.cross_entropy(model(x), y).backward()
    gradient = model[1].weight.grad + 0.3 * before
    # One-cycle with a single step ends at its last learning rate; read it from the step itself and check the direction.
    train(model, x, y, epochs=1, lr=0.1, weight_decay=0.3, batch_size=8, seed=0, progress=False)
    moved = before - model[1].weight.detach()
    ratio = float((moved * gradient).sum() / gradient.square().sum())
    torch.testing.assert_close(moved, ratio * gradient, rtol=1e-4, atol=1e-7)
    assert ratio > 0


def test_a_last_batch_of_one_is_left_out():
    x, y = blobs(17)
    assert train(tiny_network(), x, y, epochs=2, lr=0.05, batch_size=16, progress=False) is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": 0}, "epochs and batch_size must be at least 1"),
        ({"batch_size": 0}, "epochs and batch_size must be at least 1"),
        ({"lr": 1e6, "epochs": 30}, "the loss is"),
    ],
)
def test_what_cannot_be_trained_is_refused(change, words):
    x, y = blobs()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Linear(16, 2))
    with pytest.raises(ValueError, match=words):
        train(model, x, y, **{"epochs": 1, "lr": 0.1, "batch_size": 16, "progress": False, **change})
    with pytest.raises(ValueError, match="of one length"):
        train(model, x, y[:3], epochs=1, lr=0.1, progress=False)


def test_the_digits_recipe_learns_the_digits():
    data, recipe = load("digits"), RECIPES["digits"]
    network = build(recipe.architecture, (1, 8, 8), 10, seed=recipe.seed)
    train(network, data.x_train, data.y_train, epochs=3, lr=recipe.lr, batch_size=recipe.batch_size, progress=False)
    assert float((network(data.x_test).argmax(1) == data.y_test).float().mean()) > 0.95


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def stored(tmp_path):
    x, y = blobs()
    network = train(tiny_network(), x, y, epochs=1, lr=0.05, progress=False)
    checkpoint = Checkpoint(network, TINY, "digits", ("dark", "bright|x"), (1, 8, 8))
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, checkpoint)
    return path, checkpoint


def test_a_checkpoint_comes_back_as_it_was(stored):
    path, checkpoint = stored
    again = load_checkpoint(path, {"data": "digits", "width": 0.25, "epochs": 1, "classes": ("dark", "bright|x")})
    assert again[1:] == checkpoint[1:]
    assert not again.model.training
    x, _ = blobs()
    assert torch.equal(again.model(x), checkpoint.model(x))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_facts_that_differ_are_all_named(stored):
    path, _ = stored
    with pytest.raises(
        ValueError, match=r"another network: data is 'digits', expected 'cifar10'; width is 0\.25"
    ) as caught:
        load_checkpoint(path, {"data": "cifar10", "width": 1.0, "epochs": 1})
    assert str(path) in str(caught.value)
    assert "epochs" not in str(caught.value)


def test_a_bit_that_has_changed_is_noticed(stored):
    path, _ = stored
    data = path.read_bytes()
    for place in (-1, -100, data.index(b'"seed') + 9):  # weights, and a fact
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged: its checksum does not fit"):
            load_checkpoint(path)


def test_damaged_and_foreign_files_are_named(stored):
    path, checkpoint = stored
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"torch.save writes something else" * 9):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors is not a safetensors file, or is damaged"):
            load_checkpoint(path)
    state = checkpoint.model.state_dict()
    save_file(state, path)
    with pytest.raises(ValueError, match=r"model\.safetensors was not written by fastif"):
        load_checkpoint(path)
    save_file(state, path, {"fastif": "{}"})
    with pytest.raises(ValueError, match="metadata that make no network"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_checkpoint(path.with_name("other.safetensors"))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("head.bias", None, "the tensor head.bias is missing"),
        ("head.bias", torch.zeros(3), r"head.bias must be \[2\], got \[3\]"),
        ("head.bias", torch.tensor([0.0, float("nan")]), "head.bias holds NaN or Inf"),
        ("tail", torch.zeros(3), "the tensor tail is not part of it"),
    ],
)
def test_a_state_that_does_not_fit_is_described(stored, name, value, words):
    path, checkpoint = stored
    facts = {**TINY._asdict(), "data": "digits", "classes": ["a", "b"], "shape": [1, 8, 8]}
    state = {**checkpoint.model.state_dict(), name: value}
    save_file({key: tensor for key, tensor in state.items() if tensor is not None}, path, {"fastif": json.dumps(facts)})
    with pytest.raises(ValueError, match=words):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("architecture", "resnet", "architecture must be one of cnn, vgg11, got 'resnet'"),
        ("architecture", [], "architecture must be one of"),
        ("width", 65, "width must be a number in (0, 64], got 65"),
        ("width", 0, "width must be"),
        ("width", float("nan"), "width must be"),
        ("width", "1", "width must be"),
        ("width", True, "width must be"),
        ("epochs", 0, "epochs must be an integer >= 1, got 0"),
        ("epochs", 1.5, "epochs must be an integer >= 1, got 1.5"),
        ("lr", float("inf"), "lr must be a positive number, got inf"),
        ("lr", None, "lr must be"),
        ("batch_size", -1, "batch_size must be an integer >= 1, got -1"),
        ("weight_decay", 0, "weight_decay must be a positive number, got 0"),
        ("seed", -1, "seed must be an integer in [0, 2^63), got -1"),
        ("seed", 2**63, "seed must be an integer in [0, 2^63)"),
        ("data", 3, "data must be a string, got 3"),
        ("classes", "ab", "classes must be a list of strings, got 'ab'"),
        ("classes", [], "classes must be"),
        ("classes", [0, 1], "classes must be"),
        ("shape", [8, 8], "shape must be three integers in [1, 65536), got [8, 8]"),
        ("shape", [1, 8, 0], "shape must be"),
        ("shape", [1, 8, 8.0], "shape must be"),
        ("shape", [10**30, 8, 8], "shape must be"),
        ("shape", None, "shape must be"),
        ("shape", [65_535, 8, 8], "does not fit its architecture cnn: body.0.weight must be [4, 65535, 3, 3]"),
    ],
)
def test_facts_that_cannot_be_are_named(stored, name, value, words):
    path, checkpoint = stored
    facts = {**TINY._asdict(), "data": "digits", "classes": ["a", "b"], "shape": [1, 8, 8]}
    save_file(checkpoint.model.state_dict(), path, {"fastif": json.dumps({**facts, name: value})})
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    del facts[name]
    for entry, missing in ((facts, f"{name} is missing"), ([], "must be a JSON object, got []")):
        save_file(checkpoint.model.state_dict(), path, {"fastif": json.dumps(entry)})
        with pytest.raises(ValueError, match=re.escape(missing)):
            load_checkpoint(path)


def test_a_failed_save_leaves_nothing(tmp_path, stored):
    _, checkpoint = stored
    with pytest.raises(OSError, match="No such file"):
        save_checkpoint(tmp_path / "nowhere" / "model.safetensors", checkpoint)
