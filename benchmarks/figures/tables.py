"""The pages' tables, each made from a file in benchmarks/results/."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

KEPT = Path(__file__).parents[1] / "results"
SAMPLERS = ("logit", "leverage", "random", "stratified", "k_center", "certified", "intermediate_distance", "prefix")


def results_of(name: str) -> Any:
    return json.loads((KEPT / f"{name}.json").read_text())


def threads_of(number: int) -> str:
    return f"{number} thread{'s' if number > 1 else ''}"


def made_by(meta: dict[str, Any], command: str | None = None) -> str:
    """The end of a table of an experiment: machine, torch, day and the command that makes it."""
    return (
        f"{meta['device']}, {threads_of(meta['threads'])} of a busy machine, torch {meta['versions']['torch']}, "
        f"{meta['date'][:10]}. Made by `{command or meta['command']}`."
    )


def _machine(results: dict[str, Any]) -> str:
    """Of a file that pytest-benchmark wrote: processor, threads, versions, day."""
    machine = results["machine_info"]
    return (
        f"{machine['cpu'].get('brand_raw', 'CPU')}, {threads_of(machine['threads'])}, {machine['build']['isa']}, "
        f"torch {machine['torch']}, {results['datetime'][:10]}"
    )


def class_removal_table(name: str) -> str:
    results = results_of(name)
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
        f"{meta['n_train']:,} training examples; {meta['device']}, {threads_of(meta['threads'])}, "
        f"torch {meta['versions']['torch']}, {meta['date'][:10]}. "
        f"Made by `{meta['command']}`.",
    ]
    return "\n".join(lines)


def benchmark_table(name: str) -> str:
    results = results_of(name)
    lines = ["| op | seconds | share of the machine's limit | against |", "|---|---|---|---|"]
    for benchmark in sorted(results["benchmarks"], key=lambda b: b["name"]):
        extra: dict[str, Any] = benchmark["extra_info"]
        peers = "<br>".join(f"{ratio:.1f}× {peer}" for peer, ratio in extra["ratio"].items())
        label = benchmark["name"].removeprefix("test_")
        share = f"{extra['share_of_limit']:.0%}" if extra["share_of_limit"] else ""
        kept = f", {extra['examples']} examples" if "examples" in extra else ""
        lines.append(f"| `{label}`{kept} | {extra['seconds']['fastif']:.3g} | {share} | {peers} |")
    limits = results["benchmarks"][0]["extra_info"]
    lines += [
        "",
        f"{_machine(results)}; the limit is what the same run measured: "
        f"{limits['bytes_per_second'] / 1e9:.0f} GB/s read, {limits['flops_per_second'] / 1e9:.0f} GFLOP/s in float32 "
        f"matrix products. Made by `make {'bench-blocks' if name.startswith('blocks') else 'bench'}`.",
    ]
    return "\n".join(lines)


def kcenter_table(name: str) -> str:
    results = results_of(name)
    data = [b for b in results["benchmarks"] if "peak_share_of_input" in b["extra_info"]]
    labels = [b["name"].split("[")[1].rstrip("]") for b in data]
    cells = {
        (label, row["contender"], row["k"]): row
        for label, b in zip(labels, data, strict=True)
        for row in b["extra_info"]["rows"]
    }
    ks = sorted({k for _, contender, k in cells if contender == "fastif"})
    shapes = [f"{b['extra_info']['n'] // 1000}k × {b['extra_info']['d']}" for b in data]
    lines = [
        "| | " + " | ".join(f"{label}<br>{shape}" for label, shape in zip(labels, shapes, strict=True)) + " |",
        "|---" * (len(labels) + 1) + "|",
    ]
    for k in ks:
        seconds = (f"{cells[label, 'fastif', k]['cpu']:.2f} s" for label in labels)
        lines.append(f"| **fastif, k = {k}** | " + " | ".join(seconds) + " |")
    most = ks[-1]
    for contender in dict.fromkeys(contender for _, contender, _ in cells if contender != "fastif"):
        ratios = []
        for label in labels:
            row = cells.get((label, contender, most))
            ours = cells[label, "fastif", most]["cpu"]
            ratios.append("" if row is None else f"{row['cpu'] / ours:.0f}×")
        lines.append(f"| {contender} | " + " | ".join(ratios) + " |")
    peaks = (f"{b['extra_info']['peak_share_of_input']:.2f}" for b in data)
    lines.append("| *memory besides the input, share of it* | " + " | ".join(peaks) + " |")
    absent = sorted({name for b in data for name in b["extra_info"]["absent"]})
    lines += [
        "",
        f"Processor time of all threads: of fastif in seconds, of the others as a multiple of fastif's at k = {most}, "
        "drawn on from a few of their picks. "
        + (f"Not installed: {', '.join(absent)}. " if absent else "")
        + f"{_machine(results)}. Made by `make bench-kcenter`.",
    ]
    return "\n".join(lines)


def removal_layers_table(name: str) -> str:
    results = results_of(name)
    meta, cells = results["meta"], {(row["variant"], row["step"]): row for row in results["summary"]}
    shown = [step for step in (1, 2, 3, 4, 6) if step <= meta["steps"]]
    lines = [
        "| what moves | F1 after 2 | F1 after 3 | "
        + " | ".join(f"KL after {step}" for step in shown)
        + " | KL after 3, against the head | of retained classes | of the removed class | seconds per step |",
        "|---" * (7 + len(shown)) + "|",
    ]
    for variant in dict.fromkeys(row["variant"] for row in results["summary"]):
        if (variant, 0) in cells:
            row = cells[variant, 0]
            parts = f"{row['KL_retained']:.4f} | {row['KL_removed']:.3f}"
            lines.append(
                f"| *{variant}* | {row['F1']:.4f} | | {row['KL']:.4f}" + " |" * (len(shown) + 1) + f" {parts} | |"
            )
            continue
        two, row = cells[variant, 2], cells[variant, 3]
        course = " | ".join(f"{cells[variant, step]['KL']:.4f}" for step in shown)
        against = "" if variant == "head" else f"{row['KL_to_head']:+.4f} ± {row['KL_to_head_error']:.4f}"
        lines.append(
            f"| {variant} | {two['F1']:.4f} | {row['F1']:.4f} | {course} | {against} | {row['KL_retained']:.4f} "
            f"| {row['KL_removed']:.3f} | {row['seconds'] / 3:.2g} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"Means over classes {', '.join(map(str, meta['classes']))} and {meta['seeds']} trained networks; "
            "against the head after its last step: difference of KL, run by run, ± its standard error; its parts are "
            f"those after 3 steps. {meta['examples']:,} training examples, {meta['n_test']:,} held out; "
            + made_by(meta),
        ]
    )


def influence_table(name: str) -> str:
    results = results_of(name)
    lines = [
        "| model, training examples × queries | | fit | scores | self-influence | in all | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for benchmark in results["benchmarks"]:
        extra: dict[str, Any] = benchmark["extra_info"]
        if "peers" not in extra:
            continue
        label = benchmark["name"].split("[")[1].rstrip("]")
        label = f"{label}, {extra['parameters']:,} parameters, {extra['n']:,} × {extra['q']:,}"
        whole = sum(extra["fastif"]["exact"]["cpu_seconds"].values())
        for who, row in {**extra["fastif"], **extra["peers"]}.items():
            cpu = row["cpu_seconds"]
            stages = " | ".join(f"{cpu[stage]:.2f}" if stage in cpu else "" for stage in ("fit", "scores", "self"))
            total = sum(cpu.values())
            ours = who in extra["fastif"]
            same = sum(v for k, v in extra["fastif"]["exact"]["cpu_seconds"].items() if k in cpu)
            share = f"{total:.1f}" if who == "exact" else f"{total:.1f} ({total / (whole if ours else same):.2g}×)"
            shown = {"exact": "**fastif**", "separable": "**fastif**, `separable=1e-4`"}.get(who, who)
            shown = f"**fastif**, `{who}`" if who.startswith("memory") else shown
            lines.append(f"| {label} | {shown} | {stages} | {share} | {row['peak_mib']:.0f} |")
            label = ""
        parts = extra["necessary"]
        least, of = sum(parts.values()), ", ".join(f"{seconds:.1f} of {name}" for name, seconds in parts.items())
        lines.append(f"| | *the least: {of}* | | | | {least:.1f} ({least / whole:.2g}×) | |")
    lines += [
        "",
        "EK-FAC with the empirical Fisher; processor seconds of all threads, in brackets as a multiple of fastif's "
        "for the same stages; peers drawn on from two smaller numbers of training examples. Scores of kronfluence and "
        "fastif correlate by at least 0.9999, which is asserted. The least: what four bare passes through the model "
        "took in the same run, eigenvectors of such sizes, and all other matrix products at the rate of a large one. "
        f"{_machine(results)}. Made by `make bench-influence`.",
    ]
    return "\n".join(lines)


def published_table(name: str) -> str:
    from benchmarks.experiments.class_removal.report import tables

    return tables(results_of(name)).rstrip()


def memory_table(name: str) -> str:
    """What influence_table says of fastif's memory, stage by stage."""
    results = results_of(name.replace("memory", "influence"))
    lines = [
        "| model, training examples × queries, batches of | fit: peak MiB | scores | self-influence |",
        "|---|---|---|---|",
    ]
    for benchmark in results["benchmarks"]:
        extra: dict[str, Any] = benchmark["extra_info"]
        if "stage_peaks_mib" in extra:
            label = benchmark["name"].split("[")[1].rstrip("]")
            peaks = " | ".join(f"{extra['stage_peaks_mib'][stage]:.1f}" for stage in ("fit", "scores", "self"))
            lines.append(f"| {label}, {extra['n']:,} × {extra['q']:,}, {extra['batch']:,} | {peaks} |")
    return "\n".join([*lines, "", "EK-FAC with the empirical Fisher, float32. Made by `make bench-influence`."])


