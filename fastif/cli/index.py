"""`fastif index`, `fastif query`, and what `fastif info` says of an index."""

import hashlib
import json
import time
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer

from fastif.cli.arguments import check, device_named, interruptible, split, terminal, writable
from fastif.cli.config import RUN, write_config
from fastif.cli.explaining import PAGES, write_index_pages
from fastif.cli.fitting import CURVATURES, FISHERS, SHOWN, TOP, damping_of, estimator_of, fisher_of, top_table
from fastif.cli.options import (
    FOLDER,
    Asked,
    AskingScript,
    Config,
    Device,
    Id,
    Image,
    Key,
    Label,
    Loss,
    MaxLength,
    Memory,
    Model,
    OwnBatchSize,
    Pages,
    Prompt,
    Query,
    Quiet,
    Resume,
    Script,
    Text,
    Train,
    TrainingTime,
    WeightDecay,
)
from fastif.cli.problem import Given, batch_of, check_given, given_by
from fastif.curvature.limits import MEMORY
from fastif.data.batches import count
from fastif.files import Damaged, sealed, unsealed, write_whole
from fastif.index.building import load_state
from fastif.index.factors import Stored
from fastif.index.folder import MANIFEST, Folder
from fastif.index.index import Index
from fastif.index.reading import Top
from fastif.influence.influence import Influence
from fastif.influence.rows import top_rows, write_rows
from fastif.influence.shared_folder import held
from fastif.model.losses import MEASUREMENTS

OPTIONS = "options.json"  # in the folder of an index: those of the command, with which a query finds the same curvature
INDEXED = tuple(name for name in CURVATURES if name not in ("cg", "lissa"))  # those that do not need the data later
_UNKNOWN = "not measured: few examples, or the build has not ended"


def index_command(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the index.")],
    script: Script = None,
    model: Model = None,
    train: Train = None,
    text: Text = None,
    label: Label = None,
    prompt: Prompt = None,
    image: Image = None,
    id: Id = None,
    max_length: MaxLength = None,
    share: Annotated[float, typer.Option(help="Of the gradients' numbers, what is kept, in (0, 1].")] = 0.04,
    dtype: Annotated[str, typer.Option(help=f"Of what is kept: one of {', '.join(get_args(Stored))}.")] = "int8",
    curvature: Annotated[str, typer.Option(help=f"One of {', '.join(INDEXED)}.")] = "ekfac",
    damping: Annotated[
        str | None,
        typer.Option(
            help="Added to the curvature's diagonal: a number, auto, or training (see --training-time).",
            show_default="auto; diagonal 1e-3",
        ),
    ] = None,
    training_time: TrainingTime = None,
    weight_decay: WeightDecay = None,
    fisher: Annotated[
        str | None,
        typer.Option(
            help=f"Gradients for it: one of {', '.join(FISHERS)}.", show_default="exact; of language models monte_carlo"
        ),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(help="Names or patterns of layers, comma separated or repeated.", show_default="all"),
    ] = None,
    loss: Loss = None,
    self_influence: Annotated[
        bool, typer.Option("--self-influence", help="Keep each example's exact score on itself, too.")
    ] = False,
    batch_size: OwnBatchSize = None,
    memory: Memory = MEMORY >> 20,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="For what is drawn, and torch in your function.")] = 0,
    resume: Resume = False,
    key: Key = None,
    config: Config = None,
    quiet: Quiet = False,
) -> None:
    """An index of the training gradients of a model of your own, for any number of queries: of a script, or a folder.

    fastif index --model FOLDER --train train.jsonl --text text --label label --out index

    `fastif query` asks it, and fastif.Index(FOLDER, influence) in Python.
    """
    began = time.perf_counter()
    check("share", share, 0 < share <= 1, "in (0, 1]")
    check("curvature", curvature, curvature in INDEXED, f"one of {', '.join(INDEXED)}")
    check("dtype", dtype, dtype in get_args(Stored), f"one of {', '.join(get_args(Stored))}")
    options: dict[str, Any] = dict(
        curvature=curvature,
        damping=damping,
        training_time=training_time,
        weight_decay=weight_decay,
        layers=None if layers is None else split(layers),
        batch_size=batch_of(batch_size, model),
        seed=seed,
    )
    columns: dict[str, Any] = dict(text=text, label=label, prompt=prompt, image=image, id=id, max_length=max_length)
    check_given(script, loss, model=model, train=train, **columns)
    estimator_of(curvature, damping_of(damping, training_time, weight_decay), fisher, seed)
    check("memory", memory, memory >= 1, ">= 1")
    check("seed", seed, 0 <= seed < 2**63, "in [0, 2^63)")
    where = device_named(device)
    if not resume and (out / MANIFEST).exists():
        raise ValueError(f"{out} holds an index already: go on with --resume, or choose another folder")
    torch.manual_seed(seed)
    given = given_by(
        script,
        loss,
        model=model,
        train=train,
        query=None,
        batch_size=options["batch_size"],
        needs=("train",),
        **columns,
    )
    options |= {"loss": given.loss, "fisher": fisher_of(fisher, curvature, given.loss)}
    if model is not None:
        assert train is not None
        files = {"model": str(model.resolve()), "train": str(train.resolve()), "train_checksum": _checksum(train)}
        options |= {"files": {**files, **columns}}
    influence = _influence(given.model, options, "loss", memory, where, not quiet)
    ranks = influence.ranks
    first = ranks.rank == 0  # which alone prints, and writes what is no block
    with interruptible(out, (MANIFEST,)), writable(out) if first else nullcontext(), held(out, ranks):
        if ranks.meet("whether an index is there", (out / MANIFEST).exists())[0]:
            influence.load_state_dict(load_state(Folder(out)))
        else:
            influence.fit(given.train)
            if first:
                write_config(context, out)
                write_whole(out / OPTIONS, json.dumps(sealed(options), indent=1) + "\n")
        index = Index.build(
            influence,
            given.train,
            out,
            ids=None if given.train_examples is None else given.train_examples.ids,
            share=share,
            dtype=dtype,  # pyright: ignore[reportArgumentType]
            self_influence=self_influence,
            resume=resume,
            key=key,
        )
    if not quiet and first:
        _print_facts(index)
        print(f"{time.perf_counter() - began:.1f} s in all")


