"""Losses and measurements: one value per example, and what the curvature needs of the outputs.

A loss is a name or a function of (outputs, batch). `outputs` is what the model returned (its `.logits`, where there
are some, for the named ones), `batch` the labels y of a pair (x, y), or the whole mapping where the batch is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from fastif.data.batch import whole

Loss = Literal["cross_entropy", "token_cross_entropy", "causal_lm", "bce", "mse"] | Callable[[Any, Any], Tensor]
Measurement = Literal["loss", "margin", "log_odds"] | Callable[[Any, Any], Tensor]
Fisher = Literal["auto", "exact", "monte_carlo", "empirical"]

LOSSES = ("cross_entropy", "token_cross_entropy", "causal_lm", "bce", "mse")
MEASUREMENTS = ("loss", "margin", "log_odds")
_SOFTMAX = ("cross_entropy", "token_cross_entropy", "causal_lm")
_HESSIANS = 1 << 31  # bytes that the output Hessians of a function as loss may take
_SKIPPED = 1 << 20  # numbers that are drawn at a time to be passed over
IGNORED = -100  # the label of positions that do not count


def check_loss(loss: Any) -> None:
    if not callable(loss) and loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)} or a function of (outputs, batch), got {loss!r}")


def check_measurement(measurement: Any, loss: Any) -> None:
    if callable(measurement) or measurement == "loss":
        return
    if measurement not in MEASUREMENTS:
        raise ValueError(
            f"measurement must be one of {', '.join(MEASUREMENTS)} or a function of (outputs, batch), "
            f"got {measurement!r}"
        )
    if loss != "cross_entropy":
        raise ValueError(f"measurement={measurement!r} is defined for loss='cross_entropy', got loss={loss!r}")


def loss_name(loss: Any) -> str:
    """A loss by its name; of a function its own."""
    if isinstance(loss, partial):
        return loss_name(loss.func)
    return loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)


def per_sample(loss: Any, outputs: Any, batch: Any, n: int) -> Tensor:
    """The losses [n] of a batch.

    - "cross_entropy": −log softmax(logits)[label], logits [n, c] and integer labels [n]; with positions (logits
      [n, c, ...] as torch has them or [n, ..., c], labels [n, ...]) their sum. Labels −100 do not count. Where the
      shapes fit both (as many positions as classes), outputs with `.logits` [n, t, c] are read as that, as transformers
      mean them; a plain tensor is refused.
    - "token_cross_entropy": the same, the classes always last.
    - "causal_lm": logits [n, t, v] and token labels [n, t]; Σ over t of the cross-entropy of label t+1 given position
      t, labels −100 left out.
    - "bce": binary cross-entropy with logits, summed over the outputs of an example.
    - "mse": squared error, summed over the outputs of an example.
    - a function: must return [n].
    """
    if callable(loss):
        return _values_of(loss, "loss", outputs, batch, n)
    labels = labels_of(batch)
    if loss in _SOFTMAX:
        scores, labels = _class_axis_last(loss, outputs, labels, n)
        losses = F.cross_entropy(scores.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=IGNORED)
        return losses.view(n, -1).sum(1)
    scores = _with_batch_axis(logits_of(outputs), n, labels.dim())
    targets = _targets(loss, scores, labels, n)
    if loss == "bce":
        losses = F.binary_cross_entropy_with_logits(scores, targets, reduction="none")
    else:
        losses = (scores - targets).square()
    return losses.reshape(n, -1).sum(1)


def _values_of(function: Any, name: str, outputs: Any, batch: Any, n: int) -> Tensor:
    values = function(outputs, batch)
    if not isinstance(values, Tensor) or values.shape != (n,):
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        advice = '; a mean or a sum will not do: use reduction="none"' if got == [] else ""
        raise ValueError(f"{name}: must return one value per example, shape [n={n}], got {got}{advice}")
    return values


def measured(measurement: Any, loss: Any, outputs: Any, batch: Any, n: int) -> Tensor:
    """What is asked of the queries, [n].

    "loss": the loss; "margin": the label's logit minus the largest other; "log_odds": log p/(1 − p) of the label.
    """
    if measurement == "loss":
        return per_sample(loss, outputs, batch, n)
    if callable(measurement):
        return _values_of(measurement, "measurement", outputs, batch, n)
    logits, labels = _class_axis_last("cross_entropy", outputs, labels_of(batch), n)
    if logits.shape[1] != 1 or bool((labels == IGNORED).any()):
        raise ValueError(
            f"measurement: {measurement!r} needs one label per example and none that is {IGNORED}, got labels of shape "
            f"{list(labels_of(batch).shape)}, {int((labels == IGNORED).sum())} of them {IGNORED}"
        )
    logits, labels = logits.reshape(n, -1), labels.reshape(n)
    if measurement == "log_odds":
        return log_odds(logits, labels)
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """log p/(1 − p) of each row's label, of logits [n, c] and labels [n]."""
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)


