"""The command line: `fastif class-removal`, `fastif sample`, `fastif info`.

Whatever the user can get wrong ends in one line on stderr and exit code 2; an interrupted job in exit code 130.
"""

import inspect
import math
import os
import re
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

try:
    import typer
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as missing:
    sys.exit(f"error: the command line needs {missing.name}: pip install 'fastif[cli]'")

import fastif
from fastif.data import NAMES, Data, load
from fastif.evaluation.class_removal import (
    SAMPLERS,
    check_budgets,
    check_classes,
    check_seeds,
    choose_samplers,
    class_removal,
)
from fastif.evaluation.metrics import METRICS
from fastif.evaluation.models import build
from fastif.evaluation.training import (
    MAX_WIDTH,
    RECIPES,
    Checkpoint,
    Recipe,
    load_checkpoint,
    save_checkpoint,
    train,
)
from fastif.report import last_step, references, samplers_of, share, write_report

app = typer.Typer(
    name="fastif",
    help="Which training examples made a model behave so, and what would it be without them?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
BUDGETS = ("5%", "20%")
_errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


class _Interrupted(Exception):
    """Ctrl-C, with something to say about it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    try:
        code = app(args=None if arguments is None else list(arguments), standalone_mode=False)
        if code == 130:  # what typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except typer.Exit as end:
        return end.exit_code
    except (KeyboardInterrupt, typer.Abort, _Interrupted) as end:
        _errors.print(f"interrupted: {end}" if isinstance(end, _Interrupted) else "interrupted")
        return 130
    except (ValueError, OSError, ModuleNotFoundError, torch.OutOfMemoryError) as error:
        _errors.print(f"error: {_one_line(str(error))}")
        return 2
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own errors: an unknown option, a value of the wrong type
            raise
        message = _one_line(error.format_message())  # pyright: ignore[reportAttributeAccessIssue]
        if message:  # `fastif` alone has printed its help, and has nothing to add
            _errors.print(f"error: {message}")
        return 2


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fastif {fastif.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
) -> None: ...


# ------------------------------------------------------------------------------------------------------ class-removal


@app.command("class-removal")
def class_removal_command(
    data: Annotated[str, typer.Option(help=f"One of {', '.join(NAMES)}.")] = "digits",
    root: Annotated[Path | None, typer.Option(help="The folder with the data set's files.")] = None,
    samplers: Annotated[
        list[str] | None, typer.Option(help="Samplers by name, comma separated or repeated.", show_default="all")
    ] = None,
    k: Annotated[
        list[str] | None,
        typer.Option(help="Examples that carry the curvature: numbers or percentages.", show_default="5%,20%"),
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
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default 1 for digits, else torch's.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Remove classes from a trained classifier and compare samplers with retraining."""
    began = time.perf_counter()
    chosen = choose_samplers(SAMPLERS if samplers is None else _split(samplers))
    check_seeds(seeds)
    recipe = _recipe(data, width, epochs, weight_decay)
    _check("steps", steps, steps >= 1, ">= 1")
    _check("damping", damping, 0 <= damping < math.inf, "a finite number >= 0")
    where = _device(device)
    if threads is None and data == "digits":
        threads = (
            1  # 8×8 images: too little work to share, and threads that wait for each other are slow on a busy machine
        )
    if threads is not None:
        _check("threads", threads, threads >= 1, ">= 1")
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
    budgets = check_budgets(BUDGETS if k is None else _split(k), len(images.y_train))
    removed = _classes(classes, images.classes)
    if network is not None:
        recipe = network.recipe
        if (network.shape, network.classes) != (_image_shape(images), images.classes):
            made_for = f"images {network.shape} of {len(network.classes)} classes"
            raise ValueError(f"{stored} is for {made_for}, not for {data}")

    def retrained(keep: Tensor) -> nn.Module:
        return _trained(recipe, images, images.x_train[keep], images.y_train[keep], where, progress=False)

    with _writable(out, *([] if network is not None else [stored.parent])):
        if network is None:
            model = _trained(recipe, images, images.x_train, images.y_train, where, progress=not quiet)
            network = Checkpoint(model, recipe, data, images.classes, _image_shape(images))
            save_checkpoint(stored, network)
        try:
            results = class_removal(
                network.model.to(where),
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
                out=out,
                resume=resume,
                device=where,
                progress=not quiet,
                about={"data": data, "class_names": images.classes, "recipe": recipe._asdict()},
            )
        except KeyboardInterrupt:
            raise _Interrupted(f"what was finished is in {out}; the same command with --resume continues") from None
    paths = [out / "results.json", *write_report(results, out), stored]
    if not quiet:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=120)
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
    _check("width", recipe.width, 0 < recipe.width <= MAX_WIDTH, f"in (0, {MAX_WIDTH}]")
    _check("epochs", recipe.epochs, recipe.epochs >= 1, ">= 1")
    # Without weight decay the retrained head would have no finite optimum to compare with.
    _check("weight-decay", recipe.weight_decay, 0 < recipe.weight_decay < math.inf, "a positive number")
    return recipe


def _check(name: str, value: Any, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"--{name} must be {rule}, got {value}")


