"""How a model is called, where it stands meanwhile, and the type of its parameters."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fastif.data.batch import Arguments, whole
from fastif.renamed import warn_outside
from fastif.sharded import is_part


@contextmanager
def placed(model: nn.Module, device: torch.device, op: str) -> Iterator[None]:
    """The model on `device`, exchanging nothing of its own, and afterwards as it was. Raises ValueError for one that
    would have to be gathered."""
    homes = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    moved = device not in homes
    if moved and any(map(is_part, model.parameters())):
        raise ValueError(f"{op}: the model is sharded, and stays on {', '.join(map(str, homes))}: device={device}")
    if moved and len(homes) > 1:
        places = ", ".join(sorted(map(str, homes)))
        raise ValueError(f"{op}: the model is spread over {places} and cannot be moved to {device}")
    try:
        if moved:
            model.to(device)
        with _exchanging_nothing(model):
            yield
    finally:
        if moved:
            model.to(homes.pop())


@contextmanager
def _exchanging_nothing(model: nn.Module) -> Iterator[None]:
    """Keeps DistributedDataParallel from sending buffers before a forward pass and preparing sums of gradients: ranks
    make as many passes as they have batches, and one that makes more than the others would wait for them for ever."""
    switches = "forward_sync_buffers", "require_backward_grad_sync", "require_forward_param_sync"
    wrapped = [module for module in model.modules() if isinstance(module, nn.parallel.DistributedDataParallel)]
    before = [(module, name, getattr(module, name)) for module in wrapped for name in switches]
    for module, name, _ in before:
        setattr(module, name, False)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def call(model: nn.Module, x: Any) -> Any:
    """The model's outputs; compiled parts run uncompiled, so that hooks see their layers.

    A mapping is taken as keyword arguments, without "labels" and what the model's forward names no argument for;
    `Arguments` as several. What the examples of a batch share goes in whole.
    """
    x = whole(x)
    eager = torch.compiler.set_stance("force_eager") if _is_compiled(model) else nullcontext()
    with eager, _gradients_laid_out(model), _padding_kept(model):
        if isinstance(x, Mapping):
            return model(**{key: x[key] for key in _taken(type(model), tuple(x), tuple(map(type, x.values())))})
        return model(*x) if isinstance(x, Arguments) else model(x)


@contextmanager
def _gradients_laid_out(model: nn.Module) -> Iterator[None]:
    """Has the gradients of normalised batches of one reach their backward pass in the layout of the output.

    On a CPU that pass takes a gradient in another layout, such as one that comes from [1, positions, channels], for one
    in its own, and its results are wrong (seen in torch 2.13 and 2.14); with an axis of one, strides do not tell.
    """
    norms: list[nn.Module] = []
    if torch.is_grad_enabled():
        kinds = nn.modules.batchnorm._NormBase  # BatchNorm and InstanceNorm
        norms = [module for module in model.modules() if isinstance(module, kinds)]
    hooks = [module.register_forward_hook(_lay_out) for module in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _padding_kept(model: nn.Module) -> Iterator[None]:
    """Has a torch encoder see what is padded as it is in training. Where no gradient is asked for it would hand nested
    tensors, which have no shape, to its layers and their hooks, and a shorter output to what stands behind it."""
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor]
    for encoder in encoders:
        encoder.use_nested_tensor = False
    try:
        yield
    finally:
        for encoder in encoders:
            encoder.use_nested_tensor = True


def _lay_out(_module: nn.Module, _args: Any, y: Any) -> None:
    if isinstance(y, Tensor) and y.requires_grad and y.dim() > 3 and len(y) == 1:
        last = torch.channels_last if y.dim() == 4 else torch.channels_last_3d
        layout = last if y.is_contiguous(memory_format=last) and not y.is_contiguous() else torch.contiguous_format
        y.register_hook(lambda gradient: gradient.contiguous(memory_format=layout))


def _is_compiled(model: nn.Module) -> bool:
    return any(module._compiled_call_impl is not None or hasattr(module, "_orig_mod") for module in model.modules())


@lru_cache(maxsize=256)
def _taken(kind: type[nn.Module], keys: tuple[str, ...], types: tuple[type, ...]) -> tuple[str, ...]:
    """The keys of a batch that models of a class take as arguments; says once which tensors they do not."""
    parameters = inspect.signature(kind.forward).parameters
    any_key = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    left_out = [key for key in keys if key != "labels" and not any_key and key not in parameters]
    tensors = [
        repr(key) for key, type_ in zip(keys, types, strict=True) if key in left_out and issubclass(type_, Tensor)
    ]
    if tensors:
        warn_outside(f"{kind.__name__}.forward takes no {', '.join(tensors)}: left out of the batches", UserWarning)
    return tuple(key for key in keys if key != "labels" and key not in left_out)


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of a model's gradients as they are computed with: float64 for a float64 model, else float32."""
    double = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    return torch.float64 if double else torch.float32


def fleeting_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a model's state_dict leaves out (persistent=False), by name."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name in sorted(module._non_persistent_buffers_set):
            value = module._buffers.get(name)
            if value is not None:
                found[f"{path}.{name}" if path else name] = value
    return found
