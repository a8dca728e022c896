"""A model as a function of the vector of its parameters, and the derivatives that replay asks of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from fastif.data.batches import batch_length
from fastif.model.calls import call
from fastif.model.losses import Loss, Measurement, labels_in, like_outputs, logits_of, measured, per_sample
from fastif.replay.layout import Layout

Matrix = Literal["ggn", "hessian"]
KINKED = {
    "relu", "relu_", "leaky_relu", "leaky_relu_", "_prelu_kernel", "threshold", "hardtanh", "hardtanh_", "clamp",
    "clamp_min", "clamp_max", "abs", "sign", "hardswish", "hardsigmoid", "max", "amax", "maximum", "minimum",
    "rrelu_with_noise", "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d",
    "adaptive_max_pool3d",
}  # fmt: skip


class Products(NamedTuple):
    """Of vectors c [q, P], at one place of the path."""

    curved: Tensor | None  # [q, P]: the matrix of Σ_i w_i ℓ_i times c
    changes: Tensor  # [q, b]: ⟨J_i c, e_i⟩, the change of every example's loss along c where e = ∇ℓ


class Network:
    """The model, run with the parameters that it is given; its own are never touched."""

    def __init__(self, model: nn.Module, loss: Loss, layout: Layout, constants: Mapping[str, Tensor], at_a_time: int):
        self._caller, self.loss, self.layout, self.at_a_time = _Caller(model), loss, layout, at_a_time
        self._constants = {f"model.{name}": value for name, value in constants.items()}

    def outputs(self, at: Tensor, x: Any) -> Any:
        parameters = {f"model.{name}": value for name, value in self.layout.split(at).items()}
        return functional_call(self._caller, {**parameters, **self._constants}, (x,))

    def losses(self, at: Tensor, x: Any, y: Any) -> Tensor:
        n = batch_length(x)
        return per_sample(self.loss, self.outputs(at, x), labels_in(x, y), n)

    def gradient(self, at: Tensor, x: Any, y: Any, weights: Tensor) -> Tensor:
        """Σ_i w_i ∇ℓ_i, [P]."""
        leaf = at.detach().requires_grad_()
        (found,) = torch.autograd.grad((self.losses(leaf, x, y) * weights).sum(), leaf)
        return found

    def residuals(self, at: Tensor, x: Any, y: Any) -> Tensor:
        """e_i = ∇ℓ_i with respect to the logits, [b, ...]."""
        with torch.no_grad():
            outputs = self.outputs(at, x)
        return self._residuals(outputs, logits_of(outputs).detach(), x, y)

    def query_gradient(self, at: Tensor, x: Any, y: Any, measurement: Measurement) -> Tensor:
        """Of one query's measurement, [P]."""
        leaf = at.detach().requires_grad_()
        values = measured(measurement, self.loss, self.outputs(leaf, x), labels_in(x, y), 1)
        return torch.autograd.grad(values.sum(), leaf)[0]

    def products(
        self, at: Tensor, x: Any, y: Any, weights: Tensor | None, matrix: Matrix, c: Tensor, residuals: Tensor | None
    ) -> Products:
        """Of vectors c with the matrix of Σ_i w_i ℓ_i and with the examples' gradients.

        Args:
            weights: [b]; None: of the examples' gradients alone.
            residuals: e [b, ...] in the place of ∇ℓ; None: the batch's own.
        """
        n, labels, template = batch_length(x), labels_in(x, y), list[Any]()
        w: Any = weights

        def logits(at: Tensor) -> Tensor:
            template[:] = [self.outputs(at, x)]
            return logits_of(template[0])

        def objective(at: Tensor) -> tuple[Tensor, Tensor]:
            z = logits(at)
            return (per_sample(self.loss, template[0], labels, n) * w).sum(), z

        def of_logits(z: Tensor) -> Tensor:
            return (per_sample(self.loss, like_outputs(template[0], z), labels, n) * w).sum()

        if residuals is None:
            residuals = self.residuals(at, x, y)
        pullback: Any = None
        z: Any = None
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no forward derivative
            if weights is not None and matrix == "ggn":
                z, pullback = vjp(logits, at)[:2]

            def along(vector: Tensor) -> tuple[Tensor, ...]:
                if weights is not None and pullback is None:
                    _, (curved, moved) = jvp(grad(objective, has_aux=True), (at,), (vector,))[:2]
                else:
                    _, moved = jvp(logits, (at,), (vector,))[:2]
                    curved = None if pullback is None else pullback(jvp(grad(of_logits), (z,), (moved,))[1])[0]
                changes = (moved * residuals).reshape(n, -1).sum(1)
                return (changes,) if curved is None else (changes, curved)

            changes, *curved = vmap(along, chunk_size=self.at_a_time)(c)
        return Products(curved[0] if curved else None, changes)

    def _residuals(self, outputs: Any, logits: Tensor, x: Any, y: Any) -> Tensor:
        leaf = logits.detach().requires_grad_()
        values = per_sample(self.loss, like_outputs(outputs, leaf), labels_in(x, y), batch_length(x))
        return torch.autograd.grad(values.sum(), leaf)[0]

    @contextmanager
    def running(self, modes: tuple[str, ...]) -> Iterator[None]:
        """The model's modules in the modes of a training, and afterwards in their own."""
        modules = dict(self._caller.model.named_modules())
        before = {name: module.training for name, module in modules.items()}
        with ExitStack() as undo:
            undo.enter_context(torch.inference_mode(False))
            undo.enter_context(torch.enable_grad())
            undo.callback(lambda: [setattr(module, "training", before[name]) for name, module in modules.items()])
            for name, module in modules.items():
                module.training = name in modes
            yield

    def find_kinks(self, at: Tensor, x: Any, y: Any) -> list[str]:
        """Operations of the forward pass whose second derivative is zero or missing where they bend."""
        with _Noting() as noting, torch.no_grad():
            self.outputs(at, x)
        return sorted(noting.found & KINKED)


class _Caller(nn.Module):
    """The model with one input, whatever its batches look like."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Any:
        return call(self.model, x)


class _Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.add(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))
