"""Features: the input and the output of a classifier's last linear layer for every example, in one pass.

They are all that the samplers need, and all that the curvature of the last layer is made of.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastif.data.batches import as_loader, batch_length, moved_to, walked
from fastif.data.checksums import checksum
from fastif.data.dealing import Part, deal, first_batch, tell_data
from fastif.model.calls import call, placed
from fastif.model.losses import IGNORED
from fastif.ops._checks import first_nonfinite_row
from fastif.progress import tqdm
from fastif.ranks import find_ranks
from fastif.sharded import Sharding, find_sharding


class Extracted(NamedTuple):
    """What the head saw and said, row i for example i, on the CPU in the dtype of the head's weight."""

    features: Tensor  # [n, d], or [n, t, d] where it sees t positions of an example: the input of the head
    logits: Tensor  # [n, c] or [n, t, c], its output
    labels: Tensor | None  # int64 [n] or [n, t], None where the data has none


def extract(
    model: nn.Module,
    data: Any,
    *,
    head: str | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool = True,
    group: Any = None,
) -> Extracted:
    """Features, logits and labels of all examples: one pass in eval mode, without gradients, streamed to the CPU.

    `data` is whatever `fastif.data.as_loader` takes: a DataLoader that does not shuffle, a Dataset, tensors (x, y) or
    x alone; a batch that is a mapping has its labels under "labels". The model returns logits, or something with
    `.logits`. Where the head sees positions (a token classifier), so do the features; samplers take a row per example,
    such as `features.mean(1)`. `head` names the linear layer whose output is the
    model's output; without it, the last nn.Linear of `model.named_modules()`. Batches go to `device`, by default that
    of the head; where the model is elsewhere it is moved there and back. Whatever happens, the model is left as it was:
    training flags, hooks and device.

    On several ranks each takes its run of the batches, and all get all rows; `group` is as for `Influence`.

    Raises ValueError for a head that is not there, is not the model's last operation, or runs more than once per
    forward pass, or on anything but one row per example; for features or logits that are NaN or Inf and labels outside
    [0, c), with the example's index; and for data without examples. Raises TypeError for a model that returns no
    logits.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    >>> features, logits, labels = extract(model, (torch.zeros(5, 4), torch.tensor([0, 1, 1, 0, 1])), progress=False)
    >>> features.shape, logits.shape, labels
    (torch.Size([5, 3]), torch.Size([5, 2]), tensor([0, 1, 1, 0, 1]))
    """
    ranks = find_ranks(group)
    sharding = find_sharding(model, ranks, "extract")
    if ranks.world == 1 or isinstance(data, Iterator):
        extracted = _extract(model, data, 0, head, batch_size, device, progress, sharding)
        assert extracted is not None
        return extracted
    with ranks.together("extract"):
        data = walked(data, batch_size)
        state = {key: checksum(value) for key, value in model.state_dict().items() if isinstance(value, Tensor)}
        ranks.compare("extract", {**tell_data(data, ranks), "head": head, "batch_size": batch_size, "model": state})
        mine = deal(data, ranks)
        part = Part(data, batch_size, [mine]) if len(mine) else None
        example = None
        if sharding is not None:
            example, _ = first_batch(data, batch_size, torch.tensor([0]), lambda *_: torch.tensor([0]))
        shown = progress and ranks.rank == 0
        own = _extract(model, part, mine.start, head, batch_size, device, shown, sharding, example)
        found = {} if own is None else own._asdict()
        sent = {key: value.to(ranks.device) for key, value in found.items() if value is not None}
        parts = [part for part in ranks.gather("features", sent, ranks.device) if part]
        if any(part.keys() != parts[0].keys() for part in parts):
            raise ValueError("extract: some batches have labels and some have none")
        if any(part["features"].shape[1:] != parts[0]["features"].shape[1:] for part in parts):
            raise ValueError("extract: batches must have one number of positions; pad the examples to one length")
        rows = {key: torch.cat([part[key].cpu() for part in parts]) for key in parts[0]}
        return Extracted(rows["features"], rows["logits"], rows.get("labels"))


def _extract(
    model: nn.Module,
    data: Any,
    first: int,
    head: str | None,
    batch_size: int,
    device: torch.device | str | None,
    progress: bool,
    sharding: Sharding | None,
    example: Any = None,
) -> Extracted | None:
    """The same of data that begins with example `first`, None where there are none.

    Of a sharded model the ranks make every pass together; one without further batches goes along with `example`.
    """
    name, layer = find_head(model, head, op="extract")
    loader = () if data is None else as_loader(data, batch_size)
    device = layer.weight.device if device is None else torch.empty(0, device=device).device
    calls: list[tuple[Tensor, Tensor]] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        inputs = args[0] if args else kwargs["input"]
        dtype = layer.weight.dtype
        # Copies: an operation after the head may overwrite its output in place, and would then pass for the head.
        calls.append((inputs.detach().to("cpu", dtype, copy=True), output.detach().to("cpu", dtype, copy=True)))

    features: list[Tensor] = []
    logits: list[Tensor] = []
    labels: list[Tensor | None] = []
    n = first

    def passed(x: Any) -> Any:
        if sharding is None:
            return call(model, moved_to(x, device))
        sharding.begin("forward")
        with sharding.passing("forward"):
            return call(model, moved_to(x, device))

    with (
        _as_it_was(model, device),
        ExitStack() as undo,
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),  # influence needs the digits that autocast drops
        tqdm(loader, "extract", disable=not progress) as batches,
    ):
        hook = layer.register_forward_hook(keep, with_kwargs=True)
        try:
            if sharding is not None:
                sharding.hook(undo)
            for x, y in batches:
                calls.clear()
                output = passed(x)
                batch_features, batch_logits = _checked(name, calls, output, batch_length(x), n)
                if features and batch_features.shape[1:] != features[0].shape[1:]:
                    raise ValueError(
                        f"extract: batches must have one number of positions, got {features[0].shape[1]} and "
                        f"{batch_features.shape[1]}; pad the examples to one length"
                    )
                features.append(batch_features)
                logits.append(batch_logits)
                y = x.get("labels") if y is None and isinstance(x, Mapping) else y
                labels.append(
                    None if y is None else _checked_labels(y, batch_logits.shape[:-1], batch_logits.shape[-1], n)
                )
                n += len(batch_logits)
            if sharding is not None:
                sharding.follow(lambda *_: passed(example))
        finally:
            hook.remove()
            if sharding is not None:
                sharding.reshard()
    if data is None:
        return None
    if n == first:
        raise ValueError("extract: the data holds no examples")
    given = [y for y in labels if y is not None]
    if given and len(given) < len(labels):
        raise ValueError(f"extract: {len(labels) - len(given)} of {len(labels)} batches have no labels")
    return Extracted(torch.cat(features), torch.cat(logits), torch.cat(given) if given else None)


