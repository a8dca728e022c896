"""The table of docs/integrations.md: what other libraries take from a trained Trainer to the ten texts that count."""

from __future__ import annotations

from typing import Any

from . import tables


def libraries_table(name: str) -> str:
    results = tables.results_of(name)
    meta = results["meta"]
    libraries = list(dict.fromkeys(row["library"] for row in results["rows"]))
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        found.setdefault(row["task"], {})[row["library"]] = row
    lines = [
        f"| | {' | '.join(libraries)} | scores differ by |",
        "|---" * (len(libraries) + 2) + "|",
    ]
    for task, rows in found.items():
        cells = [_cell(rows[library]) if library in rows else "–" for library in libraries]
        lines.append(f"| {task} | {' | '.join(cells)} | {max(row['error'] for row in rows.values()):.0e} |")
    versions = ", ".join(f"{library} {number}" for library, number in meta["libraries"].items() if number)
    shared = min(row["shared"] for row in results["rows"])
    lines += [
        "",
        f"Lines, CPU seconds of fit and scores, and what the process took beyond what it held before. {meta['n']:,} "
        f"training texts, {meta['queries']} queries, {meta['texts']}, batches of {meta['batch']}; networks of "
        f"{meta['bert']['parameters']:,} and {meta['llama']['parameters']:,} parameters. Each library finds "
        f"{'all' if shared == 1 else f'at least {shared:.0%}'} of the texts that fastif finds; the difference is the "
        "largest among the scores of these, "
        "from fastif's, relative to the query's largest score. One run, each in a process of its own, on a machine "
        f"that had other work to do: {meta['device']}, {tables.threads_of(meta['threads'])}; torch "
        f"{meta['versions']['torch']}, {versions}. Made by `python -m benchmarks.experiments.libraries`.",
    ]
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    peak = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 2**20:,.0f} MiB"
    return f"{row['lines']} lines, {row['cpu_seconds']:.1f} s{peak}"
