"""Verification of one removal: what changed, and what the network still knows of the examples. docs/math.md (29)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastif.data.batches import as_loader, moved_to
from fastif.evaluation.membership import membership
from fastif.evaluation.retraining import without
from fastif.evaluation.unlearned import Outputs, compare
from fastif.influence.networks import Networks
from fastif.model.calls import call
from fastif.model.losses import log_odds, logits_of
from fastif.removal import Removal

BEFORE, AFTER, RETRAINED, HALVES = "before", "after", "retrained", "halves that never saw it"


class Verification(NamedTuple):
    """What `verify` found. Losses are cross-entropies and log-odds log p/(1 − p) of the label, in nats."""

    changed: list[dict[str, Any]]  # by entry of the state dict that moved: name, numbers, norm, relative to what it was
    metrics: list[dict[str, Any]]  # of the networks before and after, and of the references: means and "…_std"
    losses: dict[str, list[float]]  # of the removed examples by network; "held out" are those alike, after
    remembered: list[dict[str, Any]]  # the removed examples, best remembered first
    known: dict[str, float] | None  # mean excess of log-odds over the references, before and after; None without any
    certified: str | None  # in words, where the removal has a certificate

    def __str__(self) -> str:
        rows = {row["network"]: row for row in self.metrics}
        before, after = rows[BEFORE], rows[AFTER]
        reference = rows.get(RETRAINED) or rows.get(HALVES)
        against = "" if reference is None else f" ({reference['network']}: {reference['membership_auc']:.3f})"
        words = (
            f"{len(self.remembered):,} examples removed: accuracy on them {before['removed_accuracy']:.3f} before, "
            f"{after['removed_accuracy']:.3f} after; held out {before['held_out_accuracy']:.3f}, "
            f"{after['held_out_accuracy']:.3f}; membership AUC {before['membership_auc']:.3f}, "
            f"{after['membership_auc']:.3f}{against}"
        )
        if self.known is not None:
            words += (
                f"; log-odds beyond networks that never saw them {self.known['before']:+.2f} before, "
                f"{self.known['after']:+.2f} after"
            )
        return words


def verify(
    model: nn.Module,
    removal: Removal | Mapping[str, Tensor],
    train: Any,
    removed: Tensor,
    held_out: Any,
    *,
    retrained: Sequence[Mapping[str, Tensor]] = (),
    networks: Networks | None = None,
    batch_size: int = 256,
) -> Verification:
    """Compares a network before and after a removal, and with networks that never saw the examples.

    Args:
        model: a classifier as it was before, in any state that has its architecture; it is not changed.
        removal: what `fastif.remove` returned, or the state dict after any other.
        train, held_out: labelled data as `fastif.data.as_loader` takes it, what it was trained on and what not.
        removed: int64 [r], at least two, counted in `train`.
        retrained: state dicts of networks trained without the removed examples.
        networks: of `train_halves` on this data. For each removed example those count that were not trained on it: they
            never saw it, but saw only half of the rest, too.
        batch_size: for data without batches of its own.

    Raises ValueError for indices outside or repeated, held-out data without two examples of the removed ones' labels,
    and networks that all saw, or none of which saw, a removed example, with its index.
    """
    before, labels = _logits(model, train, batch_size)
    n = len(labels)
    kept, removed = without(n, removed), removed.detach().cpu().sort().values
    if len(removed) < 2:
        raise ValueError("verify_removal: removed must be at least two examples: one alone has no AUC")
    if networks is not None:
        _check_networks(networks, removed, n)
    held, held_labels = _logits(model, held_out, batch_size)
    alike = torch.isin(held_labels, labels[removed].unique())
    if int(alike.sum()) < 2:
        raise ValueError("verify_removal: held_out must hold at least two examples of the removed ones' labels")

    def outputs(logits: Tensor, held: Tensor) -> Outputs:
        of = {"removed": logits[removed], "retained": logits[kept], "held_out": held}
        return Outputs(of, {"removed": labels[removed], "retained": labels[kept], "held_out": held_labels})

    def outputs_of_state(state: Mapping[str, Tensor]) -> Outputs:
        network = copy.deepcopy(model)
        network.load_state_dict(state)
        return outputs(_logits(network, train, batch_size)[0], _logits(network, held_out, batch_size)[0])

    state = removal.state_dict if isinstance(removal, Removal) else removal
    own = {BEFORE: outputs(before, held), AFTER: outputs_of_state(state)}
    references = [outputs_of_state(other) for other in retrained]
    metrics = [{"network": name, **compare(found, references)} for name, found in own.items()]
    losses = {name: found.losses("removed").tolist() for name, found in own.items()}
    losses["held out"] = own[AFTER].losses("held_out")[alike].tolist()
    odds = {name: log_odds(found.logits["removed"], labels[removed]) for name, found in own.items()}
    strangers: Tensor | None = None  # log-odds [r], the mean over networks that never saw the example
    if references:
        others = [[o for o in references if o is not found] for found in references]
        rows = [compare(found, rest) for found, rest in zip(references, others, strict=True)]
        metrics.append({"network": RETRAINED, **_spread(rows)})
        losses[RETRAINED] = torch.cat([found.losses("removed") for found in references]).tolist()
        strangers = torch.stack([log_odds(o.logits["removed"], labels[removed]) for o in references]).mean(0)
    if networks is not None:
        found = [outputs_of_state(half) for half in networks.states]
        saw = torch.stack([torch.isin(removed, half) for half in networks.kept])  # [K, r]
        metrics.append({"network": HALVES, **_spread(_of_halves(found, ~saw, alike))})
        all_losses = torch.stack([half.losses("removed") for half in found])
        losses[HALVES] = all_losses[~saw].tolist()
        if strangers is None:
            every = torch.stack([log_odds(half.logits["removed"], labels[removed]) for half in found])
            strangers = every.masked_fill(saw, 0).sum(0) / (~saw).sum(0)
    known = None
    if strangers is not None:
        known = {name: float((values - strangers).mean()) for name, values in odds.items()}
    return Verification(
        _changed(model.state_dict(), state),
        metrics,
        losses,
        _remembered(removed, labels, own, odds, strangers),
        known,
        str(removal.certified) if isinstance(removal, Removal) and removal.certified is not None else None,
    )


def _logits(model: nn.Module, data: Any, batch_size: int) -> tuple[Tensor, Tensor]:
    """Logits float64 [n, c] in eval mode and labels [n], on the CPU."""
    network = copy.deepcopy(model).eval()
    device = next(network.parameters()).device
    logits, labels = [], []
    with torch.no_grad():
        for x, y in as_loader(data, batch_size):
            outputs = logits_of(call(network, moved_to(x, device))).double().cpu()
            if outputs.dim() != 2 or not isinstance(y, Tensor) or y.shape != outputs.shape[:1] or y.is_floating_point():
                raise ValueError("verify_removal: the model must return logits [n, c], and the data have labels [n]")
            logits.append(outputs)
            labels.append(y.long().cpu())
    found = torch.cat(logits)
    if not found.isfinite().all():
        raise ValueError("verify_removal: the network's logits are not all finite")
    return found, torch.cat(labels)


def _of_halves(found: Sequence[Outputs], never: Tensor, alike: Tensor) -> list[dict[str, Any]]:
    """A row per half network that left out at least two of the removed examples: its metrics on those, and held out."""
    rows: list[dict[str, Any]] = []
    for half, out in zip(found, never, strict=True):
        if int(out.sum()) < 2:
            continue
        losses = half.losses("removed")[out]
        right = half.logits["removed"].argmax(1)[out] == half.labels["removed"][out]
        told = membership(losses, half.losses("held_out")[alike])
        row = {"removed_accuracy": float(right.double().mean()), "removed_loss": float(losses.mean())}
        row |= {"held_out_accuracy": half.accuracy("held_out"), "held_out_loss": float(half.losses("held_out").mean())}
        rows.append({**row, "membership_auc": told.auc, "membership_balanced_accuracy": told.balanced_accuracy})
    if not rows:
        raise ValueError("verify_removal: no network was trained without at least two of the removed examples")
    return rows


def _spread(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means, and standard deviations as "…_std"; None where there is none."""
    entry: dict[str, Any] = {"networks": len(rows)}
    for name in rows[0]:
        values = [row[name] for row in rows]
        known = None not in values
        entry[name] = fmean(values) if known else None
        entry[f"{name}_std"] = stdev(values) if known and len(values) > 1 else None
    return entry


