"""The operation inside a layer's forward in which its weight is used, for layers that do more than their kind does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Record = Callable[[str, Tensor, Tensor], None]
_OPERATIONS = {
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "embedding",
    "layer_norm", "group_norm", "batch_norm", "instance_norm", "rms_norm",
}  # fmt: skip


def inner_forward(name: str, module: nn.Module, record: Record, called: set[str]) -> Callable[..., Any]:
    """The module's own forward, which records what goes into the operation with its weight and what comes out."""
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        called.add(name)
        with _Noting(name, module.weight, record):
            return own(*args, **kwargs)

    return forward


class _Noting(TorchFunctionMode):
    def __init__(self, name: str, weight: Any, record: Record):
        super().__init__()
        self._name, self._weight, self._record = name, weight, record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if getattr(func, "__name__", "") in _OPERATIONS and any(x is self._weight for x in (*args, *kwargs.values())):
            x = args[0] if args else kwargs["input"]
            if x is not self._weight:
                self._record(self._name, x, out)
        return out
