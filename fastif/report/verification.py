"""The page of one removal: what changed, and what the network still knows of the examples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastif.evaluation.unlearned import DEFINITIONS
from fastif.evaluation.verification import AFTER, BEFORE, HALVES, RETRAINED, Verification, verify
from fastif.files import write_whole
from fastif.influence.networks import Networks
from fastif.removal import Removal
from fastif.report.evaluations import as_json
from fastif.report.pages import document, facts_table, new_figure, picture, png_of, table, text_of

SHOWN = 20  # of the examples that are remembered best
_COLOURS = {BEFORE: "#d55e00", AFTER: "#0072b2", RETRAINED: "#222222", HALVES: "#009e73", "held out": "#8a8a8a"}


def verify_removal(
    model: nn.Module,
    removal: Removal | Mapping[str, Tensor],
    train: Any,
    removed: Tensor,
    held_out: Any,
    *,
    retrained: Sequence[Mapping[str, Tensor]] = (),
    networks: Networks | None = None,
    batch_size: int = 256,
    out: str | Path | None = None,
    about: Mapping[str, Any] | None = None,
) -> Verification:
    """Verifies a removal, and writes `verification.html` and `verification.json` to the folder `out`, if given.

    The page says what changed, how the network does on removed, retained and held-out examples before and after and,
    where there are `retrained` or half `networks`, how networks do that never saw the removed ones; it shows histograms
    of the losses from which membership is told, and the examples that are still remembered best. `str()` of the result
    is one line of it. Arguments and errors are those of `fastif.evaluation.verification.verify`; `about` stands at the
    foot. docs/math.md (29).
    """
    found = verify(
        model, removal, train, removed, held_out, retrained=retrained, networks=networks, batch_size=batch_size
    )
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        stored = {**as_json(found), "about": as_json(dict(about or {})), "definitions": DEFINITIONS}
        write_whole(folder / "verification.json", json.dumps(stored, indent=1, allow_nan=False))
        write_whole(folder / "verification.html", page(found, about or {}))
    return found


def page(found: Verification, about: Mapping[str, Any]) -> str:
    """The page as HTML."""
    body = f"<h1>Removal of {len(found.remembered):,} examples</h1><p class=lead>{text_of(str(found))}.</p>"
    body += _metrics(found) + _histograms(found) + _remembered(found) + _changed(found)
    if found.certified is not None:
        body += f"<h2>Certificate</h2><p>{text_of(found.certified)}</p>"
    if about:
        body += f"<h2>How it was made</h2>{facts_table(as_json(dict(about)))}"
    return document("Removal", body)


def _metrics(found: Verification) -> str:
    columns = {
        "removed_accuracy": ("accuracy", "removed"),
        "retained_accuracy": ("", "retained"),
        "held_out_accuracy": ("", "held out"),
        "removed_loss": ("loss", "removed"),
        "retained_loss": ("", "retained"),
        "held_out_loss": ("", "held out"),
        "removed_kl": ("KL to retrained", "removed"),
        "held_out_kl": ("", "held out"),
        "tug_of_war": ("tug-of-war", "better high"),
        "membership_auc": ("membership", "AUC"),
        "membership_balanced_accuracy": ("", "balanced accuracy"),
    }
    shown = [name for name in columns if any(row.get(name) is not None for row in found.metrics)]
    rows = [
        ("reference" if row["network"] in (RETRAINED, HALVES) else "", [_name(row), *(_cell(row, n) for n in shown)])
        for row in found.metrics
    ]
    words = (
        "Removed examples should look to the network as to one that never saw them. Membership is told by the loss: "
        "the AUC is the probability that a removed example has a lower one than a held-out one of the same labels."
    )
    if len(found.metrics) == 2:
        words += " Without retrained or half networks to compare with, nothing says how low it should be."
    return f"<h2>What it does now</h2><p>{words}</p>" + table([("", ""), *(columns[name] for name in shown)], rows)


def _name(row: Mapping[str, Any]) -> str:
    return text_of(row["network"]) + (f" ({row['networks']})" if "networks" in row else "")


def _cell(row: Mapping[str, Any], name: str) -> str:
    value, spread = row.get(name), row.get(f"{name}_std")
    if value is None:
        return ""
    return f"{value:.4f}" + ("" if spread is None else f" <i>± {spread:.2g}</i>")


def _histograms(found: Verification) -> str:
    groups = [(BEFORE, "held out"), (AFTER, "held out")]
    groups += [(name, "held out") for name in (RETRAINED, HALVES) if name in found.losses]
    largest = max(max(losses) for losses in found.losses.values())
    edges = [(largest + 1e-6) ** (part / 24) * 1e-4 ** (1 - part / 24) for part in range(25)]
    figure, axes = new_figure(len(groups), 1, 3.4 * len(groups), 3.4, sharey=True)
    for ax, (name, other) in zip(axes[0], groups, strict=True):
        for what in (other, name):
            values = [min(max(loss, edges[0]), edges[-1]) for loss in found.losses[what]]
            weights = [1 / len(values)] * len(values)
            label = "held out, after" if what == other else f"removed, {name}"
            ax.hist(values, edges, weights=weights, color=_COLOURS[what], alpha=0.55, label=label)
        ax.set_xscale("log")
        ax.set_xlabel("loss, nats")
        ax.legend(frameon=False, fontsize=8)
    axes[0][0].set_ylabel("share of the examples")
    caption = (
        "Losses of the removed examples under each network, beside those of held-out examples of the same labels under "
        "the network after the removal. What cannot be told from the grey cannot be told to have been trained on."
    )
    return picture("losses", png_of(figure), caption)


def _remembered(found: Verification) -> str:
    words = (
        "Excess is how far the label's log-odds lie above those of networks that never saw the example: 0 is forgotten."
        if found.known is not None
        else "The lowest losses after the removal; networks that never saw the examples would say how low is too low."
    )
    head = [("example", ""), ("label", ""), ("loss", "before"), ("loss", "after")]
    head += [("excess", "before"), ("excess", "after")] if found.known is not None else []
    names = ["loss_before", "loss_after"] + (["excess_before", "excess_after"] if found.known is not None else [])
    rows = [
        ("", [f"{row['example']:,}", str(row["label"]), *(f"{row[name]:.3f}" for name in names)])
        for row in found.remembered[:SHOWN]
    ]
    return f"<h2>Still remembered best</h2><p>{words}</p>" + table(head, rows)


def _changed(found: Verification) -> str:
    rows = [
        (
            "",
            [
                text_of(row["name"]),
                f"{row['numbers']:,}",
                f"{row['change']:.3g}",
                "" if row["relative"] is None else f"{100 * row['relative']:.2g} %",
            ],
        )
        for row in found.changed
    ]
    head = [("", ""), ("numbers", ""), ("change", "2-norm"), ("relative", "to what it was")]
    return "<h2>What changed</h2><p>All else in the network is as it was.</p>" + table(head, rows)