def find_head(model: nn.Module, head: str | None = None, *, op: str = "find_head") -> tuple[str, nn.Linear]:
    """The linear layer named `head`, or the last nn.Linear of `model.named_modules()`, with its name.

    Raises ValueError where there is none, and says what there is; `op` opens the message.

    >>> find_head(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    ('2', Linear(in_features=3, out_features=2, bias=True))
    """
    modules = dict(model.named_modules())
    linear = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    if head is None:
        if not linear:
            last = [f"{name!r} ({type(module).__name__})" for name, module in modules.items()][-3:]
            raise ValueError(f"{op}: the model has no nn.Linear; its last modules are {', '.join(last)}")
        return list(linear.items())[-1]
    if head not in modules:
        known = ", ".join(map(repr, linear)) or "none"
        raise ValueError(f"{op}: the model has no module named {head!r}; its linear layers are {known}")
    if head not in linear:
        raise ValueError(f"{op}: the head must be an nn.Linear, {head!r} is {type(modules[head]).__name__}")
    return head, linear[head]


def called_head(model: nn.Module, x: Any) -> str | None:
    """The last linear layer that a batch calls, of those whose output is the logits where there are any."""
    calls: list[tuple[str, Tensor]] = []

    def noting(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            calls.append((name, output))

        return hook

    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_hook(noting(name)) for name, module in linear]
    try:
        with torch.no_grad():
            outputs = call(model, x)
    finally:
        for hook in hooks:
            hook.remove()
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    last = [
        name
        for name, output in calls
        if isinstance(logits, Tensor) and output.shape == logits.shape and torch.equal(output, logits)
    ]
    return (last or [name for name, _ in calls] or [None])[-1]


def _checked(name: str, calls: list[tuple[Tensor, Tensor]], output: Any, n: int, start: int) -> tuple[Tensor, Tensor]:
    """Input and output of the head's one call in a forward pass over the n examples start, start + 1, ..."""
    if len(calls) != 1:
        raise ValueError(
            f"extract: the head {name!r} must run once per forward pass, it ran {len(calls)} times; "
            "name another layer with head="
        )
    features, logits = calls[0]
    if features.dim() not in (2, 3) or len(features) != n:
        raise ValueError(
            f"extract: the head {name!r} must see one row per example, [b={n}, d], or its positions, [b={n}, t, d], "
            f"it saw shape {list(features.shape)}"
        )
    if not isinstance(output, Tensor):
        output = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise TypeError(
            "extract: the model must return its logits as one tensor [b, c] or in `.logits`, got "
            f"{type(output).__name__}"
        )
    for what, values in (("features", features), ("logits", logits)):
        row = first_nonfinite_row(values.flatten(1))
        if row is not None:
            raise ValueError(f"extract: {what} must be finite, example {start + row} has NaN or Inf")
    said = output.detach().to("cpu", logits.dtype)
    if not torch.equal(said[None] if n == 1 and said.dim() == logits.dim() - 1 else said, logits):
        raise ValueError(
            f"extract: the head {name!r} is not the last operation of the model: the model's output, shape "
            f"{list(output.shape)}, is not the head's, shape {list(logits.shape)}; name the last layer with head=, "
            "and let the model return logits"
        )
    return features, logits


def _checked_labels(y: Any, shape: torch.Size, classes: int, start: int) -> Tensor:
    y = torch.as_tensor(y).detach().cpu()
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"extract: labels must be integers, got {y.dtype}")
    if y.shape != shape:
        what = f"one per example, [b={shape[0]}]" if len(shape) == 1 else f"one per position, {list(shape)}"
        raise ValueError(f"extract: labels must be {what}, got shape {list(y.shape)}")
    wrong = (y < 0) | (y >= classes)
    if len(shape) > 1:
        wrong &= y != IGNORED
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        value = int(y[wrong][0])
        raise ValueError(f"extract: labels must be in [0, c={classes}), example {start + row} has {value}")
    return y.long()


@contextmanager
def _as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model in eval mode on `device`; afterwards each module's training flag and the device are what they were."""
    training = [(module, module.training) for module in model.modules()]
    with placed(model, device, "extract"):
        try:
            model.eval()
            yield
        finally:
            for module, flag in training:
                module.training = flag
