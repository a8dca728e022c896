"""`fastif scores`."""

import csv
import importlib
import importlib.util
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import nn

from fastif.capture import dtype_of
from fastif.cli.arguments import Interrupted, ScriptError, check, device_named, split, terminal, writable
from fastif.cli.sample import drawn
from fastif.curvature import (
    CG,
    EKFAC,
    KFAC,
    Arnoldi,
    DataInf,
    Diagonal,
    ExactBlock,
    Identity,
    LiSSA,
    RandomProjection,
)
from fastif.data import as_loader, count
from fastif.evaluation.settings import check_budgets, choose_samplers
from fastif.features import extract
from fastif.influence import Influence
from fastif.journal import refuse_differences, whole
from fastif.losses import LOSSES, MEASUREMENTS
from fastif.samplers import Subset
from fastif.store import MANIFEST, ScoreFolder, fit_settings

FISHERS = ("exact", "monte_carlo", "empirical")
CURVATURES: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {  # the estimator, and what --fisher may be
    "ekfac": (EKFAC, FISHERS),
    "kfac": (KFAC, FISHERS),
    "diagonal": (Diagonal, FISHERS),
    "identity": (Identity, ()),
    "exact": (ExactBlock, ("exact", "empirical")),
    "cg": (CG, ("exact",)),
    "lissa": (LiSSA, ("exact",)),
    "arnoldi": (Arnoldi, ("exact",)),
    "data-inf": (DataInf, ("empirical",)),
    "random-projection": (RandomProjection, FISHERS),
}
_SHOWN = 5  # queries, and training examples of each, in the table