def _changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    found = []
    for name, old in before.items():
        new = after[name].to(old.device)
        if old.is_floating_point() and not torch.equal(old, new):
            size, norm = float((new - old).double().norm()), float(old.double().norm())
            relative = size / norm if norm else None
            found.append({"name": name, "numbers": old.numel(), "change": size, "relative": relative})
    return found


def _remembered(
    removed: Tensor,
    labels: Tensor,
    own: Mapping[str, Outputs],
    odds: Mapping[str, Tensor],
    strangers: Tensor | None,
) -> list[dict[str, Any]]:
    """By what is left of the excess of log-odds; without references by the loss after, the lowest first."""
    losses = {name: found.losses("removed") for name, found in own.items()}
    excess = None if strangers is None else {name: values - strangers for name, values in odds.items()}
    order = (losses[AFTER] if excess is None else -excess[AFTER]).sort(stable=True).indices
    return [
        {
            "example": int(removed[row]),
            "label": int(labels[removed[row]]),
            "loss_before": float(losses[BEFORE][row]),
            "loss_after": float(losses[AFTER][row]),
            "excess_before": None if excess is None else float(excess[BEFORE][row]),
            "excess_after": None if excess is None else float(excess[AFTER][row]),
        }
        for row in order.tolist()
    ]


def _check_networks(networks: Networks, removed: Tensor, n: int) -> None:
    if not isinstance(networks, Networks):
        raise TypeError(f"verify_removal: networks must be fastif.Networks, got {type(networks).__name__}")
    outside = [int(kept.max()) for kept in networks.kept if len(kept) and int(kept.max()) >= n]
    if outside:
        raise ValueError(f"verify_removal: networks were trained on other data: example {outside[0]} of n={n}")
    saw = torch.stack([torch.isin(removed, kept) for kept in networks.kept]).sum(0)
    for row in ((saw == 0) | (saw == len(networks.kept))).nonzero()[:1, 0].tolist():
        what = "none of the networks" if saw[row] == 0 else "every network"
        raise ValueError(
            f"verify_removal: {what} was trained on the removed example {int(removed[row])}; there must be some on "
            "both sides, as train_halves makes them"
        )
