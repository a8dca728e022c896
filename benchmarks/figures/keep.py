"""Keeps results in benchmarks/results/ and makes the pages' tables and pictures from them: no figure is typed by hand.

python -m benchmarks.figures.keep keep runs/fashion-mnist/results.json class-removal-fashion-mnist
python -m benchmarks.figures.keep keep runs/demo/results.json class-removal-demo
python -m benchmarks.figures.keep keep runs/bench.json cpu
python -m benchmarks.figures.keep keep runs/kcenter.json kcenter-cpu
python -m benchmarks.figures.keep keep runs/mislabel/results.json mislabel
python -m benchmarks.figures.keep keep runs/lds/results.json lds
python -m benchmarks.figures.keep keep runs/people/results.json people
python -m benchmarks.figures.keep keep runs/class-removal-cifar10-0.25/class/results.json published-cifar10
python -m benchmarks.figures.keep add runs/lds/results.json lds  # of a run of some contenders or benchmarks
python -m benchmarks.figures.keep keep runs/solvers.json solvers-cpu
python -m benchmarks.figures.keep keep runs/products.json products-cpu
python -m benchmarks.figures.keep keep runs/libraries/results.json libraries
python -m benchmarks.figures.keep keep runs/overheads/results.json overheads
python -m benchmarks.figures.keep keep runs/checks.json checks
python -m benchmarks.figures.keep keep runs/calibration/results.json calibration
python -m benchmarks.figures.keep tables          # rewrites README.md and the pages in docs between markers; pictures
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.figures import faithfulness, index, pages, removals, tables
from fastif.report.pages import new_figure

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def keep(source: Path, name: str) -> None:
    """Copies what is worth keeping of a result file: summaries, not single rows; options, not one machine's folders."""
    results = json.loads(source.read_text())
    if "summary" in results:
        results.pop("rows")
    if "summary" in results and not results["meta"]["command"].startswith("python"):
        words = results["meta"]["command"].split()
        words = [word for word in words if word not in ("--resume", "--quiet", "-q")]
        folders = ("--root", "--out", "--checkpoint")
        kept = [
            w for w, before in zip(words[1:], words, strict=False) if w not in folders[1:] and before not in folders[1:]
        ]
        kept = ["DIR" if before == "--root" else w for w, before in zip(kept, ["", *kept], strict=False)]
        results["meta"]["command"] = " ".join(["fastif", *kept])
    elif "benchmarks" in results:
        results.pop("commit_info", None)
        for benchmark in results["benchmarks"]:
            benchmark.pop("options", None)
            benchmark.pop("stats", None)  # of the one timing that pytest-benchmark made; ours stand in extra_info
    (tables.KEPT / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")


def _core(fact: Any) -> Any:
    """Of the processor its name: its clock is another at every look."""
    return fact.get("brand_raw", fact) if isinstance(fact, dict) else fact


def add(source: Path, name: str) -> None:
    """Puts some benchmarks, or LDS rows of some contenders, among what is kept, in the place of their own.

    A benchmark takes the place of all that were kept of it, with whatever parameters.

    Raises ValueError where the machine was another, or the networks and their retrainings.
    """
    results, kept = json.loads(source.read_text()), json.loads((tables.KEPT / f"{name}.json").read_text())
    if "benchmarks" in results:
        for key in ("cpu", "threads", "build", "torch"):
            now, before = (_core(r["machine_info"][key]) for r in (results, kept))
            if now != before:
                raise ValueError(f"add: {key} must be that of the kept results, {before}, got {now}")
        own = {benchmark["name"].split("[")[0] for benchmark in results["benchmarks"]}
        others = [b for b in kept["benchmarks"] if b["name"].split("[")[0] not in own]
        kept["benchmarks"] = others + results["benchmarks"]
        (tables.KEPT / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
        return
    if "rows" in results:
        _add_rows(results, kept)
        (tables.KEPT / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
        return
    for model, facts in results["meta"]["models"].items():
        for key, value in facts.items():
            before = kept["meta"]["models"].get(model, {}).get(key)
            if key != "seconds_of_a_retraining" and value != before:
                raise ValueError(f"add: {model}: {key} must be that of the kept results, {before}, got {value}")
    order = list(dict.fromkeys(row["contender"] for row in (*kept["lds"], *results["lds"])))
    own = {(row["model"], row["contender"]) for row in results["lds"]}
    rows = [row for row in kept["lds"] if (row["model"], row["contender"]) not in own] + results["lds"]
    kept["lds"] = sorted(rows, key=lambda row: order.index(row["contender"]))
    (tables.KEPT / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


def _add_rows(results: dict[str, Any], kept: dict[str, Any]) -> None:
    """Rows of some contenders that were judged by the same retrainings, in the order of the experiment."""
    from benchmarks.experiments.lds_text import CONTENDERS

    for key, before in kept["meta"].items():
        now = results["meta"][key]
        if key not in ("contenders", "seconds_of_a_retraining", "platform", "build", "versions") and now != before:
            raise ValueError(f"add: {key} must be that of the kept results, {before}, got {now}")
    own = {row["contender"] for row in results["rows"]}
    rows = [row for row in kept["rows"] if row["contender"] not in own] + results["rows"]
    kept["rows"] = sorted(rows, key=lambda row: [*CONTENDERS].index(row["contender"]))


def growth_picture(name: str, path: Path) -> None:
    """Time (and memory, where it was taken) against each size, one column each, from the kept NAME.json."""
    results = json.loads((tables.KEPT / f"{name}.json").read_text())
    panels = [b["extra_info"] for b in results["benchmarks"] if "axis" in b["extra_info"]]
    words = {"n": "examples n", "d": "coordinates d", "k": "picks k", "q": "queries q", "width": "width of the layers"}
    contenders = list(dict.fromkeys(row["contender"] for panel in panels for row in panel["rows"]))
    colours = dict(
        zip(contenders, ("#d55e00", "#000000", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"), strict=False)
    )
    measures = {"cpu": "processor seconds", "peak_mib": "peak MiB"}
    measures = {key: label for key, label in measures.items() if key in panels[0]["rows"][0]}
    figure, axes = new_figure(len(panels), len(measures), 11, 0.9 + 3 * len(measures), sharey="row")
    for row_of_axes, (measure, label) in zip(axes, measures.items(), strict=True):
        for axis, panel in zip(row_of_axes, panels, strict=True):
            over = panel["axis"]
            for contender in contenders:
                rows = [row for row in panel["rows"] if row["contender"] == contender]
                width = 2.4 if contender == "fastif" else 1.2
                style = dict(color=colours[contender], linewidth=width, marker="o", markersize=width + 1)
                axis.loglog([row[over] for row in rows], [row[measure] for row in rows], label=contender, **style)
            first = panel["rows"][0]
            fixed = ", ".join(f"{a} = {first[a]:,}" for a in words if a in first and a != over)
            axis.set(title=fixed, xlabel=words[over])
        row_of_axes[0].set_ylabel(label)
    handles = next(a.get_legend_handles_labels() for a in axes[0][::-1] if len(a.lines) == len(contenders))
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None, "Description": results["datetime"]})


def demo_picture() -> None:
    """README's: the first one of the demo's report, from what `make demo` made."""
    import io

    from PIL import Image, PngImagePlugin

    from fastif.report.class_removal import story

    results = json.loads((tables.KEPT / "class-removal-demo.json").read_text())
    words = PngImagePlugin.PngInfo()
    words.add_text("Description", results["meta"]["date"])
    Image.open(io.BytesIO(story(results))).save(ROOT / "docs" / "demo.png", pnginfo=words, optimize=True)


def published_pictures() -> None:
    """Of all pictures of the experiments those that docs/published.md shows."""
    from benchmarks.experiments.class_removal.report import draw

    page = (ROOT / "docs" / "published.md").read_text()
    for kept in sorted(tables.KEPT.glob("published-*.json")):
        with TemporaryDirectory() as folder:
            draw(json.loads(kept.read_text()), f"{folder}/{kept.stem}-")
            for picture in Path(folder).iterdir():
                if picture.name in page:
                    (ROOT / "docs" / picture.name).write_bytes(picture.read_bytes())


def main(arguments: list[str]) -> None:
    if arguments[:1] in (["keep"], ["add"]) and len(arguments) == 3:
        (keep if arguments[0] == "keep" else add)(Path(arguments[1]), arguments[2])
    elif arguments == ["tables"]:
        for page in PAGES:
            page.write_text(pages.with_tables(page.read_text()))
        for name in ("kcenter", "influence"):
            if (tables.KEPT / f"{name}-cpu.json").exists():
                growth_picture(f"{name}-cpu", ROOT / "docs" / f"{name}-growth.png")
        if (tables.KEPT / "lds.json").exists():
            faithfulness.faithfulness_picture("lds", ROOT / "docs" / "faithfulness.png")
        if (tables.KEPT / "index-cpu.json").exists():
            index.fidelity_picture("index-cpu", ROOT / "docs" / "index-fidelity.png")
        if (tables.KEPT / "unlearning-fashion-mnist.json").exists():
            removals.frontier_picture("unlearning-fashion-mnist", ROOT / "docs" / "removal-frontier.png")
        if (tables.KEPT / "removal-sequence-digits.json").exists():
            removals.sequence_picture("removal-sequence-digits", ROOT / "docs" / "removal-sequence.png")
        published_pictures()
        demo_picture()
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
