"""What a network says of removed, retained and held-out examples, and how far that is from retrained networks'.

docs/math.md (29) has the formulas.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from math import prod
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastif.evaluation.membership import membership
from fastif.model.calls import call
from fastif.model.losses import logits_of

PARTS = ("removed", "retained", "held_out")
METRICS = (
    *(f"{part}_{what}" for what in ("accuracy", "loss", "kl") for part in PARTS),
    *("tug_of_war", "membership_auc", "membership_balanced_accuracy", "relearning_steps"),
    *("seconds", "share_of_retraining", "peak_bytes"),
)
DEFINITIONS = {
    "accuracy": "share of the part's examples whose label has the highest logit",
    "loss": "mean cross-entropy of the part, in nats",
    "kl": "mean over the part's examples and the retrained networks (other seeds' for a retrained one) of "
    "KL(retrained || network), in nats; better low",
    "tug_of_war": "product over the three parts of 1 - |accuracy - mean accuracy of the retrained networks (other "
    "seeds' for a retrained one)|; better high, at most 1",
    "membership_auc": "probability that a removed example has a lower loss than a held-out one of the same labels, "
    "ties half; best as near as possible to that of the retrained networks",
    "membership_balanced_accuracy": "of a threshold on the loss, chosen on one half of both and judged on the other, "
    "both ways",
    "relearning_steps": "steps of plain SGD on the removed examples until their mean loss is at most what it was under "
    "the network before the removal; best as near as possible to the retrained networks'",
    "relearned": "false: not within the most steps, which is what relearning_steps then says",
    "seconds": "of the removal; of the training for retrained networks",
    "share_of_retraining": "seconds over the mean seconds of a retraining",
    "peak_bytes": "peak memory that the removal needs on top of what was there before; null where not measured",
    "_mean": "over the seeds",
    "_std": "standard deviation (n - 1) over the seeds; null with one",
    "u_lira": "likelihood-ratio membership inference with half networks as shadows: those that were trained on the "
    "example and had it removed against those that were not; AUC and balanced accuracy, 0.5 by chance; auc_error is "
    "the standard error of the AUC over the pairs of networks",
}

Data = tuple[Tensor, Tensor]


class Outputs(NamedTuple):
    """Logits float64 [m, c] of a network on each part, on the CPU, and the parts' labels."""

    logits: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]

    def losses(self, part: str) -> Tensor:
        return F.cross_entropy(self.logits[part], self.labels[part], reduction="none")

    def accuracy(self, part: str) -> float:
        return float((self.logits[part].argmax(1) == self.labels[part]).double().mean())


def outputs_of(model: nn.Module, parts: Mapping[str, Data], batch_size: int = 1024) -> Outputs:
    """The network's outputs in eval mode, in which it is left."""
    model.eval()
    logits = {name: logits_in_batches(model, x, batch_size) for name, (x, _) in parts.items()}
    for name, values in logits.items():
        if not values.isfinite().all():
            raise ValueError(f"unlearning: the network's logits of the {name} examples are not all finite")
    return Outputs(logits, {name: y.cpu() for name, (_, y) in parts.items()})


def logits_in_batches(model: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    device = next(model.parameters()).device
    with torch.no_grad():
        return torch.cat([logits_of(call(model, part.to(device))).double().cpu() for part in x.split(batch_size)])


def tug_of_war(accuracies: Sequence[float], retrained: Sequence[float]) -> float:
    """Π (1 − |accuracy − retrained accuracy|) over the parts.

    >>> round(tug_of_war([0.5, 1.0, 0.9], [0.25, 1.0, 1.0]), 4)
    0.675
    """
    return prod(1 - abs(a - b) for a, b in zip(accuracies, retrained, strict=True))


def kl(retrained: Tensor, logits: Tensor) -> float:
    """Mean over the rows of KL(softmax(retrained) ‖ softmax(logits)), in nats."""
    p, q = retrained.log_softmax(1), logits.log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


def compare(own: Outputs, retrained: Sequence[Outputs]) -> dict[str, Any]:
    """The metrics of one network that need no further training; None where no retrained one is there to compare."""
    row: dict[str, Any] = {f"{part}_accuracy": own.accuracy(part) for part in PARTS}
    row |= {f"{part}_loss": float(own.losses(part).mean()) for part in PARTS}
    row |= {
        f"{part}_kl": fmean(kl(other.logits[part], own.logits[part]) for other in retrained) if retrained else None
        for part in PARTS
    }
    wanted = [fmean(other.accuracy(part) for other in retrained) for part in PARTS] if retrained else None
    row["tug_of_war"] = None if wanted is None else tug_of_war([own.accuracy(part) for part in PARTS], wanted)
    alike = torch.isin(own.labels["held_out"], own.labels["removed"].unique())
    told = membership(own.losses("removed"), own.losses("held_out")[alike])
    row["membership_auc"], row["membership_balanced_accuracy"] = told
    return row


def relearn(
    model: nn.Module, data: Data, target: float, *, lr: float, most: int, batch_size: int = 64, seed: int = 0
) -> tuple[int, bool]:
    """Steps of plain SGD on `data` until its mean loss is at most `target`, and whether they got there within `most`.

    The network is not changed; its normalisation layers and dropout stay in eval mode. Batches are drawn from `seed`.
    """
    learner = copy.deepcopy(model).eval()
    device = next(learner.parameters()).device
    x, y = data[0].to(device), data[1].to(device)
    optimizer = torch.optim.SGD([p for p in learner.parameters() if p.requires_grad], lr=lr)
    draw = torch.Generator().manual_seed(seed)
    order: list[Tensor] = []
    for step in range(most + 1):
        if float(F.cross_entropy(logits_in_batches(learner, x, 1024), y.cpu())) <= target:
            return step, True
        if step < most:
            order = order or list(torch.randperm(len(y), generator=draw).split(batch_size))
            rows = order.pop()
            with torch.enable_grad():
                optimizer.zero_grad()
                F.cross_entropy(logits_of(call(learner, x[rows])), y[rows]).backward()
                optimizer.step()
    return most, False
