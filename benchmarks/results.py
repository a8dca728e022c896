"""Keeps results in benchmarks/results/ and writes README's tables from them: no figure there is typed by hand.

python benchmarks/results.py keep runs/fashion-mnist/results.json class-removal-fashion-mnist
python benchmarks/results.py keep runs/bench.json cpu
python benchmarks/results.py tables          # rewrites README.md between its markers
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks" / "results"
SAMPLERS = ("logit", "leverage", "random", "stratified", "k_center", "certified", "intermediate_distance", "prefix")


def keep(source: Path, name: str) -> None:
    """Copies what is worth keeping of a result file: summaries, not single rows; options, not one machine's folders."""
    results = json.loads(source.read_text())
    if "summary" in results:
        results.pop("rows")
        words = results["meta"]["command"].split()
        words = [word for word in words if word not in ("--resume", "--quiet", "-q")]
        folders = ("--root", "--out", "--checkpoint")
        kept = [
            w for w, before in zip(words[1:], words, strict=False) if w not in folders[1:] and before not in folders[1:]
        ]
        kept = ["DIR" if before == "--root" else w for w, before in zip(kept, ["", *kept], strict=False)]
        results["meta"]["command"] = " ".join(["fastif", *kept])
    else:
        results.pop("commit_info", None)
        for benchmark in results["benchmarks"]:
            benchmark.pop("options", None)
            benchmark.pop("stats", None)  # of the one timing that pytest-benchmark made; ours stand in extra_info
    (KEPT / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")


def class_removal_table(name: str) -> str:
    results = json.loads((KEPT / f"{name}.json").read_text())
    meta, summary = results["meta"], results["summary"]
    last = max(row["step"] for row in summary)
    lines = [
        f"| curvature from | examples | F1 after {last} steps | excess after 3 | excess after {last} | seconds | MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    cells = {(row["sampler"], row["k"], row["step"]): row for row in summary}
    for k in meta["k"]:
        for sampler in sorted(meta["samplers"], key=SAMPLERS.index):
            end, early = cells[sampler, k, last], cells[sampler, k, 3]
            spread = "" if end["F1_std"] is None else f" ± {end['F1_std']:.0e}"
            memory = "" if end["ME_mean"] is None else f"{end['ME_mean'] / 2**20:.0f}"
            lines.append(
                f"| `{sampler}` | {k} ({k / meta['n_train']:.1%}) | {end['F1_mean']:.4f}{spread} "
                f"| {early['excess_mean']:.1e} | {end['excess_mean']:.1e} | {end['RTE_mean']:.2f} | {memory} |"
            )
    for label, key in (
        ("*head retrained to convergence*", "retrained_head"),
        ("*whole network retrained*", "retrained"),
        ("*nothing removed*", "original"),
    ):
        if results[key]:
            f1 = sum(row["F1"] for row in results[key]) / len(results[key])
            lines.append(f"| {label} | | {f1:.4f} | | | | |")
    classes, seeds = len(meta["classes"]), len(meta["seeds"])
    lines += [
        "",
        f"Means over {classes} classes and {seeds} seeds, ± the standard deviation over seeds; "
        f"{meta['n_train']:,} training examples; {meta['device']}, {meta['threads']} threads, "
        f"torch {meta['versions']['torch']}, {meta['date'][:10]}. "
        f"Made by `{meta['command']}`.",
    ]
    return "\n".join(lines)


def benchmark_table(name: str) -> str:
    results = json.loads((KEPT / f"{name}.json").read_text())
    lines = ["| op | seconds | share of the machine's limit | against |", "|---|---|---|---|"]
    for benchmark in sorted(results["benchmarks"], key=lambda b: b["name"]):
        extra: dict[str, Any] = benchmark["extra_info"]
        peers = "<br>".join(f"{ratio:.1f}× {peer}" for peer, ratio in extra["ratio"].items())
        label = benchmark["name"].removeprefix("test_")
        lines.append(f"| `{label}` | {extra['seconds']['fastif']:.3g} | {extra['share_of_limit']:.0%} | {peers} |")
    machine = results["machine_info"]
    limits = results["benchmarks"][0]["extra_info"]
    lines += [
        "",
        f"{machine['cpu'].get('brand_raw', 'CPU')}, {machine['threads']} threads, {machine['build']['isa']}, torch "
        f"{machine['torch']}, {results['datetime'][:10]}; the limit is what the same run measured: "
        f"{limits['bytes_per_second'] / 1e9:.0f} GB/s read, {limits['flops_per_second'] / 1e9:.0f} GFLOP/s in float32 "
        "matrix products. Made by `make bench`.",
    ]
    return "\n".join(lines)


def with_tables(readme: str) -> str:
    """README with what stands between `<!-- table: NAME -->` and `<!-- end -->` made anew from the kept NAME.json."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        made = class_removal_table(name) if name.startswith("class-removal") else benchmark_table(name)
        return f"<!-- table: {name} -->\n{made}\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", table, readme, flags=re.DOTALL)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["keep"] and len(arguments) == 3:
        keep(Path(arguments[1]), arguments[2])
    elif arguments == ["tables"]:
        readme = ROOT / "README.md"
        readme.write_text(with_tables(readme.read_text()))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
