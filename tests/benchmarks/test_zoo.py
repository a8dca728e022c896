"""A part of the zoo: each network one try, right example by example."""

import pytest

from benchmarks.experiments.zoo import WRONG, adapted, cases, judge

PART = ("gpt2", "llama", "gemma", "mixtral", "mamba", "bert", "t5", "vit", "convnext", "wav2vec2")
CASES = {case.name: case.build for case in cases()}
HAND_MADE = [name for name in CASES if "(" not in name and " with " not in name]
FAMILIES = [name for name in CASES if name.partition(" (")[0] in PART and "(" in name]


def check_network(build):
    row = judge(build)
    assert row["error"] <= WRONG
    assert row["covered"] >= 0.95, row["reasons"]


@pytest.mark.parametrize("name", HAND_MADE)
def test_networks_made_by_hand(name):
    check_network(CASES[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_transformers(name):
    pytest.importorskip("transformers", reason="the families come with transformers")
    check_network(CASES[name])


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "prompt"])
def test_adapters(kind):
    pytest.importorskip("peft", reason="the adapters come with peft")
    check_network(lambda: adapted(kind))
