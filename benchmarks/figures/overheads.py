"""The table of docs/integrations.md: what recording a training costs it."""

from __future__ import annotations

from typing import Any

from . import tables


def overheads_table(name: str) -> str:
    results = tables.results_of(name)
    meta = results["meta"]
    lines = ["| a step with it | time | beside a plain one | bytes |", "|---|---|---|---|"]
    for row in results["logs"]:
        share = row["checkpoint_bytes"] / row["model_bytes"]
        lines.append(
            f"| {row['loop']} | {_ms(row['logged_seconds'])} | {row['ratio']:.2f}×{_spread(row['ratios'])} | "
            f"{row['step_bytes']:,.0f} bytes a step, {share:.1f} times the model a checkpoint |"
        )
    plain = next(row for row in results["captures"] if row["way"] == "plain")
    for row in results["captures"]:
        if row is plain:
            continue
        where = "" if row["layers"] is None else ", of attention and MLP alone"
        peak = ""
        if row["peak_bytes"] is not None and plain["peak_bytes"]:
            peak = f"{row['peak_bytes'] / plain['peak_bytes']:.2f} times the peak of a plain step"
        lines.append(
            f"| `fastif.capture`: {row['way']}{where} | {_ms(row['seconds'])} | "
            f"{row['ratio']:.2f}×{_spread(row['ratios'])} | {peak} |"
        )
    off = max(row["deviation"] for row in results["logs"])
    versions = ", ".join(f"{library} {number}" for library, number in meta["libraries"].items())
    lines += [
        "",
        f"Steps of a GPT ({meta['layers']} layers, width {meta['width']}, {meta['parameters']:,} parameters) with "
        f"AdamW, {meta['batch']} texts of {meta['length']} tokens. Of logs trainings of {meta['steps']} steps with a "
        f"checkpoint every {meta['every']}, {meta['turns']} with and {meta['turns']} without in turns; of captures "
        f"{meta['looks']} steps of each way in turns. Medians, of the ratios turn by turn, in brackets the least and "
        "the largest; of a Trainer from its first step to its end. Run "
        f"again from their logs, trainings were off by {off:.0e} at most; captured gradients and norms differed from "
        f"autograd's of single texts by {meta['difference']:.0e} at most. {meta['device']}, "
        f"{tables.threads_of(meta['threads'])}; torch {meta['versions']['torch']}, {versions}. Made by "
        "`python -m benchmarks.experiments.overheads`.",
    ]
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f}\u00a0ms"


def _spread(ratios: list[Any]) -> str:
    return f" ({min(ratios):.2f}–{max(ratios):.2f})"