def squared_outputs(outputs: Any, batch: Any) -> Tensor:
    """½ ‖z‖² of every example, [n], whose curvature in the outputs is the identity."""
    squares = logits_of(outputs).square()
    return 0.5 * squares.reshape(len(labels_of(batch)), -1).sum(1)  # some models squeeze a batch of one


def settle_fisher(fisher: Fisher, loss: Any, outputs: Any, batch: Any, n: int) -> Fisher:
    """What "auto" comes to for a batch: "monte_carlo" where an example has several labels, else "exact".

    Several labels are those of a text's words or of the parts of an image; of "causal_lm" there always are. "exact"
    would take a backward pass for each of their classes.
    """
    if fisher != "auto":
        return fisher
    if loss == "causal_lm":
        return "monte_carlo"
    several = loss in _SOFTMAX and _class_axis_last(loss, outputs, labels_of(batch), n)[1].shape[1] > 1
    return "monte_carlo" if several else "exact"


def output_columns(
    loss: Any, outputs: Any, batch: Any, n: int, fisher: str, generator: Generator | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (outputs [n, ...], columns of the same shape): the vectors s whose JᵀssᵀJ add up to the curvature.

    "exact": the columns of a square root of the output Hessian H_i, one pair per output, Σ s sᵀ = H_i; the sum is the
    GGN. "monte_carlo": one s = ∇ℓ at labels drawn from the model's own prediction, E s sᵀ = H_i. ("empirical" needs no
    columns: it is the loss's own gradient.) docs/math.md (6).
    """
    if callable(loss) and loss is not squared_outputs:
        yield from _columns_of_function(loss, outputs, batch, n, fisher, generator)
        return
    if not callable(loss) and loss in _SOFTMAX:
        scores, labels = _class_axis_last(loss, outputs, labels_of(batch), n)
        probs = scores.detach().softmax(-1)  # [n, t, c]
        counted = (labels != IGNORED)[..., None]
        c = scores.shape[-1]
        if fisher == "monte_carlo":
            drawn = _draw(probs.flatten(0, -2), generator).view(labels.shape)
            yield scores, (probs - F.one_hot(drawn, c)) * counted
            return
        if scores.shape[1] > 1:
            raise ValueError(
                f"fisher='exact' with loss={loss!r} would need {scores.shape[1]} x {c} backward passes per batch: "
                "choose fisher='auto', 'monte_carlo' or 'empirical'"
            )
        roots = probs.sqrt()
        for k in range(c):
            column = -roots[..., k, None] * probs
            column[..., k] = roots[..., k] * (1 - probs[..., k])
            yield scores, column * counted
        return
    scores = logits_of(outputs).reshape(n, -1)
    if loss == "bce":
        spread = (scores.detach().sigmoid() * (1 - scores.detach().sigmoid())).sqrt()
    else:  # "mse", whose curvature is twice that of `squared_outputs`
        spread = torch.full_like(scores.detach(), 2**0.5 if loss == "mse" else 1.0)
    if fisher == "monte_carlo":
        if loss == "bce":
            probs = scores.detach().sigmoid()
            drawn = torch.rand(probs.shape, generator=generator, dtype=torch.float64).to(probs.device)
            yield scores, probs - (drawn < probs).to(probs)
        else:  # signs have the variance of a normal law; torch's normal draws depend on how many are drawn at once
            yield scores, spread * _signs(scores.shape, generator).to(spread)
        return
    for k in range(scores.shape[1]):
        column = torch.zeros_like(spread)
        column[:, k] = spread[:, k]
        yield scores, column


def logits_of(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"loss: the model must return a tensor or something with `.logits`, got {type(outputs).__name__}; "
            "or pass a function as loss"
        )
    return logits_of(logits)


class Logits(dict):
    """Outputs of which the logits alone are there: `.logits`, ["logits"] or [0]."""

    def __init__(self, logits: Tensor):
        super().__init__(logits=logits)

    def __missing__(self, key: Any) -> Any:
        if key == 0:
            return self["logits"]
        raise ValueError(
            f"loss: the curvature in the outputs needs a function of the logits alone, it asks for {key!r}; choose "
            "fisher='empirical'"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]


def like_outputs(outputs: Any, logits: Tensor) -> Any:
    """Outputs as a loss takes them, with other logits."""
    return logits if isinstance(outputs, Tensor) else Logits(logits)


def labels_in(x: Any, y: Any) -> Any:
    """What a loss is given beside the outputs: y, or the whole mapping where the batch is one."""
    return whole(x if y is None and isinstance(x, Mapping) else y)


def labels_of(batch: Any) -> Tensor:
    labels = batch.get("labels") if isinstance(batch, Mapping) else batch
    if not isinstance(labels, Tensor):
        raise ValueError("loss: the data has no labels: batches must be pairs (x, y) or mappings with 'labels'")
    return labels


def _class_axis_last(loss: str, outputs: Any, labels: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Logits [n, t, c] and labels [n, t] of one example's positions."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"loss: labels of {loss!r} must be integers, got {labels.dtype}")
    logits = _with_batch_axis(logits_of(outputs), n, labels.dim() + 1)
    if loss == "causal_lm":
        if logits.dim() != 3 or labels.shape != logits.shape[:2] or logits.shape[1] < 2:
            raise ValueError(
                f"loss: 'causal_lm' needs logits [n, t, v] and labels [n, t] with t >= 2, got {list(logits.shape)} "
                f"and {list(labels.shape)}"
            )
        logits, labels = logits[:, :-1], labels[:, 1:]
    elif _classes_last(loss, logits, labels, n, plain=isinstance(outputs, Tensor)):
        logits, labels = logits.reshape(n, -1, logits.shape[-1]), labels.reshape(n, -1)
    else:
        logits, labels = logits.reshape(n, logits.shape[1], -1).mT, labels.reshape(n, -1)
    outside = (labels != IGNORED) & ((labels < 0) | (labels >= logits.shape[-1]))
    if bool(outside.any()):
        row = int(outside.nonzero()[0, 0])
        value = int(labels[outside][0])
        raise ValueError(f"loss: labels must be in [0, c={logits.shape[-1]}), example {row} of the batch has {value}")
    return logits, labels.long()


def _classes_last(loss: str, logits: Tensor, labels: Tensor, n: int, plain: bool) -> bool:
    """Whether the classes are the last axis of the logits, by their shape; else the second."""
    last = len(labels) == n and logits.dim() >= 2 and labels.shape == logits.shape[:-1]
    second = len(labels) == n and logits.dim() >= 2 and labels.shape == (n, *logits.shape[2:])
    if not last and (loss == "token_cross_entropy" or not second):
        forms = "[n, ..., c]" if loss == "token_cross_entropy" else f"[n={n}, c, ...] or [n, ..., c]"
        raise ValueError(
            f"loss: {loss!r} needs logits {forms} and labels [n={n}, ...], got "
            f"{list(logits.shape)} and {list(labels.shape)}"
        )
    if not (last and second) or loss == "token_cross_entropy" or logits.dim() == 2:
        return last
    if plain:
        raise ValueError(
            f"loss: logits {list(logits.shape)} and labels {list(labels.shape)} fit as [n, c, ...] and as [n, ..., c]: "
            "pass loss='token_cross_entropy' where the classes are last, and where they are second "
            "loss=lambda outputs, y: cross_entropy(outputs, y, reduction='none').flatten(1).sum(1)"
        )
    return logits.dim() == 3  # transformers: tokens [n, t, c], but segmented images [n, c, h, w]


def _with_batch_axis(outputs: Tensor, n: int, dims: int) -> Tensor:
    """The outputs of one example with the axis that a model's `.squeeze()` took."""
    return outputs[None] if n == 1 and outputs.dim() in (0, dims - 1) else outputs


def _targets(loss: str, outputs: Tensor, labels: Tensor, n: int) -> Tensor:
    targets = labels.to(outputs)
    if len(outputs) != n or outputs.numel() != targets.numel():
        raise ValueError(
            f"loss: {loss!r} needs outputs and targets of one shape [n={n}, ...], got {list(outputs.shape)} and "
            f"{list(targets.shape)}"
        )
    return targets.view(outputs.shape)


def _draw(probs: Tensor, generator: Generator | None) -> Tensor:
    """One class per row of probs [m, c], by inversion of CPU draws: the same on every device."""
    u = torch.rand(len(probs), 1, generator=generator, dtype=torch.float64).to(probs.device)
    cumulative = probs.double().cumsum(1)
    return (u * cumulative[:, -1:] >= cumulative).sum(1).clamp(max=probs.shape[1] - 1)


def count_draws(loss: Any, outputs: Any, batch: Any, n: int) -> int:
    """How many numbers `output_columns` draws of each example for fisher="monte_carlo"."""
    if loss in _SOFTMAX:
        return _class_axis_last(loss, outputs, labels_of(batch), n)[1].shape[1]
    return logits_of(outputs).numel() // n


def skip_draws(loss: Any, number: int, generator: Generator) -> None:
    """Draws so many of these numbers, as if for other examples."""
    for begin in range(0, number, _SKIPPED):
        some = min(_SKIPPED, number - begin)
        if loss in _SOFTMAX or loss == "bce":
            torch.rand(some, generator=generator, dtype=torch.float64)
        else:
            _signs((some,), generator)


def _signs(shape: Sequence[int], generator: Generator | None) -> Tensor:
    return torch.randint(0, 2, tuple(shape), generator=generator) * 2 - 1


def _eigen(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [n, m] and vectors [n, m, m] of symmetric matrices; diagonal ones, as those of sums of functions of
    single outputs, need no decomposition, which takes a quarter of a second an example for a thousand."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    alone = hessian.count_nonzero((1, 2)) == diagonal.count_nonzero(1)
    if bool((alone & diagonal.isfinite().all(1)).all()):
        return diagonal, torch.eye(hessian.shape[1]).to(hessian).expand_as(hessian)
    return torch.linalg.eigh(hessian)


def _columns_of_function(
    loss: Any, outputs: Any, batch: Any, n: int, fisher: str, generator: Generator | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Columns of a user's loss: a root of its output Hessian, found by autograd example by example."""
    scores = logits_of(outputs)
    m = scores.numel() // n
    if 8 * n * m * m > _HESSIANS:
        raise ValueError(
            f"loss: fisher={fisher!r} with a function takes the output Hessians of {n} examples with {m} outputs, "
            f"{8 * n * m * m >> 20} MiB: choose a smaller batch_size, a loss by its name, or fisher='empirical'"
        )
    with torch.enable_grad():
        leaf = scores.detach().requires_grad_()
        values = per_sample(loss, like_outputs(outputs, leaf), batch, n)
        (gradient,) = torch.autograd.grad(values.sum(), leaf, create_graph=True)
        if not gradient.requires_grad:
            raise ValueError("loss: the function has no second derivative in the outputs; choose fisher='empirical'")
        flat = gradient.reshape(n, -1)
        rows = [torch.autograd.grad(flat[:, k].sum(), leaf, retain_graph=True)[0] for k in range(flat.shape[1])]
    hessian = torch.stack([row.reshape(n, -1) for row in rows], 1)  # [n, m, m]
    values, vectors = _eigen((hessian + hessian.mT).double() / 2)
    lowest = values.amin(1)
    if bool((lowest < -1e-6 * values.abs().amax(1).clamp(min=1e-12)).any()):
        row = int(lowest.argmin())
        raise ValueError(
            f"loss: the output Hessian of example {row} of the batch is not positive semidefinite (lowest eigenvalue "
            f"{float(lowest[row]):.3g}): the GGN needs a loss that is convex in the outputs; choose fisher='empirical'"
        )
    root = (vectors * values.clamp(min=0).sqrt()[:, None, :]).to(scores.dtype)  # [n, m, m], root rootᵀ = H
    if fisher == "monte_carlo":
        signs = _signs((n, root.shape[2], 1), generator).to(root)
        yield scores, (root @ signs).view_as(scores)
        return
    for k in range(root.shape[2]):
        yield scores, root[:, :, k].reshape(scores.shape)