def query_command(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder of the index.")],
    script: AskingScript = None,
    query: Query = None,
    model: Annotated[
        Path | None,
        typer.Option(help="The model's folder, if it was moved.", rich_help_panel=FOLDER, show_default=False),
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option(help="The training file, if it was moved.", rich_help_panel=FOLDER, show_default=False),
    ] = None,
    top: Annotated[int | None, typer.Option(help="Training examples per query.", show_default=str(TOP))] = None,
    harmful: Annotated[bool, typer.Option("--harmful", help="Those that harm the query most, instead.")] = False,
    rerank: Annotated[
        int, typer.Option(help="Compute the scores of so many of each query's best exactly; takes the training data.")
    ] = 0,
    measurement: Asked = "loss",
    out: Annotated[
        Path | None,
        typer.Option(help="A folder for top.csv, run.toml and pages; or a file for the table alone, .csv or .jsonl."),
    ] = None,
    pages: Pages = SHOWN,
    memory: Memory = MEMORY >> 20,
    device: Device = "cpu",
    config: Config = None,
    quiet: Quiet = False,
) -> None:
    """The training examples that help queries most, from an index: those of your function, or of a file.

    fastif query INDEX --query query.jsonl --out answers
    """
    check("measurement", measurement, measurement in MEASUREMENTS, f"one of {', '.join(MEASUREMENTS)}")
    table = None if out is None or out.is_dir() or not out.suffix else out  # a file alone
    check("out", out, table is None or table.suffix in (".csv", ".jsonl"), "a folder, or a .csv or .jsonl file")
    if out is not None and table is None and (out / RUN).exists():
        raise ValueError(f"{out} holds a run already ({RUN}): choose another folder")
    check("pages", pages, pages >= 0, ">= 0")
    check("memory", memory, memory >= 1, ">= 1")
    n = Index(folder).n
    top = min(TOP, n) if top is None else top
    check("top", top, 1 <= top <= n, f"in [1, {n}], the training examples of the index")
    check("rerank", rerank, rerank == 0 or top <= rerank <= n, f"0, or in [--top {top}, {n}]")
    options, where = _read_options(folder), device_named(device)
    torch.manual_seed(options["seed"])
    given = _asked(folder, options, script, query, model, train, bool(rerank))
    index = Index(folder, _influence(given.model, options, measurement, memory, where, not quiet))
    if given.train_examples is not None and len(given.train_examples.texts) != index.total:
        raise ValueError(
            f"{folder} is of {index.total} training examples, of which the file has {len(given.train_examples.texts)}: "
            "it was appended to in Python, where it can be asked"
        )
    told: list[Path] = []
    first = index.ranks.rank == 0  # which alone prints and writes
    with nullcontext() if out is None or table is not None or not first else writable(out):
        found = index.top(given.query, top, largest=not harmful, rerank=rerank, train=given.train if rerank else None)
        if table is not None and first:
            _write(table, found, given)
        elif out is not None and table is None:
            if first:
                write_config(context, out)
                _write(out / "top.csv", found, given)
            told = write_index_pages(index, given, out / PAGES, pages, rerank)
    if not first:
        return
    if not quiet:
        what = "harm" if harmful else "help"
        terminal().print(top_table("query", "queries", found.values, found.indices, index.n, what, given))
        print(f"of an index of {index.n:,} examples; its error when it was built: {index.measured or _UNKNOWN}")
        if out is not None:
            holds = "" if table is not None else f": top.csv, {RUN}"
            print(f"{count(given.query, options['batch_size']):,} queries: {out}{holds}")
        if told:
            print(f"{told[0]} and so on: the first {len(told)} queries, explained")


