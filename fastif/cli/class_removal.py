"""`fastif class-removal`."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn

from fastif import samplers as sampling
from fastif.cli.arguments import check, device_named, interruptible, split, terminal, writable
from fastif.cli.options import Device, Quiet
from fastif.data import NAMES, Data, load
from fastif.evaluation.class_removal import class_removal
from fastif.evaluation.lissa_step import LiSSAStep, Removed
from fastif.evaluation.metrics import METRICS
from fastif.evaluation.models import build
from fastif.evaluation.settings import SAMPLERS, check_budgets, check_classes, check_seeds, choose_samplers
from fastif.evaluation.training import (
    MAX_WIDTH,
    RECIPES,
    Checkpoint,
    Recipe,
    load_checkpoint,
    save_checkpoint,
    train,
)
from fastif.influence.shared_folder import held
from fastif.model.features import extract
from fastif.ranks import find_ranks
from fastif.report.class_removal import (
    BASELINE,
    baselines,
    last_step,
    references,
    samplers_of,
    seconds_of,
    share,
    write_report,
)

BUDGETS = ("1%", "5%")


def class_removal_command(
    data: Annotated[str, typer.Option(help=f"One of {', '.join(NAMES)}.")] = "digits",
    root: Annotated[Path | None, typer.Option(help="The folder with the data set's files.")] = None,
    samplers: Annotated[
        list[str] | None, typer.Option(help="Samplers by name, comma separated or repeated.", show_default="all")
    ] = None,
    k: Annotated[
        list[str] | None,
        typer.Option(help="Examples that carry the curvature: numbers or percentages.", show_default="1%,5%"),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 3,
    steps: Annotated[int, typer.Option(help="Newton steps at most.")] = 6,
    classes: Annotated[
        list[str] | None, typer.Option(help="Classes to remove, by number or name, comma separated; default all.")
    ] = None,
    width: Annotated[float | None, typer.Option(help="Factor on the network's channels.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of training.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The trained network: loaded if the file exists, else trained and saved there.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of training, and so of the objective.")] = None,
    damping: Annotated[float, typer.Option(help="Added to the curvature's diagonal.")] = 0.0,
    out: Annotated[Path | None, typer.Option(help="Folder for results and report; default runs/DATA.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted job in the same folder.")] = False,
    retrain: Annotated[bool, typer.Option("--retrain/--no-retrain", help="Retrain the whole network, too.")] = True,
    lissa: Annotated[
        bool | None,
        typer.Option(
            "--lissa/--no-lissa",
            help="The paper's baseline too, one LiSSA step of the whole network.",
            show_default="with digits, as it is slow on more data",
        ),
    ] = None,
    device: Device = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default 1 for digits, else torch's.")] = None,
    quiet: Quiet = False,
) -> None:
    """Remove classes from a trained classifier and compare samplers with retraining."""
    began = time.perf_counter()
    chosen = choose_samplers(SAMPLERS if samplers is None else split(samplers))
    check_seeds(seeds)
    recipe = _recipe(data, width, epochs, weight_decay)
    check("steps", steps, steps >= 1, ">= 1")
    check("damping", damping, 0 <= damping < math.inf, "a finite number >= 0")
    where = device_named(device)
    if threads is None and data == "digits":
        threads = (
            1  # 8×8 images: too little work to share, and threads that wait for each other are slow on a busy machine
        )
    if threads is not None:
        check("threads", threads, threads >= 1, ">= 1")
        torch.set_num_threads(threads)
    out = Path("runs") / data if out is None else out
    if not resume and (out / "rows.jsonl").exists():
        raise ValueError(f"{out} holds an unfinished job: continue it with --resume, or remove {out / 'rows.jsonl'}")

    given = {"data": data, "width": width, "epochs": epochs, "weight_decay": weight_decay}
    expect = {name: value for name, value in given.items() if value is not None}
    stored = checkpoint or out / "model.safetensors"
    reuse = stored.exists() and (checkpoint is not None or resume)
    network = load_checkpoint(stored, {**expect, "architecture": recipe.architecture}) if reuse else None
    images = load(data, root)
    budgets = check_budgets(BUDGETS if k is None else split(k), len(images.y_train))
    removed = _classes(classes, images.classes)
    if network is not None:
        recipe = network.recipe
        if (network.shape, network.classes) != (_image_shape(images), images.classes):
            made_for = f"images {network.shape} of {len(network.classes)} classes"
            raise ValueError(f"{stored} is for {made_for}, not for {data}")

    def retrained(keep: Tensor) -> nn.Module:
        return _trained(recipe, images, images.x_train[keep], images.y_train[keep], where, progress=False)

    places = [out] if network is not None else [out, stored.parent]
    ranks = find_ranks()
    first = ranks.rank == 0  # which alone trains the network, prints and writes
    kept = writable(*places) if first else nullcontext()
    with interruptible(out, ("rows.jsonl", stored.name)), kept, held(out, ranks):
        if network is None and first:
            trained = _trained(recipe, images, images.x_train, images.y_train, where, progress=not quiet)
            network = Checkpoint(trained, recipe, data, images.classes, _image_shape(images))
            save_checkpoint(stored, network)
        ranks.meet("the network is trained")
        if network is None:
            network = load_checkpoint(stored, {**expect, "architecture": recipe.architecture})
        model = network.model.to(where)
        with_lissa = data == "digits" if lissa is None else lissa
        results = class_removal(
            model,
            (images.x_train, images.y_train),
            (images.x_test, images.y_test),
            samplers=chosen,
            k=budgets,
            seeds=seeds,
            classes=removed,
            steps=steps,
            weight_decay=recipe.weight_decay,
            damping=damping,
            retrain=retrained if retrain else None,
            baseline=_lissa(model, images, recipe.weight_decay, where) if with_lissa else None,
            out=out,
            resume=resume,
            device=where,
            progress=not quiet,
            about={"data": data, "class_names": images.classes, "recipe": recipe._asdict()},
        )
    if not first:
        return
    paths = [out / "results.json", *write_report(results, out), stored]
    if not quiet:
        console = terminal()
        console.print(_table(results, narrow=console.width < 100))
        console.print(f"[bold]{paths[-2]}[/bold]", soft_wrap=True)
        console.print(f"with {', '.join(path.name for path in paths[:-2])}; the model is {stored}", soft_wrap=True)
        console.print(f"{time.perf_counter() - began:.1f} s in all")


def _recipe(data: str, width: float | None, epochs: int | None, weight_decay: float | None) -> Recipe:
    if data not in RECIPES:
        raise ValueError(f"data must be one of {', '.join(NAMES)}, got {data!r}")
    recipe = RECIPES[data]
    given = {"width": width, "epochs": epochs, "weight_decay": weight_decay}
    recipe = recipe._replace(**{name: value for name, value in given.items() if value is not None})
    check("width", recipe.width, 0 < recipe.width <= MAX_WIDTH, f"in (0, {MAX_WIDTH}]")
    check("epochs", recipe.epochs, recipe.epochs >= 1, ">= 1")
    # Without weight decay the retrained head would have no finite optimum to compare with.
    check("weight-decay", recipe.weight_decay, 0 < recipe.weight_decay < math.inf, "a positive number")
    return recipe


def _classes(given: Sequence[str] | None, names: Sequence[str]) -> list[int]:
    if given is None:
        return check_classes(None, len(names))
    numbers: list[int] = []
    for entry in split(given):
        if entry in names:
            numbers.append(names.index(entry))
        elif entry.isdecimal():
            numbers.append(int(entry))
        else:
            raise ValueError(f"--classes must be numbers below {len(names)} or of {', '.join(names)}, got {entry!r}")
    return check_classes(numbers, len(names))


def _image_shape(images: Data) -> tuple[int, int, int]:
    channels, height, width = images.x_train.shape[1:]
    return channels, height, width


def _trained(recipe: Recipe, images: Data, x: Tensor, y: Tensor, device: torch.device, *, progress: bool) -> nn.Module:
    network = build(
        recipe.architecture, _image_shape(images), len(images.classes), width=recipe.width, seed=recipe.seed
    )
    return train(
        network,
        x,
        y,
        epochs=recipe.epochs,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        progress=progress,
        device=device,
    )


def _lissa(
    model: nn.Module, images: Data, weight_decay: float, device: torch.device
) -> Callable[[Tensor, int, int], Removed]:
    """The paper's baseline as `class_removal` takes it: its curvature from a random sample."""
    train = images.x_train, images.y_train
    step = LiSSAStep(model, train, extract(model, train, device=device, progress=False), weight_decay, device=device)
    return lambda removed, k, seed: step(removed, sampling.random, k, seed)