def scores_command(
    script: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            help="A function of yours, also as path/to/file.py:FUNCTION. It takes nothing and returns "
            "(model, train, query): a trained torch.nn.Module in eval mode, and data with labels.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the scores.")],
    curvature: Annotated[str, typer.Option(help=f"One of {', '.join(CURVATURES)}.")] = "ekfac",
    damping: Annotated[
        str | None,
        typer.Option(
            help="Added to the curvature's diagonal: a number or auto.",
            show_default="1e-3; lissa 1e-2, data-inf auto",
        ),
    ] = None,
    fisher: Annotated[
        str | None,
        typer.Option(
            help=f"Gradients for it: one of {', '.join(FISHERS)}.",
            show_default="exact; data-inf, random-projection empirical",
        ),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            help="Names or patterns of layers, comma separated or repeated.", show_default="all; for exact the head"
        ),
    ] = None,
    loss: Annotated[str, typer.Option(help=f"One of {', '.join(LOSSES)}.")] = "cross_entropy",
    measurement: Annotated[str, typer.Option(help=f"Asked of queries: one of {', '.join(MEASUREMENTS)}.")] = "loss",
    sampler: Annotated[
        str | None,
        typer.Option(
            help="Sampler of the examples that carry the curvature, see `sample`.", show_default="all examples"
        ),
    ] = None,
    k: Annotated[str | None, typer.Option(help="How many it picks: a number or a percentage.")] = None,
    batch_size: Annotated[int, typer.Option(help="For data without batches of its own.")] = 256,
    memory: Annotated[int, typer.Option(help="MiB for query gradients: how many queries go at a time.")] = 1024,
    top: Annotated[int, typer.Option(help="Training examples per query in top.csv, the most helpful first.")] = 10,
    self_influence: Annotated[
        bool, typer.Option("--self-influence", help="Write self_influence.npy, too: each example's score on itself.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="For samplers, what the curvature draws, and torch in your function.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a job in the same folder.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Scores of training examples for queries, for a model of your own.

    A score is the predicted rise of a query's loss if the training example is removed: positive means that it helps.
    They are written block by block; fastif.ScoreFolder(FOLDER) reads them in Python.
    """
    began = time.perf_counter()
    estimator = _estimator(curvature, damping, fisher, seed)
    check("batch-size", batch_size, batch_size >= 1, ">= 1")
    check("memory", memory, memory >= 1, ">= 1")
    check("top", top, top >= 0, ">= 0")
    check("seed", seed, 0 <= seed < 2**63, "in [0, 2^63)")
    check("loss", loss, loss in LOSSES, f"one of {', '.join(LOSSES)}")
    check("measurement", measurement, measurement in MEASUREMENTS, f"one of {', '.join(MEASUREMENTS)}")
    if (sampler is None) != (k is None):
        raise ValueError("--sampler and --k go together: which examples carry the curvature, and how many")
    where, patterns = device_named(device), None if layers is None else split(layers)
    picker = None if sampler is None else choose_samplers([sampler])[0]
    if not resume and (out / MANIFEST).exists():
        raise ValueError(f"{out} holds scores already: go on with --resume, or choose another folder")
    torch.manual_seed(seed)
    model, train, query = _returned(script, _function(script))
    influence = Influence(
        model,
        loss,  # pyright: ignore[reportArgumentType]
        estimator,
        layers=patterns,
        measurement=measurement,  # pyright: ignore[reportArgumentType]
        batch_size=batch_size,
        memory=memory << 20,
        device=where,
        seed=seed,
        progress=not quiet,
    )
    n, q = count(train, batch_size), count(query, batch_size)
    check("top", top, top <= n, f"at most the {n} training examples")
    size = None if k is None else check_budgets([k], n)[0]
    if not quiet:
        print(influence.plan(train))
        print(f"{q:,} queries; scores take {q * n * dtype_of(model).itemsize / 2**20:.1f} MiB in {out}", flush=True)
    with writable(out):
        try:
            known = _fit(influence, train, out / "curvature.safetensors", resume, picker, size, seed)
            scores = influence.scores(query, train, out=out, resume=resume)
            paths = [path for path in (out / "top.csv",) if top]
            if top:
                _write_top(out / "top.csv", scores, top)
            if self_influence:
                paths.append(out / "self_influence.npy")
                if not (known and paths[-1].exists()):
                    values = influence.self_influence(train)
                    with whole(paths[-1]) as partial:
                        np.save(partial, values.numpy())
        except KeyboardInterrupt:
            raise Interrupted(f"what was finished is in {out}; the same command with --resume continues") from None
    if not quiet:
        console = terminal()
        console.print(_table(scores))
        names = ", ".join(path.name for path in (out / MANIFEST, *paths))
        console.print(f"[bold]{out}[/bold]: the scores, as fastif.ScoreFolder reads them; {names}", soft_wrap=True)
        console.print(f"{time.perf_counter() - began:.1f} s in all")


def _estimator(curvature: str, damping: str | None, fisher: str | None, seed: int) -> Any:
    """The estimator, with its own defaults for what is not given."""
    check("curvature", curvature, curvature in CURVATURES, f"one of {', '.join(CURVATURES)}")
    check("fisher", fisher, fisher is None or fisher in FISHERS, f"one of {', '.join(FISHERS)}")
    make, fishers = CURVATURES[curvature]
    rule = f"{' or '.join(fishers) or 'left out'} with --curvature {curvature}"
    check("fisher", fisher, fisher is None or fisher in fishers, rule)
    options: dict[str, Any] = {}
    if damping is not None:
        check("damping", damping, make is not Identity, f"left out with --curvature {curvature}")
        try:
            options["damping"] = damping if damping == "auto" else float(damping)
        except ValueError:
            raise ValueError(f"--damping must be a number >= 0 or auto, got {damping}") from None
    if make is RandomProjection:
        options["seed"] = seed
    if fishers == FISHERS and fisher is not None:
        options["fisher"] = fisher
    elif make is ExactBlock and fisher == "empirical":
        options["matrix"] = "empirical_fisher"
    return make(**options)


# ------------------------------------------------------------------------------------------------------- user's script


def _function(script: str) -> Callable[[], Any]:
    """The function that module:function or path/to/file.py:function names; what its import raises is a ScriptError."""
    place, _, name = script.rpartition(":")
    from_file = place.endswith(".py")
    if not name.isidentifier() or not (from_file or all(part.isidentifier() for part in place.split("."))):
        raise ValueError(f"the script must be given as module:function or path/to/file.py:function, got {script!r}")
    if from_file and not Path(place).is_file():
        raise FileNotFoundError(f"no file {place}")
    folder = str(Path(place).parent.resolve()) if from_file else os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = _from_file(Path(place)) if from_file else importlib.import_module(place)
    except ModuleNotFoundError as error:
        if not from_file and f"{place}.".startswith(f"{error.name}."):
            raise ValueError(f"no module {error.name} in {folder}, nor among what is installed") from None
        raise ScriptError(script) from error
    except Exception as error:
        raise ScriptError(script) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{place} has no function {name}")
    return function


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _returned(script: str, function: Callable[[], Any]) -> tuple[nn.Module, Any, Any]:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ValueError(f"{script} must take no arguments: {error}") from None
    try:
        given = function()
    except Exception as error:
        raise ScriptError(script) from error
    rule = f"{script} must return (model, train, query)"
    if not isinstance(given, tuple | list) or len(given) != 3:
        got = f"{len(given)} values" if isinstance(given, tuple | list) else type(given).__name__
        raise ValueError(f"{rule}, got {got}")
    model, train, query = given
    if not isinstance(model, nn.Module):
        raise ValueError(f"{rule}: the model must be a torch.nn.Module, got {type(model).__name__}")
    for name, data in (("train", train), ("query", query)):
        try:
            as_loader(data)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{rule}: {name}: {error}") from error
    return model, train, query


# ----------------------------------------------------------------------------------------------------------- curvature


def _fit(
    influence: Influence,
    train: Any,
    stored: Path,
    resume: bool,
    picker: tuple[str, Callable[..., Any]] | None,
    k: int | None,
    seed: int,
) -> bool:
    """Fits the curvature and keeps it in a file, or takes it from there: whether it was there."""
    name = None if picker is None else picker[0]
    settings = {**fit_settings(influence, train), "sampler": name, "k": k}
    known = resume and stored.exists()
    if known:
        found, state = _read_curvature(stored)
        refuse_differences(stored, found, settings)
        if not influence.parts.needs_data:
            influence.load_state_dict(state)
            return True
    subset = None
    if picker is not None and k is not None:
        subset = _subset(influence, train, picker, k, seed)
    influence.fit(train, subset=subset)
    if known:
        return True
    from safetensors.torch import save

    state = {key: value.detach().cpu().contiguous() for key, value in influence.state_dict().items()}
    with whole(stored) as partial:
        partial.write_bytes(save(state, {"fastif": json.dumps(settings)}))
    return False


def _read_curvature(path: Path) -> tuple[Mapping[str, Any], dict[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            settings = json.loads(file.metadata()["fastif"])
            return settings, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}; remove it and resume the job") from error


def _subset(influence: Influence, train: Any, picker: tuple[str, Callable[..., Any]], k: int, seed: int) -> Subset:
    name, function = picker
    given: dict[str, Any] = {}
    if {"labels", "logits", "features", "points"} & set(inspect.signature(function).parameters):
        batch_size, progress = influence.passes.batch_size, influence.passes.progress
        seen = extract(influence.model, train, device=influence.device, batch_size=batch_size, progress=progress)
        given = {what: values for what, values in seen._asdict().items() if values is not None}
    return drawn(name, function, given, k, count(train, influence.passes.batch_size), seed)


# ------------------------------------------------------------------------------------------------------------- results


def _write_top(path: Path, scores: ScoreFolder, k: int) -> None:
    values, indices = scores.top(k)
    with whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("query", "rank", "train", "score"))
        for query, (row, places) in enumerate(zip(values.tolist(), indices.tolist(), strict=True)):
            writer.writerows(
                (query, rank, t, value) for rank, (t, value) in enumerate(zip(places, row, strict=True), 1)
            )


def _table(scores: ScoreFolder) -> Table:
    """The most helpful training examples of the first queries."""
    k = min(_SHOWN, scores.shape[1])
    values, indices = scores[:_SHOWN].sort(dim=1, descending=True, stable=True)
    table = Table(
        title=f"training examples that help the first queries most (of {scores.shape[1]:,}): index and score",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("query", *(f"{rank}." for rank in range(1, k + 1))):
        table.add_column(name, justify="right", no_wrap=True)
    for query in range(len(values)):
        hits = zip(indices[query, :k].tolist(), values[query, :k].tolist(), strict=True)
        table.add_row(str(query), *(f"{index}  {value:.2e}" for index, value in hits))
    return table