def _split(values: Sequence[str]) -> list[str]:
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def _classes(given: Sequence[str] | None, names: Sequence[str]) -> list[int]:
    if given is None:
        return check_classes(None, len(names))
    numbers: list[int] = []
    for entry in _split(given):
        if entry in names:
            numbers.append(names.index(entry))
        elif entry.isdecimal():
            numbers.append(int(entry))
        else:
            raise ValueError(f"--classes must be numbers below {len(names)} or of {', '.join(names)}, got {entry!r}")
    return check_classes(numbers, len(names))


def _device(name: str) -> torch.device:
    _check("device", name, re.fullmatch("cpu|cuda(:[0-9]+)?", name) is not None, "cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


@contextmanager
def _writable(*folders: Path) -> Iterator[None]:
    """Makes the folders, OSError now, not after training, where one cannot be written to.

    Those that it made and that are still empty when the block fails are removed.
    """
    made: list[Path] = []
    try:
        for folder in folders:
            try:
                for path in (*reversed(folder.parents), folder):
                    if not path.exists():
                        path.mkdir()
                        made.append(path)
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                raise OSError(f"cannot write to the folder {folder}: {error.strerror or error}") from error
        yield
    except BaseException:
        for path in reversed(made):
            with suppress(OSError):
                path.rmdir()
        raise


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
        table.add_row(words.removesuffix(" to convergence"), "", *means)
    table.add_section()
    for entry in (e for e in results["summary"] if e["step"] == step):
        f1 = f"{entry['F1_mean']:.4f}" + ("" if entry["F1_std"] is None else f" ± {entry['F1_std']:.4f}")
        me = entry["ME_mean"]
        table.add_row(
            entry["sampler"],
            share(entry["k"], results),
            *(f"{entry[f'{metric}_mean']:.4f}" for metric in metrics),
            f1,
            f"{entry['excess_mean']:.0e}",
            f"{1e3 * entry['RTE_mean']:.0f}",
            *(() if narrow else ("–" if me is None else f"{me / 2**20:.1f}",)),
            end_section=entry["sampler"] == samplers_of(results)[-1],
        )
    return table


# ------------------------------------------------------------------------------------------------------------- sample


@app.command("sample")
def sample_command(
    sampler: Annotated[str, typer.Argument(help=f"One of {', '.join(SAMPLERS)}.")],
    out: Annotated[Path, typer.Option(help="FILE.npz or FILE.safetensors for indices and weights.")],
    k: Annotated[str, typer.Option(help="How many examples: a number or a percentage.")],
    features: Annotated[Path | None, typer.Option(help="[n, d], .npy or .safetensors with a tensor features.")] = None,
    logits: Annotated[Path | None, typer.Option(help="[n, c], .npy or .safetensors with a tensor logits.")] = None,
    labels: Annotated[Path | None, typer.Option(help="[n], .npy or .safetensors with a tensor labels.")] = None,
    seed: Annotated[int, typer.Option(help="For samplers that draw.")] = 0,
) -> None:
    """Choose examples, with weights, from saved features, logits and labels."""
    ((name, function),) = choose_samplers([sampler])
    if out.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"--out must end in .npz or .safetensors, got {out}")
    _check("seed", seed, 0 <= seed < 2**63, "in [0, 2^63)")
    paths = {"features": features, "logits": logits, "labels": labels}
    given = {what: _read_array(path, what) for what, path in paths.items() if path is not None}
    if not given:
        raise ValueError("give at least one of --features, --logits, --labels")
    for what, values in given.items():
        if values.ndim == 0:
            raise ValueError(f"--{what} must hold one entry per example, got a single number in {paths[what]}")
    lengths = {what: len(values) for what, values in given.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the files must hold as many examples each, got {lengths}")
    n = next(iter(lengths.values()))
    known: dict[str, Any] = {"n": n, "generator": torch.Generator().manual_seed(seed), **given}
    if "features" in given:
        known["points"] = given["features"]
    arguments: dict[str, Any] = {"k": check_budgets([k], n)[0]}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in known:
            arguments[parameter.name] = known[parameter.name]
        elif parameter.default is inspect.Parameter.empty and parameter.name != "k":
            needed = "features" if parameter.name == "points" else parameter.name
            raise ValueError(f"the sampler {name} needs --{needed}")
    try:
        subset = function(**arguments)
    except TypeError as error:
        raise ValueError(str(error)) from error
    with _writable(out.parent):
        _write_subset(out, subset.indices, subset.weights)
    print(f"{len(subset.indices)} of {n} examples, weights sum to {float(subset.weights.sum()):.4g}: {out}")


def _read_array(path: Path, name: str) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} for --{name}")
    if path.suffix == ".npy":
        try:
            return torch.from_numpy(np.load(path, allow_pickle=False))
        except (ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a numeric .npy file: {error}") from error
    if path.suffix != ".safetensors":
        raise ValueError(f"--{name} must be a .npy or .safetensors file, got {path}")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} has no tensor {name}, or is damaged: {error}") from error


def _write_subset(path: Path, indices: Tensor, weights: Tensor) -> None:
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        if path.suffix == ".npz":
            np.savez(partial, indices=indices.numpy(), weights=weights.numpy())
        else:
            from safetensors.torch import save_file

            save_file({"indices": indices.contiguous(), "weights": weights.contiguous()}, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------------- info


@app.command("info")
def info_command() -> None:
    """Versions, and what was built."""
    facts = {
        "fastif": fastif.__version__,
        "python": sys.version.split()[0],
        **fastif.build_info(),
    }
    for name, value in facts.items():
        print(f"{name:<10} {value}")