def _table(results: Mapping[str, Any], narrow: bool) -> Table:
    """The summary at the last step, below what it is compared with; the narrow one leaves out EL, SL and ME."""
    step = last_step(results)
    table = Table(
        title=f"{results['meta'].get('data', '')}: classes removed, held-out metrics after step {step}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    metrics = [metric for metric in METRICS[:-1] if not (narrow and metric in ("EL", "SL"))]
    table.add_column("", no_wrap=True)
    for name in ("k", *metrics, "F1", "excess", "RTE ms", *(() if narrow else ("ME MiB",))):
        table.add_column(name, justify="right", no_wrap=True)
    for words, entries in references(results):
        means = [f"{fmean(entry[metric] for entry in entries):.4f}" for metric in (*metrics, "F1")]
        seconds = seconds_of(entries)
        time_taken = [] if seconds is None else ["", f"{1e3 * seconds:.0f}"]
        table.add_row(words.removesuffix(" to convergence"), "", *means, *time_taken)
    for entry in baselines(results):
        table.add_row(
            BASELINE,
            share(entry["k"], results),
            *(f"{entry[f'{metric}_mean']:.4f}" for metric in (*metrics, "F1")),
            "",
            f"{1e3 * entry['RTE_mean']:.0f}",
            *(() if narrow else (_mebibytes(entry["ME_mean"]),)),
        )
    table.add_section()
    for entry in (e for e in results["summary"] if e["step"] == step):
        f1 = f"{entry['F1_mean']:.4f}" + ("" if entry["F1_std"] is None else f" ± {entry['F1_std']:.4f}")
        table.add_row(
            entry["sampler"],
            share(entry["k"], results),
            *(f"{entry[f'{metric}_mean']:.4f}" for metric in metrics),
            f1,
            f"{entry['excess_mean']:.0e}",
            f"{1e3 * entry['RTE_mean']:.0f}",
            *(() if narrow else (_mebibytes(entry["ME_mean"]),)),
            end_section=entry["sampler"] == samplers_of(results)[-1],
        )
    return table


def _mebibytes(peak: float | None) -> str:
    return "–" if peak is None else f"{peak / 2**20:.1f}"