def print_index(folder: Path) -> None:
    """What an index holds."""
    _print_facts(Index(folder))


def _print_facts(index: Index) -> None:
    parameters = sum(torch.Size(shape).numel() for shape in index.layers.values())
    settings, n = index.settings, index.n
    facts = {
        "examples": f"{n:,}" + (f", {index.total - n:,} removed" if n < index.total else ""),
        "parameters": f"{parameters:,} in {len(index.layers)} blocks",
        "curvature": settings["curvature"],
        "kept": f"share {settings['share']:g} of the numbers asked for, in {settings['stored']}",
        "size": f"{index.nbytes / 2**20:.1f} MiB, {index.nbytes // n:,} bytes per example",
        "error": str(index.measured or _UNKNOWN),
        "finished": "yes" if index.finished else "no: --resume goes on",
    }
    print(f"{index.path}: an index of training gradients")
    for name, value in facts.items():
        print(f"{name:<10} {value}")


def _asked(
    folder: Path,
    options: dict[str, Any],
    script: str | None,
    query: Path | None,
    model: Path | None,
    train: Path | None,
    rerank: bool,
) -> Given:
    """What an index is asked with. Its training file is read to be shown, where it still is there, and to rerank."""
    size, files = options["batch_size"], options.get("files")
    if files is None:
        for name, value in (("query", query), ("model", model), ("train", train)):
            check(name, value, value is None, f"left out: {folder} was made from a script")
        return given_by(script, options["loss"], model=None, train=None, query=None, batch_size=size)
    if script is not None:
        raise ValueError(f"{folder} was made from a folder with a model: it takes --query and no script, got {script}")
    kept = Path(files["train"]) if train is None else train
    if kept.is_file() and _checksum(kept) != files["train_checksum"]:
        raise ValueError(f"{kept} is not as it was when {folder} was built: give that file with --train, or build anew")
    there = kept if kept.is_file() or rerank or train is not None else None
    columns = {name: value for name, value in files.items() if name not in ("model", "train", "train_checksum")}
    where = Path(files["model"]) if model is None else model
    return given_by(None, None, model=where, train=there, query=query, batch_size=size, needs=("query",), **columns)


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _influence(
    model: torch.nn.Module, options: dict[str, Any], measurement: str, memory: int, where: torch.device, progress: bool
) -> Influence:
    damping = damping_of(options["damping"], options["training_time"], options["weight_decay"])
    return Influence(
        model,
        options["loss"],
        estimator_of(options["curvature"], damping, options["fisher"], options["seed"]),
        layers=options["layers"],
        measurement=measurement,  # pyright: ignore[reportArgumentType]
        batch_size=options["batch_size"],
        memory=memory << 20,
        device=where,
        seed=options["seed"],
        progress=progress,
    )


def _read_options(folder: Path) -> dict[str, Any]:
    path = folder / OPTIONS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} was not made by `fastif index`: it has no {OPTIONS}; ask it in Python")
    try:
        return unsealed(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Damaged(path, str(error), "build the index anew") from error


def _write(path: Path, found: Top, given: Given) -> None:
    """A row for each query and training example, the best first; of examples of files with ids and texts."""
    train, query = given.train_examples, given.query_examples
    ids, columns = None if query is None else query.ids, None if train is None else train.columns
    rows = top_rows(found.values, found.indices, query_ids=ids, columns=columns)
    if found.ids is not None:
        for row, name in zip(rows, chain.from_iterable(found.ids), strict=True):
            shown = {column: row.pop(column) for column in columns or ()}  # ids stand before texts, as in top.csv
            row.update({"id": name, **shown})
    write_rows(rows, path)
