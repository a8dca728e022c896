"""Models of peft as they are: what is trained is covered and nothing else, and its gradients are autograd's."""

import pytest
import torch
from torch import nn

import fastif
from fastif.model.capture import Capture

pytest.importorskip("peft", reason="needs peft")
pytest.importorskip("accelerate", reason="peft needs accelerate")

X, Y = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def adapted(**config):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["0", "2"], **config))
    for name, p in model.named_parameters():  # one side begins at zero, and with it the other's gradients
        if "lora_B" in name:
            nn.init.normal_(p, std=0.5)
    return model.eval()


def several():
    from peft import LoraConfig

    model = adapted()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["0"]))
    for name, p in model.named_parameters():
        if "lora_B.second" in name:
            nn.init.normal_(p, std=0.5)
    model.set_adapter("second")
    return model.eval()


@pytest.mark.parametrize(
    ("make", "covered"),
    [(adapted, 4), (lambda: adapted(modules_to_save=["4"]), 6), (several, 2), (lambda: adapted(bias="lora_only"), 6)],
    ids=["one", "with a head of its own", "the second of two", "with biases"],
)
def test_what_is_trained_is_covered(make, covered):
    model = make()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == covered
    assert set(Capture(model).covered) == trained
    with fastif.capture(model) as captured:
        nn.functional.cross_entropy(model(X), Y).backward()
        gradients = captured.gradients()
    assert gradients.keys() == trained
    each = nn.functional.cross_entropy(model(X), Y, reduction="none")
    for name in trained:
        parameter = model.get_parameter(name)
        rows = torch.stack([torch.autograd.grad(loss, parameter, retain_graph=True)[0] for loss in each])
        assert float(rows.abs().max()) > 0
        torch.testing.assert_close(gradients[name], rows, rtol=1e-4, atol=1e-6)
    influence = fastif.Influence(model, curvature=fastif.EKFAC(1e-2), progress=False).fit((X, Y))
    assert influence.on_parameters((X[:1], Y[:1])).keys() == trained


def test_merged_adapters_are_a_plain_model():
    merged = adapted().merge_and_unload()
    for p in merged.parameters():
        p.requires_grad_(True)
    plain = base()
    plain.load_state_dict(merged.state_dict())
    data = (X, Y)
    found, expected = (
        fastif.Influence(m, curvature=fastif.EKFAC(1e-2), progress=False).fit(data).scores(data, data)
        for m in (merged, plain)
    )
    torch.testing.assert_close(found, expected)


def test_a_head_that_the_adapters_leave_alone_is_no_default():
    """Nor is one that shares its weight with the embedding: an error says what would do."""
    peft = pytest.importorskip("peft", reason="needs peft")
    pytest.importorskip("transformers", reason="needs transformers")
    from tests.helpers.trainers import classifier, language_model

    with pytest.raises(ValueError, match=r"'lm_head' shares its weight with 'transformer.wte': say one .*EKFAC"):
        fastif.Influence(language_model(), "causal_lm")
    base = classifier(num_labels=3)
    assert "classifier" in repr(fastif.Influence(base).capture.blocks)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ValueError, match=r"the head 'base_model.model.classifier' is not trained: say one"):
        fastif.Influence(adapted)
    influence = fastif.Influence(adapted, curvature=fastif.EKFAC("auto"))
    still = sum(not p.requires_grad for p in adapted.parameters())
    with pytest.raises(ValueError, match=f"no layer that can be covered .*; and {still + 2 - 5} more\\)$"):
        fastif.Influence(adapted, curvature=fastif.EKFAC("auto"), layers="!*lora*")
    data = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.tensor([0, 1])}
    told = str(influence.plan(data))
    assert f"  and {still - 4} more: is not trained (requires_grad is False)" in told
    assert told.count("is not trained") == 5
