"""What README says of the kept results: the demo in words, and a row per comparison."""

from __future__ import annotations

from typing import Any

from .tables import results_of, threads_of


def story() -> str:
    """What README says of its picture: the first sentences of the demo's report."""
    from fastif.report.class_removal import lead

    results = results_of("class-removal-demo")
    meta = results["meta"]
    return (
        f"{lead(results)} Means over {len(meta['classes'])} classes, each removed on its own, and {len(meta['seeds'])} "
        f"seeds, on held-out digits; {meta['device']}, {threads_of(meta['threads'])}, "
        f"torch {meta['versions']['torch']}, {meta['date'][:10]}. Made by `make demo`."
    )


def glance() -> str:
    """What fastif gives beside the best peer, a row per kept result; the pages named have all peers and settings."""
    lines = ["| | fastif | the best peer | more |", "|---|---|---|---|"]

    def add(what: str, ours: str, peer: str, page: str) -> None:
        lines.append(f"| {what} | {ours} | {peer} | {page} |")

    found = {b["name"]: b["extra_info"] for b in results_of("influence-cpu")["benchmarks"]}
    for model, words in (("mlp", "an MLP"), ("resnet9", "a ResNet-9")):
        extra: dict[str, Any] = found[f"test_influence[{model}]"]
        ours = extra["fastif"]["exact"]
        who = min(
            (peer for peer, row in extra["peers"].items() if set(row["cpu_seconds"]) == set(ours["cpu_seconds"])),
            key=lambda peer: sum(extra["peers"][peer]["cpu_seconds"].values()),
        )
        theirs = extra["peers"][who]
        add(
            f"EK-FAC of {words}, {extra['n']:,} examples × {extra['q']:,} queries: fit, scores, self-influence",
            f"{sum(ours['cpu_seconds'].values()):.1f} s, {ours['peak_mib']:.0f} MiB",
            f"{who} {sum(theirs['cpu_seconds'].values()):.1f} s, {theirs['peak_mib']:.0f} MiB",
            "[benchmarks](docs/benchmarks.md)",
        )
    rows = [row for row in results_of("lds")["lds"] if row["model"] == "MLP, Fashion-MNIST" and row["lds"]]
    replays = [row for row in rows if row["contender"].startswith("fastif, replay")]
    ruled = [row for row in rows if row["contender"].startswith("fastif") and "from the training" in row["contender"]]
    peers = [row for row in rows if not row["contender"].startswith("fastif")]
    *ours, peer = (max(some, key=lambda row: row["lds"]["mean"]) for some in (replays, ruled, peers))
    add(
        "an MLP on Fashion-MNIST held against retraining on halves of the data: rank correlation (LDS)",
        "; ".join(
            f"{row['lds']['mean']:.3f} in {row['cpu_seconds']:.1f} s ({_without_prefix(row['contender'])})"
            for row in ours
        ),
        f"{peer['lds']['mean']:.3f} in {peer['cpu_seconds']:.1f} s ({peer['contender']}, best damping)",
        "[evaluation](docs/evaluation.md)",
    )
    published = results_of("published-fashion-mnist")
    head = min(
        (e for e in published["summary"] if e["method"] == "head" and e["sampler"] == "logit"), key=lambda e: e["k"]
    )
    lissa = max(
        (e for e in published["summary"] if (e["method"], e["sampler"]) == ("LiSSA", "random")), key=lambda e: e["F1"]
    )
    add(
        "removal of a class from a CNN on Fashion-MNIST: F1 on held-out data, time, memory",
        f"{head['F1']:.3f}, {head['RTE']:.2g} s, {head['ME'] / 2**20:.0f} MiB",
        f"the paper's LiSSA {lissa['F1']:.3f}, {lissa['RTE']:.2g} s, {lissa['ME'] / 2**20:.0f} MiB",
        "[the paper's task](docs/published.md)",
    )
    extra = next(b["extra_info"] for b in results_of("kcenter-cpu")["benchmarks"] if "cifar10-penultimate" in b["name"])
    most = max(row["k"] for row in extra["rows"])
    cpu = {row["contender"]: row["cpu"] for row in extra["rows"] if row["k"] == most}
    who = min((peer for peer in cpu if not peer.startswith(("fastif", "torch"))), key=lambda peer: cpu[peer])
    add(
        f"k-center, {most:,} of {extra['n']:,} features with {extra['d']} coordinates",
        f"{cpu['fastif']:.2f} s",
        f"{who} {cpu[who]:.1f} s",
        "[k-center](docs/kcenter.md)",
    )
    extra = next(
        b["extra_info"] for b in results_of("blocks-cpu")["benchmarks"] if b["name"] == "test_ggn_block[c10-d513]"
    )
    seconds = extra["seconds"]
    who = min((peer for peer in seconds if peer != "fastif"), key=lambda peer: seconds[peer])
    add(
        "exact curvature of a head, 50,000 examples, 513 inputs, 10 classes",
        f"{seconds['fastif']:.1f} s",
        f"{who} {seconds[who]:.1f} s; curvlinops {seconds['curvlinops, GGN @ I']:.0f} s",
        "[exact blocks](docs/blocks.md)",
    )
    lines += [
        "",
        "Processor seconds of all threads on a CPU; of the removal and the exact curvature seconds by the clock. Each "
        "page has the settings, all other peers and the commands.",
    ]
    return "\n".join(lines)


def _without_prefix(contender: str) -> str:
    return contender.removeprefix("fastif, ")