def mislabel_table(name: str) -> str:
    results = results_of(name)
    meta, kinds = results["meta"], results["meta"]["labels"]
    cells: dict[tuple[str, str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in results["detection"]:
        what, sampler, share, _ = row["contender"]
        cells.setdefault((what, sampler, share), {}).setdefault(row["labels"], []).append(row)
    wrong = {labels: next(row["wrong"] for row in results["detection"] if row["labels"] == labels) for labels in kinds}
    heads = " | ".join(f"`{labels}`: AUC | wrong among the top tenth" for labels in kinds)
    lines = [f"| suspicion | curvature from | {heads} | CPU s |", "|---|---|" + "---|---|" * len(kinds) + "---|"]
    for (what, sampler, share), found in cells.items():
        shown = {"head": "self-influence, head", "all layers": "self-influence, all layers"}.get(what, what)
        source = f"{share} `{sampler}`" if sampler else {"100%": "all"}.get(share, "")
        figures = []
        for labels in kinds:
            rows = found[labels]
            aucs = [row["auc"] for row in rows]
            spread = f" ± {stdev(aucs):.4f}" if len(aucs) > 1 else ""
            figures.append(f"{fmean(aucs):.4f}{spread} | {fmean(row['precision'] for row in rows):.1%}")
        seconds = min(row["cpu_seconds"] for rows in found.values() for row in rows)
        lines.append(f"| {shown} | {source} | {' | '.join(figures)} | {seconds:.1f} |")
    shares = ", ".join(f"{share:.1%} of `{labels}`" for labels, share in wrong.items())
    accuracies = ", ".join(f"{share:.1%} with `{labels}`" for labels, share in meta["test_accuracy"].items())
    lines += [
        "",
        f"{meta['n']:,} images of CIFAR-10, a CNN trained on their CIFAR-10N labels for {meta['epochs']} epochs (test "
        f"accuracy {accuracies}); by chance the AUC is 0.5 and the tenth holds the share of wrong labels, "
        f"{shares}. Damping {meta['damping']:g}; ± is the standard deviation over the sampler's seeds. "
        f"{meta['device']}, {threads_of(meta['threads'])}, torch {meta['versions']['torch']}. "
        "Made by `python benchmarks/experiments/mislabel_detection.py`.",
    ]
    return "\n".join(lines)


def solvers_table(name: str) -> str:
    results = results_of(name)
    extra: dict[str, Any] = next(b["extra_info"] for b in results["benchmarks"] if "tolerance" in b["extra_info"])
    cells: dict[tuple[float, str], dict[str, dict[str, Any]]] = {}
    for row in extra["rows"]:
        cells.setdefault((row["share"], row["sampler"]), {})[row["estimator"]] = row
    estimators = list(dict.fromkeys(row["estimator"] for row in extra["rows"]))
    heads = " | ".join(f"{e}: CPU s | products | residual | off the full solution" for e in estimators)
    lines = [f"| curvature from | {heads} |", "|---|" + "---|---|---|---|" * len(estimators)]
    for (share, sampler), found in sorted(cells.items(), key=lambda cell: -cell[0][0]):
        figures = []
        for row in (found.get(estimator) for estimator in estimators):
            if row is None:
                figures.append("– | – | – | –")
                continue
            figures.append(f"{row['cpu']:.2f} | {row['products']:.0f} | {row['residual']:.1e} | {row['error']:.3f}")
        source = "all" if sampler == "all" else f"{share:.0%} `{sampler}`"
        lines.append(f"| {source} | {' | '.join(figures)} |")
    draws = {row["estimator"]: row["draws"] for row in extra["rows"] if row["sampler"] != "all"}
    drawn = ", ".join(f"{times} draw{'s' if times > 1 else ''} for {who}" for who, times in draws.items())
    lines += [
        "",
        f"A CNN of {extra['parameters']:,} parameters, {extra['examples']:,} training examples of Fashion-MNIST, "
        f"{extra['queries']} queries' gradients solved for at once, the GGN with damping {extra['damping']:g}, "
        f"tolerance {extra['tolerance']:g}. Times are CPU seconds of fit and solve, LiSSA's search for its scale "
        "included; the residual is relative, that of the subset's own curvature, the larger of the queries; the last "
        f"figure is the relative distance from the solution with all examples. Means over {drawn}; –: not run. "
        f"The machine was busy. {_machine(results)}. Made by "
        "`pytest benchmarks/influence/bench_products.py -k shares --benchmark-enable`.",
    ]
    return "\n".join(lines)


def products_table(name: str) -> str:
    results = results_of(name)
    peers = list(results["benchmarks"][0]["extra_info"]["ratio"])
    heads = ["network", "matrix", "vectors at once", "products per CPU second", *peers, "MiB of the kept graph"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for benchmark in results["benchmarks"]:
        extra = benchmark["extra_info"]
        of, m = extra["cpu_seconds"], extra["vectors"]
        rates = " | ".join(f"{m / of[peer]:.1f} ({of[peer] / of['fastif']:.2f}×)" for peer in peers)
        lines.append(
            f"| {extra['network']}, {extra['parameters']:,} parameters | {extra['matrix']} | {m} "
            f"| {m / of['fastif']:.1f} | {rates} | {extra['graph_bytes'] / 2**20:.0f} |"
        )
    examples = results["benchmarks"][0]["extra_info"]["examples"]
    lines += [
        "",
        f"{examples} examples of 28 × 28, all weighted alike; in brackets the others' time as a multiple of fastif's. "
        f"{_machine(results)}. Made by "
        "`pytest benchmarks/influence/bench_products.py -k test_products --benchmark-enable`.",
    ]
    return "\n".join(lines)


def gpu_table(name: str) -> str:
    """The newest result of each device that `make gpu-check` kept."""
    kept = [results_of(path.stem) for path in sorted(KEPT.glob(f"{name}-*.json"))]
    newest = {results["device"]: results for results in kept}
    if not newest:
        return "No GPU has run them yet."
    parts = []
    for device, results in newest.items():
        lines = ["| op | seconds | share of the device's limit | against |", "|---|---|---|---|"]
        for row in results["benchmarks"]:
            seconds = row.get("seconds", {}).get("fastif")
            share = f"{row['share_of_limit']:.0%}" if row.get("share_of_limit") else ""
            peers = "<br>".join(f"{ratio:.1f}× {peer}" for peer, ratio in row.get("ratio", {}).items())
            label = row["name"].removeprefix("test_")
            lines.append(f"| `{label}` | {'' if seconds is None else f'{seconds:.3g}'} | {share} | {peers} |")
        limits, stages = results["limits"], results["stages"]
        failed = [stage["name"] for stage in stages if stage["passed"] is False]
        passed = [stage["name"] for stage in stages if stage["passed"]]
        lines += [
            "",
            f"{device}, driver {results['driver']}, torch {results['torch']}, CUDA {results['cuda']}, "
            f"{results['date'][:10]}; the limit is what the same run measured: "
            f"{limits.get('copy_bytes_per_second', 0) / 1e12:.2f} TB/s copied, "
            f"{limits.get('matmul_float32_flops_per_second', 0) / 1e12:.0f} TFLOP/s in float32 and "
            f"{limits.get('matmul_tf32_flops_per_second', 0) / 1e12:.0f} in TF32 products. Passed: {', '.join(passed)}."
            + (f" Failed: {', '.join(failed)}." if failed else "")
            + " Made by `make gpu-check`.",
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def gpt2_table(name: str) -> str:
    """GPT-2's plan, fit and scores, beside what was planned; and kronfluence on some of its layers."""
    results = results_of(name)
    meta, beside = results["meta"], results["beside"]
    mib = lambda taken: "" if taken is None else f"{taken / 2**20:,.0f} MiB"  # noqa: E731
    lines = ["| | layers | texts | | seconds | memory beside the model | planned |", "|---|---|---|---|---|---|---|"]
    parts = [
        ("fastif beside", "fastif", beside["layers"], beside["texts"]),
        ("kronfluence", "kronfluence", beside["layers"], beside["texts"]),
        ("fastif", "fastif", 48, meta["texts"]),
    ]
    for key, shown, layers, texts in parts:
        for step in ("plan", "fit", "scores"):
            if step in results.get(key, {}):
                row = results[key][step]
                figures = f"{row['seconds']:,.0f} | {mib(row['bytes'])} | {mib(row.get('planned'))}"
                lines.append(f"| {shown} | {layers} | {texts} | {step} | {figures} |")
    lines += [
        "",
        f"GPT-2 of {meta['parameters']:,} random parameters, texts of {meta['tokens'] // 2} to {meta['tokens']} "
        f"tokens, padded, {meta['queries']} queries; correlation with kronfluence {beside['correlation']:.8f}. "
        f"{meta['device']}, {threads_of(meta['threads'])} of a busy machine, torch {meta['versions']['torch']}. "
        "Made by `python -m benchmarks.experiments.gpt2`.",
    ]
    return "\n".join(lines)


def zoo_table(name: str) -> str:
    """Networks by kind: how many of each are covered, how far off at most, and what is left out."""
    results = results_of(name)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in results["networks"]:
        kind = re.search(r"\((\w+)\)$", row["name"])
        kinds.setdefault(kind[1] if kind else "adapters" if " with " in row["name"] else "made by hand", []).append(row)
    lines = ["| networks | tried | 95 % covered | largest error | |", "|---|---|---|---|---|"]
    for kind, rows in kinds.items():
        tried = [row for row in rows if "error" in row or "refused" in row]
        if not tried:
            continue
        covered = [row for row in tried if row.get("covered", 0) >= 0.95]
        worst = max(row.get("error", 0.0) for row in tried)
        names = ", ".join(row["name"].partition(" (")[0].removeprefix("gpt2 with ") for row in covered)
        less = "".join(
            f"; **not {row['name']}: {row.get('refused') or '; '.join(row['reasons'])}**"
            for row in tried
            if row not in covered
        )
        lines.append(f"| {kind} | {len(tried)} | {len(covered)} | {worst:.0e} | {names}{less} |")
    meta = results["meta"]
    versions = f"fastif {meta['fastif']}, torch {meta['torch']}, transformers {meta['transformers']}"
    others: dict[str, set[str]] = {}
    for kind, rows in kinds.items():
        for row in rows:
            if row.get("torch", meta["torch"]) != meta["torch"]:
                others.setdefault(row["torch"], set()).add(kind)
    beside = "".join(f"; {' and '.join(sorted(found))}: torch {torch}" for torch, found in others.items())
    lines += ["", f"{versions}{beside}. Made by `make zoo`."]
    return "\n".join(lines)
