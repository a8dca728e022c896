"""Gradients that a capture gives and that autograd gives, and all that a capture might leave behind."""

import torch

from fastif.data import rows_of
from fastif.model.calls import call
from fastif.model.capture import Capture
from fastif.model.losses import per_sample
from tests.helpers.networks import N


def captured(capture, network):
    with capture.attached():
        forward = capture.forward(network.x)
        losses = per_sample(network.loss, forward.outputs, network.batch, forward.n)
        forward.check(losses)
        return forward.gradients(losses)


def gradients_of(model, layers, data):
    """Of the cross-entropy, by block: every example's gradient as the capture keeps it."""
    capture = Capture(model, layers)
    with capture.attached():
        forward = capture.forward(data[0])
        return forward.gradients(torch.nn.functional.cross_entropy(forward.outputs, data[1], reduction="none"))


def by_autograd(network, parameters):
    """Each example's gradient by itself, {parameter: [n, *shape]}."""
    rows = {parameter: [] for parameter in parameters}
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    for i in range(N):
        x, batch = rows_of(network.x, torch.tensor([i])), rows_of(network.batch, torch.tensor([i]))
        loss = per_sample(network.loss, call(network.model, x), batch, 1)[0]
        grads = torch.autograd.grad(loss, list(parameters), allow_unused=True)
        for parameter, grad in zip(parameters, grads, strict=True):
            rows[parameter].append(torch.zeros_like(parameter) if grad is None else grad)
    for parameter in frozen:
        parameter.requires_grad_(False)
    return {parameter: torch.stack(parts) for parameter, parts in rows.items()}


def snapshot(model):
    """All that a capture might leave behind."""
    tensors = {name: (t.detach().clone(), t.requires_grad) for name, t in model.named_parameters()}
    tensors |= {name: (t.clone(), t.requires_grad) for name, t in model.named_buffers()}
    tensors |= {f"{n}.grad": (p.grad.clone(), False) for n, p in model.named_parameters() if p.grad is not None}
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    modules = [
        (module.training, vars(module).get("forward"), *(list(getattr(module, h)) for h in hooks))
        for module in model.modules()
    ]
    return tensors, modules


def assert_unchanged(before, model):
    tensors, modules = snapshot(model)
    assert modules == before[1]
    assert tensors.keys() == before[0].keys()
    for name, (value, requires_grad) in tensors.items():
        assert torch.equal(value, before[0][name][0]), name
        assert requires_grad == before[0][name][1], name
