"""The tables of docs/checks.md: what scores do not depend on, and what looking at the data costs."""

from __future__ import annotations

from .tables import results_of, threads_of

_CHANGES = "batch size", "threads", "memory", "restart"
_MADE = "Made by `python -m benchmarks.experiments.checks`."


def invariance_table(name: str) -> str:
    """By estimator and float type, the most that scores of all networks moved, as a share of the largest score."""
    results = results_of(name)
    rows = results["rows"]
    shown = {"batch size": "batch size (and padding)", "restart": "a process started anew"}
    lines = [
        "| largest difference: float32, float64 | " + " | ".join(shown.get(c, c) for c in _CHANGES) + " |",
        "|---" * (1 + len(_CHANGES)) + "|",
    ]
    for estimator in dict.fromkeys(row["estimator"] for row in rows):
        cells = []
        for change in _CHANGES:
            most = {
                dtype: max(row[change] for row in rows if (row["estimator"], row["dtype"]) == (estimator, dtype))
                for dtype in ("float32", "float64")
            }
            cells.append(", ".join(f"{value:.0e}" if value else "0" for value in most.values()))
        lines.append(f"| {estimator} | {' | '.join(cells)} |")
    meta = results["meta"]
    networks = ", ".join(dict.fromkeys(row["network"] for row in rows))
    lines += [
        "",
        f"Of the largest score; the worst of {networks} (texts padded to the longest of their batch), "
        f"{meta['examples']} training examples, {meta['queries']} queries. Against batches of {meta['batch']}, one "
        "thread and the default memory: batches of 7, two threads, 64 KiB, and another process that reads the fitted "
        f"state. {meta['device']}, torch "
        f"{meta['versions']['torch']}. {_MADE}",
    ]
    return "\n".join(lines)


def looking_table(name: str) -> str:
    """What checksums take of the passes that they are part of."""
    results = results_of(name)
    shown = {
        "linear": "one linear layer over 3,072 inputs, 4,000 examples",
        "mlp": "64-16-3 MLP, 120 examples",
        "cnn": "CNN of one convolution, 120 examples of 8 × 8",
        "transformer": "transformer of one layer, 120 texts of up to 14 words",
    }
    lines = ["| checksums of a pass over the data | milliseconds | of a `fit` | of a `scores` |", "|---|---|---|---|"]
    for network, found in results["looking"].items():
        of_fit, of_scores = (found["checksums"] * passes / found[key] for key, passes in (("fit", 2), ("scores", 1)))
        lines.append(
            f"| {shown[network]} | {1e3 * found['checksums']:.2f} | {100 * of_fit:.1f} % | {100 * of_scores:.1f} % |"
        )
    meta = results["meta"]
    lines += [
        "",
        f"EK-FAC, whose fit takes two passes; ten or six queries. {meta['device']}, {threads_of(1)}, torch "
        f"{meta['versions']['torch']}. {_MADE}",
    ]
    return "\n".join(lines)
